"""KVM_CREATE_TDP_FD and its descriptor: every refusal in its order (RFC p03, p35), and what the descriptor does."""

from __future__ import annotations

from errno import EEXIST, EFAULT, EINVAL, EMFILE, ENODEV, ENOMEM, EOPNOTSUPP
from typing import TYPE_CHECKING

import pytest

import iommufd_uapi.kvm as kvm
from iommufdd.errors import IommufdError
from iommufdd.iommu.walk import EXEC, PRIV, READ, WRITE
from iommufdd.kvm.tdp_fd import DEFAULT_POLLMASK
from iommufdd.kvm.vm import Features
from iommufdd.mm import Region
from iommufdd.user import Gate
from tests.core.harness import ARGUMENT, NOWHERE, Client
from tests.core.world import Memfd

from .room import Room
from .test_mmu import Importer

if TYPE_CHECKING:
    from collections.abc import Callable

BUILT = Features()


def spoiled(row: int) -> Room:
    """A room in which the rows from `row` on all fail, as far as they can at once, and those before do not."""
    features = Features(external_tdp=row > 2, metadata=row > 7, tdp_mmu=row > 9, hyperv=row <= 9)
    room = Room(features=features)
    room.vcpu()
    if row <= 4:
        room.vm.features = BUILT
        room.tdp_fd()
        room.vm.features = features
    room.vm.dying = row <= 6
    return room


@pytest.mark.parametrize(
    ("row", "fields", "errno"),
    [
        (2, {"as_id": 2, "pad": 1, "mode": 1}, EOPNOTSUPP),
        (3, {"as_id": 2}, EINVAL),
        (3, {"pad": 1}, EINVAL),
        (3, {"mode": 1}, EINVAL),
        (4, {}, EEXIST),
        (6, {}, ENODEV),
        (7, {}, EOPNOTSUPP),
        (9, {}, EINVAL),
        (9, {"as_id": 1}, EINVAL),
    ],
)
def test_the_order_of_refusals(row: int, fields: dict[str, int], errno: int) -> None:
    room = spoiled(row)
    files = dict(room.c.fds.files)
    room.tdp_fd(errno, **fields)
    assert room.c.fds.files == files


def test_row_1_and_11_memory() -> None:
    room = Room()
    room.vcpu()
    assert room.vm.ioctl(room.c.caller, kvm.KVM_CREATE_TDP_FD, NOWHERE) == -EFAULT
    file = Memfd(1)
    room.c.mm.map(Region(0x5000_0000, 0x5000_1000, file, 0, readable=True, writable=False))
    assert room.vm.ioctl(room.c.caller, kvm.KVM_CREATE_TDP_FD, 0x5000_0000) == -EFAULT
    assert (room.vm.exported, room.vm.refs) == ({}, 2)
    assert room.tdp_fd() == max(room.c.fds.files), "nothing is left of the calls that failed"


def test_rows_5_8_and_10_acquisitions() -> None:
    room = Room()
    room.vcpu()
    for nth, gate, errno in ((2, Gate.MEMORY, ENOMEM), (3, Gate.MEMORY, ENOMEM), (4, Gate.FD, EMFILE)):
        room.c.gate.arm(nth)
        room.tdp_fd(errno)
        assert room.c.gate.fired is gate
        assert (room.vm.exported, room.vm.refs) == ({}, 2)
    room.c.gate.arm(0)
    assert room.tdp_fd()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda room: setattr(room.vm, "features", BUILT._replace(tdp_mmu=False)),
        lambda room: setattr(room.vm, "features", BUILT._replace(hyperv=True)),
        lambda room: setattr(room.vm, "features", BUILT._replace(high_present_bit=False)),
        lambda room: room.vm.vcpus.clear(),
        lambda room: room.vm.vcpus.update({1: 31}),
        lambda room: room.vm.register_noncoherent_dma(),
    ],
    ids=["TDP MMU", "Hyper-V", "present bit", "vCPU", "maxphyaddr", "noncoherent DMA"],
)
def test_row_9_each(spoil: Callable[[Room], object]) -> None:
    room = Room()
    room.vcpu()
    spoil(room)
    room.tdp_fd(EINVAL)
    assert room.vm.mmu.root == 0


def test_the_descriptor() -> None:
    """Neither ioctl nor mmap, read nor write; poll as a file that has none; it keeps the VM."""
    room = Room()
    vcpu = room.vcpu()
    tdp = room.tdp(fd := room.tdp_fd())
    for call, errno in (
        (lambda: tdp.ioctl(room.c.caller, 0, 0), ENODEV),
        (lambda: tdp.mmap(room.c.caller, 0, 4096, 3, 1), ENODEV),
        (lambda: tdp.read(room.c.caller, ARGUMENT, 8), EINVAL),
        (lambda: tdp.write(room.c.caller, ARGUMENT, 8), EINVAL),
    ):
        room.c.fails(call, errno)
    assert tdp.poll() == DEFAULT_POLLMASK
    room.c.fails(room.vm.register_noncoherent_dma, EINVAL)
    room.c.fds.close(room.fd)
    room.c.fds.close(vcpu)
    assert not room.vm.dying
    room.c.fds.close(fd)
    assert room.vm.dying
    assert room.memory.in_use == (0, 0)


