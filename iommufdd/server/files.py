"""Descriptors: those a client sends with a packet, and those the daemon hands out.

What the daemon hands out is the read end of a pipe; it keeps the write end. The pipe's inode says which file a
descriptor means, whoever sends it back. When the last copy of the read end is closed, in whatever process, the
write end shows EPOLLERR: the file's last descriptor is gone. A byte in the pipe makes it readable for as long as
File.poll() says so.
"""

from __future__ import annotations

import os
import select
from typing import TYPE_CHECKING

from iommufd_uapi.wire import CLOSED, MAX_FDS, NONE
from iommufdd.errors import EMFILE
from iommufdd.user import File

from . import log

if TYPE_CHECKING:
    from .memory import PageFiles
    from .nofile import Nofile
    from .vms import AnyOpened

FileKey = tuple[int, int, int]
READABLE = ~(select.POLLOUT | select.POLLWRNORM)  # what a byte in the pipe shows


def file_key(fd: int) -> FileKey:
    """Which inode of the daemon's own a descriptor shows.

    Numbers of pipe inodes come round after 2^32 pipes; only the daemon's uid can make one that belongs to it.
    """
    status = os.fstat(fd)
    return status.st_dev, status.st_ino, status.st_uid


class Pipe:
    """One file handed out: the pipe behind its descriptors."""

    __slots__ = ("file", "key", "opened", "read_fd", "shown", "uid", "write_fd")

    def __init__(self, opened: AnyOpened, uid: int) -> None:
        self.opened = opened
        self.uid = uid
        self.file: File | None = None  # not yet published
        self.shown = False  # there is a byte in the pipe
        self.read_fd, self.write_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self.key = file_key(self.write_fd)

    def make_writable(self) -> None:
        """The client's end polls writable too: an end for reading and writing, never full."""
        os.close(self.read_fd)
        self.read_fd = os.open(f"/proc/self/fd/{self.write_fd}", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)

    def show(self) -> None:
        """Make the pipe readable exactly while the file is (File.on_change)."""
        assert self.file is not None
        ready = bool(self.file.poll() & READABLE)
        if ready == self.shown:
            return
        self.shown = ready
        try:
            if ready:
                os.write(self.write_fd, b"!")
            else:
                drain(self.write_fd)
        except OSError:
            pass  # the last reader has gone, or has filled the pipe itself: its own loss


class Loan:
    """A descriptor that is only passed on: the daemon keeps no end of it."""

    __slots__ = ("read_fd", "uid")

    def __init__(self, fd: int, uid: int) -> None:
        self.read_fd = fd
        self.uid = uid


class Pipes:
    """All files handed out and still open somewhere."""

    def __init__(self, nofile: Nofile) -> None:
        self.nofile = nofile
        self.by_key: dict[FileKey, Pipe] = {}
        self._by_fd: dict[int, Pipe] = {}
        self.closers = select.epoll()

    def reserve(self, opened: AnyOpened, uid: int) -> Pipe:
        """A pipe for a file that is still to be made; EMFILE."""
        self.nofile.charge(uid, 2)
        try:
            return Pipe(opened, uid)
        except OSError:
            self.nofile.uncharge(uid, 2)
            raise EMFILE("the daemon has no descriptor left") from None

    def release(self, pipe: Pipe) -> None:
        """Take back a pipe that was not published."""
        os.close(pipe.write_fd)
        self.nofile.uncharge(pipe.uid, 1)

    def lend(self, fd: int, uid: int) -> Loan:
        """A copy of one of the daemon's descriptors; EMFILE."""
        self.nofile.charge(uid, 1)
        try:
            return Loan(os.dup(fd), uid)
        except OSError:
            self.nofile.uncharge(uid, 1)
            raise EMFILE("the daemon has no descriptor left") from None

    def sent(self, pipe: Pipe | Loan) -> None:
        """The read end has left for the client, or never will: the daemon closes its copy."""
        os.close(pipe.read_fd)
        self.nofile.uncharge(pipe.uid, 1)

    def publish(self, pipe: Pipe, file: File) -> None:
        """Watch the pipe; the caller's reference of the file goes with the last descriptor."""
        pipe.file = file
        if file.poll() & select.POLLOUT:
            pipe.make_writable()
        self.by_key[pipe.key] = self._by_fd[pipe.write_fd] = pipe
        self.closers.register(pipe.write_fd, 0)  # EPOLLERR is always reported
        file.on_change = pipe.show
        pipe.show()

    def ready(self, mask: int) -> None:
        """Some read ends are gone: close those files. Part of the reactor's batch, before any request."""
        while events := self.closers.poll(0):
            for fd, _ in events:
                self._closed(self._by_fd.pop(fd))

    def _closed(self, pipe: Pipe) -> None:
        assert pipe.file is not None
        self.closers.unregister(pipe.write_fd)
        del self.by_key[pipe.key]
        pipe.file.on_change = None
        self.release(pipe)
        try:
            pipe.file.put()
        except Exception as error:
            log.bug(error, uid=pipe.uid)

    def close(self) -> None:
        """The daemon ends: forget every file."""
        for pipe in list(self._by_fd.values()):
            self.release(pipe)
        self._by_fd.clear()
        self.by_key.clear()
        self.closers.close()


