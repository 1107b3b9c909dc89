"""SMMUv3 end to end: attach, nest, DMA, forget an invalidation, stall, replace."""

from __future__ import annotations

import errno

import pytest

import iommufd_uapi.iommufd as uapi
from iommufd_uapi.smmuv3 import Cmd, Event, EventId, FaultEvent
from iommufdd.iommu.dma import Op, State
from tests.core.harness import DIRTY, FAULT, NEST_PARENT, PASID

from .smmu_lab import Guest, SmmuLab, Watch, master

VA = 0x7F12_3456_7000


def test_dma_through_an_ioas() -> None:
    lab = SmmuLab()
    idev = lab.device()
    assert lab.fault(idev, 0x1000) == 0  # aborted, and no event
    ioas, ram = lab.ram()
    lab.attach(idev, ioas)
    lab.write(idev, 0x1FFC, b"across a page")
    assert ram.read(0x1FFC, 13) == b"across a page"
    assert lab.fault(idev, 0x4000_0000) == EventId.F_TRANSLATION
    lab.detach(idev)
    assert lab.fault(idev, 0x1000) == 0
    assert [record.id for record in lab.records()] == [EventId.F_TRANSLATION]


@pytest.mark.parametrize("flags", [0, NEST_PARENT, PASID, DIRTY, DIRTY | PASID])
def test_dma_through_every_kind_of_paging_domain(flags: int) -> None:
    lab = SmmuLab()
    idev = lab.device(pasids=5)
    ioas, ram = lab.ram()
    lab.attach(idev, lab.c.hwpt(idev.id, ioas, flags))
    lab.write(idev, 0x3000, b"here")
    assert ram.read(0x3000, 4) == b"here"
    assert lab.read(idev, 0x3000, 4) == b"here"


def test_dma_through_both_stages_and_a_forgotten_invalidation() -> None:
    lab = SmmuLab()
    idev = lab.device()
    guest = Guest(lab, idev)
    guest.start()
    guest.table.map(VA, 0x5000)
    lab.write(idev, VA + 8, b"nested")
    assert guest.ram.read(0x5008, 6) == b"nested"
    guest.table.map(VA, 0x6000)
    assert lab.read(idev, VA + 8, 6) == b"nested"  # the TLB still has the old page
    assert lab.invalidate(guest.viommu, Cmd.tlbi_nh_va(5, VA)) == 1
    assert lab.read(idev, VA + 8, 6) == bytes(6)


def test_an_event_finds_its_way_to_the_guest() -> None:
    lab = SmmuLab()
    idev = lab.device()
    guest = Guest(lab, idev)
    guest.start()
    assert lab.fault(idev, VA, Op.WRITE) == EventId.F_TRANSLATION
    flags, sequence, data = lab.event(guest.fd)
    assert (flags, sequence) == (0, 0)
    assert Event.decode(data) == FaultEvent(id=EventId.F_TRANSLATION, sid=0x100, class_=2, addr=VA)
    assert lab.iommu.events[0].relayed


def test_a_stalled_dma_is_answered_and_goes_on() -> None:
    lab = SmmuLab()
    idev = lab.device(stall=True)
    guest = Guest(lab, idev, s=1)
    fault_id, fd = lab.c.fault_queue()
    lab.attach(idev, guest.hwpt(flags=FAULT, fault=fault_id))
    dma = lab.dma(idev, Op.WRITE, VA + 4, 4, data=b"late")
    assert dma.run() is State.PARKED
    request = uapi.HwptPgfault.unpack(lab.c.read(fd, 40))
    assert (request.addr, request.perm, request.dev_id) == (VA + 4, 2, idev.id)
    record = lab.records()[0]
    assert isinstance(record, FaultEvent)
    assert (record.stall, record.stag) == (1, request.grpid)
    assert lab.c.read(guest.fd, 40) == b""  # what stalls is not relayed
    guest.table.map(VA, 0x9000)
    lab.c.write(fd, uapi.HwptPageResponse(cookie=request.cookie, code=0).pack())
    dma = master(idev).queue.running.popleft()
    assert dma.run() is State.DONE
    assert guest.ram.read(0x9004, 4) == b"late"


def test_replace_sees_old_or_new() -> None:
    lab = SmmuLab()
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
    assert seen
    assert set(seen) <= {b"A", b"B"}


def test_unmapping_under_a_guest_flushes_both_stages_and_the_device() -> None:
    lab = SmmuLab()
    idev = lab.device(ats=True)
    guest = Guest(lab, idev, eats=1)
    other = lab.c.process.map(guest.ram.file)
    lab.c.map(guest.ioas, other, 0x4000, 0x4000_0000)
    guest.start()
    guest.table.map(VA, 0x4000_0000)
    lab.read(idev, VA)
    watch = Watch(lab)
    lab.c.unmap(guest.ioas, 0x4000_0000, 0x4000)
    assert watch.commands() == ["CMD_TLBI_S2_IPA", "CMD_TLBI_NH_ALL", "CMD_ATC_INV"]
    assert not len(lab.iommu.iotlb.space((1, 5)).hot)
    with pytest.raises(AssertionError):
        lab.read(idev, VA)


def test_hw_info() -> None:
    lab = SmmuLab()
    idev = lab.device(pasids=10)
    cmd = uapi.HwInfo(dev_id=idev.id, data_len=40, data_uptr=lab.c.process.put(bytes(40)))
    lab.c.ioctl(cmd)
    assert (cmd.data_type, cmd.data_len, cmd.out_max_pasid_log2) == (2, 40, 10)
    info = uapi.HwInfoArmSmmuv3.unpack(lab.c.mm.read(cmd.data_uptr, 40))
    assert info.idr[0] & 0b11 == 0b11
    cmd = uapi.HwInfo(flags=1, dev_id=idev.id, data_type=3, data_len=8, data_uptr=lab.c.process.put(bytes(8)))
    lab.c.ioctl(cmd, errno.EOPNOTSUPP)
