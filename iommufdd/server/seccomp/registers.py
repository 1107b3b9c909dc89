"""Registers that a traced process maps from its iommufd: the core's region at the same offset of the context's file."""

from __future__ import annotations

import mmap
import os
from typing import TYPE_CHECKING

from .procmm import maps_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from iommufdd.mmap import MmapRegion

    from .fds import Installed
    from .procmm import ProcMm, Vma


class Shown:
    """Our mapping of a region's part of the file."""

    def __init__(self, region: MmapRegion, memfd: int) -> None:
        """OSError."""
        self._map = mmap.mmap(memfd, region.length, offset=region.offset)
        self._view = memoryview(self._map)
        region.move(self._view, self)

    def close(self) -> None:
        self._view.release()
        self._map.close()


def show(region: MmapRegion, memfd: int) -> None:
    """Move the bytes of a region to the file, when it is first mapped. OSError."""
    if region.backing is None:
        Shown(region, memfd)


def drop_unmapped(installed: Installed, mms: Iterable[ProcMm]) -> None:
    """Let go of the mappings that no process has any more: munmap() and exit are not traced."""
    inode = installed.key[:2]
    shown: list[range] = []
    for name in os.listdir("/proc"):
        if name.isdecimal() and int(name) != os.getpid():
            shown += [_part(vma) for vma in maps_of(name, inode)]
    for mm in mms:  # whose process we may have no right to look at
        shown += [_part(vma) for vma in mm.vmas() if (vma.dev, vma.ino) == inode]
    for vma in installed.maps[:]:
        if not any(vma.region.offset in part for part in shown):
            installed.maps.remove(vma)
            vma.put()


def _part(vma: Vma) -> range:
    """The part of the file that is mapped."""
    return range(vma.offset, vma.offset + vma.end - vma.start)
