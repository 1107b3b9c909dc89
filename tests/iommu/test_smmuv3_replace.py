"""Replace on SMMUv3: old or new under traffic; in vendor mode the driver's stores, and the verdicts they deserve."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import pytest

from iommufd_uapi.smmuv3 import Cd, Config, Eats, EventId, S1Dss, S1Fmt, Shcfg, Ste
from iommufdd.device import IommufdDevice
from iommufdd.errors import ENOENT
from iommufdd.iommu import smmuv3_attach
from iommufdd.iommu.dma import Dma, Op, State
from iommufdd.iommu.smmuv3_master import Master
from iommufdd.iommu.smmuv3_ste import CD_FORMAT, STE_FORMAT, ZERO, Format, Words, difference, update
from iommufdd.user import PAGE_SIZE
from tests.core.harness import FAULT, NEST_PARENT, PASID

from .smmu_lab import CDS, POOL, Guest, LpaeTable, SmmuLab, Watch, master

# ---- the driver's own unit tests (arm-smmu-v3-test.c): how often it invalidates, and whether V is ever 0 ----

CDTAB = 0xF0F0_F0F0_F0C0
ABORT = Ste.abort()
BYPASS = Ste(v=1, config=Config.BYPASS, shcfg=Shcfg.INCOMING)


def cdtable(s1dss: S1Dss, cdtab: int = CDTAB, *, ats: bool = True, stall: bool = False, nested: bool = False) -> Ste:
    ste = Ste.s1(cdtab, s1cdmax=31, s1fmt=S1Fmt.L2_64K, s1dss=s1dss, eats=Eats.TRANS * ats, s1stalld=not stall)
    ste.shcfg = Shcfg.INCOMING * (s1dss is S1Dss.BYPASS)
    if nested:
        second = stage2(ats=ats, stall=stall)
        ste.config, ste.mev = Config.NESTED, 1
        for name in ("s2t0sz", "s2sl0", "s2ir0", "s2or0", "s2sh0", "s2tg", "s2ps", "s2aa64", "s2ptw", "s2s", "s2r",
                     "s2ttb"):  # fmt: skip
            setattr(ste, name, getattr(second, name))
    return ste


def stage2(*, ats: bool = True, stall: bool = False, vmid: int = 0) -> Ste:
    return Ste(v=1, config=Config.S2_TRANS, eats=Eats.TRANS * ats, shcfg=Shcfg.INCOMING, s2t0sz=4, s2sl0=3, s2ir0=2,
               s2or0=1, s2sh0=3, s2tg=2, s2ps=1, s2aa64=1, s2ptw=1, s2s=stall, s2r=1, s2vmid=vmid,
               s2ttb=0xB_EEFD_EADB_EEF0)  # fmt: skip


S1, S1_BYPASSED, S2 = cdtable(S1Dss.SSID0), cdtable(S1Dss.BYPASS), stage2()
STALLED = cdtable(S1Dss.SSID0, ats=False, stall=True), stage2(ats=False, stall=True)
NESTED_BYPASSED = cdtable(S1Dss.BYPASS, nested=True)
KUNIT = [
    (BYPASS, ABORT, 2, True), (ABORT, BYPASS, 2, True), (S1, ABORT, 2, True), (ABORT, S1, 2, True),
    (S1, BYPASS, 3, True), (BYPASS, S1, 3, True), (S1, S1_BYPASSED, 1, True), (S1_BYPASSED, S1, 1, True),
    (S1_BYPASSED, BYPASS, 2, True), (BYPASS, S1_BYPASSED, 2, True), (S2, ABORT, 2, True), (ABORT, S2, 2, True),
    (S2, BYPASS, 2, True), (BYPASS, S2, 2, True), (S1, S2, 3, True), (S2, S1, 3, True),
    (S1, cdtable(S1Dss.BYPASS, 0x4B_4B4B_4B40), 3, False), (STALLED[0], STALLED[1], 3, True),
    (STALLED[1], STALLED[0], 3, True), (NESTED_BYPASSED, stage2(ats=False), 3, True),
    (stage2(ats=False), NESTED_BYPASSED, 2, True),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "syncs", "hitless"), KUNIT)
def test_the_drivers_own_cases_of_stes(old: Ste, new: Ste, syncs: int, hitless: bool) -> None:
    replay(old.words(), new.words(), STE_FORMAT, syncs, hitless=hitless)


CD = Cd(v=1, aa64=1, r=1, a=1, aset=1, epd1=1, t0sz=4, tg0=2, ir0=2, or0=1, sh0=3, ips=1, ttb0=0xE_EFDE_ADBE_EEF0,
        mair=0xABCDEF012345678, asid=778)  # fmt: skip
CD_2 = Cd.of(CD.words())
CD_2.asid = 1997
RELEASED = Cd(v=1, aa64=1, a=1, r=1, aset=0, epd0=1, epd1=1, asid=1997, mair=CD.mair, ips=1)
SVA = Cd(v=1, aa64=1, a=1, r=1, aset=0, epd1=1, asid=1997, mair=CD.mair, ips=1, t0sz=16, tg0=0, ir0=1, or0=1, sh0=3,
         ttb0=0x1000)  # fmt: skip
CDS_KUNIT = [
    (ZERO, CD_2.words(), 2, False), (CD_2.words(), ZERO, 2, False), (CD.words(), CD_2.words(), 1, True),
    (CD_2.words(), CD.words(), 1, True), (ZERO, SVA.words(), 2, False), (SVA.words(), ZERO, 2, False),
    (SVA.words(), RELEASED.words(), 2, True), (RELEASED.words(), SVA.words(), 2, True),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "syncs", "hitless"), CDS_KUNIT)
def test_the_drivers_own_cases_of_cds(old: Words, new: Words, syncs: int, hitless: bool) -> None:
    replay(old, new, CD_FORMAT, syncs, hitless=hitless)


def replay(old: Words, new: Words, fmt: Format, syncs: int, *, hitless: bool) -> None:
    groups = update(old, new, fmt)
    valid = Ste.mask("v")[0] if fmt is STE_FORMAT else Cd.mask("v")[0]
    now = list(old)
    invalid = False
    for stores in groups:
        for word, value in stores:
            now[word] = value
        invalid |= not now[0] & valid
    assert tuple(now) == new
    assert (len(groups), not invalid) == (syncs, hitless)


# ---- SEMANTICS 3.9: the words whose used bits differ ----

PARENT_B = stage2(vmid=2)
PARENT_B.s2ttb = 0x7000
DIFFERENCES = [
    (ABORT, S1, [0]), (S1, ABORT, [0]), (ABORT, NESTED_BYPASSED, [0]), (BYPASS, S1, [0]), (S2, BYPASS, [0]),
    (cdtable(S1Dss.SSID0, nested=True), cdtable(S1Dss.SSID0, 0x1000, nested=True), [0]),
    (cdtable(S1Dss.SSID0, nested=True), cdtable(S1Dss.TERMINATE, nested=True), [1]),
    (cdtable(S1Dss.SSID0, nested=True), cdtable(S1Dss.TERMINATE, 0x1000, nested=True), [0, 1]),
    (cdtable(S1Dss.SSID0, nested=True), cdtable(S1Dss.SSID0, 0x1000, ats=False, nested=True), [0]),
    (stage2(ats=False), stage2(), []), (stage2(ats=False, stall=True), stage2(stall=True), [1]),
    (stage2(vmid=1), PARENT_B, [2, 3]), (S1, stage2(vmid=1), [0, 2]), (S1, S2, [0]),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "words"), DIFFERENCES)
def test_words_that_differ(old: Ste, new: Ste, words: list[int]) -> None:
    assert difference(old.words(), new.words(), STE_FORMAT)[0] == words


# ---- verdicts on attachments ----


class Scene:
    """Two parents with a vIOMMU each, paging domains of both stages, and nested domains of all kinds."""

    def __init__(self) -> None:
        self.lab = lab = SmmuLab()
        self.idev = idev = lab.device(ats=True, pasids=4)
        self.watch = Watch(lab)
        guest = Guest(lab, idev, s1cdmax=4, eats=1)
        other_parent = lab.parent(idev, lab.ram()[0])
        ioas, _ = lab.ram()
        ste = guest.ste

        def changed(**fields: int) -> int:
            new = Ste.of(ste.words())
            for name, value in fields.items():
                setattr(new, name, value)
            return guest.hwpt(new)

        self.places: dict[str, int] = {
            "S1": lab.c.hwpt(idev.id, ioas), "another S1": lab.c.hwpt(idev.id, lab.ram()[0]),
            "S2": lab.parent(idev, ioas), "another S2": other_parent, "nested": guest.hwpt(),
            "nested, another CD table": changed(s1contextptr=CDS + 0x4000),
            "nested, another CD table and no ATS": changed(s1contextptr=CDS + 0x4000, eats=0),
            "nested, another S1DSS": changed(s1dss=S1Dss.TERMINATE),
            "nested, both": changed(s1contextptr=CDS + 0x4000, s1dss=S1Dss.TERMINATE),
            "nested bypass": guest.hwpt(Ste.bypass()), "nested abort": guest.hwpt(Ste.abort()),
        }  # fmt: skip
        lab.iommu.vendor_replace = True


VERDICTS = [
    ("S1", "another S1", "window"), ("S1", "S2", "window"), ("S2", "S1", "window"), ("S2", "another S2", "window"),
    ("S1", "nested", "window"), ("nested", "S1", "window"), ("nested", "nested, another CD table", "hitless"),
    ("nested", "nested, another CD table and no ATS", "hitless"), ("nested", "nested, another S1DSS", "hitless"),
    ("nested", "nested, both", "window"), ("nested", "nested bypass", "hitless"),
    ("nested bypass", "nested", "hitless"),
    ("S1", "nested abort", "hitless"), ("nested abort", "nested", "hitless"), ("nested", "nested abort", "hitless"),
    ("nested abort", "S1", "hitless"), ("S2", "nested abort", "hitless"), ("nested", "another S2", "window"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "verdict"), VERDICTS)
def test_verdicts(old: str, new: str, verdict: str) -> None:
    scene = Scene()
    lab, idev = scene.lab, scene.idev
    lab.attach(idev, scene.places[old])
    assert scene.watch.switches[-1].verdict == "hitless"  # from blocked
    lab.replace(idev, scene.places[new])
    switch = scene.watch.switches[-1]
    assert switch.verdict == verdict, str(switch)
    assert switch.stores[-1].sees == "new"
    if verdict == "window":
        assert switch.opens is not None
        code = EventId.C_BAD_CD if "CD" in switch.opens.what else EventId.C_BAD_STE
        assert switch.opens.what.endswith("word 0")
        assert code.name in switch.opens.sees
    lab.detach(idev)
    assert scene.watch.switches[-1].verdict == "hitless"


def test_default_mode_has_no_windows() -> None:
    for old, new, _ in VERDICTS:
        scene = Scene()
        scene.lab.iommu.vendor_replace = False
        scene.lab.attach(scene.idev, scene.places[old])
        scene.lab.replace(scene.idev, scene.places[new])
        assert scene.watch.switches[-1].verdict == "hitless"


def test_what_dma_meets_in_the_window() -> None:
    """Replace of one IOAS by another: the commonest on Linux, and not hitless (SEMANTICS 3.9)."""
    lab = SmmuLab(mode="off")
    idev = lab.device()
    first, second = (lab.c.hwpt(idev.id, lab.ram()[0]) for _ in range(2))
    lab.attach(idev, first)
    lab.iommu.vendor_replace = True
    outcomes: list[int] = []

    def look(dev: object, ssid: int) -> None:
        dma = lab.dma(idev, Op.READ, 0x1000, 1)
        dma.run()
        outcomes.append(dma.fault.code if dma.fault is not None else 0)

    lab.iommu.stored = look
    lab.replace(idev, second)
    assert outcomes == [EventId.C_BAD_CD, EventId.C_BAD_CD, 0]
    assert {record.id for record in lab.records()} == {EventId.C_BAD_CD}


# ---- under traffic ----

IOVA = 0x40_0000
PAGES = 8
SEEDS = range(10)


class Target(NamedTuple):
    """Something to attach to: every page it shows begins with its own number."""

    pt: int
    mark: int


def targets(lab: SmmuLab, idev: IommufdDevice, *, pasid: bool) -> list[Target]:
    """Two IOAS, two second stages and two first stages of a guest, all of them showing [IOVA, IOVA + PAGES)."""
    found: list[Target] = []
    guest = Guest(lab, idev)
    for mark in (1, 2):
        base = 0x20_0000 * mark - 0x8_0000
        table = LpaeTable(guest.ram, POOL + 0x2_0000 * mark)
        for page in range(PAGES):
            guest.ram.write(base + page * PAGE_SIZE, bytes([mark]) * 8)
            table.map(IOVA + page * PAGE_SIZE, base + page * PAGE_SIZE)
        shown = lab.c.ioas_alloc()
        addr = lab.c.process.map(guest.ram.file) + base
        for page in range(PAGES):  # scattered, so that a burst takes a step for each
            lab.c.map(shown, addr + (PAGES - 1 - page) * PAGE_SIZE, PAGE_SIZE, IOVA + page * PAGE_SIZE)
        found.append(Target(lab.c.hwpt(idev.id, shown, PASID if pasid else 0), mark))
        if not pasid:
            found.append(Target(lab.c.hwpt(idev.id, shown, NEST_PARENT), mark))
            guest.ram.write(CDS + 64 * mark, Cd.s1(table.root, asid=mark).pack())
            found.append(Target(guest.hwpt(Ste.s1(CDS + 64 * mark, eats=mark - 1, s1stalld=True)), mark))
    return found


class Traffic:
    """Bursts that straddle replaces: before each store, between any two and after, a burst takes some steps."""

    def __init__(self, lab: SmmuLab, idev: IommufdDevice, seed: int, pasid: int | None) -> None:
        self.lab = lab
        self.idev = idev
        self.pasid = pasid
        self.random = random.Random(seed)
        self.burst: Dma | None = None
        self.allowed: set[int] = set()
        self.seen: Counter[str] = Counter()

    def some(self) -> None:
        for _ in range(self.random.randrange(3)):
            if self.burst is None:
                self.burst = self.lab.dma(self.idev, Op.READ, IOVA, PAGES * PAGE_SIZE, pasid=self.pasid)
            before = self.burst.done
            state = self.burst.step()
            assert state is not State.FAILED, self.burst.error
            for at in range(-(-before // PAGE_SIZE) * PAGE_SIZE, self.burst.done, PAGE_SIZE):
                assert self.burst.data[at] in self.allowed
                self.seen["page"] += 1
            if state is State.DONE:
                self.burst = None


@pytest.mark.parametrize("seed", SEEDS)
def test_bursts_that_straddle_replaces_see_old_or_new_and_never_fail(seed: int) -> None:
    straddle(seed, 1_000)


def straddle(seed: int, replaces: int) -> None:
    """Replace so often, with bursts in between."""
    lab = SmmuLab(mode=("faithful", "greedy", "off")[seed % 3])
    idev = lab.device(ats=bool(seed % 2), pasids=10)
    pasid = 5 if seed % 4 == 3 else None
    places = targets(lab, idev, pasid=pasid is not None)
    traffic = Traffic(lab, idev, seed, pasid)
    now = places[0]
    traffic.allowed = {now.mark}
    if pasid is not None:
        lab.attach(idev, places[0].pt)
    lab.attach(idev, now.pt, pasid or 0)
    lab.iommu.stored = lambda dev, number: traffic.some()
    for _ in range(replaces):
        new = traffic.random.choice(places)
        traffic.some()
        traffic.allowed = {now.mark, new.mark}
        lab.replace(idev, new.pt, pasid or 0)
        now = new
        traffic.allowed = {now.mark}  # once replace has returned nothing shows the old one
        traffic.some()
    assert traffic.seen["page"] > replaces
    assert not lab.iommu.events


def test_a_switch_in_two_stores_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant: every entry is invalid for a moment."""

    def two_stores(dev: Master, write: smmuv3_attach.Write, note: Callable[[str], None]) -> None:
        write.table.store(write.at, 0, 0)
        smmuv3_attach._sync(dev, write)
        write.table.publish(write.at, write.target)
        smmuv3_attach._sync(dev, write)

    monkeypatch.setattr(smmuv3_attach, "_write", two_stores)
    for seed in SEEDS:
        with pytest.raises(AssertionError):
            straddle(seed, replaces=100)


