"""What each trapped system call does. A handler gives the call's result, minus an errno, CONTINUE or ANSWERED."""

from __future__ import annotations

import errno
import mmap
import os
from typing import TYPE_CHECKING

from iommufdd.errors import IommufdError
from iommufdd.pages import Dmabuf
from iommufdd.server.instance import OpenContext
from iommufdd.user import Gate

from . import caps, rw
from .fds import Installed
from .proc import open_proc
from .procmm import StaleError
from .registers import drop_unmapped, show
from .sys import pidfd_getfd

if TYPE_CHECKING:
    from collections.abc import Callable

    from iommufd_uapi.seccomp import Syscalls
    from iommufdd.server.files import Pipe

    from .notify import Supervisor
    from .target import Thread

    Handler = Callable[[Thread, list[int]], int]

CONTINUE = 1 << 62  # the kernel carries the call out
ANSWERED = 1 << 61  # nothing more is to be sent

PATHS = {b"/dev/iommu": False, b"/dev/vfio/vfio": True}  # as a container?
PATH_MAX = 4096
AT_FDCWD = -100
O_DIRECTORY = os.O_DIRECTORY
F_DUPFD_CLOEXEC = 1030
GENERIC_IOCTLS = {0x5450, 0x5451, 0x5421, 0x5452, 0x5460}  # FIONCLEX, FIOCLEX, FIONBIO, FIOASYNC, FIOQSIZE
DESTROY = 0x3B80
MANY_MAPS = 64  # of registers, before those that are gone are looked for


def _int(value: int) -> int:
    """An argument of type int."""
    value &= 0xFFFF_FFFF
    return value - (1 << 32) if value >> 31 else value


