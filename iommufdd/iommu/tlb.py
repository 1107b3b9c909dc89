"""Caches of translations: the IOTLB with its paging-structure cache, and the device TLB (VT-d spec 6.2, SMMUv3 4.4).

An entry stays until the right invalidation drops it: a forgotten invalidation must show. Modes: faithful keeps, and
evicts by a seed when full; greedy never evicts; off keeps nothing.
"""

from __future__ import annotations

import random
from bisect import bisect_right, insort
from operator import attrgetter
from typing import TYPE_CHECKING, Generic, TypeVar

from .walk import Step

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator

    from iommufdd.description import Caches
    from iommufdd.user import PageFile

    from .ops import Extent
    from .walk import Leaf, RawStep

T = TypeVar("T")
_first = attrgetter("first")
ALIASES = 1024  # pages by which a large entry is found at once


class TlbEntry:
    """A translation: [first, last] of the input goes to the bytes of `file` from `pos` on."""

    __slots__ = ("aliases", "allowed", "file", "first", "index", "ipa", "last", "mark", "origin", "pos", "raw_steps",
                 "seq", "space", "view")  # fmt: skip

    def __init__(
        self, first: int, last: int, file: PageFile, pos: int, allowed: int, *, ipa: int,
        raw_steps: tuple[RawStep, ...] = (),
    ) -> None:  # fmt: skip
        """allowed: set of accesses. ipa: stage 2's input address of `first`. raw_steps: what it was made from."""
        self.first = first
        self.last = last
        self.file = file
        self.pos = pos
        self.view = file.view(pos + last - first + 1)
        self.allowed = allowed
        self.ipa = ipa
        self.raw_steps = raw_steps
        self.seq = 0  # when it was filled
        self.mark = 0  # a monitor's own: when it first saw it
        self.origin: TlbEntry | None = None  # of a device TLB: the IOMMU's entry that it is a copy of
        self.aliases: list[int] = []  # pages in Space.hot
        self.index = -1  # in the TLB's list
        self.space: Space | None = None

    @property
    def steps(self) -> tuple[Step, ...]:
        """The entries of guest tables it was made from, top first."""
        return tuple(map(Step._make, self.raw_steps))

    def forget_aliases(self) -> None:
        """Let it be found by its range alone."""
        assert self.space is not None
        for page in self.aliases:
            del self.space.hot[page]
        self.aliases.clear()

    def same_as(self, other: TlbEntry) -> bool:
        """Both give the same byte for every input they share."""
        return self.file is other.file and self.pos - self.first == other.pos - other.first


def entry_of(extent: Extent, rights: int) -> TlbEntry:
    """What one stage translates, where the table is the kernel's."""
    return TlbEntry(extent.first, extent.last, extent.file, extent.pos, rights, ipa=extent.first)


def entry_of_both(
    leaf: Leaf, iova: int, ipa: int, extent: Extent, rights: int, steps: tuple[RawStep, ...]
) -> TlbEntry:
    """What a guest's first stage and the second give together: the smaller stretch, the common rights."""
    first, _, size, granted = leaf
    last = first + size - 1
    if ipa - extent.first < iova - first:
        first = iova - (ipa - extent.first)
    if extent.last - ipa < last - iova:
        last = iova + (extent.last - ipa)
    start = ipa - (iova - first)
    return TlbEntry(first, last, extent.file, extent.pos + start - extent.first, granted & rights, ipa=start,
                    raw_steps=steps)  # fmt: skip


