"""Room client: the wire without I/O. Requests into packets, reply packets into results (docs/PROTOCOL.md).

Nothing here waits or owns a socket: the synchronous and the Trio client move the bytes.
"""

from __future__ import annotations

import struct as structs
from itertools import islice
from typing import TYPE_CHECKING, Generic, NamedTuple, Protocol, TypeVar, overload

from iommufd_uapi import wire
from iommufd_uapi.iommufd_test import TestCmd
from iommufd_uapi.layout import Direction, Ioctl

from .call import STRUCT_ADDR, STRUCTS, Call, Descriptors, IommufdOSError, ioctl
from .memory import OWN_MEMORY, Memory

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from iommufd_uapi.kvm import KvmIoctl
    from iommufd_uapi.layout import VfioIoctl

    from .call import Target

BUFFER = wire.MAX_PACKET + 64  # of a receive buffer: what is read of a reply may lie behind the packet
ANCILLARY = 16 + 4 * wire.MAX_FDS  # CMSG_SPACE of the most descriptors that a packet can bring
Result = int | IommufdOSError
Answer = TypeVar("Answer")

_reply = wire.REPLY.unpack_from
_record = wire.RECORD.unpack_from
_reply_record = wire.REPLY_RECORD.unpack_from


class ProtocolError(ConnectionError):
    """What came from the socket is not what docs/PROTOCOL.md says; the channel is of no more use."""


# ---- hello -------------------------------------------------------------------------------------------------


def hello(kind: int, *, mm: int = 0, machine: str = "", device: str = "", container: bool = False) -> bytes:
    """The first packet; machine: [INSTANCE][@MACHINE]; container: as /dev/vfio/vfio.

    ValueError if a name takes more than 32 bytes.
    """
    names = machine.encode(), device.encode()
    if max(map(len, names)) > 32:
        raise ValueError("the name of a machine or a device takes at most 32 bytes")
    flags = wire.HELLO_CONTAINER if container else 0
    return wire.Hello(kind=kind, flags=flags, mm=mm, machine=names[0], device=names[1]).pack()


def welcome(data: bytes) -> int:
    """The mm of a hello reply. IommufdOSError if the daemon refuses, ProtocolError if this is no iommufdd."""
    if not data:
        raise ConnectionResetError("the daemon closed the connection without a hello")
    size = wire.HelloReply.SIZEOF
    if len(data) < size or (reply := wire.HelloReply.unpack(data)).magic != wire.MAGIC:
        raise ProtocolError("this is no iommufdd: its hello reply is not one")
    if reply.error:
        said = f"the daemon speaks version {reply.version}" if reply.version != wire.VERSION else ""
        raise IommufdOSError(reply.error, said or data[size:].decode(errors="replace"))
    if len(data) > size:
        raise ProtocolError("a hello reply with something behind it")
    return reply.mm


# ---- structs without pointers and descriptors --------------------------------------------------------------


class Plain(NamedTuple):
    """How a struct travels that is all there is to its ioctl: between constant bytes."""

    head: bytes
    pad: bytes
    length: int
    room: int


def plain(layout: type[Ioctl], flags: int) -> Plain | None:
    """None if the struct has pointers or descriptors, or is not one of /dev/iommu."""
    pointed = any(pointer.direction is not Direction.ADDRESS for pointer in layout.POINTERS)
    if pointed or layout.FDS or layout is TestCmd or STRUCTS.get(layout.CMD) is not layout:
        return None
    size, pad = layout.SIZEOF, wire.PADDING[layout.SIZEOF & 7]
    length = wire.CALL.size + size + len(pad)
    head = wire.CALL.pack(length, wire.Op.IOCTL, flags, 1, layout.CMD, 0, STRUCT_ADDR, size, size, size, 0)
    return Plain(head, pad, length, size)


class Plains(dict[type, "Plain | None"]):
    """`plain` of each struct class, found once."""

    def __init__(self, flags: int) -> None:
        self.flags = flags

    def __missing__(self, layout: type) -> Plain | None:
        found = self[layout] = plain(layout, self.flags) if issubclass(layout, Ioctl) else None
        return found


PLAINS = (Plains(0), Plains(int(wire.Flag.REASON)))  # by the flags of the requests


def plain_numbers(plains: Plains) -> dict[int, Plain]:
    """The same by ioctl number."""
    return {cmd: found for cmd, layout in STRUCTS.items() if (found := plains[layout]) is not None}


NUMBERS = tuple(map(plain_numbers, PLAINS))


def _error(result: int, reason: memoryview, target: Ioctl | VfioIoctl | KvmIoctl | None) -> IommufdOSError:
    return IommufdOSError(-result, str(reason, "utf-8", "replace"), target)