class Calls:
    """The handlers by system call number."""

    def __init__(self, supervisor: Supervisor, numbers: Syscalls) -> None:
        self.supervisor = supervisor
        self.numbers = numbers
        self.handlers: dict[int, Handler] = {
            numbers.open: self.open,
            numbers.openat: self.openat,
            numbers.openat2: self.openat2,
            numbers.ioctl: self.ioctl,
            numbers.mmap: self.mmap,
            numbers.fcntl: self.fcntl,
            numbers.dup: self.dup,
            numbers.capget: self.capget,
            numbers.capset: self.capset,
            **{number: self._on_file(call) for number, call in rw.table(numbers).items()},
        }
        self.handlers.pop(-1, None)

    # ---- open ----

    def open(self, thread: Thread, args: list[int]) -> int:
        return self._open(thread, AT_FDCWD, args[0], args[1])

    def openat(self, thread: Thread, args: list[int]) -> int:
        return self._open(thread, _int(args[0]), args[1], args[2])

    def openat2(self, thread: Thread, args: list[int]) -> int:
        """struct open_how: flags, mode, resolve."""
        how = thread.caller.memory.read(args[2], 8)
        if len(how) < 8:
            return CONTINUE
        flags = int.from_bytes(how, "little")
        return self._open(thread, _int(args[0]), args[1], flags)

    def _open(self, thread: Thread, folder: int, path_at: int, flags: int) -> int:
        path = self._path(thread, folder, path_at)
        container = PATHS.get(path) if flags & os.O_ACCMODE == os.O_RDWR else None
        if container is None:
            return self._open_proc(thread, path, flags) if self.supervisor.proc else CONTINUE
        if flags & os.O_CREAT and flags & os.O_EXCL:
            return -errno.EEXIST
        if flags & O_DIRECTORY:
            return -errno.ENOTDIR
        supervisor = self.supervisor
        try:
            thread.caller.gate(Gate.MEMORY)
            context = OpenContext(supervisor.instance, supervisor.uid, container=container, mappable=True)
        except IommufdError as error:
            return -error.errno
        try:
            installed = supervisor.watch.install(context, context.ctx, context.identity)
        except IommufdError as error:
            context.ctx.put()
            return -error.errno
        installed.report = supervisor.report
        context.owner = supervisor
        try:
            thread.files.install_context(installed, cloexec=bool(flags & os.O_CLOEXEC))
        except IommufdError as error:
            return -error.errno
        return ANSWERED

    def _open_proc(self, thread: Thread, path: bytes, flags: int) -> int:
        try:
            own = open_proc(self.supervisor, thread, path, flags)
        except OSError:
            return CONTINUE
        if own < 0:
            return CONTINUE
        try:
            thread.files.add(thread.files.free_number(lowest=True), own, cloexec=bool(flags & os.O_CLOEXEC), send=True)
        except IommufdError as error:
            return -error.errno
        except OSError:
            return CONTINUE
        finally:
            os.close(own)
        return ANSWERED

    def _path(self, thread: Thread, folder: int, at: int) -> bytes:
        """The path as the caller means it; only what can be ours is made absolute."""
        path = thread.caller.memory.read(at, 64)
        if len(path) < 64 or b"\0" not in path:
            path = thread.caller.memory.read(at, PATH_MAX)
        path = path.partition(b"\0")[0]
        if path in PATHS or not path.endswith((b"iommu", b"vfio")):
            return path
        if not path.startswith(b"/"):
            where = "cwd" if folder == AT_FDCWD else f"fd/{folder}"
            try:
                path = os.readlink(f"/proc/{thread.tid}/{where}").encode() + b"/" + path
            except OSError:
                return path
        return b"/" + os.path.normpath(path).lstrip(b"/")

    # ---- calls on our files ----

    def _find(self, thread: Thread, fd: int) -> Installed | Pipe | None:
        """One of our files; None for any other. StaleError when the number is not open, at the first look."""
        key = thread.files.key(fd)
        supervisor = self.supervisor
        if key is not None:
            return supervisor.find(key)
        if supervisor.second_look != supervisor.current:
            supervisor.second_look = supervisor.current
            raise StaleError("not open, or another task")
        return None

    def ioctl(self, thread: Thread, args: list[int]) -> int:
        found = self._find(thread, _int(args[0]))
        cmd = args[1] & 0xFFFF_FFFF
        if found is None or cmd in GENERIC_IOCTLS:
            return CONTINUE
        context = found.context
        if found.file is not context.ctx or not isinstance(found, Installed):
            return -errno.ENOTTY
        if cmd == DESTROY and found.maps:
            drop_unmapped(found)
        thread.files.context = context
        report = self.supervisor.report
        if report is None:
            rc = context.ctx.ioctl(thread.caller, cmd, args[2])
        else:
            rc = report.ioctl(thread, context.ctx, cmd, args[2])
        thread.caller.error = None  # it keeps the frames of the call alive
        return rc

    def mmap(self, thread: Thread, args: list[int]) -> int:
        found = self._find(thread, _int(args[4]))
        if found is None:
            return CONTINUE
        context = found.context
        if found.file is not context.ctx or not isinstance(found, Installed):
            return -errno.EINVAL if isinstance(found.file, Dmabuf) else -errno.ENODEV
        _, length, prot, flags, _, offset = args
        if not length or offset % mmap.PAGESIZE:
            return -errno.EINVAL
        try:
            vma = context.ctx.mmap(thread.caller, offset, length, prot, flags)
        except IommufdError as error:
            return -error.errno
        try:
            show(vma.region, context.identity)
        except OSError:
            vma.put()
            return -errno.ENOMEM
        if len(found.maps) > MANY_MAPS:
            drop_unmapped(found)
        found.maps.append(vma)
        return CONTINUE  # the registers lie at the same offset of the descriptor's own file

    def _on_file(self, call: rw.OnFile) -> Handler:
        def handler(thread: Thread, args: list[int]) -> int:
            found = self._find(thread, _int(args[0]))
            if found is None or found.file is None:
                return CONTINUE
            try:
                return call(thread.caller, found.file, args)
            except IommufdError as error:
                return -error.errno

        return handler

    # ---- credentials ----

    def capget(self, thread: Thread, args: list[int]) -> int:
        answer = caps.capget(thread, args[0], args[1])
        return CONTINUE if answer == caps.NOT_OURS else answer

    def capset(self, thread: Thread, args: list[int]) -> int:
        answer = caps.capset(thread, args[0], args[1])
        return CONTINUE if answer == caps.NOT_OURS else answer

    # ---- copies ----

    def dup(self, thread: Thread, args: list[int]) -> int:
        return self._copy(thread, _int(args[0]), 0, cloexec=False)

    def fcntl(self, thread: Thread, args: list[int]) -> int:
        """F_DUPFD, F_DUPFD_CLOEXEC"""
        least = args[2] & 0xFFFF_FFFF
        if least >= thread.process.nofile():
            return CONTINUE  # to EINVAL
        return self._copy(thread, _int(args[0]), least, cloexec=_int(args[1]) == F_DUPFD_CLOEXEC)

    def _copy(self, thread: Thread, fd: int, least: int, *, cloexec: bool) -> int:
        """A copy of one of our descriptors must get a number from the base on too."""
        if self._find(thread, fd) is None:
            return CONTINUE
        try:
            own = pidfd_getfd(thread.process.pidfd, fd)
        except OSError:
            return CONTINUE
        try:
            thread.files.add(thread.files.free_number(least), own, cloexec=cloexec, send=True)
        except IommufdError as error:
            return -error.errno
        except OSError:
            return CONTINUE
        finally:
            os.close(own)
        return ANSWERED
