"""Checks of the selftest: which pages a domain or an access has, and how often they are pinned (selftest.c).

Pages are compared by identity, in runs: (file, byte, bytes).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .errors import EBADE, EFAULT, EINVAL, EIO
from .hw_pagetable import HwptPaging
from .user import PAGE_MASK, PAGE_SHIFT, PAGE_SIZE, ULONG_MAX, Caller, PageRun

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import iommufd_uapi.iommufd_test as uapi

    from .ucmd import Ucmd


def paging(ucmd: Ucmd, hwpt_id: int) -> HwptPaging:
    """get_md_pagetable(): ENOENT, EINVAL."""
    hwpt = ucmd.get(hwpt_id, HwptPaging)
    if hwpt.domain.owner is not ucmd.ictx.machine.mock:
        raise EINVAL(f"{hwpt} is not the mock's")
    return hwpt


def check_map(ucmd: Ucmd, cmd: uapi.TestCmd, op: uapi.CheckMap) -> None:
    """Whether the pages behind IOVA are those behind an address of the caller: EINVAL, EFAULT."""
    hwpt = paging(ucmd, cmd.id)
    page_size = hwpt.domain.pgsize_bitmap & -hwpt.domain.pgsize_bitmap
    if (op.iova | op.length | op.uptr) % page_size or op.uptr + op.length > ULONG_MAX:
        raise EINVAL(f"not aligned to {page_size:#x}")
    if not op.length:
        return
    offset = op.uptr % PAGE_SIZE
    npages = (op.length + offset + PAGE_SIZE - 1) >> PAGE_SHIFT
    runs = ucmd.caller.get_user_pages(op.uptr, npages)
    good = min((sum(run.npages for run in runs) << PAGE_SHIFT) - offset, op.length)
    ours = _bytes_of(runs, offset, good)
    theirs = _domain_bytes(hwpt, op.iova, good)
    _compare(ours, theirs)
    if good < op.length:
        raise EFAULT(f"no page behind address {op.uptr + max(good, 0):#x}")


def _bytes_of(runs: Iterable[PageRun], offset: int, length: int) -> Iterator[tuple[object, int, int]]:
    """(file, byte, bytes) for `length` bytes of runs."""
    for run in runs:
        size = min((run.npages << PAGE_SHIFT) - offset, length)
        if size <= 0:
            return
        yield run.file, (run.page << PAGE_SHIFT) + offset, size
        length -= size
        offset = 0


def _domain_bytes(hwpt: HwptPaging, iova: int, length: int) -> Iterator[tuple[object, int, int]]:
    """(file, byte, bytes) of what the domain maps; file None where it maps nothing."""
    iopt = hwpt.ioas.iopt
    while length > 0:
        area = iopt.areas.first(iova, iova + length - 1)
        if area is None or area.iova > iova or not area.filled:
            yield None, 0, length
            return
        size = min(area.last - iova + 1, length)
        first, last = area.index(iova), area.index(iova + size - 1)
        yield from _bytes_of(area.pages.runs(first, last), area.byte(iova) % PAGE_SIZE, size)
        iova += size
        length -= size


def _compare(ours: Iterator[tuple[object, int, int]], theirs: Iterator[tuple[object, int, int]]) -> None:
    """EINVAL at the first byte where two stretches differ."""
    file, at, size = None, 0, 0
    for our_file, our_at, our_size in ours:
        while our_size:
            if not size:
                file, at, size = next(theirs, (None, 0, our_size))
            if file is not our_file or at != our_at:
                raise EINVAL("the domain maps another page there")
            part = min(size, our_size)
            our_at, our_size, at, size = our_at + part, our_size - part, at + part, size - part


def check_refs(ucmd: Ucmd, cmd: uapi.TestCmd, op: uapi.CheckRefs) -> None:
    """Whether every page of a range is pinned exactly `refs` times: EINVAL, EFAULT, EIO."""
    if (op.length | op.uptr) % PAGE_SIZE or op.uptr + op.length > ULONG_MAX:
        raise EINVAL("not page aligned")
    npages = op.length >> PAGE_SHIFT
    runs = ucmd.caller.get_user_pages(op.uptr, npages)
    for run in runs:
        for first, last, count in run.file.pins.counts(run.page, run.page + run.npages - 1):
            if count != op.refs and not run.file.compound:
                raise EIO(f"pages {first}..{last} of the file are pinned {count} times, not {op.refs}")
    if sum(run.npages for run in runs) < npages:
        raise EFAULT(f"not all of {op.uptr:#x}+{op.length:#x} is mapped")


def check_pages(caller: Caller, uptr: int, runs: list[PageRun]) -> None:
    """iommufd_test_check_pages(): EBADE at the first page that is another one, EFAULT where there is none."""
    npages = sum(run.npages for run in runs)
    theirs = caller.get_user_pages(uptr, npages)
    good = sum(run.npages for run in theirs)
    try:
        _compare(_bytes_of(theirs, 0, good << PAGE_SHIFT), _bytes_of(runs, 0, good << PAGE_SHIFT))
    except EINVAL:
        raise EBADE("the access pinned other pages") from None
    if good < npages:
        raise EFAULT(f"no page behind address {(uptr & PAGE_MASK) + (good << PAGE_SHIFT):#x}")
