"""Room uapi: the frames of the socket protocol (docs/PROTOCOL.md), shared by daemon and clients.

The layouts say what the bytes are; the prebuilt `struct.Struct`s below them, made from the same layouts, are
for the loop that handles a packet.
"""

import struct
from enum import IntEnum, IntFlag
from typing import Annotated

from .layout import Layout, layout, raw, s32, u8, u16, u32, u64

MAGIC = 0x44464F49  #: "IOFD"
VERSION = 1

MAX_PACKET = 131_072  #: bytes, either way
MAX_FDS = 64  #: descriptors with one packet, either way
MAX_REQUESTS = 1_024  #: in one packet
MAX_SEGMENTS = 16  #: of one request
MAX_SCRATCH = 1 << 30  #: bytes of a scratch file that count
MAX_REASON = 240  #: bytes of a reason text
REPLY_ROOM = 64  #: bytes of the reply packet that each request takes beside its writable bytes
REASON_ROOM = 256  #: the same for a request with REASON, on top

NONE = 0xFFFF_FFFF  #: no descriptor, no segment; in a struct, a negative number
CLOSED = 0x7FFF_FFFF  #: in a struct, a number that no descriptor is open at


class Kind(IntEnum):
    """What a hello asks for."""

    IOMMUFD = 0  #: open /dev/iommu
    CHANNEL = 1  #: a further channel to an open context
    DEVICE = 2  #: a VFIO device by name
    SUPERVISE = 3  #: a seccomp listener: processes whose system calls are to be answered
    MOUNT = 4  #: a mounted /dev/fuse: a file that stands for /dev/iommu
    VM = 5  #: a new VM, whose memory is that of the address space


class Op(IntEnum):
    """Operations of a request."""

    IOCTL = 0
    READ = 1
    WRITE = 2
    REGISTER = 3
    UNREGISTER = 4
    SCRATCH = 5
    MMAP = 6
    PROTECT = 8
    CLOSE = 9


class Flag(IntFlag):
    """Flags of a request."""

    REASON = 1  #: tell why a call failed


class Where(IntEnum):
    """Where the bytes of a segment lie."""

    INLINE = 0
    SCRATCH = 1


HELLO_CONTAINER = 1  #: Hello.flags: as /dev/vfio/vfio, pinned memory is charged by process
SUPERVISE_EXPLAIN = 1  #: Hello.flags: a line for every call that fails
SUPERVISE_SUMMARY = 2  #: Hello.flags: what was called and what is left, when the last process has ended
SUPERVISE_PROC = 4  #: Hello.flags: serve /proc/N/status and fault injection
SUPERVISE_REACH = 32  #: Hello.flags: the keeper opens what the daemon may not
MOUNT_OTHERS = 8  #: Hello.flags: callers may be other users than who mounted it
MOUNT_CONTAINER = 16  #: Hello.flags: as /dev/vfio/vfio
SUPERVISE_TRACE = 64  #: Hello.flags: the last descriptor is a stream socket, for a line of text an event
SUPERVISE_SANITIZE = 128  #: Hello.flags: tell of translations used that should have been flushed
SUPERVISE_SANITIZE_FAIL = 256  #: Hello.flags: the same, and a verdict; DMA through what was never flushed fails
SUPERVISE_KVM = 512  #: Hello.flags: opens of /dev/kvm are for the daemon
MAX_CALLER = 256  #: bytes of text after a hello of kind SUPERVISE or MOUNT
REGISTER_PRIVATE = 1  #: RegisterBody.flags: the pages are this address space's own


@layout
class Hello(Layout):
    """struct iofd_hello"""

    magic: u32 = MAGIC
    version: u16 = VERSION
    kind: u16 = 0
    flags: u32 = 0
    reserved: u32 = 0
    mm: u64 = 0
    reserved2: u64 = 0
    machine: Annotated[bytes, raw(32)] = b""
    device: Annotated[bytes, raw(32)] = b""


@layout
class HelloReply(Layout):
    """struct iofd_hello_reply"""

    magic: u32 = MAGIC
    version: u16 = VERSION
    kind: u16 = 0
    error: u32 = 0
    reserved: u32 = 0
    mm: u64 = 0
    max_packet: u32 = MAX_PACKET
    max_fds: u32 = MAX_FDS
    reserved2: Annotated[bytes, raw(16)] = b""


@layout
class RequestHeader(Layout):
    """struct iofd_request"""

    length: u32 = 0
    op: u8 = 0
    flags: u8 = 0
    segments: u16 = 0
    cmd: u32 = 0
    arg: u32 = 0


@layout
class SegmentHeader(Layout):
    """struct iofd_segment"""

    addr: u64 = 0
    readable: u64 = 0
    writable: u64 = 0
    data: u32 = 0
    where: u32 = 0


@layout
class RegisterBody(Layout):
    """struct iofd_register: the body of REGISTER, UNREGISTER, MMAP and PROTECT"""

    addr: u64 = 0
    length: u64 = 0
    offset: u64 = 0
    prot: u32 = 0
    flags: u32 = 0


@layout
class ReplyHeader(Layout):
    """struct iofd_reply"""

    length: u32 = 0
    result: s32 = 0
    writes: u16 = 0
    reason: u16 = 0
    fds: u32 = 0


@layout
class WriteRecord(Layout):
    """struct iofd_write"""

    segment: u32 = 0
    offset: u32 = 0
    length: u32 = 0
    inline: u32 = 0


def _struct(*layouts: type[Layout]) -> struct.Struct:
    """The layouts one behind the other; no frame has padding, and each starts at a multiple of 8."""
    return struct.Struct("<" + "".join(part.FORMAT for part in layouts))


REQUEST = _struct(RequestHeader)
SEGMENT = _struct(SegmentHeader)
CALL = _struct(RequestHeader, SegmentHeader)  #: a request with its first segment: all that most requests have
REPLY = _struct(ReplyHeader)
RECORD = _struct(WriteRecord)
REPLY_RECORD = _struct(ReplyHeader, WriteRecord)  #: a reply with its only write record

PADDING = tuple(bytes(-n % 8) for n in range(8))  #: zeros after n bytes: ``PADDING[n & 7]``


def padded(length: int) -> int:
    """Length rounded up to a multiple of 8."""
    return length + 7 & ~7
