"""Room client: the same over Trio. The only module here that knows it.

    async with open_iommufd() as iommufd:
        ioas = await iommufd.ioas_alloc()

A call that is cancelled while its answer is on the way has been made: the answer is dropped, objects it made stay.
"""

from __future__ import annotations

import functools
import os
import socket
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Self, TypeVar, overload

import trio

from iommufd_uapi import wire
from iommufd_uapi.vfio import VFIO_DEVICE_RESET

from . import call as calls
from . import ioctls, mock, vfio
from .call import IommufdOSError
from .channel import ANCILLARY, BUFFER, PLAINS, Batch, Packet, hello, plain_result, welcome
from .connection import default_socket_path, received, rights
from .files import Fd, Mapping, fd_number
from .guest import GuestMemory
from .memory import OWN_MEMORY, Buffers, Memory
from .scratch import ScratchFile

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence

    from typing_extensions import Buffer

    from iommufd_uapi.layout import Ioctl, VfioIoctl

    from .call import Call
    from .channel import Result
    from .files import HasFileno
    from .ioctls import Steps

P = ParamSpec("P")
T = TypeVar("T")


class File(Fd):
    """A file that the daemon handed out."""

    __slots__ = ("_channel",)

    def __init__(self, fd: int, channel: Connection) -> None:
        super().__init__(fd)
        self._channel = channel

    async def read(self, count: int) -> bytes:
        """read(2), which never waits: whole records, b"" when there is none."""
        return await self._channel.read(self, count)

    async def receive(self, count: int) -> bytes:
        """As `read`, but wait until there is something."""
        while not (data := await self.read(count)):
            if self.closed:
                raise trio.ClosedResourceError
            await trio.lowlevel.wait_readable(self)
        return data

    async def write(self, data: Buffer) -> int:
        """write(2): how many bytes were taken."""
        return await self._channel.write(self, data)

    def close(self) -> None:
        """Close it; who waits in `receive` gets trio.ClosedResourceError."""
        if not self.closed and trio.lowlevel.in_trio_run():
            trio.lowlevel.notify_closing(self)
        super().close()


