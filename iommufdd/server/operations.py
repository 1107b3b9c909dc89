"""Operations other than IOCTL (docs/PROTOCOL.md section 4). Each gives a result or raises an IommufdError."""

from __future__ import annotations

from typing import TYPE_CHECKING

from iommufd_uapi.wire import NONE, REGISTER_PRIVATE, Op
from iommufdd.errors import EBADF, EINVAL, ENODEV, ENOMEM, EPERM, IommufdError
from iommufdd.mm import Region
from iommufdd.user import PAGE_MASK

from .memory import PrivateFile, SharedFile
from .packet import body_of
from .registers import registers_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from iommufd_uapi.wire import RegisterBody

    from .channel import Channel
    from .segments import Segment

PROT_READ, PROT_WRITE = 1, 2
MAX_RW_COUNT = 0x7FFF_F000  # include/linux/fs.h
MAX_MAP_COUNT = 65_530  # include/linux/mm.h: DEFAULT_MAX_MAP_COUNT
ADDRESS_END = 1 << 64
OFFSET_END = 1 << 63


def read(channel: Channel, index: int, count: int, segments: tuple[Segment, ...]) -> int:
    """read(2) on a file handed out: segment 0 is what of the buffer can be written."""
    return channel.caller.fget(index).read(channel.caller, segments[0][0], min(count, MAX_RW_COUNT))


def write(channel: Channel, index: int, count: int, segments: tuple[Segment, ...]) -> int:
    """write(2) on a file handed out: segment 0 is what of the buffer can be read."""
    return channel.caller.fget(index).write(channel.caller, segments[0][0], min(count, MAX_RW_COUNT))


def register(channel: Channel, index: int, _: int, segments: tuple[Segment, ...]) -> int:
    """mmap(MAP_FIXED) of a file into the channel's address space. EINVAL, EBADF, ENODEV, EPERM, ENOMEM."""
    body = body_of(segments)
    _check_range(body)
    if body.prot & ~(PROT_READ | PROT_WRITE) or body.flags & ~REGISTER_PRIVATE or not body.length:
        raise EINVAL(f"prot {body.prot:#x}, flags {body.flags:#x}, length {body.length:#x}")
    if body.offset & ~PAGE_MASK or body.offset + body.length > OFFSET_END:
        raise EINVAL(f"offset {body.offset:#x} is not a multiple of a page, or too large")
    file = channel.caller.fget(index)
    if not isinstance(file, SharedFile):
        raise ENODEV("this file has no pages to register: not a memfd, tmpfs or hugetlbfs file")
    if body.prot & PROT_WRITE and not file.writable:
        raise EPERM("the descriptor is not open for reading and writing")
    if len(channel.space.mm) >= MAX_MAP_COUNT:
        raise ENOMEM(f"the address space has {MAX_MAP_COUNT} regions")
    pages = PrivateFile(file) if body.flags & REGISTER_PRIVATE else file
    rights = bool(body.prot & PROT_READ), bool(body.prot & PROT_WRITE)
    channel.space.mm.map(Region(body.addr, body.addr + body.length, pages, body.offset, *rights))
    if pages is not file:
        pages.put()  # the mm has its own reference; that of `file` is the table's
    return 0


def unregister(channel: Channel, _: int, __: int, segments: tuple[Segment, ...]) -> int:
    """munmap(2). EINVAL."""
    body = body_of(segments)
    _check_range(body)
    channel.space.mm.unmap(body.addr, body.addr + body.length)
    return 0


def protect(channel: Channel, _: int, __: int, segments: tuple[Segment, ...]) -> int:
    """mprotect(2). EINVAL, ENOMEM where nothing is mapped."""
    body = body_of(segments)
    _check_range(body)
    readable, writable = bool(body.prot & PROT_READ), bool(body.prot & PROT_WRITE)
    mm, end = channel.space.mm, body.addr + body.length
    if not mm.protect(body.addr, end, readable=readable, writable=writable):
        raise ENOMEM(f"not all of [{body.addr:#x}, {end:#x}) is registered")
    return 0


def scratch(channel: Channel, index: int, _: int, __: tuple[Segment, ...]) -> int:
    """The scratch file from now on. EBADF, EINVAL."""
    if index == NONE:
        raise EBADF("no scratch file was sent")
    channel.use_scratch(channel.files.received[index])
    return 0


def mmap(channel: Channel, _: int, __: int, segments: tuple[Segment, ...]) -> int:
    """mmap(2) on what is open: a file with the registers, and a descriptor that stands for the mapping.

    What its mmap() raises; EMFILE.
    """
    body = body_of(segments)
    files, caller = channel.files, channel.caller
    vma = channel.opened.file.mmap(caller, body.offset, body.length, body.prot, body.flags)
    try:
        files.lend(registers_of(vma.region, channel.server.nofile, channel.peer.uid).fd)
        try:
            files.fd_install(caller.get_unused_fd(), vma)
        except IommufdError:
            files.take_back()
            raise
    except IommufdError:
        vma.put()
        raise
    return 0


def close(channel: Channel, _: int, __: int, ___: tuple[Segment, ...]) -> int:
    """close(2): everything is undone before the reply leaves."""
    channel.leave()
    channel.closing = True
    return 0


def _check_range(body: RegisterBody) -> None:
    if (body.addr | body.length) & ~PAGE_MASK or body.addr + body.length > ADDRESS_END:
        raise EINVAL(f"[{body.addr:#x}, +{body.length:#x}) is not a range of whole pages")


OPERATIONS: dict[int, Callable[[Channel, int, int, tuple[Segment, ...]], int]] = {
    Op.READ: read,
    Op.WRITE: write,
    Op.REGISTER: register,
    Op.UNREGISTER: unregister,
    Op.SCRATCH: scratch,
    Op.MMAP: mmap,
    Op.PROTECT: protect,
    Op.CLOSE: close,
}
