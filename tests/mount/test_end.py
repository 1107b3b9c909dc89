"""How a mount ends: exit statuses, signals, SIGKILL of anybody; and the mount for everybody."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from iommufd_client.testing import Daemon
from tests.run.test_end import PATIENCE, STATUSES, _children, _ready, _runs, _soon

from .conftest import HABITS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from .conftest import Mount

HOLD = ("/dev/iommu", "--", sys.executable, HABITS, "hold")


@pytest.mark.parametrize(("command", "status"), STATUSES)
def test_the_exit_status_is_that_of_a_shell(mount: Mount, command: tuple[str, ...], status: int) -> None:
    assert mount("/dev/iommu", "--", *command).returncode == status


@pytest.mark.parametrize("words", [(), ("/dev/iommu", "--"), ("--caller", "uid=me", "/dev/iommu"), ("--bad", "x")])
def test_wrong_usage(mount: Mount, words: tuple[str, ...]) -> None:
    result = mount(*words)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr


def test_no_daemon_at_the_socket(mount: Mount, tmp_path: Path) -> None:
    result = mount("--socket-path", tmp_path / "none", "/dev/iommu", "--", "true")
    assert (result.returncode, "no daemon answers" in result.stderr) == (1, True)


def test_nothing_is_mounted_without_its_machine(mount: Mount, tmp_path: Path, daemon: Daemon) -> None:
    bad, good = tmp_path / "bad.toml", tmp_path / "good.toml"
    bad.write_text("name = 3\n")
    good.write_text('name = "lab"\n')
    socket = ("--socket-path", daemon.socket_path)
    for status, said, *options in (
        (0, "", "vtd"),
        (0, "", good),
        (0, "", "ci@vtd", *socket),
        (1, f"{bad}:1: name: Expected `str`, got `int`", bad),
        (1, "the daemon refuses: there is no machine 'none'; there are mock, smmuv3, tegra241, vtd", "@none", *socket),
        (2, f"start it with --machine {good}, and say --machine @NAME", good, *socket),
    ):
        result = mount("--machine", *options, "/dev/iommu", "--", "echo", "started")
        assert (result.returncode, result.stdout) == (status, "" if status else "started\n"), options
        assert said in result.stderr


def test_a_folder_is_no_place(mount: Mount, tmp_path: Path) -> None:
    result = mount(tmp_path, "--", "true")
    assert (result.returncode, "no private mount" in result.stderr) == (1, True)


def test_dev_is_as_it_was_but_for_the_file(mount: Mount) -> None:
    listed = mount("/dev/iommu", "--", "sh", "-c", "echo through > /dev/null && ls /dev").stdout.split()
    assert set(listed) == {*os.listdir("/dev"), "iommu"}


def test_nested_mounts_and_a_missing_folder(mount: Mount) -> None:
    inner = mount.words("/dev/iommu", "--", "sh", "-c", "stat -c %F /dev/iommu /dev/vfio/vfio")
    result = mount("/dev/vfio/vfio", "--", *inner)
    assert result.stdout.splitlines() == ["regular empty file"] * 2, result.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_goes_on_to_the_command(mount: Mount, number: int) -> None:
    with mount.start("/dev/iommu", "--", "sh", "-c", "echo ready; exec sleep 100", stdin=subprocess.PIPE) as process:
        _ready(process)
        process.send_signal(number)
        assert process.wait(PATIENCE) == 128 + number


def test_a_killed_command_leaves_nothing(mount: Mount) -> None:
    with Daemon() as daemon, daemon.admin() as admin:
        with mount.start("--socket-path", daemon.socket_path, *HOLD, stdin=subprocess.PIPE) as process:
            _ready(process)
            assert admin.stats().contexts == 2  # ours, and one more: the daemon's keeper has one too
            os.kill(_children(process.pid)[0], signal.SIGKILL)
            assert process.wait(PATIENCE) == 128 + signal.SIGKILL
        assert _soon(lambda: (admin.stats().contexts, admin.stats().channels) == (1, 1))


def test_a_killed_mount_takes_the_command_along(mount: Mount) -> None:
    with Daemon() as daemon, daemon.admin() as admin:
        with mount.start("--socket-path", daemon.socket_path, *HOLD, stdin=subprocess.PIPE) as process:
            _ready(process)
            (command,) = _children(process.pid)
            process.kill()
            process.wait(PATIENCE)
            assert _soon(lambda: not _runs(command))
        assert _soon(lambda: admin.stats().contexts == 1)


def test_a_killed_daemon_means_enotconn_and_no_more(mount: Mount) -> None:
    daemon = Daemon(terminate=False).start()
    try:
        with mount.start("--socket-path", daemon.socket_path, *HOLD, "outlive", stdin=subprocess.PIPE) as process:
            _ready(process)
            os.kill(daemon.pid, signal.SIGKILL)
            out, err = process.communicate("go on\n", timeout=PATIENCE)
    finally:
        daemon.stop()
    assert (process.returncode, out) == (0, "ok\n"), err


# ---- for everybody ----


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A path for a mount that all processes see."""
    if os.geteuid():
        pytest.skip("only root can mount for everybody")
    path = tmp_path / "iommu"
    yield path
    while subprocess.run(["umount", "-l", path], capture_output=True).returncode == 0:
        pass


def _use(place: Path, habit: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"IOMMU": str(place)}
    return subprocess.run([sys.executable, HABITS, habit], env=environment, capture_output=True, text=True, timeout=60)


@contextlib.contextmanager
def _served(mount: Mount, *arguments: str | Path) -> Iterator[subprocess.Popen[str]]:
    with mount.start(*arguments, stdin=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert "is ready" in process.stdout.readline()
            yield process
        finally:
            process.terminate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_everybody_sees_it_until_a_signal(mount: Mount, place: Path, number: int) -> None:
    with _served(mount, place) as process:
        for habit in ("node", "numbers"):
            assert _use(place, habit).stderr == ""
        process.send_signal(number)
        assert process.wait(PATIENCE) == 0
    assert not place.exists()


def test_who_has_it_open_keeps_it(mount: Mount, place: Path) -> None:
    place.write_text("mine")
    with _served(mount, place) as process:
        fd = os.open(place, os.O_RDWR)
        process.terminate()
        assert process.wait(PATIENCE) == 0
    assert place.read_text() == "mine"
    assert os.fstat(fd).st_size == 0  # somebody still answers
    os.close(fd)


def test_a_killed_daemon_ends_the_mount(mount: Mount, place: Path) -> None:
    daemon = Daemon(terminate=False).start()
    try:
        with _served(mount, "--socket-path", daemon.socket_path, place) as process:
            os.kill(daemon.pid, signal.SIGKILL)
            assert process.wait(PATIENCE) == 1
    finally:
        daemon.stop()
    assert not place.exists()
