"""Registers that a traced process maps from its iommufd: the core's region at the same offset of the context's file."""

from __future__ import annotations

import mmap
import os
from typing import TYPE_CHECKING

from iommufdd.dmabuf import Dmabuf
from iommufdd.errors import EACCES, EINVAL, ENODEV, ENOMEM
from iommufdd.server.instance import OpenContext

from .procmm import SHARED, maps_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from iommufdd.mmap import MmapRegion, Vma
    from iommufdd.server.vms import AnyOpened
    from iommufdd.user import Caller, File

    from .fds import Installed
    from .procmm import ProcMm

MANY_MAPS = 64  # of one context, before those that are gone are looked for


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


def map_registers(caller: Caller, opened: AnyOpened, file: File, args: list[int], *, mode: int = os.O_RDWR) -> Vma:
    """mmap(2) of one of our files, opened with `mode`: the registers then lie in the context's file.

    EINVAL, EACCES (do_mmap); EPERM, ENXIO (iommufd_fops_mmap); EINVAL of a device; ENODEV for what has no mmap; ENOMEM.
    """
    _, length, prot, flags, _, offset = args
    if not length or offset % mmap.PAGESIZE:
        raise EINVAL(f"{length} bytes at offset {offset:#x}")
    writes = flags & mmap.MAP_SHARED and prot & mmap.PROT_WRITE
    if mode == os.O_WRONLY or (writes and mode == os.O_RDONLY):
        raise EACCES("not opened for this")
    if file is not opened.file:
        raise EINVAL("not exported for mmap") if isinstance(file, Dmabuf) else ENODEV("not made for mmap")
    vma = opened.file.mmap(caller, offset, length, prot, flags)
    assert isinstance(opened, OpenContext)  # a device has nothing to map
    try:
        show(vma.region, opened.identity)
    except OSError as error:
        vma.put()
        raise ENOMEM(f"the registers cannot be shown: {error.strerror}") from None
    return vma


def keep(installed: Installed, vma: Vma, mms: Iterable[ProcMm]) -> None:
    """A live mapping, until drop_unmapped() finds it gone."""
    if len(installed.maps) > MANY_MAPS:
        drop_unmapped(installed, mms)
    installed.maps.append(vma)


def drop_unmapped(installed: Installed, mms: Iterable[ProcMm]) -> None:
    """Let go of the mappings that no process has any more: munmap() and exit are not traced."""
    shown = mapped_parts(installed.key[:2], mms)
    for vma in installed.maps[:]:
        if not any(vma.region.offset in part for part in shown):
            installed.maps.remove(vma)
            vma.put()


def mapped_parts(inode: tuple[int, int], mms: Iterable[ProcMm] = ()) -> list[range]:
    """Which parts of a file any process maps shared; `mms` are of those that we may have no right to look at."""
    vmas = [vma for mm in mms for vma in mm.vmas() if (vma.dev, vma.ino) == inode]
    for name in os.listdir("/proc"):
        if name.isdecimal() and int(name) != os.getpid():
            vmas += maps_of(name, inode)
    return [range(vma.offset, vma.offset + vma.end - vma.start) for vma in vmas if vma.flags & SHARED]
