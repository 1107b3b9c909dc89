"""What each request of the kernel does. A handler gives the reply's body, minus an errno, or None for no reply."""

from __future__ import annotations

import errno
import os
import select
import time
from typing import TYPE_CHECKING

from iommufd_uapi.iommufd import Destroy, FaultAlloc, VeventqAlloc, ViommuAlloc
from iommufd_uapi.iommufd_test import IOMMU_TEST_OP_CREATE_ACCESS, IOMMU_TEST_OP_DMABUF_GET, TestCmd
from iommufdd.context import Context
from iommufdd.eventq import EventqFile
from iommufdd.server.instance import OpenContext
from iommufdd.server.seccomp.procmm import StaleError
from iommufdd.user import Caller

from . import abi
from .caller import Buffer
from .inject import ioctl_with_descriptor

if TYPE_CHECKING:
    from collections.abc import Callable

    from .backing import Backing
    from .caller import Thread
    from .files import Opened
    from .session import Request, Session

    Handler = Callable[[Request], bytes | int | None]

FLAGS = abi.FOPEN_DIRECT_IO | abi.FOPEN_NOFLUSH | abi.FOPEN_PARALLEL_DIRECT_WRITES
DEFAULT_POLLMASK = select.POLLIN | select.POLLOUT | select.POLLRDNORM | select.POLLWRNORM
EVENT_QUEUES = {FaultAlloc.CMD, VeventqAlloc.CMD}
TEST_OPS = {IOMMU_TEST_OP_CREATE_ACCESS, IOMMU_TEST_OP_DMABUF_GET}
ANSWERED = 1 << 61
OPENS_AT_ONCE = 0xFFFF  # max_background: RELEASE must never wait behind others


