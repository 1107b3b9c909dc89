"""Accesses: kernel drivers that read, write or pin memory by IOVA without a device (device.c, lower half)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .errors import EINVAL, ENOENT, EOVERFLOW, EPERM, IommufdError
from .objects import IommufdObject, ObjectType
from .user import PAGE_SIZE, ULONG_MAX, Caller, PageRun

if TYPE_CHECKING:
    from collections.abc import Callable

    from .ioas import Ioas
    from .iova import Area


class Access(IommufdObject):
    """struct iommufd_access; `unmap(iova, length)` is the driver's callback, None for an internal access."""

    type = ObjectType.ACCESS

    def __init__(self, *, pins: bool, unmap: Callable[[int, int], None] | None) -> None:
        super().__init__()
        self.iova_alignment = PAGE_SIZE if pins else 1
        self.unmap = unmap
        self.ioas: Ioas | None = None
        self.ioas_unpin: Ioas | None = None  # still valid while the driver reacts to a detach

    @property
    def internal(self) -> bool:
        """An access of iommufd itself: its pins lock the areas (iommufd_access_is_internal)."""
        return self.unmap is None

    def destroy(self) -> None:
        if self.ioas is not None:
            self._leave()
        super().destroy()

    def change_ioas(self, caller: Caller, new: Ioas) -> None:
        """Attach, or move from another IOAS; the old one stays on failure (iommufd_access_change_ioas)."""
        if new is self.ioas:
            return
        new.iopt.add_access(caller, self)
        self.hold(new)
        if self.ioas is not None:
            self._leave()
        self.ioas = self.ioas_unpin = new

    def _leave(self) -> None:
        old = self.ioas
        assert old is not None
        self.ioas = None  # no new pins from here on; unpinning still finds the old one
        if self.unmap is not None:
            self.unmap(0, ULONG_MAX)
        old.iopt.remove_access(self)
        self.ioas_unpin = None
        self.let_go(old)

    def pin_pages(self, caller: Caller, iova: int, length: int, *, write: bool) -> list[PageRun]:
        """The pages of [iova, iova + length), pinned (iommufd_access_pin_pages).

        EINVAL, EOVERFLOW, ENOENT, EPERM, and what pinning raises; nothing stays pinned on failure.
        """
        last = _last(iova, length)
        if self.ioas is None:
            raise ENOENT("the access has no IOAS")
        iopt = self.ioas.iopt
        done: list[tuple[Area, int, int]] = []
        try:
            for area, lo, hi in iopt.contig(iova, last):
                if area.prevent_access:
                    raise EINVAL("the area is being unmapped")
                if not _aligned(area, lo, last):
                    raise EINVAL("the pages behind the range are not whole")
                check_prot(area, write=write)
                first, end = area.index(lo), area.index(hi)
                area.pages.add_access(caller, first, end, write=write)
                area.num_accesses += 1
                area.num_locks += self.internal
                done.append((area, first, end))
        except IommufdError:
            self._unpin(done)
            raise
        return [run for area, first, end in done for run in area.pages.runs(first, end)]

    def unpin_pages(self, iova: int, length: int) -> None:
        """Undo pin_pages() with the same arguments (iommufd_access_unpin_pages)."""
        assert self.ioas_unpin is not None
        parts = self.ioas_unpin.iopt.contig(iova, iova + length - 1)
        self._unpin([(area, area.index(lo), area.index(hi)) for area, lo, hi in parts])

    def _unpin(self, parts: list[tuple[Area, int, int]]) -> None:
        for area, first, end in parts:
            area.pages.remove_access(first, end)
            area.num_accesses -= 1
            area.num_locks -= self.internal

    def rw(self, caller: Caller, iova: int, data: bytearray, *, write: bool, slow: bool) -> None:
        """Copy data to or from IOVA (iommufd_access_rw): EINVAL, EOVERFLOW, ENOENT, EPERM, EFAULT.

        On failure the part before the offending area has been copied.
        """
        last = _last(iova, len(data))
        if self.ioas is None:
            raise ENOENT("the access has no IOAS")
        view = memoryview(data)
        for area, lo, hi in self.ioas.iopt.contig(iova, last):
            if area.prevent_access:
                raise EINVAL("the area is being unmapped")
            check_prot(area, write=write)
            part = bytearray(view[lo - iova : hi - iova + 1])
            area.pages.rw(caller, area.byte(lo), part, write=write, slow=slow)
            if not write:
                view[lo - iova : hi - iova + 1] = part


def check_prot(area: Area, *, write: bool) -> None:
    """EPERM unless the area was mapped for this kind of access (check_area_prot)."""
    if not (area.writable if write else area.readable):
        raise EPERM(f"iova {area.iova:#x}..{area.last:#x} is not mapped {'WRITEABLE' if write else 'READABLE'}")


def _last(iova: int, length: int) -> int:
    if not length:
        raise EINVAL("length is 0")
    if iova + length - 1 > ULONG_MAX:
        raise EOVERFLOW("iova + length wraps")
    return iova + length - 1


def _aligned(area: Area, iova: int, last: int) -> bool:
    """iopt_area_contig_is_aligned(): whole pages, but for the end of the last area."""
    if area.byte(iova) % PAGE_SIZE:
        return False
    return last <= area.last or area.byte(area.last) % PAGE_SIZE == PAGE_SIZE - 1
