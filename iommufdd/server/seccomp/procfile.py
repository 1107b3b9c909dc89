"""Files behind shared memory and descriptors of traced processes, by (st_dev, st_ino).

Looking a page up needs no descriptor. Only when it is pinned is the file opened: through /proc/PID/map_files, which
wants CAP_CHECKPOINT_RESTORE, or through a descriptor that the process still has. Where neither can be had, the
pages are reached through any mm that maps them, as long as there is one.
"""

from __future__ import annotations

import fcntl
import os
import stat
import weakref
from typing import TYPE_CHECKING

from iommufdd.errors import IommufdError
from iommufdd.server.memory import OtherFile, get_seals
from iommufdd.user import PAGE_SIZE, File, PageFile

from .procmm import SHARED, WRITABLE, ProcMm, StaleError, Vma
from .sys import inode_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from iommufdd.server.memory import PageFiles

Inode = tuple[int, int]
Key = tuple[int, int, bool]  # and whether it may be written


class TargetFile(PageFile):
    """A file with pages; `refs` counts pins and mappings of it, and it is open while there are any."""

    def __init__(self, files: TargetFiles, key: Key) -> None:
        self.files = files
        self.inode = key[:2]
        self.writable = key[2]
        self.refs = 0
        self.mm: ProcMm | None = None  # where it was last seen
        self.vma: Vma | None = None
        self._held: PageFile | None = None  # with a descriptor of our own
        self._source = -1  # a descriptor from which it can be opened in this notification
        self.lost = 0  # reads and writes that found no way to the pages

    def seen(self, mm: ProcMm, vma: Vma) -> None:
        self.mm, self.vma = mm, vma
        self.compound = self.compound or vma.page_size > PAGE_SIZE

    def offer(self, fd: int) -> None:
        """A descriptor of it, closed at the end of the notification."""
        if self._source >= 0:
            os.close(fd)
            return
        self._source = fd
        self.compound = self.compound or os.fstatvfs(fd).f_bsize > PAGE_SIZE
        self.files.offered.append(self)

    def withdraw(self) -> None:
        if self._source >= 0:
            os.close(self._source)
            self._source = -1

    def get(self) -> File:
        self.refs += 1
        if self._held is None:
            self._held = self._hold()
        return self

    def release(self) -> None:
        if self._held is not None:
            self._held.put()
            self._held = None

    def size(self) -> int:
        if self._held is not None:
            return self._held.size()
        return os.fstat(self._source).st_size if self._source >= 0 else 1 << 63

    def pread(self, pos: int, length: int) -> bytes:
        if self._held is not None:
            return self._held.pread(pos, length)
        data = b""
        for mm, addr, room in self._places(pos):
            data += mm.read(addr, min(room, length - len(data)))
            break
        if len(data) < length:
            self.lost += 1
        return data

    def pwrite(self, pos: int, data: bytes) -> int:
        if self._held is not None:
            return self._held.pwrite(pos, data)
        done = 0
        for mm, addr, room in self._places(pos, WRITABLE):
            done = mm.write(addr, data[:room])
            break
        if done < len(data):
            self.lost += 1
        return done

    # ---- ways to it ----

    def _hold(self) -> PageFile | None:
        for fd in self._candidates():
            try:
                status = os.fstat(fd)
                if (status.st_dev, status.st_ino) == self.inode:
                    file = self.files.page_files.open(fd, self.files.uid)
                    if isinstance(file, PageFile):
                        self.compound = self.compound or file.compound
                        return file
            except (IommufdError, OSError):
                pass
            finally:
                os.close(fd)
        return None

    def _candidates(self) -> Iterator[int]:
        """Descriptors that may show the file, to be closed by the caller."""
        if self._source >= 0:
            yield os.dup(self._source)
        if self.mm is None or self.vma is None:
            return
        folder, vma = f"/proc/{self.mm.pid}", self.vma
        yield from self._opened(f"{folder}/map_files/{vma.start:x}-{vma.end:x}")
        try:
            numbers = os.listdir(f"{folder}/fd")
        except OSError:
            return
        for number in numbers:
            path = f"{folder}/fd/{number}"
            try:
                inode = inode_of(path)
            except OSError:
                continue
            if inode == self.inode:
                yield from self._opened(path)

    def _opened(self, path: str) -> Iterator[int]:
        for mode in (os.O_RDWR, os.O_RDONLY) if self.writable else (os.O_RDONLY,):
            try:
                yield os.open(path, mode | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
            except OSError:
                continue
            return

    def _places(self, pos: int, rights: int = 0) -> Iterator[tuple[ProcMm, int, int]]:
        """(mm, address, bytes from there on) wherever a live mm maps byte pos."""
        for mm in list(self.files.mms):
            for vma in self._vmas(mm, pos):
                shown = pos - vma.offset
                ours = (vma.dev, vma.ino) == self.inode and vma.flags & SHARED and vma.flags & rights == rights
                if ours and 0 <= shown < vma.end - vma.start:
                    yield mm, vma.start + shown, vma.end - vma.start - shown

    def _vmas(self, mm: ProcMm, pos: int) -> Iterator[Vma]:
        """Where an mm may map the file: first where it was seen last, which is cheap."""
        if mm is self.mm and self.vma is not None:
            try:
                vma = mm.find(self.vma.start)
            except StaleError:
                return
            if vma is not None:
                yield vma
        yield from mm.vmas()


class TargetFiles:
    """Every file that something knows, and all address spaces: one of a supervisor.

    `cautious`: the daemon may open more than the processes may. A file is then written only where they could; what is
    mapped read-only counts as another file than what is mapped for writing.
    """

    procmap_query = True  # the kernel has it

    def __init__(self, page_files: PageFiles, uid: int, is_ours: Callable[[Inode], bool], *, cautious: bool) -> None:
        self.cautious = cautious
        self.page_files = page_files
        self.uid = uid
        self.mms: set[ProcMm] = set()
        self.offered: list[TargetFile] = []
        self._is_ours = is_ours
        self._by_key: weakref.WeakValueDictionary[Key, TargetFile] = weakref.WeakValueDictionary()

    def _file(self, dev: int, ino: int, *, writable: bool) -> TargetFile:
        key = dev, ino, writable or not self.cautious
        file = self._by_key.get(key)
        if file is None:
            file = self._by_key[key] = TargetFile(self, key)
        return file

    def mapped(self, mm: ProcMm, vma: Vma, *, write: bool) -> TargetFile | None:
        """The file behind a shared VMA; None for the registers of a vIOMMU, which have no pages."""
        if self._is_ours((vma.dev, vma.ino)):
            return None
        file = self._file(vma.dev, vma.ino, writable=bool(vma.flags & WRITABLE))
        file.seen(mm, vma)
        return file

    def opened(self, fd: int) -> File:
        """The file of a descriptor, which becomes ours to close: with pages if it is on shmem or hugetlbfs."""
        if get_seals(fd) is None:
            os.close(fd)
            return OtherFile()
        status = os.fstat(fd)
        writable = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR
        file = self._file(status.st_dev, status.st_ino, writable=writable)
        file.offer(fd)
        return file

    def end(self) -> None:
        """A notification is answered: descriptors that came with it are no longer needed."""
        for file in self.offered:
            file.withdraw()
        self.offered.clear()


def reopened(folder: int, number: int, *, cautious: bool) -> int:
    """A descriptor of our own on the file behind /proc/TID/fd/N, writable if it can be. OSError.

    `cautious`: not more writable than the process's, which the mode of the link tells.
    """
    rights = os.stat(str(number), dir_fd=folder, follow_symlinks=False).st_mode
    for mode in (os.O_RDWR, os.O_RDONLY) if rights & stat.S_IWUSR or not cautious else (os.O_RDONLY,):
        try:
            return os.open(str(number), mode | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY, dir_fd=folder)
        except PermissionError:
            continue
    raise PermissionError
