"""Dirty state of a stage 1 with HTTU: DBM marks what may be written, AP2 what is clean (io-pgtable-arm.c)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sortedcontainers import SortedDict

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .smmuv3_domain import SmmuPaging


class SmmuDirty:
    """struct iommu_dirty_ops. Kept is what is clean, for all that is mapped begins dirty."""

    def __init__(self, domain: SmmuPaging) -> None:
        self._domain = domain
        self._clean: SortedDict[int, int] = SortedDict()  # first IOVA of a clean stretch: its last

    def clean(self, iova: int) -> bool:
        """The entry at iova is clean."""
        return bool(self._touching(iova, iova))

    def set_dirty(self, first: int, last: int) -> None:
        """A write went through the entry that maps [first, last]."""
        self._remove(first, last)

    def forget(self, iova: int, last: int) -> None:
        """The entries of [iova, last] are gone: what is mapped there next is dirty again."""
        self._remove(iova, last)

    def set_dirty_tracking(self, *, enable: bool) -> None:
        """arm_smmu_set_dirty_tracking(): hardware always does it."""

    def read_and_clear_dirty(self, iova: int, last: int, *, clear: bool) -> Iterator[tuple[int, int]]:
        """Dirty stretches (iova, bytes) of [iova, last].

        quirk: the TLB is not flushed, for the gather has no page size (iommu_dirty_bitmap_record, arm_smmu_iotlb_sync):
        writes through a translation that is cached as dirty are missed from then on.
        """
        for first, end in list(self._writable(iova, last)):
            for start, stop in self._gaps(first, end):
                yield start, stop - start + 1
            if clear:
                self._add(self._entry(first)[0], self._entry(end)[1])

    def _writable(self, iova: int, last: int) -> Iterator[tuple[int, int]]:
        """What is mapped writable in [iova, last]; only that has DBM."""
        translation = self._domain.translation
        while translation is not None and iova <= last:
            extent = translation.extent(iova)
            if extent is None:
                return
            if extent.writable:
                yield iova, min(extent.last, last)
            iova = extent.last + 1

    def _entry(self, iova: int) -> tuple[int, int]:
        """The table entry around a mapped iova."""
        translation = self._domain.translation
        found = translation.entry(iova, self._domain.pgsize_bitmap) if translation is not None else None
        return (found[0], found[0] + found[1] - 1) if found is not None else (iova, iova)

    # ---- the clean stretches ----

    def _touching(self, first: int, last: int) -> list[tuple[int, int]]:
        clean = self._clean
        at = clean.bisect_right(first) - 1
        before = [clean.peekitem(at)] if at >= 0 and clean.peekitem(at)[1] >= first else []
        return before + [(lo, clean[lo]) for lo in clean.irange(first, last, inclusive=(False, True))]

    def _gaps(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        for lo, hi in self._touching(first, last):
            if first < lo:
                yield first, lo - 1
            first = hi + 1
        if first <= last:
            yield first, last

    def _add(self, first: int, last: int) -> None:
        for lo, hi in self._touching(first - 1 if first else 0, last + 1):
            del self._clean[lo]
            first, last = min(first, lo), max(last, hi)
        self._clean[first] = last

    def _remove(self, first: int, last: int) -> None:
        for lo, hi in self._touching(first, last):
            del self._clean[lo]
            if lo < first:
                self._clean[lo] = first - 1
            if hi > last:
                self._clean[last + 1] = hi
