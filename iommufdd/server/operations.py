"""Operations other than IOCTL (docs/PROTOCOL.md section 4). Each gives a result or raises an IommufdError."""

from __future__ import annotations

from typing import TYPE_CHECKING

from iommufd_uapi.wire import NONE, REGISTER_PRIVATE, Op
from iommufdd.errors import EBADF, EINVAL, ENODEV, ENOMEM, EPERM
from iommufdd.mm import Region
from iommufdd.user import PAGE_MASK

from .memory import PrivateFile, SharedFile
from .packet import body_of

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


def read(channel: Channel, index: int, segments: tuple[Segment, ...]) -> int:
    """read(2) on a file handed out: segment 0 is the buffer."""
    addr, _, count, _ = segments[0]
    return channel.caller.fget(index).read(channel.caller, addr, min(count, MAX_RW_COUNT))


def write(channel: Channel, index: int, segments: tuple[Segment, ...]) -> int:
    """write(2) on a file handed out: segment 0 is the buffer."""
    addr, count, _, _ = segments[0]
    return channel.caller.fget(index).write(channel.caller, addr, min(count, MAX_RW_COUNT))


def register(channel: Channel, index: int, segments: tuple[Segment, ...]) -> int:
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
    if sum(1 for _ in channel.space.mm.regions()) >= MAX_MAP_COUNT:
        raise ENOMEM(f"the address space has {MAX_MAP_COUNT} regions")
    pages = PrivateFile(file) if body.flags & REGISTER_PRIVATE else file
    rights = bool(body.prot & PROT_READ), bool(body.prot & PROT_WRITE)
    channel.space.mm.map(Region(body.addr, body.addr + body.length, pages, body.offset, *rights))
    if pages is not file:
        pages.put()  # the mm has its own reference; that of `file` is the table's
    return 0


def unregister(channel: Channel, _: int, segments: tuple[Segment, ...]) -> int:
    """munmap(2). EINVAL."""
    body = body_of(segments)
    _check_range(body)
    channel.space.mm.unmap(body.addr, body.addr + body.length)
    return 0


def protect(channel: Channel, _: int, segments: tuple[Segment, ...]) -> int:
    """mprotect(2). EINVAL, ENOMEM where nothing is mapped."""
    body = body_of(segments)
    _check_range(body)
    readable, writable = bool(body.prot & PROT_READ), bool(body.prot & PROT_WRITE)
    mm, end = channel.space.mm, body.addr + body.length
    # protect() takes each region out before it puts it back: its file must not go with it.
    files = [region.file.get() for region in mm.regions() if region.start < end and region.end > body.addr]
    whole = mm.protect(body.addr, end, readable=readable, writable=writable)
    for file in files:
        file.put()
    if not whole:
        raise ENOMEM(f"not all of [{body.addr:#x}, {end:#x}) is registered")
    return 0


def scratch(channel: Channel, index: int, _: tuple[Segment, ...]) -> int:
    """The scratch file from now on. EBADF, EINVAL."""
    if index == NONE:
        raise EBADF("no scratch file was sent")
    channel.use_scratch(channel.files.received[index])
    return 0


def mmap(channel: Channel, _: int, segments: tuple[Segment, ...]) -> int:
    """mmap(2) on the context: registers of a device. What Context.mmap() raises; ENODEV."""
    body = body_of(segments)
    file = channel.context.ctx.mmap(channel.caller, body.offset, body.length, body.prot, body.flags)
    file.put()
    raise ENODEV("registers are not served over the socket yet")


def munmap(channel: Channel, index: int, _: tuple[Segment, ...]) -> int:
    """munmap(2) of what MMAP gave, which is nothing yet. EBADF, EINVAL."""
    channel.caller.fget(index)
    raise EINVAL("the descriptor is no mapping")


def close(channel: Channel, _: int, __: tuple[Segment, ...]) -> int:
    """close(2): everything is undone before the reply leaves."""
    channel.leave()
    channel.closing = True
    return 0


def _check_range(body: RegisterBody) -> None:
    if (body.addr | body.length) & ~PAGE_MASK or body.addr + body.length > ADDRESS_END:
        raise EINVAL(f"[{body.addr:#x}, +{body.length:#x}) is not a range of whole pages")


OPERATIONS: dict[int, Callable[[Channel, int, tuple[Segment, ...]], int]] = {
    Op.READ: read,
    Op.WRITE: write,
    Op.REGISTER: register,
    Op.UNREGISTER: unregister,
    Op.SCRATCH: scratch,
    Op.MMAP: mmap,
    Op.MUNMAP: munmap,
    Op.PROTECT: protect,
    Op.CLOSE: close,
}
