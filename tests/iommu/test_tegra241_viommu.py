"""VINTFs, LVCMDQs and SID slots: what is refused, in which order, and who holds whom (tegra241-cmdqv.c)."""

from __future__ import annotations

import errno
import itertools
from typing import Any

import pytest

import iommufd_uapi.iommufd as uapi
from iommufd_uapi.smmuv3 import Cmd, Ste
from iommufd_uapi.tegra241_cmdqv import VIRT_SID_MAX, Register
from iommufdd.user import ULONG_MAX
from tests.core.invariants import check

from .cmdqv_lab import ENTRY, QUEUES, CmdqvGuest, CmdqvLab
from .smmu_lab import SmmuLab

SMMUV3 = uapi.IOMMU_VIOMMU_TYPE_ARM_SMMUV3
NOWHERE = 0xDEAD_0000


# ---- GET_HW_INFO ----


def hw_info(lab: SmmuLab, dev: int, kind: int, expect: int = 0) -> bytes:
    at = lab.c.process.put(bytes(64))
    flags = uapi.IOMMU_HW_INFO_FLAG_INPUT_TYPE
    cmd = uapi.HwInfo(flags=flags, dev_id=dev, data_len=64, data_uptr=at, data_type=kind)
    lab.c.ioctl(cmd, expect)
    return lab.c.process.mm.read(at, cmd.data_len)


@pytest.mark.parametrize(("vintfs", "vcmdqs", "sids", "shown"), [(6, 7, 4, 1), (1, 7, 2, 6), (3, 3, 0, 0)])
def test_hw_info_is_of_one_vintf(vintfs: int, vcmdqs: int, sids: int, shown: int) -> None:
    lab = CmdqvLab(vintfs_log2=vintfs, vcmdqs_log2=vcmdqs, vintf_sids_log2=sids)
    idev = lab.device()
    data = hw_info(lab, idev.id, uapi.IOMMU_HW_INFO_TYPE_TEGRA241_CMDQV)
    assert data == bytes([0, 0, 0, 0, 1, shown, sids, 0])
    assert len(hw_info(lab, idev.id, uapi.IOMMU_HW_INFO_TYPE_DEFAULT)) == uapi.HwInfoArmSmmuv3.SIZEOF
    hw_info(lab, idev.id, uapi.IOMMU_HW_INFO_TYPE_INTEL_VTD, errno.EOPNOTSUPP)


def test_an_smmu_without_it() -> None:
    lab = SmmuLab()
    hw_info(lab, lab.device().id, uapi.IOMMU_HW_INFO_TYPE_TEGRA241_CMDQV, errno.EOPNOTSUPP)


# ---- VIOMMU_ALLOC ----


def test_viommu_alloc_in_the_drivers_order() -> None:
    lab = CmdqvLab(vintfs_log2=1)
    idev = lab.device()
    ioas, _ = lab.ram()
    parent = lab.parent(idev, ioas)
    stranger = CmdqvLab()
    stranger.c, stranger.driver = lab.c, lab.driver
    foreign = lab.parent(stranger.device(), ioas)
    taken, _ = lab.vintf(idev, parent)
    lab.vintf(idev, parent, kind=3, expect=errno.EOPNOTSUPP)
    lab.vintf(idev, foreign, length=0, expect=errno.EINVAL)  # made for another SMMU
    for length in (0, 8, 15, 17):
        lab.vintf(idev, parent, length=length, at=NOWHERE, expect=errno.EINVAL)
    lab.vintf(idev, parent, at=NOWHERE, expect=errno.EFAULT)
    lab.vintf(idev, parent, expect=errno.ENOSPC)
    lab.c.destroy(taken)
    lab.vintf(idev, parent)
    check(lab.c.world)


@pytest.mark.parametrize("capabilities", [{"stage1": False}, {"s2fwb": False}])
def test_what_makes_no_vsmmu_makes_no_vintf(capabilities: dict[str, Any]) -> None:
    lab = CmdqvLab(**capabilities)
    idev = lab.device()
    ioas, _ = lab.ram()
    parent = lab.c.hwpt(idev.id, ioas) if "stage1" in capabilities else lab.parent(idev, ioas)
    lab.vintf(idev, parent, expect=errno.EOPNOTSUPP)


