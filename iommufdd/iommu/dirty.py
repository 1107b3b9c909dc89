"""Dirty bits of a paging domain's table entries: cost follows what is dirty, not what is mapped."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sortedcontainers import SortedDict

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .ops import Domain


class DirtyBits:
    """The D bits: struct iommu_dirty_ops over the entries that `domain.translation` shows.

    granule: the smallest page; a table holds 512 items, so an entry is made of items of granule * 512**level bytes.
    """

    def __init__(self, domain: Domain, granule: int) -> None:
        self._domain = domain
        self._granule = granule
        self._entries: SortedDict[int, int] = SortedDict()  # first IOVA of a dirty entry: its bytes
        self.tracking = False

    def set_dirty_tracking(self, *, enable: bool) -> None:
        """quirk: reading does not depend on it any more; only who writes looks (7.2's generic_pt)."""
        self.tracking = enable

    def set_dirty(self, iova: int) -> None:
        """A write went through the entry at iova; nothing when there is none."""
        translation = self._domain.translation
        entry = translation.entry(iova, self._domain.pgsize_bitmap) if translation is not None else None
        if entry is not None:
            self._entries[entry[0]] = entry[1]

    def read_and_clear_dirty(self, iova: int, last: int, *, clear: bool) -> Iterator[tuple[int, int]]:
        """Dirty stretches (iova, bytes) of [iova, last]; an entry cut by its edges is cleared whole."""
        for first, size in self._within(iova, last):
            if clear:
                del self._entries[first]
            start = max(first, iova)
            item = self._item(size)
            if item == size:
                yield start, item
                continue
            # quirk: the last item of an entry made of several is forgotten (iommu_pt.h:record_dirty())
            index = (start - first) // item
            end = min(size // item - 1, (last - first) // item + 1)
            if end > index:
                yield start, (end - index) * item

    def forget(self, iova: int, last: int) -> None:
        """The entries of [iova, last] are gone."""
        for first, _ in self._within(iova, last):
            del self._entries[first]

    def _item(self, size: int) -> int:
        item = self._granule
        while item * 512 <= size:
            item *= 512
        return item

    def _within(self, iova: int, last: int) -> list[tuple[int, int]]:
        entries = self._entries
        found = [(first, entries[first]) for first in entries.irange(iova, last)]
        at = entries.bisect_left(iova)
        if at:
            first, size = entries.peekitem(at - 1)
            if first + size > iova:
                found.insert(0, (first, size))
        return found
