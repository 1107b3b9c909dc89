"""`iommufdctl dma`, `walk` and `show` of devices: what they print, to the letter, and what they exit with."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from iommufd_client import cli
from iommufd_client.dma import hexdump
from iommufd_client.hardware_options import number
from tests.server.hardware import Guest, Served

README = (Path(__file__).parent.parent.parent / "README.md").read_text()
PAGE = 4096


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    with Served(tmp_path) as made:
        yield made


@pytest.fixture
def guest(served: Served) -> Iterator[Guest]:
    with Guest(served) as made:
        made.table.map(0x1000, 0x5000)
        made.table.map(0x2000, 0x9000)
        yield made


class Command:
    """iommufdctl in this process."""

    def __init__(self, served: Served, capture: pytest.CaptureFixture[bytes]) -> None:
        self.socket = served.socket_path
        self._capture = capture

    def __call__(self, *words: str, expect: int = 0) -> tuple[bytes, str]:
        """(stdout, stderr)"""
        try:
            status = cli.main([words[0], *words[1:], "--socket-path", self.socket])
        except SystemExit as stop:
            status = int(stop.code or 0)
        out, err = self._capture.readouterr()
        assert status == expect, (out, err)
        return out, err.decode()


@pytest.fixture
def ctl(served: Served, capsysbinary: pytest.CaptureFixture[bytes]) -> Command:
    return Command(served, capsysbinary)


class Terminal(io.TextIOWrapper):
    """A terminal's stdout or stderr."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO(), encoding="utf-8", write_through=True)

    def isatty(self) -> bool:
        return True

    def text(self) -> str:
        buffer = self.buffer
        assert isinstance(buffer, io.BytesIO)
        return buffer.getvalue().decode()


# ---- dma ----


def test_write_and_read(guest: Guest, ctl: Command, tmp_path: Path) -> None:
    assert ctl("dma", "vfio0", "write", "0x1ffe", "--text", "hello") == (b"vfio0 wrote 5 B at iova 0x1ffe\n", "")
    assert guest.ram.read(0x5FFE, 2) + guest.ram.read(0x9000, 3) == b"hello"
    assert ctl("dma", "vfio0", "read", "0x1ffe", "5") == (b"hello", "")
    assert ctl("dma", "vfio0", "read", "0x1ffe", "--size", "5", "--file", "-") == (b"hello", "")
    out = tmp_path / "out"
    assert ctl("dma", "vfio0", "read", "0x1000", "8K", "--file", str(out)) == (b"", "")
    assert out.read_bytes() == guest.ram.read(0x5000, PAGE) + guest.ram.read(0x9000, PAGE)
    assert ctl("dma", "vfio0", "compare", "0x1000", "--file", str(out))[0] == b"vfio0 compared 8 KiB at iova 0x1000\n"
    assert ctl("dma", "vfio0", "write", "0x1000", "4", "--file", str(out))[0] == b"vfio0 wrote 4 B at iova 0x1000\n"
    text = ctl("dma", "vfio0", "fill", "0x1000", "6", "--data", "dead", "--repeat", "3")[0]
    assert text == b"vfio0 filled 6 B at iova 0x1000, 3 times\n"
    assert guest.ram.read(0x5000, 6) == b"\xde\xad" * 3
    assert ctl("dma", "vfio0", "fill", "0x1000", "6")[0] == b"vfio0 filled 6 B at iova 0x1000\n"
    assert guest.ram.read(0x5000, 6) == bytes(6)


def test_stdin(guest: Guest, ctl: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"from a pipe")))
    ctl("dma", "vfio0", "write", "0x1000", "--file", "-", "--repeat", "2")
    assert guest.ram.read(0x5000, 11) == b"from a pipe"