def test_the_data_says_where_page_0_is() -> None:
    lab = CmdqvLab()
    idev = lab.device()
    parent = lab.parent(idev, lab.ram()[0])
    places = [lab.vintf(idev, parent)[1] for _ in range(3)]
    assert [(data.out_vintf_mmap_offset, data.out_vintf_mmap_length) for data in places] == [
        (0x1000, 0x10000), (0x11000, 0x10000), (0x21000, 0x10000)
    ]  # fmt: skip


def test_data_that_cannot_be_written_back_leaves_nothing_behind() -> None:
    lab = CmdqvLab(vintfs_log2=1)
    idev = lab.device()
    parent = lab.parent(idev, lab.ram()[0])
    read_only = lab.c.process.map(lab.c.world.memfd(1), writable=False)
    lab.vintf(idev, parent, at=read_only, expect=errno.EFAULT)
    assert not list(lab.c.ictx.mmaps)
    lab.vintf(idev, parent)  # the only VINTF is free again


def test_there_are_as_many_vintfs_as_the_machine_has_but_one() -> None:
    lab = CmdqvLab(vintfs_log2=2)
    idev = lab.device()
    parent = lab.parent(idev, lab.ram()[0])
    viommus = [lab.vintf(idev, parent)[0] for _ in range(3)]
    lab.vintf(idev, parent, expect=errno.ENOSPC)
    lab.viommu(idev, parent, SMMUV3)  # which takes none
    lab.c.destroy(viommus[1])
    again, _ = lab.vintf(idev, parent)
    assert lab.driver_half(again).idx == 2
    lab.vintf(idev, parent, expect=errno.ENOSPC)


def test_a_vsmmu_beside_it_has_neither_registers_nor_queues() -> None:
    lab = CmdqvLab()
    idev = lab.device()
    ioas, _ = lab.ram()
    viommu = lab.viommu(idev, lab.parent(idev, ioas), SMMUV3)
    lab.hw_queue(viommu, 0, QUEUES, 0x1000, expect=errno.EOPNOTSUPP)
    assert not list(lab.c.ictx.mmaps)


# ---- VDEVICE_ALLOC ----


def test_vdevice_alloc_in_the_drivers_order() -> None:
    lab = CmdqvLab(vintf_sids_log2=1)
    one, two, three, many = lab.device(), lab.device(), lab.device(), lab.device(streams=2)
    viommu = lab.viommu(one, lab.parent(one, lab.ram()[0]))
    first = lab.c.vdevice(viommu, one.id, VIRT_SID_MAX)
    lab.c.vdevice(viommu, two.id, 1)
    for idev in (three, many):
        lab.c.vdevice(viommu, idev.id, VIRT_SID_MAX + 1, errno.EINVAL)
        lab.c.vdevice(viommu, idev.id, 1 << 40, errno.EINVAL)
        lab.c.vdevice(viommu, idev.id, VIRT_SID_MAX, errno.EEXIST)
    lab.c.vdevice(viommu, many.id, 2, errno.EOPNOTSUPP)
    lab.c.vdevice(viommu, three.id, 2, errno.ENOSPC)
    lab.c.destroy(first)
    lab.c.vdevice(viommu, three.id, 2)
    lab.c.vdevice(viommu, one.id, 3, errno.ENOSPC)
    check(lab.c.world)


def test_a_device_that_leaves_gives_its_slot_back() -> None:
    lab = CmdqvLab(vintf_sids_log2=0)
    one, two = lab.device(), lab.device()
    viommu = lab.viommu(one, lab.parent(one, lab.ram()[0]))
    tombstone = lab.c.vdevice(viommu, two.id, 5)
    lab.c.vdevice(viommu, one.id, 6, errno.ENOSPC)
    lab.unbind(two)
    assert lab.driver_half(viommu).sids == [None]
    lab.c.destroy(tombstone, errno.ENOENT)
    lab.c.vdevice(viommu, one.id, 6)
    check(lab.c.world)


# ---- HW_QUEUE_ALLOC ----


