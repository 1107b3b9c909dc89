"""VfioDevice against a real daemon, blocking and over Trio: the example of its docstring, errors with their reasons."""

from __future__ import annotations

import ctypes
import errno
from typing import TYPE_CHECKING

import pytest

from iommufd_client import IommufdOSError, VfioDevice, aio
from iommufd_client.show import render
from iommufd_uapi import iommufd as uapi
from iommufd_uapi import vfio
from tests.vfio.daemon import LabDaemon

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture(scope="module")
def lab() -> Iterator[LabDaemon]:
    with LabDaemon() as daemon:
        yield daemon


def refused(call: Callable[[], object], number: int) -> str:
    with pytest.raises(IommufdOSError) as caught:
        call()
    assert caught.value.errno == number
    return caught.value.reason


def test_bind_attach_replace_detach(lab: LabDaemon) -> None:
    with lab.open() as iommufd, iommufd.device("vfio0") as device:
        assert "is not bound" in refused(device.get_info, errno.EINVAL)
        devid = device.bind(iommufd)
        assert "bound already" in refused(lambda: device.bind(iommufd), errno.EINVAL)
        info = device.get_info()
        assert (info.flags, info.num_regions, info.num_irqs) == (3, 9, 5)
        ioas = iommufd.ioas_alloc()
        auto = device.attach(ioas)
        hwpt = iommufd.hwpt_alloc(devid, ioas, flags=uapi.IOMMU_HWPT_ALLOC_PASID)
        assert device.attach(hwpt) == hwpt
        assert auto not in (ioas, hwpt)
        assert device.attach(hwpt, pasid=4) == hwpt
        assert "there is no object" in refused(lambda: device.attach(99), errno.ENOENT)
        device.detach(pasid=4)
        device.detach(pasid=4)
        device.detach()
        device.reset()
        iommufd.destroy(hwpt)
        iommufd.destroy(ioas)


def test_a_context_that_is_closed_first(lab: LabDaemon) -> None:
    iommufd = lab.open()
    device = iommufd.device("vfio0")
    device.bind(iommufd)
    device.attach(iommufd.ioas_alloc())
    iommufd.close()
    device.detach()
    device.close()
    with lab.admin() as admin:
        assert admin.stats().objects == 0


def test_what_bind_takes(lab: LabDaemon) -> None:
    path = lab.socket_path
    with lab.open(machine="lab") as iommufd, VfioDevice("vfio2", path, machine="lab", explain=True) as device:
        with lab.open() as elsewhere:
            assert "another machine" in refused(lambda: device.bind(elsewhere), errno.EBADFD)
        refused(lambda: device.bind(0), errno.EBADFD)
        refused(lambda: device.bind(-2), errno.EINVAL)
        refused(lambda: device.bind(4000), errno.EBADF)
        refused(lambda: device.bind(iommufd, token=bytes(16)), errno.EINVAL)
        refused(lambda: device.bind(iommufd, token=bytes(15)), errno.EFAULT)
        assert device.bind(iommufd.identity.fileno()) == 1


def test_no_such_device(lab: LabDaemon) -> None:
    with lab.open() as iommufd:
        refused(lambda: iommufd.device("vfio9"), errno.ENOENT)
    refused(lambda: VfioDevice("vfio0", lab.socket_path, context=0), errno.EBADFD)


def test_raw_ioctls_see_the_numbers_that_the_caller_knows(lab: LabDaemon) -> None:
    with lab.open() as iommufd, iommufd.device("vfio0") as device:
        number = iommufd.identity.fileno()
        data = bytearray(vfio.VfioDeviceBindIommufd(argsz=16, iommufd=number).pack())
        assert device.ioctl(vfio.VFIO_DEVICE_BIND_IOMMUFD, data) == 0
        bound = vfio.VfioDeviceBindIommufd.unpack(data)
        assert (bound.iommufd, bound.out_devid) == (number, 1)
        with pytest.raises(IommufdOSError, match="Inappropriate ioctl"):
            device.ioctl(vfio.VfioIrqInfo())
        refused(lambda: device.ioctl(vfio.VfioDeviceFeature(flags=1 << 18)), errno.ENOTTY)


def test_an_argsz_longer_than_what_travels(lab: LabDaemon) -> None:
    """Zeros behind the struct are fine however many, anything else is E2BIG."""
    with lab.open() as iommufd, iommufd.device("vfio0") as device:
        cmd = vfio.VfioDeviceBindIommufd(argsz=1 << 20, iommufd=iommufd.identity.fileno())
        data = ctypes.create_string_buffer(cmd.pack(), (1 << 20) + 64)
        data[(1 << 20) - 1] = b"\1"
        refused(lambda: device.ioctl(cmd.CMD, ctypes.addressof(data)), errno.E2BIG)
        data[(1 << 20) - 1] = b"\0"
        assert device.ioctl(cmd.CMD, ctypes.addressof(data)) == 0
        after = vfio.VfioDeviceBindIommufd.unpack(data.raw[:24])
        assert (after.argsz, after.out_devid) == (1 << 20, 1)


def test_groups(lab: LabDaemon) -> None:
    with (
        lab.open(machine="lab") as first,
        lab.open(machine="lab") as second,
        first.device("vfio0") as one,
        second.device("vfio1") as other,
    ):
        one.bind(first)
        assert "belongs to another" in refused(lambda: other.bind(second), errno.EPERM)
        ioas = first.ioas_alloc()
        hwpt = one.attach(ioas)
        assert other.bind(first) == 4
        assert other.attach(ioas) == hwpt


def test_show(lab: LabDaemon) -> None:
    with lab.open(machine="lab") as iommufd, iommufd.device("vfio0") as device, iommufd.device("vfio1"):
        device.bind(iommufd)
        with lab.admin() as admin:
            lines = render(admin.show()).splitlines()
    start = next(at for at, line in enumerate(lines) if line.startswith("machine lab"))
    text = "\n".join(lines[start:])
    assert "device 1 (vfio0)  1 user  held by vfio device vfio0" in text
    assert "/dev/vfio/devices/vfio0  bound as device 1 to inode " in text
    assert "/dev/vfio/devices/vfio1  not bound" in text


async def test_over_trio(lab: LabDaemon) -> None:
    async with aio.open_iommufd(lab.socket_path, explain=True) as iommufd:
        device = await iommufd.device("vfio0")
        with pytest.raises(IommufdOSError, match="is not bound"):
            await device.reset()
        devid = await device.bind(iommufd)
        ioas = await iommufd.ioas_alloc()
        hwpt = await iommufd.hwpt_alloc(devid, ioas, flags=uapi.IOMMU_HWPT_ALLOC_PASID)
        assert await device.attach(hwpt) == hwpt
        assert await device.attach(hwpt, pasid=7) == hwpt
        await device.detach(pasid=7)
        await device.detach()
        await device.reset()
        assert (await device.get_info()).num_irqs == 5
        await iommufd.destroy(hwpt)
        await device.aclose()
        with pytest.raises(IommufdOSError) as caught:
            await aio.VfioDevice.open("vfio9", lab.socket_path, machine="x")
        assert caught.value.errno == errno.ENOENT


