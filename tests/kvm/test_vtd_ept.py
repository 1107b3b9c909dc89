"""VT-d over an EPT: what it reads there, what it keeps, and what it is told to forget."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import iommufd_uapi.kvm as kvm
from iommufdd.description import Caches, VtdIommu
from iommufdd.hw_pagetable import HwptKvm
from iommufdd.iommu.dma import Op, State
from iommufdd.iommu.monitor import Invalidation, Monitor
from iommufdd.iommu.vtd import Vtd
from iommufdd.iommu.vtd_kvm import VtdKvm
from iommufdd.iommu.vtd_pasid import PasidEntry
from iommufdd.iommu.walk import READ, WRITE, TranslationFault
from iommufdd.kvm import ept
from tests.iommu.lab import endpoint

from .room import LOG, Room

if TYPE_CHECKING:
    from iommufdd.device import IommufdDevice
    from iommufdd.iommu.ops import Domain

DOORBELL = 0xFEB0_0000


class Told(Monitor):
    """Notes the commands to caches, and what was read otherwise than a CPU does."""

    def __init__(self) -> None:
        self.commands: list[str] = []
        self.misreads: list[tuple[int, str]] = []

    def invalidated(self, what: Invalidation) -> None:
        self.commands.append(f"{what.cache} {what.granularity} {what.first:#x}..{what.last:#x}")

    def misread(self, domain: Domain, gpa: int, level: int, entry: int, why: str) -> None:
        self.misreads.append((gpa, why))


def watched(pages: int = 16, flags: int = LOG, **kind: bool | int) -> tuple[Room, IommufdDevice, Told]:
    """A room whose VM logs (pages of 4 KiB), a device attached to its table, and a witness."""
    room = Room()
    room.ram_slot(pages=pages, flags=flags)
    idev, _ = room.sharing(**kind)
    told = Told()
    room.iommu.monitors.append(told)
    return room, idev, told


def domain_of(room: Room) -> VtdKvm:
    (hwpt,) = (obj for obj in room.c.ictx.objects if isinstance(obj, HwptKvm))
    assert isinstance(hwpt.domain, VtdKvm)
    return hwpt.domain


def patch(room: Room, gpa: int, change: int) -> None:
    """Turn bits of the leaf entry of a guest page over, behind KVM's back, and drop what was kept."""
    at = room.vm.mmu.lookup(gpa >> 12)
    assert at is not None
    room.memory.store(at.address, at.entry ^ change)
    domain_of(room).cache_invalidate(0, 2**64 - 1)


def test_the_pasid_entry() -> None:
    """Second stage, KVM's root and levels, forced snooping, no A/D bits."""
    room, idev, _ = watched()
    entry = PasidEntry.unpack(room.iommu.table(endpoint(idev)).read(0))
    assert (entry.present, entry.pgtt, entry.aw, entry.ssptptr) == (True, 2, 3, room.vm.mmu.root)
    assert (entry.pgsnp, entry.pwsnp, entry.ssade) == (True, True, False)