def test_a_fault_is_one_line_with_the_next_step(guest: Guest, ctl: Command) -> None:
    out, err = ctl("dma", "vfio0", "write", "0x2ffc", "--text", "too far", expect=1)
    assert out == b""
    assert err == (
        "iommufdctl: vfio0: fault 0x71: a first-stage entry is not present, stage 1 level 1, iova 0x3000; "
        f"see iommufdctl walk vfio0 0x3000 --socket-path {ctl.socket} --write\n"
    )
    walk = shlex.split(err.partition("see iommufdctl ")[2])
    assert cli.main(walk) == 1
    out, err = ctl("dma", "vfio0", "read", "0x2ffc", "8", "--pasid", "9", "--machine", str(inode(guest)), expect=1)
    assert err == (
        "iommufdctl: vfio0: fault 0x59: the PASID table entry is not present, iova 0x2ffc; see iommufdctl walk vfio0 "
        f"0x2ffc --pasid 9 --machine {inode(guest)} --socket-path {ctl.socket}\n"
    )
    del guest


def test_what_was_read_before_a_fault_is_there(guest: Guest, ctl: Command) -> None:
    guest.ram.write(0x9FFC, b"last")
    assert ctl("dma", "vfio0", "read", "0x2ffc", "8", expect=1)[0] == b"last"


def test_a_difference(guest: Guest, ctl: Command) -> None:
    err = ctl("dma", "vfio0", "compare", "0x1000", "--data", "000001", expect=1)[1]
    assert err == "iommufdctl: vfio0: differs at iova 0x1002\n"
    del guest


def test_nobody_is_there(
    guest: Guest, ctl: Command, tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    err = ctl("dma", "vfio9", "read", "0", "1", expect=1)[1]
    assert err == (
        "iommufdctl: [Errno 2] No such file or directory: there is no device 'vfio9'; "
        "there are vfio0, vfio1, vfio2, vfio3\n"
    )
    assert cli.main(["dma", "vfio0", "read", "0", "1", "--socket-path", str(tmp_path / "none")]) == 1
    assert b"no daemon answers at" in capsysbinary.readouterr().err
    assert "No such file" in ctl("dma", "vfio0", "write", "0", "--file", str(tmp_path / "none"), expect=1)[1]
    del guest


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("read", "0x1000"), "a read needs a LENGTH"),
        (("fill", "0x1000", "--text", "x"), "a fill needs a LENGTH"),
        (("fill", "0x1000", "4", "--text", ""), "a fill needs a pattern"),
        (("write", "0x1000"), ""),
        (("write", "0x1000", "4", "--text", "abc"), "3 bytes of data for a length of 4"),
        (("write", "0x1000", "--data", "abc"), "not an even number of hexadecimal digits"),
        (("write", "0x1000", "--data", "ab", "--text", "c"), "not allowed with"),
        (("read", "0x10zz", "1"), "no number like"),
        (("peek", "0x1000", "1"), "invalid choice"),
        (("read", "0", "1", "--repeat", "0"), "is not 1 or more"),
        (("read", "0", "1", "--page-timeout", "-1"), "is not 0 or more"),
    ],
)
def test_wrong_usage(guest: Guest, ctl: Command, words: tuple[str, ...], why: str) -> None:
    if not why:
        assert ctl("dma", "vfio0", *words)[0] == b"vfio0 wrote 0 B at iova 0x1000\n"
    else:
        assert why in ctl("dma", "vfio0", *words, expect=2)[1]
    del guest


def test_numbers() -> None:
    assert [number(text) for text in ("0", "4096", "0x10", "4K", "4k", "2M", "2MiB", "1G", "0x10K")] == [
        0, 4096, 16, 4096, 4096, 2 << 20, 2 << 20, 1 << 30, 16 << 10,
    ]  # fmt: skip


def test_a_hexdump() -> None:
    assert list(hexdump(bytes(range(60, 80)) + b"\0", 0x1FF8)) == [
        "0x000000001ff8  3c 3d 3e 3f 40 41 42 43  44 45 46 47 48 49 4a 4b  <=>?@ABCDEFGHIJK",
        "0x000000002008  4c 4d 4e 4f 00                                    LMNO.",
    ]


