"""The backend over the wire: a daemon, and the client library as an unmodified program would use it.

The process is still a model, but its descriptors are real ones of ours with their real numbers, its memory lies in
memfds that are registered, and a forked process is a set of channels with a new address space. Huge pages are modelled
in ordinary memfds, so that none need be reserved.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import select
from collections import Counter
from typing import TYPE_CHECKING

from iommufd_client.connection import Connection
from iommufd_client.testing import Daemon
from iommufd_uapi import args, wire
from iommufd_uapi.layout import Direction
from iommufdd.user import PAGE_SIZE, File, PageFile

from .files import CharDev, EventFd, FdTable, LocalFile
from .memory import AddressSpace, MemFile, fail, round_up
from .process import MEMLOCK, Driver

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from iommufd_client.admin import Admin
    from iommufd_client.files import Mapping
    from iommufdd.mm import Region

    from .process import Process

CAPS = ("CAP_IPC_LOCK", "CAP_SYS_RAWIO", "CAP_SYS_RESOURCE")
ROOT = f"uid=0,caps={'+'.join(CAPS)},memlock={MEMLOCK}"


class Pages(MemFile):
    """A real memfd."""

    def __init__(self, length: int, *, unit: int = PAGE_SIZE, private: bool = False) -> None:
        super().__init__(length, unit=unit, private=private)
        self.fd = os.memfd_create("pages", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, length)

    def release(self) -> None:
        os.close(self.fd)

    def pread(self, pos: int, length: int) -> bytes:
        length = max(0, min(length, round_up(self.length, self.unit) - pos))
        return os.pread(self.fd, length, pos).ljust(length, b"\0")

    def pwrite(self, pos: int, data: bytes) -> int:
        """What lies in the last page beyond the end of the file is dropped."""
        inside = max(0, min(len(data), self.length - pos))
        if inside:
            os.pwrite(self.fd, data[:inside], pos)
        return max(inside, min(len(data), round_up(self.length, self.unit) - pos))

    def resize(self, length: int) -> None:
        os.ftruncate(self.fd, length)
        self.length = length

    def twin(self, length: int, *, private: bool) -> MemFile:
        return Pages(length, unit=self.unit, private=private)


class Registers(PageFile):
    """A live mapping of the iommufd, as the CPU sees it."""

    pinnable = False

    def __init__(self, mapping: Mapping, offset: int) -> None:
        self.mapping = mapping
        self.offset = offset

    def release(self) -> None:
        self.mapping.close()

    def size(self) -> int:
        return self.offset + len(self.mapping.view)

    def pread(self, pos: int, length: int) -> bytes:
        return bytes(self.mapping.view[pos - self.offset : pos - self.offset + length])

    def pwrite(self, pos: int, data: bytes) -> int:
        at = pos - self.offset
        data = data[: len(self.mapping.view) - at]
        self.mapping.view[at : at + len(data)] = data
        return len(data)


class RemoteFile(File):
    """A file that the daemon handed out: its descriptor is all there is here."""


class RemoteContext(File):
    """An open /dev/iommu: the channel that opened it, and those of forked processes."""

    def __init__(self, opener: Process, channel: Connection) -> None:
        self.channels = {opener: channel}

    def release(self) -> None:
        for channel in self.channels.values():
            channel.close()


class MirroredSpace(AddressSpace):
    """An address space of which the daemon is told."""

    home: Connection | None = None  # a channel of it: none yet while it is filled

    def mapped(self, region: Region) -> None:
        if self.home and isinstance(region.file, Pages):
            prot = region.readable + 2 * region.writable
            self.home.register(
                region.start, region.end - region.start, region.file.fd, region.offset,
                prot=prot, private=region.file.private,
            )  # fmt: skip

    def unmapped(self, start: int, end: int) -> None:
        if self.home:
            self.home.unregister(start, end - start)

    def protected(self, start: int, end: int, prot: int) -> None:
        region = self.find(start)
        if self.home and region and isinstance(region.file, Pages):
            self.home.protect(start, end - start, 0 if not prot else 3 if prot & 2 else 1)


class RealFds(FdTable):
    """Numbers are those of real descriptors; one that several processes share is closed with its last holder."""

    def __init__(self, holders: Counter[int]) -> None:
        super().__init__()
        self.holders = holders

    def install(self, fd: int, file: File) -> int:
        """Takes over the descriptor and the caller's reference of the file."""
        self.holders[fd] += 1
        self.fd_install(fd, file)
        return fd

    def add(self, file: File) -> int:
        return self.install(_descriptor(file), file)

    def dup(self, fd: int) -> int:
        file = self.get(fd)
        return self.install(os.dup(fd), file.get())

    def close(self, fd: int) -> None:
        if fd in self.holders:
            self.holders[fd] -= 1
            if not self.holders[fd]:
                del self.holders[fd]
                os.close(fd)
        super().close(fd)

    def fork_into(self, child: FdTable) -> None:
        super().fork_into(child)
        self.holders.update(fd for fd in child.files if fd in self.holders)