def test_hw_queue_alloc_in_the_drivers_order() -> None:
    lab = CmdqvLab()  # two LVCMDQs
    idev = lab.device()
    guest = CmdqvGuest(lab, idev)
    viommu, at = guest.viommu, QUEUES
    bad = 0x18  # neither a length nor an alignment
    lab.hw_queue(viommu, 0, at, 0x1000, kind=2, expect=errno.EOPNOTSUPP)
    lab.hw_queue(viommu, 2, at + bad, bad, expect=errno.EINVAL)
    lab.hw_queue(viommu, 1, at + bad, bad, expect=errno.EIO)  # the one before it is missing
    for length in (1, 16, 31, 0x18, 0x1800):
        lab.hw_queue(viommu, 0, at, length, expect=errno.EINVAL)
    for iova in (at + 8, at + 0x1000 - 0x20, at + 0x1000):
        lab.hw_queue(viommu, 0, iova, 0x2000, expect=errno.EINVAL)
    first = lab.hw_queue(viommu, 0, at + 0x20, 0x20)
    lab.hw_queue(viommu, 0, at + bad, bad, expect=errno.EEXIST)
    lab.hw_queue(viommu, 1, at + 0x30, 0x20, expect=errno.EINVAL)
    second = lab.hw_queue(viommu, 1, at, 0x2000)
    lab.c.destroy(first, errno.EBUSY)
    lab.c.destroy(second)
    lab.c.destroy(first)
    check(lab.c.world)


def test_pinning_comes_before_the_driver() -> None:
    lab = CmdqvLab()
    guest = CmdqvGuest(lab, lab.device())
    beyond = guest.ram.file.size()
    lab.hw_queue(guest.viommu, 9, beyond, 7, expect=errno.ENOENT)
    lab.hw_queue(guest.viommu, 9, beyond - 0x1000, 0x2000, expect=errno.ENOENT)
    c = lab.c
    scattered = c.process.map(guest.ram.file, 1, page=9)
    c.map(guest.ioas, scattered, 0x1000, beyond)
    c.map(guest.ioas, c.process.map(guest.ram.file, 1, page=7), 0x1000, beyond + 0x1000)
    lab.hw_queue(guest.viommu, 9, beyond, 0x2000, expect=errno.EFAULT)  # not consecutive
    lab.hw_queue(guest.viommu, 0, beyond, 0x1000)
    check(c.world)


def test_alignment_is_that_of_the_memory_not_of_the_iova() -> None:
    lab = CmdqvLab()
    guest = CmdqvGuest(lab, lab.device())
    c, iova = lab.c, 0x4000_0000
    c.map(guest.ioas, c.process.map(guest.ram.file, 8, page=1), 0x8000, iova)
    lab.hw_queue(guest.viommu, 0, iova, 0x2000, expect=errno.EINVAL)
    lab.hw_queue(guest.viommu, 0, iova + 0x1000, 0x2000)


def test_the_longest_queue_is_that_of_idr1() -> None:
    lab = CmdqvLab()
    idev = lab.device()
    ioas, _ = lab.ram(4 << 20 >> 12)
    viommu = lab.viommu(idev, lab.parent(idev, ioas))
    c = lab.c
    big = c.process.map(c.world.memfd(32 << 20 >> 12))
    c.map(ioas, big, 32 << 20, 0x1_0000_0000)
    lab.hw_queue(viommu, 0, 0x1_0000_0000, 16 << 20, expect=errno.EINVAL)
    lab.hw_queue(viommu, 0, 0x1_0000_0000, ENTRY << 19)


def test_the_memory_of_a_queue_is_locked() -> None:
    lab = CmdqvLab()
    guest = CmdqvGuest(lab, lab.device())
    queue = guest.queue()
    lab.c.unmap(guest.ioas, 0, guest.ram.file.size(), errno.EBUSY)
    lab.c.unmap(guest.ioas, 0, ULONG_MAX, errno.EBUSY)
    lab.c.destroy(guest.ioas, errno.EBUSY)
    assert queue.issue(Cmd.sync()) == 1  # in spite of the tries
    lab.c.destroy(queue.id)
    lab.c.unmap(guest.ioas, 0, guest.ram.file.size())
    check(lab.c.world)


# ---- who holds whom ----

NEEDS = {
    "parent": {"viommu"},
    "viommu": {"first", "second", "vdevice", "nested", "errors", "map"},
    "first": {"second"},
}
NAMES = ("parent", "viommu", "vdevice", "nested", "errors", "map", "first", "second")


