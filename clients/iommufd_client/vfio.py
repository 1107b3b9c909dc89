"""Room client: the ioctls of a VFIO device that lead to an iommufd, as steps (see ioctls.py)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from iommufd_uapi import vfio as uapi

from .files import HasFileno, fd_number
from .memory import NO_MEMORY, Buffers

if TYPE_CHECKING:
    from .ioctls import Steps


def bind(iommufd: HasFileno | int, token: bytes | None = None) -> Steps[int]:
    """VFIO_DEVICE_BIND_IOMMUFD to the context that a descriptor identifies: the device's id there.

    `token` are the 16 bytes of a VF token. EINVAL when it is bound already, here or through another file, or takes
    no token; EPERM while another context has a device of its group; EBUSY; EBADF, EBADFD no iommufd of its machine.
    """
    buffers = Buffers()
    cmd = uapi.VfioDeviceBindIommufd(iommufd=fd_number(iommufd))
    if token is not None:
        cmd.flags, cmd.token_uuid_ptr = uapi.VFIO_DEVICE_BIND_FLAG_TOKEN, buffers.add(token)
    yield cmd, buffers
    return cmd.out_devid


def attach(pt_id: int, pasid: int | None = None) -> Steps[int]:
    """VFIO_DEVICE_ATTACH_IOMMUFD_PT to a HWPT or an IOAS: the id of the HWPT.

    What is attached already, for the same PASID or without one, is replaced, and stays if that fails. ENOENT;
    EINVAL the HWPT does not fit the device, or not bound; EADDRINUSE; EBUSY; ENOSPC; EOPNOTSUPP.
    """
    cmd = uapi.VfioDeviceAttachIommufdPt(pt_id=pt_id)
    if pasid is not None:
        cmd.flags, cmd.pasid = uapi.VFIO_DEVICE_ATTACH_PASID, pasid
    yield cmd, NO_MEMORY
    return cmd.pt_id


def detach(pasid: int | None = None) -> Steps[None]:
    """VFIO_DEVICE_DETACH_IOMMUFD_PT: DMA is blocked again; nothing if it was not attached. EINVAL when not bound."""
    cmd = uapi.VfioDeviceDetachIommufdPt()
    if pasid is not None:
        cmd.flags, cmd.pasid = uapi.VFIO_DEVICE_DETACH_PASID, pasid
    yield cmd, NO_MEMORY


def get_info() -> Steps[uapi.VfioDeviceInfo]:
    """VFIO_DEVICE_GET_INFO: flags, and how many regions and interrupts have a number. EINVAL when not bound."""
    cmd = uapi.VfioDeviceInfo()
    yield cmd, NO_MEMORY
    return cmd
