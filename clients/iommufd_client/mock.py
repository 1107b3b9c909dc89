"""Room client: IOMMU_TEST_CMD, the kernel's mock devices and accesses, as steps (see ioctls.py)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from iommufd_uapi import iommufd_test as uapi

from .files import HasFileno, fd_number
from .memory import NO_MEMORY, Buffers, Memory

if TYPE_CHECKING:
    from iommufd_uapi.layout import Layout

    from .ioctls import Steps

_NUMBERS = {op.union: number for number, op in uapi.TEST_OPS.items()}


def test(arg: Layout, id: int = 0, *, memory: Memory = NO_MEMORY) -> Steps[int]:  # noqa: PT028 - no pytest
    """IOMMU_TEST_CMD: `arg` is a struct of the command's union, which says the operation; it is updated.

    Needs a daemon with the mock devices. Pointers in it are addresses in `memory`.
    """
    cmd = uapi.TestCmd(op=_NUMBERS[type(arg)], id=id, u=arg.pack())
    try:
        result: int = yield cmd, memory
    finally:
        arg.update(cmd.u[: arg.SIZEOF])
    return result


def mock_domain(pt_id: int, dev_flags: int = 0) -> Steps[uapi.MockDomainFlags]:
    """A mock device, bound and attached to an IOAS or HWPT: its ids are `out_idev_id` and `out_hwpt_id`.

    `out_stdev_id` is the attachment; destroy that to detach and unbind the device.
    """
    arg = uapi.MockDomainFlags(dev_flags=dev_flags)
    yield from test(arg, pt_id)
    return arg


def create_access(ioas_id: int, flags: int = 0) -> Steps[int]:
    """What a driver in the kernel (mdev) does to an IOAS without a device; the access's descriptor."""
    arg = uapi.CreateAccess(flags=flags)
    yield from test(arg, ioas_id)
    return arg.out_access_fd


def access_read(access: HasFileno | int, iova: int, length: int, flags: int = 0) -> Steps[bytes]:
    """What an access reads at an IOVA."""
    buffers, data = Buffers(), bytearray(length)
    arg = uapi.AccessRw(iova=iova, length=length, uptr=buffers.add(data), flags=flags)
    yield from test(arg, fd_number(access), memory=buffers)
    return bytes(data)


def access_write(access: HasFileno | int, iova: int, data: bytes, flags: int = 0) -> Steps[None]:
    """Write at an IOVA through an access."""
    buffers = Buffers()
    arg = uapi.AccessRw(
        iova=iova,
        length=len(data),
        uptr=buffers.add(data),
        flags=flags | uapi.MOCK_ACCESS_RW_WRITE,
    )
    yield from test(arg, fd_number(access), memory=buffers)


def dmabuf_get(length: int, open_flags: int = 0) -> Steps[int]:
    """A DMA-BUF that IOAS_MAP_FILE takes; its descriptor. EINVAL past 2 MiB."""
    return (yield from test(uapi.DmabufGet(length=length, open_flags=open_flags)))