def test_a_read_on_a_terminal(guest: Guest, ctl: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    guest.ram.write(0x5000, b"seen\n")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    assert cli.main(["dma", "vfio0", "read", "0x1000", "5", "--socket-path", ctl.socket]) == 0
    assert terminal.text() == "0x000000001000  73 65 65 6e 0a                                    seen.\n"
    assert cli.main(["dma", "vfio0", "read", "0x1000", "8K", "--socket-path", ctl.socket]) == 2


def test_the_bar_is_for_terminals(guest: Guest, ctl: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    guest.table.map(2 << 20, 2 << 20, level=2)
    words = ["dma", "vfio0", "fill", "2M", "2M", "--repeat", "2", "--socket-path", ctl.socket]
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("iommufd_client.dma.BETWEEN", -1.0)
    assert cli.main(words) == 0
    bars = terminal.text().split("\r")
    assert re.fullmatch(r"\[#{7} {23}\] 1 MiB of 4 MiB, [\d.]+(e\+03)? \w+/s\x1b\[K", bars[1])
    assert bars[-1] == "\x1b[K"
    monkeypatch.setenv("TERM", "dumb")
    terminal.seek(0)
    terminal.truncate()
    assert cli.main(words) == 0
    assert terminal.text() == ""


# ---- walk ----

WALKED = """\
vfio0  iova 0x1008  no PASID  read  (intel)
  PASID entry 0                   P PGTT=nested DID=2 FSPM=4 levels FSPTPTR=0x100000 AW=5 levels SSPTPTR=ROOT PWSNP
                                  WORD0 0x0000000000800002 0x0000000000100000
    stage 2             0x100000  ioas 2 0x0..0x3fffff rw  -> memfd:guest + 0x100000
  stage 1 level 4       0x100000  0x0000000000101027  P RW US A  -> table at 0x101000
    stage 2             0x101000  ioas 2 0x0..0x3fffff rw  -> memfd:guest + 0x101000
  stage 1 level 3       0x101000  0x0000000000102027  P RW US A  -> table at 0x102000
    stage 2             0x102000  ioas 2 0x0..0x3fffff rw  -> memfd:guest + 0x102000
  stage 1 level 2       0x102000  0x0000000000103027  P RW US A  -> table at 0x103000
    stage 2             0x103008  ioas 2 0x0..0x3fffff rw  -> memfd:guest + 0x103008
  stage 1 level 1       0x103008  0x0000000000006007  P RW US  -> 4 KiB page at 0x6000
    stage 2               0x6008  ioas 2 0x0..0x3fffff rw  -> memfd:guest + 0x6008
translates 0x1000..0x1fff r-
cached
  PASID cache                     P PGTT=nested DID=2 FSPM=4 levels FSPTPTR=0x100000 AW=5 levels SSPTPTR=ROOT PWSNP
  table of level 3      0x100000  0x0000000000101007  P RW US  -> table at 0x101000
  table of level 2      0x101000  0x0000000000102007  P RW US  -> table at 0x102000
  table of level 1      0x102000  0x0000000000103007  P RW US  -> table at 0x103000
  IOTLB, DID 2 PASID 0            0x1000..0x1fff rw  -> memfd:guest + 0x5008
                                  differs from memory: memfd:guest + 0x6008
  device TLB                      0x1000..0x1fff rw  -> memfd:guest + 0x5008
                                  differs from memory: memfd:guest + 0x6008
"""

REFUSED = """\
vfio0  iova 0x3000  no PASID  write  (intel)
  PASID entry 0              P PGTT=nested DID=2 FSPM=4 levels FSPTPTR=0x100000 AW=5 levels SSPTPTR=ROOT PWSNP
                             WORD0 0x0000000000800002 0x0000000000100000
    stage 2        0x100000  ioas 2 0x0..0x3fffff rw  -> memfd:guest + 0x100000
  stage 1 level 4  0x100000  0x0000000000101007  P RW US  -> table at 0x101000
    stage 2        0x101000  ioas 2 0x0..0x3fffff rw  -> memfd:guest + 0x101000
  stage 1 level 3  0x101000  0x0000000000102007  P RW US  -> table at 0x102000
    stage 2        0x102000  ioas 2 0x0..0x3fffff rw  -> memfd:guest + 0x102000
  stage 1 level 2  0x102000  0x0000000000ffd007  P RW US  -> table at 0xffd000
    stage 2        0xffd018  nothing is mapped
fault 0x76: no second-stage read permission for a first-stage table, stage 2 under stage 1 level 1, iova 0x3000, \
guest address 0xffd018
cached  nothing
"""


def inode(guest: Guest) -> int:
    return os.fstat(guest.iommufd.identity.fileno()).st_ino


def stable(text: bytes) -> str:
    """Without the address of the kernel's table, of which each has its own."""
    lines = re.sub(r"SSPTPTR=0x1000\w{8}", "SSPTPTR=ROOT", text.decode())
    return re.sub(r"0x00001000\w{8}", "WORD0", lines)


def test_walk(guest: Guest, ctl: Command) -> None:
    ctl("dma", "vfio0", "write", "0x1000", "--text", "x")
    guest.table.map(0x1000, 0x6000)
    assert stable(ctl("walk", "vfio0", "0x1008")[0]) == WALKED


def test_walk_into_nothing(guest: Guest, ctl: Command) -> None:
    guest.table.set(0x102000, 0xFFD000 | 7)
    assert stable(ctl("walk", "vfio0", "0x3000", "--write", expect=1)[0]) == REFUSED


def test_walk_json(guest: Guest, ctl: Command) -> None:
    found = json.loads(ctl("walk", "vfio0", "0x1008", "--json")[0])
    assert (found["first"], found["last"], found["fault"]) == (0x1000, 0x1FFF, None)
    assert found["rows"][-1]["area"]["offset"] == 0x5008
    del guest


def test_walk_is_coloured_on_terminals_that_want_it(
    guest: Guest, ctl: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["walk", "vfio0", "0x3000", "--socket-path", ctl.socket]
    monkeypatch.setenv("TERM", "xterm")
    for colour in (True, False):
        terminal = Terminal()
        monkeypatch.setattr(sys, "stdout", terminal)
        monkeypatch.setenv("NO_COLOR", "" if colour else "1")
        assert cli.main(words) == 1
        assert ("\x1b[31mfault 0x71" in terminal.text()) is colour
        assert ("\x1b" in terminal.text()) is colour
    del guest


# ---- show ----


def test_show_draws_devices(guest: Guest, ctl: Command) -> None:
    ctl("dma", "vfio0", "write", "0x1000", "--text", "x")
    ctl("dma", "vfio0", "read", "0x9000", "1", expect=1)
    lines = ctl("show")[0].decode().splitlines()
    at = next(index for index, line in enumerate(lines) if line.startswith("├─ vfio0"))
    assert lines[at:] == [
        "├─ vfio0  0000:01:00.0  behind dmar0  ats  pri  pasid",
        f"│  ├─ without PASID: hwpt_nested 4  inode {inode(guest)}",
        "│  └─ wrote 1 B  1 transfer done  1 failed  1 fault",
        "├─ vfio1  0000:02:00.0  behind dmar0",
        "├─ vfio2  0000:03:00.0  behind dmar0",
        "└─ vfio3  0000:03:00.1  behind dmar0",
    ]


# ---- the README ----


def test_the_lines_of_the_readme(guest: Guest, served: Served) -> None:
    """Each line of the block is typed into a shell, and prints what stands below it."""
    (block,) = re.findall(r"```console\n(.*?)```", README, re.DOTALL)
    here = f"{shlex.quote(sys.executable)} -m iommufd_client.cli"
    environ = {**os.environ, "IOMMUFDD_SOCKET": served.socket_path}
    parts = re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]
    assert len(parts) == 4
    for part in parts:
        line, _, expected = part.partition("\n")
        done = subprocess.run(
            line.replace("iommufdctl", here, 1), shell=True, capture_output=True, text=True, timeout=60, env=environ
        )
        assert [each.rstrip() for each in (done.stdout + done.stderr).splitlines()] == expected.splitlines()
    assert guest.ram.read(0x5000, 5) == b"hello"
