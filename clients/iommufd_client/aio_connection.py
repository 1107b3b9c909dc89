"""Room client: a channel to the daemon over Trio, and the files that come over it."""

from __future__ import annotations

import functools
import os
import socket
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar, overload

import trio

from iommufd_uapi import wire

from . import call as calls
from .call import IommufdOSError
from .channel import ANCILLARY, BUFFER, PLAINS, Batch, Packet, plain_result, welcome
from .connection import received, rights
from .files import Fd, Mapping, fd_number
from .memory import OWN_MEMORY, Buffers, Memory
from .scratch import ScratchFile

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable, Sequence

    from typing_extensions import Buffer

    from iommufd_uapi.kvm import KvmIoctl
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
    async def ioctl(self, cmd: Ioctl | VfioIoctl | KvmIoctl, *, memory: Memory = ...) -> int: ...
    @overload
    async def ioctl(self, cmd: int, arg: bytearray | int, *, memory: Memory = ...) -> int: ...

    async def ioctl(
        self, cmd: Ioctl | VfioIoctl | KvmIoctl | int, arg: bytearray | int = 0, *, memory: Memory = OWN_MEMORY
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


def awaited(function: Callable[P, Steps[T]]) -> Callable[Concatenate[Connection, P], Coroutine[Any, Any, T]]:
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