class Connection:
    """A channel. Tasks may share it: calls are made one at a time, in the order they come."""

    identity: Fd
    mm: int

    def __init__(self, socket_path: str, *, explain: bool, kind: int) -> None:
        """Without a connection yet: see `open_iommufd`."""
        self.socket_path = socket_path
        self.explain = explain
        self._device = kind == wire.Kind.DEVICE
        self._flags = int(wire.Flag.REASON) if explain else 0
        self._plains = PLAINS[self._flags]
        self._lock = trio.Lock()
        self._scratch = ScratchFile()
        self._buffer = bytearray(BUFFER)
        self._view = memoryview(self._buffer)
        self._owed: bytes | Packet | None = None  # on its way, and its reply not read
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._sock.setblocking(False)

    async def _connect(self, first: bytes, fds: list[int]) -> None:
        try:
            # Of a Unix socket this is instant, unless the backlog is full.
            while True:
                try:
                    self._sock.connect(self.socket_path)
                    break
                except BlockingIOError:
                    await trio.sleep(0.01)
            try:
                self._sock.sendmsg([first], rights(fds))
            except BrokenPipeError:
                pass  # refused before we could ask: the answer is there all the same
            try:
                length, got = await self._receive()
            except ConnectionResetError:
                length, got = await self._receive()  # the hello was not read; what was said comes behind that error
            self.identity = Fd(got[0] if got else -1)
            self.mm = welcome(bytes(self._view[:length]))
        except OSError as error:
            if not isinstance(error, IommufdOSError):
                error.filename = self.socket_path
            self._drop()
            raise
        except BaseException:
            self._drop()
            raise

    # ---- packets ----

    async def _send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        ancillary = rights(fds) if fds else []
        while True:
            try:
                self._sock.sendmsg([data], ancillary)
                return
            except BlockingIOError:
                await trio.lowlevel.wait_writable(self._sock)

    async def _receive(self) -> tuple[int, list[int]]:
        while True:
            await trio.lowlevel.wait_readable(self._sock)
            try:
                length, ancillary, flags, _ = self._sock.recvmsg_into(
                    [self._buffer], ANCILLARY, socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                continue
            return length, received(ancillary, flags)

    async def _round_trip(self, packet: bytes | Packet) -> tuple[int, list[int]]:
        """Send a packet and receive its reply, under the lock."""
        if self._owed:
            for fd in (await self._receive())[1]:
                os.close(fd)
            self._owed = None
        if isinstance(packet, bytes):
            await self._send(packet)
        else:
            await self._send(packet.data, packet.fds)
        self._owed = packet  # a cancellation from here on leaves the reply to the next call
        length, got = await self._receive()
        self._owed = None
        if not length:
            raise ConnectionResetError("the daemon closed the channel")
        return length, got

    async def _exchange(self, packet: Packet) -> list[Result]:
        async with self._lock:
            if packet.places and (size := self._scratch.unannounced):
                announcement = self._packet()
                announcement.add(calls.Call(wire.Op.SCRATCH, file=self._scratch.fileno))
                (result,) = announcement.results(self._view, *await self._round_trip(announcement))
                if isinstance(result, OSError):
                    raise result
                self._scratch.announced = size
            return packet.results(self._view, *await self._round_trip(packet))

    def _packet(self) -> Packet:
        return Packet(self._scratch, self._flags)

    async def _send_all(self, packets: Sequence[Packet]) -> list[Result]:
        results: list[Result] = []
        for packet in packets:
            if packet:
                results += await self._exchange(packet)
        return results

    async def _call(self, call: Call) -> int:
        packet = self._packet()
        packet.add(call)
        (result,) = await self._send_all((packet,))
        if isinstance(result, OSError):
            raise result
        return result

    # ---- calls: see iommufd_client.connection ----

    @overload
    async def ioctl(self, cmd: Ioctl | VfioIoctl, *, memory: Memory = ...) -> int: ...
    @overload
    async def ioctl(self, cmd: int, arg: bytearray | int, *, memory: Memory = ...) -> int: ...

    async def ioctl(
        self, cmd: Ioctl | VfioIoctl | int, arg: bytearray | int = 0, *, memory: Memory = OWN_MEMORY
    ) -> int:
        """ioctl(2). The argument is a struct, its bytes (changed in place), or its address in `memory`."""
        plain = self._plains[type(cmd)]
        if plain is None:
            if isinstance(cmd, int):
                return await self._call(calls.ioctl(cmd, arg, memory, device=self._device))
            return await self._call(calls.ioctl(cmd.CMD, cmd, memory, device=self._device))
        struct: Ioctl = cmd  # type: ignore[assignment]  # only such have a Plain
        packed = struct.pack()
        async with self._lock:
            length, _ = await self._round_trip(plain.head + packed + plain.pad)
            return plain_result(self._view, length, struct, packed)

    def batch(self, structs: Iterable[Ioctl] = ()) -> Batch[Coroutine[Any, Any, list[Result]]]:
        """Ioctls that travel together: ``await batch.send()``."""
        batch = Batch(self._packet, self._send_all, device=self._device)
        batch.ioctls(list(structs))
        return batch

    async def read(self, fd: HasFileno | int, count: int) -> bytes:
        """read(2) on a file that the daemon handed out; b"" when there is nothing to read."""
        buffers, data = Buffers(), bytearray(count)
        done = await self._call(calls.read(fd_number(fd), buffers.add(data), count, buffers))
        return bytes(data[:done])

    async def write(self, fd: HasFileno | int, data: Buffer) -> int:
        """write(2) on a file that the daemon handed out; how many bytes it took."""
        buffers, view = Buffers(), memoryview(data).cast("B")
        return await self._call(calls.write(fd_number(fd), buffers.add(view), view.nbytes, buffers))

    async def register(
        self, addr: int, length: int, fd: HasFileno | int, offset: int = 0, *, prot: int = 3, private: bool = False
    ) -> None:
        """mmap(2) with MAP_FIXED, as far as the daemon is concerned."""
        await self._call(calls.register(fd_number(fd), addr, length, offset, prot, private=private))

    async def protect(self, addr: int, length: int, prot: int) -> None:
        """mprotect(2)."""
        await self._call(calls.protect(addr, length, prot))

    async def mmap(self, length: int, offset: int, prot: int = 3, flags: int = 1) -> Mapping:
        """mmap(2) of the iommufd: the region at an offset that VIOMMU_ALLOC gave."""
        call = calls.mmap(length, offset, prot, flags)
        return Mapping(await self._call(call), call.mapping, length, prot)

    async def unregister(self, addr: int, length: int) -> None:
        """munmap(2)."""
        await self._call(calls.unregister(addr, length))

    @property
    def closed(self) -> bool:
        return self._sock.fileno() < 0

    async def aclose(self) -> None:
        """Close the channel, and wait until the daemon has."""
        if self.closed:
            return
        try:
            await self._call(calls.Call(wire.Op.CLOSE))
        except ConnectionError:
            pass  # the daemon is gone, and the channel with it
        finally:
            self._drop()

    def _drop(self) -> None:
        self._sock.close()
        self._scratch.close()
        if hasattr(self, "identity"):
            self.identity.close()


def _awaited(function: Callable[P, Steps[T]]) -> Callable[Concatenate[Connection, P], Coroutine[Any, Any, T]]:
    """A method that runs the steps, one ioctl after the other."""

    async def method(self: Connection, /, *args: P.args, **kwargs: P.kwargs) -> T:
        steps = function(*args, **kwargs)
        try:
            struct, memory = next(steps)
            while True:
                try:
                    result = await self.ioctl(struct, memory=memory)
                except IommufdOSError as error:
                    struct, memory = steps.throw(error)
                else:
                    struct, memory = steps.send(result)
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]

    functools.update_wrapper(method, function)
    return method


