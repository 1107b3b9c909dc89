"""A VM: its memory, its vCPUs by number, and the table it can export (virt/kvm/kvm_main.c, RFC p03 and p35 to p39).

A model of KVM's MMU, not a hypervisor: vCPUs do not run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, NoReturn

import iommufd_uapi.kvm as uapi
from iommufdd.errors import (
    EEXIST,
    EINVAL,
    EIO,
    ENODEV,
    ENOENT,
    ENOTTY,
    EOPNOTSUPP,
    IommufdError,
)
from iommufdd.user import PAGE_SHIFT, File, Gate

from .dev import WIDEST, KvmFile, check_extension
from .invariants import Invariants
from .mmu import Mmu
from .slots import Change, MemorySlot, MemorySlots
from .tdp_fd import TdpFile

if TYPE_CHECKING:
    from iommufdd.machine import Machine
    from iommufdd.user import Caller, Mm


class Features(NamedTuple):
    """How this KVM was built, and the processor under it."""

    external_tdp: bool = True  # KVM_CREATE_TDP_FD is built (RFC p39)
    metadata: bool = True  # the vendor module can describe its table
    tdp_mmu: bool = True
    hyperv: bool = False  # built for a paravirtual flush that importers would not hear of
    high_present_bit: bool = True  # RFC p24: KVM's mark is bit 59 and not bit 11
    max_level: int = 3  # of leaf entries: EPT's capability and KVM's limit


class Vcpu(File):
    """A vCPU's descriptor: keeps the VM. It does not run."""

    def __init__(self, vm: Vm) -> None:
        self.refs = 1
        self.vm = vm
        vm.get()

    def release(self) -> None:
        self.vm.put()

    def ioctl(self, caller: Caller, cmd: int, uptr: int) -> NoReturn:
        """EIO, EINVAL (kvm_vcpu_ioctl)"""
        if caller.mm is not self.vm.mm:
            raise EIO("the VM belongs to another address space")
        raise EINVAL(f"ioctl {cmd:#x} is not known: vCPUs do not run")


