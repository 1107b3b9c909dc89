"""SMMUv3, the hardware: streams, their configuration, translations and events (IHI0070 chapters 3, 5, 7)."""

from __future__ import annotations

import itertools
from collections import Counter, deque
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from iommufd_uapi.smmuv3 import Cd, Eats, EventId, L1Cd, S1Dss, S1Fmt, Ste

from . import lpae
from .smmuv3_cmdq import STAGE2, TABLES, CommandQueue
from .smmuv3_regs import AIDR, NONE, TEXT, TRANSLATION_RELATED, event, idr, record, refusal
from .smmuv3_ste import ENTRY_SIZE, WORDS, ZERO, Words
from .smmuv3_tables import CdTable, StreamTable
from .smmuv3_walk import Context, Stage2, Walk, retagged
from .walk import During, Step, TranslationFault

if TYPE_CHECKING:
    from collections.abc import Callable

    from iommufd_uapi.smmuv3 import EventRecord
    from iommufdd.description import SmmuV3Iommu

    from .endpoint import Endpoint
    from .smmuv3_domain import SmmuPaging
    from .smmuv3_master import Master
    from .tlb import TlbEntry
    from .walk import RawStep

EVENTS_KEPT = 256
DECODED_KEPT = 4096
LEAF_CDS: dict[int, int] = {S1Fmt.L2_4K: 64, S1Fmt.L2_64K: 1024}
GRANULES = {4: 12, 16: 14, 64: 16}
K = TypeVar("K")
V = TypeVar("V")
_numbers = itertools.count(0x4000)  # of 64 KiB blocks for the kernel's own tables, seen in STEs and CDs


class Stream(NamedTuple):
    """An STE, as bytes and decoded."""

    words: Words
    ste: Ste


class Event(NamedTuple):
    """An event record of the hardware, and what the driver made of it."""

    dev: Master
    record: EventRecord
    relayed: bool  # to a vIOMMU; the others are in the host's log alone

    @property
    def words(self) -> tuple[int, ...]:
        """Its four 64 bit words."""
        return self.record.words()


def master_of(dev: Endpoint) -> Master:
    """What the driver keeps of a device: the device itself."""
    master: Master = dev  # type: ignore[assignment]
    return master


def _remember(known: dict[K, V], key: K, value: V) -> None:
    """Keep what bytes mean; a guest decides how many different ones there are."""
    if len(known) >= DECODED_KEPT:
        known.clear()
    known[key] = value


def new_table() -> int:
    """An address for a table of the kernel's own."""
    return next(_numbers) << 16


