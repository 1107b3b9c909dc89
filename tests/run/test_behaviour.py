"""What real programs do with processes, threads, descriptors, signals and memory (behave.c)."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from iommufd_client.testing import Daemon

    from .conftest import Run

HABITS = (
    "threads", "forks", "execs", "cloexec", "dups", "rights", "queue", "full", "alarms", "interrupts", "raw", "memory",
)  # fmt: skip


@pytest.mark.parametrize("habit", HABITS)
def test_a_program_with_this_habit_sees_what_a_kernel_shows(
    run: Run, compiled: Path, daemon: Daemon, habit: str
) -> None:
    result = run("--socket-path", daemon.socket_path, "--", compiled / "behave", habit)
    assert (result.returncode, result.stderr) == (0, ""), result.stdout
    assert set(result.stdout.split()) == {"ok"}


def test_nothing_is_left_in_the_daemon(run: Run, compiled: Path, daemon: Daemon) -> None:
    with daemon.admin() as admin:
        before = admin.stats(classes=True)
        for habit in ("threads", "execs", "dups", "rights", "memory"):
            run("--socket-path", daemon.socket_path, "--", compiled / "behave", habit)
        after = admin.stats(classes=True)
    for count in ("contexts", "channels", "objects", "page_files", "files", "charged_fds", "open_fds", "map_entries"):
        assert getattr(after, count) <= getattr(before, count) + (2 if count == "map_entries" else 0), count
    grown = {name: count for name, count in after.classes.items() if count > before.classes.get(name, 0)}
    assert not [name for name in grown if ".seccomp." in name and not name.endswith(("Watch", "Fds"))], grown


def test_a_private_daemon_serves_the_same(run: Run, compiled: Path) -> None:
    result = run("--", compiled / "behave", "queue")
    assert (result.returncode, result.stdout, result.stderr) == (0, "ok\n", "")


@pytest.mark.parametrize("habit", ["execs", "queue", "memory"])
def test_inside_a_user_and_pid_namespace(run: Run, compiled: Path, daemon: Daemon, habit: str) -> None:
    enter = [shutil.which("unshare") or "unshare", "-Urm", "--pid", "--fork", "--mount-proc"]
    if subprocess.run([*enter, "true"], capture_output=True).returncode:
        pytest.skip("no user namespaces here")
    result = run("--socket-path", daemon.socket_path, "--", *enter, compiled / "behave", habit)
    assert (result.returncode, result.stderr) == (0, ""), result.stdout


@pytest.mark.parametrize("habit", ["threads", "execs", "dups", "queue", "memory"])
def test_without_any_capability(run: Run, compiled: Path, habit: str) -> None:
    """Then /proc/PID/map_files cannot be opened."""
    drop = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if os.geteuid() == 0 else []
    result = _as(run, [*drop, *run.words("--", compiled / "behave", habit)])
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("habit", ["threads", "execs", "dups", "queue", "memory"])
def test_as_another_user(run: Run, compiled: Path, habit: str) -> None:
    if os.geteuid():
        pytest.skip("only root can become another user")
    become = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all"]
    if _as(run, [*become, *run.words("--", "true")]).returncode:
        pytest.skip("another user cannot read Python's or the tests' files")
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        program = shutil.copy(compiled / "behave", folder)
        result = _as(run, [*become, *run.words("--", program, habit)])
    assert result.returncode == 0, result.stdout + result.stderr


def _as(run: Run, command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=run.environment, capture_output=True, text=True, timeout=60)
