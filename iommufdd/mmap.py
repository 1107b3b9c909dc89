"""mmap of the iommufd: registers of a vIOMMU that user space touches directly (main.c, driver.c)."""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING, Protocol

from .errors import EINVAL, ENXIO, EPERM
from .objects import Holder, IommufdObject
from .user import PAGE_SIZE, File

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .context import Context
    from .iommu import ops


class Backing(Protocol):
    """What the server has put behind a region, to show it to processes."""

    def close(self) -> None: ...


class MmapRegion:
    """struct iommufd_mmap: `data` is the memory; whoever shows it to processes moves it to a file."""

    backing: Backing | None = None

    def __init__(self, owner: IommufdObject, offset: int, length: int) -> None:
        self.owner = owner
        self.offset = offset
        self.length = length
        self.data = memoryview(bytearray(length))

    def move(self, data: memoryview, backing: Backing) -> None:
        """From now on the bytes are those of `data`; backing.close() is called when the region goes."""
        data[: self.length] = self.data
        self.data = data
        self.backing = backing


class Vma(File, Holder):
    """One live mapping: a user of the region's owner, and of the context."""

    def __init__(self, ictx: Context, region: MmapRegion) -> None:
        Holder.__init__(self)
        self.refs = 1
        self.ictx = ictx
        self.region = region
        self.hold(region.owner)
        ictx.get()

    def release(self) -> None:
        self.let_go_all()
        self.ictx.put()

    def __str__(self) -> str:
        return f"a mapping at offset {self.region.offset:#x}"


class Offsets:
    """The offsets given out: first fit from one page on (mt_mmap)."""

    def __init__(self) -> None:
        self._lengths: dict[int, int] = {}  # by offset

    def alloc(self, length: int) -> int:
        offset = PAGE_SIZE
        for start in sorted(self._lengths):
            if start - offset >= length:
                break
            offset = start + self._lengths[start]
        self._lengths[offset] = length
        return offset

    def length(self, offset: int) -> int:
        """Bytes of what was given out there."""
        return self._lengths[offset]

    def free(self, offset: int) -> None:
        """What lay there is gone."""
        del self._lengths[offset]


class MmapRegions:
    """The regions of a context. Contexts whose registers one file shows have their offsets in common."""

    def __init__(self, offsets: Offsets | None = None) -> None:
        self._offsets = Offsets() if offsets is None else offsets
        self._regions: dict[int, MmapRegion] = {}  # by offset

    def __iter__(self) -> Iterator[MmapRegion]:
        return iter(self._regions.values())

    def alloc(self, owner: IommufdObject, length: int) -> MmapRegion:
        """_iommufd_alloc_mmap()"""
        offset = self._offsets.alloc(length)
        region = self._regions[offset] = MmapRegion(owner, offset, length)
        return region

    def destroy(self, region: ops.MmapRegion) -> None:
        """_iommufd_destroy_mmap()"""
        backing = self._regions.pop(region.offset).backing
        self._offsets.free(region.offset)
        if backing is not None:
            backing.close()

    def mmap(self, ictx: Context, offset: int, length: int, prot: int, flags: int) -> Vma:
        """iommufd_fops_mmap(): EINVAL, EPERM, ENXIO unless exactly one region is asked for."""
        length = length + PAGE_SIZE - 1 & -PAGE_SIZE  # mmap(2) rounds up before the file sees it
        if not flags & mmap.MAP_SHARED:
            raise EINVAL("registers are mapped MAP_SHARED")
        if prot & mmap.PROT_EXEC:
            raise EPERM("registers cannot be executed")
        region = self._regions.get(offset)
        if region is None or region.length != length:
            raise ENXIO(f"no region of {length:#x} bytes at offset {offset:#x}")
        return Vma(ictx, region)
