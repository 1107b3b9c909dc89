"""--explain, --summary, --proc and --caller."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
rlimit 0x10000
ioctl f 0x85 28000000060000000000000000000000000000000000000000300000000000000000000000000000 u32@8=i ptr@16=m
vmpin
ioctl f 0x80 0800000063000000
"""


def program(tmp_path: Path) -> Path:
    path = tmp_path / "program"
    path.write_text(PROGRAM)
    return path


def test_explain_tells_name_fields_and_reason(run: Run, compiled: Path, daemon: Daemon, tmp_path: Path) -> None:
    options = ("--socket-path", daemon.socket_path, "--explain")
    result = run(*options, "--", compiled / "ioctlrun", stdin=program(tmp_path))
    lines = result.stderr.splitlines()
    assert len(lines) == 2
    assert "IOMMU_IOAS_ALLOC = EOPNOTSUPP: " in lines[0]
    assert "{flags=1}" in lines[0]
    assert "IOMMU_DESTROY = ENOENT: there is no object 99 {id=99}" in lines[1]


def test_summary_counts_calls_and_what_was_left(run: Run, compiled: Path, tmp_path: Path) -> None:
    result = run("--summary", "--", compiled / "ioctlrun", stdin=program(tmp_path))
    assert "5 ioctls in " in result.stderr
    assert "2 IOMMU_IOAS_ALLOC, 1 failed" in result.stderr
    assert "not destroyed before close: 1 DEVICE, 1 HWPT_PAGING, 1 IOAS, 1 SELFTEST in 1 contexts" in result.stderr


def test_proc_shows_what_is_pinned(run: Run, compiled: Path, daemon: Daemon, tmp_path: Path) -> None:
    options = ("--socket-path", daemon.socket_path)
    with_proc = run(*options, "--proc", "--", compiled / "ioctlrun", stdin=program(tmp_path))
    without = run(*options, "--", compiled / "ioctlrun", stdin=program(tmp_path))
    assert "8 vmpin VmPin:12\n" in with_proc.stdout
    assert "8 vmpin VmPin:0\n" in without.stdout


def test_the_caller_is_whom_the_command_line_says(run: Run, compiled: Path, daemon: Daemon, tmp_path: Path) -> None:
    path = tmp_path / "program"
    path.write_text(PROGRAM.replace("rlimit 0x10000\n", ""))

    def mapped(caller: str) -> str:
        options = ("--socket-path", daemon.socket_path, "--caller", caller)
        out = run(*options, "--", compiled / "ioctlrun", stdin=path).stdout
        return next(line.split("e=")[1].split()[0] for line in out.splitlines() if " f 85 " in line)

    assert mapped("caps=none,memlock=8192") == "ENOMEM"
    assert mapped("caps=none,memlock=12288") == "0"
    assert mapped("caps=none,memlock=unlimited") == "0"
