"""The command: what it prints, its exit statuses, and that it starts fast."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from iommufd_client import __version__
from iommufd_client import cli as command
from iommufd_uapi.iommufd import IOCTLS

if TYPE_CHECKING:
    from pathlib import Path

    from iommufd_client import Iommufd
    from iommufd_client.testing import Daemon

COMMANDS = ("show", "doctor", "ioctls", "machine", "mount", "run", "sanitize", "dma", "walk", "trace", "demo")


def run(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "iommufd_client.cli", *args],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, **environment},
    )


def test_version() -> None:
    done = run("--version")
    assert (done.returncode, done.stdout) == (0, f"iommufdctl {__version__}\n")


def test_nothing_that_takes_time_is_imported_for_the_version() -> None:
    script = """
import sys
from iommufd_client import cli
try:
    cli.main(["--version"])
except SystemExit:
    pass
slow = {"msgspec", "construct", "trio", "iommufd_uapi", "socket", "ctypes", "json", "subprocess"}
print(sorted(slow & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[1:] == ["[]"]


def test_the_version_comes_fast() -> None:
    best = min(_seconds("--version") - _seconds_of_python() for _ in range(5))
    assert best < 0.08


def _seconds(*args: str) -> float:
    start = time.perf_counter()
    run(*args)
    return time.perf_counter() - start


def _seconds_of_python() -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", "pass"], check=True)
    return time.perf_counter() - start


def test_capabilities(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--print-capabilities"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["type"], found["version"], found["protocol"]) == ("iommufdctl", __version__, 1)
    assert sorted(found["commands"]) == sorted(COMMANDS)
    assert len(found["ioctls"]) == 21


@pytest.mark.parametrize("args", [(), *((name,) for name in COMMANDS)])
def test_help(args: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        command.main([*args, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "example" in text
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize("args", [["nonsense"], ["show", "--bogus"], ["demo", "extra"]])
def test_wrong_usage(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        command.main(args)
    assert caught.value.code == 2
    assert "usage" in capsys.readouterr().err


def test_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([]) == 2
    assert "give a command" in capsys.readouterr().err


# ---- show ----


def test_show(iommufd: Iommufd, iommufdd_daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    ioas = iommufd.ioas_alloc()
    iommufd.mock_domain(ioas)
    with iommufd.guest_memory(8192) as ram:
        iommufd.ioas_map(ioas, ram, iova=0x100_0000)
        assert command.main(["show", "--socket-path", iommufdd_daemon.socket_path]) == 0
    text = capsys.readouterr().out
    assert "\x1b" not in text
    lines = text.splitlines()
    at = next(index for index, line in enumerate(lines) if line.endswith("2 pages pinned, charged by user"))
    assert f"pid {os.getpid()}" in lines[at + 1]
    assert "1 registered region" in lines[at + 1]
    assert [line.lstrip() for line in lines[at + 2 :]] == [
        "├─ ioas 1  1 user  1 area, 8 KiB mapped",
        "│  └─ hwpt_paging 4  1 user  held by the attachment of device 3",
        "└─ device 3 (iommufd_mock0)  2 users  held by the attachment of device 3",
        "└─ selftest 2  0 users",
    ]


def test_show_json(iommufd: Iommufd, iommufdd_daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    iommufd.ioas_alloc()
    assert command.main(["show", "--json", "--admin-socket", iommufdd_daemon.admin_path]) == 0
    found = json.loads(capsys.readouterr().out)
    types = [obj["type"] for each in found["instances"] for ctx in each["contexts"] for obj in ctx["objects"]]
    assert types == ["IOAS"]


def test_show_finds_the_daemon_by_its_environment(iommufdd_daemon: Daemon) -> None:
    assert run("show", IOMMUFDD_SOCKET=iommufdd_daemon.socket_path).returncode == 0


def test_show_without_a_daemon(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["show", "--socket-path", str(tmp_path / "nothing")]) == 1
    error = capsys.readouterr().err
    assert "no daemon answers" in error
    assert "Traceback" not in error


def test_colours(iommufdd_daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    from iommufd_client.show import ansi, plain

    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert command._paint() is ansi
    monkeypatch.setenv("NO_COLOR", "1")
    assert command._paint() is plain
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert command._paint() is plain


def test_a_reader_that_has_enough() -> None:
    line = f"{sys.executable} -m iommufd_client.cli ioctls | head -1"
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=True)
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""


# ---- doctor ----


def test_doctor(iommufdd_daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["doctor", "--socket-path", iommufdd_daemon.socket_path]) == 0
    text = capsys.readouterr().out
    assert f"answers at {iommufdd_daemon.socket_path}" in text
    assert "FAIL" not in text


def test_doctor_without_a_daemon(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / "nothing")
    assert command.main(["doctor", "--json", "--socket-path", path]) == 0
    findings = {each["topic"]: each for each in json.loads(capsys.readouterr().out)}
    assert findings["daemon"]["verdict"] == "note"
    assert findings["daemon"]["advice"] == f"start one: iommufdd --socket-path {path}"
    assert {each["verdict"] for each in findings.values()} <= {"ok", "note"}


def test_doctor_fails_when_something_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def no_memfd(*_: object) -> int:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(os, "memfd_create", no_memfd)
    assert command.main(["doctor", "--socket-path", str(tmp_path / "nothing")]) == 1


# ---- ioctls ----


def test_ioctls(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["ioctls"]) == 0
    text = capsys.readouterr().out
    assert all(f"{struct.CMD:#x}  {struct.MACRO}  struct {struct.C_NAME}" in text for struct in IOCTLS)
    assert "   0x3b89  IOMMU_HWPT_ALLOC  struct iommu_hwpt_alloc  48/24 bytes\n" in text
    assert "0x3ba0/8  IOMMU_TEST_OP_ACCESS_RW" in text


def test_ioctls_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["ioctls", "map_file"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "   0x3b8f  IOMMU_IOAS_MAP_FILE  struct iommu_ioas_map_file  40 bytes",
        "           fd  descriptor in",
    ]
    assert command.main(["ioctls", "nothing"]) == 1


def test_ioctls_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["ioctls", "--json"]) == 0
    found = {each["name"]: each for each in json.loads(capsys.readouterr().out)}
    assert found["IOMMU_GET_HW_INFO"]["pointers"] == [
        {"field": "data_uptr", "offset": 16, "direction": "out", "bytes": "data_len"}
    ]
    assert found["IOMMU_TEST_OP_DMABUF_GET"]["fds"] == [{"field": "result", "direction": "out"}]
    assert len(found) == 21 + 23


# ---- demo ----


def test_demo_of_a_shared_table() -> None:
    """A DMA misses, asks, goes on; the slot goes, and it fails; the slot comes back. Nothing is ever pinned."""
    done = run("demo", "kvm")
    assert done.returncode == 0, done.stderr
    for words in (
        "hwpt_kvm 2", "Device or resource busy", "stage 2 level 5", "1 page request, 0 answered FAILURE",
        "2 page requests, 1 answered FAILURE", "3 page requests", "0 invariants broken",
        "pages that anybody had pinned: 0; objects left in the daemon: 0",
    ):  # fmt: skip
        assert words in done.stdout, words
    assert done.stderr == ""


def test_demo() -> None:
    done = run("demo")
    assert done.returncode == 0, done.stderr + done.stdout
    for said in (
        "guest memory at 0x200010 has b'written by vfio0'",
        "stage 1 level 1  at 0x103b38: P RW US A D  4 KiB page at 0x200000",
        "the DMA is done; memory has b'late'",
        "vfio0 still reads b'the old page'",
        "right: HWPT_INVALIDATE {addr 0x7f1234567000, npages 1} on hwpt 5 (IOTLB and device TLB)",
        "vfio0 reads b'the new page'",
        "none failed",
        "objects left in the daemon: 0",
    ):
        assert said in done.stdout
    assert done.stderr == ""


def test_demo_of_smmuv3() -> None:
    done = run("demo", "smmuv3")
    assert done.returncode == 0, done.stderr + done.stdout
    for said in (
        "IOMMU_VDEVICE_ALLOC  ->  vfio1 is vSID 0x18",
        "guest memory at 0x202000 has b'written by vfio1'",
        "CD at 0x80080: epd1 v aa64 r a aset asid=0x2 ttb0=0x120000",
        "stage 1 level 1 (Arm 3) at 0x123b38: V T AP1 AF nG 4 KiB page at 0x202000",
        "vfio1 still reads b'written by vfio1'",
        "right: CMD_CFGI_CD sid=0x18 leaf on viommu 5, CMD_TLBI_NH_ASID asid=0x2 on viommu 5",
        "2 commands; vfio1 reads b'the other table!', vfio0 b'written by vfio0'",
        "40 bytes, sequence 0: F_TRANSLATION sid=0x18 class=IN addr=0x7f123456c000",
        "event 1, event 2, event 3, event 4, 7 LOST_EVENTS",
        "objects left in the daemon: 0",
    ):
        assert said in done.stdout
    assert done.stderr == ""


def test_demo_of_the_mock() -> None:
    done = run("demo", "mock")
    assert done.returncode == 0, done.stderr
    assert "written by a device" in done.stdout
    assert "is in use by hwpt_paging" in done.stdout
    assert "objects left in the daemon: 0" in done.stdout
    assert done.stderr == ""
