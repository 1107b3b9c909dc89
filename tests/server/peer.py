"""A client as raw as can be: packets built and read by hand, from docs/PROTOCOL.md; no client library."""

from __future__ import annotations

import array
import fcntl
import os
import socket
from typing import Any, NamedTuple

from iommufd_uapi import iommufd, iommufd_test, wire
from iommufd_uapi.layout import Layout

TIMEOUT = 30.0
STRUCT_ADDR = 0x7000_0000_0000
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


class Segment(NamedTuple):
    """Memory that comes with a request; `scratch` is an offset in the scratch file."""

    addr: int
    data: bytes = b""
    readable: int = -1  # as long as data
    writable: int = 0
    scratch: int = -1


class Reply(NamedTuple):
    result: int
    writes: list[tuple[int, int, bytes | int]]  # segment, offset, bytes or how many in the scratch file
    reason: str = ""
    fds: int = 0

    def struct(self) -> bytes:
        """What was written to segment 0."""
        image = bytearray()
        for segment, offset, data in self.writes:
            if segment == 0 and isinstance(data, bytes):
                image.extend(bytes(max(offset - len(image), 0)))
                image[offset : offset + len(data)] = data
        return bytes(image)

    def u32(self, offset: int) -> int:
        return int.from_bytes(self.struct()[offset : offset + 4], "little")


def hello(**fields: Any) -> bytes:
    return wire.Hello(**fields).pack()


def request(op: int, cmd: int = 0, segments: list[Segment] | None = None, arg: int = 0, flags: int = 0) -> bytes:
    """One request of any operation."""
    heads = bodies = b""
    for segment in segments or []:
        readable = len(segment.data) if segment.readable < 0 else segment.readable
        inline = segment.scratch < 0
        heads += wire.SEGMENT.pack(
            segment.addr,
            readable,
            segment.writable,
            len(segment.data) if inline else segment.scratch,
            0 if inline else 1,
        )
        bodies += segment.data + wire.PADDING[len(segment.data) & 7]
    length = wire.REQUEST.size + len(heads) + len(bodies)
    return wire.REQUEST.pack(length, op, flags, len(segments or []), cmd, arg) + heads + bodies


def ioctl(struct: Layout | bytes, *more: Segment, cmd: int = 0, flags: int = 0, addr: int = STRUCT_ADDR) -> bytes:
    """An ioctl whose struct lies in segment 0."""
    data = struct if isinstance(struct, bytes) else struct.pack()
    number = cmd or getattr(struct, "CMD", 0)
    return request(wire.Op.IOCTL, number, [Segment(addr, data, writable=len(data)), *more], flags=flags)


def body(op: int, index: int = 0, **fields: int) -> bytes:
    """REGISTER and its kin."""
    return request(op, index, [Segment(STRUCT_ADDR, wire.RegisterBody(**fields).pack())])


def selftest(op: int, obj_id: int = 0, union: Layout | None = None) -> iommufd_test.TestCmd:
    """The selftest's command."""
    packed = union.pack() if union is not None else b""
    return iommufd_test.TestCmd(op=op, id=obj_id, u=packed.ljust(iommufd_test.TestCmd.sizeof("u"), b"\0"))


def split(packet: bytes) -> list[Reply]:
    """The replies of a packet, every length checked."""
    replies: list[Reply] = []
    at = 0
    while at < len(packet):
        length, result, writes, reason_length, fds = wire.REPLY.unpack_from(packet, at)
        pos, end = at + wire.REPLY.size, at + length
        assert end <= len(packet)
        assert not length & 7
        records: list[tuple[int, int, bytes | int]] = []
        for _ in range(writes):
            segment, offset, size, inline = wire.RECORD.unpack_from(packet, pos)
            pos += wire.RECORD.size
            records.append((segment, offset, packet[pos : pos + size] if inline else size))
            pos += wire.padded(size) if inline else 0
        reason = packet[pos : pos + reason_length].decode()
        assert pos + wire.padded(reason_length) == end
        replies.append(Reply(result, records, reason, fds))
        at = end
    return replies


class Peer:
    """A connection that says hello when it is made, unless `greet` is false."""

    def __init__(self, where: str | socket.socket, *, greet: bool = True, fds: list[int] | None = None, **fields: Any):
        if isinstance(where, str):
            self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self.sock.connect(where)  # waits when many connect at once; with a timeout it would fail
            self.sock.settimeout(TIMEOUT)
        else:
            self.sock = where
        self.identity = -1
        self.mm = 0
        self._greeting = (fds or [], fields)
        if greet:
            self.greet()

    def greet(self) -> wire.HelloReply:
        fds, fields = self._greeting
        self.send(hello(**fields), fds)
        return self.welcome()

    def welcome(self) -> wire.HelloReply:
        """Receive the reply to a hello."""
        data, fds = self.receive()
        reply = wire.HelloReply.unpack(data)
        self.mm = reply.mm
        if fds:
            (self.identity,) = fds
        return reply

    def send(self, packet: bytes, fds: list[int] | None = None) -> None:
        socket.send_fds(self.sock, [packet], fds or [])

    def receive(self) -> tuple[bytes, list[int]]:
        """A packet and its descriptors; b"" when the daemon has hung up."""
        try:
            data, ancillary, flags, _ = self.sock.recvmsg(wire.MAX_PACKET, socket.CMSG_SPACE(4 * wire.MAX_FDS))
        except ConnectionResetError:
            return b"", []
        assert not flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC)
        fds = array.array("i")
        for _, _, payload in ancillary:
            fds.frombytes(payload)
        return data, fds.tolist()

    def call(self, *requests: bytes, fds: list[int] | None = None) -> list[Reply]:
        """A packet of requests and its replies; the descriptors that came are in `fds`."""
        self.send(b"".join(requests), fds)
        data, self.fds = self.receive()
        assert data, "the daemon hung up"
        replies = split(data)
        assert sum(reply.fds for reply in replies) == len(self.fds)
        return replies

    def one(self, packet: bytes, fds: list[int] | None = None) -> Reply:
        (reply,) = self.call(packet, fds=fds)
        return reply

    def hung_up(self) -> bool:
        """Whether the daemon closes the connection, without a word."""
        return self.receive() == (b"", [])

    # ---- what tests do over and over ----

    def ioas(self) -> int:
        reply = self.one(ioctl(iommufd.IoasAlloc()))
        assert reply.result == 0
        return reply.u32(iommufd.IoasAlloc.offsetof("out_ioas_id"))

    def destroy(self, obj_id: int) -> int:
        return self.one(ioctl(iommufd.Destroy(id=obj_id))).result

    def access(self, ioas: int) -> int:
        """An access of the selftest; its descriptor."""
        needs_pin_pages = iommufd_test.CreateAccess(flags=1)
        create = selftest(iommufd_test.IOMMU_TEST_OP_CREATE_ACCESS, ioas, needs_pin_pages)
        assert self.one(ioctl(create)).result == 0
        (fd,) = self.fds
        return fd

    def register(self, fd: int, addr: int, length: int, **fields: int) -> int:
        fields = {"prot": 3, "offset": 0} | fields
        return self.one(body(wire.Op.REGISTER, 0, addr=addr, length=length, **fields), [fd]).result

    def scratch(self, size: int) -> int:
        """Hand over a new scratch file; a descriptor of it."""
        fd = memfd(size)
        assert self.one(request(wire.Op.SCRATCH, 0), [fd]).result == 0
        return fd

    def close(self) -> None:
        self.sock.close()
        if self.identity >= 0:
            os.close(self.identity)
            self.identity = -1


def memfd(size: int, seals: int = SEALS) -> int:
    fd = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)
