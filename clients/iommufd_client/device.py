"""Room client: /dev/vfio/devices/NAME, as a Python object over a blocking socket."""

from __future__ import annotations

from typing import TYPE_CHECKING

from iommufd_uapi import wire
from iommufd_uapi.vfio import VFIO_DEVICE_RESET

from . import vfio
from .connection import Connection
from .iommufd import Iommufd, blocking

if TYPE_CHECKING:
    from .files import HasFileno


class VfioDevice(Connection):
    """One open VFIO device of the daemon, to be bound to an Iommufd of the same machine and attached.

        with Iommufd(machine="lab") as iommufd, iommufd.device("vfio0") as device:
            device.bind(iommufd)
            device.attach(iommufd.ioas_alloc())

    `close()` detaches and unbinds it. A context lives on while a device is bound to it.
    """

    def __init__(
        self,
        name: str,
        socket_path: str | None = None,
        *,
        machine: str = "",
        context: HasFileno | int | None = None,
        explain: bool = False,
    ) -> None:
        """On the machine of this name, or on that of the context that a descriptor identifies.

        OSError if there is no daemon; ENOENT no such device, EBADFD no context.
        """
        self.name = name
        super().__init__(
            socket_path, kind=wire.Kind.DEVICE, machine=machine, device=name, context=context, explain=explain
        )

    def bind(self, iommufd: Iommufd | HasFileno | int, token: bytes | None = None) -> int:
        """VFIO_DEVICE_BIND_IOMMUFD: the device's id in the context. EINVAL, EPERM, EBUSY, EBADF, EBADFD."""
        return self._bind(iommufd.identity if isinstance(iommufd, Iommufd) else iommufd, token)

    def reset(self) -> None:
        """VFIO_DEVICE_RESET: what only the device keeps is lost; it stays attached. EINVAL when not bound."""
        self.ioctl(VFIO_DEVICE_RESET, 0)

    _bind = blocking(vfio.bind)
    attach = blocking(vfio.attach)
    detach = blocking(vfio.detach)
    get_info = blocking(vfio.get_info)
