"""Room client: what the first bytes of a program's file say: ELF header, loader, Go's note; or "#!" and its words."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import BinaryIO

# include/uapi/linux/elf.h, elf-em.h
ET_EXEC, ET_DYN = 2, 3
PT_INTERP, PT_NOTE = 3, 4
EM_386, EM_ARM, EM_X86_64, EM_AARCH64 = 3, 40, 62, 183
MACHINES = {
    EM_386: "i386", 8: "mips", 21: "ppc64", 22: "s390x", EM_ARM: "arm", EM_X86_64: "x86_64", EM_AARCH64: "aarch64",
    243: "riscv", 258: "loongarch",
}  # fmt: skip
GO_NOTE = b"Go\0\0"  # owner of the note with the build id, which stripping leaves
LARGEST = 1 << 16  # bytes of program headers or of a note that are looked at
SCRIPT = 256  # bytes of the first line that the kernel reads (BINPRM_BUF_SIZE)


class Elf(NamedTuple):
    """An ELF file that can be executed somewhere."""

    bits: int  #: 32 or 64
    machine: int  #: e_machine
    loader: str  #: PT_INTERP; "" for a static program
    go: bool

    @property
    def machine_name(self) -> str:
        return MACHINES.get(self.machine, f"machine {self.machine}")


class Script(NamedTuple):
    """A file that starts with #!"""

    interpreter: str
    argument: str  #: all that follows, as the kernel passes it on: one word


class _Segment(NamedTuple):
    kind: int
    offset: int
    size: int


def identify(file: BinaryIO) -> Elf | Script | None:
    """What it is; None for what the kernel does not execute, and for what is broken. OSError."""
    start = file.read(SCRIPT)
    if start.startswith(b"#!"):
        return _script(start)
    if start.startswith(b"\x7fELF"):
        try:
            return _elf(file, start)
        except (struct.error, IndexError, OverflowError, OSError):
            return None
    return None


def _script(start: bytes) -> Script | None:
    words = start[2:].split(b"\n")[0].strip().split(None, 1)
    if not words:
        return None
    interpreter, *rest = (word.decode(errors="surrogateescape") for word in words)
    return Script(interpreter, rest[0] if rest else "")


def _elf(file: BinaryIO, start: bytes) -> Elf | None:
    """struct.error, IndexError, OverflowError, OSError for a broken one."""
    bits = {1: 32, 2: 64}[start[4]] if start[4] in (1, 2) else 0
    order = {1: "<", 2: ">"}.get(start[5], "")
    if not bits or not order:
        return None
    kind, machine = struct.unpack_from(f"{order}HH", start, 16)
    if kind not in (ET_EXEC, ET_DYN):
        return None
    loader, go = "", False
    for segment in _segments(file, start, order, bits):
        if segment.kind == PT_INTERP:
            loader = _part(file, segment).partition(b"\0")[0].decode(errors="surrogateescape")
        elif segment.kind == PT_NOTE:
            go = go or GO_NOTE in _part(file, segment)
    return Elf(bits, machine, loader, go)


def _segments(file: BinaryIO, start: bytes, order: str, bits: int) -> Iterator[_Segment]:
    """struct elf32_phdr[] or elf64_phdr[]"""
    if bits == 64:
        table, size, count = struct.unpack_from(f"{order}Q14xHH", start, 32)
        entry = struct.Struct(f"{order}I4xQ8x8xQ")
    else:
        table, size, count = struct.unpack_from(f"{order}I10xHH", start, 28)
        entry = struct.Struct(f"{order}II4x4xI")
    headers = _part(file, _Segment(0, table, size * count))
    for index in range(count):
        yield _Segment(*entry.unpack_from(headers, index * size))


def _part(file: BinaryIO, segment: _Segment) -> bytes:
    file.seek(segment.offset)
    return file.read(min(segment.size, LARGEST))
