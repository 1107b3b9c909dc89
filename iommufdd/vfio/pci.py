"""What vfio-pci answers for a device once it is bound (vfio_pci_core.c). Regions and interrupts: none yet."""

from __future__ import annotations

from typing import TYPE_CHECKING

import iommufd_uapi.vfio as vfio
from iommufdd.errors import EINVAL, ENOTTY

if TYPE_CHECKING:
    from collections.abc import Callable

    from iommufdd.user import Caller

    from .iommufd import VfioDevice

FEATURE_FLAGS = (
    vfio.VFIO_DEVICE_FEATURE_MASK
    | vfio.VFIO_DEVICE_FEATURE_GET
    | vfio.VFIO_DEVICE_FEATURE_SET
    | vfio.VFIO_DEVICE_FEATURE_PROBE
)


def ioctl(device: VfioDevice, caller: Caller, cmd: int, arg: int) -> None:
    """vfio_pci_core_ioctl(): ENOTTY for what the device does not have."""
    execute = _IOCTLS.get(cmd)
    if execute is None:
        raise ENOTTY(f"ioctl {cmd:#x} is not known, or {device} has nothing for it")
    execute(device, caller, arg)


def _get_info(device: VfioDevice, caller: Caller, arg: int) -> None:
    """VFIO_DEVICE_GET_INFO: EFAULT, EINVAL. There are no capabilities, so argsz comes back as it was."""
    layout = vfio.VfioDeviceInfo
    argsz = int.from_bytes(caller.copy_from_user(arg, layout.MIN_SIZE)[:4], "little")
    if argsz < layout.MIN_SIZE:
        raise EINVAL(f"argsz is {argsz}, at least {layout.MIN_SIZE} is needed")
    info = layout(
        argsz=argsz,
        flags=vfio.VFIO_DEVICE_FLAGS_PCI | vfio.VFIO_DEVICE_FLAGS_RESET,
        num_regions=vfio.VFIO_PCI_NUM_REGIONS,
        num_irqs=vfio.VFIO_PCI_NUM_IRQS,
    )
    caller.copy_to_user(arg, info.pack()[: min(argsz, layout.SIZEOF)])


def _get_region_info(device: VfioDevice, caller: Caller, arg: int) -> None:
    """VFIO_DEVICE_GET_REGION_INFO: EINVAL, before anything is read, of a driver without regions."""
    raise EINVAL(f"{device} has no regions")


def _feature(device: VfioDevice, caller: Caller, arg: int) -> None:
    """VFIO_DEVICE_FEATURE: EFAULT, EINVAL; ENOTTY for every feature (vfio_ioctl_device_feature)."""
    layout = vfio.VfioDeviceFeature
    cmd = layout.unpack(caller.copy_from_user(arg, layout.MIN_SIZE).ljust(layout.SIZEOF, b"\0"))
    if cmd.argsz < layout.MIN_SIZE:
        raise EINVAL(f"argsz is {cmd.argsz}, at least {layout.MIN_SIZE} is needed")
    both = vfio.VFIO_DEVICE_FEATURE_GET | vfio.VFIO_DEVICE_FEATURE_SET
    if cmd.flags & ~FEATURE_FLAGS or (cmd.flags & both == both and not cmd.flags & vfio.VFIO_DEVICE_FEATURE_PROBE):
        raise EINVAL(f"flags {cmd.flags:#x} are not known, or both GET and SET")
    raise ENOTTY(f"{device} does not have feature {cmd.flags & vfio.VFIO_DEVICE_FEATURE_MASK}")


def _reset(device: VfioDevice, caller: Caller, arg: int) -> None:
    """VFIO_DEVICE_RESET: attachments stay."""
    device.dev.reset()


_IOCTLS: dict[int, Callable[[VfioDevice, Caller, int], None]] = {
    vfio.VFIO_DEVICE_GET_INFO: _get_info,
    vfio.VFIO_DEVICE_GET_REGION_INFO: _get_region_info,
    vfio.VFIO_DEVICE_FEATURE: _feature,
    vfio.VFIO_DEVICE_RESET: _reset,
}
