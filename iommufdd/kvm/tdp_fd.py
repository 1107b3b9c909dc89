"""The descriptor that stands for a VM's table (RFC p03 to p08; virt/kvm/tdp_fd.c there)."""

from __future__ import annotations

import select
from typing import TYPE_CHECKING, NoReturn

import iommufd_uapi.kvm as uapi
from iommufdd.errors import EBUSY, EINVAL, ENODEV, EPERM
from iommufdd.iommu.ops import TdpMetadata
from iommufdd.iommu.walk import EXEC, READ, WRITE
from iommufdd.user import File, Gate

from . import ept

if TYPE_CHECKING:
    from iommufdd.user import Caller, Mm

    from .mmu import Importer
    from .vm import Vm

DEFAULT_POLLMASK = select.POLLIN | select.POLLOUT | select.POLLRDNORM | select.POLLWRNORM


class TdpFile(File):
    """struct kvm_tdp_fd: keeps its VM; descriptors and importers keep it."""

    def __init__(self, vm: Vm, as_id: int) -> None:
        self.refs = 1
        self.vm = vm
        self.as_id = as_id
        self.root_hpa = vm.mmu.load_root(vm.table_levels)
        self.importers: dict[object, Importer] = {}  # by its table of functions
        vm.get()
        vm.exported[as_id] = self
        vm.mmu.importers = self.importers.values()

    def __str__(self) -> str:
        return f"the exported table of {self.vm}"

    def release(self) -> None:
        """The last descriptor and importer are gone: the table goes, and lets the VM go."""
        if self.vm.mmu.checks is not None:
            self.vm.mmu.checks.released(self)
        self.importers.clear()
        del self.vm.exported[self.as_id]
        self.vm.mmu.drop_root()
        self.vm.put()

    def ioctl(self, caller: Caller, cmd: int, uptr: int) -> NoReturn:
        """ENODEV"""
        raise ENODEV("a TDP fd has no ioctls")

    def mmap(self, caller: Caller, offset: int, length: int, prot: int, flags: int) -> NoReturn:
        """ENODEV"""
        raise ENODEV("a TDP fd cannot be mapped")

    def poll(self) -> int:
        """That of a file that knows nothing of poll."""
        return DEFAULT_POLLMASK

    # ---- struct kvm_exported_tdp_ops ----

    def get_metadata(self) -> TdpMetadata | None:
        """What a driver must know of the table; None where there is nothing to say."""
        mmu = self.vm.mmu
        masks = ept.reserved_masks(self.vm.maxphyaddr, mmu.max_level)
        return TdpMetadata(uapi.KVM_TDP_TYPE_EPT, mmu.level, self.root_hpa, mmu.max_level, masks)

    def register_importer(self, caller: Caller, ops: object, importer: Importer) -> None:
        """Tell an importer of every change: EINVAL; ENOMEM; EBUSY its kind is there already."""
        if ops is None:
            raise EINVAL("an importer without functions")
        caller.gate(Gate.MEMORY)
        if ops in self.importers:
            raise EBUSY(f"{self} is in use by another HWPT")
        self.importers[ops] = importer

    def unregister_importer(self, ops: object, importer: Importer) -> None:
        """Nothing for one that is not there."""
        if self.importers.get(ops) is importer:
            del self.importers[ops]

    def fault(self, mm: Mm, gfn: int, access: int) -> None:
        """Make a guest page present for a device: EINVAL, EPERM, EFAULT (kvm_tdp_fd's fault operation)."""
        vm = self.vm
        if vm.dying:
            raise EINVAL("the VM is being destroyed")
        if not access & (READ | WRITE | EXEC):
            raise EINVAL("a fault without an access")
        if mm is not vm.mm:
            raise EINVAL("the HWPT belongs to another address space than the VM")
        if not mm.alive:
            raise EPERM("the VMM has gone")
        if gfn in vm.mmu.write_tracked:
            raise EINVAL(f"writes to guest page {gfn:#x} are tracked")
        vm.mmu.fault(gfn, access)
        if vm.mmu.checks is not None:
            vm.mmu.checks.resolved()
