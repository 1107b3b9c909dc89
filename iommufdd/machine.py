"""A machine instance: what is global to a kernel. IOMMUs, devices, users, and the selftest's settings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .description import MOCK
from .event_port import Events
from .iommu.dma import DmaQueue
from .kvm.memory import HostMemory
from .user import User

if TYPE_CHECKING:
    from .description import MachineDescription
    from .doorbells import Polling
    from .iommu.ops import Device, IommuOps
    from .iommu.selftest_ops import SelftestIommu
    from .sanitizer import Sanitizer

TEMP_MEMORY_LIMIT = 65536  # selftest.c:iommufd_test_memory_limit


class Machine:
    """One emulated machine. Contexts of different machines share nothing."""

    def __init__(self, name: str, mock: SelftestIommu, description: MachineDescription = MOCK) -> None:
        """`name` is the instance's, '' for a private one; the description has the machine's."""
        self.name = name
        self.events = Events(name)
        self.mock = mock
        self.description = description
        self.iommus: dict[str, IommuOps] = {}  # those described, by name; not the selftest's mock
        self.devices: dict[str, Device] = {}  # those described, by the name of their file in /dev/vfio/devices
        self.memory = HostMemory()
        self.dma = DmaQueue()  # what they do
        self.polling: Polling | None = None  # who looks at what guests write without a trap
        self.sanitizer: Sanitizer | None = None
        self.temp_memory_limit = TEMP_MEMORY_LIMIT
        self._users: dict[int, User] = {}

    def user(self, uid: int) -> User:
        """get_uid(): what this uid has locked, in all its processes."""
        return self._users.setdefault(uid, User(uid))