class Vm(KvmFile):
    """struct kvm. Descriptors of it, of vCPUs and of an exported table keep it."""

    def __init__(self, machine: Machine, mm: Mm, features: Features | None = None) -> None:
        """mm: whose addresses its memory slots name, and the only one whose calls are heard."""
        self.refs = 1
        self.machine = machine
        self.events = machine.events
        self.mm = mm
        self.features = features or Features()
        self.slots = [MemorySlots() for _ in range(uapi.KVM_ADDRESS_SPACE_NUM)]
        self.mmu = Mmu(mm, self.slots[0], machine.memory, self.features.max_level)
        self.vcpus: dict[int, int] = {}  # width of guest-physical addresses by vCPU id
        self.width = WIDEST  # of vCPUs still to come
        self.exported: dict[int, TdpFile] = {}  # by address space
        self.noncoherent_dma = 0  # assigned devices whose DMA does not snoop
        self.dying = False
        mm.notifiers = (*mm.notifiers, self)

    def __str__(self) -> str:
        return "the VM"

    def release(self) -> None:
        """kvm_destroy_vm()"""
        self.dying = True
        self.mm.notifiers = tuple(each for each in self.mm.notifiers if each is not self)
        self.mmu.drop_root()
        if self.mmu.checks is not None:
            self.mmu.checks.end()

    def _ioctl(self, caller: Caller, cmd: int, uptr: int) -> int:
        """kvm_vm_ioctl()"""
        if caller.mm is not self.mm:
            raise EIO("the VM belongs to another address space")
        if cmd == uapi.KVM_CHECK_EXTENSION:
            return check_extension(uptr, external_tdp=self.features.external_tdp)
        if cmd == uapi.KVM_CREATE_VCPU:
            return self._create_vcpu(caller, uptr)
        execute = {
            uapi.KVM_GET_DIRTY_LOG: self._get_dirty_log,
            uapi.KVM_SET_USER_MEMORY_REGION: self._set_user_memory_region,
            uapi.KVM_ENABLE_CAP: self._enable_cap,
            uapi.KVM_CREATE_TDP_FD: self._create_tdp_fd,
            uapi.KVM_GET_TDP_INFO: self._get_tdp_info,
        }.get(cmd)
        if execute is None:
            raise ENOTTY(f"ioctl {cmd:#x} is not known")
        execute(caller, uptr)
        return 0

    # ---- vCPUs ----

    @property
    def maxphyaddr(self) -> int:
        """Of the vCPU that has the least."""
        return min(self.vcpus.values(), default=self.width)

    @property
    def table_levels(self) -> int:
        """kvm_mmu_get_tdp_level()"""
        return 5 if self.maxphyaddr > 48 else 4

    def _create_vcpu(self, caller: Caller, vcpu_id: int) -> int:
        """KVM_CREATE_VCPU: EINVAL, EEXIST, ENOMEM, EMFILE."""
        if vcpu_id >= uapi.KVM_MAX_VCPUS:
            raise EINVAL(f"vCPU {vcpu_id}, there are at most {uapi.KVM_MAX_VCPUS}")
        caller.gate(Gate.MEMORY)
        if vcpu_id in self.vcpus:
            raise EEXIST(f"vCPU {vcpu_id} is there")
        fd = caller.get_unused_fd()
        caller.files.fd_install(fd, Vcpu(self))
        self.vcpus[vcpu_id] = self.width
        self.mmu.vcpus = len(self.vcpus)
        return fd

    def vcpu_access(self, gpa: int, access: int) -> None:
        """A vCPU touches guest memory: EFAULT. The table that it fills is the one that may be exported."""
        if not self.vcpus:
            raise EINVAL("there is no vCPU")
        self.mmu.load_root(self.mmu.level or self.table_levels)
        self.mmu.fault(gpa >> PAGE_SHIFT, access)

    # ---- what the VM can ----

    def _enable_cap(self, caller: Caller, uptr: int) -> None:
        """KVM_ENABLE_CAP: EFAULT, EINVAL."""
        cmd = uapi.KvmEnableCap.unpack(caller.copy_from_user(uptr, uapi.KvmEnableCap.SIZEOF))
        value = cmd.args[0]
        if cmd.flags or any(cmd.args[1:]):
            raise EINVAL("flags, or arguments that mean nothing")
        if cmd.cap == uapi.KVM_CAP_TDP_MAXPHYADDR and 1 <= value <= WIDEST:
            self.width = value
        elif cmd.cap == uapi.KVM_CAP_TDP_CHECK and value <= 1:
            self.check(wanted=bool(value))
        elif cmd.cap == uapi.KVM_CAP_TDP_MMIO_MARKS and value <= 1:
            self.mmu.mmio_marks = bool(value)
        else:
            raise EINVAL(f"capability {cmd.cap:#x} cannot be enabled with {value}")

    def check(self, *, wanted: bool = True) -> Invariants | None:
        """Look at the invariants from now on, or no longer."""
        mmu = self.mmu
        if wanted and mmu.checks is None:
            mmu.checks = Invariants(self)
        elif not wanted and mmu.checks is not None:
            mmu.checks.end()
            mmu.checks = None
        return mmu.checks

    # ---- memory ----

    def _set_user_memory_region(self, caller: Caller, uptr: int) -> None:
        """KVM_SET_USER_MEMORY_REGION: EFAULT, EINVAL, EEXIST, ENOMEM."""
        layout = uapi.KvmUserspaceMemoryRegion
        region = layout.unpack(caller.copy_from_user(uptr, layout.SIZEOF))
        as_id = region.slot >> 16
        slots = self.slots[as_id] if as_id < len(self.slots) else self.slots[0]
        change, slot_id = slots.check(region)
        if change is Change.NONE:
            return
        caller.gate(Gate.MEMORY)
        slots.generation += 1
        if change is Change.FLAGS:
            self._log(slots.by_id[slot_id], region)
            return
        if change is Change.CREATE:
            slots.by_id[slot_id] = MemorySlot(slot_id, region)
            if as_id == 0 and self.mmu.mmio_marks:  # what was nobody's has memory now
                self.mmu.zap(slots.by_id[slot_id].base_gfn, slots.by_id[slot_id].last_gfn)
            return
        del slots.by_id[slot_id]
        if as_id == 0:
            self.mmu.zap_all()  # an exported table stays, and loses all it has (RFC p36)
        if change is Change.MOVE:
            slots.by_id[slot_id] = MemorySlot(slot_id, region)

    def _log(self, slot: MemorySlot, region: uapi.KvmUserspaceMemoryRegion) -> None:
        """Begin or end to log writes: from now on each must be seen once."""
        slot.flags = region.flags
        if region.flags & uapi.KVM_MEM_LOG_DIRTY_PAGES:
            slot.dirty = set()
            if slot in self.slots[0]:
                self.mmu.write_protect(slot.base_gfn, slot.last_gfn)
        else:
            slot.dirty = None

    def _get_dirty_log(self, caller: Caller, uptr: int) -> None:
        """KVM_GET_DIRTY_LOG: EFAULT, EINVAL, ENOENT."""
        log = uapi.KvmDirtyLog.unpack(caller.copy_from_user(uptr, uapi.KvmDirtyLog.SIZEOF))
        as_id, slot_id = log.slot >> 16, log.slot & 0xFFFF
        if as_id >= len(self.slots) or slot_id >= uapi.KVM_USER_MEM_SLOTS:
            raise EINVAL(f"slot {slot_id} of address space {as_id}")
        slot = self.slots[as_id].by_id.get(slot_id)
        if slot is None or slot.dirty is None:
            raise ENOENT(f"slot {slot_id} is not there, or does not log")
        dirty = slot.take_dirty()
        if dirty and as_id == 0:
            self.mmu.write_protect(min(dirty), max(dirty))
        uptr = log.dirty_bitmap
        for piece in slot.bitmap(dirty):
            caller.copy_to_user(uptr, piece)
            uptr += len(piece)

    # ---- struct mmu_notifier ----

    def invalidate_range(self, start: int, end: int) -> None:
        """The VMM unmaps or changes [start, end) (kvm_mmu_notifier_invalidate_range_start)."""
        for first, last in self.slots[0].in_range(start, end):
            self.mmu.zap(first, last)

    def mm_release(self) -> None:
        """The VMM has gone (kvm_mmu_notifier_release)."""
        if self.mmu.root:
            self.mmu.zap_all()

    def clear_flush_young(self, start: int, end: int) -> bool:
        """Whether [start, end) was in use since last time; then that is forgotten (struct mmu_notifier_ops)."""
        young = False
        for first, last in self.slots[0].in_range(start, end):
            young |= self.mmu.age(first, last)
        return young

    def write_track(self, gfn: int, *, tracked: bool = True) -> None:
        """Somebody must see every write to a guest page, or no longer (kvm_page_track)."""
        if tracked:
            self.mmu.write_tracked.add(gfn)
            self.mmu.write_protect(gfn, gfn)
        else:
            self.mmu.write_tracked.discard(gfn)

    def register_noncoherent_dma(self) -> None:
        """A device whose DMA does not snoop joins: EINVAL while the table is exported."""
        if self.exported:
            raise EINVAL("the table is exported, and its importers would have to change memory types")
        self.noncoherent_dma += 1

    # ---- the exported table ----

    def _create_tdp_fd(self, caller: Caller, uptr: int) -> None:
        """KVM_CREATE_TDP_FD: EFAULT, EOPNOTSUPP, EINVAL, EEXIST, ENOMEM, ENODEV, EMFILE (RFC p03, p35)."""
        cmd = uapi.KvmCreateTdpFd.unpack(caller.copy_from_user(uptr, uapi.KvmCreateTdpFd.SIZEOF))
        if not self.features.external_tdp:
            raise EOPNOTSUPP("this KVM was built without exported tables")
        if cmd.as_id >= uapi.KVM_ADDRESS_SPACE_NUM or cmd.pad or cmd.mode:
            raise EINVAL("an address space that is not there, or mode or pad is not 0")
        if cmd.as_id in self.exported:
            raise EEXIST(f"address space {cmd.as_id} is exported already")
        caller.gate(Gate.MEMORY)
        if self.dying:
            raise ENODEV("the VM is being destroyed")
        if not self.features.metadata:
            raise EOPNOTSUPP("the vendor module cannot describe its table")
        caller.gate(Gate.MEMORY)
        self._check_exportable(cmd.as_id)
        cmd.fd = caller.get_unused_fd()
        file = TdpFile(self, cmd.as_id)
        try:
            caller.copy_to_user(uptr, cmd.pack())
        except IommufdError:
            caller.files.put_unused_fd(cmd.fd)
            file.put()
            raise
        caller.files.fd_install(cmd.fd, file)

    def _check_exportable(self, as_id: int) -> None:
        """kvm_arch_exported_tdp_init(): EINVAL."""
        features = self.features
        for refused, why in (
            (as_id != 0, "the table of system management mode cannot be exported"),
            (not features.tdp_mmu, "the TDP MMU is off"),
            (features.hyperv, "this KVM is built for Hyper-V's flushes, which importers do not hear of"),
            (not features.high_present_bit, "KVM's present bit is bit 11, which an IOMMU reads as SNP"),
            (not self.vcpus, "there is no vCPU yet"),
            (self.maxphyaddr < 32, "a vCPU has less than 32 bits of guest-physical address"),
            (self.noncoherent_dma > 0, "a device whose DMA does not snoop is assigned"),
        ):
            if refused:
                raise EINVAL(why)

    def _get_tdp_info(self, caller: Caller, uptr: int) -> None:
        """KVM_GET_TDP_INFO, which no kernel has: EFAULT."""
        stats, checks = self.mmu.stats, self.mmu.checks
        importers = sum(len(tdp.importers) for tdp in self.exported.values())
        info = uapi.KvmTdpInfo(
            faults=stats.faults, failed=stats.failed, mapped=stats.mapped, zapped=stats.zapped, flushes=stats.flushes,
            present=stats.present, tables=stats.tables, importers=importers,
            violations=checks.count if checks is not None else 0,
        )  # fmt: skip
        tdp = self.exported.get(0)
        metadata = tdp.get_metadata() if tdp is not None else None
        if metadata is not None:
            info.type, info.level, info.root_hpa = metadata.type, metadata.level, metadata.root_hpa
            info.max_huge_page_level, info.rsvd_bits_mask = metadata.max_huge_page_level, metadata.rsvd_bits_mask
        caller.copy_to_user(uptr, info.pack())
