"""How a run ends: exit statuses, signals, children that outlive it, and what SIGKILL leaves behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from iommufd_client.show import render
from iommufd_client.testing import Daemon

if TYPE_CHECKING:
    from collections.abc import Callable

    from .conftest import Run

PATIENCE = 10.0
STATUSES = [
    (("true",), 0),
    (("sh", "-c", "exit 42"), 42),
    (("sh", "-c", "kill -SEGV $$"), 128 + signal.SIGSEGV),
    (("/nowhere/at/all",), 127),
    (("/etc/passwd",), 126),
]


@pytest.mark.parametrize(("command", "status"), STATUSES)
def test_the_exit_status_is_that_of_a_shell(run: Run, command: tuple[str, ...], status: int) -> None:
    assert run("--", *command).returncode == status


@pytest.mark.parametrize(
    "words", [(), ("--",), ("--caller", "uid=me", "--", "true"), ("--fd-base", "1", "--", "true"), ("--bad",)]
)
def test_wrong_usage(run: Run, words: tuple[str, ...]) -> None:
    result = run(*words)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr


def test_no_daemon_at_the_socket(run: Run, tmp_path: Path) -> None:
    result = run("--socket-path", tmp_path / "none", "--", "true")
    assert result.returncode == 1
    assert "no daemon answers" in result.stderr


def test_run_under_run_says_why_it_cannot(run: Run) -> None:
    result = run("--", *run.words("--", "true"))
    assert result.returncode == 1
    assert "listens already" in result.stderr


def test_standard_files_signals_and_environment_are_untouched(run: Run) -> None:
    with subprocess.Popen(
        run.words("--", "sh", "-c", 'cat; echo "$PYTHONPATH" >&2'), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env=run.environment,
    ) as process:  # fmt: skip
        out, err = process.communicate(b"through\n", timeout=PATIENCE)
    assert (out, err.decode().strip()) == (b"through\n", run.environment["PYTHONPATH"])
    masks = run("--", "grep", "-E", "^Sig(Blk|Ign|Cgt)", "/proc/self/status").stdout
    bare = subprocess.run(["grep", "-E", "^Sig(Blk|Ign|Cgt)", "/proc/self/status"], capture_output=True, text=True)
    assert masks == bare.stdout


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_goes_on_to_the_command(run: Run, compiled: Path, number: int) -> None:
    with run.start("--", compiled / "behave", "hold") as process:
        _ready(process)
        process.send_signal(number)
        assert process.wait(PATIENCE) == 128 + number


def test_children_that_outlive_the_command_are_served(run: Run, compiled: Path, tmp_path: Path) -> None:
    answer = tmp_path / "answer"
    result = run("--", compiled / "behave", "orphan", answer)
    assert result.returncode == 7
    assert _soon(answer.exists)
    assert _soon(lambda: answer.read_text() == "served\n")


def test_a_command_that_ends_before_the_daemon_is_up(run: Run, tmp_path: Path) -> None:
    """The daemon, which has only begun to start, asks for the keeper when CMD has long ended."""
    out = tmp_path / "out"
    left = ': <>/dev/iommu; echo "$? served" >"$0"'
    words = run.words("--", "sh", "-c", 'sh -c "$1" "$0" &', out, left)
    with subprocess.Popen(words, stderr=subprocess.DEVNULL, env=run.environment) as process:  # no pipe keeps a zombie
        assert process.wait(PATIENCE) == 0
    assert _soon(lambda: out.exists() and out.read_text().endswith("\n"))
    assert out.read_text() == "0 served\n"


def test_orphans_of_the_command_are_reaped(run: Run, daemon: Daemon) -> None:
    script = "(sleep 0.1 & sleep 0.1 & true); sleep 0.5; echo $$; cat /proc/$PPID/task/$PPID/children"
    out = run("--socket-path", daemon.socket_path, "--", "sh", "-c", script).stdout
    command, *children = out.split()
    assert children == [command]


def test_it_ends_where_ends_of_children_are_ignored(run: Run) -> None:
    ignore = "import os, signal as s, sys; s.signal(s.SIGCHLD, s.SIG_IGN); os.execv(sys.argv[1], sys.argv[1:])"
    words = [sys.executable, "-c", ignore, *run.words("--", "grep", "^SigIgn", "/proc/self/status")]
    result = subprocess.run(words, env=run.environment, capture_output=True, text=True, timeout=PATIENCE)
    assert (result.returncode, result.stderr) == (0, "")
    assert int(result.stdout.split()[1], 16) >> signal.SIGCHLD - 1 & 1


def test_a_killed_command_leaves_nothing(run: Run, compiled: Path) -> None:
    with Daemon() as daemon, daemon.admin() as admin:
        with run.start("--socket-path", daemon.socket_path, "--", compiled / "behave", "hold") as process:
            _ready(process)
            assert admin.stats().contexts == 2  # ours, and one more: the daemon's keeper has one too
            (instance,) = (each for each in admin.show().instances if each.processes)
            held = [(each.pid, each.contexts) for each in instance.processes]
            assert held == [(_command(process.pid), [instance.contexts[0].inode])]
            line = f"pid {_command(process.pid)} (behave)  has inode {instance.contexts[0].inode}"
            assert line in render(admin.show())
            os.kill(_command(process.pid), signal.SIGKILL)
            assert process.wait(PATIENCE) == 128 + signal.SIGKILL
        assert _soon(lambda: admin.stats().contexts == 1)


def test_a_killed_keeper_takes_the_command_along(run: Run, compiled: Path) -> None:
    with Daemon() as daemon, daemon.admin() as admin:
        with run.start("--socket-path", daemon.socket_path, "--", compiled / "behave", "hold") as process:
            _ready(process)
            command = _command(process.pid)
            process.kill()
            process.wait(PATIENCE)
            assert _soon(lambda: not _runs(command))
        assert _soon(lambda: admin.stats().contexts == 1)


def test_a_killed_daemon_means_enodev_and_no_more(run: Run, compiled: Path) -> None:
    assert "ENODEV" in outlive(Daemon(terminate=False), run, compiled)


def outlive(daemon: Daemon, run: Run, compiled: Path) -> str:
    """What a run says on stderr whose daemon is killed while CMD calls it."""
    daemon.start()
    try:
        with run.start("--socket-path", daemon.socket_path, "--", compiled / "behave", "outlived") as process:
            _ready(process)
            os.kill(daemon.pid, signal.SIGKILL)
            out, err = process.communicate(timeout=PATIENCE)
    finally:
        daemon.stop()
    assert (process.returncode, out) == (0, "ok\n"), err
    return err


def _ready(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"


def _command(run: int) -> int:
    """CMD, of a run with a daemon at a socket: the only child of the keeper, which is the only one of the run."""
    (keeper,) = _children(run)
    (command,) = _children(keeper)
    return command


def _children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _soon(true: Callable[[], bool]) -> bool:
    end = time.monotonic() + PATIENCE
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True
