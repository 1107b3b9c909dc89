"""Ioctls by number through the synchronous client, their memory and descriptors; batches."""

from __future__ import annotations

import ctypes
import errno
import os

import pytest

from iommufd_client import Buffers, Iommufd, IommufdOSError
from iommufd_uapi import iommufd as uapi
from iommufd_uapi import iommufd_test as mock
from iommufd_uapi import vfio

from .test_iommufd import refused


def test_an_ioctl_as_bytes(iommufd: Iommufd) -> None:
    arg = bytearray(uapi.IoasAlloc().pack())
    assert iommufd.ioctl(uapi.IOMMU_IOAS_ALLOC, arg) == 0
    ioas = uapi.IoasAlloc.unpack(arg).out_ioas_id
    assert ioas
    assert iommufd.ioctl(uapi.IOMMU_DESTROY, bytearray(uapi.Destroy(id=ioas).pack())) == 0


def test_an_ioctl_at_an_address(iommufd: Iommufd) -> None:
    arg = ctypes.create_string_buffer(uapi.IoasAlloc().pack(), 12)
    assert iommufd.ioctl(uapi.IOMMU_IOAS_ALLOC, ctypes.addressof(arg)) == 0
    assert uapi.IoasAlloc.unpack(bytes(arg)).out_ioas_id


def test_raw_pointers_within_a_struct(iommufd: Iommufd) -> None:
    ids = iommufd.mock_domain(iommufd.ioas_alloc(), mock.MOCK_FLAGS_DEVICE_PASID)
    data = ctypes.create_string_buffer(8)
    cmd = uapi.HwInfo(dev_id=ids.out_idev_id, data_len=8, data_uptr=ctypes.addressof(data))
    assert iommufd.ioctl(cmd) == 0
    assert mock.TestHwInfo.unpack(bytes(data)).test_reg == mock.IOMMU_HW_INFO_SELFTEST_REGVAL
    cmd = uapi.HwInfo(dev_id=ids.out_idev_id, data_len=8, data_uptr=8)
    assert refused(lambda: iommufd.ioctl(cmd), errno.EFAULT).reason


@pytest.mark.parametrize("addr", [0, 1, 0xFFFF_8000_0000_0000, 2**64 - 1])
def test_a_bad_argument(iommufd: Iommufd, addr: int) -> None:
    refused(lambda: iommufd.ioctl(uapi.IOMMU_IOAS_ALLOC, addr), errno.EFAULT)


@pytest.mark.parametrize("cmd", [0, 0x3B00, 0x3BFF, 0xC0043B81, 0xFFFF_FFFF])
def test_an_unknown_number(iommufd: Iommufd, cmd: int) -> None:
    refused(lambda: iommufd.ioctl(cmd, bytearray(8)), errno.ENOTTY)


@pytest.mark.parametrize(
    ("arg", "number"),
    [
        (b"", errno.EFAULT),
        (b"\x0c\0\0", errno.EFAULT),
        (b"\x0b\0\0\0", errno.EINVAL),
        (b"\x0c\0\0\0", errno.EFAULT),
        (b"\x10\0\0\0" + bytes(8), errno.EFAULT),
        (b"\x10\0\0\0" + bytes(11) + b"\1", errno.E2BIG),
        (b"\x10\0\0\0" + bytes(12), 0),
        ((5000).to_bytes(4, "little") + bytes(4996), 0),
        ((5000).to_bytes(4, "little") + bytes(4995) + b"\1", errno.E2BIG),
        ((300_000).to_bytes(4, "little") + bytes(299_996), 0),
        ((300_000).to_bytes(4, "little") + bytes(299_995) + b"\1", errno.E2BIG),
        ((300_001).to_bytes(4, "little") + bytes(299_996), errno.EFAULT),
        (b"\xff\xff\xff\xff" + bytes(100_000), errno.EFAULT),
    ],
)
def test_sizes(iommufd: Iommufd, arg: bytes, number: int) -> None:
    image = bytearray(arg)
    if number:
        refused(lambda: iommufd.ioctl(uapi.IOMMU_IOAS_ALLOC, image), number)
        assert image == arg
    else:
        iommufd.ioctl(uapi.IOMMU_IOAS_ALLOC, image)
        assert image[:4] == arg[:4]
        assert image[8]


def test_vfio_numbers(iommufd: Iommufd) -> None:
    assert iommufd.ioctl(vfio.VFIO_GET_API_VERSION, 0) == vfio.VFIO_API_VERSION
    assert iommufd.ioctl(vfio.VFIO_CHECK_EXTENSION, vfio.VFIO_TYPE1v2_IOMMU) == 1
    assert iommufd.ioctl(vfio.VFIO_CHECK_EXTENSION, 1000) == 0


def test_a_batch(iommufd: Iommufd) -> None:
    allocs = [uapi.IoasAlloc() for _ in range(700)]
    assert iommufd.batch(allocs).send() == [0] * 700
    assert [cmd.out_ioas_id for cmd in allocs] == list(range(1, 701))
    batch = iommufd.batch([uapi.Destroy(id=1), uapi.Destroy(id=1)])
    ranges, room = Buffers(), bytearray(16)
    query = uapi.IoasIovaRanges(ioas_id=2, num_iovas=1, allowed_iovas=ranges.add(room))
    batch.ioctl(query, memory=ranges)
    arg = bytearray(uapi.Destroy(id=2).pack())
    batch.ioctl(uapi.IOMMU_DESTROY, arg)
    first, second, third, fourth = batch.send()
    assert (first, third, fourth) == (0, 0, 0)
    assert isinstance(second, IommufdOSError)
    assert (second.errno, bool(second.reason)) == (errno.ENOENT, True)
    assert uapi.IovaRange.unpack(room) == uapi.IovaRange(0, 2**64 - 1)
    assert batch.send() == []


def test_a_batch_with_descriptors(iommufd: Iommufd) -> None:
    batch = iommufd.batch()
    queues = [uapi.FaultAlloc() for _ in range(100)]  # more than one packet brings
    for cmd in queues:
        batch.ioctl(cmd)
    batch.ioctl(uapi.FaultAlloc(flags=1))
    *results, last = batch.send()
    fds = [cmd.out_fault_fd for cmd, result in zip(queues, results, strict=True) if result == 0]
    assert isinstance(last, IommufdOSError)
    try:
        assert len(fds) == len(set(fds)) >= 64
        assert not any(os.get_inheritable(fd) for fd in fds)
    finally:
        for fd in fds:
            os.close(fd)
