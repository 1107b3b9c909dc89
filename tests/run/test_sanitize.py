"""What a forgotten invalidation does to `iommufdctl run --sanitize`, to `iommufdctl sanitize` and to the daemon."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from iommufd_client import Iommufd
from iommufd_client.admin import Admin
from iommufd_client.testing import Daemon

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from .conftest import Run

FORGOTTEN = "never flushed: dev1, no PASID, read at iova 0x7f1234567000"
RIGHT = "  right: HWPT_INVALIDATE {addr 0x7f1234567000, npages 1} on hwpt"


class Seeded:
    """tests/run/seeded.py as a child."""

    def __init__(self, folder: Path) -> None:
        self.path = str(folder / "seeded.sock")
        self.log = folder / "log"
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(each or os.getcwd() for each in sys.path)}
        words = [sys.executable, "-m", "tests.run.seeded", "--socket-path", self.path, "--sanitize=fail"]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(words, env=environment, stderr=log)
        until = time.monotonic() + 60
        while not os.path.exists(self.path + ".admin"):
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < until
            time.sleep(0.02)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)


@pytest.fixture
def seeded(tmp_path: Path) -> Iterator[Seeded]:
    daemon = Seeded(tmp_path)
    yield daemon
    if daemon.process.poll() is None:
        daemon.stop()
    assert "Traceback" not in daemon.log.read_text()


def control(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "iommufd_client.cli", *words]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(each or os.getcwd() for each in sys.path)}
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)


def test_a_run_without_dma_says_so(run: Run) -> None:
    done = run("--sanitize=fail", "--", "true")
    assert done.returncode == 0, done.stderr
    assert "iommufd: sanitizer: 0 translations used; 0 never flushed" in done.stderr
    assert "sanitizer" not in run("--summary", "--", "true").stderr


def test_a_run_that_forgets_is_told_and_fails(run: Run, seeded: Seeded) -> None:
    words = "--socket-path", seeded.path, "--machine", "ended"
    done = run(*words, "--sanitize=fail", "--", "true")
    assert done.returncode == 66, done.stderr
    assert f"iommufd: {FORGOTTEN}" in done.stderr
    assert f"iommufd: {RIGHT}" in done.stderr
    assert run(*words, "--sanitize=fail", "--", "sh", "-c", "exit 3").returncode == 3
    report = run("--socket-path", seeded.path, "--sanitize", "--", "true")
    assert report.returncode == 0
    assert "not flushed yet: dev1" in report.stderr, "it may still come"


def test_sanitize_prints_and_settles(seeded: Seeded) -> None:
    nothing = control("sanitize", "--socket-path", seeded.path)
    assert (nothing.returncode, nothing.stdout) == (0, "no machine is open\n")
    with Iommufd(seeded.path, machine="open"):
        early = control("sanitize", "--socket-path", seeded.path, "--machine", "open")
        assert early.returncode == 0
        assert "not flushed yet: dev1" in early.stdout
        late = control("sanitize", "--socket-path", seeded.path, "--machine", "open", "--settle")
        assert late.returncode == 1
        assert "machine 'open', mode fail:" in late.stdout
        assert FORGOTTEN in late.stdout
        absent = control("sanitize", "--socket-path", seeded.path, "--machine", "shut")
        assert absent.returncode == 1
        assert "there is no machine 'shut'" in absent.stderr
        with Admin(seeded.path + ".admin") as admin:
            (found,) = admin.sanitize()
        assert (found.mode, found.checked, found.never, found.pending) == ("fail", 2, 1, 0)
        text = control("sanitize", "--socket-path", seeded.path, "--json").stdout
        assert '"never": 1' in text
    assert seeded.stop() == 66
    log = seeded.log.read_text()
    assert "event=never-flushed" in log
    assert "HWPT_INVALIDATE {addr 0x7f1234567000, npages 1}" in log
    assert "event=sanitizer never=1" in log


def test_a_daemon_that_does_not_watch_says_so() -> None:
    with Daemon() as daemon, daemon.open():
        done = control("sanitize", "--socket-path", daemon.socket_path)
        assert done.returncode == 0
        assert set(done.stdout.splitlines()) == {"a private machine: the sanitizer is off"}
