"""Packets: requests out of bytes, replies into bytes (docs/PROTOCOL.md sections 3 and 5).

A packet is checked whole before any of it runs: one that breaks a rule has touched nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from iommufd_uapi import args
from iommufd_uapi.iommufd import IOCTLS
from iommufd_uapi.iommufd_test import TestCmd
from iommufd_uapi.layout import Direction, Ioctl, VfioIoctl
from iommufd_uapi.vfio import DEVICE_IOCTLS
from iommufd_uapi.wire import (
    CALL,
    CLOSED,
    MAX_PACKET,
    MAX_REASON,
    MAX_REQUESTS,
    MAX_SEGMENTS,
    NONE,
    PADDING,
    REASON_ROOM,
    RECORD,
    REPLY,
    REPLY_RECORD,
    REPLY_ROOM,
    REQUEST,
    SEGMENT,
    Flag,
    Op,
    RegisterBody,
    Where,
    padded,
)
from iommufdd.errors import ProtocolError

from .segments import compact

if TYPE_CHECKING:
    from .segments import Record, Segment

Request: TypeAlias = "tuple[int, int, int, int, tuple[Segment, ...]]"  # op, flags, cmd, arg, segments

REASON = int(Flag.REASON)  # ~ of an IntFlag is no ~ of its number
BODY_SIZE = RegisterBody.SIZEOF
TAIL = CALL.size  # bytes of anything that must lie behind a packet for parse(): it unpacks before it looks
SEGMENT_ROOM = 24  # of the reply, for each inline segment after the second

STRUCTS: tuple[type[Ioctl | VfioIoctl], ...] = (*IOCTLS, *DEVICE_IOCTLS)
FD_COMMANDS = frozenset(
    [TestCmd.CMD, *(struct.CMD for struct in STRUCTS if any(fd.direction is Direction.IN for fd in struct.FDS))]
)
KNOWN = frozenset(Op)
INDEXED = frozenset((Op.READ, Op.WRITE, Op.REGISTER, Op.SCRATCH))  # cmd: index of a descriptor
BODIED = frozenset((Op.REGISTER, Op.UNREGISTER, Op.MMAP, Op.PROTECT))  # segment 0 is a RegisterBody
BUFFERED = frozenset((Op.READ, Op.WRITE))  # segment 0 is the buffer

_call = CALL.unpack_from


def parse(packet: bytes, size: int, nfds: int) -> list[Request]:
    """The requests of a packet of `size` bytes that came with nfds descriptors; ProtocolError.

    `packet` holds TAIL bytes more. The most common request, an ioctl with its struct inline, comes first.
    """
    found: list[Request] = []
    at, room = 0, MAX_PACKET
    while at < size:
        length, op, flags, count, cmd, arg, addr, readable, writable, data, where = _call(packet, at)
        if count == 1 and not op | flags | arg | where:
            body = at + 48
            if length != 48 + (data + 7 & ~7) or at + length > size or not data <= readable <= MAX_PACKET:
                raise ProtocolError("a length does not add up")
            segments: tuple[Segment, ...] = ((addr, readable, writable, packet[body : body + data]),)
            room -= REPLY_ROOM + writable
        else:
            segments, cost = _general(packet, at, size)
            room -= cost
            if op:
                _check_operation(op, cmd, segments, nfds, last=at + length == size)
        if cmd in FD_COMMANDS and not op and arg != NONE:
            _check_descriptors(cmd, segments[arg][3], nfds)
        found.append((op, flags, cmd, arg, segments))
        at += length
    if room < 0:
        raise ProtocolError("the replies might not fit a packet")
    if len(found) > MAX_REQUESTS:
        raise ProtocolError(f"{len(found)} requests in one packet")
    return found


def _general(packet: bytes, at: int, size: int) -> tuple[tuple[Segment, ...], int]:
    """The segments of any request, and how much of the reply packet it can take."""
    length, op, flags, count, _, arg = REQUEST.unpack_from(packet, at)
    body, end = at + 16 + 32 * count, at + length
    if length & 7 or body > end or end > size:
        raise ProtocolError("a length does not add up")
    if op not in KNOWN or flags & ~REASON:
        raise ProtocolError(f"unknown operation {op} or flags {flags:#x}")
    if count > MAX_SEGMENTS or (op == Op.IOCTL and arg != NONE and arg >= count):
        raise ProtocolError(f"{count} segments, the argument is number {arg}")
    segments: list[Segment] = []
    cost = REPLY_ROOM + REASON_ROOM * (flags & REASON) + SEGMENT_ROOM * max(count - 2, 0)
    for header in range(at + 16, at + 16 + 32 * count, 32):
        addr, readable, writable, data, where = SEGMENT.unpack_from(packet, header)
        if where == Where.SCRATCH:
            segments.append((addr, readable, writable, data))
        elif where == Where.INLINE and data <= readable <= MAX_PACKET and body + padded(data) <= end:
            segments.append((addr, readable, writable, packet[body : body + data]))
            body += padded(data)
            cost += writable
        else:
            raise ProtocolError("a segment does not add up")
    if body != end:
        raise ProtocolError("bytes behind the last segment")
    return tuple(segments), cost


def _check_operation(op: int, cmd: int, segments: tuple[Segment, ...], nfds: int, *, last: bool) -> None:
    """What an operation other than IOCTL must have."""
    if op in INDEXED:
        _check_index(cmd, nfds)
    if op in BUFFERED and not segments:
        raise ProtocolError(f"{Op(op).name} without a buffer")
    if op in BODIED and not (segments and isinstance(segments[0][3], bytes) and segments[0][1] >= BODY_SIZE):
        raise ProtocolError(f"{Op(op).name} without its body")
    if op == Op.CLOSE and not last:
        raise ProtocolError("requests behind CLOSE")


def _check_descriptors(cmd: int, struct: bytes | int, nfds: int) -> None:
    """Descriptor fields within an ioctl's struct; one in the scratch file is looked at when it is used."""
    if isinstance(struct, int):
        return
    for offset, direction in args.fds(cmd, struct):
        if direction is Direction.IN and offset + 4 <= len(struct):
            index = int.from_bytes(struct[offset : offset + 4], "little")
            if index != CLOSED:
                _check_index(index, nfds)


