"""/dev/kvm (virt/kvm/kvm_main.c: kvm_dev_ioctl): what this KVM can, and new VMs."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

import iommufd_uapi.kvm as uapi
from iommufdd.errors import EINVAL, ENODEV, IommufdError
from iommufdd.user import Gate, IoctlFile

if TYPE_CHECKING:
    from collections.abc import Callable

    from iommufdd.machine import Machine
    from iommufdd.user import Caller

WIDEST = 52  # bits of a guest-physical address


class KvmFile(IoctlFile):
    """A file of KVM's that takes ioctls."""

    machine: Machine

    def mmap(self, caller: Caller, offset: int, length: int, prot: int, flags: int) -> NoReturn:
        """mmap(2): ENODEV"""
        raise ENODEV(f"{self} cannot be mapped")


class KvmDevice(KvmFile):
    """An open /dev/kvm. VMs that came of it do not need it."""

    def __init__(self, machine: Machine, new_vm: Callable[[Caller], KvmFile]) -> None:
        """new_vm: makes a VM whose memory is the caller's address space."""
        self.refs = 1
        self.machine = machine
        self.events = machine.events
        self._new_vm = new_vm

    def __str__(self) -> str:
        return "/dev/kvm"

    def _ioctl(self, caller: Caller, cmd: int, uptr: int) -> int:
        """kvm_dev_ioctl(); x86 answers EINVAL to what it does not know."""
        if cmd == uapi.KVM_GET_API_VERSION:
            if uptr:
                raise EINVAL("an argument that means nothing")
            return uapi.KVM_API_VERSION
        if cmd == uapi.KVM_CREATE_VM:
            return self._create_vm(caller, uptr)
        if cmd == uapi.KVM_CHECK_EXTENSION:
            return check_extension(uptr)
        raise EINVAL(f"ioctl {cmd:#x} is not known")

    def _create_vm(self, caller: Caller, vm_type: int) -> int:
        """KVM_CREATE_VM: EMFILE, ENOMEM, EINVAL (kvm_dev_ioctl_create_vm). The descriptor of the VM."""
        fd = caller.get_unused_fd()
        try:
            caller.gate(Gate.MEMORY)
            if vm_type:
                raise EINVAL(f"VMs of type {vm_type} are not known")
        except IommufdError:
            caller.files.put_unused_fd(fd)
            raise
        caller.files.fd_install(fd, self._new_vm(caller))
        return fd


def check_extension(cap: int, *, external_tdp: bool = True) -> int:
    """KVM_CHECK_EXTENSION: 0 for what it has not. external_tdp: KVM_CREATE_TDP_FD is built."""
    known = {
        uapi.KVM_CAP_USER_MEMORY: 1,
        uapi.KVM_CAP_NR_VCPUS: uapi.KVM_MAX_VCPUS,
        uapi.KVM_CAP_NR_MEMSLOTS: uapi.KVM_USER_MEM_SLOTS,
        uapi.KVM_CAP_MAX_VCPUS: uapi.KVM_MAX_VCPUS,
        uapi.KVM_CAP_READONLY_MEM: 1,
        uapi.KVM_CAP_MULTI_ADDRESS_SPACE: uapi.KVM_ADDRESS_SPACE_NUM,
        uapi.KVM_CAP_TDP_FD: int(external_tdp),
        uapi.KVM_CAP_TDP_MAXPHYADDR: WIDEST,
        uapi.KVM_CAP_TDP_CHECK: 1,
        uapi.KVM_CAP_TDP_MMIO_MARKS: 1,
    }
    return known.get(cap, 0)
