"""Every rule for packets, and the replies that come of them."""

import pytest

from iommufd_uapi import iommufd, iommufd_test, wire
from iommufdd.errors import ProtocolError
from iommufdd.server.packet import TAIL, Request, parse, reply
from iommufdd.server.segments import Record
from tests.server.peer import STRUCT_ADDR, Segment, body, ioctl, request, selftest, split

ALLOC = ioctl(iommufd.IoasAlloc())
NONE = wire.NONE


def parsed(packet: bytes, nfds: int = 0) -> list[Request]:
    return parse(packet + b"\xff" * TAIL, len(packet), nfds)


def test_one() -> None:
    ((op, flags, cmd, arg, segments),) = parsed(ALLOC)
    data = iommufd.IoasAlloc().pack()
    assert (op, flags, cmd, arg) == (0, 0, iommufd.IoasAlloc.CMD, 0)
    assert segments == ((STRUCT_ADDR, len(data), len(data), data),)


def test_many() -> None:
    assert len(parsed(ALLOC * 1000)) == 1000
    with pytest.raises(ProtocolError, match="1025 requests"):
        parsed(ioctl(b"", cmd=1) * 1025)


def test_all_kinds_of_segments() -> None:
    sent = [Segment(1, b"abc"), Segment(2, b"", 10, 20), Segment(3, b"x", 8, 1), Segment(4, b"", 99, 99, 7)]
    ((_, _, _, _, segments),) = parsed(request(0, 0x3B80, sent, arg=2))
    assert segments == ((1, 3, 0, b"abc"), (2, 10, 20, b""), (3, 8, 1, b"x"), (4, 99, 99, 7))


def patched(packet: bytes, offset: int, value: int, size: int = 4) -> bytes:
    return packet[:offset] + value.to_bytes(size, "little") + packet[offset + size :]


BROKEN = {
    "cut in the header": ALLOC[:8],
    "cut in the segment": ALLOC[:40],
    "cut in the data": ALLOC[:-8],
    "rest": ALLOC + bytes(8),
    "length 0": patched(ALLOC, 0, 0),
    "length 8": patched(ALLOC, 0, 8),
    "length odd": patched(ALLOC, 0, 63),
    "length short": patched(ALLOC, 0, 56),
    "length long": patched(ALLOC, 0, 72) + bytes(8),
    "length huge": patched(ALLOC, 0, 0xFFFFFFF8),
    "unknown op": patched(ALLOC, 4, 10, 1),
    "unknown flag": patched(ALLOC, 5, 2, 1),
    "17 segments": request(0, 0x3B80, [Segment(0)] * 17),
    "segments beyond the length": patched(ALLOC, 6, 16, 2),
    "no segments but data": patched(ALLOC, 6, 0, 2),
    "arg beyond the segments": request(0, 0x3B80, [Segment(0)], arg=1),
    "arg without segments": request(0, 0x3B80),
    "more data than readable": patched(ALLOC, 24, 4, 8),
    "more data than sent": patched(patched(ALLOC, 24, 64, 8), 40, 64),
    "readable above the limit": request(0, 0x3B80, [Segment(0, b"", wire.MAX_PACKET + 1)]),
    "readable above the limit, second": request(0, 1, [Segment(0), Segment(0, b"", wire.MAX_PACKET + 1)]),
    "writable above the limit": request(0, 0x3B80, [Segment(0, writable=wire.MAX_PACKET)]),
    "writable huge": request(0, 0x3B80, [Segment(0, writable=2**64 - 1)]),
    "replies above the limit": request(0, 0x3B80, [Segment(0, writable=65536)]) * 2,
    "where": patched(ALLOC, 44, 2),
    "read without a buffer": request(wire.Op.READ, NONE),
    "write without a buffer": request(wire.Op.WRITE, NONE),
    "body too short": request(wire.Op.REGISTER, NONE, [Segment(0, bytes(31))]),
    "body in the scratch file": request(wire.Op.REGISTER, NONE, [Segment(0, readable=32, scratch=0)]),
    "no body": request(wire.Op.PROTECT),
    "read index": request(wire.Op.READ, 0, [Segment(0, writable=8)]),
    "write index": request(wire.Op.WRITE, 1, [Segment(0, bytes(8))]),
    "register index": body(wire.Op.REGISTER, 7),
    "scratch index": request(wire.Op.SCRATCH, 0),
    "a retired operation": request(7, 0xFFFFFFFE),
    "file index": ioctl(iommufd.IoasMapFile(fd=0)),
    "access index": ioctl(selftest(iommufd_test.IOMMU_TEST_OP_ACCESS_PAGES, 3)),
    "request after close": request(wire.Op.CLOSE) + ALLOC,
}


