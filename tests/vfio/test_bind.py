"""VFIO_DEVICE_BIND_IOMMUFD: the order of its checks, who may bind, and what closing undoes."""

import errno

import pytest

from iommufd_uapi import iommufd as uapi
from iommufd_uapi import vfio
from iommufdd.context import Context
from iommufdd.iommu.ops import Cap
from iommufdd.user import PAGE_SIZE
from iommufdd.wiring import new_machine
from tests.core.harness import DATA, NOWHERE, Client
from tests.core.invariants import check, check_empty
from tests.core.snapshot import difference, state
from tests.vfio.cdev import Cdev, Lab

BIND, TOKEN = vfio.VFIO_DEVICE_BIND_IOMMUFD, vfio.VFIO_DEVICE_BIND_FLAG_TOKEN
Bind = vfio.VfioDeviceBindIommufd
NOT_OPEN = 900


def test_nothing_but_bind_before_bind() -> None:
    lab = Lab()
    cdev = lab.open()
    commands = [vfio.VFIO_DEVICE_ATTACH_IOMMUFD_PT, vfio.VFIO_DEVICE_GET_INFO, vfio.VFIO_DEVICE_RESET, 0x1234, BIND + 9]
    for cmd in commands:
        cdev.raw(cmd, None, errno.EINVAL, at=NOWHERE)  # before any memory is read
    with pytest.raises(Exception, match="cannot be read"):
        cdev.file.read(lab.c.caller, DATA, 4)


def test_bind() -> None:
    lab = Lab()
    cdev = lab.open()
    ioas = lab.c.ioas_alloc()
    assert cdev.bind() == ioas + 1
    assert lab.vfio0.group.owner is lab.c.ictx
    assert lab.vfio0.resets == 1
    assert lab.c.ioctl(uapi.HwInfo(dev_id=ioas + 1)).out_max_pasid_log2 == 10
    lab.c.destroy(ioas + 1, errno.EBUSY)
    check(lab.world)


def test_both_sizes_of_the_struct() -> None:
    for argsz in (16, 20, 24):
        lab = Lab()
        cmd = lab.open().ioctl(Bind(argsz=argsz, iommufd=lab.c.fd))
        assert (cmd.argsz, cmd.out_devid) == (argsz, 1)
    lab = Lab()
    lab.open().raw(BIND, Bind(argsz=40, iommufd=lab.c.fd).pack() + bytes(16))


def test_the_order_of_the_checks() -> None:
    """Each call is wrong in one respect more than the one below it, and the first one is told."""
    lab = Lab()
    cdev = lab.open()
    wrong = Bind(argsz=15, flags=~TOKEN & 0xFFFFFFFF, iommufd=-1)
    cdev.raw(BIND, None, errno.EFAULT, at=NOWHERE)
    cdev.ioctl(wrong, errno.EINVAL)
    cdev.raw(BIND, Bind(argsz=25, flags=~TOKEN & 0xFFFFFFFF, iommufd=-1).pack() + b"\1", errno.E2BIG)
    end = DATA + 15 * PAGE_SIZE - 16  # of the memory there
    cdev.raw(BIND, wrong.pack()[:16], errno.EINVAL, at=end)
    cdev.raw(BIND, Bind(argsz=24, flags=2).pack()[:16], errno.EFAULT, at=end)
    for flags, fd in ((0, -1), (0, -2), (2, lab.c.fd), (TOKEN | 2, NOT_OPEN)):
        cdev.ioctl(Bind(flags=flags, iommufd=fd, token_uuid_ptr=NOWHERE), errno.EINVAL)
    cdev.ioctl(Bind(flags=TOKEN, iommufd=NOT_OPEN, token_uuid_ptr=NOWHERE), errno.EFAULT)
    cdev.ioctl(Bind(flags=TOKEN, iommufd=NOT_OPEN, token_uuid_ptr=DATA), errno.EINVAL)  # no PF, no VF: no token
    cdev.bind(NOT_OPEN, errno.EBADF)
    cdev.bind(cdev.fd, errno.EBADFD)
    cdev.bind(lab.c.process.install(lab.world.memfd()), errno.EBADFD)
    bound = lab.bound()
    cdev.bind(NOT_OPEN, errno.EBADF)
    cdev.bind(expect=errno.EINVAL)
    bound.ioctl(Bind(flags=TOKEN, iommufd=NOT_OPEN, token_uuid_ptr=NOWHERE), errno.EINVAL)
    bound.ioctl(Bind(flags=4, iommufd=NOT_OPEN), errno.EINVAL)
    check(lab.world)