def _descriptor(file: File) -> int:
    """A real descriptor that is what the file stands for."""
    if isinstance(file, Pages):
        return os.dup(file.fd)
    if isinstance(file, EventFd):
        return os.eventfd(0, os.EFD_CLOEXEC)
    if isinstance(file, RemoteContext):
        (channel,) = file.channels.values()
        return os.dup(channel.identity.fileno())
    assert isinstance(file, CharDev)
    return os.open(file.path, os.O_RDWR | os.O_CLOEXEC)


class OverSocket(Driver):
    """A machine of its own in a daemon that serves all programs."""

    def __init__(self, socket_path: str, admin: Admin, machine: str) -> None:
        self.socket_path = socket_path
        self.admin = admin
        self.machine = machine
        self.homes: dict[Process, Connection] = {}  # a channel for its memory; the program never sees its context
        self.contexts: list[RemoteContext] = []
        self.holders: Counter[int] = Counter()

    def new_space(self) -> AddressSpace:
        return MirroredSpace()

    def new_files(self) -> FdTable:
        return RealFds(self.holders)

    def new_pages(self, length: int, unit: int, *, private: bool) -> MemFile:
        return Pages(length, unit=unit, private=private)

    def started(self, process: Process, parent: Process | None) -> None:
        home = Connection(self.socket_path, machine=self.machine)
        self.homes[process] = home
        assert isinstance(process.space, MirroredSpace)
        process.space.home = home
        for region in process.space.regions():
            process.space.mapped(region)
        self.credentials_changed(process)

    def exited(self, process: Process) -> None:
        for context in self.contexts:
            if channel := context.channels.pop(process, None):
                channel.close()
        self.homes.pop(process).close()

    def credentials_changed(self, process: Process) -> None:
        cred = process.credentials
        caps = CAPS if cred.privileged else ()
        self.admin.credentials(self.homes[process].mm, uid=cred.uid, caps=caps, memlock=cred.memlock)

    def open(self, process: Process, path: str) -> File:
        channel = Connection(self.socket_path, machine=self.machine, mm=self.homes[process].mm)
        self.credentials_changed(process)
        context = RemoteContext(process, channel)
        self.contexts.append(context)
        return context

    def _channel(self, process: Process, context: RemoteContext) -> Connection:
        if process not in context.channels:
            identity = next(iter(context.channels.values())).identity
            mm = self.homes[process].mm
            channel = Connection(self.socket_path, kind=wire.Kind.CHANNEL, mm=mm, context=identity)
            context.channels[process] = channel
            self.credentials_changed(process)
        return context.channels[process]

    def ioctl(self, process: Process, file: File, cmd: int, arg: int) -> int:
        if not isinstance(file, RemoteContext):
            raise fail(errno.ENOTTY)
        space, files = process.space, process.files
        rc = self._channel(process, file).ioctl(cmd, arg, memory=space)
        data = space.read(arg, 256)
        assert isinstance(files, RealFds)
        for offset, direction in args.fds(cmd, data):
            if direction is Direction.OUT:
                files.install(int.from_bytes(data[offset : offset + 4], "little"), RemoteFile())
        if args.returns_fd(cmd, data):
            files.install(rc, RemoteFile())
        return rc

    def read(self, process: Process, file: File, addr: int, count: int) -> int:
        fd = self._number(process, file)
        return self.homes[process].read_into(fd, addr, count, memory=process.space)

    def write(self, process: Process, file: File, addr: int, count: int) -> int:
        fd = self._number(process, file)
        return self.homes[process].write_from(fd, addr, count, memory=process.space)

    def _number(self, process: Process, file: File) -> int:
        return next(fd for fd, other in process.files.files.items() if other is file)

    def poll(self, process: Process, file: File) -> int:
        poll = select.poll()
        poll.register(self._number(process, file), 0x7FFF)
        return sum(mask for _, mask in poll.poll(0))

    def mmap(self, process: Process, file: File, offset: int, length: int, prot: int, flags: int) -> PageFile:
        if not isinstance(file, RemoteContext):
            raise fail(errno.ENODEV)
        mapping = self._channel(process, file).mmap(length, offset, prot, flags)
        mapping._channel = self.homes[process]  # the iommufd may be closed before the mapping goes
        return Registers(mapping, offset)


@contextlib.contextmanager
def daemon() -> Iterator[Callable[[], OverSocket]]:
    """A running daemon, and what makes a fresh machine in it."""
    names = (f"conformance-{number}" for number in itertools.count(1))
    with Daemon("--caller", ROOT, "--virtual-caller") as server, server.admin() as admin:
        yield lambda: OverSocket(server.socket_path, admin, next(names))
