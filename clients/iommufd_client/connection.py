"""Room client: one channel to the daemon over a blocking socket."""

from __future__ import annotations

import os
import socket
from _thread import allocate_lock
from _weakref import ref
from array import array
from typing import TYPE_CHECKING, Self, overload

from iommufd_uapi import wire

from . import call as calls
from .channel import (
    ANCILLARY,
    BUFFER,
    NUMBERS,
    PLAINS,
    Batch,
    Packet,
    ProtocolError,
    Result,
    hello,
    plain_result,
    raw_result,
    welcome,
)
from .files import Fd, File, Mapping, fd_number
from .memory import OWN_MEMORY, Buffers, Memory
from .scratch import ScratchFile

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from typing_extensions import Buffer

    from iommufd_uapi.kvm import KvmIoctl
    from iommufd_uapi.layout import Ioctl, VfioIoctl

    from .call import Call
    from .files import HasFileno

_NOTHING = bytes(4)
_RIGHTS = (socket.SOL_SOCKET, socket.SCM_RIGHTS)


def default_socket_path() -> str:
    """$IOMMUFDD_SOCKET, else the user's daemon if it listens there, else the system's."""
    if path := os.environ.get("IOMMUFDD_SOCKET"):
        return path
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        path = os.path.join(runtime, "iommufdd.sock")
        if os.path.exists(path):
            return path
    return "/run/iommufdd/iommufdd.sock"


def rights(fds: Iterable[int]) -> list[tuple[int, int, array[int]]]:
    """Ancillary data that carries descriptors."""
    return [(*_RIGHTS, array("i", fds))]


