"""Caches against a model that says what must be stale and what fresh: guest tables, three devices, PASIDs.

The model knows the driver's flushes (intel/cache.c, intel/pasid.c) and what each invalidation drops (VT-d spec 6.5.2).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from iommufdd.iommu.tlb import Tlb
from iommufdd.iommu.walk import READ, TranslationFault
from tests.core.harness import NEST_PARENT, PASID

from .lab import Lab, domain, endpoint
from .tables import flags

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Iterator

PAGES, FRAMES = 6, 64  # of guest memory for data; of what can lie behind them
TABLES = 0x100000
PASIDS = (0, 3, 5)
SLOTS = (0, 1, 2, 511)  # entries of a level-1 table that are used
NESTED, ALL = ("N0", "N1"), ("N0", "N1", "P", "F")
REFUSED = {"N0": 0x71, "N1": 0x71, "P": 0x79, "F": 0x71}
KEYS = [(dev, pasid) for dev in range(3) for pasid in PASIDS]
EVERYTHING = 2**64 - 1
Value = int  # a frame, or minus a fault reason


def iova_of(k: int, s: int, j: int) -> int:
    """Entry 1 + k of level 3, s of level 2, j of level 1."""
    return (1 + k) << 30 | s << 21 | j << 12


IOVAS = [iova_of(k, s, j) for k in (0, 1) for s in (0, 1) for j in SLOTS]


class GuestModel:
    """A guest's first stage as four small dictionaries, stored to guest memory as it changes."""

    def __init__(self, write: Callable[[int, int], None], base: int) -> None:
        self.write = write
        self.root = base
        self.level3 = base + 0x1000
        self.level2 = [base + 0x2000, base + 0x3000]
        self.level1 = [base + 0x4000, base + 0x5000]
        self.to2 = {0: 0, 1: 1}  # which level-2 table is at k
        self.to1: dict[tuple[int, int], int | None] = {}
        self.pages: dict[tuple[int, int], int | None] = {}
        write(self.root, self.level3 | flags("rwu"))
        for k in (0, 1):
            self.set2(k, k)
            for s in (0, 1):
                self.set1(k, s, s)
        for t in (0, 1):
            for at, j in enumerate(SLOTS):
                self.set_page(t, j, (2 * t + at) % PAGES)

    def set2(self, k: int, d: int) -> None:
        self.to2[k] = d
        self.write(self.level3 + 8 * (1 + k), self.level2[d] | flags("rwu"))

    def set1(self, d: int, s: int, t: int | None) -> None:
        self.to1[d, s] = t
        self.write(self.level2[d] + 8 * s, 0 if t is None else self.level1[t] | flags("rwu"))

    def set_page(self, t: int, j: int, page: int | None) -> None:
        self.pages[t, j] = page
        self.write(self.level1[t] + 8 * j, 0 if page is None else page << 12 | flags("rwuad"))


class TagModel:
    """What is cached under one (domain id, PASID)."""

    def __init__(self) -> None:
        self.pages: dict[int, Value] = {}  # IOTLB: page to frame
        self.kept1: dict[int, int] = {}  # iova >> 21 to a level-1 table
        self.kept2: dict[int, int] = {}  # iova >> 30 to a level-2 table

    def clear(self) -> None:
        self.pages.clear()
        self.kept1.clear()
        self.kept2.clear()

    def drop(self, first: int, last: int, *, leaf: bool) -> None:
        drop_pages(self.pages, first, last)
        for kept, shift in ((self.kept1, 21), (self.kept2, 30)):
            for prefix in [p for p in kept if not leaf and p << shift <= last and (p + 1 << shift) > first]:
                del kept[prefix]


def drop_pages(pages: dict[int, Value], first: int, last: int) -> None:
    for page in [page for page in pages if first <= page << 12 <= last]:
        del pages[page]


def cover(addr: int, npages: int) -> tuple[int, int]:
    """The smallest aligned block of a power of two that holds both ends; two ends in different halves: all."""
    last = (addr + npages * 4096 - 1) % 2**64
    size = 4096
    while addr // size != last // size:
        size *= 2
    return addr // size * size, addr // size * size + size - 1


