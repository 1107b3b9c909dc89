"""Descriptors that are closed once, the scratch file, and guest memory without a daemon."""

from __future__ import annotations

import errno
import fcntl
import gc
import os

import pytest

from iommufd_client.files import Fd, HasFileno, fd_number, sealed_memfd
from iommufd_client.guest import GuestMemory
from iommufd_client.scratch import FIRST, KEPT, ScratchFile

F_GET_SEALS, SHRINK, GROW = 1034, 2, 4


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def test_a_descriptor_is_closed_once() -> None:
    fd = Fd(os.dup(0))
    number = fd.fileno()
    assert str(number) in repr(fd)
    with fd:
        assert not fd.closed
    assert fd.closed
    again = os.dup(0)
    assert again == number  # somebody else has the number now
    fd.close()
    assert is_open(again)
    os.close(again)
    with pytest.raises(ValueError, match="closed"):
        fd.fileno()


def test_a_detached_descriptor_stays_open() -> None:
    fd = Fd(os.dup(0))
    number = fd.detach()
    fd.close()
    del fd
    gc.collect()
    assert is_open(number)
    os.close(number)


def test_a_dropped_descriptor_warns_and_is_closed() -> None:
    fd = Fd(os.dup(0))
    number = fd.fileno()
    with pytest.warns(ResourceWarning, match=f"unclosed <Fd {number}>"):
        del fd
    assert not is_open(number)


# ---- scratch ----


def test_the_scratch_file_is_made_when_needed_and_grows() -> None:
    scratch = ScratchFile()
    assert (scratch.fileno, scratch.unannounced) == (-1, 0)
    assert scratch.place(b"abc", 5000) == 0
    assert scratch.unannounced == FIRST
    assert fcntl.fcntl(scratch.fileno, F_GET_SEALS) == SHRINK
    scratch.announced = FIRST
    assert scratch.place(b"def", 10) == 8192
    assert scratch.unannounced == 0
    fd = scratch.fileno
    assert scratch.place(b"x" * FIRST, FIRST) == 12288
    assert (scratch.unannounced, scratch.fileno) == (2 * FIRST, fd)
    assert (scratch.read(0, 3), scratch.read(8192, 4), scratch.read(12288, 2)) == (b"abc", b"def\0", b"xx")
    scratch.release(2)
    assert scratch.place(b"", 1) > FIRST
    scratch.release(2)
    assert scratch.place(b"", 1) == 0
    scratch.close()
    assert not is_open(fd)


def test_a_large_scratch_file_is_not_kept() -> None:
    scratch = ScratchFile()
    scratch.place(b"", KEPT + 1)
    fd = scratch.fileno
    scratch.announced = scratch.unannounced
    scratch.release(1)
    assert not is_open(fd)
    assert scratch.place(b"", 1) == 0
    assert scratch.unannounced == FIRST
    scratch.close()


def test_a_scratch_file_has_a_limit() -> None:
    scratch = ScratchFile()
    with pytest.raises(OSError, match="exceeds") as caught:
        scratch.place(b"", (1 << 30) + 1)
    assert caught.value.errno == errno.ENOMEM


# ---- guest memory ----


class Space:
    """Records what it is told."""

    def __init__(self) -> None:
        self.closed = False
        self.told: list[tuple[object, ...]] = []

    def register(self, addr: int, length: int, fd: HasFileno | int, offset: int = 0) -> None:
        self.told.append(("register", addr, length, os.fstat(fd_number(fd)).st_size, offset))

    def unregister(self, addr: int, length: int) -> None:
        self.told.append(("unregister", addr, length))


def test_guest_memory() -> None:
    space = Space()
    with GuestMemory(5000, "ram").register(space) as memory:
        assert len(memory) == 8192
        seals = fcntl.fcntl(memory.fd.fileno(), F_GET_SEALS)
        assert seals == SHRINK | GROW
        memory.write(4090, b"crossing a page")
        assert memory.read(4090, 15) == b"crossing a page"
        assert os.pread(memory.fd.fileno(), 8, 4090) == b"crossing"
        memory.view[0] = 7
        part = memory.slice(4096, 4096)
        assert (part.address, len(part), part.offset) == (memory.address + 4096, 4096, 4096)
        addr = memory.address
        with pytest.raises(ValueError, match="already"):
            memory.register(space)
    assert space.told == [("register", addr, 8192, 8192, 0), ("unregister", addr, 8192)]
    assert memory.closed
    memory.close()
    assert bytes(part.view[:2]) == b"ng"  # of "crossing": a slice keeps the pages


@pytest.mark.parametrize(("offset", "length"), [(-1, 1), (0, 8193), (8192, 1), (4096, -1)])
def test_beyond_guest_memory(offset: int, length: int) -> None:
    with GuestMemory(8192) as memory, pytest.raises(ValueError, match="not within"):
        memory.slice(offset, length)


@pytest.mark.parametrize("size", [0, -1])
def test_no_guest_memory(size: int) -> None:
    with pytest.raises(ValueError, match="bytes"):
        GuestMemory(size)


def test_guest_memory_outlives_its_channel() -> None:
    space = Space()
    memory = GuestMemory(4096).register(space)
    space.closed = True
    memory.close()
    assert len(space.told) == 1


def test_huge_guest_memory() -> None:
    try:
        memory = GuestMemory(1, hugetlb=True)
    except OSError:
        pytest.skip("no huge pages are reserved")
    with memory:
        assert len(memory) == 2 << 20


def test_a_memfd_that_cannot_be_made_leaves_nothing() -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OverflowError):
        sealed_memfd("x", 2**63)
    assert len(os.listdir("/proc/self/fd")) == before