def received(ancillary: Sequence[tuple[int, int, bytes]], flags: int) -> list[int]:
    """The descriptors in ancillary data, now ours. ProtocolError if some were cut off."""
    fds = array("i")
    for level, kind, data in ancillary:
        if (level, kind) == _RIGHTS:
            fds.frombytes(data[: len(data) // fds.itemsize * fds.itemsize])
    if flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC):
        for fd in fds:
            os.close(fd)
        raise ProtocolError("a reply was cut off")
    return list(fds)


class Connection:
    """A channel: calls one at a time, whichever thread makes them. Not to be used across a fork.

    A call that a signal handler leaves (Ctrl-C) is carried out all the same; its answer is dropped.
    """

    def __init__(
        self,
        socket_path: str | None = None,
        *,
        kind: int = wire.Kind.IOMMUFD,
        mm: int = 0,
        machine: str = "",
        device: str = "",
        container: bool = False,
        context: HasFileno | int | None = None,
        explain: bool = False,
    ) -> None:
        """OSError if there is no daemon, IommufdOSError if it refuses."""
        first = hello(kind, mm=mm, machine=machine, device=device, container=container)
        self.socket_path = socket_path or default_socket_path()
        self.explain = explain
        self._device = kind == wire.Kind.DEVICE
        self._flags = int(wire.Flag.REASON) if explain else 0
        self._plains = PLAINS[self._flags]
        self._numbers = NUMBERS[self._flags]
        self._lock = allocate_lock()
        self._scratch = ScratchFile()
        self._buffer = bytearray(BUFFER)
        self._view = memoryview(self._buffer)
        self._owed: bytes | Packet | None = None  # on its way, and its reply not read
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._connect(first, [] if context is None else [fd_number(context)])
        except BaseException:
            self._sock.close()
            raise
        self._send = self._sock.send
        self._recv_into = self._sock.recv_into
        _live.append(ref(self, _live.remove))

    def _connect(self, first: bytes, fds: list[int]) -> None:
        try:
            self._sock.connect(self.socket_path)
        except OSError as error:
            error.filename = self.socket_path
            raise
        try:
            self._sock.sendmsg([first], rights(fds))
        except BrokenPipeError:
            pass  # refused before we could ask: the answer is there all the same
        try:
            length, got = self._receive()
        except ConnectionResetError:
            length, got = self._receive()  # the hello was not read; what was said comes behind that error
        identity = got[0] if got else -1
        try:
            self.mm = welcome(bytes(self._view[:length]))
        except BaseException:
            for fd in got:
                os.close(fd)
            raise
        self.identity = Fd(identity)

    # ---- packets ----

    def _receive(self) -> tuple[int, list[int]]:
        length, ancillary, flags, _ = self._sock.recvmsg_into([self._buffer], ANCILLARY, socket.MSG_CMSG_CLOEXEC)
        return length, received(ancillary, flags)

    def _drop_reply(self) -> None:
        """Read the reply that an interrupted call left behind, unless it has been read already."""
        if self._buffer.startswith(_NOTHING):
            for fd in self._receive()[1]:
                os.close(fd)
        self._owed = None

    def _round_trip(self, data: bytes) -> int:
        """Send a packet, and receive one without descriptors; its length. Under the lock."""
        if self._owed:
            self._drop_reply()
        self._buffer[:4] = _NOTHING
        self._owed = data
        try:
            self._send(data)
        except OSError:
            self._owed = None
            raise
        length = self._recv_into(self._buffer)
        self._owed = None
        if not length:
            raise ConnectionResetError("the daemon closed the channel")
        return length

    def _exchange(self, packet: Packet) -> list[Result]:
        """Send a packet and take its reply, with descriptors either way."""
        with self._lock:
            if packet.places and (size := self._scratch.unannounced):
                announcement = self._packet()
                announcement.add(calls.Call(wire.Op.SCRATCH, file=self._scratch.fileno))
                (result,) = self._exchange_one(announcement)
                if isinstance(result, OSError):
                    raise result
                self._scratch.announced = size
            return self._exchange_one(packet)

    def _exchange_one(self, packet: Packet) -> list[Result]:
        """Under the lock."""
        if self._owed:
            self._drop_reply()
        self._buffer[:4] = _NOTHING
        self._owed = packet
        try:
            self._sock.sendmsg([packet.data], rights(packet.fds) if packet.fds else [])
        except OSError:
            self._owed = None
            raise
        length, fds = self._receive()
        self._owed = None
        if not length:
            raise ConnectionResetError("the daemon closed the channel")
        return packet.results(self._view, length, fds)

    def _packet(self) -> Packet:
        return Packet(self._scratch, self._flags)

    def _send_all(self, packets: Sequence[Packet]) -> list[Result]:
        return [result for packet in packets if packet for result in self._exchange(packet)]

    def _call(self, call: Call) -> int:
        packet = self._packet()
        packet.add(call)
        (result,) = self._exchange(packet)
        if isinstance(result, OSError):
            raise result
        return result

    # ---- ioctl ----

    @overload
    def ioctl(self, cmd: Ioctl | VfioIoctl | KvmIoctl, *, memory: Memory = ...) -> int: ...
    @overload
    def ioctl(self, cmd: int, arg: bytearray | int, *, memory: Memory = ...) -> int: ...

    def ioctl(
        self,
        cmd: Ioctl | VfioIoctl | KvmIoctl | int,
        arg: bytearray | int = 0,
        *,
        memory: Memory = OWN_MEMORY,
    ) -> int:
        """ioctl(2). The argument is a struct, its bytes (changed in place), or its address in `memory`.

        Pointers in the struct are addresses in `memory`: by default real ones, of this process. Descriptors
        are this process's. IommufdOSError if the call fails, with whatever the kernel then writes back.
        """
        plain = self._plains[type(cmd)]
        if plain is None:
            return self._ioctl(cmd, arg, memory)
        struct: Ioctl = cmd  # type: ignore[assignment]
        packed = struct.pack()
        with self._lock:
            length = self._round_trip(plain.head + packed + plain.pad)
            return plain_result(self._view, length, struct, packed)

    def _ioctl(self, cmd: Ioctl | VfioIoctl | KvmIoctl | int, arg: bytearray | int, memory: Memory) -> int:
        """An ioctl whose struct is not plain, or is given as bytes."""
        if not isinstance(cmd, int):
            return self._call(calls.ioctl(cmd.CMD, cmd, memory, device=self._device))
        plain = self._numbers.get(cmd)
        if plain is not None and not self._device:
            size = plain.room
            packed = bytes(arg) if isinstance(arg, bytearray) else memory.read(arg, size)
            if (len(packed) == size == int.from_bytes(packed[:4], "little")) and (
                isinstance(arg, bytearray) or memory.writable(arg, size) == size
            ):
                return self._plain_bytes(plain.head + packed + plain.pad, arg, memory)
        return self._call(calls.ioctl(cmd, arg, memory, device=self._device))

    def _plain_bytes(self, packet: bytes, arg: bytearray | int, memory: Memory) -> int:
        with self._lock:
            length = self._round_trip(packet)
            reply = self._buffer[:length]
        result, writes, reason = raw_result(reply)
        for offset, data in writes:
            if isinstance(arg, bytearray):
                arg[offset : offset + len(data)] = data
            else:
                memory.write(arg + offset, bytes(data))
        if result < 0:
            raise calls.IommufdOSError(-result, reason)
        return result

    def batch(self, structs: Iterable[Ioctl] = ()) -> Batch[list[Result]]:
        """Ioctls that travel together."""
        batch = Batch(self._packet, self._send_all, device=self._device)
        batch.ioctls(list(structs))
        return batch

    # ---- files ----

    def read(self, fd: HasFileno | int, count: int) -> bytes:
        """read(2) on a file that the daemon handed out; b"" when there is nothing to read."""
        buffers = Buffers()
        data = bytearray(count)
        done = self.read_into(fd, buffers.add(data), count, memory=buffers)
        return bytes(data[:done])

    def read_into(self, fd: HasFileno | int, addr: int, count: int, *, memory: Memory = OWN_MEMORY) -> int:
        """read(2) into memory; how many bytes."""
        return self._call(calls.read(fd_number(fd), addr, count, memory))

    def write(self, fd: HasFileno | int, data: Buffer) -> int:
        """write(2) on a file that the daemon handed out; how many bytes it took."""
        buffers = Buffers()
        view = memoryview(data).cast("B")
        return self.write_from(fd, buffers.add(view), view.nbytes, memory=buffers)

    def write_from(self, fd: HasFileno | int, addr: int, count: int, *, memory: Memory = OWN_MEMORY) -> int:
        """write(2) from memory; how many bytes were taken."""
        return self._call(calls.write(fd_number(fd), addr, count, memory))

    def file(self, fd: int) -> File:
        """A descriptor that came with an answer, to be closed once."""
        return File(fd, self)

    # ---- the address space ----

    def register(
        self, addr: int, length: int, fd: HasFileno | int, offset: int = 0, *,
        prot: int = 3, private: bool = False,
    ) -> None:  # fmt: skip
        """mmap(2) with MAP_FIXED, as far as the daemon is concerned: [addr, addr + length) shows the file.

        Only such memory can be pinned by IOAS_MAP. addr, length and offset are multiples of 4096.
        """
        self._call(calls.register(fd_number(fd), addr, length, offset, prot, private=private))

    def unregister(self, addr: int, length: int) -> None:
        """munmap(2): nothing is there any more. What is pinned stays pinned."""
        self._call(calls.unregister(addr, length))

    def protect(self, addr: int, length: int, prot: int) -> None:
        """mprotect(2)."""
        self._call(calls.protect(addr, length, prot))

    def mmap(self, length: int, offset: int, prot: int = 3, flags: int = 1) -> Mapping:
        """mmap(2) of the iommufd: the region at an offset that VIOMMU_ALLOC gave."""
        call = calls.mmap(length, offset, prot, flags)
        return Mapping(self._call(call), call.mapping, length, prot)

    # ---- the end ----

    @property
    def closed(self) -> bool:
        return self._sock.fileno() < 0

    def close(self) -> None:
        """Close the channel, and wait until the daemon has: the last channel takes the context along."""
        try:
            if not self.closed:
                self._call(calls.Call(wire.Op.CLOSE))
        except ConnectionError:
            pass  # the daemon is gone, and the channel with it
        finally:
            self._drop()

    def abandon(self) -> None:
        """Close the socket without a word: another process has it too. The identity stays open."""
        self._lock = allocate_lock()
        self._sock.close()

    def _drop(self) -> None:
        self._sock.close()
        self.identity.close()
        self._scratch.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


# After a fork both processes would read each other's replies: the child's copies are closed.
_live: list[ref[Connection]] = []


def _leave_to_parent() -> None:
    for live in _live[:]:
        connection = live()
        if connection is not None:
            connection.abandon()
    _live.clear()


os.register_at_fork(after_in_child=_leave_to_parent)
