"""The interpreter and its process model, without the core.

programs/host/*.out is what the C runner of the recordings (built with gcc, as root on Linux 6.18 without /dev/iommu,
without CAP_SYS_RESOURCE and without huge pages) printed for those programs: `ioctlrun < NAME.prog > NAME.out`.
"""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conformance.interp import output_of
from tests.conformance.memory import HUGE, MemFile, Signal
from tests.conformance.parse import Line, Options, ProgramError, fill_bytes, parse_line, parse_program, strtoull, unhex
from tests.conformance.process import MAP_PRIVATE, MAP_SHARED, Driver, Process, answer
from tests.conformance.run import PROGRAMS, differences, find_programs, main

HOST = sorted((PROGRAMS / "host").glob("*.prog"))
BASE = 0x200000000000


def replayed(text: str) -> str:
    return output_of(parse_program(text), Process(Driver()))


@pytest.mark.parametrize("path", HOST, ids=lambda path: path.stem)
def test_as_the_c_runner_on_a_real_kernel(path: Path) -> None:
    output = output_of(parse_program(path.read_text("latin-1")), Process(Driver()))
    assert output == path.with_suffix(".out").read_text("latin-1")


# ---- words ----


@pytest.mark.parametrize(
    ("text", "value", "rest"),
    [
        ("12", 12, ""),
        ("0x1fz", 0x1F, "z"),
        ("017", 0o17, ""),
        ("08", 0, "8"),
        ("0x", 0, "x"),
        ("-1", 2**64 - 1, ""),
        ("99999999999999999999", 2**64 - 1, ""),
        ("x", 0, "x"),
    ],
)
def test_numbers_are_read_as_strtoull_reads_them(text: str, value: int, rest: str) -> None:
    assert strtoull(text) == (value, rest)


def test_hex_repeats_and_ignores_separators() -> None:
    assert unhex("aa_bb.ccx3,00x2") == bytes.fromhex("aabbcccccc0000")
    assert unhex("-") == b""
    with pytest.raises(ProgramError, match="bad hex at 0g"):
        unhex("000g")
    with pytest.raises(ProgramError, match="hex too long"):
        unhex("00x10001")


def test_a_counter_fill_writes_whole_words() -> None:
    assert fill_bytes("ctr:0xffffffff", 10) == bytes.fromhex("ffffffff00000000")
    assert fill_bytes("0x1ff", 2) == b"\xff\xff"


def test_a_line_pads_missing_tokens_and_keeps_its_label() -> None:
    line = parse_line(7, "  set\ta   5  #  why # so")
    assert line == Line(7, ["set", "a", "5"], "why # so")
    assert (line[2], line[3], len(line), line.end) == ("5", "0", 3, "  # why # so")


class Numbers:
    """Names that are all known: an address, a descriptor, a variable."""

    def expr(self, text: str) -> int:
        return strtoull(text)[0]

    def bufaddr(self, text: str) -> int:
        return BASE

    def getfd(self, text: str) -> int:
        return 5


def masked(tokens: str, data: str, *, ok: bool = True, after: str | None = None) -> str:
    image = bytearray.fromhex(data)
    options = Options()
    for token in tokens.split():
        assert options.parse(token, image, Numbers())
    return options.masked(bytes(image) if after is None else bytes.fromhex(after), ok=ok)


def test_masks_hide_what_was_put_in() -> None:
    assert masked("ptr@0=b fd@8=f", "00" * 12) == "PP" * 8 + "NN" * 4


def test_a_changed_pointer_or_descriptor_is_printed() -> None:
    assert masked("fd@0=f", "00" * 4, after="06000000") == "06000000"


def test_a_returned_descriptor_is_hidden_if_the_call_succeeded() -> None:
    assert masked("outfd@0:q", "04000000") == "DDDDDDDD"
    assert masked("outfd@0:q", "04000000", ok=False) == "04000000"
    assert masked("outfd@2:q", "04000000") == "04000000"


def test_a_mask_asked_for_covers_the_others() -> None:
    assert masked("fd@0=f mask@1:2", "00" * 4) == "NNXXXXNN"


def test_a_patch_past_the_end_is_a_program_error() -> None:
    with pytest.raises(ProgramError, match=r"patch u64@1 past the 8 bytes"):
        masked("u64@1=0", "00" * 8)


# ---- huge pages, of which the host had none ----


@pytest.fixture
def process() -> Process:
    return Process(Driver())


