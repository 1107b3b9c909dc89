"""Files of clients: the pages behind registered memory and MAP_FILE, and the scratch file of a channel.

A page's identity is the PageFile object, so there is one per inode: `PageFiles` finds it by (st_dev, st_ino).
Only shmem and hugetlbfs files have pages here; they answer F_GET_SEALS, others do not. Any other file could make
the daemon wait (a disk, a FUSE mount) and cannot be pinned by the kernel either.

The daemon touches a mapping of a client's file only where no ftruncate() of the client can take the page away
under it, which would kill the daemon with SIGBUS: on shmem with F_SEAL_SHRINK. Otherwise it calls pread() and
pwrite().
"""

from __future__ import annotations

import fcntl
import mmap
import os
import stat
import weakref

from iommufd_uapi.wire import MAX_SCRATCH
from iommufdd.errors import EINVAL, EMFILE, IommufdError
from iommufdd.user import PAGE_SIZE, File, PageFile

from .nofile import Nofile

MAPPED = 1 << 45  # bytes of client files: a quarter of what a process on x86-64 has


class OtherFile(File):
    """A descriptor that is open and nothing of ours: an eventfd, a socket, a file on a disk."""


class SharedFile(PageFile):
    """A shmem or hugetlbfs file, held by a descriptor of the daemon's own."""

    def __init__(self, files: PageFiles, key: FileKey, fd: int, uid: int, seals: int) -> None:
        self.files = files
        self.key = key
        self.fd = fd
        self.uid = uid
        self.refs = 1
        self.seals = seals
        self.writable = key[2]
        self.compound = os.fstatvfs(fd).f_bsize > PAGE_SIZE  # on hugetlbfs
        self._map: mmap.mmap | None = None
        self._view: memoryview | None = None

    def __str__(self) -> str:
        """"memfd:guest", or a path."""
        return os.readlink(f"/proc/self/fd/{self.fd}").removesuffix(" (deleted)").replace("/memfd:", "memfd:", 1)

    def release(self) -> None:
        self._map = self._view = None
        self.files.forget(self)
        os.close(self.fd)

    def size(self) -> int:
        return os.fstat(self.fd).st_size

    def view(self, end: int) -> memoryview | None:
        mapped = self._mapped(end)
        if mapped is None or end > len(mapped):
            return None
        if self._view is None:
            self._view = memoryview(mapped)
        return None if self._view.readonly else self._view

    def pread(self, pos: int, length: int) -> bytes:
        view = self._mapped(pos + length)
        if view is not None:
            return view[pos : pos + length]
        try:
            return os.pread(self.fd, length, pos)
        except (OSError, OverflowError):
            return b""

    def pwrite(self, pos: int, data: bytes) -> int:
        if not self.writable:
            return 0
        view = self._mapped(pos + len(data))
        length = max(0, min(len(data), (self.size() if view is None else len(view)) - pos))
        if view is not None:
            view[pos : pos + length] = data[:length]
            return length
        write = self.files.write_huge if self.compound else os.pwrite
        try:
            return write(self.fd, data[:length], pos) if length else 0
        except (OSError, OverflowError, ValueError):
            return 0

    def _mapped(self, end: int) -> mmap.mmap | None:
        """The whole file mapped, where that is safe and possible; anew when the file has grown past `end`."""
        if self.compound or not self.seals & fcntl.F_SEAL_SHRINK:
            return None
        if self._map is None or (end > len(self._map) and self.size() > len(self._map)):
            self._map = self._view = None
            self._map = self.files.map(self)
        return self._map


class PrivateFile(PageFile):
    """The pages of one private mapping: another file's bytes, an identity of their own."""

    def __init__(self, file: PageFile) -> None:
        self._file = file
        file.get()

    def __str__(self) -> str:
        return f"private pages of {self._file}"

    def release(self) -> None:
        self._file.put()

    def size(self) -> int:
        return self._file.size()

    def pread(self, pos: int, length: int) -> bytes:
        return self._file.pread(pos, length)

    def pwrite(self, pos: int, data: bytes) -> int:
        return self._file.pwrite(pos, data)


FileKey = tuple[int, int, bool]


