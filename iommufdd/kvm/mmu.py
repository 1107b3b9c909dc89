"""The table of a VM (arch/x86/kvm/mmu/tdp_mmu.c): an EPT in memory, filled on demand, zapped, flushed.

What an entry mapped is given back only after the flush: vCPUs first, then every importer of the table. Until then a
cache may still lead there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

from iommufdd.errors import EFAULT
from iommufdd.iommu.walk import WRITE
from iommufdd.user import PAGE_SHIFT, PAGE_SIZE

from . import ept

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from iommufdd.iommu.ops import Cached
    from iommufdd.user import Mm, PageRun

    from .invariants import Invariants
    from .memory import HostMemory
    from .slots import MemorySlot, MemorySlots

EVERYTHING = 0, 2**64 - 1  # start and size of an invalidation
LAST_GFN = (1 << 52) - 1


class Importer(Protocol):
    """Who walks the table besides the vCPUs."""

    def invalidate(self, start: int, size: int) -> None:
        """The table has changed from guest address `start` on; EVERYTHING is all of it. Nothing is kept afterwards."""
        ...

    def cached(self) -> Iterable[Cached]:
        """What hardware has kept of the table: for whoever checks."""
        ...

    def cached_tables(self) -> Iterable[int]:
        """Addresses of tables at which hardware may begin a walk."""
        ...


class Entry(NamedTuple):
    """An entry of a table, and the guest pages it stands for."""

    table: int
    address: int
    level: int
    gfn: int
    entry: int

    @property
    def last_gfn(self) -> int:
        return self.gfn + ept.pages(self.level) - 1


class Statistics:
    """What the table has seen."""

    def __init__(self) -> None:
        self.faults = self.failed = 0
        self.mapped = self.zapped = 0  # leaf entries
        self.flushes = 0
        self.vcpu_requests = 0  # KVM_REQ_TLB_FLUSH
        self.present = 0  # bytes mapped now
        self.tables = 0  # pages now


class Mmu:
    """The one table that all vCPUs of a VM use, and that can be exported."""

    def __init__(self, mm: Mm, slots: MemorySlots, memory: HostMemory, max_level: int) -> None:
        """max_level: of leaf entries, 1 to 3."""
        self.mm = mm
        self.slots = slots
        self.memory = memory
        self.max_level = max_level
        self.root = 0  # address of the top table; 0: none yet
        self.level = 0
        self.vcpus = 0
        self.write_tracked: set[int] = set()  # guest pages whose writes somebody else must see
        self.mmio_marks = False
        self.importers: Iterable[Importer] = ()
        self.checks: Invariants | None = None
        self.stats = Statistics()
        self._given_up: list[tuple[int, int]] = []  # (address, bytes) that no entry leads to; 0 bytes: a table

    # ---- the root ----

    def load_root(self, level: int) -> int:
        """The top table of so many levels; one that nobody else shares is replaced if it has others."""
        if self.root and self.level != level:
            self.drop_root()
        if not self.root:
            self.level = level
            self.root = self._new_table()
        return self.root

    def drop_root(self) -> None:
        """Zap all, and the top table too: nobody walks it any more."""
        if self.root:
            self.zap_all()
            self.stats.tables -= 1
            self.memory.free_table(self.root)
            self.root = self.level = 0

    # ---- faults ----

    def fault(self, gfn: int, access: int) -> None:
        """Make a guest page present for an access (READ, WRITE, EXEC): EFAULT (kvm_tdp_mmu_map)."""
        self.stats.faults += 1
        try:
            self._map(gfn, bool(access & WRITE))
        except EFAULT:
            self.stats.failed += 1
            raise

    def _map(self, gfn: int, write: bool) -> None:
        slot = self.slots.find(gfn) if gfn >> 9 * self.level == 0 else None
        if slot is None:
            if self.mmio_marks and gfn >> 9 * self.level == 0:
                self._set_mmio(gfn)
            raise EFAULT(f"no memory slot has guest page {gfn:#x}")
        if write and slot.readonly:
            raise EFAULT(f"slot {slot.id} is read-only")
        run, writable = self._faultin(slot, gfn, write)
        level = self._leaf_level(slot, gfn, run, writable)
        first = gfn & -ept.pages(level)
        hpa = self.memory.hold(run.file, run.page - (gfn - first) << PAGE_SHIFT)
        self._set_leaf(first, level, hpa, ept.make_leaf(hpa, level, writable=writable, host_writable=writable))
        if writable:
            slot.mark_dirty(gfn)

    def _faultin(self, slot: MemorySlot, gfn: int, write: bool) -> tuple[PageRun, bool]:
        """The page behind a guest page, and whether it can be written (kvm_faultin_pfn): EFAULT."""
        addr = slot.address(gfn)
        runs = [] if slot.readonly else self.mm.faultin(addr, 1, write=True)
        if runs:
            return runs[0], True
        runs = [] if write else self.mm.faultin(addr, 1, write=False)
        if not runs:
            raise EFAULT(f"the VMM has no memory at {addr:#x} for guest page {gfn:#x}")
        return runs[0], False

    def _leaf_level(self, slot: MemorySlot, gfn: int, run: PageRun, writable: bool) -> int:
        """The largest page that the slot, the file's place in it and the tracking of writes allow."""
        if slot.dirty is not None:
            return 1
        for level in range(self.max_level, 1, -1):
            size = ept.pages(level)
            first = gfn & -size
            if first < slot.base_gfn or first + size - 1 > slot.last_gfn or (run.page - gfn) % size:
                continue
            if any(first <= tracked < first + size for tracked in self.write_tracked):
                continue
            runs = self.mm.faultin(slot.address(first), size, write=writable)
            if len(runs) == 1 and runs[0].npages == size:
                return level
        return 1

    def _set_leaf(self, gfn: int, level: int, hpa: int, leaf: int) -> None:
        """Store a leaf entry whose page is held for it."""
        at = self._descend(gfn, level)
        old = at.entry
        if old & ept.PRESENT and ept.is_leaf(old, level) and old & ept.ADDRESS == hpa:
            self.memory.store(at.address, leaf)  # the same page with other rights, which caches may learn later
            self.memory.drop(hpa)
            return
        changed = self._zap(at)
        self.memory.store(at.address, leaf)
        self.stats.mapped += 1
        self.stats.present += ept.pages(level) * PAGE_SIZE
        if changed:
            self.flush(gfn, at.last_gfn)

    def _set_mmio(self, gfn: int) -> None:
        at = self._descend(gfn, 1)
        if not at.entry & ept.PRESENT:
            self.memory.store(at.address, ept.make_mmio(gfn << PAGE_SHIFT, self.slots.generation))

    def _descend(self, gfn: int, level: int) -> Entry:
        """The entry of this level for a guest page; tables above it are made, larger leaf entries given up."""
        at = self._entry(self.root, self.level, gfn)
        while at.level > level:
            entry = at.entry
            if not entry & ept.PRESENT or ept.is_leaf(entry, at.level):
                large = self._zap(at)
                entry = ept.make_table(self._new_table())
                self.memory.store(at.address, entry)
                if large:
                    self.flush(at.gfn, at.last_gfn)
            at = self._entry(entry & ept.ADDRESS, at.level - 1, gfn)
        return at

    def lookup(self, gfn: int) -> Entry | None:
        """The leaf entry of a guest page, whatever it says; None where a table is missing."""
        if not self.root or gfn >> 9 * self.level:
            return None
        at = self._entry(self.root, self.level, gfn)
        while at.entry & ept.PRESENT and not ept.is_leaf(at.entry, at.level):
            at = self._entry(at.entry & ept.ADDRESS, at.level - 1, gfn)
        return at if at.level == 1 or at.entry & ept.PRESENT else None

    # ---- taking away ----

    def zap(self, first: int, last: int) -> None:
        """Leaf entries of guest pages first to last go; then a flush of what was there (kvm_tdp_mmu_zap_leafs)."""
        zapped = [at for at in list(self.leaves(first, last)) if self._zap(at)]
        self._flush_all_of(zapped)

    def zap_all(self) -> None:
        """Everything but the top table goes; then a flush of everything (a memory slot has gone)."""
        for at in self._entries(self.root, self.level, 0) if self.root else ():
            self._zap(at)
        self.flush()

    def write_protect(self, first: int, last: int) -> None:
        """W goes from guest pages first to last; then a flush (kvm_mmu_slot_remove_write_access)."""
        self._modify(first, last, lambda entry: entry & ~ept.W)

    def age(self, first: int, last: int) -> bool:
        """Whether guest pages first to last were in use; now nobody may, until somebody asks (access tracking)."""
        return self._modify(first, last, ept.track_access)

    def _modify(self, first: int, last: int, change: Modify) -> bool:
        changed = []
        for at in self.leaves(first, last):
            new = change(at.entry)
            if new != at.entry:
                self.memory.store(at.address, new)
                changed.append(at)
        self._flush_all_of(changed)
        return bool(changed)

    def leaves(self, first: int = 0, last: int = LAST_GFN) -> Iterator[Entry]:
        """The leaf entries, KVM's marks of MMIO among them, that stand for guest pages first to last."""
        if self.root:
            yield from self._leaves(self.root, self.level, 0, first, last)

    def _leaves(self, table: int, level: int, base: int, first: int, last: int) -> Iterator[Entry]:
        for at in self._entries(table, level, base):
            if at.last_gfn < first:
                continue
            if at.gfn > last:
                break
            if at.entry & ept.PRESENT and not ept.is_leaf(at.entry, level):
                yield from self._leaves(at.entry & ept.ADDRESS, level - 1, at.gfn, first, last)
            elif at.entry != ept.NOTHING:
                yield at

    def _entries(self, table: int, level: int, base: int) -> Iterator[Entry]:
        """The entries of a table that say something."""
        size = ept.pages(level)
        for index, entry in enumerate(self.memory.entries(table)):
            if entry != ept.NOTHING:
                yield Entry(table, table + 8 * index, level, base + index * size, entry)

    def _entry(self, table: int, level: int, gfn: int) -> Entry:
        address = table + 8 * (gfn >> 9 * (level - 1) & 511)
        entry = self.memory.load(address)
        assert entry is not None, "a table of ours"
        return Entry(table, address, level, gfn & -ept.pages(level), entry)

    def _zap(self, at: Entry) -> bool:
        """Clear an entry, and what is below it; whether a cache may have kept anything of it."""
        entry = at.entry
        if entry == ept.NOTHING:
            return False
        self.memory.store(at.address, ept.NOTHING)
        hpa = entry & ept.ADDRESS
        if not entry & ept.PRESENT:
            return True  # a mark of MMIO, which a device may take for a page
        if ept.is_leaf(entry, at.level):
            size = ept.pages(at.level) * PAGE_SIZE
            self.stats.zapped += 1
            self.stats.present -= size
            self._given_up.append((hpa, size))
            return True
        for below in self._entries(hpa, at.level - 1, at.gfn):
            self._zap(below)
        self.stats.tables -= 1
        self._given_up.append((hpa, 0))
        return True

    def _new_table(self) -> int:
        self.stats.tables += 1
        return self.memory.alloc_table(ept.NOTHING)

    # ---- flushing ----

    def _flush_all_of(self, changed: list[Entry]) -> None:
        if changed:
            self.flush(changed[0].gfn, changed[-1].last_gfn)

    def flush(self, first: int = 0, last: int = LAST_GFN) -> None:
        """Make vCPUs and importers forget guest pages first to last; then what was given up can be used again."""
        self.stats.flushes += 1
        self.stats.vcpu_requests += self.vcpus
        start, size = (first << PAGE_SHIFT, last - first + 1 << PAGE_SHIFT) if last != LAST_GFN else EVERYTHING
        for importer in self.importers:
            importer.invalidate(start, size)
        if self.checks is not None:
            self.checks.flushed(start, size)
        self._reclaim()

    def _reclaim(self) -> None:
        """Give memory back that no entry leads to, and no cache any more."""
        given_up, self._given_up = self._given_up, []
        for hpa, size in given_up:
            if size:
                self.memory.release(hpa, size)
            else:
                self.memory.free_table(hpa)


class Modify(Protocol):
    """What an entry becomes."""

    def __call__(self, entry: int, /) -> int: ...
