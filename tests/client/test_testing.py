"""The daemon of the tests starts, stops and does not outlive us; and the pytest plugin, in a pytest of its own."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from iommufd_client.testing import Daemon, DaemonError

if TYPE_CHECKING:
    from pathlib import Path

    from iommufd_client import Iommufd


def gone(pid: int, seconds: float = 5) -> bool:
    """Whether a process that is not our child ends."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([fd], [], [], seconds)[0])
    finally:
        os.close(fd)


def test_a_daemon() -> None:
    with Daemon() as daemon:
        directory = daemon.directory
        with daemon.open() as iommufd, daemon.admin() as admin:
            iommufd.ioas_alloc()
            assert admin.stats().objects == 1
        assert "ready" in daemon.log
    assert "ready" in daemon.log
    assert not os.path.exists(directory)
    with pytest.raises(RuntimeError):
        daemon.pid  # noqa: B018


def test_a_daemon_starts_again() -> None:
    daemon = Daemon()
    for _ in range(2):
        daemon.start()
        assert daemon.stop() == 0


def test_a_daemon_that_does_not_start() -> None:
    with pytest.raises(DaemonError, match=r"exited with 2[\s\S]*--no-such-option"):
        Daemon("--no-such-option").start()


def test_a_daemon_without_a_client_of_ours() -> None:
    with Daemon(terminate=False) as daemon, daemon.admin() as admin:
        assert admin.stats().channels == 0


def test_a_daemon_that_is_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("iommufd_client.testing.STOP_TIMEOUT", 0.2)
    daemon = Daemon(terminate=False).start()
    pid = daemon.pid
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(DaemonError, match="did not stop"):
        daemon.stop()
    assert gone(pid)


def test_a_daemon_does_not_outlive_its_client(tmp_path: Path) -> None:
    script = """
import sys, time
from iommufd_client.testing import Daemon
with Daemon() as daemon:
    print(daemon.pid, flush=True)
    time.sleep(60)
"""
    # Killed as it is, it leaves its directory behind: in ours.
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        process.kill()
    assert gone(pid)


def test_admin_credentials_and_faults() -> None:
    with Daemon("--virtual-caller") as daemon, daemon.open() as iommufd, daemon.admin() as admin:
        assert admin.credentials(iommufd.mm, uid=1234, caps=[], memlock=4096) == 1
        (channel,) = [
            each
            for machine in admin.show().instances
            for context in machine.contexts
            for each in context.channels
            if each.mm == iommufd.mm
        ]
        assert (channel.uid, channel.caps, channel.memlock) == (1234, [], 4096)
        admin.fault(iommufd.mm, 1)
        with pytest.raises(OSError, match="fault injected"):
            iommufd.ioas_alloc()
        assert [gate.fired for gate in admin.fault(iommufd.mm)] != [None]
        assert iommufd.ioas_alloc() == 1


def test_admin_refuses() -> None:
    with Daemon() as daemon, daemon.admin() as admin, pytest.raises(OSError, match="virtual-caller"):
        admin.credentials(1, uid=1)


# ---- the plugin ----

TESTS = """
import pytest
kept = []

def test_fresh(iommufd):
    assert iommufd.ioas_alloc() == 1

def test_fresh_again(iommufd, iommufdd_daemon):
    assert iommufd.ioas_alloc() == 1

def test_leak(iommufd):
    kept.append(iommufd.create_access(iommufd.ioas_alloc()))

def test_after_the_leak(iommufd):
    kept.pop().close()
    import time; time.sleep(0.05)
"""


def test_the_plugin_finds_what_is_left_behind(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\niommufdd_options = --log-level debug\n")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-rA",
        ".",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert "PASSED test_it.py::test_fresh\n" in done.stdout
    assert "PASSED test_it.py::test_fresh_again\n" in done.stdout
    assert "ERROR test_it.py::test_leak - Failed: left behind in the daemon" in done.stdout
    assert "'files': 1" in done.stdout


def test_a_plugin_test_is_fast(iommufd: Iommufd) -> None:
    start = time.perf_counter()
    iommufd.channel().close()
    assert time.perf_counter() - start < 1
