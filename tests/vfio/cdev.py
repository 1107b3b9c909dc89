"""An open /dev/vfio/devices/NAME in the test language: one line for an ioctl and its errno."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from iommufd_uapi import vfio
from iommufd_uapi.layout import VfioIoctl
from iommufdd.vfio.device_cdev import VfioDeviceFile
from tests.core.harness import ARGUMENT, Client
from tests.core.model import ModelDevice, ModelIommu

if TYPE_CHECKING:
    from iommufdd.iommu.ops import Device

V = TypeVar("V", bound=VfioIoctl)
PASID_FLAG = vfio.VFIO_DEVICE_ATTACH_PASID


class EndpointDevice(ModelDevice):
    """A device that counts its resets."""

    resets = 0

    def reset(self) -> None:
        self.resets += 1


class Lab:
    """A machine with devices of one model, and a context open on it."""

    def __init__(self, *, max_pasids: int = 1 << 10) -> None:
        self.c = Client()
        self.world = self.c.world
        self.iommu = ModelIommu()
        self.max_pasids = max_pasids
        self.vfio0 = self.device("vfio0")

    def device(self, name: str, beside: Device | None = None) -> EndpointDevice:
        dev = EndpointDevice(self.iommu, name, beside, self.max_pasids)
        self.world.machine.devices[name] = dev
        return dev

    def open(self, name: str = "vfio0", c: Client | None = None) -> Cdev:
        return Cdev(c or self.c, self.world.machine.devices[name])

    def bound(self, name: str = "vfio0") -> Cdev:
        cdev = self.open(name)
        cdev.bind()
        return cdev


class Cdev:
    """One open file, used by the process of a client and bound to its context unless another fd is given."""

    def __init__(self, c: Client, dev: Device) -> None:
        self.c = c
        self.file = VfioDeviceFile(c.world.machine, dev)
        self.fd = c.process.install(self.file)
        self.file.put()  # the descriptor has it

    def raw(self, cmd: int, data: bytes | None, expect: int = 0, *, at: int = ARGUMENT) -> None:
        """An ioctl on these bytes; None: only the number."""
        if data is not None:
            self.c.process.put(data, at)
        rc = self.file.ioctl(self.c.caller, cmd, at)
        assert rc == -expect, f"{rc}, expected {-expect}: {self.c.caller.error}"
        assert (self.c.caller.error is not None) == bool(expect)

    def ioctl(self, arg: V, expect: int = 0, *, at: int = ARGUMENT) -> V:
        """The struct brought up to date."""
        self.raw(arg.CMD, arg.pack(), expect, at=at)
        arg.update(self.c.mm.read(at, arg.SIZEOF))
        return arg

    def read_only(self, arg: VfioIoctl) -> int:
        """The address of a struct in memory that cannot be written."""
        file = self.c.world.memfd(1)
        file.pwrite(0, arg.pack())
        return self.c.process.map(file, writable=False)

    def bind(self, fd: int | None = None, expect: int = 0) -> int:
        cmd = vfio.VfioDeviceBindIommufd(argsz=16, iommufd=self.c.fd if fd is None else fd)
        return self.ioctl(cmd, expect).out_devid

    def attach(self, pt: int, pasid: int | None = None, expect: int = 0) -> int:
        flags = 0 if pasid is None else PASID_FLAG
        return self.ioctl(vfio.VfioDeviceAttachIommufdPt(flags=flags, pt_id=pt, pasid=pasid or 0), expect).pt_id

    def detach(self, pasid: int | None = None) -> None:
        self.ioctl(vfio.VfioDeviceDetachIommufdPt(flags=0 if pasid is None else PASID_FLAG, pasid=pasid or 0))

    def close(self) -> None:
        self.c.fds.close(self.fd)
