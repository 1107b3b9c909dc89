"""VT-d end to end: attach, nest, DMA, forget a flush, take a page fault, replace."""

from __future__ import annotations

import iommufd_uapi.iommufd as uapi
import iommufd_uapi.iommufd_test as test_uapi
from iommufdd.iommu.dma import Op, State
from iommufdd.iommu.vtd_regs import Reason
from tests.core.harness import FAULT, OPS

from .lab import Lab, endpoint


def test_dma_through_an_ioas() -> None:
    lab = Lab()
    idev = lab.device()
    assert lab.fault(idev, 0x1000) == Reason.DIRECTORY_NOT_PRESENT
    ioas, ram = lab.ram()
    lab.attach(idev, ioas)
    lab.write(idev, 0x1FFC, b"across a page")
    assert ram.read(0x1FFC, 13) == b"across a page"
    assert lab.read(idev, 0x1FFC, 13) == b"across a page"
    lab.detach(idev)
    assert lab.fault(idev, 0x1000) == Reason.PASID_NOT_PRESENT


def test_dma_through_both_stages_and_a_forgotten_flush() -> None:
    lab = Lab()
    idev = lab.device()
    hwpt, ram, table = lab.guest(idev)
    lab.attach(idev, hwpt)
    iova = 0x7F12_3456_7000
    entry = table.map(iova, 0x5000)
    lab.write(idev, iova + 8, b"nested")
    assert ram.read(0x5008, 6) == b"nested"
    assert table.get(entry) & 0x60 == 0x60  # A and D
    table.map(iova, 0x6000)
    assert lab.read(idev, iova + 8, 6) == b"nested"  # the IOTLB still has the old page
    lab.invalidate(hwpt, iova, 1, uapi.IOMMU_VTD_INV_FLAGS_LEAF)
    assert lab.read(idev, iova + 8, 6) == bytes(6)
    table.unmap(iova)
    lab.invalidate(hwpt, iova, 1)
    assert lab.fault(idev, iova) == Reason.FS_NOT_PRESENT


def test_a_page_fault_is_answered_and_the_dma_goes_on() -> None:
    lab = Lab()
    idev = lab.device(pri=True)
    ioas, ram = lab.ram()
    fault_id, fd = lab.c.fault_queue()
    hwpt0, _, table = lab.guest(idev)
    parent = lab.parent(idev, ioas)
    table.ram = ram
    table.root = table.page()
    hwpt = lab.nested(idev, parent, table.root, flags=FAULT, fault=fault_id)
    lab.attach(idev, hwpt)
    dma = lab.dma(idev, Op.WRITE, 0x4000, 4, data=b"late")
    assert dma.run() is State.PARKED
    request = uapi.HwptPgfault.unpack(lab.c.read(fd, 40))
    assert (request.addr, request.perm, request.dev_id) == (0x4000, 2, idev.id)
    table.map(0x4000, 0x9000)
    lab.c.write(fd, uapi.HwptPageResponse(cookie=request.cookie, code=0).pack())
    dma = endpoint(idev).queue.running.popleft()
    assert dma.run() is State.DONE
    assert ram.read(0x9000, 4) == b"late"
    del hwpt0


def test_replace_sees_old_or_new() -> None:
    lab = Lab()
    idev = lab.device()
    ioas_a, ram_a = lab.ram()
    ioas_b, ram_b = lab.ram()
    ram_a.write(0x3000, b"A")
    ram_b.write(0x3000, b"B")
    lab.attach(idev, ioas_a)
    assert lab.read(idev, 0x3000, 1) == b"A"
    seen: list[bytes] = []
    lab.iommu.stored = lambda dev, pasid: seen.append(lab.read(idev, 0x3000, 1))
    lab.replace(idev, ioas_b)
    assert lab.read(idev, 0x3000, 1) == b"B"
    assert set(seen) <= {b"A", b"B"}


def test_a_revoked_dmabuf_leaves_the_caches() -> None:
    lab = Lab()
    idev, other = lab.device(), lab.device(ats=True)
    ioas, _ = lab.ram()
    lab.attach(idev, ioas)
    copy = lab.c.ioas_alloc()
    lab.attach(other, copy)
    fd = lab.c.result(test_uapi.TestCmd(op=OPS[test_uapi.DmabufGet], u=test_uapi.DmabufGet(4096).pack()))
    iova = lab.c.map_file(ioas, fd, 0, 4096)
    lab.c.copy(copy, ioas, iova, 4096, iova)
    lab.write(idev, iova, b"cached")
    lab.write(other, iova, b"cached")
    lab.c.test(test_uapi.DmabufRevoke(fd, True))
    assert lab.fault(idev, iova) == Reason.FS_NOT_PRESENT
    assert lab.fault(other, iova) == Reason.FS_NOT_PRESENT


def test_a_large_page_around_the_interrupt_range_does_not_reach_into_it() -> None:
    lab = Lab()
    idev = lab.device()
    hwpt, ram, table = lab.guest(idev)
    lab.attach(idev, hwpt)
    table.map(0xFEE00000, 0x200000, level=2)
    ram.write(0x300000, b"behind")
    assert lab.read(idev, 0xFEF00000, 6) == b"behind"
    assert lab.fault(idev, 0xFEE00000) == Reason.INTERRUPT
    assert lab.fault(idev, 0xFEEFFFFF) == Reason.INTERRUPT


def test_a_fault_has_all_its_steps_from_wherever_the_walk_began() -> None:
    lab = Lab()
    idev = lab.device()
    hwpt, _, table = lab.guest(idev)
    lab.attach(idev, hwpt)
    table.map(0x7000, 0x8000)
    lab.read(idev, 0x7000)  # keeps the tables
    for iova, levels in ((0x9000, [4, 3, 2, 1]), (0x20_0000, [4, 3, 2])):
        dma = lab.dma(idev, Op.READ, iova)
        dma.run()
        assert dma.fault is not None
        assert [step.level for step in dma.fault.steps] == levels