def _check_index(index: int, nfds: int) -> None:
    if index >= nfds and index != NONE:
        raise ProtocolError(f"descriptor {index} of {nfds}")


def body_of(segments: tuple[Segment, ...]) -> RegisterBody:
    """The body in segment 0."""
    data = segments[0][3]
    assert isinstance(data, bytes)
    return RegisterBody.unpack(data.ljust(BODY_SIZE, b"\0"))


# ---- replies -----------------------------------------------------------------------------------------------


def reply(
    parts: list[bytes],
    result: int,
    segments: tuple[Segment, ...],
    records: list[Record],
    reason: str,
    fds: int,
) -> None:
    """Append one reply to the parts of a packet."""
    if len(records) == 1 and not reason and not fds:
        index, at, data = records[0]
        if isinstance(data, bytes):
            length = len(data)
            parts += (
                REPLY_RECORD.pack(32 + (length + 7 & ~7), result, 1, 0, 0, index, at, length, 1),
                data,
                PADDING[length & 7],
            )
            return
    elif len(records) > 1 and not _fits(segments, records):
        records = compact(segments, records)
    _reply(parts, result, records, reason.encode(errors="replace")[:MAX_REASON], fds)


def _reply(parts: list[bytes], result: int, records: list[Record], reason: bytes, fds: int) -> None:
    head = len(parts)
    parts.append(b"")
    for index, at, data in records:
        if isinstance(data, int):
            parts.append(RECORD.pack(index, at, data, 0))
        else:
            parts += (RECORD.pack(index, at, len(data), 1), data, PADDING[len(data) & 7])
    text = reason.decode(errors="ignore").encode()  # cut at a character
    parts += (text, PADDING[len(text) & 7])
    length = REPLY.size + sum(map(len, parts[head:]))
    parts[head] = REPLY.pack(length, result, len(records), len(text), fds)


def _fits(segments: tuple[Segment, ...], records: list[Record]) -> bool:
    """Whether the records take no more of the packet than parse() has put aside for them."""
    inline = [segment[2] for segment in segments if isinstance(segment[3], bytes)]
    room = REPLY_ROOM - REPLY.size + sum(inline) + SEGMENT_ROOM * max(len(segments) - 2, 0)
    lengths = (0 if isinstance(data, int) else padded(len(data)) for _, _, data in records)
    return sum(lengths) + RECORD.size * len(records) <= room
