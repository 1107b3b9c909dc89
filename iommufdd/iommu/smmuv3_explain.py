"""SMMUv3's translation of one address, explained: STE, CD, both stages, and what is cached (explain.py)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from iommufd_uapi.smmuv3 import Cd, Config, L1Cd, Ste

from . import lpae
from .explain import Explanation, Row, amount, kernels, translations
from .smmuv3_hw import master_of
from .smmuv3_ste import WORDS
from .smmuv3_walk import Kept
from .walk import During, Step, TranslationFault

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .endpoint import Endpoint
    from .smmuv3_hw import SmmuV3Hardware
    from .smmuv3_master import Master
    from .smmuv3_walk import Context
    from .tlb import TlbEntry
    from .walk import RawStep

SHOWN = 4  # words of an STE or CD that say something
CD_BYTES = 64


def explain(hw: SmmuV3Hardware, dev: Endpoint, pasid: int | None, iova: int, access: int) -> Explanation:
    """Walk memory afresh, then look into the caches. No side effects."""
    return _Shown(hw, master_of(dev), pasid, iova, access).explanation()


def step_row(step: Step, granule: int = 12) -> Row:
    """A CD, an L1CD, or a stage-1 descriptor; levels count from the page, Arm's from the top."""
    level, entry = step.level, step.entry
    if level < 0:
        l1cd = L1Cd.of((entry,))
        leads = f"CDs at {l1cd.l2ptr:#x}" if l1cd.v else ""
        return Row("L1CD", 0, step.address, (entry,), "V" if l1cd.v else "not valid", leads)
    if level == 0:
        words = WORDS.unpack(entry.to_bytes(CD_BYTES, "little"))
        return Row("CD", 0, step.address, words[:SHOWN], cd_bits(Cd.of(words)))
    what = f"stage {step.stage} level {level}"
    bits = " ".join(name for bit, name in lpae.FLAGS if entry & bit) if entry & 1 else "not valid"
    shift = granule + (granule - 3) * (level - 1)
    table = entry & 0xFFFF_FFFF_F000
    leads = ""
    if entry & 3 == 3 and level > 1:
        leads = f"table at {table & -(1 << granule):#x}"
    elif entry & 1:
        leads = f"{amount(1 << shift)} {'page' if level == 1 else 'block'} at {table & -(1 << shift):#x}"
    return Row(f"{what} (Arm {lpae.arm_level(level)})", 0, step.address, (entry,), bits, leads)


def ste_bits(ste: Ste) -> str:
    """An STE by the names of its fields; what is 0 is left out, and memory attributes, which have no effect here."""
    if not ste.v:
        return "not valid"
    config = Config(ste.config).name if ste.config in set(Config) else str(ste.config)
    attributes = "s1cir", "s1cor", "s1csh", "s2ir0", "s2or0", "s2sh0"
    return " ".join([f"v config={config}", *ste.shown(but=("v", "config", *attributes))])


def cd_bits(cd: Cd) -> str:
    """A CD in the same way."""
    return " ".join(cd.shown(but=("ir0", "or0", "sh0", "ir1", "or1", "sh1", "mair", "amair"))) if cd.v else "not valid"