def test_an_iommufd_of_another_machine() -> None:
    lab = Lab()
    foreign = Context(new_machine("other"))
    fd = lab.c.process.install(foreign)
    lab.open().bind(fd, errno.EBADFD)
    assert foreign.refs == 2


def test_a_second_file_can_be_open_but_not_bound() -> None:
    lab = Lab()
    first, second = lab.bound(), lab.open()
    before = state(lab.world)
    second.bind(expect=errno.EINVAL)
    assert not difference(before, state(lab.world))
    second.raw(vfio.VFIO_DEVICE_GET_INFO, vfio.VfioDeviceInfo().pack(), errno.EINVAL)
    first.close()
    second.bind()
    second.attach(lab.c.ioas_alloc())
    check(lab.world)


def test_copies_of_one_file_are_one_opener() -> None:
    lab = Lab()
    cdev = lab.bound()
    copy = lab.c.process.install(cdev.file)
    cdev.close()
    assert lab.vfio0.group.owner_count == 1
    lab.c.fds.close(copy)
    assert lab.vfio0.group.owner_count == 0
    check(lab.world)


def test_a_device_whose_dma_is_not_coherent() -> None:
    lab = Lab()
    lab.vfio0.caps.discard(Cap.CACHE_COHERENCY)
    cdev = lab.open()
    before = state(lab.world)
    cdev.bind(expect=errno.EINVAL)
    assert not difference(before, state(lab.world))
    assert lab.vfio0.resets == 0


def test_an_id_that_cannot_be_told_unbinds() -> None:
    lab = Lab()
    cdev = lab.open()
    at = cdev.read_only(Bind(iommufd=lab.c.fd))
    before = state(lab.world)
    cdev.raw(BIND, None, errno.EFAULT, at=at)
    assert not difference(before, state(lab.world))
    assert lab.vfio0.resets == 2
    cdev.bind()


@pytest.mark.parametrize("context_first", [True, False])
def test_the_ends_can_come_in_any_order(context_first: bool) -> None:
    lab = Lab()
    c = lab.c
    cdev = lab.bound()
    ioas = c.ioas_alloc()
    cdev.attach(ioas)
    cdev.attach(c.hwpt(1, ioas, uapi.IOMMU_HWPT_ALLOC_PASID))
    hwpt = c.hwpt(1, ioas, uapi.IOMMU_HWPT_ALLOC_PASID)
    cdev.attach(hwpt, pasid=9)
    cdev.attach(hwpt, pasid=3)
    lab.vfio0.log.clear()
    if context_first:
        c.close()
        assert c.ictx.refs == 1
        assert len(lab.vfio0.now) == 3  # DMA goes on
        cdev.close()
        check_empty_but_memory(lab)
    else:
        cdev.close()
        assert [str(obj) for obj in c.ictx.objects] == ["ioas 2", "hwpt_paging 3", "hwpt_paging 4"]
        check(lab.world)
        c.close()
    assert [pasid for pasid, _ in lab.vfio0.log] == [3, 9, 0]  # PASIDs from the lowest, then the device itself
    assert lab.vfio0.resets == 2
    check_empty_but_memory(lab)


def check_empty_but_memory(lab: Lab) -> None:
    for process in lab.world.processes:
        process.exit()
    check_empty(lab.world)


def test_a_process_that_dies_leaves_nothing() -> None:
    lab = Lab()
    child = lab.c.process.fork()
    cdev = lab.bound()
    cdev.attach(lab.c.ioas_alloc())
    lab.c.process.exit()
    assert lab.vfio0.group.owner_count == 0  # though the context lives on in the child
    assert lab.c.ictx.refs == 1
    child.exit()
    check_empty(lab.world)


def test_unbinding_takes_the_vdevice_along() -> None:
    c = Client()
    dev = c.world.machine.mock.new_device(0)
    cdev = Cdev(c, dev)
    idev = cdev.bind()
    ioas = c.ioas_alloc()
    parent = c.hwpt(idev, ioas, uapi.IOMMU_HWPT_ALLOC_NEST_PARENT)
    viommu = c.viommu(idev, parent)
    vdevice = c.vdevice(viommu, idev, 7)
    cdev.attach(c.nested(idev, viommu))
    cdev.close()
    c.destroy(vdevice, errno.ENOENT)
    assert not dev.group.owner_count
    check(c.world)
    c.world.machine.mock.forget_device(dev)
