"""An open /dev/iommu: the ioctl table on one screen, and the dispatcher (main.c, lower half)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, TypeVar

import iommufd_uapi.iommufd as uapi
from iommufd_uapi.iommufd_test import TestCmd
from iommufd_uapi.layout import Ioctl

from . import eventq, hw_pagetable, ioas, iova_bitmap, selftest, veventq, vfio_compat, viommu
from .change_process import ioas_change_process
from .device import IommufdGroup, get_hw_info
from .doorbells import Doorbells
from .errors import EFAULT, EINVAL, ENOTTY
from .mmap import MmapRegions, Vma
from .objects import ObjectTable
from .pages import Account
from .ucmd import Ucmd
from .user import Gate, IoctlFile
from .user_data import copy_struct_from_user

if TYPE_CHECKING:
    from collections.abc import Callable

    from .iommu.group import IommuGroup
    from .machine import Machine
    from .user import Caller

C = TypeVar("C", bound=Ioctl)


class IoctlOp(Generic[C]):
    """One row of the table; a handler that takes another structure is a type error."""

    __slots__ = ("cmd", "execute", "min_size", "size", "unpack")

    def __init__(self, struct: type[C], execute: Callable[[Ucmd, C], int | None]) -> None:
        self.cmd = struct.CMD
        self.size = struct.SIZEOF
        self.min_size = struct.MIN_SIZE
        self.unpack = struct.unpack
        self.execute = execute


def destroy(ucmd: Ucmd, cmd: uapi.Destroy) -> None:
    """IOMMU_DESTROY: ENOENT, EBUSY."""
    ucmd.ictx.objects.remove(cmd.id)


IOCTL_OPS: tuple[IoctlOp[Any], ...] = (
    IoctlOp(uapi.Destroy, destroy),
    IoctlOp(uapi.IoasAlloc, ioas.ioas_alloc),
    IoctlOp(uapi.IoasAllowIovas, ioas.ioas_allow_iovas),
    IoctlOp(uapi.IoasCopy, ioas.ioas_copy),
    IoctlOp(uapi.IoasIovaRanges, ioas.ioas_iova_ranges),
    IoctlOp(uapi.IoasMap, ioas.ioas_map),
    IoctlOp(uapi.IoasUnmap, ioas.ioas_unmap),
    IoctlOp(uapi.Option, ioas.option),
    IoctlOp(uapi.VfioIoas, vfio_compat.vfio_ioas),
    IoctlOp(uapi.HwptAlloc, hw_pagetable.hwpt_alloc),
    IoctlOp(uapi.HwInfo, get_hw_info),
    IoctlOp(uapi.HwptSetDirtyTracking, iova_bitmap.hwpt_set_dirty_tracking),
    IoctlOp(uapi.HwptGetDirtyBitmap, iova_bitmap.hwpt_get_dirty_bitmap),
    IoctlOp(uapi.HwptInvalidate, hw_pagetable.hwpt_invalidate),
    IoctlOp(uapi.FaultAlloc, eventq.fault_alloc),
    IoctlOp(uapi.IoasMapFile, ioas.ioas_map_file),
    IoctlOp(uapi.ViommuAlloc, viommu.viommu_alloc),
    IoctlOp(uapi.VdeviceAlloc, viommu.vdevice_alloc),
    IoctlOp(uapi.IoasChangeProcess, ioas_change_process),
    IoctlOp(uapi.VeventqAlloc, veventq.veventq_alloc),
    IoctlOp(uapi.HwQueueAlloc, viommu.hw_queue_alloc),
    IoctlOp(TestCmd, selftest.test),
)
_BY_CMD = {op.cmd: op for op in IOCTL_OPS}
_FIRST_NR, _LAST_NR = 0x80, 0xA0
_COPY_IN = Gate.COPY_IN


class Context(IoctlFile):
    """struct iommufd_ctx: its file is referred to by channels, by the files it gave out and by bound devices."""

    def __init__(self, machine: Machine, *, container: bool = False) -> None:
        """container: opened as /dev/vfio/vfio, so pinned pages are charged by process as VFIO does."""
        self.refs = 1
        self.machine = machine
        self.events = machine.events
        self.objects = ObjectTable(self, self.events)
        self.account_mode = Account.MM if container else Account.USER
        self.vfio_ioas: ioas.Ioas | None = None
        self.mmaps = MmapRegions()
        self.doorbells = Doorbells(machine)
        self._groups: dict[IommuGroup, IommufdGroup] = {}

    def release(self) -> None:
        """close() of the last reference (iommufd_fops_release)."""
        self.objects.destroy_all()

    def _ioctl(self, caller: Caller, cmd: int, uptr: int) -> int:
        """iommufd_fops_ioctl(): the order of checks is ABI."""
        if self.doorbells.watched:
            self.doorbells.poll()
        op = _BY_CMD.get(cmd)
        if op is None:
            return self._unknown(caller, cmd, uptr)
        gate, size = caller.gate, op.size
        if gate.watching:
            gate(_COPY_IN)
        data = caller.memory.read(uptr, size)  # the size word and, nearly always, the whole struct
        if len(data) < 4:
            raise EFAULT(f"memory at {uptr + len(data):#x} cannot be read")
        if len(data) == size and (struct := op.unpack(data)).size == size:
            user_size = size
            if gate.watching:
                gate(_COPY_IN)
        else:
            user_size = int.from_bytes(data[:4], "little")
            if user_size < op.min_size:
                raise EINVAL(f"size is {user_size}, at least {op.min_size} is needed")
            data = copy_struct_from_user(caller, uptr, user_size, size)
            struct = op.unpack(data)
        ucmd = Ucmd(self, caller, uptr, user_size, data)
        try:
            rc = op.execute(ucmd, struct)
        except BaseException:
            if ucmd.new_obj is not None:
                self.objects.abort(ucmd.new_obj)
            raise
        if ucmd.new_obj is not None:
            self.objects.finalize(ucmd.new_obj)
        return rc or 0

    def _unknown(self, caller: Caller, cmd: int, uptr: int) -> int:
        """A number without a row: VFIO's, or ENOTTY, for which numbers of our own still read the size."""
        if not _FIRST_NR <= cmd & 0xFF <= _LAST_NR:
            return vfio_compat.vfio_ioctl(self, caller, cmd, uptr)
        caller.copy_from_user(uptr, 4)
        raise ENOTTY(f"ioctl {cmd:#x} is not known")

    def mmap(self, caller: Caller, offset: int, length: int, prot: int, flags: int) -> Vma:
        """mmap(2) of registers: a file that stands for the mapping; EINVAL, EPERM, ENXIO (iommufd_fops_mmap)."""
        return self.mmaps.mmap(self, offset, length, prot, flags)

    def get_group(self, group: IommuGroup) -> IommufdGroup:
        """iommufd_get_group()"""
        igroup = self._groups.setdefault(group, IommufdGroup(group))
        igroup.refs += 1
        return igroup

    def put_group(self, igroup: IommufdGroup) -> None:
        """iommufd_put_group()"""
        igroup.refs -= 1
        if not igroup.refs:
            del self._groups[igroup.group]
