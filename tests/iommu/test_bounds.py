"""What grows with what a guest, or whoever drives a device, does: it has an end, and what is right stays right."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from iommufd_uapi.smmuv3 import Cmd, EventId
from iommufdd.errors import EFAULT
from iommufdd.iommu.dma import Op, State
from iommufdd.iommu.tlb import ALIASES
from iommufdd.iommu.vtd_hw import DECODED_KEPT
from iommufdd.iommu.vtd_pasid import PasidEntry
from iommufdd.iommu.vtd_regs import Reason
from tests.core.harness import FAULT, PASID, RW

from .lab import Lab, endpoint
from .smmu_lab import Guest, SmmuLab

if TYPE_CHECKING:
    from iommufdd.iommu.tlb import Tlb

PAGE = 4096
M2 = 2 << 20


def test_tables_kept_are_no_more_than_translations() -> None:
    """A walk from each of many directories; the oldest tables go, and are found again."""
    lab = Lab(mode="faithful", entries=8)
    idev = lab.device()
    hwpt, ram, table = lab.guest(idev)
    lab.attach(idev, hwpt)
    for number in range(30):
        table.map(number * M2, 0x3000)
    ram.write(0x3000, b"found")
    for number in (*range(30), *range(30)):
        assert lab.read(idev, number * M2, 5) == b"found"
        assert all(len(space.tables) <= 8 for space in lab.iommu.iotlb.spaces.values())
    assert any(len(space.tables) == 8 for space in lab.iommu.iotlb.spaces.values())


def test_a_large_translation_is_found_by_so_many_pages_at_most() -> None:
    lab = Lab()
    idev = lab.device()
    ioas = lab.c.ioas_alloc()
    pages = ALIASES + 100
    file = lab.c.world.memfd(pages)
    lab.c.map(ioas, lab.c.process.map(file), pages * PAGE, 0, RW)
    lab.attach(idev, ioas)
    for page in range(pages):
        file.pwrite(page * PAGE, page.to_bytes(2, "little"))
        assert lab.read(idev, page * PAGE, 2) == page.to_bytes(2, "little")
        assert all(len(space.hot) <= ALIASES for space in lab.iommu.iotlb.spaces.values())
    assert len(lab.iommu.iotlb) == 1
    lab.c.unmap(ioas, 0, pages * PAGE)
    assert all(not space.hot and not space.large for space in lab.iommu.iotlb.spaces.values())
    assert lab.fault(idev, 0) == Reason.FS_NOT_PRESENT


def spaces(tlb: Tlb | None) -> int:
    assert tlb is not None
    return len(tlb.spaces)


def test_attaching_pasids_leaves_nothing_in_the_caches() -> None:
    """What was never used has nothing to invalidate."""
    lab = Lab()
    idev = lab.device(ats=True, pasids=20)
    ioas, _ = lab.ram()
    hwpt = lab.c.hwpt(idev.id, ioas, PASID)
    for pasid in range(1, 200):
        lab.attach(idev, hwpt, pasid)
        lab.detach(idev, pasid)
    assert spaces(lab.iommu.iotlb) == 0
    assert spaces(endpoint(idev).tlb) == 0


def test_a_guests_invalidations_leave_nothing_in_the_caches() -> None:
    lab = SmmuLab()
    idev = lab.device()
    guest = Guest(lab, idev)
    guest.start()
    before = spaces(lab.iommu.iotlb)
    for asid in range(200):
        assert lab.invalidate(guest.viommu, Cmd.tlbi_nh_asid(asid), Cmd.tlbi_nh_va(0x1000, asid)) == 2
    assert spaces(lab.iommu.iotlb) == before


def test_what_pasid_entries_mean_is_remembered_within_bounds() -> None:
    lab = Lab()
    idev = lab.device(pasids=20)
    ioas, _ = lab.ram()
    hwpt = lab.c.hwpt(idev.id, ioas, PASID)
    lab.attach(idev, hwpt, 1)
    dev = endpoint(idev)
    words = lab.iommu.table(dev).read(1)
    assert PasidEntry.unpack(words).present
    for pasid in range(2, DECODED_KEPT + 10):
        lab.iommu.table(dev).publish(pasid, words)
        lab.iommu.walk_fresh(dev, pasid, 0, 1)
    assert len(lab.iommu._decoded) <= DECODED_KEPT
    assert lab.read(idev, 0, 4, pasid=DECODED_KEPT) == bytes(4)


def test_refused_page_requests_are_noted_within_bounds() -> None:
    lab = Lab()
    idev = lab.device(ats=True, pri=True, pasids=20)
    ioas, _ = lab.ram()
    fault, _ = lab.c.fault_queue()
    lab.attach(idev, lab.c.hwpt(idev.id, ioas, PASID | FAULT, fault=fault), 1)  # page requests are on
    lab.attach(idev, lab.c.hwpt(idev.id, ioas, PASID), 2)  # and nobody answers those of this one
    dev = endpoint(idev)
    for _ in range(100):
        dma = lab.dma(idev, Op.READ, 1 << 40, pasid=2)
        assert dma.run() is State.FAILED
        assert "answered INVALID" in dma.error
    assert len(dev.iopf.responses) <= 64


@pytest.mark.parametrize("what", ["cd", "table"])
def test_memory_of_a_process_that_has_ended_under_an_smmu(what: str) -> None:
    """CDs and tables are private memory under `run`, which answers EFAULT from the end of the process on."""
    lab = SmmuLab(mode="off")
    idev = lab.device()
    guest = Guest(lab, idev)
    guest.table.map(0x7000, 0x8000)
    guest.start()
    assert lab.read(idev, 0x7000, 4) == bytes(4)
    file = guest.ram.file

    before = file.pread

    def pread(pos: int, length: int) -> bytes:
        if what == "cd" or length != 64:  # a CD
            raise EFAULT("the process has ended")
        return before(pos, length)

    file.view = lambda end: None  # type: ignore[method-assign]
    file.pread = pread  # type: ignore[method-assign]
    dma = lab.dma(idev, Op.READ, 0x7000, 4)
    assert dma.run() is State.FAILED
    assert dma.fault is not None
    assert EventId(dma.fault.code) in (EventId.F_CD_FETCH, EventId.F_WALK_EABT)