def test_a_table_that_vcpus_have_is_shared_unless_its_levels_differ() -> None:
    room = Room()
    room.vcpu()
    room.ram_slot()
    room.vm.vcpu_access(0, READ)
    root = room.vm.mmu.root
    fd = room.tdp_fd()
    assert room.tdp(fd).root_hpa == root
    assert room.vm.mmu.stats.present == 16 * 4096 // 16, "and what they had touched is there"
    room.c.fds.close(fd)
    assert (room.vm.mmu.root, room.vm.mmu.stats.present) == (0, 0)
    room.enable(kvm.KVM_CAP_TDP_MAXPHYADDR, 40)
    room.vm.vcpu_access(0, READ)
    room.vcpu(1)
    metadata = room.tdp(room.tdp_fd()).get_metadata()
    assert metadata is not None
    assert (metadata.level, room.vm.mmu.level) == (4, 4)


def test_metadata() -> None:
    """What the RFC's struct says, the same as in the dump; bit 11 is in all masks."""
    room = Room(features=Features(max_level=2))
    room.enable(kvm.KVM_CAP_TDP_MAXPHYADDR, 46)
    assert room.info().type == 0
    tdp = room.tdp(room.runnable())
    metadata, info = tdp.get_metadata(), room.info()
    assert metadata is not None
    assert tuple(metadata[:4]) == (1, 4, room.vm.mmu.root, 2)
    assert metadata[:4] == (info.type, info.level, info.root_hpa, info.max_huge_page_level)
    assert metadata.rsvd_bits_mask == info.rsvd_bits_mask
    assert all(mask & 1 << 11 and mask >> 46 & 0x3F == 0x3F and not mask & 7 for mask in info.rsvd_bits_mask)
    assert info.rsvd_bits_mask[0] == 0x000F_C000_0000_0800, "a page of 4 KiB: the address bits that no vCPU has"
    assert info.rsvd_bits_mask[5 + 1] & 0x1FF000 == 0x1FF000, "a page of 2 MiB is aligned"
    assert info.rsvd_bits_mask[5 + 2] & 0x80, "and there is none of 1 GiB"
    assert kvm.KvmTdpInfo.offsetof("faults") == 104, "the size of the RFC's struct"


# ---- what importers and devices ask ----


def refusal(call: Callable[[], object]) -> int:
    with pytest.raises(IommufdError) as caught:
        call()
    return caught.value.errno


def test_the_order_of_a_faults_refusals() -> None:
    room = Room()
    room.ram_slot(pages=2)
    tdp = room.tdp(room.runnable())
    mm, other = room.c.mm, Client(room.c.world.process()).mm
    room.vm.dying = True
    assert refusal(lambda: tdp.fault(other, 0, 0)) == EINVAL
    room.vm.dying = False
    assert refusal(lambda: tdp.fault(mm, 0, PRIV)) == EINVAL
    assert refusal(lambda: tdp.fault(other, 0, READ)) == EINVAL
    room.vm.write_track(1)
    assert refusal(lambda: tdp.fault(mm, 1, READ)) == EINVAL
    assert refusal(lambda: tdp.fault(mm, 2, READ)) == EFAULT
    for access in (READ, WRITE, EXEC):
        tdp.fault(mm, 0, access)
    mm.exit()
    assert refusal(lambda: tdp.fault(mm, 1, READ)) == 1, "EPERM: before what KVM thinks of the page"


def test_importers() -> None:
    room = Room()
    room.ram_slot()
    tdp = room.tdp(room.runnable())
    caller, first, second = room.c.caller, Importer(), Importer()
    assert refusal(lambda: tdp.register_importer(caller, None, first)) == EINVAL
    room.c.gate.arm(1)
    assert refusal(lambda: tdp.register_importer(caller, "a", first)) == ENOMEM
    tdp.register_importer(caller, "a", first)
    room.c.fails(lambda: tdp.register_importer(caller, "a", second), 16)
    tdp.register_importer(caller, "b", second)
    tdp.unregister_importer("a", second)
    tdp.unregister_importer("c", second)
    room.vm.vcpu_access(0, WRITE)
    room.slot(0, 0)
    assert first.told == second.told == [(0, 2**64 - 1)]
    tdp.unregister_importer("a", first)
    room.vm.mmu.flush(1, 2)
    assert (len(first.told), second.told[1:]) == (1, [(0x1000, 0x2000)])
    assert room.vm.mmu.stats.vcpu_requests == room.vm.mmu.stats.flushes
