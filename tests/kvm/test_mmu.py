"""The table: which entries there are after faults, zaps, logging and aging, read from its bytes."""

from __future__ import annotations

import struct

import pytest

from iommufdd.errors import EFAULT
from iommufdd.iommu.walk import EXEC, READ, WRITE
from iommufdd.kvm.vm import Features
from iommufdd.user import PAGE_SIZE

from .decode import Mapping, decode
from .room import LOG, READONLY, Room

MIB, GIB = 1 << 20, 1 << 30
WRITABLE = frozenset({53, 55, 59, 60})  # host-writable, MMU-writable, present, no A/D bits
READABLE = frozenset({59, 60})


class Importer:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[int, int]] = []

    def invalidate(self, start: int, size: int) -> None:
        self.told.append((start, size))

    def cached(self) -> tuple[()]:
        return ()

    def cached_tables(self) -> tuple[()]:
        return ()


def table(room: Room) -> dict[int, Mapping]:
    """The mappings that the bytes of the table show."""
    mmu = room.vm.mmu
    found = decode(lambda hpa: struct.pack("<512Q", *room.memory.entries(hpa)), mmu.root, mmu.level)
    assert sum(each.size for each in found.values() if not each.misconfigured) == mmu.stats.present
    return found


def bytes_at(room: Room, hpa: int, length: int = 4) -> bytes:
    run = room.memory.run(hpa)
    assert run is not None
    return run.file.pread(run.pos + hpa - run.first, length)


def listening(**features: bool | int) -> tuple[Room, Importer]:
    """A room whose table somebody imports."""
    room = Room(features=Features(**features))  # type: ignore[arg-type]
    importer = Importer()
    room.tdp(room.runnable()).register_importer(room.c.caller, "test", importer)
    return room, importer


def test_a_fault_makes_one_entry_that_leads_to_the_page() -> None:
    room, importer = listening()
    file = room.ram_slot(gpa=0x5000, pages=4)
    file.data[0x2000:0x2004] = b"page"
    room.vm.vcpu_access(0x7123, WRITE)
    (found,) = table(room).values()
    assert (found.gpa, found.size, found.rights, found.memory_type, found.ignore_pat) == (0x7000, 4096, "rwx", 6, True)
    assert found.software == WRITABLE
    assert bytes_at(room, found.hpa) == b"page"
    assert importer.told == [], "nobody can have kept what was not there"
    assert (room.info().faults, room.info().mapped, room.info().tables) == (1, 1, 5)


@pytest.mark.parametrize(("width", "levels"), [(48, 4), (49, 5), (52, 5), (36, 4)])
def test_the_narrowest_vcpu_decides_the_levels(width: int, levels: int) -> None:
    room = Room()
    room.vcpu(0)
    room.enable(0x4B564D01, width)
    room.vcpu(1)
    room.ram_slot()
    room.vm.vcpu_access(0, READ)
    assert room.vm.mmu.level == levels
    assert len(table(room)) == 1
    assert room.info().tables == levels