@pytest.mark.parametrize("packet", BROKEN.values(), ids=BROKEN.keys())
def test_broken(packet: bytes) -> None:
    with pytest.raises(ProtocolError):
        parsed(packet)
    with pytest.raises(ProtocolError):
        parsed(ALLOC + packet)


def test_indexes() -> None:
    for packet in (BROKEN["read index"], BROKEN["register index"], BROKEN["file index"], BROKEN["access index"]):
        assert parsed(packet, 8)
    assert parsed(ioctl(iommufd.IoasMapFile(fd=-1)))
    assert parsed(request(wire.Op.SCRATCH, NONE))
    assert parsed(request(0, iommufd.IoasMapFile.CMD, arg=NONE))


def test_reply_room_is_exact() -> None:
    fits = wire.MAX_PACKET - wire.REPLY_ROOM
    assert parsed(request(0, 1, [Segment(0, writable=fits)]))
    with pytest.raises(ProtocolError):
        parsed(request(0, 1, [Segment(0, writable=fits + 1)]))


def test_replies() -> None:
    parts: list[bytes] = []
    segments = ((0, 8, 8, bytes(8)), (8, 0, 100, b""), (0, 99, 99, 0))
    reply(parts, 5, segments, [], "", 0)
    reply(parts, 0, segments, [(0, 4, b"abc")], "", 0)
    reply(parts, -22, segments, [(0, 4, b"abc"), (1, 0, b"12345678"), (2, 3, 70)], "why — not", 0)
    reply(parts, 0, segments, [(0, 0, b"x")], "", 2)
    assert split(b"".join(parts)) == [
        (5, [], "", 0),
        (0, [(0, 4, b"abc")], "", 0),
        (-22, [(0, 4, b"abc"), (1, 0, b"12345678"), (2, 3, 70)], "why — not", 0),
        (0, [(0, 0, b"x")], "", 2),
    ]


def test_reason_is_cut_at_a_character() -> None:
    parts: list[bytes] = []
    reply(parts, -1, (), [], "é" * 500, 0)
    (answer,) = split(b"".join(parts))
    assert answer.reason == "é" * (wire.MAX_REASON // 2)


def test_many_small_writes_stay_within_the_room() -> None:
    size = 4096
    segments = ((0, size, size, bytes(size)),)
    parts: list[bytes] = []
    records: list[Record] = [(0, at, b"\xff") for at in range(0, size, 2)]
    reply(parts, 0, segments, records, "", 0)
    packet = b"".join(parts)
    assert len(packet) <= wire.REPLY_ROOM + size
    (answer,) = split(packet)
    assert answer.writes == [(0, 0, (b"\xff\0" * (size // 2))[:-1])]


def test_worst_reply_fits() -> None:
    """As many segments as there can be, each written twice, with a reason."""
    count = wire.MAX_SEGMENTS
    segments = tuple((at * 8, 0, 1, b"") for at in range(count))
    parts: list[bytes] = []
    records: list[Record] = [(at, 0, b"x") for at in range(count)]
    reply(parts, -1, segments, records * 2, "r" * 1000, 0)
    room = wire.REPLY_ROOM + wire.REASON_ROOM + count + 24 * (count - 2)
    assert len(b"".join(parts)) <= room
