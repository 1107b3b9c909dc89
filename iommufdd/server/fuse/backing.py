"""The file behind every mapping of a mount (FOPEN_PASSTHROUGH, Linux 6.9): registers of vIOMMUs.

The kernel maps it without asking us. All files of a mount are one inode, and an inode has one such file. So the
regions of all contexts lie in it, each at an offset of its own, and a mapping that a device would refuse shows nothing.
munmap() is looked for when it matters: before an object is destroyed, and before an offset is given out again.

Only with CAP_SYS_ADMIN over the whole host (fuse_backing_open), and only for the mount of one command: whoever can open
the file can map all of it.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from typing import TYPE_CHECKING

from iommufdd.mmap import MmapRegions, Offsets
from iommufdd.server.seccomp.registers import mapped_parts, show

from . import abi

if TYPE_CHECKING:
    from iommufdd.context import Context
    from iommufdd.mmap import Vma


class MountOffsets(Offsets):
    """One that is free is not given out while it is still mapped."""

    def __init__(self, inode: tuple[int, int]) -> None:
        super().__init__()
        self._inode = inode
        self._left: set[int] = set()  # free, but perhaps mapped

    def alloc(self, length: int) -> int:
        if self._left:
            shown = mapped_parts(self._inode)
            for offset in [each for each in self._left if not overlap(shown, each, self.length(each))]:
                self._left.discard(offset)
                super().free(offset)
        return super().alloc(length)

    def free(self, offset: int) -> None:
        self._left.add(offset)


class Backing:
    """The file of one mount."""

    def __init__(self, device: int, inode: tuple[int, int]) -> None:
        """OSError: EPERM without the right to it, EOPNOTSUPP and the like where the kernel has no such thing."""
        self.inode = inode
        self.offsets = MountOffsets(inode)
        self._memfd = os.memfd_create("iommufd-registers", os.MFD_CLOEXEC)
        try:
            request = bytearray(abi.BACKING_MAP.pack(self._memfd, 0, 0))
            self.id = int(fcntl.ioctl(device, abi.DEV_IOC_BACKING_OPEN, request))
        except OSError:
            os.close(self._memfd)
            raise

    def close(self) -> None:
        os.close(self._memfd)

    def adopt(self, ctx: Context) -> None:
        """A context whose regions are to lie here."""
        ctx.mmaps = MmapRegions(self.offsets)

    def show(self, ctx: Context) -> None:
        """Regions that are new. OSError."""
        for region in ctx.mmaps:
            if region.backing is None:
                end = region.offset + region.length
                if os.fstat(self._memfd).st_size < end:
                    os.ftruncate(self._memfd, end)
                show(region, self._memfd)

    def mappings(self, ctx: Context) -> list[Vma]:
        """The live ones of a context's regions, each to be put."""
        if not any(ctx.mmaps):
            return []
        shown = mapped_parts(self.inode)
        found = [region for region in ctx.mmaps if overlap(shown, region.offset, region.length)]
        return [ctx.mmaps.mmap(ctx, each.offset, each.length, mmap.PROT_READ, mmap.MAP_SHARED) for each in found]


def overlap(parts: list[range], offset: int, length: int) -> bool:
    """Whether any of the parts of a file holds some of this one."""
    return any(part.start < offset + length and offset < part.stop for part in parts)
