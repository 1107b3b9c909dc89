"""An open /dev/vfio/devices/NAME: its ioctls in the kernel's order of checks (device_cdev.c, vfio_main.c)."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

import iommufd_uapi.vfio as vfio
from iommufdd.context import Context
from iommufdd.errors import EBADFD, EINVAL, IommufdError
from iommufdd.user import File, Gate
from iommufdd.user_data import copy_struct_from_user

from . import pci
from .iommufd import vfio_device

if TYPE_CHECKING:
    from iommufdd.iommu.ops import Device
    from iommufdd.machine import Machine
    from iommufdd.user import Caller

UUID_SIZE = 16


class VfioDeviceFile(File):
    """struct vfio_device_file: the device cannot be used through it until BIND has given access."""

    def __init__(self, machine: Machine, dev: Device) -> None:
        """open(2) (vfio_device_fops_cdev_open); any number of files of one device may be open."""
        self.refs = 1
        self.machine = machine
        self.device = vfio_device(dev)
        self.events = machine.events
        self.iommufd: Context | None = None  # once access is granted
        self.devid = 0

    def __str__(self) -> str:
        return f"the open file of {self.device}"

    def release(self) -> None:
        """close() of the last descriptor (vfio_df_unbind_iommufd)."""
        super().release()
        ictx = self.iommufd
        if ictx is not None:
            self._close()
            self.iommufd = None
            ictx.put()

    def ioctl(self, caller: Caller, cmd: int, uptr: int) -> int:
        """One ioctl(2): the result, or minus an errno with caller.error telling why."""
        events = self.events
        entered = events.enter(self, caller, cmd, uptr) if events.listening else None
        caller.error = None
        try:
            self._ioctl(caller, cmd, uptr)
            rc = 0
        except IommufdError as error:
            caller.error = error
            rc = -error.errno
        if entered is not None:
            events.ioctl(self, caller, cmd, uptr, rc, entered)
        return rc

    def mmap(self, caller: Caller, offset: int, length: int, prot: int, flags: int) -> NoReturn:
        """mmap(2): EINVAL, for there are no regions (vfio_device_fops_mmap)."""
        raise EINVAL("the device has no region that can be mapped")

    def _ioctl(self, caller: Caller, cmd: int, uptr: int) -> None:
        """vfio_device_fops_unl_ioctl(): before BIND even a number that nobody knows gives EINVAL."""
        if cmd == vfio.VFIO_DEVICE_BIND_IOMMUFD:
            self._bind_iommufd(caller, uptr)
        elif self.iommufd is None:
            raise EINVAL(f"{self.device} is not bound: VFIO_DEVICE_BIND_IOMMUFD comes first")
        elif cmd == vfio.VFIO_DEVICE_ATTACH_IOMMUFD_PT:
            self._attach_pt(caller, uptr)
        elif cmd == vfio.VFIO_DEVICE_DETACH_IOMMUFD_PT:
            self._detach_pt(caller, uptr)
        else:
            pci.ioctl(self.device, caller, cmd, uptr)

    # ---- BIND ----

    def _bind_iommufd(self, caller: Caller, uptr: int) -> None:
        """VFIO_DEVICE_BIND_IOMMUFD: EFAULT, EINVAL, E2BIG, EBADF, EBADFD, and what binding raises."""
        layout = vfio.VfioDeviceBindIommufd
        user_size = int.from_bytes(caller.copy_from_user(uptr, 4), "little")
        if user_size < layout.MIN_SIZE:
            raise EINVAL(f"argsz is {user_size}, at least {layout.MIN_SIZE} is needed")
        cmd = layout.unpack(copy_struct_from_user(caller, uptr, user_size, layout.SIZEOF))
        if cmd.iommufd < 0 or cmd.flags & ~vfio.VFIO_DEVICE_BIND_FLAG_TOKEN:
            raise EINVAL(f"iommufd is {cmd.iommufd}, or flags {cmd.flags:#x} are not known")
        if self.iommufd is not None:
            raise EINVAL(f"this file of {self.device} is bound already")
        _check_token(caller, cmd)
        ictx = self._context(caller, cmd.iommufd)
        try:
            self._open(caller, ictx)
            try:
                at = layout.offsetof("out_devid")
                caller.copy_to_user(uptr + at, self.devid.to_bytes(4, "little"))
            except IommufdError:
                self._close()
                raise
        except IommufdError:
            ictx.put()
            raise
        self.iommufd = ictx

    def _context(self, caller: Caller, fd: int) -> Context:
        """A reference of the context that fd names (iommufd_ctx_from_fd): EBADF, EBADFD."""
        file = caller.fget(fd)
        if not isinstance(file, Context):
            raise EBADFD(f"fd {fd} is no iommufd")
        if file.machine is not self.machine:
            raise EBADFD(f"fd {fd} is an iommufd of another machine than {self.device}")
        file.get()
        return file

    def _open(self, caller: Caller, ictx: Context) -> None:
        """vfio_df_open(): EINVAL unless this is the only file that is bound."""
        device = self.device
        if device.open_count:
            raise EINVAL(f"{device} is bound through another file")
        device.open_count += 1
        try:
            self.devid = device.bind(ictx, caller)
            try:
                caller.gate(Gate.MEMORY)  # the config space that vfio-pci shows (vfio_config_init)
            except IommufdError:
                device.unbind()
                raise
        except IommufdError:
            device.open_count -= 1
            raise
        device.dev.reset()

    def _close(self) -> None:
        """vfio_df_close(): quiet the device first, then take its DMA away."""
        device = self.device
        device.dev.reset()
        device.unbind()
        device.open_count -= 1

    # ---- ATTACH, DETACH ----

    def _attach_pt(self, caller: Caller, uptr: int) -> None:
        """VFIO_DEVICE_ATTACH_IOMMUFD_PT: EFAULT, EINVAL, ENOSPC, and what attaching or replacing raises."""
        layout = vfio.VfioDeviceAttachIommufdPt
        data = caller.copy_from_user(uptr, layout.MIN_SIZE)
        cmd = layout.unpack(data.ljust(layout.SIZEOF, b"\0"))
        _check_pasid(caller, cmd, uptr, vfio.VFIO_DEVICE_ATTACH_PASID)
        if cmd.flags & vfio.VFIO_DEVICE_ATTACH_PASID:
            hwpt_id = self.device.pasid_attach_ioas(caller, cmd.pasid, cmd.pt_id)
        else:
            hwpt_id = self.device.attach_ioas(caller, cmd.pt_id)
        try:
            caller.copy_to_user(uptr + layout.offsetof("pt_id"), hwpt_id.to_bytes(4, "little"))
        except IommufdError:
            self.device.detach_ioas()  # quirk: the device itself, for a PASID too, and after a replace
            raise

    def _detach_pt(self, caller: Caller, uptr: int) -> None:
        """VFIO_DEVICE_DETACH_IOMMUFD_PT: EFAULT, EINVAL; what is not attached is no error."""
        layout = vfio.VfioDeviceDetachIommufdPt
        data = caller.copy_from_user(uptr, layout.MIN_SIZE)
        cmd = layout.unpack(data.ljust(layout.SIZEOF, b"\0"))
        _check_pasid(caller, cmd, uptr, vfio.VFIO_DEVICE_DETACH_PASID)
        if cmd.flags & vfio.VFIO_DEVICE_DETACH_PASID:
            self.device.pasid_detach_ioas(cmd.pasid)
        else:
            self.device.detach_ioas()


def _check_token(caller: Caller, cmd: vfio.VfioDeviceBindIommufd) -> None:
    """vfio_df_check_token(): EFAULT, EINVAL. No device here is in SR-IOV with a driver of ours, so none has a token."""
    if cmd.flags & vfio.VFIO_DEVICE_BIND_FLAG_TOKEN:
        caller.copy_from_user(cmd.token_uuid_ptr, UUID_SIZE)
        raise EINVAL("the device takes no VF token")


def _check_pasid(
    caller: Caller, cmd: vfio.VfioDeviceAttachIommufdPt | vfio.VfioDeviceDetachIommufdPt, uptr: int, flag: int
) -> None:
    """argsz and flags, then the PASID where a flag says that it is there: EINVAL, EFAULT."""
    if cmd.argsz < cmd.MIN_SIZE:
        raise EINVAL(f"argsz is {cmd.argsz}, at least {cmd.MIN_SIZE} is needed")
    if cmd.flags & ~flag:
        raise EINVAL(f"flags {cmd.flags:#x} are not known")
    if not cmd.flags & flag:
        return
    at, size = cmd.offsetof("pasid"), cmd.sizeof("pasid")
    if cmd.argsz < at + size:
        raise EINVAL(f"argsz is {cmd.argsz}, with a PASID at least {at + size} is needed")
    cmd.pasid = int.from_bytes(caller.copy_from_user(uptr + at, size), "little")