class PageFiles:
    """Every page file that something refers to, by inode.

    One that came read-only is not the one that came writable: a client that was given a read-only descriptor
    must not write through the descriptor of another.
    """

    def __init__(self, nofile: Nofile) -> None:
        self.nofile = nofile
        self._mapped = Nofile(MAPPED, "bytes of the daemon's address space")
        self._files: dict[FileKey, SharedFile] = {}
        self._staging = -1

    def __len__(self) -> int:
        return len(self._files)

    def open(self, fd: int, uid: int) -> File | None:
        """The file behind a descriptor of a client, with a reference for the caller; fd stays the client's.

        None for one opened with O_PATH, as fget() has it. Errors: EMFILE.
        """
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        if flags & os.O_PATH:
            return None
        status = os.fstat(fd)
        seals = get_seals(fd) if stat.S_ISREG(status.st_mode) else None
        if seals is None:
            return OtherFile()
        key = (status.st_dev, status.st_ino, flags & os.O_ACCMODE == os.O_RDWR)
        file = self._files.get(key)
        if file is not None:
            file.seals = seals  # seals are only ever added
            return file.get()
        return self._open(key, fd, uid, seals)

    def _open(self, key: FileKey, fd: int, uid: int, seals: int) -> SharedFile:
        self.nofile.charge(uid)
        try:
            file = SharedFile(self, key, fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3), uid, seals)
        except OSError as error:
            self.nofile.uncharge(uid)
            raise EMFILE(f"the daemon cannot keep this file: {error.strerror}") from None
        self._files[key] = file
        return file

    def forget(self, file: SharedFile) -> None:
        del self._files[file.key]
        self.nofile.uncharge(file.uid)

    def map(self, file: SharedFile) -> mmap.mmap | None:
        """All of a file mapped; None when it cannot be, or when its uid has its share.

        A mapping, and the descriptor that it keeps, are charged until the last view of it is gone: entries of IOMMU
        caches have views, also of how the file was mapped before it grew.
        """
        access = mmap.ACCESS_WRITE if file.writable else mmap.ACCESS_READ
        size = file.size()
        try:
            self.nofile.charge(file.uid)
        except IommufdError:
            return None
        try:
            self._mapped.charge(file.uid, size)
        except IommufdError:
            self.nofile.uncharge(file.uid)
            return None
        try:
            mapped = mmap.mmap(file.fd, size, access=access)
        except (OSError, ValueError, OverflowError):  # empty, no room, or sealed against writing
            self._unmapped(file.uid, size)
            return None
        weakref.finalize(mapped, self._unmapped, file.uid, size).atexit = False
        return mapped

    def _unmapped(self, uid: int, size: int) -> None:
        self._mapped.uncharge(uid, size)
        self.nofile.uncharge(uid)

    def write_huge(self, fd: int, data: bytes, pos: int) -> int:
        """pwrite() for hugetlbfs, which has none: through a mapping that only the kernel touches.

        preadv() into the mapping answers EFAULT where a store would raise SIGBUS: beyond the end of a file that
        was just cut, or with no huge page left.
        """
        if self._staging < 0:
            self._staging = os.memfd_create("iommufdd-staging", os.MFD_CLOEXEC)
        step = os.fstatvfs(fd).f_bsize
        start = pos - pos % step
        os.pwrite(self._staging, data, 0)
        length = -(-(pos + len(data) - start) // step) * step  # munmap() takes whole pages only
        with (
            mmap.mmap(fd, length, offset=start) as view,
            memoryview(view) as window,
            window[pos - start : pos - start + len(data)] as target,
        ):
            return os.preadv(self._staging, [target], 0)

    def close(self) -> None:
        if self._staging >= 0:
            os.close(self._staging)
            self._staging = -1


class Scratch:
    """The scratch file of a channel: memory that requests may name by offset. All of it is mapped."""

    def __init__(self, fd: int) -> None:
        """EINVAL unless it is shmem, can be written, cannot shrink, and is 1 byte to 1 GiB long."""
        seals = get_seals(fd)
        if seals is None or not seals & fcntl.F_SEAL_SHRINK or os.fstatvfs(fd).f_bsize > PAGE_SIZE:
            raise EINVAL("the scratch file must be a memfd sealed with F_SEAL_SHRINK, not on hugetlbfs")
        if not 0 < os.fstat(fd).st_size <= MAX_SCRATCH:
            raise EINVAL("the scratch file must have 1 byte to 1 GiB")
        try:
            self._map = mmap.mmap(fd, 0)
        except (OSError, ValueError) as error:
            raise EINVAL(f"the scratch file cannot be mapped: {error}") from None

    def read(self, offset: int, length: int) -> bytes:
        """Bytes from offset; shorter at the end of the file."""
        return self._map[offset : offset + length]

    def write(self, offset: int, data: bytes) -> int:
        """Store data at offset; how many bytes fitted."""
        length = max(0, min(len(data), len(self._map) - offset))
        self._map[offset : offset + length] = data[:length]
        return length

    def close(self) -> None:
        self._map.close()


def get_seals(fd: int) -> int | None:
    """F_GET_SEALS; None for what is neither shmem nor hugetlbfs (mm/memfd.c:memfd_file_seals_ptr())."""
    try:
        return fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        return None
