"""The backend over the wire: a daemon, and the client library as an unmodified program would use it.

The process is still a model, but behind its descriptors there are real ones, its memory lies in memfds that are
registered, and a forked process is a set of channels with a new address space. Huge pages are modelled in ordinary
memfds, so that none need be reserved.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import select
from typing import TYPE_CHECKING

from iommufd_client.connection import Connection
from iommufd_client.testing import Daemon
from iommufd_uapi import args, wire
from iommufd_uapi.layout import Direction
from iommufdd.user import PAGE_SIZE, File, PageFile

from .files import CharDev
from .memory import AddressSpace, MemFile, fail, round_up
from .process import MEMLOCK, Driver

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from iommufd_client.admin import Admin
    from iommufd_client.files import Mapping
    from iommufdd.mm import Region

    from .process import Process

CAPS = ("CAP_IPC_LOCK", "CAP_SYS_RAWIO", "CAP_SYS_RESOURCE")
STRUCT_MOST = 256  # bytes of a struct with descriptors in it
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

    def contents(self) -> bytes:
        return os.pread(self.fd, self.length, 0).rstrip(b"\0")

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

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def release(self) -> None:
        os.close(self.fd)


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


class Translated:
    """The client's `Memory` for one ioctl: descriptors in the struct are real numbers for it, the model's below."""

    def __init__(self, driver: OverSocket, process: Process, cmd: int, arg: int) -> None:
        self.driver = driver
        self.process = process
        self.space = process.space
        self.places = {arg + offset: way for offset, way in args.fds(cmd, self.space.read(arg, STRUCT_MOST))}
        self.given: dict[int, bytes] = {}  # what the program put in, by address

    def read(self, addr: int, length: int) -> bytes:
        data = bytearray(self.space.read(addr, length))
        for at in self._within(addr, len(data)):
            if self.places[at] is Direction.IN:
                self.given[at] = bytes(data[at - addr : at - addr + 4])
                real = self.driver.real(self.process.files.fget(_s32(self.given[at])))
                data[at - addr : at - addr + 4] = real.to_bytes(4, "little", signed=True)
        return bytes(data)

    def writable(self, addr: int, length: int) -> int:
        return self.space.writable(addr, length)

    def write(self, addr: int, data: bytes) -> int:
        image = bytearray(data)
        for at in self._within(addr, len(data)):
            field = slice(at - addr, at - addr + 4)
            if at not in self.given:
                fd = self.process.files.add(RemoteFile(_s32(image[field])))
                image[field] = fd.to_bytes(4, "little")
            else:
                image[field] = self.given[at]
        return self.space.write(addr, bytes(image))

    def _within(self, addr: int, length: int) -> list[int]:
        return [at for at in self.places if addr <= at and at + 4 <= addr + length]


def _s32(data: bytes | bytearray) -> int:
    return int.from_bytes(data, "little", signed=True)


class OverSocket(Driver):
    """A machine of its own in a daemon that serves all programs."""

    def __init__(self, socket_path: str, admin: Admin, machine: str) -> None:
        self.socket_path = socket_path
        self.admin = admin
        self.machine = machine
        self.homes: dict[Process, Connection] = {}  # a channel for its memory; the program never sees its context
        self.contexts: list[RemoteContext] = []
        self.locals: dict[File, int] = {}  # real descriptors of eventfds and character devices

    def new_space(self) -> AddressSpace:
        return MirroredSpace()

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
        if not self.homes:
            for fd in self.locals.values():
                os.close(fd)
            self.locals.clear()

    def real(self, file: File | None) -> int:
        """A real descriptor of what the file stands for; -1 for none."""
        if isinstance(file, Pages | RemoteFile):
            return file.fd
        if isinstance(file, RemoteContext):
            return next(iter(file.channels.values())).identity.fileno()
        if file is not None and file not in self.locals:
            flags = os.O_RDWR | os.O_CLOEXEC
            self.locals[file] = os.open(file.path, flags) if isinstance(file, CharDev) else os.eventfd(0)
        return -1 if file is None else self.locals[file]

    def credentials_changed(self, process: Process) -> None:
        cred = process.credentials
        caps = CAPS if cred.privileged else ()
        self.admin.credentials(self.homes[process].mm, uid=cred.uid, caps=caps, memlock=cred.memlock)

    def open(self, process: Process, path: str) -> File:
        mm, container = self.homes[process].mm, path == "/dev/vfio/vfio"
        channel = Connection(self.socket_path, machine=self.machine, mm=mm, container=container)
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
        memory = Translated(self, process, cmd, arg)
        rc = self._channel(process, file).ioctl(cmd, arg, memory=memory)
        if args.returns_fd(cmd, process.space.read(arg, STRUCT_MOST)):
            return process.files.add(RemoteFile(rc))
        return rc

    def read(self, process: Process, file: File, addr: int, count: int) -> int:
        return self.homes[process].read_into(self.real(file), addr, count, memory=process.space)

    def write(self, process: Process, file: File, addr: int, count: int) -> int:
        return self.homes[process].write_from(self.real(file), addr, count, memory=process.space)

    def poll(self, process: Process, file: File) -> int:
        poll = select.poll()
        poll.register(self.real(file), 0x7FFF)
        return sum(mask for _, mask in poll.poll(0))

    def mmap(self, process: Process, file: File, offset: int, length: int, prot: int, flags: int) -> PageFile:
        if not isinstance(file, RemoteContext):
            raise fail(errno.ENODEV)
        mapping = self._channel(process, file).mmap(length, offset, prot, flags)
        return Registers(mapping, offset)


@contextlib.contextmanager
def daemon() -> Iterator[Callable[[], OverSocket]]:
    """A running daemon, and what makes a fresh machine in it."""
    names = (f"conformance-{number}" for number in itertools.count(1))
    with Daemon("--caller", ROOT, "--virtual-caller") as server, server.admin() as admin:
        yield lambda: OverSocket(server.socket_path, admin, next(names))
