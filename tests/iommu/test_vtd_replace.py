"""Replace under traffic: every stretch of a DMA sees the old domain or the new one; the switch fails nothing."""

from __future__ import annotations

import pytest

import iommufd_uapi.iommufd as uapi
from iommufdd.device import IommufdDevice
from iommufdd.errors import EINVAL
from iommufdd.iommu.dma import Op, State
from iommufdd.iommu.endpoint import Endpoint
from iommufdd.iommu.monitor import Monitor
from iommufdd.iommu.replace import Switch
from iommufdd.iommu.vtd import Vtd
from iommufdd.iommu.vtd_regs import Reason
from iommufdd.user import PAGE_SIZE
from tests.core.harness import FAULT, PASID

from . import traffic
from .lab import Lab, endpoint
from .tables import X86Table
from .traffic import IOVA, MODES, PAGES, REPLACES, SEEDS, Target, pasid_of

Words = tuple[int, ...]


def targets(lab: Lab, idev: IommufdDevice, *, pasid: bool = False) -> list[Target]:
    """Two IOAS, two second stages and two nested domains, all of them showing [IOVA, IOVA + PAGES)."""
    flags = PASID if pasid else 0
    found: list[Target] = []
    for mark in (1, 2):
        ioas, ram = lab.ram()
        for page in range(PAGES):
            ram.write(IOVA % 0x10_0000 + page * PAGE_SIZE, bytes([mark]) * 8)
            ram.write(0x20_0000 + page * PAGE_SIZE, bytes([mark]) * 8)
        fd_ram = lab.c.process.map(ram.file)
        shown = lab.c.ioas_alloc()
        lab.c.map(shown, fd_ram + 0x20_0000, PAGES * PAGE_SIZE, IOVA)
        found.append(Target(lab.c.hwpt(idev.id, shown, flags), mark))
        found.append(Target(lab.c.hwpt(idev.id, shown, flags | uapi.IOMMU_HWPT_ALLOC_NEST_PARENT), mark))
        parent = lab.parent(idev, ioas)
        table = X86Table(ram, 0x10_0000)
        for page in range(PAGES):
            table.map(IOVA + page * PAGE_SIZE, 0x20_0000 + page * PAGE_SIZE)
        found.append(Target(lab.nested(idev, parent, table.root, flags=flags), mark))
    return found


@pytest.mark.parametrize("seed", SEEDS)
def test_bursts_that_straddle_replaces_see_old_or_new_and_never_fail(seed: int) -> None:
    straddle(seed, REPLACES)


def straddle(seed: int, replaces: int) -> None:
    lab = Lab(mode=MODES[seed % 3])
    idev = lab.device(ats=bool(seed % 2), pasids=10)
    traffic.straddle(lab, idev, targets(lab, idev, pasid=pasid_of(seed) is not None), seed, replaces)
    assert not lab.iommu.faults


