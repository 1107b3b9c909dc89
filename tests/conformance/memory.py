"""Linux's memory management as far as the programs can tell: memfds, mappings, and who gets which signal.

mm/mmap.c, mm/mprotect.c, mm/memfd.c, mm/shmem.c and fs/hugetlbfs/inode.c. Huge pages never run out here.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from iommufdd.mm import Region, RegisteredMm
from iommufdd.user import PAGE_SIZE, PageFile, PageRun

if TYPE_CHECKING:
    from collections.abc import Iterator

HUGE = 2 << 20
TASK_SIZE = (1 << 47) - PAGE_SIZE

PROT_WRITE = 2
F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_GROW, F_SEAL_WRITE, F_SEAL_FUTURE_WRITE, F_SEAL_EXEC = (1 << bit for bit in range(6))
F_ALL_SEALS = 0x3F
F_ANY_WRITE = F_SEAL_WRITE | F_SEAL_FUTURE_WRITE


def fail(code: int) -> OSError:
    """The exception that stands for `return -code`."""
    return OSError(code, os.strerror(code))


def round_up(value: int, unit: int = PAGE_SIZE) -> int:
    return -(-value // unit) * unit


class Signal(Exception):
    """An access from the CPU that kills, or is caught and printed: SIGSEGV or SIGBUS."""


class MemFile(PageFile):
    """The pages of a memfd, of a shared or of a private mapping; `unit` is their size.

    As a descriptor it is the memfd: a position, seals, truncation.
    """

    def __init__(self, length: int, *, unit: int = PAGE_SIZE, private: bool = False) -> None:
        self.length = length
        self.unit = unit
        self.compound = unit > PAGE_SIZE
        self.private = private
        self.seals = 0
        self.pos = 0
        self._data = bytearray()  # shorter than the file: the rest is zero

    # The pages, as a mapping shows them: up to the end of the last page.

    def size(self) -> int:
        return self.length

    def pread(self, pos: int, length: int) -> bytes:
        length = max(0, min(length, round_up(self.length, self.unit) - pos))
        data = self._data[pos : pos + length]
        return bytes(data) + bytes(length - len(data))

    def pwrite(self, pos: int, data: bytes) -> int:
        length = max(0, min(len(data), round_up(self.length, self.unit) - pos))
        if pos + length > len(self._data):
            if data.count(0) == len(data):
                self._data[pos:] = bytes(max(0, len(self._data) - pos))
                return length
            self._data.extend(bytes(pos + length - len(self._data)))
        self._data[pos : pos + length] = data[:length]
        return length

    def resize(self, length: int) -> None:
        del self._data[length:]
        self.length = length

    def twin(self, length: int, *, private: bool) -> MemFile:
        """A new file of the same make."""
        return MemFile(length, unit=self.unit, private=private)

    def copy(self) -> MemFile:
        """A private copy: what a forked process gets of a private mapping."""
        other = self.twin(self.length, private=True)
        other.pwrite(0, self.contents())
        return other

    def contents(self) -> bytes:
        """All bytes but zeros at the end."""
        return bytes(self._data[: self.length])

    # The memfd.

    def truncate(self, length: int) -> None:
        if length < 0 or (self.unit > PAGE_SIZE and length % self.unit):
            raise fail(errno.EINVAL)
        forbidden = F_SEAL_SHRINK if length < self.length else F_SEAL_GROW
        if length != self.length and self.seals & forbidden:
            raise fail(errno.EPERM)
        self.resize(length)

    def add_seals(self, seals: int, *, mapped_writable: bool) -> None:
        """memfd_add_seals()."""
        if seals & ~F_ALL_SEALS:
            raise fail(errno.EINVAL)
        if self.seals & F_SEAL_SEAL:
            raise fail(errno.EPERM)
        if seals & F_SEAL_EXEC:  # a memfd is executable unless made otherwise: then this seals it for good
            seals |= F_SEAL_SHRINK | F_SEAL_GROW | F_ANY_WRITE
        if seals & F_SEAL_WRITE and not self.seals & F_SEAL_WRITE and mapped_writable:
            raise fail(errno.EBUSY)
        self.seals |= seals

    def read_at_pos(self, count: int) -> bytes:
        return self.pread(self.pos, max(0, min(count, self.length - self.pos)))

    def write_at_pos(self, data: bytes) -> int:
        """shmem_file_write_iter(); hugetlbfs has none."""
        if self.unit > PAGE_SIZE:
            raise fail(errno.EINVAL)
        if self.pos + len(data) > self.length and self.seals & F_SEAL_GROW:
            data = data[: max(0, self.length // PAGE_SIZE * PAGE_SIZE - self.pos)]  # page by page
            if not data:
                raise fail(errno.EPERM)
        if data and self.seals & F_ANY_WRITE:
            raise fail(errno.EPERM)
        end = self.pos + len(data)
        if end > self.length:
            self.resize(end)
        self.pwrite(self.pos, data)
        self.pos = end
        return len(data)


class AddressSpace(RegisteredMm):
    """struct mm_struct with the rules of mmap, munmap and mprotect.

    A region whose file is no MemFile shows device registers (VM_IO): the CPU reaches it, get_user_pages does not.
    """

    def __init__(self) -> None:
        super().__init__()
        self._sealed: list[tuple[int, int]] = []  # mappings without VM_MAYWRITE

    # For a backend that mirrors the mappings.

    def mapped(self, region: Region) -> None:
        """There is a new mapping."""

    def unmapped(self, start: int, end: int) -> None:
        """Nothing is mapped in [start, end) any more."""

    def protected(self, start: int, end: int, prot: int) -> None:
        """The mapping of [start, end) has other rights."""

    def writable(self, addr: int, length: int) -> int:
        """Bytes of the writable prefix of [addr, addr + length): a client's `Memory` tells before it calls."""
        done = 0
        while done < length:
            region = self.find(addr + done)
            if region is None or not region.writable:
                break
            pos = region.offset + addr + done - region.start
            part = min(length - done, region.end - addr - done)
            there = min(part, round_up(region.file.size()) - pos)
            done += max(0, there)
            if there < part:
                break
        return done

    def within(self, start: int, end: int) -> Iterator[Region]:
        """Regions and their parts in [start, end), ascending."""
        return (region.cut(start, end) for region in self._overlapping(start, end))

    def check_place(self, addr: int, length: int, unit: int) -> None:
        """get_unmapped_area() and MAP_FIXED_NOREPLACE: may a mapping of this file lie here?"""
        if length > TASK_SIZE or addr > TASK_SIZE - length:
            raise fail(errno.ENOMEM)
        if addr % unit or length % unit:
            raise fail(errno.EINVAL)
        if self._overlapping(addr, addr + length):
            raise fail(errno.EEXIST)

    def place(self, addr: int, length: int, prot: int, file: PageFile, offset: int) -> None:
        """mmap_region(). The mapping has its own reference of the file."""
        region = Region(addr, addr + length, file, offset, bool(prot), bool(prot & PROT_WRITE))
        self.map(region)
        if isinstance(file, MemFile) and file.seals & F_ANY_WRITE:
            self._sealed.append((region.start, region.end))
        self.mapped(region)

    def munmap(self, addr: int, length: int) -> None:
        if addr % PAGE_SIZE or addr > TASK_SIZE or not 0 < length <= TASK_SIZE - addr:
            raise fail(errno.EINVAL)
        end = addr + round_up(length)
        for edge in (addr, end):
            self._check_split(edge)
        self.unmap(addr, end)
        self._sealed = [
            part
            for start, stop in self._sealed
            for part in ((start, min(stop, addr)), (max(start, end), stop))
            if part[0] < part[1]
        ]
        self.unmapped(addr, end)

    def mprotect(self, addr: int, length: int, prot: int) -> None:
        if addr % PAGE_SIZE:
            raise fail(errno.EINVAL)
        end = addr + round_up(length)
        if end > 2**64:
            raise fail(errno.ENOMEM)
        at = addr
        for part in list(self.within(addr, end)):
            if part.start != at:
                break
            self._protect_part(part, prot)
            at = part.end
        if at < end:
            raise fail(errno.ENOMEM)

    def _protect_part(self, part: Region, prot: int) -> None:
        if prot & PROT_WRITE and any(lo < part.end and part.start < hi for lo, hi in self._sealed):
            raise fail(errno.EACCES)
        self._check_split(part.start)
        self._check_split(part.end)
        self.protect(part.start, part.end, readable=bool(prot), writable=bool(prot & PROT_WRITE))
        self.protected(part.start, part.end, prot)

    def _check_split(self, addr: int) -> None:
        """hugetlb_vm_op_split(): a huge page cannot be cut."""
        region = self.find(addr)
        if region and isinstance(region.file, MemFile) and addr % region.file.unit:
            raise fail(errno.EINVAL)

    def load(self, addr: int, length: int) -> bytes:
        """A read by the CPU, all of it or a signal."""
        data = self.read(addr, length)
        if len(data) < length:
            raise self._signal(addr + len(data), write=False)
        return data

    def store(self, addr: int, data: bytes | bytearray) -> None:
        """A write by the CPU; what comes before the first fault is stored."""
        done = self.write(addr, bytes(data))
        if done < len(data):
            raise self._signal(addr + done, write=True)

    def _signal(self, addr: int, *, write: bool) -> Signal:
        region = self.find(addr)
        allowed = region and (region.writable if write else region.readable)
        return Signal("SIGBUS" if allowed else "SIGSEGV")

    def maps_writable(self, file: MemFile) -> bool:
        """i_mmap_writable: a shared mapping that is or may be made writable."""
        sealed = {start for start, _ in self._sealed}
        return any(region.file is file and region.start not in sealed for region in self.regions())

    def resolve(self, addr: int, npages: int, *, write: bool) -> list[PageRun]:
        runs = super().resolve(addr, npages, write=write)
        for at, run in enumerate(runs):
            if not isinstance(run.file, MemFile):
                return runs[:at]
        return runs

    def fork_into(self, child: AddressSpace) -> None:
        """dup_mmap(): the child shares shared pages and gets copies of private ones."""
        copies: dict[PageFile, PageFile] = {}
        for region in self.regions():
            file = region.file
            if isinstance(file, MemFile) and file.private:
                if file not in copies:
                    copies[file] = file.copy()
                file = copies[file]
            child.map(region._replace(file=file))
        for copy in copies.values():
            copy.put()  # the mappings hold it
        child._sealed = list(self._sealed)
