"""Seeded mutants of SMMUv3's decoding of STE and CD, its translation, its caches and its event records.

`python -m tests.iommu.mutants_smmuv3 [NUMBER...]` runs all; the default test run takes every third. How: mutants.py.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from typing import TYPE_CHECKING

from .mutants import BOTH_STAGES, Mutant, Suite, main

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import ModuleType

_HW = [
    ("a PASID is never refused for its size", "and ste.s1cdmax and pasid < 1 << ste.s1cdmax", "and ste.s1cdmax"),
    ("a PASID needs no S1CDMax", "and ste.s1cdmax and pasid < 1 << ste.s1cdmax", ""),
    ("one PASID too many", "pasid < 1 << ste.s1cdmax", "pasid <= 1 << ste.s1cdmax"),
    ("S1DSS is BYPASS by 2",
     "pasid is None and ste.s1dss == S1Dss.BYPASS", "pasid is None and ste.s1dss == S1Dss.SSID0"),
    ("S1DSS TERMINATE lets pass", "if pasid is None and ste.s1dss != S1Dss.SSID0:", "if False:"),
    ("an explicit SubstreamID 0 may pass", "if pasid == 0 and ste.s1dss == S1Dss.SSID0:", "if False:"),
    ("SubstreamID 0 never may", "if pasid == 0 and ste.s1dss == S1Dss.SSID0:", "if pasid == 0:"),
    ("V of an STE is not looked at", "if not ste.v:", "if False:"),
    ("reserved configurations are invalid", "if ste.config < 4:", "if not ste.config:"),
    ("EATS with S2S is good", "(ste.eats == Eats.TRANS and ste.s2s and stage2)", "False"),
    ("EATS without S2S is bad",
     "(ste.eats == Eats.TRANS and ste.s2s and stage2)", "(ste.eats == Eats.TRANS and stage2)"),
    ("S1CDMax is not limited", "bad = bad or ste.s1cdmax > d.ssid_bits or", "bad = bad or"),
    ("S1CDMax is limited one earlier", "ste.s1cdmax > d.ssid_bits", "ste.s1cdmax >= d.ssid_bits"),
    ("CD2L is not looked at", "(two_levels and not d.two_level_cd)", "False"),
    ("CD2L is needed for one level", "ste.s1cdmax and ste.s1fmt in LEAF_CDS\n", "ste.s1cdmax\n"),
    ("S1STALLD is good without stalls", 'bad = bad or (ste.s1stalld and d.stall != "supported")', "pass"),
    ("leaves of 64 KiB have 64 CDs", "S1Fmt.L2_64K: 1024}", "S1Fmt.L2_64K: 64}"),
    ("leaves of 4 KiB have 128 CDs", "S1Fmt.L2_4K: 64,", "S1Fmt.L2_4K: 128,"),
    ("the kernel's CD leaves need not be there", "if not table.has_leaf(ssid):", "if False:"),
    ("CDs are 32 bytes apart",
     "address = ste.s1contextptr + ENTRY_SIZE * ssid", "address = ste.s1contextptr + 32 * ssid"),
    ("a format counts without S1CDMax",
     "LEAF_CDS.get(ste.s1fmt, 0) if ste.s1cdmax else 0", "LEAF_CDS.get(ste.s1fmt, 0)"),
    ("a leaf begins at the CD", "l1cd.l2ptr + ENTRY_SIZE * (ssid % leaf)", "l1cd.l2ptr + ENTRY_SIZE * ssid"),
    ("all CDs are in the first leaf", "ste.s1contextptr, ssid // leaf,", "ste.s1contextptr, 0,"),
    ("V of an L1CD is not looked at", "if not l1cd.v or", "if"),
    ("an L1CD may lead anywhere", "l1cd.l2ptr >> self.description.oas:", "False:"),
    ("L1CDs are never cached",
     "if stage2.cached:\n                self.l1cds", "if False:\n                self.l1cds"),
    ("V of a CD is not looked at", "not cd.v or not", "not"),
    ("AA64 is not looked at", "not cd.aa64 or", ""),
    ("A is not looked at", "not cd.a or", ""),
    ("ENDI is not looked at", "(cd.endi and not (cd.epd0 and cd.epd1))", "False"),
    ("ENDI is bad without walks", "(cd.endi and not (cd.epd0 and cd.epd1))", "cd.endi"),
    ("HA needs no HTTU", '(cd.ha and d.httu == "none")', "False"),
    ("HD needs no HTTU", '(cd.hd and d.httu != "dirty")', "False"),
    ("an ASID may be large", "(cd.asid >> d.asid_bits)", "False"),
    ("S1STALLD forbids nothing", '(cd.s and (d.stall == "none" or ste.s1stalld))', '(cd.s and d.stall == "none")'),
    ("forced stalls force nothing", '(not cd.s and d.stall == "forced")', "False"),
    ("tables of a CD are not looked at", "or lpae.bad_stage1(cd, d.oas, granules=granules, va52=d.vax == 52)", ""),
    ("granules are not looked at", "granules=granules, va52", "va52"),
    ("spaces of all ASIDs are one", "asid = STAGE2 if cd is None else cd.asid", "asid = STAGE2 if cd is None else 1"),
    ("what bytes mean survives another table", "        self._decoded.clear()\n", ""),
    ("EATS forbids nothing", "context.ste.eats == Eats.ABT", "False"),
    ("rights of a cached translation are not looked at",
     "entry is None or not entry.allowed >> access & 1", "entry is None"),
    ("a tag stays in the address",
     "untagged = context.untagged(iova) if context.cd is not None else iova", "untagged = iova"),
    ("R is not looked at", "silent = (cd is not None and not cd.r) if first", "silent = False if first"),
    ("S2R is not looked at", "else not context.ste.s2r", "else True"),
    ("a stall is recorded as none", "bool(cd is not None and cd.s) if first else", "False if first else"),
    ("a translation request is recorded", "if dev.tlb is not None and fault.code", "if False and fault.code"),
    ("a fresh walk uses the cached STE",
     "self.stes.entries.get(dev) if cached else None", "self.stes.entries.get(dev)"),
    ("a fresh walk uses the cached L1CD", "if stage2.cached else None", "if True else None"),
]  # fmt: skip
_WALK = [
    ("TBI of the halves is swapped",
     "self.tagged = halves[0].tbi, halves[1].tbi", "self.tagged = halves[1].tbi, halves[0].tbi"),
    ("TTB0 serves both halves", "(cd.ttb0, cd.ttb1)", "(cd.ttb0, cd.ttb0)"),
    ("bit 63 chooses TBI", "upper = iova >> 55 & 1\n", "upper = iova >> 63 & 1\n"),
    ("a tagged upper address is cut", "return iova | _TAG if upper else iova & ~_TAG", "return iova & ~_TAG"),
    ("a retagged entry stays where it was", "shift = iova - untagged", "shift = 0"),
    ("stage 2 lets unreadable memory be read", "if extent.allowed >> access & 1:",
     "if extent.allowed >> (access & WRITE) & 1:"),
    ("stage 2 lets read-only memory be written", "if extent.allowed >> access & 1:",
     "if extent.allowed >> (access & ~WRITE) & 1:"),
    ("rights of kept table pages are not looked at",
     "found is not None and found.allowed >> access & 1", "found is not None"),
    ("the class of a CD fetch is IN",
     "page = self.page(ipa, READ, During.CONTEXT)", "page = self.page(ipa, READ, During.ACCESS)"),
    ("the class of a descriptor is IN",
     "page = self.page(ipa, READ, During.WALK)", "page = self.page(ipa, READ, During.ACCESS)"),
    ("an update only reads",
     "page = self.page(ipa, READ | WRITE, During.UPDATE)", "page = self.page(ipa, READ, During.UPDATE)"),
    ("an update is a walk",
     "page = self.page(ipa, READ | WRITE, During.UPDATE)", "page = self.page(ipa, READ | WRITE, During.WALK)"),
    ("nothing is kept in the TLB", "        if self._cached:\n            context.space.insert(entry)\n", ""),
    ("fresh walks fill the TLB",
     "        if self._cached:\n            context.space", "        if True:\n            context.space"),
    ("the kernel's stage 1 can be written",
     "if access & WRITE and not extent.writable:\n            raise TranslationFault(Why.WRITE, stage=1",
     "if False:\n            raise TranslationFault(Why.WRITE, stage=1"),
    ("privileged code runs from writable memory",
     "if access & EXEC and access & PRIV and extent.writable:", "if False:"),
    ("a clean page is written without a mark", "return extent, rights & ~WRITES", "return extent, rights"),
    ("fresh walks mark pages dirty",
     "        if self._cached:\n            bits", "        if True:\n            bits"),
    ("a bypassed stage 1 has no size", "if iova >> self._context.oas:", "if False:"),
    ("a bypassed stage 1 is one bit smaller", "if iova >> self._context.oas:", "if iova >> self._context.oas - 1:"),
    ("fresh walks start at kept tables",
     "self._kept(rules, iova) if self._cached else None", "self._kept(rules, iova)"),
    ("fresh walks set flags", "stage2.update if self._cached else None", "stage2.update"),
    ("privilege reaches stage 2", "stage2.translate(ipa, access & ~PRIV,", "stage2.translate(ipa, access & PRIV,"),
    ("the page's offset is lost", "ipa = leaf.out + iova - leaf.first", "ipa = leaf.out"),
    ("kept tables are found by the level below",
     "for level in range(1, rules.levels):\n                shift = rules.granule + (rules.granule - 3) * level",
     "for level in range(1, rules.levels):\n                shift = rules.granule + (rules.granule - 3) * level - 3"),
    ("the leaf is kept as a table", "enumerate(steps[:-1], 1)", "enumerate(steps, 1)"),
]  # fmt: skip
_REGS = [
    ("a reserved descriptor is a size fault",
     "Why.RESERVED: EventId.F_TRANSLATION", "Why.RESERVED: EventId.F_ADDR_SIZE"),
    ("an input address is a size fault",
     "Why.ADDRESS_SIZE: EventId.F_TRANSLATION", "Why.ADDRESS_SIZE: EventId.F_ADDR_SIZE"),
    ("the access flag is a permission", "Why.ACCESS_FLAG: EventId.F_ACCESS", "Why.ACCESS_FLAG: EventId.F_PERMISSION"),
    ("an update is of class IN", "During.UPDATE: Class.TT", "During.UPDATE: Class.IN"),
    ("C_BAD_SUBSTREAMID has no number", "ssid=ssid or 0)  # which", "ssid=0)  # which"),
    ("SSV by the number", "code, sid=sid, ssv=ssid is not None, ssid=ssid or 0)\n    second",
     "code, sid=sid, ssv=bool(ssid) and code != EventId.C_BAD_CD, ssid=ssid or 0)\n    second"),
    ("a read that writes is a read", "rnw=not access & WRITE, s2=second,", "rnw=bool(access & 1), s2=second,"),
    ("PnU is never set",
     "pnu=bool(access & PRIV), ind=_instruction(access), rnw=not access & WRITE, s2=second",
     "ind=_instruction(access), rnw=not access & WRITE, s2=second"),
    ("InD of every write", "return bool(access & EXEC) and not access & WRITE", "return bool(access & (EXEC | WRITE))"),
    ("TTRnW of every walk", "ttrnw=second and fault.during is During.WALK", "ttrnw=second"),
    ("the IPA has its offset", "ipa=fault.addr & PAGE if second", "ipa=fault.addr if second"),
    ("the IPA of stage 1", "ipa=fault.addr & PAGE if second else 0", "ipa=fault.addr & PAGE"),
    ("the input address is of a page",
     "during is During.WALK, addr=iova,", "during is During.WALK, addr=iova & -4096,"),
    ("no STALL", "stag=stag or 0, stall=stag is not None", "stag=stag or 0, stall=bool(stag)"),
    ("F_CD_FETCH tells the page",
     "fetchaddr=fault.addr & ADDRESS)\n    if code == EventId.F_WALK_EABT",
     "fetchaddr=fault.addr & -4096 & PAGE ^ 4096)\n    if code == EventId.F_WALK_EABT"),
    ("C_BAD_CD stays with the host", "EventId.C_BAD_SUBSTREAMID, EventId.C_BAD_CD\n", "EventId.C_BAD_SUBSTREAMID\n"),
]  # fmt: skip
MUTANTS = [
    Mutant(module, *change)
    for module, changes in (("smmuv3_hw", _HW), ("smmuv3_walk", _WALK), ("smmuv3_regs", _REGS), ("tlb", BOTH_STAGES))
    for change in changes
]
HARDWARE = ("walk", "lpae", "tlb", "monitor", "replace", "dma", "endpoint", "smmuv3")


def checks() -> Iterator[Callable[[], object]]:
    """The tables of faults, and every test of these modules that takes no parameter."""
    words = importlib.import_module("tests.iommu.test_smmuv3_words")
    yield from (lambda name=name: words.test_a_fault_and_its_words(name) for name in words.CASES)
    yield lambda: words.test_memory_that_is_gone(words.CDS, words.arm.event(9, words.SID, w3=words.CDS))
    yield lambda: words.test_a_stalled_transaction(1, words.Op.READ)
    yield from plain(words)
    walks = importlib.import_module("tests.iommu.test_smmuv3_walk")
    of_many = walks.test_substream_0_is_one_of_many_unless_it_stands_for_none
    yield from (lambda s1dss=s1dss: of_many(s1dss) for s1dss in (0, 1))
    for name in ("test_smmuv3_walk", "test_smmuv3_hw", "test_smmuv3_faults", "test_smmuv3_guest", "test_smmuv3"):
        module = importlib.import_module(f"tests.iommu.{name}")
        yield from plain(module)
    faults = importlib.import_module("tests.iommu.test_smmuv3_faults")
    two_levels = faults.test_two_levels_of_context_descriptors
    yield from (lambda fmt=fmt, cds=cds: two_levels(faults.S1Fmt(fmt), cds) for fmt, cds in ((1, 64), (2, 1024)))


def plain(module: ModuleType) -> Iterator[Callable[[], object]]:
    """Its tests without parameters."""
    for name, function in vars(module).items():
        if name.startswith("test_") and not inspect.signature(function).parameters:
            yield function


if __name__ == "__main__":
    sys.exit(main(Suite(MUTANTS, HARDWARE, checks)))