class Iommufd(Connection):
    """One open /dev/iommu of the daemon; see `iommufd_client.Iommufd`."""

    @classmethod
    async def open(
        cls, socket_path: str | None = None, *, machine: str = "", container: bool = False, explain: bool = False
    ) -> Self:
        """OSError if there is no daemon, IommufdOSError if it refuses."""
        self = cls(socket_path or default_socket_path(), explain=explain, kind=wire.Kind.IOMMUFD)
        await self._connect(hello(wire.Kind.IOMMUFD, machine=machine, container=container), [])
        return self

    @classmethod
    async def from_identity(
        cls, identity: HasFileno | int, socket_path: str | None = None, *, mm: int = 0, explain: bool = False
    ) -> Self:
        """A further channel to the context that a descriptor identifies. EBADFD."""
        self = cls(socket_path or default_socket_path(), explain=explain, kind=wire.Kind.CHANNEL)
        await self._connect(hello(wire.Kind.CHANNEL, mm=mm), [fd_number(identity)])
        return self

    async def channel(self, *, new_mm: bool = False) -> Self:
        """A further channel to this context, for calls at the same time."""
        mm = 0 if new_mm else self.mm
        return await type(self).from_identity(self.identity, self.socket_path, mm=mm, explain=self.explain)

    async def device(self, name: str) -> VfioDevice:
        """/dev/vfio/devices/NAME of this context's machine, not yet bound. ENOENT."""
        return await VfioDevice.open(name, self.socket_path, context=self.identity, explain=self.explain)

    @asynccontextmanager
    async def guest_memory(
        self, size: int, name: str = "guest", *, hugetlb: bool = False
    ) -> AsyncIterator[GuestMemory]:
        """Memory that devices can reach once it is mapped; unregistered and closed at the end of the block."""
        with GuestMemory(size, name, hugetlb=hugetlb) as memory:
            await self.register(memory.address, len(memory), memory.fd)
            try:
                yield memory
            finally:
                if not self.closed:
                    await self.unregister(memory.address, len(memory))

    async def fault_queue_alloc(self) -> tuple[int, File]:
        """IOMMU_FAULT_QUEUE_ALLOC: its id, and the file to read page faults from and write answers to."""
        id, fd = await self._fault_queue_alloc()
        return id, File(fd, self)

    async def veventq_alloc(self, viommu_id: int, type: int, depth: int) -> tuple[int, File]:
        """IOMMU_VEVENTQ_ALLOC: its id, and the file to read events from. EEXIST."""
        id, fd = await self._veventq_alloc(viommu_id, type, depth)
        return id, File(fd, self)

    async def create_access(self, ioas_id: int, flags: int = 0) -> File:
        """What a driver in the kernel (mdev) does to an IOAS without a device; closing it ends the access."""
        return File(await self._create_access(ioas_id, flags), self)

    async def dmabuf_get(self, length: int, open_flags: int = 0) -> File:
        """A DMA-BUF of the mock exporter, which IOAS_MAP_FILE takes. EINVAL past 2 MiB."""
        return File(await self._dmabuf_get(length, open_flags), self)

    destroy = _awaited(ioctls.destroy)
    ioas_alloc = _awaited(ioctls.ioas_alloc)
    ioas_map = _awaited(ioctls.ioas_map)
    ioas_map_file = _awaited(ioctls.ioas_map_file)
    ioas_copy = _awaited(ioctls.ioas_copy)
    ioas_unmap = _awaited(ioctls.ioas_unmap)
    ioas_iova_ranges = _awaited(ioctls.ioas_iova_ranges)
    ioas_allow_iovas = _awaited(ioctls.ioas_allow_iovas)
    ioas_change_process = _awaited(ioctls.ioas_change_process)
    option = _awaited(ioctls.option)
    vfio_ioas_get = _awaited(ioctls.vfio_ioas_get)
    vfio_ioas_set = _awaited(ioctls.vfio_ioas_set)
    vfio_ioas_clear = _awaited(ioctls.vfio_ioas_clear)
    get_hw_info = _awaited(ioctls.get_hw_info)
    hwpt_alloc = _awaited(ioctls.hwpt_alloc)
    hwpt_set_dirty_tracking = _awaited(ioctls.hwpt_set_dirty_tracking)
    hwpt_get_dirty_bitmap = _awaited(ioctls.hwpt_get_dirty_bitmap)
    hwpt_invalidate = _awaited(ioctls.hwpt_invalidate)
    viommu_alloc = _awaited(ioctls.viommu_alloc)
    vdevice_alloc = _awaited(ioctls.vdevice_alloc)
    hw_queue_alloc = _awaited(ioctls.hw_queue_alloc)
    test = _awaited(mock.test)
    mock_domain = _awaited(mock.mock_domain)
    access_read = _awaited(mock.access_read)
    access_write = _awaited(mock.access_write)
    _fault_queue_alloc = _awaited(ioctls.fault_queue_alloc)
    _veventq_alloc = _awaited(ioctls.veventq_alloc)
    _create_access = _awaited(mock.create_access)
    _dmabuf_get = _awaited(mock.dmabuf_get)


