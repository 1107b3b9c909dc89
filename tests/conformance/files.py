"""The kernel's own files that the programs open: an eventfd, /dev/null, /dev/zero, standard input; the fd table."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from iommufdd.errors import EMFILE
from iommufdd.user import File

from .memory import fail

if TYPE_CHECKING:
    from .memory import AddressSpace

POLLIN, POLLOUT, POLLERR, POLLHUP, POLLNVAL = 1, 4, 8, 0x10, 0x20
DEFAULT_POLLMASK = POLLIN | POLLOUT | 0x40 | 0x100  # of a file without a poll operation
NOFILE = 1024  # RLIMIT_NOFILE


class LocalFile(File):
    """A file that has nothing to do with iommufd."""

    def read_into(self, space: AddressSpace, addr: int, count: int) -> int:
        raise fail(errno.EINVAL)

    def write_from(self, space: AddressSpace, addr: int, count: int) -> int:
        raise fail(errno.EINVAL)


class CharDev(LocalFile):
    """/dev/null, or /dev/zero."""

    def __init__(self, path: str) -> None:
        self.path = path

    def poll(self) -> int:
        return DEFAULT_POLLMASK

    def read_into(self, space: AddressSpace, addr: int, count: int) -> int:
        if self.path != "/dev/zero":
            return 0
        done = space.write(addr, bytes(count))
        if count and not done:
            raise fail(errno.EFAULT)
        return done

    def write_from(self, space: AddressSpace, addr: int, count: int) -> int:
        return count


class EventFd(LocalFile):
    """eventfd(0, 0)."""

    MAX = 2**64 - 2

    def __init__(self) -> None:
        self.count = 0

    def poll(self) -> int:
        return (POLLIN if self.count else 0) | (POLLOUT if self.count < self.MAX else 0)

    def read_into(self, space: AddressSpace, addr: int, count: int) -> int:
        if count < 8:
            raise fail(errno.EINVAL)
        if not self.count:
            raise RuntimeError("the read of an empty eventfd would wait for ever")
        value, self.count = self.count, 0
        if space.write(addr, value.to_bytes(8, "little")) < 8:
            raise fail(errno.EFAULT)
        return 8

    def write_from(self, space: AddressSpace, addr: int, count: int) -> int:
        if count != 8:
            raise fail(errno.EINVAL)
        data = space.read(addr, 8)
        if len(data) < 8:
            raise fail(errno.EFAULT)
        value = int.from_bytes(data, "little")
        if value > self.MAX:
            raise fail(errno.EINVAL)
        if self.count + value > self.MAX:
            raise RuntimeError("the write to a full eventfd would wait for ever")
        self.count += value
        return 8


class FdTable:
    """struct files_struct: the lowest free number is given out. A `user.FileTable`."""

    def __init__(self) -> None:
        self.files: dict[int, File | None] = {}  # None: reserved, not yet open

    def start(self) -> None:
        """The first process has 0, 1 and 2 open."""
        self.files.update({fd: CharDev("/dev/null") for fd in range(3)})

    def fget(self, fd: int) -> File | None:
        return self.files.get(fd)

    def get_unused_fd(self) -> int:
        for fd in range(NOFILE):
            if fd not in self.files:
                self.files[fd] = None
                return fd
        raise EMFILE("all descriptor numbers are in use")

    def put_unused_fd(self, fd: int) -> None:
        del self.files[fd]

    def fd_install(self, fd: int, file: File) -> None:
        self.files[fd] = file

    def add(self, file: File) -> int:
        """The table takes over the caller's reference."""
        try:
            fd = self.get_unused_fd()
        except EMFILE:
            file.put()
            raise fail(errno.EMFILE) from None
        self.fd_install(fd, file)
        return fd

    def close(self, fd: int) -> None:
        file = self.files.pop(fd, None)
        if file is None:
            raise fail(errno.EBADF)
        file.put()

    def get(self, fd: int) -> File:
        file = self.fget(fd)
        if file is None:
            raise fail(errno.EBADF)
        return file

    def fork_into(self, child: FdTable) -> None:
        child.files = {fd: file.get() for fd, file in self.files.items() if file}

    def exit(self) -> None:
        for fd in list(self.files):
            self.close(fd)