@pytest.mark.parametrize("forgotten", ["_sync", "_atc_inv"])
def test_a_switch_that_forgets_a_cache_is_caught(monkeypatch: pytest.MonkeyPatch, forgotten: str) -> None:
    monkeypatch.setattr(smmuv3_attach, forgotten, lambda *_: None)
    with pytest.raises(AssertionError):
        straddle(1, replaces=100)


def test_page_requests_of_an_attachment_that_ends_are_answered_invalid() -> None:
    lab = SmmuLab()
    idev = lab.device(stall=True)
    ioas, _ = lab.ram()
    fault_id, fd = lab.c.fault_queue()
    lab.attach(idev, lab.c.hwpt(idev.id, lab.ram()[0], FAULT, fault=fault_id))
    read, unread = (lab.dma(idev, Op.WRITE, 0x7000_0000 + n * PAGE_SIZE, 4) for n in range(2))
    assert read.run() is State.PARKED
    assert lab.c.read(fd, 40)
    assert unread.run() is State.PARKED
    lab.replace(idev, ioas)
    assert read.state is unread.state is State.FAILED
    assert "attachment ended" in read.error
    counters = master(idev).counters
    assert (counters.withdrawn, counters.invalid) == (2, 0)


def test_a_failed_replace_leaves_the_old_domain() -> None:
    for vendor in (False, True):
        lab = SmmuLab()
        lab.iommu.vendor_replace = vendor
        idev, other = lab.device(), lab.device()
        guest = Guest(lab, other)
        ioas, ram = lab.ram()
        ram.write(0x3000, b"old")
        lab.attach(idev, ioas)
        with pytest.raises(ENOENT):
            lab.replace(idev, guest.hwpt())
        assert lab.read(idev, 0x3000, 3) == b"old"
