"""Devices bound to a context, and their groups (device.c)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import iommufd_uapi.iommufd as uapi

from .errors import EINVAL, EOPNOTSUPP, IommufdError
from .iommu.ops import Cap, Device, HwInfoOps
from .objects import Holder, IommufdObject, ObjectType
from .user import Caller, Gate

if TYPE_CHECKING:
    from .attach import Attach
    from .context import Context
    from .iommu.group import IommuGroup
    from .ucmd import Ucmd
    from .viommu import Vdevice


class IommufdGroup:
    """struct iommufd_group: an IommuGroup as this context sees it; gone with its last device."""

    def __init__(self, group: IommuGroup) -> None:
        self.group = group
        self.refs = 0
        self.pasid_attach: dict[int, Attach] = {}


class IommufdDevice(IommufdObject):
    """struct iommufd_device: a device whose DMA this context owns."""

    type = ObjectType.DEVICE

    def __init__(self, ictx: Context, dev: Device, igroup: IommufdGroup) -> None:
        super().__init__()
        self.ictx = ictx
        self.dev = dev
        self.igroup = igroup
        self.enforce_cache_coherency = dev.iommu.capable(dev, Cap.ENFORCE_CACHE_COHERENCY)
        self.vdev: Vdevice | None = None
        self.destroying = False

    def pre_destroy(self) -> None:
        """iommufd_device_remove_vdev(): the vDEVICE goes first and leaves a tombstone."""
        self.destroying = True
        if self.vdev is not None:
            self.ictx.objects.tombstone_user(self.vdev)

    def destroy(self) -> None:
        self.dev.group.release_dma_owner()
        self.ictx.put_group(self.igroup)
        super().destroy()


def bind(ictx: Context, caller: Caller, dev: Device, driver: Holder) -> IommufdDevice:
    """Own dev's DMA on behalf of driver (iommufd_device_bind): EINVAL, EPERM, EBUSY, ENOMEM."""
    if not dev.iommu.capable(dev, Cap.CACHE_COHERENCY):
        raise EINVAL("the device's DMA is not coherent")
    caller.gate(Gate.MEMORY)
    igroup = ictx.get_group(dev.group)
    try:
        dev.group.claim_dma_owner(ictx)
    except IommufdError:
        ictx.put_group(igroup)
        raise
    try:
        idev = ictx.objects.alloc(IommufdDevice(ictx, dev, igroup), caller.gate)
    except IommufdError:
        dev.group.release_dma_owner()
        ictx.put_group(igroup)
        raise
    driver.hold(idev)
    ictx.objects.finalize(idev)
    return idev


def unbind(idev: IommufdDevice, driver: Holder) -> None:
    """iommufd_device_unbind()"""
    driver.let_go(idev)
    idev.ictx.objects.destroy_user(idev)


# ---- GET_HW_INFO ----


def get_hw_info(ucmd: Ucmd, cmd: uapi.HwInfo) -> None:
    """IOMMU_GET_HW_INFO: EOPNOTSUPP, ENOENT, EFAULT."""
    if cmd.flags & ~uapi.IOMMU_HW_INFO_FLAG_INPUT_TYPE or any(cmd.reserved):
        raise EOPNOTSUPP("flags are not known or reserved is not 0")
    wanted = cmd.data_type if cmd.flags & uapi.IOMMU_HW_INFO_FLAG_INPUT_TYPE else uapi.IOMMU_HW_INFO_TYPE_DEFAULT
    idev = ucmd.get(cmd.dev_id, IommufdDevice)
    dev = idev.dev
    ucmd.caller.gate(Gate.MEMORY)
    if isinstance(dev.iommu, HwInfoOps):
        cmd.data_type, data = dev.iommu.hw_info(dev, wanted)
    else:
        cmd.data_type, data = uapi.IOMMU_HW_INFO_TYPE_NONE, b""
    copied = data[: cmd.data_len]
    ucmd.caller.copy_to_user(cmd.data_uptr, copied)
    if len(copied) < cmd.data_len:
        _clear_user(ucmd.caller, cmd.data_uptr + len(copied), cmd.data_len - len(copied))
    cmd.data_len = len(data)
    cmd.out_capabilities = 0
    if dev.iommu.capable(dev, Cap.DIRTY_TRACKING):
        cmd.out_capabilities |= uapi.IOMMU_HW_CAP_DIRTY_TRACKING
    if not dev.iommu.capable(dev, Cap.PCI_ATS_SUPPORTED):
        cmd.out_capabilities |= uapi.IOMMU_HW_CAP_PCI_ATS_NOT_SUPPORTED
    cmd.out_max_pasid_log2 = dev.max_pasids.bit_length() - 1 if dev.max_pasids else 0
    ucmd.respond(cmd)


def _clear_user(caller: Caller, addr: int, length: int) -> None:
    """clear_user(): zeros up to a fault."""
    while length:
        part = min(length, 1 << 16)
        caller.copy_to_user(addr, bytes(part))
        addr += part
        length -= part
