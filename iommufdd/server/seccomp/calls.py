"""What each trapped system call does. A handler gives the call's result, minus an errno, CONTINUE or ANSWERED."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from iommufdd.errors import ENOENT, IommufdError
from iommufdd.kvm.tdp_fd import TdpFile
from iommufdd.kvm.vm import Vcpu, Vm
from iommufdd.server.devices import OpenDevice
from iommufdd.server.instance import OpenContext
from iommufdd.server.vms import OpenKvm
from iommufdd.user import Gate

from . import caps, rw, status
from .fds import Installed
from .listener import ANSWERED, CONTINUE, signed_int
from .proc import open_proc
from .procmm import StaleError
from .registers import drop_unmapped, keep, map_registers
from .sys import AT_FDCWD, inode_of, pidfd_getfd

if TYPE_CHECKING:
    from collections.abc import Callable

    from iommufd_uapi.seccomp import Syscalls
    from iommufdd.server.files import Pipe
    from iommufdd.server.vms import AnyOpened
    from iommufdd.user import Caller

    from .notify import Supervisor
    from .target import Process, Thread

    Handler = Callable[[Thread, list[int]], int]

PATHS = {b"/dev/iommu": False, b"/dev/vfio/vfio": True}  # as a container?
KVM = b"/dev/kvm"  # if the keeper wants it: there may be a real one
DEVICES = b"/dev/vfio/devices/"
NAMES = (b"iommu", b"vfio", b"kvm")
PATH_MAX = 4096
O_DIRECTORY = os.O_DIRECTORY
F_DUPFD_CLOEXEC = 1030
GENERIC_IOCTLS = {0x5450, 0x5451, 0x5421, 0x5452}  # FIONCLEX, FIOCLEX, FIONBIO, FIOASYNC
DESTROY = 0x3B80


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
            **{number: self._on_status(fill) for number, fill in status.table(numbers).items()},
        }
        self.handlers.pop(-1, None)

    # ---- open ----

    def open(self, thread: Thread, args: list[int]) -> int:
        return self._open(thread, AT_FDCWD, args[0], args[1])

    def openat(self, thread: Thread, args: list[int]) -> int:
        return self._open(thread, signed_int(args[0]), args[1], args[2])

    def openat2(self, thread: Thread, args: list[int]) -> int:
        """struct open_how: flags, mode, resolve."""
        how = thread.caller.memory.read(args[2], 8)
        if len(how) < 8:
            return CONTINUE
        flags = int.from_bytes(how, "little")
        return self._open(thread, signed_int(args[0]), args[1], flags)

    def _open(self, thread: Thread, folder: int, path_at: int, flags: int) -> int:
        path = self._path(thread, folder, path_at)
        ours = path in PATHS or path.startswith(DEVICES) or (path == KVM and self.supervisor.kvm)
        if flags & os.O_ACCMODE != os.O_RDWR or not ours:
            return self._open_proc(thread, path, flags) if self.supervisor.proc else CONTINUE
        if flags & os.O_CREAT and flags & os.O_EXCL:
            return -errno.EEXIST
        if flags & O_DIRECTORY:
            return -errno.ENOTDIR
        supervisor = self.supervisor
        thread.files.prepare_number()
        try:
            thread.caller.gate(Gate.MEMORY)
            opened = self._open_ours(path)
        except IommufdError as error:
            return -error.errno
        try:
            identity = opened.identity if isinstance(opened, OpenContext) else -1
            installed = supervisor.watch.install(opened, opened.file, identity)
        except IommufdError as error:
            opened.file.put()
            return -error.errno
        installed.report = supervisor.report
        opened.owner = supervisor
        try:
            thread.files.install_opened(installed, cloexec=bool(flags & os.O_CLOEXEC))
        except IommufdError as error:
            return -error.errno
        return ANSWERED

    def _open_ours(self, path: bytes) -> AnyOpened:
        """The iommufd, the container, KVM or the device at a path. ENOENT, EMFILE."""
        instance, uid = self.supervisor.instance, self.supervisor.uid
        container = PATHS.get(path)
        if container is not None:
            return OpenContext(instance, uid, container=container, mappable=True)
        if path == KVM:
            return OpenKvm(instance, uid)
        try:
            return OpenDevice(instance, path.removeprefix(DEVICES).decode(), uid)
        except UnicodeDecodeError:
            raise ENOENT("no device has such a name") from None

    def _open_proc(self, thread: Thread, path: bytes, flags: int) -> int:
        try:
            own = open_proc(self.supervisor, thread, path, flags)
        except OSError:
            return CONTINUE
        if own < 0:
            return CONTINUE
        return _give(thread, own, cloexec=bool(flags & os.O_CLOEXEC), lowest=True)

    def _path(self, thread: Thread, folder: int, at: int) -> bytes:
        """The path as the caller means it; only what can be ours is made absolute."""
        path = thread.caller.memory.read(at, 64)
        if len(path) < 64 or b"\0" not in path:
            path = thread.caller.memory.read(at, PATH_MAX)
        path = path.partition(b"\0")[0]
        name = path.rpartition(b"/")[2]
        if path in PATHS or not (name in NAMES or name.decode(errors="replace") in self.supervisor.machine.devices):
            return path
        if not path.startswith(b"/"):
            try:
                path = thread.files.place(folder).encode() + b"/" + path
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
        found = self._find(thread, signed_int(args[0]))
        cmd = args[1] & 0xFFFF_FFFF
        if found is None or cmd in GENERIC_IOCTLS:
            return CONTINUE
        if not isinstance(found, Installed) or found.file is not found.opened.file:
            return _other_ioctl(thread.caller, found, cmd, args[2])
        opened = found.opened
        if thread.process.stranger:
            thread.files.prepare(cmd, args[2])
        if cmd == DESTROY and found.maps:
            drop_unmapped(found, self.supervisor.files.mms)
        thread.files.opened = opened
        report = self.supervisor.report
        if report is None:
            rc = opened.file.ioctl(thread.caller, cmd, args[2])
        else:
            rc = report.ioctl(thread, opened.file, cmd, args[2])
        thread.caller.error = None  # it keeps the frames of the call alive
        return rc

    def mmap(self, thread: Thread, args: list[int]) -> int:
        found = self._find(thread, signed_int(args[4]))
        if found is None:
            return CONTINUE
        assert found.file is not None
        try:
            vma = map_registers(thread.caller, found.opened, found.file, args)
        except IommufdError as error:
            return -error.errno
        assert isinstance(found, Installed)
        keep(found, vma, self.supervisor.files.mms)
        return CONTINUE  # the registers lie at the same offset of the descriptor's own file

    def _on_file(self, call: rw.OnFile) -> Handler:
        def handler(thread: Thread, args: list[int]) -> int:
            found = self._find(thread, signed_int(args[0]))
            if found is None or found.file is None:
                return CONTINUE
            try:
                return call(thread.caller, found.file, args)
            except IommufdError as error:
                return -error.errno

        return handler

    def _on_status(self, fill: status.Fill) -> Handler:
        def handler(thread: Thread, args: list[int]) -> int:
            found = self._find(thread, signed_int(args[0]))
            if not isinstance(found, Installed) or found.file is not found.opened.file or isinstance(found.file, Vm):
                return CONTINUE
            answer = fill(thread, found, args)
            return CONTINUE if answer == status.NOT_OURS else answer

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
        return self._copy(thread, signed_int(args[0]), 0, cloexec=False)

    def fcntl(self, thread: Thread, args: list[int]) -> int:
        """F_DUPFD, F_DUPFD_CLOEXEC"""
        least = args[2] & 0xFFFF_FFFF
        if least >= thread.process.nofile():
            return CONTINUE  # to EINVAL
        return self._copy(thread, signed_int(args[0]), least, cloexec=signed_int(args[1]) == F_DUPFD_CLOEXEC)

    def _copy(self, thread: Thread, fd: int, least: int, *, cloexec: bool) -> int:
        """A copy of one of our descriptors must get a number from the base on too."""
        found = self._find(thread, fd)
        if found is None:
            return CONTINUE
        thread.files.prepare_number(least)
        try:
            own = self._take(thread.process, fd, found)
        except OSError:
            return CONTINUE
        return _give(thread, own, cloexec=cloexec, least=least)

    def _take(self, process: Process, fd: int, found: Installed | Pipe) -> int:
        """A copy of a process's descriptor, by the keeper if we may not make it. OSError, Waiting."""
        try:
            return pidfd_getfd(process.pidfd, fd)
        except PermissionError:
            own = self.supervisor.reach.file(process.tgid, fd)
        if inode_of(f"/proc/self/fd/{own}") == found.key[:2]:
            return own
        os.close(own)
        raise PermissionError


def _give(thread: Thread, own: int, *, cloexec: bool, least: int = 0, lowest: bool = False) -> int:
    """A number for the caller, as free_number() has it, for a descriptor of ours, which is closed. Waiting."""
    try:
        thread.files.add(thread.files.free_number(least, lowest=lowest), own, cloexec=cloexec, send=True)
    except IommufdError as error:
        return -error.errno
    except OSError:
        return CONTINUE
    finally:
        os.close(own)
    return ANSWERED


def _other_ioctl(caller: Caller, found: Installed | Pipe, cmd: int, arg: int) -> int:
    """Of a file that came of an ioctl: ENOTTY, but for those of KVM."""
    if not isinstance(found.file, TdpFile | Vcpu):
        return -errno.ENOTTY
    try:
        found.file.ioctl(caller, cmd, arg)
    except IommufdError as error:
        return -error.errno
