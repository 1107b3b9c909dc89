"""Intel VT-d in scalable mode, the hardware: requests, caches, invalidations, faults (VT-d spec 3, 6, 7)."""

from __future__ import annotations

from collections import Counter, deque
from typing import TYPE_CHECKING, NamedTuple

from .monitor import Invalidation, Monitor
from .tlb import ContextCache, Tlb, TlbEntry
from .vtd_pasid import FIRST, NESTED, PASS_THROUGH, SECOND, PasidEntry, PasidTable, reserved
from .vtd_regs import RECOVERABLE, TEXT, Reason, cap, ecap, reason
from .vtd_walk import INTERRUPTS, Context, Walk
from .walk import TranslationFault, Why

if TYPE_CHECKING:
    from collections.abc import Callable

    from iommufdd.description import VtdIommu

    from .endpoint import Endpoint
    from .vtd_domain import VtdDomain, VtdNested, VtdPaging
    from .vtd_kvm import VtdKvm

EVERYTHING = 0, 2**64 - 1
FAULTS_KEPT = 256
DECODED_KEPT = 4096


class FaultRecord(NamedTuple):
    """A fault recording register (VT-d spec 11.4.14)."""

    dev: Endpoint
    pasid: int | None
    iova: int
    access: int
    reason: Reason


