"""An address space made of registered regions: struct mm_struct as data.

A native client registers the files behind its memory (`MAP_SHARED` memfds); tests build whole processes from it. There
is no OS resource here: a region only names a PageFile.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from sortedcontainers import SortedDict

from .user import PAGE_MASK, PAGE_SHIFT, PAGE_SIZE, Mm, PageFile, PageRun

if TYPE_CHECKING:
    from collections.abc import Iterator


class Region(NamedTuple):
    """struct vm_area_struct: [start, end) shows file from byte `offset`; all three are multiples of a page."""

    start: int
    end: int
    file: PageFile
    offset: int
    readable: bool
    writable: bool

    def cut(self, start: int, end: int) -> Region:
        """The part of the region within [start, end)."""
        lo, hi = max(self.start, start), min(self.end, end)
        return self._replace(start=lo, end=hi, offset=self.offset + lo - self.start)


class RegisteredMm(Mm):
    """Regions that do not overlap; each holds a reference of its file."""

    def __init__(self) -> None:
        self.locked_vm = 0
        self.pinned_vm = 0
        self.alive = True
        self._regions: SortedDict[int, Region] = SortedDict()  # by start

    def __len__(self) -> int:
        """How many regions there are."""
        return len(self._regions)

    def regions(self) -> Iterator[Region]:
        """All regions, ascending."""
        return iter(self._regions.values())

    def find(self, addr: int) -> Region | None:
        """The region that holds addr."""
        at = self._regions.bisect_right(addr) - 1
        if at < 0:
            return None
        region: Region = self._regions.peekitem(at)[1]
        return region if addr < region.end else None

    def map(self, region: Region) -> None:
        """mmap(MAP_FIXED): replaces what was there. Takes a reference of the file."""
        region.file.get()  # first: the region replaced may hold the only other reference
        self.unmap(region.start, region.end)
        self._regions[region.start] = region

    def unmap(self, start: int, end: int) -> None:
        """munmap: drops [start, end), cutting regions at its edges."""
        for notifier in self.notifiers:
            notifier.invalidate_range(start, end)
        for region in self._overlapping(start, end):
            del self._regions[region.start]
            for part in (region.cut(region.start, start), region.cut(end, region.end)):
                if part.start < part.end:
                    part.file.get()
                    self._regions[part.start] = part
            region.file.put()

    def protect(self, start: int, end: int, *, readable: bool, writable: bool) -> bool:
        """mprotect; False when part of the range is not mapped."""
        parts = [region.cut(start, end) for region in self._overlapping(start, end)]
        for part in parts:
            self.map(part._replace(readable=readable, writable=writable))
        return sum(part.end - part.start for part in parts) == end - start

    def exit(self) -> None:
        """The last process or channel of this address space is gone."""
        self.alive = False
        for notifier in self.notifiers:
            notifier.mm_release()
        for region in self._regions.values():
            region.file.put()
        self._regions.clear()

    def read(self, addr: int, length: int) -> bytes:
        data = bytearray()
        while len(data) < length:
            at = addr + len(data)
            region = self.find(at)
            if region is None or not region.readable:
                break
            want = min(length - len(data), region.end - at)
            got = region.file.pread(region.offset + at - region.start, want)
            data += got
            if len(got) < want:
                break
        return bytes(data)

    def write(self, addr: int, data: bytes) -> int:
        done = 0
        while done < len(data):
            at = addr + done
            region = self.find(at)
            if region is None or not region.writable:
                break
            part = data[done : done + region.end - at]
            got = region.file.pwrite(region.offset + at - region.start, part)
            done += got
            if got < len(part):
                break
        return done

    def resolve(self, addr: int, npages: int, *, write: bool) -> list[PageRun]:
        runs: list[PageRun] = []
        addr &= PAGE_MASK
        end = addr + (npages << PAGE_SHIFT)
        while addr < end:
            region = self.find(addr)
            if region is None or not (region.writable if write else region.readable):
                break
            pos = region.offset + addr - region.start
            limit = (region.file.size() + PAGE_SIZE - 1 & PAGE_MASK) - pos  # beyond EOF: SIGBUS, no page
            length = min(end, region.end) - addr
            if limit <= 0:
                break
            runs.append(PageRun(region.file, pos >> PAGE_SHIFT, min(length, limit) >> PAGE_SHIFT))
            if limit < length:
                break
            addr += length
        return runs

    def _overlapping(self, start: int, end: int) -> list[Region]:
        first = self._regions.bisect_right(start) - 1
        keys = self._regions.keys()[max(first, 0) : self._regions.bisect_left(end)]
        found = [self._regions[key] for key in keys]
        return [region for region in found if region.end > start]
