"""VT-d's translation of one address, explained: the PASID entry, both stages, and what is cached (explain.py)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import vtd_ept, vtdss
from .explain import Explanation, Row, amount, kernels, translations
from .vtd_pasid import FIRST, NESTED, PASS_THROUGH, SECOND, PasidEntry
from .vtd_walk import Kept
from .walk import During, Step, TranslationFault
from .x86_64 import ADDRESS, EA, PS, A, D, P, names

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .endpoint import Endpoint
    from .tlb import TlbEntry
    from .vtd_hw import VtdHardware
    from .vtd_walk import Context

PGTT = {FIRST: "first", SECOND: "second", NESTED: "nested", PASS_THROUGH: "pass-through"}
SET_BY_WALKS = A | D | EA


def explain(hw: VtdHardware, dev: Endpoint, pasid: int | None, iova: int, access: int) -> Explanation:
    """Walk memory afresh, then look into the caches. No side effects."""
    entry: TlbEntry | None = None
    fault: TranslationFault | None = None
    try:
        entry = hw.walk_fresh(dev, pasid, iova, access)
        steps = entry.steps
    except TranslationFault as refused:
        fault, steps = refused.bare(), refused.steps
    try:
        context: Context | None = hw.decode(dev, pasid)
    except TranslationFault:
        context = None
    rows = [_pasid_row(hw, dev, pasid)]
    if context is not None and (fault is None or fault.stage):
        rows += _stages(context, steps, entry, fault, iova)
    return Explanation(rows, entry, fault, list(_cached(hw, dev, pasid, iova, access, entry, fault, steps, context)))


def step_row(step: Step) -> Row:
    """A first-stage entry, or one of a second stage that is bytes."""
    entry = step.entry
    present, name = (vtdss.R | vtdss.W, vtdss.names) if step.stage == 2 else (P, names)
    size = 1 << 9 * step.level + 3
    leads = ""
    if entry & present and (step.level == 1 or entry & PS):
        leads = f"{amount(size)} page at {entry & ADDRESS & -size:#x}"
    elif entry & present:
        leads = f"table at {entry & ADDRESS:#x}"
    bits = name(entry) if entry & present else "not present"
    return Row(f"stage {step.stage} level {step.level}", 0, step.address, (entry,), bits, leads)


# ---- memory ------------------------------------------------------------------------------------------------


def _pasid_row(hw: VtdHardware, dev: Endpoint, pasid: int | None) -> Row:
    number = pasid or 0
    words = hw.table(dev).read(number)
    if not hw.table(dev).has_leaf(number):
        return Row(f"PASID entry {number}", bits="no table: nothing was ever attached near this PASID")
    return Row(f"PASID entry {number}", words=words[:3], bits=pasid_bits(PasidEntry.unpack(words)))


def pasid_bits(e: PasidEntry) -> str:
    """A PASID entry by the names of its fields; what is 0 is left out, and what its type does not use."""
    if not e.present:
        return "not present"
    fields = [
        "P",
        "FPD" * e.fpd,
        f"PGTT={PGTT.get(e.pgtt, str(e.pgtt))}",
        f"DID={e.did}",
        f"FSPM={4 + e.fspm} levels" if e.pgtt != SECOND else f"AW={e.aw + 2} levels",
        f"FSPTPTR={e.fsptptr:#x}" if e.pgtt != SECOND else "",
        f"AW={e.aw + 2} levels" if e.pgtt == NESTED else "",
        f"SSPTPTR={e.ssptptr:#x}" if e.pgtt != FIRST else "",
        *(name * getattr(e, name.lower()) for name in ("SSADE", "PWSNP", "PGSNP", "SRE", "ERE", "WPE", "EAFE")),
    ]
    return " ".join(field for field in fields if field)


def _stages(
    context: Context, steps: tuple[Step, ...], entry: TlbEntry | None, fault: TranslationFault | None, iova: int
) -> Iterator[Row]:
    table = context.domain.translation
    if context.ept is not None:
        yield from map(step_row, steps)
        return
    if context.entry.pgtt != NESTED:
        yield kernels("stage 1" if context.entry.pgtt == FIRST else "stage 2", 0, table, iova)
        return
    for step in steps:
        yield kernels("stage 2", 1, table, step.address)
        yield step_row(step)
    if entry is not None:
        yield kernels("stage 2", 1, table, entry.ipa + iova - entry.first)
    elif fault is not None and fault.stage == 2 and fault.during is not During.UPDATE:
        yield kernels("stage 2", 1, table, fault.addr)


# ---- caches ------------------------------------------------------------------------------------------------


def _cached(
    hw: VtdHardware, dev: Endpoint, pasid: int | None, iova: int, access: int, entry: TlbEntry | None,
    fault: TranslationFault | None, steps: tuple[Step, ...], fresh: Context | None,
) -> Iterator[Row]:  # fmt: skip
    context = hw.contexts.entries.get((dev, pasid))
    if context is not None:
        now = hw.table(dev).read(pasid or 0)
        differs = "" if context.entry == PasidEntry.unpack(now) else f"memory: {pasid_bits(PasidEntry.unpack(now))}"
        yield Row("PASID cache", bits=pasid_bits(context.entry), differs=differs)
    used = context or fresh
    if used is not None:
        if used.entry.pgtt == NESTED:
            yield from _kept(used, used.rules.levels, iova, steps)
        elif used.ept is not None:
            yield from _kept(used, used.entry.aw + 2, iova, steps)
        tag = f"IOTLB, DID {used.entry.did}" + (f" PASID {used.pasid}" if used.entry.pgtt != SECOND else "")
        yield from translations(tag, used.space, iova, access, entry, fault)
    if dev.tlb is not None and pasid in dev.tlb.spaces:
        yield from translations("device TLB", dev.tlb.spaces[pasid], iova, access, entry, fault)


def _kept(context: Context, levels: int, iova: int, steps: tuple[Step, ...]) -> Iterator[Row]:
    """The paging-structure cache, from the root down; what differs is the entry that led there."""
    memory = {step.level: step for step in steps}
    for level in reversed(range(1, levels)):
        kept = context.space.tables.get((level, iova >> 9 * level + 12))
        if not isinstance(kept, Kept | vtd_ept.Kept):
            continue
        last = Step._make(kept.steps[-1])
        row = step_row(last)._replace(what=f"table of level {level}")
        now = memory.get(last.level)
        if now is None or now.address != last.address:
            row = row._replace(differs="memory: a walk does not come by here")
        elif (now.entry ^ last.entry) & ~SET_BY_WALKS:
            row = row._replace(differs=f"memory: {now.entry:#018x}")
        yield row
