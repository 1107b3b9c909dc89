"""Faults without signals: real mappings of this process, and Python buffers."""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import TYPE_CHECKING

import pytest

from iommufd_client.memory import NO_MEMORY, Buffers, OwnMemory

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE = 4096
NONE, READ, WRITE = 0, 1, 3

libc = ctypes.CDLL(None, use_errno=True)
libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class Mapped:
    """Pages with a protection each."""

    def __init__(self, *prots: int, flags: int = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, fd: int = -1) -> None:
        self.map = mmap.mmap(fd, PAGE * len(prots), flags=flags)
        self.map[:] = b"x" * len(self.map)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.map))
        for at, prot in enumerate(prots):
            assert not libc.mprotect(self.address + at * PAGE, PAGE, prot)

    def all_writable(self) -> None:
        libc.mprotect(self.address, len(self.map), WRITE)


@pytest.fixture(params=["query", "text"])
def own(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[OwnMemory]:
    memory = OwnMemory()
    if request.param == "text":
        monkeypatch.setattr(OwnMemory, "_vma", OwnMemory._vma_text)
    yield memory
    memory.close()


@pytest.mark.parametrize(
    ("prots", "readable", "writable"),
    [
        ((WRITE,), 1, 1),
        ((WRITE, READ), 2, 1),
        ((READ,), 1, 0),
        ((NONE,), 0, 0),
        ((WRITE, NONE, WRITE), 1, 1),
        ((WRITE, WRITE, WRITE), 3, 3),
        ((READ, WRITE), 2, 0),
    ],
)
@pytest.mark.parametrize("shared", [False, True])
def test_protections(own: OwnMemory, prots: tuple[int, ...], readable: int, writable: int, shared: bool) -> None:
    kind = mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE
    mapped = Mapped(*prots, NONE, flags=kind | mmap.MAP_ANONYMOUS)
    length = PAGE * len(prots) + 5
    assert len(own.read(mapped.address, length)) == readable * PAGE
    assert own.writable(mapped.address, length) == writable * PAGE
    assert own.write(mapped.address, bytes(length)) == writable * PAGE
    mapped.all_writable()
    assert mapped.map[: writable * PAGE].strip(b"\0") == b""
    assert mapped.map[writable * PAGE :].strip(b"x") == b""


def test_the_end_of_a_page(own: OwnMemory) -> None:
    mapped = Mapped(WRITE, NONE)
    addr = mapped.address + PAGE - 3
    assert own.read(addr, 8) == b"xxx"
    assert own.writable(addr, 8) == 3
    assert own.write(addr, b"abcdefgh") == 3
    assert mapped.map[PAGE - 3 : PAGE] == b"abc"
    assert own.read(addr + 3, 1) == b""


def test_asking_changes_nothing(own: OwnMemory) -> None:
    mapped = Mapped(WRITE)
    own.writable(mapped.address, PAGE)
    assert mapped.map[:] == b"x" * PAGE


def test_nothing_is_mapped_at(own: OwnMemory) -> None:
    for addr in (0, 1, PAGE - 1, 0x7FFF_FFFF_F000, 0x8000_0000_0000, 0xFFFF_8000_0000_0000, 2**64 - 4, 2**64 - 1):
        assert own.read(addr, 8) == b""
        assert own.writable(addr, 8) == 0
        assert own.write(addr, b"12345678") == 0


def test_a_file_that_ends_earlier(own: OwnMemory) -> None:
    fd = os.memfd_create("short")
    os.ftruncate(fd, 2 * PAGE)
    mapped = Mapped(WRITE, WRITE, flags=mmap.MAP_SHARED, fd=fd)
    os.ftruncate(fd, PAGE)
    assert len(own.read(mapped.address, 2 * PAGE)) == PAGE
    assert own.writable(mapped.address, 2 * PAGE) == PAGE
    assert own.write(mapped.address + PAGE, b"y") == 0
    os.close(fd)


def test_after_a_fork_it_is_the_child(own: OwnMemory) -> None:
    mapped = Mapped(WRITE)
    assert own.writable(mapped.address, 1) == 1
    pid = os.fork()
    if not pid:
        libc.mprotect(mapped.address, PAGE, READ)
        os._exit(own.writable(mapped.address, 1) + 2 * own.write(mapped.address, b"z"))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert own.writable(mapped.address, 1) == 1
    assert mapped.map[:1] == b"x"


def test_large_reads() -> None:
    own = OwnMemory()
    mapped = mmap.mmap(-1, 8 << 20)
    mapped[-1:] = b"!"
    addr = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
    assert own.read(addr, 8 << 20)[-1:] == b"!"
    own.close()


# ---- Python buffers ----


def test_buffers() -> None:
    buffers = Buffers()
    data, fixed = bytearray(b"abcdef"), b"123"
    first, second = buffers.add(data), buffers.add(fixed)
    assert buffers.read(first, 100) == b"abcdef"
    assert buffers.read(first + 4, 1) == b"e"
    assert buffers.read(first + 6, 1) == b""
    assert buffers.read(first - 1, 1) == b""
    assert (buffers.writable(first + 2, 100), buffers.writable(second, 3)) == (4, 0)
    assert buffers.write(first + 4, b"XYZ") == 2
    assert data == b"abcdXY"
    assert buffers.write(second, b"9") == 0
    assert buffers.read(second, 3) == b"123"
    assert buffers.read(0, 1) == buffers.read(2**64 - 1, 1) == b""


def test_buffers_of_other_kinds() -> None:
    buffers = Buffers()
    numbers = (ctypes.c_uint32 * 2)(1, 2)
    addr = buffers.add(memoryview(numbers).cast("B").cast("I"))
    assert buffers.read(addr, 8) == b"\1\0\0\0\2\0\0\0"
    buffers.write(addr + 4, b"\7")
    assert numbers[1] == 7


def test_an_empty_buffer_is_null() -> None:
    assert Buffers().add(b"") == 0


def test_no_memory() -> None:
    assert (NO_MEMORY.read(0, 1), NO_MEMORY.writable(0, 1), NO_MEMORY.write(0, b"x")) == (b"", 0, 0)