class _Shown:
    """One address."""

    def __init__(self, hw: SmmuV3Hardware, dev: Master, pasid: int | None, iova: int, access: int) -> None:
        self.hw, self.dev, self.pasid, self.iova, self.access = hw, dev, pasid, iova, access
        self.entry: TlbEntry | None = None
        self.fault: TranslationFault | None = None
        self.context: Context | None = None
        try:
            self.context = hw.decode(dev, pasid, cached=False)
            self.entry = hw.walk_fresh(dev, pasid, iova, access)
            self.steps = self.entry.steps
        except TranslationFault as fault:
            hw.name_fault(fault)
            self.fault, self.steps = fault, fault.steps

    def explanation(self) -> Explanation:
        rows = [self._ste(), *self._cds(), *self._stages()]
        return Explanation(rows, self.entry, self.fault, list(self._cached()))

    @property
    def granule(self) -> int:
        context = self.context
        return context.regimes[self.iova >> 55 & 1][0].granule if context is not None and context.regimes else 12

    # ---- memory ----

    def _ste(self) -> Row:
        sid = self.dev.sid
        if sid not in self.hw.stream_table:
            return Row(f"STE {sid:#x}", bits="there is no such stream")
        words = self.hw.stream_table.read(sid)
        return Row(f"STE {sid:#x}", words=words[:SHOWN], bits=ste_bits(Ste.of(words)))

    def _cds(self) -> Iterator[Row]:
        """The guest's, which its second stage leads to, or the kernel's."""
        context = self.context
        for step in self.steps:
            if step.level <= 0:
                yield from self._second(step.address)
                yield step_row(step)
        fault = self.fault
        if fault is not None and fault.during is During.CONTEXT:
            yield from self._second(fault.addr)
        if context is not None and context.cd is not None and not context.nested:
            yield Row(f"CD {context.ssid}", words=context.cd_words[:SHOWN], bits=cd_bits(context.cd))

    def _second(self, ipa: int) -> Iterator[Row]:
        table = self.hw.second_stage(self.dev)
        if table is not None:
            yield kernels("stage 2", 1, table.translation, ipa)

    def _stages(self) -> Iterator[Row]:
        context, entry, fault, iova = self.context, self.entry, self.fault, self.iova
        if context is None:
            return
        if not context.nested:
            yield kernels("stage 2" if context.cd is None else "stage 1", 0, context.domain.translation, iova)
            return
        for step in self.steps:
            if step.level > 0:
                yield from self._second(step.address)
                yield step_row(step, self.granule)
        if entry is not None:
            yield from self._second(entry.ipa + iova - entry.first)
        elif fault is not None and fault.stage == 2 and fault.during is During.ACCESS:
            yield from self._second(fault.addr)

    # ---- caches ----

    def _cached(self) -> Iterator[Row]:
        hw, dev = self.hw, self.dev
        stream = hw.stes.entries.get(dev)
        if stream is not None:
            now = hw.stream_table.read(dev.sid)
            differs = "" if now == stream.words else f"memory: {ste_bits(Ste.of(now))}"
            yield Row("STE cache", bits=ste_bits(stream.ste), differs=differs)
        cached = hw.contexts.entries.get((dev, self.pasid))
        if cached is not None and cached.cd is not None:
            yield Row(f"CD cache, CD {cached.ssid}", bits=cd_bits(cached.cd), differs=self._cd_differs(cached))
        used = cached or self.context
        if used is not None:
            if used.nested:
                yield from self._kept(used)
            asid = "" if used.cd is None else f" ASID {used.cd.asid}"
            tag = f"IOTLB, VMID {used.ste.s2vmid}{asid}"
            untagged = used.untagged(self.iova)
            yield from translations(tag, used.space, untagged, self.access, self._memory(untagged), self.fault)
        if dev.tlb is not None and self.pasid in dev.tlb.spaces:
            space = dev.tlb.spaces[self.pasid]
            yield from translations("device TLB", space, self.iova, self.access, self.entry, self.fault)

    def _memory(self, untagged: int) -> TlbEntry | None:
        """What memory gives for the address without its tag."""
        if self.entry is None or untagged == self.iova:
            return self.entry
        return self.hw.walk_fresh(self.dev, self.pasid, untagged, self.access)

    def _cd_differs(self, cached: Context) -> str:
        fresh = self.context
        if fresh is None:
            last = self.steps[-1] if self.steps else None
            if cached.nested and last is not None and last.level == 0:
                return f"memory: {step_row(last).bits}"
            return "memory: another STE or CD"
        if (fresh.cd_words, fresh.steps) == (cached.cd_words, cached.steps):
            return ""
        return f"memory: {cd_bits(fresh.cd) if fresh.cd is not None else 'no CD'}"

    def _kept(self, context: Context) -> Iterator[Row]:
        """The walk cache, from the root down; what differs is the entry that led there."""
        iova = context.untagged(self.iova)
        rules = context.regimes[iova >> 55 & 1][0]
        memory = {step.level: step for step in self.steps}
        for level in reversed(range(1, rules.levels)):
            shift = rules.granule + (rules.granule - 3) * level
            kept = context.space.tables.get((shift, iova >> shift))
            if isinstance(kept, Kept):
                yield self._kept_row(level, kept.steps[-1], memory.get(level + 1), rules.granule)

    def _kept_row(self, level: int, raw: RawStep, now: Step | None, granule: int) -> Row:
        last = Step._make(raw)
        row = step_row(last, granule)._replace(what=f"table of level {level}")
        if now is None or now.address != last.address:
            return row._replace(differs="memory: a walk does not come by here")
        if (now.entry ^ last.entry) & ~lpae.AF:
            return row._replace(differs=f"memory: {now.entry:#018x}")
        return row