def test_a_switch_in_two_stores_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant: P is cleared first, so a walk between the stores finds nothing."""

    def two_stores(self: Vtd, dev: Endpoint, pasid: int, old: object, new: object, words: Words, *_: object) -> None:
        table = self.table(dev)
        table.store(pasid, 0, 0)
        self.contexts.drop(lambda *_: True)
        self.iotlb.drop_spaces(lambda _: True)
        table.publish(pasid, words)

    monkeypatch.setattr(Vtd, "switch", two_stores)
    for seed in SEEDS:
        with pytest.raises(AssertionError):
            straddle(seed, replaces=50)


def test_a_switch_that_forgets_the_caches_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_flush(self: Vtd, dev: Endpoint, pasid: int, old: object, new: object, words: Words, *_: object) -> None:
        self.table(dev).publish(pasid, words)

    monkeypatch.setattr(Vtd, "switch", no_flush)
    with pytest.raises(AssertionError):
        straddle(1, replaces=50)


def test_page_requests_pending_at_the_switch_are_answered_invalid_and_counted_apart() -> None:
    lab = Lab()
    idev = lab.device(pri=True)
    ioas, ram = lab.ram()
    fault_id, fd = lab.c.fault_queue()
    other, _ = lab.ram()
    lab.attach(idev, lab.c.hwpt(idev.id, other, FAULT, fault=fault_id))
    read, unread = (lab.dma(idev, Op.WRITE, 0x7000_0000 + n * PAGE_SIZE, 4) for n in range(2))
    assert read.run() is State.PARKED
    first = uapi.HwptPgfault.unpack(lab.c.read(fd, 40))
    assert unread.run() is State.PARKED
    lab.replace(idev, ioas)
    assert read.state is unread.state is State.FAILED
    assert "attachment ended" in read.error
    counters = endpoint(idev).counters
    assert (counters.withdrawn, counters.invalid) == (2, 0)
    assert lab.c.read(fd, 40) == b""
    lab.c.fails(lambda: lab.c.write(fd, uapi.HwptPageResponse(cookie=first.cookie, code=0).pack()), EINVAL.errno)
    del ram


class Verdicts(Monitor):
    """The switches made."""

    def __init__(self) -> None:
        self.switches: list[Switch] = []

    def switched(self, switch: Switch) -> None:
        self.switches.append(switch)


@pytest.mark.parametrize("pasid", [0, 5])
def test_vendor_mode_tears_down_first_so_every_replace_has_a_window(pasid: int) -> None:
    """SEMANTICS 3.9: every DMA between the first and the last store finds the entry not present, 0x59."""
    lab = Lab(replace="vendor")
    idev = lab.device(pasids=10)
    places = targets(lab, idev, pasid=True)
    if pasid:
        lab.attach(idev, places[0].pt)
    verdicts = Verdicts()
    lab.iommu.monitors.append(verdicts)
    now = places[0]
    lab.attach(idev, now.pt, pasid)
    assert verdicts.switches[-1].verdict == "hitless"  # from blocked: nothing worked before
    outcomes: list[int] = []
    lab.iommu.stored = lambda dev, number: outcomes.append(_outcome(lab, idev, pasid))
    for new in (*places[1:], *places):
        if new is now:
            continue
        outcomes.clear()
        lab.replace(idev, new.pt, pasid)
        switch = verdicts.switches[-1]
        assert switch.verdict == "window"
        assert switch.opens is not None
        assert switch.opens.what == "P cleared"
        assert "0x59" in switch.opens.sees
        assert [store.sees for store in switch.stores].count("new") == 1
        assert switch.stores[-1].what == "P set"
        # the old entry is still in the PASID cache at the first store; later stores find none, but for the last
        assert set(outcomes[1:-1]) == {Reason.PASID_NOT_PRESENT}
        assert outcomes[-1] == 0
        now = new
    lab.iommu.stored = None
    lab.detach(idev, pasid)
    assert verdicts.switches[-1].verdict == "hitless"  # detaching is meant to block


def _outcome(lab: Lab, idev: IommufdDevice, pasid: int) -> int:
    dma = lab.dma(idev, Op.READ, IOVA, 1, pasid=pasid or None)
    dma.run()
    return dma.fault.code if dma.fault is not None else 0


def test_a_failed_replace_leaves_the_old_domain_but_blocks_in_vendor_mode() -> None:
    lab = Lab()
    idev = lab.device()
    ioas, ram = lab.ram()
    ram.write(0x3000, b"old")
    lab.attach(idev, ioas)
    bad = lab.nested(idev, lab.parent(idev, ioas), 0x1000, width=40)
    with pytest.raises(EINVAL):
        lab.replace(idev, bad)
    assert lab.read(idev, 0x3000, 3) == b"old"
    lab.iommu.vendor_replace = True
    with pytest.raises(EINVAL):
        lab.replace(idev, bad)
    assert lab.fault(idev, 0x3000) == Reason.PASID_NOT_PRESENT