class VtdHardware:
    """One remapping unit: its tables, its caches, and what it records."""

    def __init__(self, description: VtdIommu) -> None:
        self.description = description
        self.caches = description.caches
        self.cap = cap(description)
        self.ecap = ecap(description)
        self.iotlb = Tlb(description.caches)  # a space per (domain id, PASID); PASID -1: second stage, -2: table pages
        self.contexts: ContextCache[Context] = ContextCache(description.caches)  # the PASID cache
        self.roots: dict[int, VtdPaging | VtdKvm] = {}  # tables of the kernel's own, and of VMs, by address
        self._decoded: dict[tuple[int, tuple[int, ...]], Context] = {}  # what bytes mean, while the roots are the same
        self.monitors: list[Monitor] = []
        self.faults: deque[FaultRecord] = deque(maxlen=FAULTS_KEPT)
        self.fault_count: Counter[Reason] = Counter()
        self.stored: Callable[[Endpoint, int], None] | None = None  # after every store to a PASID entry
        self._tables: dict[Endpoint, PasidTable] = {}

    def table(self, dev: Endpoint) -> PasidTable:
        """The PASID directory of a device."""
        found = self._tables.get(dev)
        if found is None:
            found = self._tables[dev] = PasidTable(lambda pasid: self._was_stored(dev, pasid))
        return found

    def set_root(self, address: int, domain: VtdPaging | VtdKvm | None) -> None:
        """A table of the kernel's own lies at an address, or no longer."""
        if self.roots.get(address) is not domain:
            self._decoded.clear()
            if domain is None:
                del self.roots[address]
            else:
                self.roots[address] = domain

    def _was_stored(self, dev: Endpoint, pasid: int) -> None:
        if self.stored is not None:
            self.stored(dev, pasid)

    # ---- translating ----

    def translate(self, dev: Endpoint, pasid: int | None, iova: int, access: int) -> TlbEntry:
        """Through the caches. A refusal is recorded, but not with FPD nor before a page request. TranslationFault."""
        context = None
        try:
            context = self.contexts.entries.get((dev, pasid)) or self._context(dev, pasid)
            if access > 3:
                context.check_request(access)
            entry = context.space.lookup(iova)
            if entry is not None and entry.allowed >> access & 1:
                return entry
            if pasid is None and iova in INTERRUPTS:
                raise TranslationFault(Why.INTERRUPT, stage=0, level=0, addr=iova)
            return Walk(self, context, cached=True).translate(iova, access)
        except TranslationFault as fault:
            _name(fault, context)
            words = context.entry.pack() if context is not None else self.table(dev).read(pasid or 0)
            if not PasidEntry.unpack(words).fpd:
                self._record(dev, pasid, iova, access, fault)
            raise

    def walk_fresh(self, dev: Endpoint, pasid: int | None, iova: int, access: int) -> TlbEntry:
        """What memory says now: no cache is used or filled, no bit is set, nothing is recorded. TranslationFault."""
        context = None
        try:
            context = self.decode(dev, pasid)
            if access > 3:
                context.check_request(access)
            if pasid is None and iova in INTERRUPTS:
                raise TranslationFault(Why.INTERRUPT, stage=0, level=0, addr=iova)
            return Walk(self, context, cached=False).translate(iova, access)
        except TranslationFault as fault:
            _name(fault, context)
            raise

    def _context(self, dev: Endpoint, pasid: int | None) -> Context:
        context = self.decode(dev, pasid)
        self.contexts.keep((dev, pasid), context)
        return context

    def decode(self, dev: Endpoint, pasid: int | None) -> Context:
        """The PASID entry of a request, from memory. TranslationFault with its reason."""
        number = pasid or 0  # RID_PASID is 0
        if pasid is not None and not dev.max_pasids:
            raise _refusal(Reason.PASID_DISABLED)
        if number and number >= dev.max_pasids:
            raise _refusal(Reason.PASID_TOO_LARGE)
        table = self.table(dev)
        if not table.has_leaf(number):
            raise _refusal(Reason.DIRECTORY_NOT_PRESENT)
        words = table.read(number)
        known = self._decoded.get((number, words))
        if known is not None:
            return known
        entry = PasidEntry.unpack(words)
        if not entry.present:
            raise _refusal(Reason.PASID_NOT_PRESENT)
        if reserved(words):
            raise _refusal(Reason.PASID_RESERVED)
        context = self._build(entry, number)
        if len(self._decoded) >= DECODED_KEPT:
            self._decoded.clear()
        self._decoded[number, words] = context
        return context

    def _build(self, entry: PasidEntry, pasid: int) -> Context:
        d, pgtt = self.description, entry.pgtt
        if pgtt == PASS_THROUGH:
            raise _refusal(Reason.BEYOND_HARDWARE)  # there is no host memory to pass through to
        if pgtt not in (FIRST, SECOND, NESTED) or (pgtt != FIRST and entry.aw + 2 not in d.levels):
            raise _refusal(Reason.PASID_INVALID)
        if pgtt != SECOND and (entry.fspm > 1 or (entry.fspm == 1 and 5 not in d.levels)):
            raise _refusal(Reason.PASID_INVALID)
        domain = self.roots.get(entry.fsptptr if pgtt == FIRST else entry.ssptptr)
        if domain is None:
            raise _refusal(Reason.FS_ROOT_ACCESS if pgtt == FIRST else Reason.SS_ROOT)
        space = self.iotlb.space((entry.did, -1 if pgtt == SECOND else pasid))
        tables = self.iotlb.space((entry.did, -2))
        return Context(entry, pasid, domain, space, tables, d, domain.walker(self, entry))

    def _record(self, dev: Endpoint, pasid: int | None, iova: int, access: int, fault: TranslationFault) -> None:
        """Record a fault, unless the device may ask for the page."""
        if dev.pri and dev.iopf.enabled and fault.code in RECOVERABLE:
            return
        code = Reason(fault.code)
        self.fault_count[code] += 1
        dev.counters.faults += 1
        self.faults.append(FaultRecord(dev, pasid, iova, access, code))
        for monitor in self.monitors:
            monitor.fault(dev, pasid, iova, access, fault)

    def sees(self, dev: Endpoint, pasid: int, old: tuple[int, ...], new: tuple[int, ...]) -> str:
        """Whose entry a walk finds now: "old", "new", or the fault."""
        now = self.table(dev).read(pasid)
        if _effect(now) == _effect(new):
            return "new"
        if _effect(now) == _effect(old):
            return "old"
        if not now[0] & 1:
            return f"fault {Reason.PASID_NOT_PRESENT:#x}: {TEXT[Reason.PASID_NOT_PRESENT]}"
        return "a third entry"

    # ---- invalidations ----

    def tag_words(self, tag: object) -> str:
        """The tag of an Invalidation: "did 2", "did 2, pasid 0", "vfio0, pasid 0"."""
        if not isinstance(tag, tuple):
            return f"did {tag}"
        where, pasid = tag
        return f"{where if isinstance(where, str) else f'did {where}'}, pasid {pasid}"

    def _dropped(self, what: Invalidation) -> None:
        for monitor in self.monitors:
            monitor.invalidated(what)

    def drop_context(self, dev: Endpoint, did: int, pasid: int) -> None:
        """PASID-cache invalidation, PASID-selective within a domain."""
        what = Invalidation("PASID cache", "PASID", (did, pasid))
        gone = self.contexts.drop(lambda _, context: context.entry.did == did and context.pasid == pasid)
        what.tables = len(gone)
        self._dropped(what)

    def drop_pasid(
        self, did: int, pasid: int, first: int = 0, last: int = 2**64 - 1, *, leaf: bool = False, user: bool = False
    ) -> None:
        """PASID-based IOTLB invalidation: all of a PASID, or an aligned range of it."""
        everything = (first, last) == EVERYTHING
        what = Invalidation("IOTLB", "PASID" if everything else "page", (did, pasid), first, last,
                            leaf=leaf and not everything, user=user)  # fmt: skip
        for space in self.iotlb.found((did, pasid)):
            if everything:
                what.tables = len(space.tables)
                what.dropped = space.drop_all()
                continue
            what.dropped = space.drop(first, last)
            if not leaf:
                what.tables = space.drop_tables(first, last, _shift)
        self._dropped(what)

    def drop_second(self, did: int, first: int, last: int) -> None:
        """IOTLB invalidation, page-selective within a domain; the whole domain when the hardware cannot."""
        d = self.description
        if not d.page_selective or (last - first + 1 >> 12).bit_length() - 1 > d.mamv:
            self.drop_domain(did)
            return
        what = Invalidation("IOTLB", "page", did, first, last)
        for space in self.iotlb.found((did, -1)):
            what.dropped = space.drop(first, last)
            what.tables = space.drop_tables(first, last, _shift)
        self._dropped(what)

    def drop_domain(self, did: int) -> None:
        """IOTLB invalidation, domain-selective: every PASID's results with this id."""
        what = Invalidation("IOTLB", "domain", did)
        for space in [space for tag, space in self.iotlb.spaces.items() if _did(tag) == did]:
            what.tables += len(space.tables)
            what.dropped += space.drop_all()
        self._dropped(what)

    def drop_devtlb(
        self, dev: Endpoint, pasid: int, first: int = 0, last: int = 2**64 - 1, *, user: bool = False
    ) -> None:
        """Device TLB invalidation; PASID 0 is that of requests without one."""
        if dev.tlb is None:
            return
        granularity = "PASID" if (first, last) == EVERYTHING else "page"
        what = Invalidation("device TLB", granularity, (dev.name, pasid), first, last, user=user)
        what.dropped = dev.invalidate(pasid or None, first, last)
        self._dropped(what)

    # ---- what the driver flushes for a domain (intel/cache.c) ----

    def flush_paging(self, domain: VtdPaging, dev: Endpoint, pasid: int, iova: int, last: int) -> None:
        """CACHE_TAG_IOTLB and CACHE_TAG_DEVTLB of a paging domain."""
        did = self.did(domain)
        if domain.stage == FIRST:
            self.drop_pasid(did, pasid, iova, last)
        else:
            self.drop_second(did, iova, last)
        self.drop_devtlb(dev, pasid, iova, last)

    def flush_nested(
        self, domain: VtdNested, dev: Endpoint, pasid: int, first: int, last: int, *, leaf: bool
    ) -> None:
        """The tags of a nested domain, as its user asks."""
        self.drop_pasid(self.did(domain), pasid, first, last, leaf=leaf, user=True)
        self.drop_devtlb(dev, pasid, first, last, user=True)

    def flush_parent(self, domain: VtdNested, dev: Endpoint, pasid: int) -> None:
        """CACHE_TAG_NESTING_IOTLB and CACHE_TAG_NESTING_DEVTLB: a second stage has changed under a first."""
        self.drop_domain(self.did(domain))
        self.drop_devtlb(dev, pasid)

    def did(self, domain: VtdDomain) -> int:
        """The domain's id on this unit."""
        raise NotImplementedError


def _name(fault: TranslationFault, context: Context | None) -> None:
    """Give a fault VT-d's reason; context: what the request was translated with, which memory may no longer say."""
    if not fault.code:
        assert context is not None
        fault.code = reason(fault, nested=context.entry.pgtt == NESTED, levels=context.rules.levels)
    fault.name = TEXT[Reason(fault.code)]


def _refusal(code: Reason) -> TranslationFault:
    fault = TranslationFault(Why.CONTEXT, stage=0, level=0, addr=0)
    fault.code = code
    return fault


def _effect(words: tuple[int, ...]) -> tuple[int, ...] | None:
    """The part of an entry that hardware looks at: nothing when it is absent."""
    return words if words[0] & 1 else None


def _did(tag: object) -> int:
    assert isinstance(tag, tuple)
    did: int = tag[0]
    return did


def _shift(level: int) -> int:
    """Input bits below the prefix of a kept table: a table of `level` is found by the index above it."""
    return 9 * level + 12

