"""Rules of the IOAS written down a second time, over plain lists."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, NamedTuple

from iommufdd.ioas import Ioas
from iommufdd.user import PAGE_SIZE, ULONG_MAX

from .harness import FIXED, RW

if TYPE_CHECKING:
    from iommufd_uapi.iommufd import IoasMap
    from iommufdd.io_pagetable import IoPagetable
    from iommufdd.objects import IommufdObject


def map_errno(ioas: IommufdObject | None, cmd: IoasMap) -> int | None:
    """What IOAS_MAP answers up to the point where pages are pinned; None when that is all that is left (6.2)."""
    if cmd.flags & ~(FIXED | RW) or cmd.reserved:
        return errno.EOPNOTSUPP
    if cmd.iova >= ULONG_MAX or cmd.length >= ULONG_MAX:
        return errno.EOVERFLOW
    if not cmd.flags & RW:
        return errno.EINVAL
    if not isinstance(ioas, Ioas):
        return errno.ENOENT
    if cmd.user_va + cmd.length > ULONG_MAX:
        return errno.EOVERFLOW
    if not cmd.length or cmd.length > ULONG_MAX - PAGE_SIZE:
        return errno.EINVAL
    iopt = ioas.iopt
    if cmd.length % iopt.iova_alignment:
        return errno.EINVAL
    if cmd.flags & FIXED:
        if (refusal := _fixed_errno(iopt, cmd.iova, cmd.length)) is not None:
            return refusal
    else:
        iova = alloc_iova(iopt, cmd.user_va, cmd.length)
        if iova < 0:
            return -iova
    if cmd.user_va % PAGE_SIZE % iopt.iova_alignment:
        return errno.EINVAL
    return None if iopt.domains else 0


def _fixed_errno(iopt: IoPagetable, iova: int, length: int) -> int | None:
    last = iova + length - 1
    if iova % iopt.iova_alignment:
        return errno.EINVAL
    if last > ULONG_MAX:
        return errno.EOVERFLOW
    if any(span.start <= last and span.last >= iova for span in iopt.reserved):
        return errno.EINVAL
    if any(area.iova <= last and area.last >= iova for area in iopt.areas):
        return errno.EEXIST
    return None


def alloc_iova(iopt: IoPagetable, addr: int, length: int) -> int:
    """iopt_alloc_iova(): the first fit, or minus an errno."""
    if length == 0 or length >= ULONG_MAX // 2:
        return -errno.EOVERFLOW
    alignment = 1
    while alignment < length:
        alignment *= 2
    if addr:
        while addr % alignment:
            alignment //= 2
    alignment = min(alignment, 2 << 20)
    if alignment < iopt.iova_alignment:
        return -errno.EINVAL
    allowed = _join([(span.start, span.last) for span in iopt.allowed])
    if not allowed:
        allowed = [(PAGE_SIZE, ULONG_MAX - PAGE_SIZE)]
    used = _join([(span.start, span.last) for span in iopt.reserved] + [(area.iova, area.last) for area in iopt.areas])

    def fit(start: int, last: int) -> int | None:
        start = -(-start // alignment) * alignment | addr % PAGE_SIZE
        if start > ULONG_MAX or start >= last or last - start < length - 1:
            return None
        return start

    for span_start, span_last in allowed:
        start, last = max(span_start, PAGE_SIZE), min(span_last, ULONG_MAX - PAGE_SIZE)
        at = fit(start, last) if start <= last else None
        if at is None:
            continue
        for hole_start, hole_last in _holes(used, at, last):
            iova = fit(hole_start, hole_last)
            if iova is not None:
                return iova
    return -errno.ENOSPC


def _join(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Overlapping and adjacent spans as one."""
    joined: list[tuple[int, int]] = []
    for start, last in sorted(spans):
        if joined and start <= joined[-1][1] + 1:
            joined[-1] = joined[-1][0], max(joined[-1][1], last)
        else:
            joined.append((start, last))
    return joined


def _holes(used: list[tuple[int, int]], start: int, last: int) -> list[tuple[int, int]]:
    holes = []
    for lo, hi in [*used, (last + 1, last + 1)]:
        if start <= min(lo - 1, last):
            holes.append((start, min(lo - 1, last)))
        start = max(start, hi + 1)
        if start > last:
            break
    return holes


class Unmapped(NamedTuple):
    """What an UNMAP leaves: the starts of areas, bytes removed, errno."""

    left: list[int]
    unmapped: int
    errno: int


def unmap(ioas: IommufdObject | None, iova: int, length: int) -> Unmapped | None:
    """IOAS_UNMAP over a list (6.5); accesses of the selftest let go when they are told."""
    if not isinstance(ioas, Ioas):
        return None
    areas = list(ioas.iopt.areas)
    everything = iova == 0 and length == ULONG_MAX
    starts = [area.iova for area in areas]
    if not everything:
        if iova >= ULONG_MAX or length >= ULONG_MAX:
            return Unmapped(starts, 0, errno.EOVERFLOW)
        if not length:
            return Unmapped(starts, 0, errno.EINVAL)
        if iova + length - 1 > ULONG_MAX:
            return Unmapped(starts, 0, errno.EOVERFLOW)
    last = ULONG_MAX if everything else iova + length - 1
    removed = 0
    for area in areas:
        if area.last < iova or area.iova > last:
            continue
        if area.num_locks:
            return Unmapped(starts, removed, errno.EBUSY)
        if area.iova < iova or area.last > last:
            return Unmapped(starts, removed, errno.ENOENT)
        starts.remove(area.iova)
        removed += area.length
    return Unmapped(starts, removed, 0 if removed or everything else errno.ENOENT)