@pytest.mark.parametrize(
    ("size", "gpa", "page", "limit", "want"),
    [
        (4 * MIB, 2 * MIB, 0, 3, 2 * MIB),
        (4 * MIB, 2 * MIB, 1, 3, 4096),  # the file's place is not aligned as the guest's
        (4 * MIB, 2 * MIB, 0, 1, 4096),  # EPT without large pages
        (2 * MIB, MIB, 256, 3, 4096),  # aligned, but the slot cuts it
        (GIB, 4 * GIB, 0, 3, GIB),
        (GIB, 4 * GIB, 0, 2, 2 * MIB),
    ],
)
def test_large_pages(size: int, gpa: int, page: int, limit: int, want: int) -> None:
    room = Room(features=Features(max_level=limit))
    file = room.c.world.memfd(0)
    file.data = Sparse(size + page * PAGE_SIZE)
    room.slot(0, gpa, room.c.process.map(file, size // PAGE_SIZE, page=page), size)
    room.vcpu()
    room.vm.vcpu_access(gpa + size - 1, READ)
    (found,) = table(room).values()
    assert found.size == want
    assert found.gpa <= gpa + size - 1 < found.gpa + found.size


class Sparse(bytearray):
    """As long as it says, without the bytes."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length

    def __len__(self) -> int:
        return self.length


def test_rights_are_those_of_the_slot_and_of_the_memory_behind_it() -> None:
    room = Room()
    room.vcpu()
    room.ram_slot(0, 0, 2, READONLY)
    file = room.c.world.memfd(2)
    room.slot(1, 0x10000, room.c.process.map(file, writable=False), 2 * PAGE_SIZE)
    for gpa in (0, 0x10000):
        room.vm.vcpu_access(gpa, READ | EXEC)
        with pytest.raises(EFAULT):
            room.vm.vcpu_access(gpa, WRITE)
    assert {each.rights for each in table(room).values()} == {"r-x"}
    assert {each.software for each in table(room).values()} == {READABLE}


def test_nothing_where_there_is_no_slot_or_no_memory_behind_it() -> None:
    room = Room()
    room.vcpu()
    room.slot(0, 0, 0x7000_0000_0000, 0x2000)
    for gpa in (0, 0x8000, 1 << 51, 1 << 60):
        with pytest.raises(EFAULT):
            room.vm.vcpu_access(gpa, READ)
    assert table(room) == {}
    assert (room.info().faults, room.info().failed) == (4, 4)


# ---- memory slots ----


def test_a_slot_that_goes_takes_everything_along_and_the_top_table_stays() -> None:
    room, importer = listening()
    room.ram_slot(0, 0, 4)
    room.ram_slot(1, GIB, 4)
    for gpa in (0, GIB):
        room.vm.vcpu_access(gpa, WRITE)
    root, tables = room.vm.mmu.root, room.info().tables
    assert tables > 1
    room.slot(0, 0)
    assert table(room) == {}
    assert room.vm.mmu.root == root
    assert importer.told == [(0, 2**64 - 1)]
    assert (room.info().tables, room.info().zapped, room.memory.in_use) == (1, 2, (1, 0))
    room.vm.vcpu_access(GIB, WRITE)  # the other slot comes back by itself
    assert list(table(room)) == [GIB]
    room.sound()


def test_a_slot_that_moves() -> None:
    room, importer = listening()
    file = room.ram_slot(0, 0, 4)
    room.vm.vcpu_access(0, WRITE)
    (addr,) = (slot.userspace_addr for slot in room.vm.slots[0])
    room.slot(0, 0x8000, addr, 4 * PAGE_SIZE)
    assert importer.told == [(0, 2**64 - 1)]
    file.data[:4] = b"here"
    room.vm.vcpu_access(0x8000, READ)
    (found,) = table(room).values()
    assert (found.gpa, bytes_at(room, found.hpa)) == (0x8000, b"here")


# ---- the VMM's own memory ----


def test_what_the_vmm_unmaps_or_protects_goes_before_it_goes() -> None:
    room, importer = listening()
    file = room.ram_slot(0, 0x10000, 8)
    (addr,) = (slot.userspace_addr for slot in room.vm.slots[0])
    for gpa in (0x10000, 0x12000, 0x14000):
        room.vm.vcpu_access(gpa, WRITE)
    refs = file.refs
    room.c.mm.unmap(addr + 0x2000, addr + 0x4000)
    assert importer.told == [(0x12000, 0x1000)]
    assert sorted(table(room)) == [0x10000, 0x14000]
    with pytest.raises(EFAULT):
        room.vm.vcpu_access(0x12000, READ)
    room.c.mm.protect(addr + 0x4000, addr + 0x5000, readable=True, writable=False)
    assert importer.told[-1] == (0x14000, 0x1000)
    room.vm.vcpu_access(0x14000, READ)
    assert table(room)[0x14000].rights == "r-x"
    assert file.refs >= refs, "the table holds the file, however often"
    room.c.process.exit()
    assert importer.told[-1] == (0, 2**64 - 1)
    assert room.vm.mmu.stats.present == 0


def test_a_table_keeps_the_file_that_it_shows_and_no_longer() -> None:
    room = Room()
    room.vcpu()
    file = room.ram_slot(0, 0, 4)
    before = file.refs
    room.vm.vcpu_access(0, READ)
    room.vm.vcpu_access(0x1000, READ)
    assert file.refs == before + 1
    room.slot(0, 0)
    assert file.refs == before
    assert not file.pinners, "and it never pins"


# ---- dirty logging, access tracking, write tracking ----


def test_dirty_logging_splits_large_pages_and_sees_every_write_once() -> None:
    room, importer = listening()
    room.ram_slot(0, 0, 1024)
    room.vm.vcpu_access(0x1000, WRITE)
    assert [each.size for each in table(room).values()] == [2 * MIB]
    (slot,) = room.vm.slots[0]
    room.slot(0, 0, slot.userspace_addr, 1024 * PAGE_SIZE, LOG)
    assert importer.told == [(0, 2 * MIB)]
    assert {each.rights for each in table(room).values()} == {"r-x"}
    assert room.dirty_log() == []
    room.vm.vcpu_access(0x5000, WRITE)
    assert importer.told[1:] == [(0, 2 * MIB)], "the large page goes before a small one comes"
    assert [(each.gpa, each.size, each.rights) for each in table(room).values()] == [(0x5000, 4096, "rwx")]
    assert room.dirty_log() == [5]
    assert importer.told[2:] == [(0x5000, 0x1000)]
    assert table(room)[0x5000].rights == "r-x"
    assert room.dirty_log() == []
    assert importer.told[3:] == [], "nothing was dirty"
    room.vm.vcpu_access(0x5000, WRITE)
    room.vm.vcpu_access(0x9000, READ)
    assert room.dirty_log() == [5, 9], "a page that may be written counts as written, as in KVM"
    room.slot(0, 0, slot.userspace_addr, 1024 * PAGE_SIZE)
    room.dirty_log(expect=2)
    room.sound()


def test_a_page_whose_use_is_tracked_has_no_rights_until_it_is_used() -> None:
    room, importer = listening()
    room.ram_slot(0, 0, 4)
    (slot,) = room.vm.slots[0]
    span = slot.userspace_addr, slot.userspace_addr + 4 * PAGE_SIZE
    assert not room.vm.clear_flush_young(*span)
    room.vm.vcpu_access(0x1000, WRITE)
    assert room.vm.clear_flush_young(*span)
    assert importer.told == [(0x1000, 0x1000)]
    found = table(room)[0x1000]
    assert (found.rights, found.software) == ("---", WRITABLE | {52, 54})
    assert not room.vm.clear_flush_young(*span), "not used since"
    assert len(importer.told) == 1
    room.vm.vcpu_access(0x1000, READ)
    found = table(room)[0x1000]
    assert (found.rights, found.software) == ("rwx", WRITABLE)
    assert room.info().mapped == 1, "it is the same page"


def test_writes_that_somebody_else_must_see() -> None:
    room, importer = listening()
    room.ram_slot(0, 0, 4)
    room.vm.vcpu_access(0x1000, WRITE)
    room.vm.write_track(1)
    assert importer.told == [(0x1000, 0x1000)]
    assert table(room)[0x1000].rights == "r-x"
    room.vm.write_track(1, tracked=False)
    room.vm.vcpu_access(0x1000, WRITE)
    assert table(room)[0x1000].rights == "rwx"


# ---- marks of MMIO ----


def test_an_mmio_mark_is_no_page_to_a_cpu_and_goes_when_memory_comes() -> None:
    room, importer = listening()
    room.enable(0x4B564D03, 1)
    with pytest.raises(EFAULT):
        room.vm.vcpu_access(0xFEB0_0000, READ)
    found = table(room)[0xFEB0_0000]
    assert found.misconfigured
    assert found.hpa == 0xFEB0_0000
    room.ram_slot(0, 0xFEB0_0000, 1)
    assert table(room) == {}
    assert importer.told == [(0xFEB0_0000, 0x1000)]
    for _ in range(150):
        room.ram_slot(1, 0, 1)
        room.slot(1, 0)
    with pytest.raises(EFAULT):
        room.vm.vcpu_access(0x4000_0000, READ)
    assert 11 in table(room)[0x4000_0000].software, "its generation reaches bit 11"


def test_the_memory_of_one_room() -> None:
    """Tables are given back, lowest first, and a machine has one memory for all its VMs."""
    room = Room()
    other = room.new_vm(room.c)
    room.vcpu()
    room.ram_slot()
    room.vm.vcpu_access(0, READ)
    used = room.memory.in_use
    other.slots = room.vm.slots
    other.mmu.slots = room.vm.slots[0]
    other.vcpus[0] = 48
    other.vcpu_access(0, READ)
    assert room.memory.in_use == (used[0] + 4, used[1])
    assert other.mmu.root > room.vm.mmu.root
    first = room.vm.mmu.root
    room.c.fds.close(room.fd)
    for fd in list(room.c.fds.files):
        if fd != room.c.fd:
            room.c.fds.close(fd)
    assert room.memory.in_use == (4, 1)
    fresh = room.new_vm(room.c)
    assert fresh.mmu.load_root(4) == first
    other.put()
    fresh.put()
    assert room.memory.in_use == (0, 0)
