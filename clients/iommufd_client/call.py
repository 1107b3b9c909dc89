"""Room client: one request, and what its reply does to the caller's memory and descriptors. No I/O.

The caller's pointers become segments and its descriptors indexes; the answer puts both back: sections 3 to 6
of docs/PROTOCOL.md. Which field is which is known from iommufd_uapi.args.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Protocol

from iommufd_uapi import args, wire
from iommufd_uapi.iommufd import IOCTLS
from iommufd_uapi.iommufd_test import TestCmd
from iommufd_uapi.kvm import KvmIoctl, argument_size
from iommufd_uapi.layout import Direction, Ioctl, Layout, VfioIoctl
from iommufd_uapi.vfio import CONTAINER_IOCTLS, DEVICE_IOCTLS, VfioDeviceBindIommufd

from .memory import NO_MEMORY, OWN_MEMORY, Memory

if TYPE_CHECKING:
    from collections.abc import Sequence

# Where a struct lies that has no address of its own: in the kernel's half, that no pointer means.
STRUCT_ADDR = 0xFFFF_8000_0000_0000
SHOWN = 4096  # longest struct that travels as it is; the bytes beyond are zero, or the call fails
ARGSZ_SHOWN = 65_536  # the same for VFIO structs, whose tails carry data
INLINE = 65_536  # larger memory goes into the scratch file
CHUNK = 1 << 20
U32_MAX = 0xFFFF_FFFF
IOCTL = int(wire.Op.IOCTL)
SEGMENT_ROOM = 24  # of the reply, for each segment after the second

_TABLE: tuple[type[Ioctl], ...] = (*IOCTLS, TestCmd)
STRUCTS = {struct.CMD: struct for struct in _TABLE}
_ARGSZ = {struct.CMD: struct.MIN_SIZE for struct in (*CONTAINER_IOCTLS, *DEVICE_IOCTLS)}

Target = Ioctl | VfioIoctl | KvmIoctl | bytearray | int  #: an ioctl's argument: a struct, its bytes, or its address

_REQUEST, _SEGMENT = wire.REQUEST.pack, wire.SEGMENT.pack
_PADDING = wire.PADDING


class IommufdOSError(OSError):
    """The daemon answered an errno.

    `reason` is its one line on why, if it was asked to explain. `struct` is the ioctl's struct as the call
    left it, if the caller gave one.
    """

    def __init__(self, errno: int, reason: str = "", struct: Layout | None = None) -> None:
        super().__init__(errno, os.strerror(errno))
        self.reason = reason
        self.struct = struct

    def __str__(self) -> str:
        return f"{super().__str__()}: {self.reason}" if self.reason else super().__str__()


class Descriptors:
    """The descriptors that came with a packet: each is handed to the caller, or closed."""

    __slots__ = ("_fds", "count", "first")

    def __init__(self, fds: Sequence[int]) -> None:
        self._fds = list(fds)
        self.first = self.count = 0  # those of the reply that is read now

    def take(self, index: int) -> int:
        """The number of descriptor `index`, now the caller's; -1 if there is none."""
        if index >= len(self._fds):
            return -1
        fd, self._fds[index] = self._fds[index], -1
        return fd

    def close(self) -> None:
        for fd in self._fds:
            if fd >= 0:
                os.close(fd)
        self._fds.clear()


class Segment:
    """Memory that a request may touch, as the daemon is told of it."""

    __slots__ = ("addr", "data", "place", "readable", "writable")

    def __init__(self, addr: int, data: bytes, readable: int, writable: int) -> None:
        self.addr = addr
        self.data = data  # the readable bytes; trailing zeros may be missing
        self.readable = readable
        self.writable = writable
        self.place = -1  # its offset in the scratch file, once it is there

    @property
    def large(self) -> bool:
        return self.readable > INLINE or self.writable > INLINE

    def encode(self) -> tuple[bytes, bytes]:
        """Header, and the inline data with its padding."""
        if self.large:
            return _SEGMENT(self.addr, self.readable, self.writable, max(self.place, 0), 1), b""
        shown = self.data.rstrip(b"\0")
        head = _SEGMENT(self.addr, self.readable, self.writable, len(shown), 0)
        return head, shown + _PADDING[len(shown) & 7]


