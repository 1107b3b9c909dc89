"""Threads that have called on a mount, and who they are."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from iommufdd.server.seccomp.procmm import ProcMm, Vma
from iommufdd.server.seccomp.target import CallerMemory, Process, TaskFolder
from iommufdd.user import Caller

from .files import BACKED_DEVICES, OUR_DEVICES, MountDescriptors

if TYPE_CHECKING:
    from .session import Session


class MountMm(ProcMm):
    """An mm of which we do not touch what is mapped from our own mounts: that page fault would wait for us."""

    def find(self, addr: int) -> Vma | None:
        vma = super().find(addr)
        return None if vma is not None and vma.dev in OUR_DEVICES and vma.dev not in BACKED_DEVICES else vma


class MountProcess(Process):
    """A thread group that uses a mount."""

    mm_type = MountMm


class Thread(TaskFolder):
    """A task that has called."""

    def __init__(self, session: Session, process: Process, tid: int) -> None:
        """OSError when it is gone; EMFILE."""
        super().__init__(process, tid)
        self.files = MountDescriptors(session, self)
        self.caller = Caller(process.task, process.mm, CallerMemory(process), self.files, process.gate)

    @property
    def alive(self) -> bool:
        """Whether the number is still this task's."""
        try:
            os.stat("../comm", dir_fd=self.folder)
        except OSError:
            return False
        return True


class Buffer:
    """The memory of a READ or WRITE: the kernel copies it. A `user.UserMemory` from address 0."""

    def __init__(self, data: bytes | bytearray) -> None:
        self.data = data

    def read(self, addr: int, length: int) -> bytes:
        return bytes(self.data[addr : addr + length])

    def write(self, addr: int, data: bytes) -> int:
        assert isinstance(self.data, bytearray)
        part = data[: max(len(self.data) - addr, 0)]
        self.data[addr : addr + len(part)] = part
        return len(part)
