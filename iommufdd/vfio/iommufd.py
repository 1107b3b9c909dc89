"""A device that vfio-pci drives, and its way into a context (drivers/vfio/iommufd.c: the physical ops)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from iommufdd.attach import attach, detach, replace
from iommufdd.device import bind, unbind
from iommufdd.errors import ENOSPC
from iommufdd.iommu.ops import IOMMU_NO_PASID
from iommufdd.objects import Holder
from iommufdd.user import Gate

if TYPE_CHECKING:
    from iommufdd.context import Context
    from iommufdd.device import IommufdDevice
    from iommufdd.iommu.ops import Device
    from iommufdd.user import Caller

INT_MAX = 2**31 - 1  # the largest id of an ida


class VfioDevice(Holder):
    """struct vfio_device: there is one of each device, however often its file is opened."""

    def __init__(self, dev: Device) -> None:
        super().__init__()
        self.dev = dev
        self.open_count = 0  # files that are bound: 0 or 1
        self.iommufd_device: IommufdDevice | None = None
        self.iommufd_attached = False
        self.pasids: set[int] = set()

    def __str__(self) -> str:
        return f"vfio device {self.dev.name}"

    def bind(self, ictx: Context, caller: Caller) -> int:
        """Own the device's DMA; its id in the context (vfio_iommufd_physical_bind). What device.bind() raises."""
        self.iommufd_device = bind(ictx, caller, self.dev, self)
        return self.iommufd_device.id

    def unbind(self) -> None:
        """Detach the PASIDs in their order, then the device itself, and give it up (vfio_iommufd_physical_unbind)."""
        for pasid in sorted(self.pasids):
            detach(self._idev, pasid)
        self.pasids.clear()
        self.detach_ioas()
        unbind(self._idev, self)
        self.iommufd_device = None

    def attach_ioas(self, caller: Caller, pt_id: int) -> int:
        """Attach, or replace what is attached; the id of the HWPT (vfio_iommufd_physical_attach_ioas)."""
        change = replace if self.iommufd_attached else attach
        hwpt_id = change(caller, self._idev, IOMMU_NO_PASID, pt_id)
        self.iommufd_attached = True
        return hwpt_id

    def detach_ioas(self) -> None:
        """vfio_iommufd_physical_detach_ioas()"""
        if self.iommufd_attached:
            detach(self._idev, IOMMU_NO_PASID)
            self.iommufd_attached = False

    def pasid_attach_ioas(self, caller: Caller, pasid: int, pt_id: int) -> int:
        """The same for a PASID; ENOSPC, ENOMEM (vfio_iommufd_physical_pasid_attach_ioas).

        quirk: PASID 0 is not refused: it attaches the device itself, in a way that attach_ioas() does not know of.
        """
        if pasid in self.pasids:
            return replace(caller, self._idev, pasid, pt_id)
        if pasid > INT_MAX:
            raise ENOSPC(f"PASID {pasid:#x} is no id that the kernel can note down")
        caller.gate(Gate.MEMORY)
        hwpt_id = attach(caller, self._idev, pasid, pt_id)
        self.pasids.add(pasid)
        return hwpt_id

    def pasid_detach_ioas(self, pasid: int) -> None:
        """Nothing for a PASID that is not attached (vfio_iommufd_physical_pasid_detach_ioas)."""
        if pasid in self.pasids:
            detach(self._idev, pasid)
            self.pasids.discard(pasid)

    @property
    def _idev(self) -> IommufdDevice:
        assert self.iommufd_device is not None, "an ioctl before BIND is refused"
        return self.iommufd_device


def vfio_device(dev: Device) -> VfioDevice:
    """dev_get_drvdata(): vfio-pci has probed every device of a machine."""
    if not isinstance(dev.drvdata, VfioDevice):
        dev.drvdata = VfioDevice(dev)
    return dev.drvdata
