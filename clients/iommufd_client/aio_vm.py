"""Room client: VMs over Trio."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from iommufd_uapi import kvm, wire

from . import vm
from .aio_connection import Connection, File
from .channel import hello
from .connection import default_socket_path
from .files import fd_number
from .memory import NO_MEMORY

if TYPE_CHECKING:
    from .files import HasFileno
    from .guest import GuestMemory, Slice


class Vm(Connection):
    """One VM; see `iommufd_client.Vm`."""

    _slots: dict[int, int]

    @classmethod
    async def open(
        cls,
        socket_path: str | None = None,
        *,
        mm: int = 0,
        machine: str = "",
        context: HasFileno | int | None = None,
        explain: bool = False,
    ) -> Self:
        """On the machine of this name, or on that of a context's identity. ENOENT, EBADFD."""
        self = cls(socket_path or default_socket_path(), explain=explain, kind=wire.Kind.VM)
        self._slots = {}
        fds = [] if context is None else [fd_number(context)]
        await self._connect(hello(wire.Kind.VM, mm=mm, machine=machine), fds)
        return self

    async def check_extension(self, cap: int) -> int:
        """KVM_CHECK_EXTENSION: 0 for what it has not."""
        return await self.ioctl(kvm.KVM_CHECK_EXTENSION, cap, memory=NO_MEMORY)

    async def enable_cap(self, cap: int, value: int = 1) -> None:
        """KVM_ENABLE_CAP of one with a number for argument. EINVAL."""
        await self.ioctl(kvm.KvmEnableCap(cap=cap, args=(value, 0, 0, 0)))

    async def create_vcpu(self, vcpu_id: int) -> File:
        """KVM_CREATE_VCPU. EEXIST; EINVAL."""
        return File(await self.ioctl(kvm.KVM_CREATE_VCPU, vcpu_id, memory=NO_MEMORY), self)

    async def set_user_memory_region(
        self, slot: int, gpa: int, memory: GuestMemory | Slice | None = None, *, flags: int = 0
    ) -> None:
        """KVM_SET_USER_MEMORY_REGION; without memory the slot goes. EINVAL, EEXIST."""
        region = vm.region(slot, gpa, memory, flags)
        await self.ioctl(region)
        self._slots[slot] = region.memory_size

    async def get_dirty_log(self, slot: int) -> bytes:
        """KVM_GET_DIRTY_LOG. ENOENT when the slot does not log."""
        call, bitmap = vm.dirty_log(slot, self._slots.get(slot, 0))
        await self._call(call)
        return bytes(bitmap)

    async def create_tdp_fd(self) -> File:
        """KVM_CREATE_TDP_FD. EEXIST; EINVAL, for one without a vCPU."""
        cmd = kvm.KvmCreateTdpFd()
        await self.ioctl(cmd)
        return File(cmd.fd, self)

    async def get_tdp_info(self) -> kvm.KvmTdpInfo:
        """KVM_GET_TDP_INFO: the exported table, and counts."""
        info = kvm.KvmTdpInfo()
        await self.ioctl(info)
        return info