@pytest.mark.parametrize("first", NAMES)
@pytest.mark.parametrize("second", NAMES)
def test_destroy_orders(first: str, second: str) -> None:
    """What something alive holds is EBUSY; leaves can go in any order. Tried first, then the others."""
    lab = CmdqvLab()
    c = lab.c
    guest = CmdqvGuest(lab, lab.device())
    c.fds.close(guest.fd)
    c.fds.close(guest.errors)
    ids = {"parent": guest.parent, "viommu": guest.viommu, "vdevice": guest.vdevice, "nested": guest.hwpt(Ste.bypass())}
    ids |= {name: guest.queue(index).id for index, name in enumerate(("first", "second"))}
    objects = [obj.id for obj in c.ictx.objects if type(obj).__name__ == "Veventq"]
    c.destroy(objects[0])
    ids["errors"] = objects[1]
    order = list(dict.fromkeys((first, second, *NAMES)))
    while ids or guest.vma is not None:
        for name in order:
            held = NEEDS.get(name, set()) & (set(ids) | ({"map"} if guest.vma is not None else set()))
            if name == "map":
                if guest.vma is not None:
                    c.munmap(guest.vma)
                    guest.vma = None  # type: ignore[assignment]
            elif name in ids:
                c.destroy(ids[name], errno.EBUSY if held else 0)
                if not held:
                    del ids[name]
    assert not c.ictx.doorbells.watched
    assert lab.iommu.cmdqv is not None
    assert lab.iommu.cmdqv.vintfs == [None] * 64
    check(c.world)


def test_close_with_everything_alive() -> None:
    lab = CmdqvLab()
    idev = lab.device()
    guest = CmdqvGuest(lab, idev)
    for index in range(2):
        guest.queue(index)
    c, driver = lab.c, lab.driver_half(guest.viommu)
    c.close()
    assert len(c.ictx.objects)  # the mapping and the event queues keep the context
    for fd in (guest.fd, guest.errors):
        c.fds.close(fd)
    assert driver.lvcmdqs[1] is not None
    assert len(c.ictx.doorbells.watched) == 2
    lab.unbind(idev)
    c.munmap(guest.vma)
    assert not len(c.ictx.objects)
    assert not c.ictx.doorbells.watched
    assert driver.lvcmdqs == [None, None]
    assert not guest.ram.file.pins


# ---- when doorbells are looked at ----


class Clock:
    """Who would look from time to time."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def watch(self, doorbells: object) -> None:
        self.told.append("watch")

    def forget(self, doorbells: object) -> None:
        self.told.append("forget")


def test_nobody_looks_unless_there_is_a_queue() -> None:
    lab = CmdqvLab()
    clock = lab.c.world.machine.polling = Clock()
    guest = CmdqvGuest(lab, lab.device())
    assert clock.told == []
    queues = [guest.queue(index).id for index in range(2)]
    assert clock.told == ["watch"]
    lab.c.destroy(queues[1])
    assert clock.told == ["watch"]
    lab.c.destroy(queues[0])
    assert clock.told == ["watch", "forget"]
    guest.queue(0)
    assert clock.told == ["watch", "forget", "watch"]


def test_contexts_look_at_their_own() -> None:
    lab = CmdqvLab()
    guest = CmdqvGuest(lab, lab.device())
    queue = guest.queue()
    other = type(lab.c)(lab.c.process)
    queue.put(Cmd.sync())
    other.ioas_alloc()
    assert queue.cons == 0
    lab.c.ioctl(uapi.Destroy(id=12345), errno.ENOENT)
    assert queue.cons == 1


def test_registers_of_two_vintfs_are_apart() -> None:
    lab = CmdqvLab()
    one, two = lab.device(), lab.device()
    guests = [CmdqvGuest(lab, idev, vsid=5) for idev in (one, two)]
    queues = [guest.queue(index) for guest, index in itertools.product(guests, range(2))]
    for number, queue in enumerate(queues):
        queue.issue(*[Cmd.atc_inv(5)] * (number + 1))
    assert [queue.registers.read(Register.CONS) for queue in queues] == [1, 2, 3, 4]
    halves = [lab.driver_half(guest.viommu) for guest in guests]
    assert len({half.vmid for half in halves}) == 2
    assert halves[0].replace_sid(5) != halves[1].replace_sid(5)