def plain_result(data: memoryview, length: int, target: Ioctl, packed: bytes) -> int:
    """The result of a packet whose only request is a plain one; the struct is updated. IommufdOSError.

    `data` is the receive buffer, of which `length` bytes are the packet.
    """
    said, result, writes, reason, _, _, offset, size, _ = _reply_record(data)
    if said != length:
        raise ProtocolError(f"a reply of {said} bytes in a packet of {length}")
    if writes == 1:
        new = data[32 : 32 + size]
        if new != packed[offset : offset + size]:
            _put(target, packed, offset, new)
        end = 32 + (size + 7 & ~7)
    else:
        end = _update(data, 16, writes, target, packed)
    if result < 0:
        raise _error(result, data[end : end + reason], target)
    return result  # type: ignore[no-any-return]


def _put(target: Ioctl, packed: bytes, offset: int, new: memoryview) -> None:
    """Store one write record in a struct."""
    if len(new) != len(packed):
        image = bytearray(packed)
        image[offset : offset + len(new)] = new
        new = memoryview(image)
    target.update(new)


def raw_result(reply: bytearray) -> tuple[int, list[tuple[int, bytearray]], str]:
    """The only reply of a packet whose only segment is a struct: result, writes as (offset, bytes), why."""
    try:
        length, result, writes, reason, _ = _reply(reply)
        at, stored = 16, []
        for _ in range(writes):
            _, offset, size, _ = _record(reply, at)
            at += 16
            stored.append((offset, reply[at : at + size]))
            at += size + 7 & ~7
    except structs.error as error:
        raise ProtocolError(f"a reply packet of {len(reply)} bytes: {error}") from None
    if length != len(reply):
        raise ProtocolError(f"a reply of {length} bytes in a packet of {len(reply)}")
    return result, stored, str(reply[at : at + reason], "utf-8", "replace")


def _update(data: memoryview, at: int, writes: int, target: Ioctl, packed: bytes) -> int:
    """Store the write records of a plain request; where they end."""
    if not writes:
        return at
    image = bytearray(packed)
    for _ in range(writes):
        _, offset, length, _ = _record(data, at)
        at += 16
        image[offset : offset + length] = data[at : at + length]
        at += length + 7 & ~7
    target.update(image)
    return at


# ---- packets -----------------------------------------------------------------------------------------------


class Scratch(Protocol):
    """The channel's scratch file: memory too large for a packet."""

    def place(self, data: bytes, length: int) -> int:
        """The offset of length bytes that start with data, ours until released. OSError: ENOMEM."""
        ...

    def release(self, count: int) -> None:
        """So many places are free again."""
        ...

    def read(self, offset: int, length: int) -> bytes:
        """What lies there now."""
        ...


