"""Random guests: who flushes all is never reported, and no DMA reaches a wrong page without the sanitizer knowing.

What a DMA should reach is found by reading the guest's table level by level here, without the walker.
"""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from iommufdd.iommu.dma import Op, State

from .tables import flags
from .vmm import LEAF, Vmm

BASE = 0x4000_0000
M2 = 1 << 21
PAGES = [BASE + table * M2 + page * 4096 for table in range(3) for page in range(3)]
TARGETS = [0x40_0000 + number * 4096 for number in range(8)]

iovas = st.sampled_from(PAGES)
changes = st.one_of(
    st.tuples(st.just("map"), iovas, st.sampled_from(TARGETS)),
    st.tuples(st.just("unmap"), iovas, st.just(0)),
    st.tuples(st.just("protect"), iovas, st.just(0)),
    st.tuples(st.just("table"), iovas, st.sampled_from(TARGETS)),
    st.tuples(st.just("large"), iovas, st.sampled_from((2 * M2, 3 * M2))),
)
uses = st.lists(st.tuples(iovas, st.booleans()), max_size=3)
touches = st.lists(st.booleans(), max_size=2)  # of the page that changes: write or not
hows = st.sampled_from(("exact", "table", "all", "forgotten"))
rounds = st.lists(st.tuples(uses, touches, changes, touches, uses, hows), min_size=1, max_size=8)
caches = st.sampled_from((("greedy", 4096), ("faithful", 4), ("off", 4096)))


class Guest:
    """A table with few pages, DMA to them, and what that should reach."""

    def __init__(self, cache: tuple[str, int], *, ats: bool) -> None:
        self.vmm = Vmm(pages=4096, ats=ats, mode=cache[0], entries=cache[1])
        for target in TARGETS:
            self.vmm.ram.write(target, target.to_bytes(8, "little"))
        for number, iova in enumerate(PAGES[:6]):
            self.vmm.table.map(iova, TARGETS[number % len(TARGETS)])
        self.vmm.table.map(PAGES[6], 2 * M2, level=2)
        self.wrong = 0

    def change(self, what: str, iova: int, target: int) -> tuple[int, int, bool]:
        """One store to the table; the pages to flush, and whether LEAF will do."""
        table, base = self.vmm.table, iova & -M2
        slot = table.slot(base, 2)
        if what == "large" or table.get(slot) & 0x80 or what == "table":
            leaf = bool(table.get(slot) & 0x80) and what == "large"
            entry = target & -M2 | flags("rwu") | 0x80
            if what != "large":
                entry = table.page() | flags("rwu")
                table.set((entry & -4096) + 8 * (iova >> 12 & 511), target | flags("rwu") if target else 0)
            table.set(slot, entry)
            return base, 512, leaf
        at = table.slot(iova, 1)
        new = {"map": target | flags("rwu"), "unmap": 0, "protect": table.get(at) & ~2}[what]
        table.set(at, new)
        return iova, 1, True

    def round(
        self, before: list[tuple[int, bool]], first: list[bool], change: tuple[str, int, int], then: list[bool],
        after: list[tuple[int, bool]],
    ) -> tuple[int, int, bool]:  # fmt: skip
        """A change with DMA before and after it; what to flush."""
        for iova, write in (*before, *((change[1], write) for write in first)):
            self.use(iova, write=write)
        flush = self.change(*change)
        for iova, write in (*((change[1], write) for write in then), *after):
            self.use(iova, write=write)
        return flush

    def flush(self, how: str, first: int, pages: int, leaf: bool) -> None:
        if how == "exact":
            self.vmm.flush(first, pages, LEAF if leaf else 0)
        elif how == "table":
            self.vmm.flush(first & -M2, 512)
        elif how == "all":
            self.vmm.flush()

    def use(self, iova: int, *, write: bool) -> None:
        """A DMA; it is wrong when it reaches what the table does not say."""
        expected = self.reaches(iova, write=write)
        dma = self.vmm.lab.dma(self.vmm.idev, Op.WRITE if write else Op.READ, iova, 8, data=bytes(8))
        if write:
            dma.data = bytearray((expected or 0).to_bytes(8, "little"))
        known = self.known()
        done = dma.run() is State.DONE
        wrong = expected is None if done else False
        if done and not write and expected is not None:
            wrong = int.from_bytes(dma.data, "little") != int.from_bytes(self.vmm.ram.read(expected, 8), "little")
        if wrong:
            self.wrong += 1
            assert self.known() > known

    def known(self) -> int:
        """Stale uses that the sanitizer has seen."""
        sanitizer = self.vmm.sanitizer
        pending = sum(finding.uses for finding in sanitizer._pending.values())
        return pending + sum(finding.uses for finding in sanitizer.reported) + sanitizer.counts.raced * 1000

    def reaches(self, iova: int, *, write: bool) -> int | None:
        table, rights = self.vmm.table.root, 3
        for level in (4, 3, 2, 1):
            shift = 9 * level + 3
            entry = self.vmm.table.get(table + 8 * (iova >> shift & 511))
            rights &= entry
            if not entry & 1 or (write and not rights & 2):
                return None
            table = entry & 0x000FFFFFFFFFF000
            if level == 1 or entry & 0x80:
                return (table & -(1 << shift)) + iova % (1 << shift)
        raise AssertionError


@settings(max_examples=80, deadline=None)
@given(caches, st.booleans(), rounds)
def test_who_flushes_is_never_reported(cache: tuple[str, int], ats: bool, program: list) -> None:  # type: ignore[type-arg]
    guest = Guest(cache, ats=ats)
    for *uses, how in program:
        guest.flush("exact" if how == "forgotten" else how, *guest.round(*uses))
    assert guest.vmm.end() == []


@settings(max_examples=80, deadline=None)
@given(caches, st.booleans(), rounds)
def test_no_wrong_dma_goes_unnoticed(cache: tuple[str, int], ats: bool, program: list) -> None:  # type: ignore[type-arg]
    guest = Guest(cache, ats=ats)
    for *uses, how in program:
        guest.flush(how, *guest.round(*uses))
    reported = guest.vmm.end()
    if all(how == "forgotten" for *_, how in program):
        assert bool(reported) >= bool(guest.wrong)
