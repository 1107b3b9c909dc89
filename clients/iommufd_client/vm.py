"""Room client: a VM of the daemon's small KVM, as a Python object over a blocking socket.

There is as much of it as a device needs that walks the VM's own page table.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from iommufd_uapi import kvm, wire

from . import call as calls
from .connection import Connection
from .files import File
from .memory import NO_MEMORY, Buffers

if TYPE_CHECKING:
    from .files import HasFileno
    from .guest import GuestMemory, Slice


def region(
    slot: int, gpa: int, memory: GuestMemory | Slice | None, flags: int
) -> kvm.KvmUserspaceMemoryRegion:
    """A slot that shows memory, or none."""
    size, addr = (0, 0) if memory is None else (len(memory), memory.address)
    return kvm.KvmUserspaceMemoryRegion(
        slot=slot, flags=flags, guest_phys_addr=gpa, memory_size=size, userspace_addr=addr
    )


def dirty_log(slot: int, size: int) -> tuple[calls.IoctlCall, bytearray]:
    """The call for a slot of so many bytes, and where its bitmap will be: how long that is only KVM knows."""
    buffers = Buffers()
    bitmap = bytearray(max(-(-size // (64 * 4096)), 1) * 8)
    log = kvm.KvmDirtyLog(slot=slot, dirty_bitmap=buffers.add(bitmap))
    call = calls.ioctl(log.CMD, log, buffers)
    call.segments.append(calls.Segment(log.dirty_bitmap, b"", 0, len(bitmap)))
    return call, bitmap


class Vm(Connection):
    """One VM. Its memory slots are addresses that were registered with the same address space (`mm`).

        with iommufd.guest_memory(16 << 20) as ram, iommufd.vm() as vm:
            vm.set_user_memory_region(0, 0x0, ram)
            vcpu = vm.create_vcpu(0)
            with vm.create_tdp_fd() as table:
                hwpt = iommufd.hwpt_alloc(device_id, 0, data=kvm.HwptKvm(fd=table.fileno()))

    `close()` closes its descriptor: the VM lives on while its table is exported or a vCPU is open.
    """

    def __init__(
        self,
        socket_path: str | None = None,
        *,
        mm: int = 0,
        machine: str = "",
        context: HasFileno | int | None = None,
        explain: bool = False,
    ) -> None:
        """On the machine of this name, or on that of the context that a descriptor identifies.

        OSError if there is no daemon; ENOENT no such address space; EBADFD no context.
        """
        super().__init__(socket_path, kind=wire.Kind.VM, mm=mm, machine=machine, context=context, explain=explain)
        self._slots: dict[int, int] = {}  # bytes

    def check_extension(self, cap: int) -> int:
        """KVM_CHECK_EXTENSION: 0 for what it has not."""
        return self.ioctl(kvm.KVM_CHECK_EXTENSION, cap, memory=NO_MEMORY)

    def enable_cap(self, cap: int, value: int = 1) -> None:
        """KVM_ENABLE_CAP of one with a number for argument. EINVAL."""
        self.ioctl(kvm.KvmEnableCap(cap=cap, args=(value, 0, 0, 0)))

    def create_vcpu(self, vcpu_id: int) -> File:
        """KVM_CREATE_VCPU. EEXIST; EINVAL."""
        return self.file(self.ioctl(kvm.KVM_CREATE_VCPU, vcpu_id, memory=NO_MEMORY))

    def set_user_memory_region(
        self, slot: int, gpa: int, memory: GuestMemory | Slice | None = None, *, flags: int = 0
    ) -> None:
        """KVM_SET_USER_MEMORY_REGION: guest memory at a guest address; without memory the slot goes. EINVAL, EEXIST."""
        new = region(slot, gpa, memory, flags)
        self.ioctl(new)
        self._slots[slot] = new.memory_size

    def get_dirty_log(self, slot: int) -> bytes:
        """KVM_GET_DIRTY_LOG: a bit for each page written to since last time. ENOENT when the slot does not log."""
        call, bitmap = dirty_log(slot, self._slots.get(slot, 0))
        self._call(call)
        return bytes(bitmap)

    def create_tdp_fd(self) -> File:
        """KVM_CREATE_TDP_FD: the descriptor that stands for the VM's table. EEXIST; EINVAL, for one without a vCPU."""
        cmd = kvm.KvmCreateTdpFd()
        self.ioctl(cmd)
        return self.file(cmd.fd)

    def get_tdp_info(self) -> kvm.KvmTdpInfo:
        """KVM_GET_TDP_INFO: the exported table, and counts."""
        info = kvm.KvmTdpInfo()
        self.ioctl(info)
        return info