class Packet:
    """Requests that travel together, and the reading of their replies."""

    __slots__ = (
        "_calls", "_flags", "_length", "_parts", "_plains", "_room", "_room_each", "_scratch", "fds", "places",
    )  # fmt: skip

    def __init__(self, scratch: Scratch, flags: int = 0) -> None:
        self._scratch = scratch
        self._flags = flags
        self._plains = PLAINS[flags]
        self._room_each = wire.REPLY_ROOM + (wire.REASON_ROOM if flags else 0)
        self._parts: list[bytes] = []
        self._calls: list[Call | tuple[Ioctl, bytes]] = []
        self._length = 0
        self._room = 0  # bytes of the reply packet that are spoken for
        self.fds: list[int] = []  # to send along
        self.places = 0  # in the scratch file, which the daemon must know before the packet comes

    def __del__(self) -> None:
        self._release()  # only now: an interrupted call may still write there until its reply has come

    def _release(self) -> None:
        places, self.places = self.places, 0
        if places:
            self._scratch.release(places)

    def __len__(self) -> int:
        return len(self._calls)

    @property
    def data(self) -> bytes:
        """The packet."""
        return b"".join(self._parts)

    def add_plain(self, target: Target) -> bool:
        """Add an ioctl with a `plain` struct; False if it is not plain, or the packet is full."""
        found = self._plains[type(target)]
        if found is None or not self._reserve(found.length, found.room, 0):
            return False
        struct: Ioctl = target  # type: ignore[assignment]  # only such have a Plain
        packed = struct.pack()
        self._parts.append(found.head + packed + found.pad)
        self._calls.append((struct, packed))
        return True

    def add_plains(self, targets: Sequence[Ioctl], start: int) -> int:
        """`add_plain` of targets[start:], as far as it goes; where it stopped."""
        plains, parts, calls, each = self._plains, self._parts, self._calls, self._room_each
        length, room = self._length, self._room
        for target in islice(targets, start, start + wire.MAX_REQUESTS - len(calls)):
            found = plains[type(target)]
            if found is None:
                break
            head, pad, size, writable = found
            length += size
            room += writable + each
            if length > wire.MAX_PACKET or room > wire.MAX_PACKET:
                break
            packed = target.pack()
            parts.append(head + packed + pad)
            calls.append((target, packed))
            self._length, self._room = length, room
            start += 1
        return start

    def add(self, call: Call) -> bool:
        """Add a request; False if the packet is full. ValueError if it would not even fit alone."""
        fds = call.fds()
        data = call.encode(len(self.fds), self._flags)
        if not self._reserve(len(data), call.room(), len(fds)):
            if self._calls:
                return False
            raise ValueError(f"{len(data)} bytes and {len(fds)} descriptors are more than a packet takes")
        if call.large:
            self._place(call)
            data = call.encode(len(self.fds), self._flags)
        self.fds += fds
        self._parts.append(data)
        self._calls.append(call)
        return True

    def _reserve(self, length: int, room: int, fds: int) -> bool:
        length += self._length
        room += self._room + self._room_each
        if (
            length > wire.MAX_PACKET
            or room > wire.MAX_PACKET
            or len(self._calls) >= wire.MAX_REQUESTS
            or len(self.fds) + fds > wire.MAX_FDS
        ):
            return False
        self._length = length
        self._room = room
        return True

    def _place(self, call: Call) -> None:
        """Put what is large into the scratch file."""
        for segment in call.segments:
            if segment.large:
                segment.place = self._scratch.place(segment.data, max(segment.readable, segment.writable))
                self.places += 1

    def results(self, data: memoryview, size: int, fds: Sequence[int] = ()) -> list[Result]:
        """What each request answered, in order; memory, structs and descriptors are put in place.

        `data` is the receive buffer (BUFFER bytes), of which `size` are the packet. ProtocolError if that is
        no answer to this packet. Descriptors that nobody gets are closed.
        """
        descriptors = Descriptors(fds)
        results: list[Result] = []
        packet = data[:size].tobytes()  # slices of bytes are cheaper than views
        at = 0
        try:
            for call in self._calls:
                length, result, writes, reason, count, _, offset, written, _ = _reply_record(data, at)
                end = at + length
                if length < 16 or end > size:
                    raise ProtocolError(f"a reply of {length} bytes in a packet of {size}")
                answer: Result = result
                if isinstance(call, tuple):
                    struct, packed = call
                    if writes == 1:
                        at += 32
                        new = packet[at : at + written]
                        if not packed.startswith(new, offset):
                            _put(struct, packed, offset, memoryview(new))
                        at += written + 7 & ~7
                    else:
                        at = _update(data, at + 16, writes, struct, packed)
                    if result < 0:
                        answer = _error(result, data[at : at + reason], struct)
                else:
                    descriptors.count = count
                    at = self._store(call, data, at + 16, writes, descriptors)
                    answer = call.result(result, descriptors)
                    descriptors.first += count
                    if result < 0:
                        answer = _error(result, data[at : at + reason], call.target)
                results.append(answer)
                at = end
        except structs.error as broken:
            raise ProtocolError(f"a reply packet of {size} bytes: {broken}") from None
        finally:
            descriptors.close()
            self._release()
        return results

    def _store(self, call: Call, data: memoryview, at: int, writes: int, fds: Descriptors) -> int:
        """Store the write records of a request; where they end."""
        for _ in range(writes):
            segment, offset, length, inline = _record(data, at)
            at += 16
            if segment >= len(call.segments):
                raise ProtocolError(f"a write to segment {segment} of {len(call.segments)}")
            if inline:
                call.store(segment, offset, bytes(data[at : at + length]), fds)
                at += length + 7 & ~7
            else:
                place = call.segments[segment].place
                call.store(segment, offset, self._scratch.read(place + offset, length), fds)
        return at


class Batch(Generic[Answer]):
    """Ioctls that travel together, in as few packets as hold them. An error does not stop the others.

    The argument and the memory behind its pointers are read when an ioctl is added.
    """

    def __init__(self, packet: Callable[[], Packet], send: Callable[[list[Packet]], Answer], *, device: bool) -> None:
        self._new = packet
        self._send = send
        self._device = device
        self._packets = [packet()]

    @overload
    def ioctl(self, cmd: Ioctl | VfioIoctl, *, memory: Memory = ...) -> None: ...
    @overload
    def ioctl(self, cmd: int, arg: bytearray | int, *, memory: Memory = ...) -> None: ...

    def ioctl(self, cmd: Ioctl | VfioIoctl | int, arg: bytearray | int = 0, *, memory: Memory = OWN_MEMORY) -> None:
        """Add an ioctl, given as to `Iommufd.ioctl`."""
        if self._packets[-1].add_plain(cmd):
            return
        call = (
            ioctl(cmd, arg, memory, device=self._device)
            if isinstance(cmd, int)
            else ioctl(cmd.CMD, cmd, memory, device=self._device)
        )
        if not self._packets[-1].add(call):
            self._packets.append(self._new())
            self._packets[-1].add(call)

    def ioctls(self, structs: Sequence[Ioctl]) -> None:
        """Add many, faster."""
        at = 0
        while at < len(structs):
            at = self._packets[-1].add_plains(structs, at)
            if at < len(structs):
                self.ioctl(structs[at])
                at += 1

    def send(self) -> Answer:
        """Make the calls: a list of what each returned, an IommufdOSError as a value. Then it is empty."""
        packets, self._packets = self._packets, [self._new()]
        return self._send(packets)