def test_huge_mappings_are_rounded_and_cut_at_huge_pages_only(process: Process) -> None:
    process.mmap(BASE, 1, 3, MAP_PRIVATE, huge=True)
    assert process.space.load(BASE + HUGE - 1, 1) == b"\0"
    assert answer(lambda: process.space.munmap(BASE, 4096)) == (-1, errno.EINVAL)
    assert answer(lambda: process.space.mprotect(BASE + 4096, 4096, 1)) == (-1, errno.EINVAL)
    assert answer(lambda: process.space.munmap(BASE, HUGE)) == (0, 0)


def test_a_huge_mapping_must_lie_on_a_huge_page(process: Process) -> None:
    assert answer(lambda: process.mmap(BASE + 4096, HUGE, 3, MAP_PRIVATE, huge=True)) == (-1, errno.EINVAL)


def test_a_huge_memfd_has_whole_pages_and_no_write(process: Process) -> None:
    assert answer(lambda: process.memfd_create(4096, huge=True)) == (-1, errno.EINVAL)
    fd = process.memfd_create(HUGE, huge=True)
    process.mmap(BASE, 2 * HUGE, 3, MAP_SHARED, fd)
    file = process.files.get(fd)
    assert isinstance(file, MemFile)
    assert (file.size(), file.compound) == (2 * HUGE, True)  # a writable mapping made it grow
    assert answer(lambda: process.ftruncate(fd, 4096)) == (-1, errno.EINVAL)
    assert answer(lambda: process.write(fd, BASE, 8)) == (-1, errno.EINVAL)


def test_a_file_cut_under_a_mapping_is_sigbus_a_hole_is_sigsegv(process: Process) -> None:
    fd = process.memfd_create(0x2000)
    process.mmap(BASE, 0x2000, 3, MAP_SHARED, fd)
    process.ftruncate(fd, 0x1000)
    with pytest.raises(Signal, match="SIGBUS"):
        process.space.load(BASE + 0x1000, 1)
    with pytest.raises(Signal, match="SIGSEGV"):
        process.space.load(BASE + 0x2000, 1)
    assert process.space.writable(BASE, 0x4000) == 0x1000


def test_pages_of_a_forked_process_are_others_unless_shared(process: Process) -> None:
    process.mmap(BASE, 0x1000, 3, MAP_PRIVATE)
    process.mmap(BASE + 0x1000, 0x1000, 3, MAP_SHARED)
    child = process.fork()
    ours, theirs = (space.resolve(BASE, 2, write=True) for space in (process.space, child.space))
    assert ours[0].file is not theirs[0].file
    assert ours[1].file is theirs[1].file


# ---- the runner ----


def write_program(folder: Path, name: str, program: str, output: str) -> None:
    (folder / f"{name}.prog").write_text(program)
    (folder / f"{name}.out").write_text(output)


def test_differences_leave_out_what_is_not_comparable(tmp_path: Path) -> None:
    write_program(tmp_path, "a", "echo\nvmpin\nset v 1\n", "1 echo\n2 vmpin VmPin:99\n3 set v=0x2\nend\n")
    (path,) = find_programs([tmp_path])
    (found,) = differences(path, replayed(path.read_text()))
    assert found == ("3: set v 1", "3 set v=0x2", "3 set v=0x1")


def test_only_listed_programs_must_be_identical(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_program(tmp_path, "good", "set v 1\n", "1 set v=0x1\nend\n")
    write_program(tmp_path, "bad", "set v 1\n", "1 set v=0x2\nend\n")
    listed = tmp_path / "list"
    listed.write_text("good # fine\n")
    command = ["--in-process", "--programs", str(tmp_path)]
    assert main([*command, "--list", str(listed)]) == 0
    assert "in process: 1/2 identical, 1 required" in capsys.readouterr().out
    assert main(command) == 1
    assert "expected 1 set v=0x2" in capsys.readouterr().out


def test_a_crash_of_ours_is_a_difference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_program(tmp_path, "stuck", "eventfd e\nread e 8\n", "1 eventfd e rc=0 e=0\n2 read e 8\nend\n")
    assert main(["--in-process", "--programs", str(tmp_path)]) == 1
    assert "2 read RuntimeError: the read of an empty eventfd would wait for ever" in capsys.readouterr().out


def test_the_runner_prints_its_help() -> None:
    command = [sys.executable, "-m", "tests.conformance.run", "--help"]
    done = subprocess.run(command, capture_output=True, check=True, cwd=PROGRAMS.parent.parent)
    assert b"--in-process" in done.stdout
