"""VFIO type1 on the same fd, over one compatibility IOAS (vfio_compat.c)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import iommufd_uapi.iommufd as uapi
import iommufd_uapi.vfio as vfio

from .errors import EINVAL, ENODEV, ENOTTY, EOPNOTSUPP, EOVERFLOW, IommufdError
from .ioas import Ioas, map_user
from .ucmd import Ucmd
from .user import PAGE_MASK, PAGE_SIZE, ULONG_MAX

if TYPE_CHECKING:
    from collections.abc import Callable

    from .context import Context
    from .user import Caller

def get_compat_ioas(ictx: Context) -> Ioas:
    """ENODEV unless there is one."""
    if ictx.vfio_ioas is None:
        raise ENODEV("there is no compatibility IOAS; set one with IOMMU_VFIO_IOAS")
    return ictx.vfio_ioas


def vfio_ioas(ucmd: Ucmd, cmd: uapi.VfioIoas) -> None:
    """IOMMU_VFIO_IOAS: EOPNOTSUPP, ENODEV, ENOENT."""
    if cmd.reserved:
        raise EOPNOTSUPP("reserved is not 0")
    if cmd.op == uapi.IOMMU_VFIO_IOAS_GET:
        cmd.ioas_id = get_compat_ioas(ucmd.ictx).id
        ucmd.respond(cmd)
    elif cmd.op == uapi.IOMMU_VFIO_IOAS_SET:
        ucmd.ictx.vfio_ioas = ucmd.get(cmd.ioas_id, Ioas)
    elif cmd.op == uapi.IOMMU_VFIO_IOAS_CLEAR:
        ucmd.ictx.vfio_ioas = None
    else:
        raise EOPNOTSUPP(f"op {cmd.op} is not known")


def _map_dma(ictx: Context, caller: Caller, arg: int) -> int:
    """VFIO_IOMMU_MAP_DMA: EFAULT, EINVAL, ENODEV, and what a fixed map raises. quirk: flags may be 0."""
    size = vfio.VfioIommuType1DmaMap.MIN_SIZE
    cmd = vfio.VfioIommuType1DmaMap.unpack(caller.copy_from_user(arg, size))
    known = vfio.VFIO_DMA_MAP_FLAG_READ | vfio.VFIO_DMA_MAP_FLAG_WRITE
    if cmd.argsz < size or cmd.flags & ~known:
        raise EINVAL("argsz is too small or flags are not known")
    flags = uapi.IOMMU_IOAS_MAP_FIXED_IOVA
    if cmd.flags & vfio.VFIO_DMA_MAP_FLAG_READ:
        flags |= uapi.IOMMU_IOAS_MAP_READABLE
    if cmd.flags & vfio.VFIO_DMA_MAP_FLAG_WRITE:
        flags |= uapi.IOMMU_IOAS_MAP_WRITEABLE
    ioas = get_compat_ioas(ictx)
    map_user(Ucmd(ictx, caller, arg, size, b""), ioas, cmd.vaddr, cmd.size, cmd.iova, flags)
    return 0


def _unmap_dma(ictx: Context, caller: Caller, arg: int) -> int:
    """VFIO_IOMMU_UNMAP_DMA: EFAULT, EINVAL, ENODEV, and what unmapping raises; size is written back then too."""
    size = vfio.VfioIommuType1DmaUnmap.MIN_SIZE
    cmd = vfio.VfioIommuType1DmaUnmap.unpack(caller.copy_from_user(arg, size))
    if cmd.argsz < size or cmd.flags & ~vfio.VFIO_DMA_UNMAP_FLAG_ALL:
        raise EINVAL("argsz is too small or flags are not known")
    iopt = get_compat_ioas(ictx).iopt
    error: IommufdError | None
    if cmd.flags & vfio.VFIO_DMA_UNMAP_FLAG_ALL:
        if cmd.iova or cmd.size:
            raise EINVAL("UNMAP_ALL takes neither iova nor size")
        unmapped, error = iopt.unmap(0, ULONG_MAX)
    else:
        if iopt.disable_large_pages:
            cuts = [cmd.iova + cmd.size - 1 & ULONG_MAX, cmd.iova - 1 & ULONG_MAX]
            iopt.cut(caller, cuts if cmd.iova else cuts[:1])
        unmapped = 0
        if not cmd.size:
            error = EINVAL("size is 0")
        elif cmd.iova + cmd.size - 1 > ULONG_MAX:
            error = EOVERFLOW("iova + size wraps")
        else:
            unmapped, error = iopt.unmap(cmd.iova, cmd.iova + cmd.size - 1)
    cmd.size = unmapped
    caller.copy_to_user(arg, cmd.pack()[:size])
    if error is not None:
        raise error
    return 0


def _check_extension(ictx: Context, caller: Caller, extension: int) -> int:
    """VFIO_CHECK_EXTENSION: 0 or 1; ENODEV for DMA_CC_IOMMU without a compatibility IOAS."""
    if extension in (vfio.VFIO_TYPE1_IOMMU, vfio.VFIO_TYPE1v2_IOMMU, vfio.VFIO_UNMAP_ALL):
        return 1
    if extension == vfio.VFIO_DMA_CC_IOMMU:
        return int(all(hwpt.enforce_cache_coherency for hwpt in get_compat_ioas(ictx).hwpt_list))
    return 0


def _set_iommu(ictx: Context, caller: Caller, iommu_type: int) -> int:
    """VFIO_SET_IOMMU: EINVAL, ENODEV. TYPE1 wants to unmap in the middle, so it gives up large pages."""
    if iommu_type not in (vfio.VFIO_TYPE1_IOMMU, vfio.VFIO_TYPE1v2_IOMMU):
        raise EINVAL(f"IOMMU type {iommu_type} is neither TYPE1 nor TYPE1v2")
    ioas = get_compat_ioas(ictx)
    if iommu_type == vfio.VFIO_TYPE1_IOMMU:
        ioas.iopt.do_disable_large_pages()
    return 0


def _pagesizes(ioas: Ioas) -> int:
    """iommufd_get_pagesizes()"""
    sizes = ULONG_MAX
    for domain in ioas.iopt.domains:
        sizes &= domain.pgsize_bitmap
    if sizes & ~PAGE_MASK:
        sizes = sizes & PAGE_MASK | PAGE_SIZE
    return max(sizes & ULONG_MAX, ioas.iopt.iova_alignment)


def _get_info(ictx: Context, caller: Caller, arg: int) -> int:
    """VFIO_IOMMU_GET_INFO: EFAULT, EINVAL, ENODEV. Capabilities are written as far as argsz reaches."""
    layout = vfio.VfioIommuType1Info
    info = layout.unpack(caller.copy_from_user(arg, layout.MIN_SIZE).ljust(layout.SIZEOF, b"\0"))
    if info.argsz < layout.MIN_SIZE:
        raise EINVAL("argsz is too small")
    least = min(info.argsz, layout.SIZEOF)
    ioas = get_compat_ioas(ictx)
    info.flags = vfio.VFIO_IOMMU_INFO_PGSIZES | vfio.VFIO_IOMMU_INFO_CAPS
    info.iova_pgsizes = _pagesizes(ioas)
    info.cap_offset = 0
    total = layout.SIZEOF
    last_cap = 0
    for size, pieces in (_cap_dma_avail(), _cap_iova(ioas)):
        for at, piece, room in pieces:
            if info.argsz - total >= room:
                caller.copy_to_user(arg + total + at, piece)
        if last_cap and info.argsz >= total:
            caller.copy_to_user(last_cap + 4, total.to_bytes(4, "little"))  # vfio_info_cap_header.next
        last_cap = arg + total
        total += size + 7 & ~7
    if info.argsz >= total:
        info.cap_offset = layout.SIZEOF
    info.argsz = total
    caller.copy_to_user(arg, info.pack()[:least])
    return 0


_Cap = tuple[int, list[tuple[int, bytes, int]]]  # size; in the order of writing (offset, bytes, room it needs)


def _cap_dma_avail() -> _Cap:
    """iommufd_fill_cap_dma_avail()"""
    header = vfio.VfioInfoCapHeader(vfio.VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL, 1, 0)
    cap = vfio.VfioIommuType1InfoDmaAvail(header, 2**32 - 1).pack()
    return len(cap), [(0, cap, len(cap))]


def _cap_iova(ioas: Ioas) -> _Cap:
    """iommufd_fill_cap_iova(): the ranges, then the head when all of them fit."""
    holes = list(ioas.iopt.reserved.holes(0, ULONG_MAX))
    head = vfio.VfioIommuType1InfoCapIovaRange(
        vfio.VfioInfoCapHeader(vfio.VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE, 1, 0), len(holes)
    ).pack()
    ranges = [
        (len(head) + 16 * at, vfio.VfioIovaRange(start, last).pack(), len(head) + 16 * (at + 1))
        for at, (start, last) in enumerate(holes)
    ]
    size = len(head) + 16 * len(holes)
    return size, [*ranges, (0, head, size)]


def _get_api_version(ictx: Context, caller: Caller, arg: int) -> int:
    return vfio.VFIO_API_VERSION


_IOCTLS: dict[int, Callable[[Context, Caller, int], int]] = {
    vfio.VFIO_GET_API_VERSION: _get_api_version,
    vfio.VFIO_CHECK_EXTENSION: _check_extension,
    vfio.VFIO_SET_IOMMU: _set_iommu,
    vfio.VFIO_IOMMU_GET_INFO: _get_info,
    vfio.VFIO_IOMMU_MAP_DMA: _map_dma,
    vfio.VFIO_IOMMU_UNMAP_DMA: _unmap_dma,
}


def vfio_ioctl(ictx: Context, caller: Caller, cmd: int, arg: int) -> int:
    """iommufd_vfio_ioctl(): ENOTTY for the rest, VFIO_IOMMU_DIRTY_PAGES too."""
    execute = _IOCTLS.get(cmd)
    if execute is None:
        raise ENOTTY(f"ioctl {cmd:#x} is not known")
    return execute(ictx, caller, arg)
