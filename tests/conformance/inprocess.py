"""The backend without a wire: the core's Context called directly, one fresh machine a program."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, TypeVar

from iommufdd.context import Context
from iommufdd.errors import IommufdError
from iommufdd.user import PAGE_SIZE, Caller, FaultGate, File, PageFile, Task
from iommufdd.wiring import new_machine

from .files import DEFAULT_POLLMASK
from .memory import fail
from .process import Driver

if TYPE_CHECKING:
    from collections.abc import Callable

    from .process import Process

T = TypeVar("T")


class Registers(PageFile):
    """What a live mapping of the iommufd shows to the CPU; the core's file for it is its life."""

    pinnable = False

    def __init__(self, vma: File, offset: int, data: bytearray | memoryview) -> None:
        self.vma = vma
        self.offset = offset  # of the first byte, as a position in the iommufd
        self.data = data

    def release(self) -> None:
        self.vma.put()

    def size(self) -> int:
        return self.offset + len(self.data)

    def pread(self, pos: int, length: int) -> bytes:
        return bytes(self.data[pos - self.offset : pos - self.offset + length])

    def pwrite(self, pos: int, data: bytes) -> int:
        at = pos - self.offset
        data = data[: len(self.data) - at]
        self.data[at : at + len(data)] = data
        return len(data)


class InProcess(Driver):
    """A machine with iommufd."""

    def __init__(self) -> None:
        self.machine = new_machine("")
        self.callers: dict[Process, Caller] = {}

    def started(self, process: Process, parent: Process | None) -> None:
        task = Task(self.machine.user(0))
        self.callers[process] = Caller(task, process.space, process.space, process.files, FaultGate())
        self.credentials_changed(process)

    def credentials_changed(self, process: Process) -> None:
        cred, task = process.credentials, self.callers[process].task
        task.user = self.machine.user(cred.uid)
        task.cap_ipc_lock = task.cap_sys_resource = task.cap_sys_rawio = cred.privileged
        task.memlock = cred.memlock

    def exited(self, process: Process) -> None:
        del self.callers[process]

    def open(self, process: Process, path: str) -> File:
        return Context(self.machine, container=path == "/dev/vfio/vfio")

    def ioctl(self, process: Process, file: File, cmd: int, arg: int) -> int:
        if not isinstance(file, Context):
            raise fail(errno.ENOTTY)
        caller = self.callers[process]
        rc = file.ioctl(caller, cmd, arg)
        if rc < 0:
            raise OSError(-rc, caller.error.reason if caller.error else os.strerror(-rc))
        return rc

    def read(self, process: Process, file: File, addr: int, count: int) -> int:
        return _call(lambda: file.read(self.callers[process], addr, count))

    def write(self, process: Process, file: File, addr: int, count: int) -> int:
        return _call(lambda: file.write(self.callers[process], addr, count))

    def poll(self, process: Process, file: File) -> int:
        return DEFAULT_POLLMASK if type(file).poll is File.poll else file.poll()

    def mmap(self, process: Process, file: File, offset: int, length: int, prot: int, flags: int) -> PageFile:
        if not isinstance(file, Context):
            raise fail(errno.ENODEV)
        vma = _call(lambda: file.mmap(self.callers[process], offset, length, prot, flags))
        return Registers(vma, offset, vma.region.data)

    def pinned_kib(self, process: Process) -> tuple[int, int]:
        kib = PAGE_SIZE >> 10
        return process.space.pinned_vm * kib, process.space.locked_vm * kib


def _call(call: Callable[[], T]) -> T:
    """Answers as a system call does: OSError."""
    try:
        return call()
    except IommufdError as error:
        raise OSError(error.errno, error.reason) from error