class Call:
    """One request. Descriptors are numbers of this process; on the wire they are indexes."""

    __slots__ = ("arg", "cmd", "file", "memory", "op", "segments", "target")

    def __init__(
        self,
        op: int,
        cmd: int = 0,
        segments: Sequence[Segment] = (),
        *,
        file: int | None = None,
        arg: int = 0,
        memory: Memory = NO_MEMORY,
    ) -> None:
        self.op = op
        self.cmd = cmd
        self.arg = arg
        self.segments = list(segments)
        self.file = file  # the descriptor whose index is `cmd`
        self.memory = memory  # where the answer is stored
        self.target: Ioctl | VfioIoctl | KvmIoctl | None = None  # the caller's struct

    def fds(self) -> list[int]:
        """The open descriptors to send, in the order `encode` counts them."""
        return [] if self.file is None or not is_open(self.file) else [self.file]

    @property
    def large(self) -> bool:
        return any(segment.large for segment in self.segments)

    def room(self) -> int:
        """Bytes of the reply packet that its writes can take."""
        inline = sum(segment.writable for segment in self.segments if not segment.large)
        return inline + SEGMENT_ROOM * max(len(self.segments) - 2, 0)

    def encode(self, base: int, flags: int) -> bytes:
        """The request; its first descriptor has the index `base` in the packet."""
        cmd = self.cmd
        if self.file is not None:
            cmd = base if is_open(self.file) else wire.NONE
        return self._encode(cmd, flags, self.segments)

    def _encode(self, cmd: int, flags: int, segments: Sequence[Segment]) -> bytes:
        pairs = [segment.encode() for segment in segments]
        body = b"".join([pair[0] for pair in pairs] + [pair[1] for pair in pairs])
        return _REQUEST(16 + len(body), self.op, flags, len(pairs), cmd, self.arg) + body

    def store(self, segment: int, offset: int, data: bytes, fds: Descriptors) -> None:
        """One write record of the reply."""
        self.memory.write(self.segments[segment].addr + offset, data)

    def result(self, value: int, fds: Descriptors) -> int:
        """The answer, after all records are stored."""
        return value


class MmapCall(Call):
    """MMAP, whose answer is a file with the registers, and `mapping`: a descriptor that stands for the mapping."""

    __slots__ = ("mapping",)

    def result(self, value: int, fds: Descriptors) -> int:
        if value < 0:
            return value
        self.mapping = fds.take(fds.first + 1)
        return fds.take(fds.first)


def mmap(length: int, offset: int, prot: int, flags: int) -> MmapCall:
    """mmap(2) on the context."""
    data = wire.RegisterBody(0, length, offset, prot, flags).pack()
    return MmapCall(wire.Op.MMAP, 0, [Segment(0, data, len(data), 0)])


def read(fd: int, addr: int, count: int, memory: Memory) -> Call:
    """read(2). `arg` is the count, of which only what is writable can be written."""
    buffer = Segment(addr, b"", 0, memory.writable(addr, min(count, wire.MAX_SCRATCH)))
    return Call(wire.Op.READ, 0, [buffer], file=fd, arg=min(count, U32_MAX), memory=memory)


def write(fd: int, addr: int, count: int, memory: Memory) -> Call:
    """write(2)."""
    data = _prefix(memory, addr, min(count, wire.MAX_SCRATCH))
    return Call(wire.Op.WRITE, 0, [Segment(addr, data, len(data), 0)], file=fd, arg=min(count, U32_MAX))


def register(fd: int, addr: int, length: int, offset: int, prot: int, *, private: bool) -> Call:
    """mmap(2) with MAP_FIXED of a file: what the daemon shall know of it."""
    data = wire.RegisterBody(addr, length, offset, prot, wire.REGISTER_PRIVATE if private else 0).pack()
    return Call(wire.Op.REGISTER, 0, [Segment(0, data, len(data), 0)], file=fd)


def unregister(addr: int, length: int) -> Call:
    """munmap(2)."""
    data = wire.RegisterBody(addr, length).pack()
    return Call(wire.Op.UNREGISTER, 0, [Segment(0, data, len(data), 0)])


def protect(addr: int, length: int, prot: int) -> Call:
    """mprotect(2)."""
    data = wire.RegisterBody(addr, length, 0, prot).pack()
    return Call(wire.Op.PROTECT, 0, [Segment(0, data, len(data), 0)])