class SmmuV3Hardware(CommandQueue):
    """One SMMU: its tables, its caches, and what it records."""

    def __init__(self, description: SmmuV3Iommu) -> None:
        super().__init__(description)
        self.idr = idr(description)
        self.aidr = AIDR
        self.stream_table = StreamTable(lambda sid: self._was_stored(self.streams[sid], 0))
        self.cd_tables: dict[int, CdTable] = {}  # of the kernel's own, by address
        self.events: deque[Event] = deque(maxlen=EVENTS_KEPT)
        self.event_count: Counter[EventId] = Counter()
        self.stored: Callable[[Endpoint, int], None] | None = None  # after every store to an STE or CD
        self._roots: dict[int, SmmuPaging] = {}  # the kernel's own translation tables by address
        self._streams: dict[Words, Stream] = {}  # STEs that can be used, decoded
        self._decoded: dict[object, Context] = {}  # what bytes mean, while the roots are the same

    def new_cd_table(self, dev: Master, s1cdmax: int) -> CdTable:
        """An empty one."""
        table = CdTable(new_table(), s1cdmax, two_level=self.description.two_level_cd,
                        stored=lambda ssid: self._was_stored(dev, ssid))  # fmt: skip
        self.cd_tables[table.address] = table
        return table

    def set_root(self, address: int, domain: SmmuPaging | None) -> None:
        """A translation table of the kernel's own lies at an address, or no longer."""
        self._decoded.clear()
        if domain is None:
            self._roots.pop(address, None)
        else:
            self._roots[address] = domain

    def _was_stored(self, dev: Master, ssid: int) -> None:
        if self.stored is not None:
            self.stored(dev, ssid)

    # ---- translating ----

    def translate(self, dev: Endpoint, pasid: int | None, iova: int, access: int) -> TlbEntry:
        """Through the caches; with a device TLB this is a translation request (ATS). TranslationFault.

        A refusal is recorded unless the transaction stalls.
        """
        try:
            context = self.contexts.entries.get((dev, pasid)) or self._context(master_of(dev), pasid)
            if dev.tlb is not None and context.ste.eats == Eats.ABT:
                raise refusal(EventId.F_BAD_ATS_TREQ)
            untagged = context.untagged(iova) if context.cd is not None else iova
            entry = context.space.lookup(untagged)
            if entry is None or not entry.allowed >> access & 1:
                entry = Walk(context, cached=True).translate(untagged, access)
            return entry if untagged == iova else retagged(entry, iova, untagged)
        except TranslationFault as fault:
            self._refuse(master_of(dev), pasid, iova, access, fault)
            raise

    def walk_fresh(self, dev: Endpoint, pasid: int | None, iova: int, access: int) -> TlbEntry:
        """What memory says now: no cache is used or filled, no flag is set, nothing is recorded. TranslationFault."""
        try:
            context = self.decode(master_of(dev), pasid, cached=False)
            untagged = context.untagged(iova)
            entry = Walk(context, cached=False).translate(untagged, access)
            return entry if untagged == iova else retagged(entry, iova, untagged)
        except TranslationFault as fault:
            self.name_fault(fault)
            raise

    # ---- configuration ----

    def second_stage(self, dev: Master) -> SmmuPaging | None:
        """The kernel's table that the STE of a device names as its second stage."""
        ste = Ste.of(self.stream_table.read(dev.sid))
        return self._roots.get(ste.s2ttb) if ste.config & 2 else None

    def _context(self, dev: Master, pasid: int | None) -> Context:
        context = self.decode(dev, pasid, cached=True)
        self.contexts.keep((dev, pasid), context)
        return context

    def decode(self, dev: Master, pasid: int | None, *, cached: bool) -> Context:
        """STE and CD of a request. TranslationFault with its event."""
        stream = self.stes.entries.get(dev) if cached else None
        if stream is None:
            stream = self.stream(dev)
            if cached:
                self.stes.keep(dev, stream)
        ste = stream.ste
        if pasid is not None and not (ste.config & 1 and ste.s1cdmax and pasid < 1 << ste.s1cdmax):
            raise refusal(EventId.C_BAD_SUBSTREAMID)
        if not ste.config & 1:
            return self._build(stream, None, 0, ZERO)
        if ste.s1cdmax:
            if pasid is None and ste.s1dss == S1Dss.BYPASS:
                return self._build(stream, None, 0, ZERO)
            if pasid is None and ste.s1dss != S1Dss.SSID0:
                raise refusal(EventId.F_STREAM_DISABLED)
            if pasid == 0 and ste.s1dss == S1Dss.SSID0:
                raise refusal(EventId.F_STREAM_DISABLED)
        ssid = pasid or 0
        steps: list[RawStep] = []
        try:
            words = self._cd_words(dev, ste, ssid, steps, cached=cached)
            known = self._decoded.get((stream.words, words, ssid, *steps))
            return known or self._build(stream, self._cd(ste, words), ssid, words, tuple(steps))
        except TranslationFault as fault:
            fault.steps = tuple(map(Step._make, steps))
            raise

    def stream(self, dev: Master) -> Stream:
        """The STE of a device. TranslationFault."""
        if dev.sid not in self.stream_table:
            raise refusal(EventId.C_BAD_STREAMID)
        words = self.stream_table.read(dev.sid)
        known = self._streams.get(words)
        if known is None:
            known = Stream(words, self._ste(words))
            _remember(self._streams, words, known)
        return known

    def _ste(self, words: Words) -> Ste:
        """An STE that can be used (5.2). TranslationFault."""
        d = self.description
        ste = Ste.of(words)
        if not ste.v:
            raise refusal(EventId.C_BAD_STE)
        if ste.config < 4:
            raise refusal(NONE)
        stage1, stage2 = ste.config & 1, ste.config & 2
        bad = (stage1 and not d.stage1) or (stage2 and not d.stage2) or (ste.eats == Eats.TRANS and ste.s2s and stage2)
        if stage1:
            two_levels = ste.s1cdmax and ste.s1fmt in LEAF_CDS
            bad = bad or ste.s1cdmax > d.ssid_bits or (two_levels and not d.two_level_cd)
            bad = bad or (ste.s1stalld and d.stall != "supported")
        if bad:
            raise refusal(EventId.C_BAD_STE)
        return ste

    def l1_index(self, master: Master | None, ssid: int) -> int:
        """By the STE that the L1CD was found through; it is in the cache as long as its L1CDs are."""
        stream = self.stes.entries.get(master)
        return ssid // LEAF_CDS[stream.ste.s1fmt] if stream is not None and stream.ste.s1fmt in LEAF_CDS else 0

    def _cd_words(self, dev: Master, ste: Ste, ssid: int, steps: list[RawStep], *, cached: bool) -> Words:
        """A CD of the kernel's or, through stage 2, of a guest's table, whose entries are steps. TranslationFault."""
        if not ste.config & 2:
            table = self.cd_tables.get(ste.s1contextptr)
            if table is None:
                raise refusal(EventId.F_CD_FETCH, ste.s1contextptr + ENTRY_SIZE * ssid)
            if not table.has_leaf(ssid):
                raise refusal(EventId.C_BAD_SUBSTREAMID)
            return table.read(ssid)
        parent = self._parent(ste)
        stage2 = Stage2(parent, self.iotlb.space((ste.s2vmid, TABLES)), cached=cached)
        address = ste.s1contextptr + ENTRY_SIZE * ssid
        leaf = LEAF_CDS.get(ste.s1fmt, 0) if ste.s1cdmax else 0
        if leaf:
            l1cd = self._l1cd(dev, ste.s1contextptr, ssid // leaf, stage2, steps)
            address = l1cd.l2ptr + ENTRY_SIZE * (ssid % leaf)
        data = stage2.read(address, ENTRY_SIZE)
        if data is None:
            raise refusal(EventId.F_CD_FETCH, address)
        steps.append((1, 0, address, int.from_bytes(data, "little")))
        return WORDS.unpack(data)

    def _l1cd(self, dev: Master, table: int, index: int, stage2: Stage2, steps: list[RawStep]) -> L1Cd:
        word = self.l1cds.entries.get((dev, index)) if stage2.cached else None
        address = table + L1Cd.SIZEOF * index
        if word is None:
            data = stage2.read(address, L1Cd.SIZEOF)
            if data is None:
                raise refusal(EventId.F_CD_FETCH, address)
            word = int.from_bytes(data, "little")
            if stage2.cached:
                self.l1cds.keep((dev, index), word)
        steps.append((1, -1, address, word))
        l1cd = L1Cd.of((word,))
        if not l1cd.v or l1cd.l2ptr >> self.description.oas:
            raise refusal(EventId.C_BAD_SUBSTREAMID)
        return l1cd

    def _cd(self, ste: Ste, words: Words) -> Cd:
        """A CD that can be used (5.4). TranslationFault."""
        d = self.description
        cd = Cd.of(words)
        granules = tuple(GRANULES[size] for size in d.granules)
        bad = (
            not cd.v or not cd.aa64 or not cd.a or (cd.endi and not (cd.epd0 and cd.epd1))
            or (cd.ha and d.httu == "none") or (cd.hd and d.httu != "dirty") or (cd.asid >> d.asid_bits)
            or (cd.s and (d.stall == "none" or ste.s1stalld)) or (not cd.s and d.stall == "forced")
            or lpae.bad_stage1(cd, d.oas, granules=granules, va52=d.vax == 52)
        )  # fmt: skip
        if bad:
            raise refusal(EventId.C_BAD_CD)
        return cd

    def _parent(self, ste: Ste) -> SmmuPaging:
        parent = self._roots.get(ste.s2ttb)
        if parent is None:
            raise refusal(EventId.C_BAD_STE)
        return parent

    def _build(
        self, stream: Stream, cd: Cd | None, ssid: int, words: Words, steps: tuple[RawStep, ...] = ()
    ) -> Context:
        """What an STE and its CD mean; without a CD stage 2 alone translates."""
        ste = stream.ste
        if ste.config & 2:
            domain: SmmuPaging | None = self._parent(ste)
        else:
            domain = self._roots.get(cd.ttb0) if cd is not None else None
            if domain is None:
                raise refusal(NONE)  # stage 1 is bypassed, and there is no host memory to pass through to
        assert domain is not None
        asid = STAGE2 if cd is None else cd.asid
        space = self.iotlb.space((ste.s2vmid, asid))
        tables = self.iotlb.space((ste.s2vmid, TABLES))
        context = Context(ste, cd, ssid, domain, space, tables, self.description.oas, words, steps)
        if cd is not None:
            _remember(self._decoded, (stream.words, words, ssid, *steps), context)
        return context

    # ---- events ----

    def name_fault(self, fault: TranslationFault) -> None:
        """Give it SMMUv3's event number and words."""
        if not fault.name:
            code = event(fault)
            fault.code, fault.name = code, TEXT[code]

    def _refuse(self, dev: Master, pasid: int | None, iova: int, access: int, fault: TranslationFault) -> None:
        """Name the fault; stall, or record it if it is of those that are recorded."""
        self.name_fault(fault)
        if dev.tlb is not None and fault.code != EventId.F_BAD_ATS_TREQ:
            return  # a translation request (ATS) gets its answer, and no event (7.3.6)
        context = self.contexts.entries.get((dev, pasid)) if fault.stage else None
        if fault.stage and context is None:
            context = self._context_of(dev, pasid, fault)
        if fault.code in TRANSLATION_RELATED and context is not None:
            first = fault.stage == 1
            cd = context.cd
            fault.stalled = bool(cd is not None and cd.s) if first else bool(context.ste.s2s)
            silent = (cd is not None and not cd.r) if first else not context.ste.s2r
            if fault.stalled or silent:
                return
        if fault.code != NONE:
            self.record_event(dev, pasid, iova, access, fault)

    def _context_of(self, dev: Master, pasid: int | None, fault: TranslationFault) -> Context | None:
        """Where no cache keeps it; a CD that cannot be fetched has none."""
        if fault.during is During.CONTEXT:
            return None
        return self.decode(dev, pasid, cached=False)

    def record_event(
        self, dev: Master, pasid: int | None, iova: int, access: int, fault: TranslationFault, stag: int | None = None
    ) -> None:
        """Write the event record and let the driver see it."""
        entry = record(fault, dev.sid, pasid, iova, access, stag)
        self.event_count[EventId(fault.code)] += 1
        dev.counters.faults += 1
        self.events.append(Event(dev, entry, stag is None and self.handle_event(dev, entry)))
        for monitor in self.monitors:
            monitor.fault(dev, pasid, iova, access, fault)

    def handle_event(self, dev: Master, entry: EventRecord) -> bool:
        """The driver's interrupt handler, for what is not stalled: it went to a vIOMMU."""
        raise NotImplementedError
