"""VFIO devices of a machine that are open."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from iommufdd.errors import ENOENT
from iommufdd.vfio.device_cdev import VfioDeviceFile

if TYPE_CHECKING:
    from .instance import Instance, OpenContext

#: what a descriptor of /dev/iommu, or of a device, stands for
Opened: TypeAlias = "OpenContext | OpenDevice"


class ServedDevice(VfioDeviceFile):
    """A device file that tells when its last reference, wherever that was, is gone."""

    opened: OpenDevice

    def release(self) -> None:
        super().release()
        self.opened.settle()


class OpenDevice:
    """One open /dev/vfio/devices/NAME."""

    def __init__(self, instance: Instance, name: str, uid: int) -> None:
        """ENOENT."""
        dev = instance.machine.devices.get(name)
        if dev is None:
            raise ENOENT(f"there is no device {name!r}")
        self.instance = instance
        self.name = name
        self.uid = uid
        self.owner: object = None  # the front end that opened it for a process
        self.file = ServedDevice(instance.machine, dev)
        self.file.opened = self
        instance.devices.add(self)
        instance.instances.devices.add(self)
        instance.keep(self)

    def settle(self) -> None:
        """It has no reference left."""
        self.instance.devices.discard(self)
        self.instance.instances.devices.discard(self)
        self.instance.let_go(self)
