"""What vfio-pci answers itself, and what it does not have."""

import errno

import pytest

from iommufd_uapi import vfio
from iommufdd.errors import EINVAL
from iommufdd.user import PAGE_SIZE
from tests.core.harness import ARGUMENT, DATA, NOWHERE
from tests.core.snapshot import difference, state
from tests.vfio.cdev import Lab

INFO, FEATURE = vfio.VFIO_DEVICE_GET_INFO, vfio.VFIO_DEVICE_FEATURE
END = DATA + 15 * PAGE_SIZE


def test_info() -> None:
    cdev = Lab().bound()
    info = cdev.ioctl(vfio.VfioDeviceInfo(cap_offset=7, pad=7))
    assert info.flags == vfio.VFIO_DEVICE_FLAGS_PCI | vfio.VFIO_DEVICE_FLAGS_RESET
    assert (info.argsz, info.num_regions, info.num_irqs, info.cap_offset, info.pad) == (24, 9, 5, 0, 0)


def test_info_writes_what_argsz_covers() -> None:
    lab = Lab()
    cdev = lab.bound()
    lab.c.process.put(b"\xee" * 32, ARGUMENT)
    cdev.raw(INFO, vfio.VfioDeviceInfo(argsz=17).pack()[:16])
    assert lab.c.mm.read(ARGUMENT + 12, 8) == bytes([5, 0, 0, 0, 0, 0xEE, 0xEE, 0xEE])
    assert cdev.ioctl(vfio.VfioDeviceInfo(argsz=4096)).argsz == 4096
    cdev.raw(INFO, vfio.VfioDeviceInfo(argsz=16).pack()[:16], at=END - 16)
    cdev.raw(INFO, vfio.VfioDeviceInfo(argsz=24).pack()[:16], errno.EFAULT, at=END - 16)
    cdev.raw(INFO, vfio.VfioDeviceInfo(argsz=15).pack()[:16], errno.EINVAL, at=END - 16)
    cdev.raw(INFO, vfio.VfioDeviceInfo(argsz=0).pack()[:15], errno.EFAULT, at=END - 15)


def test_what_it_does_not_have() -> None:
    lab = Lab()
    cdev = lab.bound()
    before = state(lab.world)
    cdev.raw(vfio.VFIO_DEVICE_GET_REGION_INFO, None, errno.EINVAL, at=NOWHERE)
    for cmd in (vfio.VFIO_DEVICE_GET_IRQ_INFO, vfio.VFIO_DEVICE_SET_IRQS, 0x3B81, 0):
        cdev.raw(cmd, None, errno.ENOTTY, at=NOWHERE)
    with pytest.raises(EINVAL):
        cdev.file.mmap(lab.c.caller, 0, PAGE_SIZE, 3, 1)
    with pytest.raises(EINVAL):
        cdev.file.write(lab.c.caller, DATA, 4)
    assert not difference(before, state(lab.world))


def test_features_are_checked_before_they_are_refused() -> None:
    cdev = Lab().bound()
    get, put, probe = (
        vfio.VFIO_DEVICE_FEATURE_GET, vfio.VFIO_DEVICE_FEATURE_SET, vfio.VFIO_DEVICE_FEATURE_PROBE
    )  # fmt: skip
    cdev.raw(FEATURE, bytes(7), errno.EFAULT, at=END - 7)
    cdev.ioctl(vfio.VfioDeviceFeature(argsz=7, flags=get | 1), errno.EINVAL)
    cdev.ioctl(vfio.VfioDeviceFeature(flags=1 << 19), errno.EINVAL)
    cdev.ioctl(vfio.VfioDeviceFeature(flags=get | put | 1), errno.EINVAL)
    for flags in (get, put, probe | get | put, 0):
        for feature in (0, 1, vfio.VFIO_DEVICE_FEATURE_DMA_BUF, 0xFFFF):
            cdev.ioctl(vfio.VfioDeviceFeature(flags=flags | feature), errno.ENOTTY)


def test_reset_leaves_it_attached() -> None:
    lab = Lab()
    cdev = lab.bound()
    cdev.attach(lab.c.ioas_alloc())
    before = state(lab.world)
    cdev.raw(vfio.VFIO_DEVICE_RESET, None, at=NOWHERE)
    assert lab.vfio0.resets == 2
    assert not difference(before, state(lab.world))