class Space:
    """The translations of one tag, for example of a (domain id, PASID)."""

    __slots__ = ("hot", "large", "tables", "tag", "tlb")

    def __init__(self, tlb: Tlb, tag: Hashable) -> None:
        self.tlb = tlb
        self.tag = tag
        self.hot: dict[int, TlbEntry] = {}  # by page number
        self.large: list[TlbEntry] = []  # entries of more than a page, ascending
        self.tables: dict[tuple[int, int], object] = {}  # paging-structure cache: (level, prefix) to a walk's start

    def lookup(self, iova: int) -> TlbEntry | None:
        """The entry that holds iova."""
        page = iova >> 12
        entry = self.hot.get(page)
        if entry is None and self.large:
            at = bisect_right(self.large, iova, key=_first) - 1
            if at >= 0 and iova <= self.large[at].last:
                entry = self.large[at]
                if len(entry.aliases) >= ALIASES:
                    entry.forget_aliases()
                self.hot[page] = entry
                entry.aliases.append(page)
        return entry

    def insert(self, entry: TlbEntry) -> None:
        """Keep an entry in the place of those it overlaps; nothing in mode off."""
        tlb = self.tlb
        if not tlb.keeps:
            return
        for old in list(self.overlapping(entry.first, entry.last)):
            tlb.remove(old)
        tlb.seq += 1
        entry.seq = tlb.seq
        entry.space = self
        if entry.last - entry.first < 4096:
            page = entry.first >> 12
            self.hot[page] = entry
            entry.aliases.append(page)
        else:
            insort(self.large, entry, key=_first)
        tlb.add(entry)

    def overlapping(self, first: int, last: int) -> Iterator[TlbEntry]:
        """Entries that share an address with [first, last]."""
        lo, hi = first >> 12, last >> 12
        small = range(lo, hi + 1) if hi - lo < len(self.hot) else [page for page in self.hot if lo <= page <= hi]
        for page in small:
            entry = self.hot.get(page)
            if entry is not None and entry.last - entry.first < 4096:
                yield entry
        at = max(bisect_right(self.large, first, key=_first) - 1, 0)
        for entry in self.large[at:]:
            if entry.first > last:
                break
            if entry.last >= first:
                yield entry

    def entries(self) -> Iterator[TlbEntry]:
        """All of them."""
        yield from dict.fromkeys(self.hot.values())
        yield from (entry for entry in self.large if not entry.aliases)

    def drop(self, first: int, last: int) -> list[TlbEntry]:
        """Drop what overlaps [first, last]; the entries dropped."""
        dropped = list(self.overlapping(first, last))
        for entry in dropped:
            self.tlb.remove(entry)
        return dropped

    def drop_all(self) -> list[TlbEntry]:
        """Drop every translation and every table kept."""
        dropped = list(self.entries())
        for entry in dropped:
            self.tlb.remove(entry)
        self.tables.clear()
        return dropped

    def drop_tables(self, first: int, last: int, shift: Callable[[int], int]) -> int:
        """Drop the tables kept for [first, last]; shift(level) is the input bits below a table's prefix."""
        gone = [key for key in self.tables if first >> shift(key[0]) <= key[1] <= last >> shift(key[0])]
        for key in gone:
            del self.tables[key]
        return len(gone)

    def keep_table(self, level: int, prefix: int, start: object) -> None:
        """Remember where a walk of this prefix may begin, in the place of the oldest when full; nothing in mode off."""
        if self.tlb.keeps:
            capacity = self.tlb.capacity
            if capacity and len(self.tables) >= capacity and (level, prefix) not in self.tables:
                del self.tables[next(iter(self.tables))]
            self.tables[level, prefix] = start


class Tlb:
    """All spaces of one cache, and who is evicted when it is full."""

    def __init__(self, caches: Caches) -> None:
        self.keeps = caches.mode != "off"
        self.capacity = caches.iotlb_entries if caches.mode == "faithful" else 0  # 0: no limit
        self.seq = 0
        self.spaces: dict[Hashable, Space] = {}
        self.evicted = 0
        self._random = random.Random(caches.seed)
        self._all: list[TlbEntry] = []

    def __len__(self) -> int:
        return len(self._all)

    def space(self, tag: Hashable) -> Space:
        """The space of a tag."""
        found = self.spaces.get(tag)
        if found is None:
            found = self.spaces[tag] = Space(self, tag)
        return found

    def found(self, tag: Hashable) -> list[Space]:
        """The space of a tag if there is one: an invalidation makes none."""
        space = self.spaces.get(tag)
        return [] if space is None else [space]

    def add(self, entry: TlbEntry) -> None:
        if self.capacity and len(self._all) >= self.capacity:
            self.remove(self._all[self._random.randrange(len(self._all))])
            self.evicted += 1
        entry.index = len(self._all)
        self._all.append(entry)

    def remove(self, entry: TlbEntry) -> None:
        space = entry.space
        assert space is not None
        entry.forget_aliases()
        if entry.last - entry.first >= 4096:
            at = bisect_right(space.large, entry.first, key=_first) - 1
            del space.large[at]
        last = self._all.pop()
        if last is not entry:
            self._all[entry.index] = last
            last.index = entry.index
        entry.index = -1

    def drop_spaces(self, wanted: Callable[[Hashable], bool]) -> list[TlbEntry]:
        """Drop every space whose tag is wanted; the entries dropped."""
        dropped: list[TlbEntry] = []
        for tag, space in self.spaces.items():
            if wanted(tag):
                dropped += space.drop_all()
        return dropped


class ContextCache(Generic[T]):
    """Decoded context structures (PASID entries, STE, CD, DTE) by requester, until they are invalidated."""

    def __init__(self, caches: Caches) -> None:
        self.keeps = caches.mode != "off"
        self.entries: dict[Hashable, T] = {}

    def keep(self, key: Hashable, context: T) -> None:
        if self.keeps:
            self.entries[key] = context

    def drop(self, wanted: Callable[[Hashable, T], bool]) -> list[T]:
        """Drop what is wanted; the contexts dropped."""
        gone = [key for key, context in self.entries.items() if wanted(key, context)]
        return [self.entries.pop(key) for key in gone]