class Descriptors:
    """struct files_struct of one packet: numbers are indexes of the descriptors sent, both ways."""

    def __init__(self, opened: AnyOpened, uid: int, pipes: Pipes, page_files: PageFiles) -> None:
        self.opened = opened
        self.uid = uid
        self.pipes = pipes
        self.page_files = page_files
        self.received: list[int] = []  # closed by end()
        self.outgoing: list[Pipe | Loan] = []
        self.missing = -1  # an index that was used and not sent
        self._files: dict[int, File] = {}

    def end(self) -> None:
        """The packet is done. Before its reply leaves: then the client's close() can be the last."""
        for file in self._files.values():
            file.put()
        self._files.clear()
        while self.received:
            os.close(self.received.pop())

    def fget(self, fd: int) -> File | None:
        """The file of an index; EMFILE when the daemon cannot keep one more."""
        if fd in (NONE, CLOSED, -1):
            return None
        if not 0 <= fd < len(self.received):
            self.missing = fd
            return None
        file = self._files.get(fd)
        return file if file is not None else self._open(fd)

    def _open(self, fd: int) -> File | None:
        os_fd = self.received[fd]
        key = file_key(os_fd)
        pipe = self.pipes.by_key.get(key)
        context = self.opened.instance.instances.contexts.get(key)
        if pipe is not None and pipe.file is not None:
            file: File | None = pipe.file.get()
        elif context is not None:
            file = context.ctx.get()
        else:
            file = self.page_files.open(os_fd, self.uid)
        if file is not None:
            self._files[fd] = file  # the table's reference, until end()
        return file

    def get_unused_fd(self) -> int:
        self._room()
        self.outgoing.append(self.pipes.reserve(self.opened, self.uid))
        return len(self.outgoing) - 1

    def lend(self, fd: int) -> None:
        """Send a copy of one of the daemon's own descriptors along; EMFILE."""
        self._room()
        self.outgoing.append(self.pipes.lend(fd, self.uid))

    def take_back(self) -> None:
        """What was lent last is not sent after all."""
        self.pipes.sent(self.outgoing.pop())

    def _room(self) -> None:
        if len(self.outgoing) == MAX_FDS:
            raise EMFILE(f"a reply carries at most {MAX_FDS} descriptors")

    def put_unused_fd(self, fd: int) -> None:
        pipe = self.outgoing[fd]
        assert isinstance(pipe, Pipe)
        self.pipes.release(pipe)
        if fd == len(self.outgoing) - 1:
            self.outgoing.pop()
            self.pipes.sent(pipe)  # else its index must stay taken, and a dead pipe goes along

    def fd_install(self, fd: int, file: File) -> None:
        pipe = self.outgoing[fd]
        assert isinstance(pipe, Pipe)
        self.pipes.publish(pipe, file)

    def take(self) -> list[Pipe | Loan]:
        """The descriptors that go with the reply; the list is the caller's."""
        taken, self.outgoing = self.outgoing, []
        return taken


def drain(write_fd: int) -> None:
    """Empty a pipe of which only the write end is at hand."""
    reader = os.open(f"/proc/self/fd/{write_fd}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        os.read(reader, 16)
    except BlockingIOError:
        pass  # the client ate the byte
    finally:
        os.close(reader)
