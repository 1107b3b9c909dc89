"""docs/PROTOCOL.md read once more, without the client's code: a packet into requests, replies into a packet."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_PACKET, MAX_FDS, MAX_REQUESTS, MAX_SEGMENTS, INLINE_LIMIT = 131_072, 64, 1_024, 16, 131_072
IOCTL, READ, WRITE, REGISTER, UNREGISTER, SCRATCH, MMAP, PROTECT, CLOSE = 0, 1, 2, 3, 4, 5, 6, 8, 9


@dataclass
class Segment:
    addr: int
    readable: int
    writable: int
    data: bytes = b""  # the readable bytes, whole
    scratch: int | None = None  # offset in the scratch file


@dataclass
class Request:
    op: int
    reason: bool
    cmd: int
    arg: int
    segments: list[Segment] = field(default_factory=list)


def u(data: bytes, at: int, size: int) -> int:
    assert at + size <= len(data)
    return int.from_bytes(data[at : at + size], "little")


def parse(packet: bytes, fds: int = 0) -> list[Request]:
    """The requests; AssertionError for a packet that breaks a rule of the page."""
    assert len(packet) <= MAX_PACKET
    assert fds <= MAX_FDS
    requests, room, at = [], 0, 0
    while at < len(packet):
        length = u(packet, at, 4)
        assert length % 8 == 0
        assert at + length <= len(packet)
        request, cost = _request(packet[at : at + length])
        if request.op in (READ, WRITE, REGISTER, SCRATCH):
            assert request.cmd < fds or request.cmd == 0xFFFFFFFF
        requests.append(request)
        room += cost
        at += length
    assert room <= MAX_PACKET
    assert len(requests) <= MAX_REQUESTS
    return requests


def _request(data: bytes) -> tuple[Request, int]:
    flags, count = data[5], u(data, 6, 2)
    request = Request(data[4], flags == 1, u(data, 8, 4), u(data, 12, 4))
    assert request.op in (IOCTL, READ, WRITE, REGISTER, UNREGISTER, SCRATCH, MMAP, PROTECT, CLOSE)
    assert flags in (0, 1)
    assert count <= MAX_SEGMENTS
    cost = 64 + 256 * flags + 24 * max(count - 2, 0)
    body = 16 + 32 * count
    for at in range(16, body, 32):
        segment = Segment(u(data, at, 8), u(data, at + 8, 8), u(data, at + 16, 8))
        shown, where = u(data, at + 24, 4), u(data, at + 28, 4)
        assert where in (0, 1)
        if where:
            segment.scratch = shown
        else:
            assert shown <= segment.readable <= INLINE_LIMIT
            assert segment.writable <= INLINE_LIMIT
            segment.data = data[body : body + shown].ljust(segment.readable, b"\0")
            end = body + -(-shown // 8) * 8
            assert not any(data[body + shown : end])
            body = end
            cost += segment.writable
        request.segments.append(segment)
    assert body == len(data)
    return request, cost


def reply(
    result: int = 0,
    writes: Sequence[tuple[int, int, bytes | int]] = (),
    reason: str = "",
    fds: int = 0,
) -> bytes:
    """One reply; a write is (segment, offset, bytes), or (segment, offset, length) of what lies in the scratch file."""
    body = b""
    for segment, offset, data in writes:
        inline = isinstance(data, bytes)
        length = len(data) if isinstance(data, bytes) else data
        body += struct.pack("<4I", segment, offset, length, inline)
        if isinstance(data, bytes):
            body += data + bytes(-length % 8)
    text = reason.encode()
    body += text + bytes(-len(text) % 8)
    return struct.pack("<IiHHI", 16 + len(body), result, len(writes), len(text), fds) + body
