"""`iommufdctl run --trace`: the calls of a C program, line by line, in a file or on stderr."""

from __future__ import annotations

import re
import subprocess
from typing import TYPE_CHECKING

from tests.server.conftest import eventually

if TYPE_CHECKING:
    from pathlib import Path

    from iommufd_client.testing import Daemon

    from .conftest import Run

PROGRAM = """\
open f
ioctl f 0x81 0c0000000000000000000000 save32@8:i
ioctl f 0x81 0c0000000100000000000000
ioctl f 0xa0 480000000200000000000000000000000000000000000000000000000000000000000000000000000000000000000000\
000000000000000000000000000000000000000000000000 u32@8=i
buf m shared 0x3000
ioctl f 0x85 28000000060000000000000000000000000000000000000000300000000000000000000000000000 u32@8=i ptr@16=m
ioctl f 0x8e 10000000000000000000000000000000
ioctl f 0x80 0800000063000000
"""

LINES = """\
IOMMU_IOAS_ALLOC(iommufd:N, {flags=0}) = 0 {out_ioas_id=ioas:1} <T>
IOMMU_IOAS_ALLOC(iommufd:N, {flags=1}) = -1 EOPNOTSUPP (Operation not supported): flags 0x1 are not known <T>
IOMMU_TEST_OP_MOCK_DOMAIN(iommufd:N, {id=ioas:1}) = 0 \
{out_stdev_id=selftest:2, out_hwpt_id=hwpt_paging:4, out_idev_id=device:3} <T>
IOMMU_IOAS_MAP(iommufd:N, {flags=IOMMU_IOAS_MAP_WRITEABLE|IOMMU_IOAS_MAP_READABLE, ioas_id=ioas:1, user_va=P, \
length=0x3000, iova=0x0}) = 0 {iova=0x1000000} <T>
IOMMU_FAULT_QUEUE_ALLOC(iommufd:N, {flags=0}) = 0 {out_fault_id=fault:5, out_fault_fd=F} <T>
IOMMU_DESTROY(iommufd:N, {id=99}) = -1 ENOENT (No such file or directory): there is no object 99 <T>
"""

LINE = re.compile(r"^\d+\.\d{6} \d+ \(ioctlrun\) (.*) <\d+\.\d{6}>$")


def program(tmp_path: Path) -> Path:
    path = tmp_path / "program"
    path.write_text(PROGRAM)
    return path


def masked(text: str) -> str:
    """Without what differs from run to run: times, pid, the context's number, an address, a descriptor."""
    found = []
    for line in text.splitlines():
        match = LINE.match(line)
        assert match is not None, line
        what = re.sub(r"iommufd:\d+", "iommufd:N", match[1])
        what = re.sub(r"user_va=0x[0-9a-f]+", "user_va=P", re.sub(r"out_fault_fd=\d+", "out_fault_fd=F", what))
        found.append(f"{what} <T>\n")
    return "".join(found)


def test_a_file(run: Run, compiled: Path, tmp_path: Path) -> None:
    """By a private daemon; what the program itself prints and gets is as without."""
    traced, plain = tmp_path / "trace", program(tmp_path)
    traced.write_text("what was there before\n" * 100)
    result = run("--trace", traced, "--", compiled / "ioctlrun", stdin=plain)
    assert result.returncode == 0
    assert result.stderr == ""
    assert masked(traced.read_text()) == LINES
    seconds = [float(line.split()[0]) for line in traced.read_text().splitlines()]
    assert seconds == sorted(seconds)
    assert result.stdout == run("--", compiled / "ioctlrun", stdin=plain).stdout


def test_stderr_beside_what_is_explained(run: Run, compiled: Path, daemon: Daemon, tmp_path: Path) -> None:
    options = ("--socket-path", daemon.socket_path, "--trace", "-", "--explain")
    result = run(*options, "--", compiled / "ioctlrun", stdin=program(tmp_path))
    said = result.stderr.splitlines(keepends=True)
    assert masked("".join(line for line in said if not line.startswith("iommufd: "))) == LINES
    assert len(said) == LINES.count("\n") + 2


def test_others_of_the_same_daemon_and_machine_are_not_told(
    run: Run, compiled: Path, daemon: Daemon, tmp_path: Path
) -> None:
    options = ("--socket-path", daemon.socket_path, "--machine", "lab")
    traced = tmp_path / "trace"
    child = run.start(*options, "--trace", traced, "--", "sh", "-c", "echo here; read line", stdin=subprocess.PIPE)
    assert child.stdin is not None
    assert child.stdout is not None
    assert child.stdout.readline() == "here\n"
    assert run(*options, "--", compiled / "ioctlrun", stdin=program(tmp_path)).returncode == 0
    child.communicate("go\n", timeout=60)
    assert child.returncode == 0
    assert traced.read_text() == ""


def test_children_that_outlive_the_command(run: Run, compiled: Path, tmp_path: Path) -> None:
    """The copy of run that stays for them writes the rest."""
    traced, plain = tmp_path / "trace", program(tmp_path)
    calls = f"{compiled}/ioctlrun < {plain} > /dev/null"
    script = f"{calls}; (sleep 0.3; {calls}) &"
    child = run.start("--trace", traced, "--", "sh", "-c", script)
    assert child.wait(60) == 0
    eventually(lambda: traced.read_text().count("\n") == 2 * LINES.count("\n"))
    child.communicate(timeout=60)  # the daemon has ended too
    assert masked(traced.read_text()) == LINES * 2


def test_a_file_that_cannot_be_made(run: Run, tmp_path: Path) -> None:
    result = run("--trace", tmp_path / "missing" / "trace", "--", "true")
    assert result.returncode == 1
    assert result.stderr == f"iommufdctl: {tmp_path}/missing/trace: No such file or directory\n"


def test_a_disk_that_is_full_harms_nobody(run: Run, compiled: Path, tmp_path: Path) -> None:
    result = run("--trace", "/dev/full", "--", compiled / "ioctlrun", stdin=program(tmp_path))
    assert result.returncode == 0
    assert " f 80 " in result.stdout