class Calls:
    """The handlers by opcode."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self._made = int(time.time())
        self._handlers: dict[int, Handler] = {
            abi.INIT: self.init,
            abi.OPEN: self.open,
            abi.RELEASE: self.release,
            abi.IOCTL: self.ioctl,
            abi.READ: self.read,
            abi.WRITE: self.write,
            abi.POLL: self.poll,
            abi.GETATTR: self.getattr,
            abi.SETATTR: self.setattr,
            abi.STATFS: lambda request: bytes(abi.STATFS_OUT.size),
            abi.DESTROY: lambda request: b"",
            abi.FSYNC: lambda request: -errno.EINVAL,
            abi.FALLOCATE: lambda request: -errno.ENODEV,
            abi.FORGET: lambda request: None,
            abi.BATCH_FORGET: lambda request: None,
            abi.INTERRUPT: lambda request: None,  # what it means is answered at once anyway
        }

    def handle(self, request: Request) -> bytes | int | None:
        handler = self._handlers.get(request.opcode)
        return -errno.ENOSYS if handler is None else handler(request)

    def init(self, request: Request) -> bytes | int:
        major, minor, readahead, offered = abi.INIT_IN.unpack_from(request.body)
        if major != abi.KERNEL_VERSION:
            return -errno.EPROTO
        minor = min(minor, abi.MINOR_VERSION)
        flags2 = abi.INIT_IN_FLAGS2.unpack_from(request.body)[0] if offered & abi.INIT_EXT else 0
        backed = self.session.config.private and flags2 & abi.INIT2_PASSTHROUGH
        flags = abi.INIT_ATOMIC_O_TRUNC | (abi.INIT_EXT if backed else 0)
        return abi.INIT_OUT.pack(
            major, minor, readahead, flags, OPENS_AT_ONCE, OPENS_AT_ONCE, abi.MAX_WRITE,
            1, 0, 0, backed, 1 if backed else 0, 0,
        )  # fmt: skip

    # ---- open files ----

    def open(self, request: Request) -> bytes | int | None:
        session, injection = self.session, self.session.injection
        if injection is not None and injection.thread.tid == request.pid:
            opened = injection.open()
        else:
            session.thread(request.pid)  # else its ioctls could not be answered
            opened = session.open_files.add(context := self._context(), context.ctx)
        backing = session.backing
        if backing is not None:  # the kernel refuses to call it a stream then
            flags, backing_id = FLAGS | abi.FOPEN_PASSTHROUGH, backing.id
        else:
            flags, backing_id = FLAGS if opened.token else FLAGS | abi.FOPEN_STREAM, 0
        if not session.reply(request.unique, abi.OPEN_OUT.pack(opened.fh, flags, backing_id)):
            session.release(opened.fh)
        return None

    def _context(self) -> OpenContext:
        """A new one. EMFILE."""
        session = self.session
        exact = session.exact is not None
        context = OpenContext(session.instance, session.uid, container=session.config.container, mappable=exact)
        session.find_backing()
        if session.backing is not None:
            session.backing.adopt(context.ctx)
        return context

    def release(self, request: Request) -> bytes:
        self.session.release(abi.RELEASE_IN.unpack_from(request.body)[0])
        return b""

    def _opened(self, fh: int) -> Opened | None:
        opened = self.session.open_files.by_fh.get(fh)
        return None if opened is None or opened.file is None else opened

    # ---- ioctl ----

    def ioctl(self, request: Request) -> bytes | int | None:
        fh, flags, cmd, arg, _, _ = abi.IOCTL_IN.unpack_from(request.body)
        opened = self._opened(fh)
        if opened is None or not isinstance(opened.file, Context):
            return -errno.ENOTTY
        session = self.session
        thread = session.thread(request.pid)
        try:
            rc = self._ioctl(request, thread, opened, flags, cmd, arg)
        except StaleError:  # it has called exec, or its number was another's
            rc = self._ioctl(request, session.look_up(request.pid), opened, flags, cmd, arg)
        return None if rc == ANSWERED else abi.IOCTL_OUT.pack(rc, 0, 0, 0)

    def _ioctl(self, request: Request, thread: Thread, opened: Opened, flags: int, cmd: int, arg: int) -> int:
        session = self.session
        if cmd == Destroy.CMD and session.exact is not None:
            session.exact.before_destroy(opened.context)
        if cmd in (Destroy.CMD, ViommuAlloc.CMD) and session.backing is not None:
            return self._with_registers(thread, opened.context.ctx, session.backing, cmd, arg)
        seekable = _gives_descriptor(thread, cmd, arg)
        if seekable is None:
            return session.ioctl(thread, opened.context.ctx, cmd, arg)
        if session.injection is not None:
            session.defer(request)
            return ANSWERED
        rc = ioctl_with_descriptor(session, thread, opened.context, request.unique, (cmd, arg), seekable=seekable)
        return ANSWERED if rc is None else rc

    def _with_registers(self, thread: Thread, ctx: Context, backing: Backing, cmd: int, arg: int) -> int:
        """A call that makes registers, or must not take away those that are mapped."""
        mappings = backing.mappings(ctx) if cmd == Destroy.CMD else []
        try:
            rc = self.session.ioctl(thread, ctx, cmd, arg)
        finally:
            for vma in mappings:
                vma.put()
        backing.show(ctx)
        return rc

    # ---- read, write, poll ----

    def read(self, request: Request) -> bytes | int:
        fh, _, size, *_ = abi.READ_IN.unpack_from(request.body)
        opened = self._opened(fh)
        if self._asked(request, opened):
            return b""
        if opened is None or not isinstance(opened.file, EventqFile):
            return -errno.EINVAL
        buffer = Buffer(bytearray(size))
        done = opened.file.read(self._caller(request, buffer), 0, size)
        return done if done < 0 else bytes(buffer.data[:done])

    def write(self, request: Request) -> bytes | int:
        fh, _, size, *_ = abi.WRITE_IN.unpack_from(request.body)
        opened = self._opened(fh)
        if self._asked(request, opened):
            return abi.WRITE_OUT.pack(size, 0)
        if opened is None or not isinstance(opened.file, EventqFile):
            return -errno.EINVAL
        buffer = Buffer(request.body[abi.WRITE_IN.size :])
        done = opened.file.write(self._caller(request, buffer), 0, size)
        return done if done < 0 else abi.WRITE_OUT.pack(done, 0)

    def _asked(self, request: Request, opened: Opened | None) -> bool:
        """Whether it is we who ask which file it is."""
        question = self.session.question
        return question is not None and opened is not None and question.answers(request.pid, opened)

    def _caller(self, request: Request, buffer: Buffer) -> Caller:
        whole = self.session.thread(request.pid).caller
        return Caller(whole.task, whole.mm, buffer, whole.files, whole.gate)

    def poll(self, request: Request) -> bytes | int:
        fh, kh, flags, _ = abi.POLL_IN.unpack_from(request.body)
        opened = self._opened(fh)
        if opened is None:
            return abi.POLL_OUT.pack(select.POLLERR, 0)
        if flags & abi.POLL_SCHEDULE_NOTIFY:
            opened.kh = kh
        assert opened.file is not None
        queue = isinstance(opened.file, EventqFile)
        return abi.POLL_OUT.pack(opened.file.poll() if queue else DEFAULT_POLLMASK, 0)

    # ---- the inode ----

    def getattr(self, request: Request) -> bytes:
        made = self._made
        attr = abi.ATTR.pack(
            abi.ROOT_INO, 0, 0, made, made, made, 0, 0, 0, abi.S_IFREG | 0o666, 1, 0, 0, 0, os.sysconf("SC_PAGESIZE"), 0
        )
        return abi.ATTR_OUT.pack(0, 0, 0) + attr

    def setattr(self, request: Request) -> bytes | int:
        """chmod, chown, truncate: refused; touch does no harm."""
        (valid,) = abi.SETATTR_IN.unpack_from(request.body)
        if valid & abi.FATTR_SIZE:
            return -errno.EINVAL
        return -errno.EPERM if valid & abi.FATTR_OWNER_MODE else self.getattr(request)


def _gives_descriptor(thread: Thread, cmd: int, arg: int) -> bool | None:
    """Whether the descriptor that an ioctl gives must be known later; None if it gives none. StaleError."""
    if cmd != TestCmd.CMD and cmd not in EVENT_QUEUES:
        return None
    head = thread.caller.memory.read(arg, 8)
    if cmd in EVENT_QUEUES:
        return False
    return True if int.from_bytes(head[4:8], "little") in TEST_OPS else None
