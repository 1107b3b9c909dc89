"""Dirty tracking: the ioctls, and the bitmap in the caller's memory (hw_pagetable.c, io_pagetable.c, iova_bitmap.c)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import iommufd_uapi.iommufd as uapi

from .errors import EINVAL, ENOENT, EOPNOTSUPP, EOVERFLOW, IommufdError
from .hw_pagetable import HwptPaging
from .user import PAGE_MASK, PAGE_SIZE, ULONG_MAX, Gate

if TYPE_CHECKING:
    from .io_pagetable import IoPagetable
    from .iommu.ops import DirtyOps
    from .ucmd import Ucmd
    from .user import Caller


def hwpt_set_dirty_tracking(ucmd: Ucmd, cmd: uapi.HwptSetDirtyTracking) -> None:
    """IOMMU_HWPT_SET_DIRTY_TRACKING: EOPNOTSUPP, ENOENT. quirk: reserved is not looked at."""
    if cmd.flags & ~uapi.IOMMU_HWPT_DIRTY_TRACKING_ENABLE:
        raise EOPNOTSUPP(f"flags {cmd.flags:#x} are not known")
    hwpt = ucmd.get(cmd.hwpt_id, HwptPaging)
    dirty_ops = _dirty_ops(hwpt)
    enable = bool(cmd.flags & uapi.IOMMU_HWPT_DIRTY_TRACKING_ENABLE)
    if enable:  # a clean snapshot first (iopt_clear_dirty_data)
        for area in hwpt.ioas.iopt.areas:
            for _ in dirty_ops.read_and_clear_dirty(area.iova, area.last, clear=True):
                pass
    dirty_ops.set_dirty_tracking(enable=enable)


def _dirty_ops(hwpt: HwptPaging) -> DirtyOps:
    if hwpt.domain.dirty_ops is None:
        raise EOPNOTSUPP(f"{hwpt} was made without IOMMU_HWPT_ALLOC_DIRTY_TRACKING")
    return hwpt.domain.dirty_ops


def hwpt_get_dirty_bitmap(ucmd: Ucmd, cmd: uapi.HwptGetDirtyBitmap) -> None:
    """IOMMU_HWPT_GET_DIRTY_BITMAP: EOPNOTSUPP, ENOENT, EOVERFLOW, EINVAL, ENOMEM.

    quirk: a hole in the mapping or a bitmap that cannot be written ends the walk, and the answer is 0 all the same.
    """
    if cmd.flags & ~uapi.IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR or cmd.reserved:
        raise EOPNOTSUPP("flags are not known or reserved is not 0")
    hwpt = ucmd.get(cmd.hwpt_id, HwptPaging)
    iopt = hwpt.ioas.iopt
    last = _check_range(iopt, cmd)
    dirty_ops = _dirty_ops(hwpt)
    ucmd.caller.gate(Gate.MEMORY)
    bitmap = IovaBitmap(ucmd.caller, cmd.iova, last, cmd.page_size, cmd.data)
    clear = not cmd.flags & uapi.IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR
    try:
        for area, lo, hi in iopt.contig(cmd.iova, last):
            if area.pages.revoked:  # no entry is left
                continue
            for start, size in dirty_ops.read_and_clear_dirty(lo, hi, clear=clear):
                bitmap.set(start, size)
    except ENOENT:
        pass
    bitmap.flush()


def _check_range(iopt: IoPagetable, cmd: uapi.HwptGetDirtyBitmap) -> int:
    """iommufd_check_iova_range(): the last IOVA. (iova, 0) wraps for every iova but 0."""
    last = cmd.iova + (cmd.length - 1 & ULONG_MAX)
    if last > ULONG_MAX:
        raise EOVERFLOW("iova + length wraps")
    end = last + 1 & ULONG_MAX
    if (cmd.iova | end) & (iopt.iova_alignment - 1):
        raise EINVAL(f"the range is not aligned to {iopt.iova_alignment:#x}")
    if not cmd.page_size:
        raise EINVAL("page_size is 0")
    if (cmd.iova | end) & (cmd.page_size - 1):
        raise EINVAL(f"the range is not aligned to page_size {cmd.page_size:#x}")
    return last


class IovaBitmap:
    """struct iova_bitmap: bits are OR-ed into the caller's bitmap, a page of it at a time.

    quirk: page_size need not be a power of two; only its lowest set bit counts. What cannot be written is dropped.
    """

    def __init__(self, caller: Caller, iova: int, last: int, page_size: int, data: int) -> None:
        self._caller = caller
        self._iova = iova
        self._shift = (page_size & -page_size).bit_length() - 1
        self._data = data
        self._nbits = (((last - iova) >> self._shift) // 8 + 1) * 8
        self._page = -1  # the page of the caller's memory that bits are collected for
        self._bits: list[tuple[int, int]] = []  # (first, last) bit, from the start of the bitmap

    def set(self, iova: int, size: int) -> None:
        """iova_bitmap_set(); ranges come in ascending order."""
        bit = (iova - self._iova) >> self._shift
        last = min((iova + size - 1 - self._iova) >> self._shift, self._nbits - 1)
        while bit <= last:
            addr = self._data + bit // 8
            page = addr & PAGE_MASK
            if page != self._page:
                self.flush()
                self._page = page
            end = min(last, (page + PAGE_SIZE - self._data) * 8 - 1)
            self._bits.append((bit, end))
            bit = end + 1

    def flush(self) -> None:
        """Write what was collected."""
        if not self._bits:
            return
        first, last = self._bits[0][0] // 8, max(end for _, end in self._bits) // 8
        value = 0
        for bit, end in self._bits:
            value |= (1 << end - bit + 1) - 1 << bit - first * 8
        self._bits.clear()
        length = last - first + 1
        try:
            old = self._caller.copy_from_user(self._data + first, length)
            new = int.from_bytes(old, "little") | value
            self._caller.copy_to_user(self._data + first, new.to_bytes(length, "little"))
        except IommufdError:
            pass  # quirk: dropped, and the dirty bits are clean all the same
