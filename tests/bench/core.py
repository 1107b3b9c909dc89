"""The core without a wire: a context, a caller with much memory, and structs made beforehand.

Nothing waits here, so times are CPU times of the thread: other processes do not count.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, TypeVar

from iommufd_uapi import iommufd as uapi
from iommufd_uapi import iommufd_test as test_uapi
from iommufdd.context import Context
from iommufdd.ioas import Ioas
from iommufdd.mm import Region, RegisteredMm
from iommufdd.user import Caller, FaultGate, File, PageFile, Task
from iommufdd.wiring import new_machine

if TYPE_CHECKING:
    from collections.abc import Sequence

    from iommufd_uapi.layout import Ioctl
    from iommufdd.io_pagetable import IoPagetable

I = TypeVar("I", bound="Ioctl")  # noqa: E741

STRUCT_ADDR = 0x1000
BUFFER_ADDR = 1 << 46
USER_VA = 1 << 44
USER_BYTES = 1 << 42


class Zeros(PageFile):
    """A sparse file that nobody ever writes to."""

    def size(self) -> int:
        return USER_BYTES

    def pread(self, pos: int, length: int) -> bytes:
        return bytes(length)

    def pwrite(self, pos: int, data: bytes) -> int:
        return len(data)


class CallMemory:
    """The struct of one call, and a buffer that a pointer in it may name."""

    def __init__(self) -> None:
        self.struct = b""
        self.written = b""
        self.buffer = bytearray()

    def read(self, addr: int, length: int) -> bytes:
        if addr < BUFFER_ADDR:
            at = addr - STRUCT_ADDR
            return self.struct[at : at + length]
        at = addr - BUFFER_ADDR
        return bytes(self.buffer[at : at + length])

    def write(self, addr: int, data: bytes) -> int:
        if addr < BUFFER_ADDR:
            self.written = data
        else:
            at = addr - BUFFER_ADDR
            self.buffer[at : at + len(data)] = data
        return len(data)


class NoFiles:
    """A caller without descriptors."""

    def fget(self, fd: int) -> File | None:
        return None

    def get_unused_fd(self) -> int:
        raise NotImplementedError

    def put_unused_fd(self, fd: int) -> None: ...

    def fd_install(self, fd: int, file: File) -> None: ...


class Core:
    """One open /dev/iommu. The caller is charged for what it pins, and may pin all it has."""

    def __init__(self) -> None:
        machine = new_machine("")
        self.context = Context(machine)
        self.memory = CallMemory()
        mm = RegisteredMm()
        mm.map(Region(USER_VA, USER_VA + USER_BYTES, Zeros(), 0, readable=True, writable=True))
        task = Task(machine.user(1000), memlock=USER_BYTES)
        self.caller = Caller(task, mm, self.memory, NoFiles(), FaultGate())

    def ioctl(self, struct: I) -> I:
        """The struct as the call leaves it; what it raises is what was answered."""
        self._call(struct.CMD, struct.pack())
        struct.update(self.memory.written)
        return struct

    def _call(self, cmd: int, struct: bytes) -> None:
        self.memory.struct = struct
        if self.context.ioctl(self.caller, cmd, STRUCT_ADDR) < 0:
            assert self.caller.error is not None
            raise self.caller.error

    def timed(self, structs: Sequence[Ioctl]) -> float:
        """CPU seconds for one of these ioctls of one kind; packing them is not counted."""
        cmd, memory, ioctl, caller = structs[0].CMD, self.memory, self.context.ioctl, self.caller
        packed = [struct.pack() for struct in structs]
        start = time.thread_time()
        for data in packed:
            memory.struct = data
            if ioctl(caller, cmd, STRUCT_ADDR):
                raise AssertionError(caller.error)
        return (time.thread_time() - start) / len(structs)

    def ioas_alloc(self) -> int:
        return self.ioctl(uapi.IoasAlloc()).out_ioas_id

    def iopt(self, ioas_id: int) -> IoPagetable:
        ioas = self.context.objects.get(ioas_id)
        assert isinstance(ioas, Ioas)
        return ioas.iopt

    def mock_domain(self, ioas_id: int) -> test_uapi.MockDomain:
        """A mock device, attached: what is mapped is pinned from now on."""
        cmd = self.ioctl(test_uapi.TestCmd(op=test_uapi.IOMMU_TEST_OP_MOCK_DOMAIN, id=ioas_id))
        return test_uapi.MockDomain.unpack(cmd.u)
