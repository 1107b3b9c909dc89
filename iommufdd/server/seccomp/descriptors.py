"""The descriptor table of a traced task, as the core sees it: struct files_struct.

Our descriptors get numbers from a base on, where the filter notifies read, write, lseek, mmap and dup too. A
number is known before anything is installed, so that the reply is written first, as the kernel does.
"""

from __future__ import annotations

import itertools
import os
from typing import TYPE_CHECKING

from iommufdd.errors import EMFILE
from iommufdd.eventq import EventqFile
from iommufdd.server.memory import OtherFile
from iommufdd.server.vms import ServedVm
from iommufdd.user import File

from .fds import DESCRIPTORS
from .procfile import reopened
from .sys import AT_FDCWD

if TYPE_CHECKING:
    from iommufdd.server.files import FileKey, Pipe
    from iommufdd.server.vms import AnyOpened

    from .fds import Installed
    from .notify import Supervisor
    from .target import Thread


class TargetDescriptors:
    """A `user.FileTable` over /proc/TID/fd."""

    def __init__(self, supervisor: Supervisor, thread: Thread) -> None:
        self.supervisor = supervisor
        self.thread = thread
        self.opened: AnyOpened | None = None  # whose call this is
        self._reserved: set[int] = set()

    def key(self, fd: int) -> FileKey | None:
        """Which inode a number shows; None when it is not open."""
        try:
            status = os.stat(str(fd), dir_fd=self.thread.folder)
        except (OSError, ValueError):
            return None
        return status.st_dev, status.st_ino, status.st_uid

    def fget(self, fd: int) -> File | None:
        if not 0 <= fd < 1 << 31:
            return None
        key = self.key(fd)
        if key is None:
            return None
        found = self.supervisor.find(key)
        if found is not None:
            return found.file
        try:
            own = self._own(fd)
        except OSError:
            return OtherFile()
        return self.supervisor.files.opened(own)

    def _own(self, fd: int) -> int:
        """A descriptor of our own on the file behind a number. OSError."""
        return reopened(self.thread.folder, fd, cautious=self.supervisor.files.cautious)

    def place(self, folder: int) -> str:
        """The path of a descriptor of a folder, or AT_FDCWD. OSError."""
        return os.readlink(f"/proc/{self.thread.tid}/" + ("cwd" if folder == AT_FDCWD else f"fd/{folder}"))

    def prepare(self, cmd: int, arg: int) -> None:
        """All that an ioctl will want to know of descriptors can be found out when it does."""

    def prepare_number(self, least: int = 0) -> None:
        """And so can a free number."""

    def close(self) -> None:
        """The task is forgotten."""

    # ---- new numbers ----

    def free_number(self, least: int = 0, *, lowest: bool = False) -> int:
        """The lowest free number from the base (or `least`) on; the highest below it when there is none. EMFILE.

        `lowest`: of all, for files whose read() and write() are the kernel's.
        """
        limit = self.thread.process.nofile()
        base = 0 if lowest else max(self.supervisor.base, least)
        for fd in itertools.chain(range(base, limit), range(min(base, limit) - 1, -1, -1)):
            if fd not in self._reserved and self._is_free(fd):
                return fd
        raise EMFILE(f"all {limit} descriptor numbers are in use")

    def _is_free(self, fd: int) -> bool:
        try:
            os.stat(str(fd), dir_fd=self.thread.folder, follow_symlinks=False)
        except FileNotFoundError:
            return True
        except OSError:
            return False
        return False

    def get_unused_fd(self) -> int:
        fd = self.free_number()
        assert self.opened is not None
        nofile, uid = self.supervisor.server.nofile, self.opened.uid
        nofile.charge(uid, DESCRIPTORS)  # whether they can be had; fd_install() takes them for good
        nofile.uncharge(uid, DESCRIPTORS)
        self._reserved.add(fd)
        return fd

    def put_unused_fd(self, fd: int) -> None:
        self._reserved.discard(fd)

    def fd_install(self, fd: int, file: File) -> None:
        self._reserved.discard(fd)
        assert self.opened is not None
        if isinstance(file, EventqFile):
            self._install_pipe(fd, file, self.opened)
        elif isinstance(file, ServedVm):  # it is opened as /dev/iommu is, only by an ioctl
            installed = self.supervisor.watch.install(file.opened, file)
            installed.report = self.supervisor.report
            self._install_memfd(fd, installed)
        else:
            self._install_memfd(fd, self.supervisor.watch.install(self.opened, file))

    def _install_pipe(self, fd: int, file: EventqFile, opened: AnyOpened) -> None:
        pipes = self.supervisor.server.pipes
        pipe: Pipe = pipes.reserve(opened, opened.uid)
        pipes.publish(pipe, file)
        try:
            self.add(fd, pipe.read_fd)
        except OSError:
            pass  # the process is gone; the pipe has no reader then, and goes too
        pipes.sent(pipe)

    def _install_memfd(self, fd: int, installed: Installed) -> None:
        own = installed.open()
        try:
            self.add(fd, own)
        except OSError:
            pass
        os.close(own)
        installed.check()

    def install_opened(self, installed: Installed, *, cloexec: bool) -> None:
        """Answer an open with a new number. EMFILE, OSError."""
        own = installed.open()
        try:
            self.add(self.free_number(), own, cloexec=cloexec, send=True)
        finally:
            os.close(own)
            installed.check()

    def add(self, fd: int, own: int, *, cloexec: bool = True, send: bool = False) -> None:
        """Put a descriptor of ours into the process at a number; `send` also answers its call. OSError."""
        self.supervisor.add(own, fd, cloexec=cloexec, send=send)
