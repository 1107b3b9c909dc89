"""VFIO devices under `iommufdctl run`: C programs that open /dev/vfio/devices/NAME (vfio.c)."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from tests.vfio.daemon import LabDaemon

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from .conftest import Run

WAYS = ("vmm", "context_first", "device_first", "openers", "refused", "status", "processes")


@pytest.fixture(scope="module")
def lab(run: Run) -> Iterator[LabDaemon]:
    with LabDaemon() as daemon:
        run("--socket-path", daemon.socket_path, "--", "true")  # what it keeps from the first run on is there
        yield daemon


@pytest.mark.parametrize("way", WAYS)
def test_a_program_finds_what_a_kernel_shows(run: Run, compiled: Path, lab: LabDaemon, way: str) -> None:
    with lab.admin() as admin:
        before = admin.stats()
        result = run("--socket-path", lab.socket_path, "--", compiled / "vfio", way)
        after = admin.stats()
    assert (result.returncode, result.stdout, result.stderr) == (0, "ok\n", "")
    for count in ("instances", "contexts", "devices", "objects", "charged_fds", "open_fds"):
        assert getattr(after, count) == getattr(before, count), count


def test_explain_and_summary_know_the_ioctls(run: Run, compiled: Path, lab: LabDaemon) -> None:
    options = ("--socket-path", lab.socket_path, "--explain", "--summary")
    lines = run(*options, "--", compiled / "vfio", "vmm").stderr.splitlines()
    (again,) = (line for line in lines if "VFIO_DEVICE_BIND_IOMMUFD = EINVAL" in line)
    assert re.search(r"bound already \{argsz=16, flags=0, iommufd=\d+\}$", again)  # nothing that argsz does not cover
    assert any(line.split()[2:] == ["VFIO_DEVICE_RESET"] for line in lines)
    assert any("VFIO_DEVICE_ATTACH_IOMMUFD_PT, 1 failed" in line for line in lines)
    assert lines[-1] == "iommufd: nothing was left open"


def test_a_machine_without_devices_has_no_files(run: Run, compiled: Path) -> None:
    result = run("--", compiled / "vfio", "vmm")
    assert result.returncode == 1
    assert "(errno 2)" in result.stdout


def test_a_trace_tells_the_calls_on_a_device(run: Run, compiled: Path, lab: LabDaemon, tmp_path: Path) -> None:
    out = tmp_path / "trace"
    run("--socket-path", lab.socket_path, "--trace", out, "--", compiled / "vfio", "vmm")
    text = out.read_text()
    for line in (
        r"VFIO_DEVICE_BIND_IOMMUFD\(vfio0, \{argsz=16, flags=0, iommufd=\d+\}\) = 0 \{out_devid=device:1\} <",
        r"VFIO_DEVICE_ATTACH_IOMMUFD_PT\(vfio0, \{.*pt_id=ioas:\d+.*\}\) = 0 \{pt_id=hwpt_paging:\d+\} <",
        r"VFIO_DEVICE_RESET\(vfio0\) = 0 <",
    ):
        assert re.search(f" {line}", text), line