@pytest.mark.parametrize("mode", ["greedy", "faithful", "off"])
@pytest.mark.parametrize("flags", [0, LOG])
def test_a_dma_reads_what_the_guest_has(mode: str, flags: int) -> None:
    room = Room(mode=mode)
    file = room.ram_slot(pages=1024, flags=flags)
    file.data[:] = bytes(range(256)) * (len(file.data) // 256)
    idev, _ = room.sharing()
    assert room.read(idev, 0x1F0, 0x5000) == file.data[0x1F0:0x51F0]
    before = len(list(room.vm.mmu.leaves()))
    assert before == (6 if flags else 1)
    room.write(idev, 0x200000 - 8, bytes(16))
    assert file.data[0x200000 - 8 : 0x200008] == bytes(16)
    room.sound()


def test_a_walk_is_shown_entry_by_entry() -> None:
    room, idev, _ = watched()
    room.read(idev, 0x3000)
    entry = room.iommu.walk_fresh(endpoint(idev), None, 0x3000, READ)
    assert [(step.stage, step.level) for step in entry.steps] == [(2, level) for level in (5, 4, 3, 2, 1)]
    assert entry.steps[0].address == room.vm.mmu.root
    at = room.vm.mmu.lookup(3)
    assert at is not None
    assert (entry.steps[-1].address, entry.steps[-1].entry) == (at.address, at.entry)
    with pytest.raises(TranslationFault) as caught:
        room.iommu.walk_fresh(endpoint(idev), None, 0x4000, READ)
    assert (caught.value.code, caught.value.level) == (0x79, 1)
    assert room.info().faults == 1, "a look asks nobody for a page"


def test_the_tables_that_are_kept_are_shown_until_a_zap() -> None:
    room, idev, _ = watched()
    room.read(idev, 0x3000)
    kept = ["table of level 4", "table of level 3", "table of level 2", "table of level 1"]

    def cached() -> list[tuple[str, str]]:
        rows = room.iommu.explain(endpoint(idev), None, 0x3000, READ).cached
        return [(row.what, row.differs) for row in rows if row.what.startswith("table")]

    assert cached() == [(what, "") for what in kept]
    at = room.vm.mmu.lookup(3)
    assert at is not None
    table = room.iommu.explain(endpoint(idev), None, 0x3000, READ).cached[kept.index("table of level 1") + 1]
    assert table.leads == f"table at {at.table:#x}"
    room.slot(0, 0)
    assert cached() == []


# ---- reasons that only a table of bytes has ----


def test_reserved_bits_of_a_leaf_and_of_a_table() -> None:
    """0x7A, which no page request can mend: address bits beyond the host's width; bit 11 of what leads to a table."""
    room = Room(haw=46)
    room.ram_slot(flags=LOG)
    idev, _ = room.sharing()
    room.read(idev, 0x3000)
    patch(room, 0x3000, 1 << 50)
    assert room.fault(idev, 0x3000) == 0x7A
    patch(room, 0x3000, 1 << 50)
    top = room.vm.mmu.root
    entry = room.memory.load(top)
    assert entry is not None
    room.memory.store(top, entry | ept.LOW_PRESENT)
    domain_of(room).cache_invalidate(0, 2**64 - 1)
    assert room.fault(idev, 0x3000) == 0x7A
    assert room.iommu.fault_count == {0x7A: 2}
    assert endpoint(idev).counters.page_requests == 1


def test_a_table_that_is_not_there() -> None:
    """0x78"""
    room, idev, _ = watched()
    room.read(idev, 0x3000)
    entry = room.memory.load(room.vm.mmu.root)
    assert entry is not None
    room.memory.store(room.vm.mmu.root, (entry & ~ept.ADDRESS) | 0x7000)
    domain_of(room).cache_invalidate(0, 2**64 - 1)
    assert room.fault(idev, 0x3000) == 0x78
    assert room.iommu.fault_count == {0x78: 1}


@pytest.mark.parametrize(("width", "levels"), [(48, 4), (52, 5)])
def test_beyond_the_tables_width(width: int, levels: int) -> None:
    """0x84: a page may be asked for, but KVM has none there; the driver passes on canonical addresses only."""
    room = Room()
    room.enable(kvm.KVM_CAP_TDP_MAXPHYADDR, width)
    idev, _ = room.sharing()
    for shift in (12 + 9 * levels, 63):
        dma = room.dma(idev, Op.READ, 1 << shift, 1)
        assert dma.run() is State.FAILED
        assert dma.fault is not None
        assert dma.fault.code == 0x84


def test_a_page_that_is_not_there_is_0x79() -> None:
    room, idev, _ = watched()
    with pytest.raises(TranslationFault) as caught:
        room.iommu.walk_fresh(endpoint(idev), None, 0x3000, WRITE)
    assert caught.value.code == 0x79


# ---- what is kept, and forgotten ----


def test_a_zap_reaches_iotlb_and_device_tlb_before_the_page_is_given_back() -> None:
    room, idev, told = watched()
    dev = endpoint(idev)
    for page in (1, 2, 3):
        room.read(idev, page * 4096)
    domain = domain_of(room)
    assert {cached.where.split(" of ")[0] for cached in domain.cached()} == {"the IOTLB", "the device TLB"}
    assert len(list(domain.cached())) == 6
    order: list[str] = []

    class Watcher:
        def table_free(self, hpa: int) -> None:
            order.append("table")

        def page_free(self, file: object, pos: int, size: int) -> None:
            assert [cached for cached in domain.cached() if cached.first == pos] == []
            order.append(f"page {pos:#x}")

    room.memory.watchers.append(Watcher())
    (slot,) = room.vm.slots[0]
    told.commands.clear()
    room.c.mm.unmap(slot.userspace_addr + 0x2000, slot.userspace_addr + 0x3000)
    assert told.commands == ["IOTLB page 0x2000..0x2fff", "device TLB page 0x2000..0x2fff"]
    assert order == ["page 0x2000"]
    assert sorted({cached.first for cached in domain.cached()}) == [0x1000, 0x3000]
    told.commands.clear()
    room.slot(0, 0)
    assert told.commands[0].startswith("IOTLB domain")
    assert told.commands[1].startswith("device TLB PASID")
    assert (list(domain.cached()), list(domain.cached_tables())) == ([], [])
    assert order[1:].count("table") == 4
    assert dev.counters.page_requests == 3
    room.sound()


def test_no_page_is_reached_that_a_slot_had() -> None:
    """The next DMA asks again, and finds what the new slot shows."""
    room = Room()
    old = room.ram_slot(pages=8)
    old.data[:3] = b"old"
    idev, _ = room.sharing()
    assert room.read(idev, 0, 3) == b"old"
    room.slot(0, 0)
    dma = room.dma(idev, Op.READ, 0, 3)
    assert dma.run() is State.FAILED
    new = room.ram_slot(pages=8)
    new.data[:3] = b"new"
    assert room.read(idev, 0, 3) == b"new"
    room.write(idev, 0, b"NEW")
    assert (bytes(old.data[:3]), bytes(new.data[:3])) == (b"old", b"NEW")
    assert endpoint(idev).counters.page_requests == 3
    room.sound()


def test_a_write_after_the_log_was_read_is_seen_again() -> None:
    """A right that a device TLB has kept would hide it."""
    room, idev, _ = watched()
    room.write(idev, 0x5000, b"one")
    assert room.dirty_log() == [5]
    room.write(idev, 0x5000, b"two")
    assert room.dirty_log() == [5]
    assert room.dirty_log() == []
    room.sound()


def test_a_page_whose_use_is_tracked_is_asked_for_again() -> None:
    room, idev, _ = watched()
    room.read(idev, 0x5000)
    (slot,) = room.vm.slots[0]
    assert room.vm.clear_flush_young(slot.userspace_addr, slot.userspace_addr + 0x10000)
    before = endpoint(idev).counters.page_requests
    room.read(idev, 0x5000)
    room.read(idev, 0x5000)
    assert endpoint(idev).counters.page_requests == before + 1
    room.sound()


def test_a_range_that_is_no_whole_pages_is_rounded_outward() -> None:
    """The RFC warns and drops it, and so leaves what should go."""
    room, idev, told = watched()
    for page in range(4):
        room.read(idev, page * 4096)
    told.commands.clear()
    domain_of(room).cache_invalidate(0x1800, 0x1000)
    assert told.commands == ["IOTLB page 0x1000..0x2fff", "device TLB page 0x1000..0x2fff"]
    assert sorted({cached.first for cached in domain_of(room).cached()}) == [0, 0x3000]


def test_every_unit_is_told_once_and_every_device() -> None:
    room, _, told = watched()
    (hwpt,) = (obj for obj in room.c.ictx.objects if isinstance(obj, HwptKvm))
    second = room.device(pri=True)
    room.attach(second, hwpt.id)
    first, room.iommu = room.iommu, Vtd(VtdIommu(name="dmar1", caches=Caches(mode="greedy"), page_selective=False))
    other = Told()
    room.iommu.monitors.append(other)
    third = room.device(pri=True)
    room.attach(third, hwpt.id)
    for idev in (second, third):
        room.read(idev, 0x1000)
    told.commands.clear()
    other.commands.clear()
    hwpt.invalidate(0x1000, 0x1000)
    assert told.commands == ["IOTLB page 0x1000..0x1fff", *["device TLB page 0x1000..0x1fff"] * 2]
    assert other.commands[0].startswith("IOTLB domain"), "it cannot do less"
    assert other.commands[1:] == ["device TLB page 0x1000..0x1fff"]
    assert list(hwpt.cached()) == []
    assert first is not room.iommu


# ---- what a CPU reads otherwise ----


def test_kvms_mark_of_mmio_is_a_page_to_vt_d() -> None:
    """The fault fails and leaves the mark; the next write finds a leaf, to host memory at the guest's own address."""
    room, idev, told = watched()
    dma = room.dma(idev, Op.WRITE, DOORBELL)
    assert dma.run() is State.FAILED
    assert told.misreads == [], "nothing is stored where nothing is"
    assert room.vm.mmu.lookup(DOORBELL >> 12) is None
    room.enable(kvm.KVM_CAP_TDP_MMIO_MARKS, 1)
    assert room.dma(idev, Op.WRITE, DOORBELL).run() is State.FAILED
    dma = room.dma(idev, Op.WRITE, DOORBELL)
    assert dma.run() is State.FAILED
    assert "is gone" in dma.error, "it was translated: there is only no memory at that address"
    assert [gpa for gpa, _ in told.misreads] == [DOORBELL]
    assert "MMIO" in told.misreads[0][1]
    assert domain_of(room).misread_count == 1
    assert room.dma(idev, Op.READ, DOORBELL).run() is State.FAILED
    room.ram_slot(3, DOORBELL, 1)
    room.write(idev, DOORBELL, b"memory")
    room.sound()


def test_bit_11_is_told() -> None:
    room, idev, told = watched()
    room.read(idev, 0x1000)
    patch(room, 0x1000, ept.LOW_PRESENT)
    assert room.read(idev, 0x1000) == bytes(8), "SNP, and snooping is forced anyway"
    assert [(gpa, "SNP" in why) for gpa, why in told.misreads] == [(0x1000, True)]


def test_the_marks_of_kvm_mean_nothing_to_vt_d() -> None:
    """Bits 2 to 6, 8 to 10, 52 to 61 and 63 of a leaf."""
    room, idev, told = watched()
    room.write(idev, 0x1000, b"same")
    for bit in (2, 3, 4, 5, 6, 8, 9, 10, *range(52, 62), 63):
        patch(room, 0x1000, 1 << bit)
        assert room.read(idev, 0x1000, 4) == b"same", bit
        patch(room, 0x1000, 1 << bit)
    assert told.misreads == []
