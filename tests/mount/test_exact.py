"""mmap() of the file, under plain `mount` and under --exact; what else --exact answers, and how it ends."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from iommufd_client.testing import Daemon
from tests.run.test_end import PATIENCE, _command, _ready, _runs, _soon

from .conftest import passthrough
from .test_behaviour import become_another_user, left_behind

if TYPE_CHECKING:
    from .conftest import Mount

EXACT = ("registers", "errors", "shared", "nothing", "reused", "alarmed", "killed", "privileges")
WITHOUT_RIGHTS = [(("--exact",), "registers"), (("--exact",), "errors"), ((), "no_registers")]
PLAIN = ("registers", "shared", "killed")
PROGRAM = ("/dev/iommu", "--", sys.executable, "-m", "tests.mount.mappings")


def check(result: subprocess.CompletedProcess[str]) -> None:
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("habit", EXACT)
def test_under_exact_it_is_a_device(exact: Mount, daemon: Daemon, habit: str) -> None:
    check(exact("--exact", "--socket-path", daemon.socket_path, *PROGRAM, habit))
    assert not daemon.log.count("event=bug")


@pytest.mark.parametrize("habit", PLAIN)
def test_without_it_registers_are_mapped_where_the_kernel_does_it(mount: Mount, daemon: Daemon, habit: str) -> None:
    if not passthrough():
        pytest.skip("FOPEN_PASSTHROUGH needs Linux 6.9 and CAP_SYS_ADMIN over the host")
    check(mount("--socket-path", daemon.socket_path, *PROGRAM, habit))
    assert not daemon.log.count("event=bug")


def test_a_traced_program_maps_nothing_and_the_log_says_so(exact: Mount) -> None:
    with Daemon() as daemon:
        check(exact("--exact", "--socket-path", daemon.socket_path, *PROGRAM, "traced"))
        assert "event=no-descriptor" in daemon.log


@pytest.mark.parametrize("options", [("--exact",), ()])
def test_nothing_is_left_in_the_daemon(exact: Mount, daemon: Daemon, options: tuple[str, ...]) -> None:
    if not options and not passthrough():
        pytest.skip("no registers without --exact here")
    with daemon.admin() as admin:
        before = admin.stats()
        for habit in ("registers", "shared", "killed"):
            check(exact(*options, "--socket-path", daemon.socket_path, *PROGRAM, habit))
        assert left_behind(before, admin) == []


@pytest.mark.parametrize(("options", "habit"), WITHOUT_RIGHTS)
def test_as_another_user_in_a_user_namespace(exact: Mount, options: tuple[str, ...], habit: str) -> None:
    check(become_another_user(exact, *options, *PROGRAM, habit))


def test_the_status_is_that_of_a_shell(exact: Mount) -> None:
    for command, status in ((("sh", "-c", "exit 42"), 42), (("sh", "-c", "kill -9 $$"), 137), (("/nowhere",), 127)):
        assert exact("--exact", "/dev/iommu", "--", *command).returncode == status


def test_set_user_id_programs_go_on_working(exact: Mount, tmp_path: Path) -> None:
    program = shutil.copy(shutil.which("id") or "id", tmp_path)
    if os.geteuid():
        pytest.skip("only root can give a program another owner")
    os.chown(program, 65534, -1)
    os.chmod(program, 0o4755)
    bare = subprocess.run([program, "-u"], capture_output=True, text=True).stdout
    assert exact("--exact", "/dev/iommu", "--", program, "-u").stdout == bare


def test_it_needs_a_command(mount: Mount) -> None:
    result = mount("--exact", "/dev/iommu")
    assert (result.returncode, "needs a command" in result.stderr) == (2, True)


def test_there_is_one_listener(exact: Mount) -> None:
    words = ("--exact", "/dev/iommu", "--")
    result = exact(*words, *exact.words(*words, "true"))
    assert (result.returncode, "listens already" in result.stderr) == (1, True)


def test_what_fails_is_explained(exact: Mount) -> None:
    result = exact("--exact", "--explain", "--summary", *PROGRAM, "registers")
    assert "IOMMU_DESTROY = EBUSY" in result.stderr
    assert "ioctls in" in result.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_goes_on_to_the_command(exact: Mount, number: int) -> None:
    words = ("--exact", "/dev/iommu", "--", "sh", "-c", "echo ready; exec sleep 100")
    with exact.start(*words, stdin=subprocess.PIPE) as process:
        _ready(process)
        process.send_signal(number)
        assert process.wait(PATIENCE) == 128 + number


def test_a_killed_mount_takes_the_command_along(exact: Mount, daemon: Daemon) -> None:
    options = ("--exact", "--socket-path", daemon.socket_path)
    words = (*options, "/dev/iommu", "--", "sh", "-c", "echo ready; exec sleep 100")
    with exact.start(*words, stdin=subprocess.PIPE) as process:
        _ready(process)
        command = _command(process.pid)
        process.kill()
        process.wait(PATIENCE)
        assert _soon(lambda: not _runs(command))


def test_a_killed_daemon_leaves_a_working_program(exact: Mount) -> None:
    daemon = Daemon(terminate=False).start()
    try:
        options = ("--exact", "--socket-path", daemon.socket_path)
        with exact.start(*options, *PROGRAM, "outlives", stdin=subprocess.PIPE) as process:
            _ready(process)
            os.kill(daemon.pid, signal.SIGKILL)
            out, err = process.communicate("go on\n", timeout=PATIENCE)
    finally:
        daemon.stop()
    assert (process.returncode, out) == (0, "ok\n"), err
    assert "ENOTCONN" in err


@pytest.mark.parametrize("kill", [False, True])
def test_children_that_outlive_the_command_go_on(exact: Mount, tmp_path: Path, kill: bool) -> None:
    """With the daemon and without it: what they map and start is answered."""
    answer, go = tmp_path / "answer", tmp_path / "go"
    os.mkfifo(go)
    daemon = Daemon(terminate=False).start()
    try:
        line = f"{sys.executable} -m tests.mount.mappings an_orphan {go} {answer} < /dev/null > /dev/null 2>&1 & exit 7"
        result = exact("--exact", "--socket-path", daemon.socket_path, "/dev/iommu", "--", "sh", "-c", line)
        assert result.returncode == 7
        if kill:
            os.kill(daemon.pid, signal.SIGKILL)
        go.write_text("now")
        assert _soon(lambda: answer.exists() and answer.read_text() == "mapped\n")
    finally:
        daemon.stop()