def is_open(fd: int) -> bool:
    """Whether the number is a descriptor of this process: a bad one would spoil the whole packet."""
    try:
        os.get_inheritable(fd)
    except (OSError, OverflowError):
        return False
    return True


# ---- ioctl -------------------------------------------------------------------------------------------------


class IoctlCall(Call):
    """An ioctl: segment 0 is its struct, the others are what the struct's pointers name."""

    __slots__ = ("device", "fields", "image", "outs", "pointed", "size")

    def __init__(self, cmd: int, segments: Sequence[Segment], memory: Memory, *, device: bool) -> None:
        super().__init__(IOCTL, cmd, segments, memory=memory)
        self.device = device
        self.fields: list[tuple[int, int]] = []  # (offset, number) of each descriptor that goes in
        self.pointed: list[tuple[int, int, int]] = []  # (segment, offset, number) of those that pointers lead to
        self.outs: list[int] = []  # offsets of those that come back
        self.size: int | None = None  # the caller's `size`, where the daemon is shown another
        self.image: bytearray | None = None  # the struct's bytes, if it is not in `memory`

    def fds(self) -> list[int]:
        numbers = [fd for _, fd in self.fields] + [fd for _, _, fd in self.pointed]
        return [fd for fd in numbers if is_open(fd)]

    def encode(self, base: int, flags: int) -> bytes:
        if not self.fields and not self.pointed:
            return self._encode(self.cmd, flags, self.segments)
        sent = list(self.segments)
        for at, offset, fd in [*((0, *field) for field in self.fields), *self.pointed]:
            index = wire.NONE if fd < 0 else wire.CLOSED
            if is_open(fd):
                index, base = base, base + 1
            segment = sent[at]
            data = segment.data[:offset] + index.to_bytes(4, "little") + segment.data[offset + 4 :]
            sent[at] = Segment(segment.addr, data, segment.readable, segment.writable)
        return self._encode(self.cmd, flags, sent)

    def store(self, segment: int, offset: int, data: bytes, fds: Descriptors) -> None:
        if segment:
            self.memory.write(self.segments[segment].addr + offset, data)
            return
        if self.fields or self.outs or self.size is not None:
            data = self._own_numbers(offset, data, fds)
        if self.image is None:
            self.memory.write(self.segments[0].addr + offset, data)
        else:
            self.image[offset : offset + len(data)] = data

    def _own_numbers(self, offset: int, data: bytes, fds: Descriptors) -> bytes:
        """What the kernel would have written: our numbers for indexes, and the size that the caller gave."""
        image = bytearray(offset) + data
        end = len(image)
        own = dict(self.fields)
        for at in self.outs:
            if offset <= at and at + 4 <= end:
                own[at] = fds.take(int.from_bytes(image[at : at + 4], "little"))
        if self.size is not None:
            own[0] = self.size
        for at, number in own.items():
            image[at : at + 4] = (number & 0xFFFF_FFFF).to_bytes(4, "little")
        return bytes(image[offset:end])

    def result(self, value: int, fds: Descriptors) -> int:
        if self.target is not None and self.image is not None:
            self.target.update(self.image)
        if fds.count and value >= 0 and args.returns_fd(self.cmd, self.segments[0].data, self.device):
            return fds.take(value)
        return value


def ioctl(cmd: int, target: Target, memory: Memory = OWN_MEMORY, *, device: bool = False) -> IoctlCall:
    """The request of an ioctl whose argument is a struct, its bytes, or an address in `memory`.

    Pointers in the struct are addresses in `memory`. Some VFIO numbers mean another thing on a device.
    """
    if isinstance(target, int):
        addr, image = target, None
        size, data, readable = _show(cmd, addr, memory)
        writable = memory.writable(addr, readable) if readable >= 4 else 0
    else:
        addr, image = STRUCT_ADDR, target if isinstance(target, bytearray) else bytearray(target.pack())
        size, data, readable = None, bytes(image), len(image)
        if readable > SHOWN:
            size, data, readable = _show(cmd, addr, _Image(image))
        writable = readable
    call = IoctlCall(cmd, [Segment(addr, data, readable, writable)], memory, device=device)
    call.size, call.image = size, image
    call.target = None if isinstance(target, int | bytearray) else target
    _follow(call, data, memory)
    return call