class CacheModel:
    """The lab and the model of it. Every call changes both; read() compares."""

    def __init__(self, mode: str) -> None:
        self.caching = mode != "off"
        self.lab = lab = Lab(mode=mode)
        c = lab.c
        self.file = c.world.memfd(FRAMES + 32)
        for frame in range(FRAMES):
            self.file.data[frame << 12] = frame
        self.va = c.process.map(self.file)
        self.ioas = c.ioas_alloc()
        c.map(self.ioas, self.va + (FRAMES << 12), 32 << 12, TABLES)
        self.frames: dict[int, int | None] = {}
        self.next_frame = 0
        self.idevs = [lab.device(pasids=4), lab.device(ats=True, pasids=4), lab.device(ats=True, pasids=4)]
        idev = self.idevs[0]
        parent = c.hwpt(idev.id, self.ioas, NEST_PARENT | PASID)
        self.hwpts = {"P": parent, "F": c.hwpt(idev.id, self.ioas, PASID)}
        self.guests: dict[str, GuestModel] = {}
        for at, name in enumerate(NESTED):
            self.guests[name] = GuestModel(self._store, TABLES + at * 0x8000)
            self.hwpts[name] = lab.nested(idev, parent, self.guests[name].root, flags=PASID)
        self.attached: dict[tuple[int, int], str] = {}
        self.tags: dict[tuple[str, int], TagModel] = {(name, pasid): TagModel() for name in NESTED for pasid in PASIDS}
        self.device: dict[tuple[int, int], dict[int, Value]] = {key: {} for key in KEYS}
        for page in range(PAGES):
            self.map(page)

    def _store(self, gpa: int, entry: int) -> None:
        at = (FRAMES << 12) + gpa - TABLES
        self.file.data[at : at + 8] = entry.to_bytes(8, "little")

    # ---- the second stage ----

    def map(self, page: int) -> None:
        """Show a frame that was not shown before, where nothing is."""
        if self.frames.get(page) is None:
            frame, self.next_frame = self.next_frame, (self.next_frame + 1) % FRAMES
            self.lab.c.map(self.ioas, self.va + (frame << 12), 4096, page << 12)
            self.frames[page] = frame

    def unmap(self, page: int) -> None:
        """Every child of the parent is flushed, as a second stage's address is none of the first's."""
        if self.frames.get(page) is None:
            return
        self.lab.c.unmap(self.ioas, page << 12, 4096)
        self.frames[page] = None
        for (dev, pasid), name in self.attached.items():
            if name in NESTED:
                self._drop_domain(name)
                self.device[dev, pasid].clear()
            else:
                self.device[dev, pasid].pop(page, None)

    def _drop_domain(self, name: str) -> None:
        for (other, _), tag in self.tags.items():
            if other == name:
                tag.clear()

    # ---- attachments ----

    def attach(self, dev: int, pasid: int, name: str) -> None:
        """Attach or replace."""
        before = self.attached.get((dev, pasid))
        if before is None:
            self.lab.attach(self.idevs[dev], self.hwpts[name], pasid)
        else:
            self.lab.replace(self.idevs[dev], self.hwpts[name], pasid)
        if name != before:
            self._leave(dev, pasid)
        self.attached[dev, pasid] = name

    def detach(self, dev: int, pasid: int) -> None:
        self.lab.detach(self.idevs[dev], pasid)
        self._leave(dev, pasid)

    def _leave(self, dev: int, pasid: int) -> None:
        before = self.attached.pop((dev, pasid), None)
        if before is not None:
            self._drop_domain(before)
            self.device[dev, pasid].clear()

    # ---- the guest flushes ----

    def invalidate(self, name: str, addr: int, npages: int, *, leaf: bool) -> None:
        assert self.lab.invalidate(self.hwpts[name], addr, npages, int(leaf)) == 1
        first, last = cover(addr, npages)
        for (dev, pasid), other in self.attached.items():
            if other != name:
                continue
            if (first, last) == (0, EVERYTHING):
                self.tags[name, pasid].clear()
            else:
                self.tags[name, pasid].drop(first, last, leaf=leaf)
            drop_pages(self.device[dev, pasid], first, last)

    # ---- DMA ----

    def read(self, dev: int, pasid: int, iova: int) -> Value:
        """A DMA must see what the model says."""
        want = self.expected(dev, pasid, iova)
        assert self.seen(dev, pasid, iova) == want, (dev, pasid, hex(iova))
        return want

    def seen(self, dev: int, pasid: int, iova: int) -> Value:
        try:
            entry = endpoint(self.idevs[dev]).translate(pasid or None, iova, READ)
        except TranslationFault as fault:
            return -fault.code
        return self._frame(entry.pos + iova - entry.first)

    def fresh(self, dev: int, pasid: int, iova: int) -> Value:
        """What a walk past all caches finds."""
        try:
            entry = self.lab.iommu.walk_fresh(endpoint(self.idevs[dev]), pasid or None, iova, READ)
        except TranslationFault as fault:
            return -fault.code
        return self._frame(entry.pos + iova - entry.first)

    def _frame(self, pos: int) -> Value:
        assert self.file.data[pos & ~0xFFF] == pos >> 12 or pos >> 12 >= FRAMES
        return pos >> 12

    def expected(self, dev: int, pasid: int, iova: int) -> Value:
        """What the model says, which also remembers it."""
        name = self.attached.get((dev, pasid))
        if name is None:
            return -0x59 if any(d == dev and p == pasid for d, p in self.programmed()) else -0x51
        if name not in NESTED:
            frame = self.frames.get(iova >> 12)
            return -REFUSED[name] if frame is None else frame
        ats = dev > 0
        found = self.device[dev, pasid].get(iova >> 12) if ats else None
        if found is None:
            found = self.translated(name, pasid, iova)
            if ats and self.caching and found >= 0:
                self.device[dev, pasid][iova >> 12] = found
        return found

    def programmed(self) -> Iterator[tuple[int, int]]:
        """Where the device has a PASID table by now: all PASIDs here share one leaf table."""
        for dev, idev in enumerate(self.idevs):
            for pasid in PASIDS:
                if self.lab.iommu.table(endpoint(idev)).has_leaf(pasid):
                    yield dev, pasid

    def translated(self, name: str, pasid: int, iova: int) -> Value:
        tag = self.tags[name, pasid]
        found = tag.pages.get(iova >> 12)
        if found is None:
            found = self.walk(self.guests[name], tag, iova)
            if self.caching and found >= 0:
                tag.pages[iova >> 12] = found
        return found

    def walk(self, guest: GuestModel, tag: TagModel, iova: int) -> Value:
        t = tag.kept1.get(iova >> 21)
        root: int | None = None  # the level-2 table, if this walk found it itself
        if t is None:
            d = tag.kept2.get(iova >> 30)
            if d is None:
                d = root = guest.to2[(iova >> 30) - 1]
            t = guest.to1[d, iova >> 21 & 511]
            if t is None:
                return -0x71
        page = guest.pages[t, iova >> 12 & 511]
        if page is None:
            return -0x71
        if self.caching:
            if root is not None:
                tag.kept2[iova >> 30] = root
            tag.kept1[iova >> 21] = t
        frame = self.frames.get(page)
        return -0x79 if frame is None else frame

    # ---- what is where ----

    def check(self) -> None:
        """The caches hold what the model's do."""
        iommu = self.lab.iommu
        for name, pasid in {(name, pasid) for (_, pasid), name in self.attached.items() if name in NESTED}:
            space = iommu.iotlb.spaces.get((iommu.did(domain(self.lab, self.hwpts[name])), pasid))
            tag = self.tags[name, pasid]
            assert ({entry.first >> 12 for entry in space.entries()} if space else set()) == set(tag.pages)
            kept = {key for key in space.tables if key[0] < 3} if space else set()
            assert kept == {(1, prefix) for prefix in tag.kept1} | {(2, prefix) for prefix in tag.kept2}
        for dev, pasid in self.attached:
            tlb = endpoint(self.idevs[dev]).tlb
            if isinstance(tlb, Tlb) and self.attached[dev, pasid] in NESTED:
                held = tlb.spaces.get(pasid or None)
                pages = {entry.first >> 12 for entry in held.entries()} if held else set()
                assert pages == set(self.device[dev, pasid])
        assert (len(iommu.iotlb) > 0) <= self.caching


