"""Packets: what goes in, what comes out, and what is refused. The other side is tests/client/reference.py."""

from __future__ import annotations

import os
import random
import struct
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iommufd_client import call as calls
from iommufd_client.call import IommufdOSError
from iommufd_client.channel import (
    BUFFER,
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
from iommufd_client.memory import Buffers
from iommufd_uapi import iommufd as uapi
from iommufd_uapi import wire
from iommufd_uapi.layout import Direction
from tests.client import reference

if TYPE_CHECKING:
    from iommufd_uapi.layout import Ioctl


class FakeScratch:
    """The scratch file as a bytearray."""

    def __init__(self) -> None:
        self.bytes = bytearray()
        self.places = 0

    def place(self, data: bytes, length: int) -> int:
        offset = len(self.bytes)
        self.bytes += data.ljust(length, b"\0")
        self.places += 1
        return offset

    def release(self, count: int) -> None:
        self.places -= count

    def read(self, offset: int, length: int) -> bytes:
        return bytes(self.bytes[offset : offset + length])


@pytest.fixture
def scratch() -> FakeScratch:
    return FakeScratch()


def results(packet: Packet, reply: bytes, fds: tuple[int, ...] = ()) -> list[Result]:
    return packet.results(memoryview(bytearray(reply.ljust(BUFFER, b"\xee"))), len(reply), fds)


# ---- hello ----


def test_the_bytes_of_a_hello() -> None:
    assert hello(1, mm=0x1122, machine="m", device="dé") == bytes.fromhex(
        "494f4644 0100 0100 00000000 00000000 2211000000000000 0000000000000000"
    ) + b"m".ljust(32, b"\0") + b"d\xc3\xa9".ljust(32, b"\0")


def test_names_are_limited_in_bytes() -> None:
    hello(0, machine="é" * 16)
    with pytest.raises(ValueError, match="32 bytes"):
        hello(0, machine="é" * 17)


def answer(magic: int = 0x44464F49, version: int = 1, error: int = 0, mm: int = 0) -> bytes:
    return struct.pack("<IHHIIQII16x", magic, version, 0, error, 0, mm, 131072, 64)


def test_welcome() -> None:
    assert welcome(answer(mm=77)) == 77


def test_welcome_refuses() -> None:
    with pytest.raises(IommufdOSError, match="Protocol not supported: the daemon speaks version 9"):
        welcome(answer(version=9, error=93))
    with pytest.raises(IommufdOSError) as caught:
        welcome(answer(error=77))
    assert (caught.value.errno, caught.value.reason) == (77, "")


@pytest.mark.parametrize("data", [bytes(48), answer()[:-1], b"HTTP/1.1 400 Bad Request"])
def test_welcome_of_somebody_else(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        welcome(data)


def test_no_welcome() -> None:
    with pytest.raises(ConnectionResetError):
        welcome(b"")


# ---- the short way ----


def test_a_plain_struct_travels_as_the_long_way_would() -> None:
    for layout in uapi.IOCTLS:
        for flags in (0, 1):
            plain = PLAINS[flags][layout]
            pointed = any(each.direction is not Direction.ADDRESS for each in layout.POINTERS)
            assert (plain is None) == bool(pointed or layout.FDS)
            if plain is not None:
                cmd = layout.unpack(random.Random(1).randbytes(layout.SIZEOF))
                (short,) = reference.parse(plain.head + cmd.pack() + plain.pad)
                (long,) = reference.parse(calls.ioctl(cmd.CMD, cmd, Buffers()).encode(0, flags))
                assert short == long


def reply_buffer(data: bytes) -> memoryview:
    return memoryview(bytearray(data.ljust(BUFFER, b"\xee")))


def test_a_plain_result() -> None:
    cmd = uapi.IoasAlloc()
    data = reference.reply(0, [(0, 0, uapi.IoasAlloc(out_ioas_id=3).pack())])
    assert data == bytes.fromhex(
        "30000000 00000000 0100 0000 00000000  00000000 00000000 0c000000 01000000 0c000000 00000000 03000000 00000000"
    )
    assert plain_result(reply_buffer(data), len(data), cmd, cmd.pack()) == 0
    assert cmd.out_ioas_id == 3


def test_a_plain_result_that_writes_one_field() -> None:
    cmd = uapi.Option(option_id=1, op=1)
    data = reference.reply(0, [(0, 16, b"\5" + bytes(7))])
    plain_result(reply_buffer(data), len(data), cmd, cmd.pack())
    assert cmd == uapi.Option(option_id=1, op=1, val64=5)


def test_a_plain_error_with_its_struct_and_reason() -> None:
    cmd = uapi.IoasUnmap(length=5)
    data = reference.reply(-16, [(0, 0, b"\x18"), (0, 16, b"\7")], "eine Maus im Gehäuse")
    with pytest.raises(IommufdOSError) as caught:
        plain_result(reply_buffer(data), len(data), cmd, cmd.pack())
    error = caught.value
    assert (error.errno, error.reason, error.struct) == (16, "eine Maus im Gehäuse", cmd)
    assert str(error) == "[Errno 16] Device or resource busy: eine Maus im Gehäuse"
    assert cmd.length == 7


def test_a_plain_result_of_the_wrong_length() -> None:
    data = reference.reply(0)
    with pytest.raises(ProtocolError):
        plain_result(reply_buffer(data), 24, uapi.Destroy(), uapi.Destroy().pack())


def test_a_raw_result() -> None:
    data = bytearray(reference.reply(-2, [(0, 4, b"abc"), (0, 0, b"\1")], "no"))
    assert raw_result(data) == (-2, [(4, bytearray(b"abc")), (0, bytearray(b"\1"))], "no")
    for cut in (0, 15, 20, len(data) - 8):
        with pytest.raises(ProtocolError):
            raw_result(data[:cut])


# ---- packets ----


def test_several_requests_in_one_packet(scratch: FakeScratch) -> None:
    packet = Packet(scratch)
    first, last = uapi.IoasAlloc(), uapi.IoasAlloc()
    assert all(map(packet.add_plain, (first, uapi.Destroy(id=9), last)))
    assert [each.cmd for each in reference.parse(packet.data)] == [0x3B81, 0x3B80, 0x3B81]
    reply = reference.reply(0, [(0, 8, b"\4\0\0\0")]) + reference.reply(-2) + reference.reply(0, [(0, 8, b"\5\0\0\0")])
    assert [str(each) for each in results(packet, reply)] == ["0", "[Errno 2] No such file or directory", "0"]
    assert (first.out_ioas_id, last.out_ioas_id) == (4, 5)


@pytest.mark.parametrize(
    "reply",
    [
        b"",
        reference.reply(0)[:15],
        struct.pack("<IiHHI", 8, 0, 0, 0, 0),
        struct.pack("<IiHHI", 4096, 0, 0, 0, 0),
        struct.pack("<IiHHI", 16, 0, 0, 0, 0)[:8],
        reference.reply(0, [(1, 0, b"x")]),
    ],
)
def test_a_reply_that_is_none(scratch: FakeScratch, reply: bytes) -> None:
    packet = Packet(scratch)
    buffers = Buffers()
    cmd = uapi.HwInfo(data_len=0)
    packet.add(calls.ioctl(cmd.CMD, cmd, buffers))
    with pytest.raises(ProtocolError):
        results(packet, reply)


def test_descriptors_belong_to_the_replies_that_have_them(scratch: FakeScratch) -> None:
    packet = Packet(scratch)
    first, second = uapi.FaultAlloc(), uapi.VeventqAlloc()
    for cmd in (first, second):
        packet.add(calls.ioctl(cmd.CMD, cmd, Buffers()))
    fds = (*os.pipe(), os.dup(0))
    reply = reference.reply(0, [(0, 0, uapi.FaultAlloc(out_fault_id=1, out_fault_fd=0).pack())], fds=1)
    reply += reference.reply(0, [(0, 0, uapi.VeventqAlloc(out_veventq_fd=2).pack())], fds=2)
    assert results(packet, reply, fds) == [0, 0]
    assert (first.out_fault_fd, second.out_veventq_fd) == (fds[0], fds[2])
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(fds[1])  # nobody asked for that one
    os.close(fds[0])
    os.close(fds[2])


def test_a_broken_reply_closes_its_descriptors(scratch: FakeScratch) -> None:
    packet = Packet(scratch)
    packet.add_plain(uapi.Destroy())
    fds = os.pipe()
    with pytest.raises(ProtocolError):
        results(packet, b"", fds)
    for fd in fds:
        with pytest.raises(OSError, match="Bad file"):
            os.fstat(fd)


def test_mmap_answers_with_its_descriptors(scratch: FakeScratch) -> None:
    packet = Packet(scratch)
    cmd = uapi.FaultAlloc()
    packet.add(calls.ioctl(cmd.CMD, cmd, Buffers()))
    call = calls.mmap(4096, 4096, 3, 1)
    packet.add(call)
    fds = (*os.pipe(), os.dup(0))
    reply = reference.reply(0, [(0, 0, uapi.FaultAlloc(out_fault_fd=0).pack())], fds=1) + reference.reply(0, fds=2)
    assert results(packet, reply, fds) == [0, fds[1]]
    assert (cmd.out_fault_fd, call.mapping) == (fds[0], fds[2])
    for fd in fds:
        os.close(fd)


# ---- limits ----


def batch_of(scratch: FakeScratch, flags: int = 0) -> tuple[Batch[None], list[Packet]]:
    """A batch, and the packets that it has sent."""
    sent: list[Packet] = []
    return Batch(lambda: Packet(scratch, flags), sent.extend, device=False), sent


@pytest.mark.parametrize("flags", [0, 1])
@pytest.mark.parametrize("at_once", [True, False])
def test_a_batch_fills_packets_and_no_more(scratch: FakeScratch, flags: int, at_once: bool) -> None:
    batch, sent = batch_of(scratch, flags)
    structs: list[Ioctl] = [uapi.IoasMap(iova=number) for number in range(3000)]
    if at_once:
        batch.ioctls(structs)
    else:
        for cmd in structs:
            batch.ioctl(cmd)
    batch.send()
    requests = [request for packet in sent for request in reference.parse(packet.data)]
    assert [uapi.IoasMap.unpack(each.segments[0].data).iova for each in requests] == list(range(3000))
    room = 64 + 40 + 256 * flags
    assert len(sent[0]) == min(131_072 // room, 131_072 // 88, 1024)


def test_a_batch_of_all_kinds_keeps_the_order(scratch: FakeScratch) -> None:
    batch, sent = batch_of(scratch)
    buffers = Buffers()
    info = uapi.HwInfo(data_len=8, data_uptr=buffers.add(bytearray(8)))
    batch.ioctls([uapi.IoasAlloc(), info, uapi.IoasAlloc()])
    batch.ioctl(uapi.IOMMU_DESTROY, bytearray(uapi.Destroy(id=4).pack()))
    batch.send()
    (packet,) = sent
    assert [each.cmd & 0xFF for each in reference.parse(packet.data)] == [0x81, 0x8A, 0x81, 0x80]


def test_many_large_answers_take_several_packets(scratch: FakeScratch) -> None:
    batch, sent = batch_of(scratch)
    buffers = Buffers()
    for _ in range(5):
        batch.ioctl(uapi.HwInfo(data_len=60_000, data_uptr=buffers.add(bytearray(60_000))), memory=buffers)
    batch.send()
    assert [len(reference.parse(packet.data)) for packet in sent] == [2, 2, 1]


def test_large_memory_lies_in_the_scratch_file(scratch: FakeScratch) -> None:
    bitmap = bytearray(b"\1" + bytes(99_998) + b"\2")
    buffers = Buffers()
    cmd = uapi.HwptGetDirtyBitmap(length=800_000 * 4096, page_size=4096, data=buffers.add(bitmap))
    packet = Packet(scratch)
    packet.add(calls.ioctl(cmd.CMD, cmd, buffers))
    (request,) = reference.parse(packet.data)
    data = request.segments[1]
    assert data.scratch is not None
    assert scratch.bytes[data.scratch : data.scratch + 100_000] == bitmap
    assert (data.readable, data.writable) == (100_000, 100_000)
    assert packet.places == scratch.places == 1
    scratch.bytes[data.scratch + 50_000] = 0xFF
    assert results(packet, reference.reply(0, [(1, 50_000, 1)])) == [0]
    assert bitmap[50_000] == 0xFF
    assert bitmap[0] == 1
    assert scratch.places == 0


def test_a_place_is_kept_until_the_packet_goes(scratch: FakeScratch) -> None:
    buffers = Buffers()
    cmd = uapi.HwInfo(data_len=100_000, data_uptr=buffers.add(bytearray(100_000)))
    packet = Packet(scratch)
    packet.add(calls.ioctl(cmd.CMD, cmd, buffers))
    with pytest.raises(ProtocolError):
        results(packet, b"")
    assert scratch.places == 0
    packet = Packet(scratch)
    packet.add(calls.ioctl(cmd.CMD, cmd, buffers))
    assert scratch.places == 1
    del packet  # never sent
    assert scratch.places == 0


def test_a_full_packet_places_nothing(scratch: FakeScratch) -> None:
    packet = Packet(scratch)
    while packet.add_plain(uapi.Destroy()):
        pass
    buffers = Buffers()
    cmd = uapi.HwInfo(data_len=100_000, data_uptr=buffers.add(bytearray(100_000)))
    assert not packet.add(calls.ioctl(cmd.CMD, cmd, buffers))
    assert scratch.places == 0


# ---- any batch, any reply ----

STRUCTS = [each for each in uapi.IOCTLS if not each.FDS]


@st.composite
def ioctls(draw: st.DrawFn) -> tuple[Ioctl, Buffers, list[bytearray]]:
    """An ioctl with any values, whose pointer points to memory of some length, or to none."""
    layout = draw(st.sampled_from(STRUCTS))
    cmd = layout.unpack(draw(st.binary(min_size=layout.SIZEOF, max_size=layout.SIZEOF)))
    cmd.size = layout.SIZEOF
    buffers, memory = Buffers(), []
    for pointer in layout.POINTERS:
        if draw(st.booleans()):
            memory.append(bytearray(draw(st.binary(min_size=1, max_size=64))))
            setattr(cmd, pointer.name, buffers.add(memory[-1]))
    return cmd, buffers, memory


@st.composite
def writes(draw: st.DrawFn, segments: list[reference.Segment]) -> list[tuple[int, int, bytes]]:
    """Write records within what a request allows."""
    found = []
    for _ in range(draw(st.integers(0, 3))):
        index = draw(st.integers(0, len(segments) - 1))
        if limit := min(segments[index].writable, 64):
            offset = draw(st.integers(0, limit - 1))
            found.append((index, offset, draw(st.binary(min_size=1, max_size=limit - offset))))
    return found


@given(st.lists(ioctls(), min_size=1, max_size=5), st.booleans(), st.data())
def test_any_batch_and_any_reply(
    found: list[tuple[Ioctl, Buffers, list[bytearray]]], reason: bool, data: st.DataObject
) -> None:
    batch, sent = batch_of(FakeScratch(), int(reason))
    for cmd, buffers, _ in found:
        batch.ioctl(cmd, memory=buffers)
    batch.send()
    (packet,) = sent
    requests = reference.parse(packet.data)
    assert [(each.op, each.reason, each.cmd, each.arg) for each in requests] == [
        (reference.IOCTL, reason, cmd.CMD, 0) for cmd, _, _ in found
    ]
    reply, expected = b"", []
    for (cmd, buffers, _), request in zip(found, requests, strict=True):
        assert request.segments[0].data == cmd.pack()
        image = {index: bytearray(each.readable or each.writable) for index, each in enumerate(request.segments)}
        for index, segment in enumerate(request.segments):
            shown = cmd.pack() if not index else buffers.read(segment.addr, len(image[index]))
            assert segment.data == shown[: segment.readable]
            image[index][:] = shown
        stored = data.draw(writes(request.segments))
        for index, offset, new in stored:
            image[index][offset : offset + len(new)] = new
        result = data.draw(st.integers(-4095, 2**31 - 1))
        why = data.draw(st.text(st.characters(codec="utf-8"), max_size=20)) if reason and result < 0 else ""
        reply += reference.reply(result, stored, why)
        expected.append((result, why, request, image))
    answers = results(packet, reply)
    for (cmd, buffers, _), answer, (result, why, request, image) in zip(found, answers, expected, strict=True):
        assert cmd.pack() == image.pop(0)
        for index, bytes_after in image.items():
            assert buffers.read(request.segments[index].addr, len(bytes_after)) == bytes_after
        if result < 0:
            assert isinstance(answer, IommufdOSError)
            assert (answer.errno, answer.reason, answer.struct) == (-result, why, cmd)
        else:
            assert answer == result


@given(st.binary(max_size=300))
def test_any_bytes_as_a_reply(data: bytes) -> None:
    packet = Packet(FakeScratch())
    packet.add_plain(uapi.IoasAlloc())
    cmd = uapi.HwInfo()
    packet.add(calls.ioctl(cmd.CMD, cmd, Buffers()))
    try:
        found = results(packet, data)
    except ProtocolError:
        return
    assert len(found) == 2


def test_room_is_what_the_page_says() -> None:
    assert (wire.REPLY_ROOM, wire.REASON_ROOM, calls.SEGMENT_ROOM) == (64, 256, 24)