class VfioDevice(Connection):
    """One open /dev/vfio/devices/NAME; see `iommufd_client.VfioDevice`."""

    name: str

    @classmethod
    async def open(
        cls,
        name: str,
        socket_path: str | None = None,
        *,
        machine: str = "",
        context: HasFileno | int | None = None,
        explain: bool = False,
    ) -> Self:
        """On the machine of this name, or on that of a context's identity. ENOENT, EBADFD."""
        self = cls(socket_path or default_socket_path(), explain=explain, kind=wire.Kind.DEVICE)
        self.name = name
        fds = [] if context is None else [fd_number(context)]
        await self._connect(hello(wire.Kind.DEVICE, machine=machine, device=name), fds)
        return self

    async def bind(self, iommufd: Iommufd | HasFileno | int, token: bytes | None = None) -> int:
        """VFIO_DEVICE_BIND_IOMMUFD: the device's id in the context. EINVAL, EPERM, EBUSY, EBADF, EBADFD."""
        return await self._bind(iommufd.identity if isinstance(iommufd, Iommufd) else iommufd, token)

    async def reset(self) -> None:
        """VFIO_DEVICE_RESET. EINVAL when not bound."""
        await self.ioctl(VFIO_DEVICE_RESET, 0)

    _bind = _awaited(vfio.bind)
    attach = _awaited(vfio.attach)
    detach = _awaited(vfio.detach)
    get_info = _awaited(vfio.get_info)


@asynccontextmanager
async def open_iommufd(
    socket_path: str | None = None, *, machine: str = "", container: bool = False, explain: bool = False
) -> AsyncIterator[Iommufd]:
    """A new /dev/iommu, closed at the end of the block. OSError if there is no daemon."""
    iommufd = await Iommufd.open(socket_path, machine=machine, container=container, explain=explain)
    try:
        yield iommufd
    finally:
        await iommufd.aclose()
