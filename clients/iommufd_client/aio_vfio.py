"""Room client: VFIO devices over Trio."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from iommufd_uapi import wire
from iommufd_uapi.vfio import VFIO_DEVICE_RESET

from . import vfio
from .aio_connection import Connection, awaited
from .channel import hello
from .connection import default_socket_path
from .files import fd_number

if TYPE_CHECKING:
    from .files import HasFileno


class VfioDevice(Connection):
    """One open /dev/vfio/devices/NAME; see `iommufd_client.VfioDevice`."""

    name: str

    @classmethod
    async def open(
        cls,
        name: str,
        socket_path: str | None = None,
        *,
        machine: str = "",
        context: HasFileno | int | None = None,
        explain: bool = False,
    ) -> Self:
        """On the machine of this name, or on that of a context's identity. ENOENT, EBADFD."""
        self = cls(socket_path or default_socket_path(), explain=explain, kind=wire.Kind.DEVICE)
        self.name = name
        fds = [] if context is None else [fd_number(context)]
        await self._connect(hello(wire.Kind.DEVICE, machine=machine, device=name), fds)
        return self

    async def bind(self, iommufd: Connection | HasFileno | int, token: bytes | None = None) -> int:
        """VFIO_DEVICE_BIND_IOMMUFD: the device's id in the context. EINVAL, EPERM, EBUSY, EBADF, EBADFD."""
        return await self._bind(iommufd.identity if isinstance(iommufd, Connection) else iommufd, token)

    async def reset(self) -> None:
        """VFIO_DEVICE_RESET. EINVAL when not bound."""
        await self.ioctl(VFIO_DEVICE_RESET, 0)

    _bind = awaited(vfio.bind)
    attach = awaited(vfio.attach)
    detach = awaited(vfio.detach)
    get_info = awaited(vfio.get_info)