def drive(mode: str, rng: random.Random, steps: int) -> CacheModel:
    """Random calls, most of them reads."""
    model = CacheModel(mode)
    for dev, pasid in KEYS:
        model.attach(dev, pasid, rng.choice(NESTED))
    for _ in range(steps):
        guest = model.guests[rng.choice(NESTED)]
        what = rng.random()
        if what < 0.5:
            for _ in range(4):
                model.read(*rng.choice(KEYS), rng.choice(IOVAS))
        elif what < 0.6:
            guest.set_page(rng.randrange(2), rng.choice(SLOTS), rng.choice((None, *range(PAGES))))
        elif what < 0.7:
            guest.set1(rng.randrange(2), rng.randrange(2), rng.choice((None, 0, 1, 0, 1)))
        elif what < 0.75:
            guest.set2(rng.randrange(2), rng.randrange(2))
        elif what < 0.9:
            npages = rng.choice((0, 1, 1, 2, 3, 512, 1024, 1 << 18, EVERYTHING))
            addr = 0 if npages == EVERYTHING else rng.choice(IOVAS)
            model.invalidate(rng.choice(NESTED), addr, npages, leaf=rng.random() < 0.5)
        elif what < 0.95:
            page = rng.randrange(PAGES)
            model.unmap(page)
            model.map(page)
        elif what < 0.98:
            model.attach(*rng.choice(KEYS), rng.choice(ALL))
        else:
            model.detach(*rng.choice(KEYS))
        model.check()
    return model
