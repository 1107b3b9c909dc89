"""iommufd_client: programs' side of iommufdd. Nothing is imported before it is used.

    from iommufd_client import Iommufd

    with Iommufd() as iommufd:
        ioas = iommufd.ioas_alloc()
        guest = iommufd.guest_memory(1 << 20)
        iova = iommufd.ioas_map(ioas, guest)

`iommufd_client.aio` is the same for Trio, `iommufd_client.testing` starts private daemons for tests.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .admin import Admin as Admin
    from .call import IommufdOSError as IommufdOSError
    from .channel import Batch as Batch
    from .channel import ProtocolError as ProtocolError
    from .connection import Connection as Connection
    from .device import VfioDevice as VfioDevice
    from .endpoint import DmaError as DmaError
    from .endpoint import Endpoint as Endpoint
    from .files import Fd as Fd
    from .files import File as File
    from .guest import GuestMemory as GuestMemory
    from .iommufd import Iommufd as Iommufd
    from .memory import Buffers as Buffers
    from .memory import Memory as Memory
    from .memory import OwnMemory as OwnMemory
    from .vm import Vm as Vm

__version__ = "0.1.0"

_HOMES = {
    "Admin": "admin",
    "IommufdOSError": "call",
    "Batch": "channel",
    "ProtocolError": "channel",
    "Connection": "connection",
    "VfioDevice": "device",
    "DmaError": "endpoint",
    "Endpoint": "endpoint",
    "Fd": "files",
    "File": "files",
    "GuestMemory": "guest",
    "Iommufd": "iommufd",
    "Buffers": "memory",
    "Memory": "memory",
    "OwnMemory": "memory",
    "Vm": "vm",
}
__all__ = [*_HOMES]


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{home}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
