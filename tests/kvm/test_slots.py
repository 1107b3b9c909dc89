"""KVM_SET_USER_MEMORY_REGION, KVM_GET_DIRTY_LOG, vCPUs and capabilities: errnos, in KVM's order."""

from __future__ import annotations

from errno import EEXIST, EFAULT, EINVAL, EIO, EMFILE, ENODEV, ENOENT, ENOTTY

import pytest

import iommufd_uapi.kvm as kvm
from iommufdd.iommu.walk import READ
from iommufdd.user import PAGE_SIZE
from tests.core.harness import NOWHERE, Client

from .room import LOG, READONLY, SMM, Room

ADDR = 0x2000_0000


@pytest.fixture
def room() -> Room:
    return Room()


@pytest.mark.parametrize(
    "fields",
    [
        {"flags": 4},
        {"size": 100},
        {"gpa": 100},
        {"addr": ADDR + 1},
        {"addr": 1 << 56},
        {"slot": 2 << 16},
        {"slot": kvm.KVM_USER_MEM_SLOTS},
        {"gpa": (1 << 64) - PAGE_SIZE, "size": 2 * PAGE_SIZE},
        {"size": kvm.KVM_MEM_MAX_NR_PAGES + 1 << 12},
        {"gpa": 1 << 52},
        {"size": 0},  # there is none to delete
    ],
    ids=str,
)  # fmt: skip
def test_refused(room: Room, fields: dict[str, int]) -> None:
    room.slot(**({"slot": 0, "gpa": 0, "addr": ADDR, "size": PAGE_SIZE} | fields), expect=EINVAL)
    assert not list(room.vm.slots[0])


def test_what_a_slot_may_become(room: Room) -> None:
    room.slot(0, 0, ADDR, 4 * PAGE_SIZE)
    room.slot(0, 0, ADDR, 4 * PAGE_SIZE)  # nothing changes
    room.slot(0, 0, ADDR, 8 * PAGE_SIZE, expect=EINVAL)
    room.slot(0, 0, ADDR + PAGE_SIZE, 4 * PAGE_SIZE, expect=EINVAL)
    room.slot(0, 0, ADDR, 4 * PAGE_SIZE, READONLY, expect=EINVAL)
    room.slot(1, 3 * PAGE_SIZE, ADDR, PAGE_SIZE, expect=EEXIST)
    room.slot(1 | SMM, 3 * PAGE_SIZE, ADDR, PAGE_SIZE)  # another address space
    room.slot(1, 4 * PAGE_SIZE, ADDR, PAGE_SIZE)
    room.slot(1, 3 * PAGE_SIZE, ADDR, PAGE_SIZE, expect=EEXIST)
    room.slot(0, 0, ADDR, 4 * PAGE_SIZE, LOG)
    room.slot(1, 8 * PAGE_SIZE, ADDR, PAGE_SIZE)
    room.slot(0, 4 * PAGE_SIZE, ADDR, 4 * PAGE_SIZE, LOG)
    assert sorted((slot.id, slot.base_gfn) for slot in room.vm.slots[0]) == [(0, 4), (1, 8)]
    room.slot(0, 0)
    room.slot(0, 0, expect=EINVAL)


def test_a_structure_that_cannot_be_read(room: Room) -> None:
    for layout in (kvm.KvmUserspaceMemoryRegion, kvm.KvmEnableCap, kvm.KvmCreateTdpFd, kvm.KvmDirtyLog, kvm.KvmTdpInfo):
        assert room.vm.ioctl(room.c.caller, layout.CMD, NOWHERE) == -EFAULT


def test_dirty_log(room: Room) -> None:
    room.dirty_log(5, expect=ENOENT)
    room.dirty_log(2 << 16, expect=EINVAL)
    room.dirty_log(kvm.KVM_USER_MEM_SLOTS, expect=EINVAL)
    room.ram_slot(0, 0, 70)
    room.dirty_log(0, expect=ENOENT)
    (slot,) = room.vm.slots[0]
    room.slot(0, 0, slot.userspace_addr, 70 * PAGE_SIZE, LOG)
    room.call(kvm.KvmDirtyLog(slot=0, dirty_bitmap=NOWHERE), EFAULT)
    room.vcpu()
    for page in (0, 7, 8, 63, 64, 69):
        room.vm.vcpu_access(page * PAGE_SIZE, 2)
    assert room.dirty_log() == [0, 7, 8, 63, 64, 69]


def test_a_bitmap_of_many_pages_comes_in_pieces(room: Room) -> None:
    room.slot(0, 0, ADDR, 1 << 33, LOG)
    (slot,) = room.vm.slots[0]
    pieces = list(slot.bitmap({0, (1 << 21) - 1}))
    assert [len(piece) for piece in pieces] == [1 << 16] * 4
    assert (pieces[0][0], pieces[-1][-1], sum(map(sum, pieces))) == (1, 0x80, 0x81)


def test_vcpus(room: Room) -> None:
    room.c.fails(lambda: room.vm.vcpu_access(0, READ), EINVAL)
    fd = room.vcpu(7)
    room.vcpu(7, expect=EEXIST)
    room.vcpu(kvm.KVM_MAX_VCPUS, expect=EINVAL)
    room.c.fds.room = len(room.c.fds.files)
    room.vcpu(8, expect=EMFILE)
    room.c.fds.close(room.fd)
    assert not room.vm.dying, "a vCPU keeps its VM"
    room.c.fds.close(fd)
    assert room.vm.dying


def test_capabilities(room: Room) -> None:
    assert room.number(kvm.KVM_CHECK_EXTENSION, kvm.KVM_CAP_TDP_FD) == 1
    assert room.number(kvm.KVM_CHECK_EXTENSION, kvm.KVM_CAP_NR_MEMSLOTS) == kvm.KVM_USER_MEM_SLOTS
    assert room.number(kvm.KVM_CHECK_EXTENSION, 9999) == 0
    for value in (0, 53):
        room.enable(kvm.KVM_CAP_TDP_MAXPHYADDR, value, EINVAL)
    room.enable(kvm.KVM_CAP_TDP_CHECK, 2, EINVAL)
    room.enable(kvm.KVM_CAP_USER_MEMORY, 1, EINVAL)
    room.call(kvm.KvmEnableCap(cap=kvm.KVM_CAP_TDP_CHECK, flags=1), EINVAL)
    room.call(kvm.KvmEnableCap(cap=kvm.KVM_CAP_TDP_CHECK, args=(1, 1, 0, 0)), EINVAL)
    room.enable(kvm.KVM_CAP_TDP_CHECK, 0)
    assert room.vm.mmu.checks is None
    assert room.memory.watchers == []


def test_calls_that_nobody_knows(room: Room) -> None:
    room.number(kvm.io(0x99), 0, ENOTTY)
    other = Client(room.c.world.process())
    assert room.vm.ioctl(other.caller, kvm.KVM_CHECK_EXTENSION, 0) == -EIO
    room.c.fails(lambda: room.vm.mmap(room.c.caller, 0, PAGE_SIZE, 3, 1), ENODEV)