class _Image:
    """A struct that is no one's memory, seen at STRUCT_ADDR."""

    __slots__ = ("_bytes",)

    def __init__(self, image: bytearray) -> None:
        self._bytes = image

    def read(self, addr: int, length: int) -> bytes:
        at = addr - STRUCT_ADDR
        return bytes(self._bytes[at : at + length])


class _Readable(Protocol):
    def read(self, addr: int, length: int) -> bytes: ...


Shown = tuple[int | None, bytes, int]  # of a struct: the true size if another is shown, bytes, how many of them


def _show(cmd: int, addr: int, memory: _Readable) -> Shown:
    """What the daemon is shown of a struct."""
    known = argument_size(cmd)
    if known is not None:  # KVM's: no size in the struct, and no memory behind a number
        data = memory.read(addr, known) if known else b""
        return None, data, len(data)
    head = memory.read(addr, 4)
    if len(head) < 4:
        return None, head, len(head)
    size = int.from_bytes(head, "little")
    struct = VfioDeviceBindIommufd if cmd == VfioDeviceBindIommufd.CMD else STRUCTS.get(cmd)
    if struct is None:  # VFIO reads its fixed part whatever argsz says, but for BIND
        data = memory.read(addr, max(min(size, ARGSZ_SHOWN), _ARGSZ.get(cmd, 4)))
        return None, data, len(data)
    data = memory.read(addr, max(min(size, SHOWN), 4))
    if size <= SHOWN or len(data) < SHOWN:
        return None, data, len(data)
    return _show_long(struct.SIZEOF, addr, size, data, memory)


def _show_long(known: int, addr: int, size: int, data: bytes, memory: _Readable) -> Shown:
    """A struct larger than anyone sends: only what is met first beyond the known part matters to the kernel.

    Zeros to the end: the call runs, as with the known size. A byte that is not zero: E2BIG. A fault: EFAULT.
    """
    tail = data[known:].strip(b"\0")
    at = len(data)
    while not tail and at < size:
        part = memory.read(addr + at, min(CHUNK, size - at))
        tail = part.strip(b"\0")
        if not tail and len(part) < min(CHUNK, size - at):
            return None, data, len(data)
        at += len(part)
    shown = known + 1 if tail else known
    data = shown.to_bytes(4, "little") + data[4:known] + (b"\1" if tail else b"")
    return size, data, shown


def _follow(call: IoctlCall, data: bytes, memory: Memory) -> None:
    """Segments for what the pointers name, and the places of descriptors."""
    pointed = dict(args.pointed_fds(call.cmd, data))
    for pointer, addr, length, direction in args.pointers(call.cmd, data, call.device):
        if length and direction is not Direction.ADDRESS:
            segment = _segment(addr, min(length, wire.MAX_SCRATCH), direction, memory)
            if segment.readable or segment.writable:
                call.segments.append(segment)
            at = pointed.get(pointer, len(segment.data))
            if at + 4 <= len(segment.data):
                number = int.from_bytes(segment.data[at : at + 4], "little", signed=True)
                call.pointed.append((len(call.segments) - 1, at, number))
    for offset, direction in args.fds(call.cmd, data, call.device):
        if offset + 4 > len(data):
            continue
        if direction is Direction.IN:
            call.fields.append((offset, int.from_bytes(data[offset : offset + 4], "little", signed=True)))
        else:
            call.outs.append(offset)


def _segment(addr: int, length: int, direction: Direction, memory: Memory) -> Segment:
    data, writable = b"", 0
    if direction in (Direction.IN, Direction.INOUT):
        data = _prefix(memory, addr, length)
    if direction in (Direction.OUT, Direction.INOUT):
        writable = memory.writable(addr, length)
    return Segment(addr, data, len(data), writable)


def _prefix(memory: Memory, addr: int, length: int) -> bytes:
    """memory.read() that does not ask for more at once than there may be."""
    data = memory.read(addr, min(length, CHUNK))
    if len(data) == length or len(data) < CHUNK:
        return data
    whole = bytearray(data)
    while len(whole) < length:
        want = min(CHUNK, length - len(whole))
        part = memory.read(addr + len(whole), want)
        whole += part
        if len(part) < want:
            break
    return bytes(whole)
