"""The address space of a traced process: struct mm_struct behind kept /proc/PID/mem and /proc/PID/maps.

Both descriptors name the mm, not the pid: after exec or exit the one reads nothing and the other answers ESRCH,
whatever process has the number then.

/proc/PID/mem ignores the rights of private pages (FOLL_FORCE), so the VMA is asked first, as the kernel does.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
from typing import TYPE_CHECKING, NamedTuple

from iommufdd.errors import EFAULT
from iommufdd.user import PAGE_MASK, PAGE_SHIFT, PAGE_SIZE, Mm, PageFile, PageRun

from .sys import PROCMAP, PROCMAP_ASK, PROCMAP_QUERY

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .procfile import TargetFiles
    from .target import Process

READABLE, WRITABLE, SHARED = 1, 2, 8  # PROCMAP_QUERY_VMA_*
GONE = "private memory that was pinned is gone: its process has unmapped it, or has ended; use shared memory"
_ASKED = PROCMAP.size
_MAPS_LINE = re.compile(rb"([0-9a-f]+)-([0-9a-f]+) (....) ([0-9a-f]+) ([0-9a-f]+):([0-9a-f]+) (\d+)")


class StaleError(Exception):
    """What is kept of a task is no longer true: it has called exec, or its number is another's now."""


class Vma(NamedTuple):
    """struct vm_area_struct"""

    start: int
    end: int
    flags: int
    page_size: int
    offset: int
    dev: int
    ino: int


NOWHERE = Vma(0, 0, 0, 0, 0, 0, 0)


class Clock:
    """Counts notifications: what was looked up in an earlier one may have changed."""

    now = 0


class PrivatePages(PageFile):
    """Private pages of one mm: the page index is the page's address. Gone when the mm is."""

    def __init__(self, mm: ProcMm, *, compound: bool) -> None:
        self.mm = mm
        self.compound = compound

    def size(self) -> int:
        return 1 << 64

    def pread(self, pos: int, length: int) -> bytes:
        data = self.mm.read(pos, length)
        if not data and length:
            raise EFAULT(GONE)
        return data

    def pwrite(self, pos: int, data: bytes) -> int:
        done = self.mm.write(pos, data)
        if not done and data:
            raise EFAULT(GONE)
        return done


class ShownPages(PrivatePages):
    """What the addresses of an mm show at the moment of use, private or shared: nothing of it is kept.

    munmap(), mmap() and mprotect() are not traced, so every use asks anew what is there and what it allows.
    """

    def pread(self, pos: int, length: int) -> bytes:
        self.mm.forget()
        return super().pread(pos, length)

    def pwrite(self, pos: int, data: bytes) -> int:
        self.mm.forget()
        return super().pwrite(pos, data)


class ProcMm(Mm):
    """An mm, as long as one of `users` has it; then its descriptors are closed."""

    def __init__(self, pid: int, files: TargetFiles, clock: Clock, opened: tuple[int, int]) -> None:
        """Takes over `opened`: /proc/PID/mem and maps."""
        self.pid = pid
        self.files = files
        self.clock = clock
        self.users: set[Process] = set()
        self.locked_vm = 0
        self.pinned_vm = 0
        self.mem, self.maps = opened
        self.private = PrivatePages(self, compound=False)
        self.private_huge = PrivatePages(self, compound=True)
        self.shown = ShownPages(self, compound=False)
        self._asked = bytearray(_ASKED)
        self._last = self._before = NOWHERE  # the two looked up last, in this notification
        self._stamp = -1

    def close(self) -> None:
        if self.mem >= 0:
            os.close(self.mem)
            os.close(self.maps)
            self.mem = self.maps = -1
            for notifier in self.notifiers:
                notifier.mm_release()

    def leave(self, process: Process) -> None:
        """A process has ended, or has another mm now."""
        self.users.discard(process)
        if not self.users:
            self.close()
            self.files.mms.discard(self)

    @property
    def alive(self) -> bool:  # type: ignore[override]
        """Whether any task still has it."""
        if self.mem < 0:
            return False
        try:
            return os.pread(self.mem, 1, 0) != b""
        except OSError:
            return True  # nothing is mapped there, but the mm is

    # ---- memory of the moment ----

    def read(self, addr: int, length: int) -> bytes:
        try:
            return self.load(addr, length)
        except StaleError:
            return b""

    def write(self, addr: int, data: bytes) -> int:
        try:
            return self.store(addr, data)
        except StaleError:
            return 0

    def load(self, addr: int, length: int) -> bytes:
        """The readable prefix. StaleError."""
        vma = self.find(addr)
        if vma is None or not vma.flags & READABLE:
            return b""
        if addr + length <= vma.end:
            return self._pread(addr, length)
        data = self._pread(addr, vma.end - addr)
        return data + self.load(vma.end, addr + length - vma.end) if len(data) == vma.end - addr else data

    def store(self, addr: int, data: bytes) -> int:
        """Write the writable prefix. StaleError."""
        vma = self.find(addr)
        if vma is None or not vma.flags & WRITABLE:
            return 0
        room = vma.end - addr
        if len(data) <= room:
            return self._pwrite(addr, data)
        done = self._pwrite(addr, data[:room])
        return done + self.store(vma.end, data[room:]) if done == room else done

    def _pread(self, addr: int, length: int) -> bytes:
        try:
            return os.pread(self.mem, length, addr)
        except OSError:
            return b""

    def _pwrite(self, addr: int, data: bytes) -> int:
        try:
            return os.pwrite(self.mem, data, addr)
        except OSError:
            return 0

    # ---- VMAs ----

    def find(self, addr: int) -> Vma | None:
        """The VMA that holds addr. StaleError when the mm is gone, and with it the task that is thought to have it."""
        if self.maps < 0:
            raise StaleError(f"the mm of pid {self.pid} is gone")
        last = self._last
        if self._stamp != self.clock.now:
            self._stamp, self._last, self._before = self.clock.now, NOWHERE, NOWHERE
        elif last.start <= addr < last.end:
            return last
        elif self._before.start <= addr < self._before.end:
            self._before, self._last = last, self._before
            return self._last
        else:
            self._before = last
        vma = self._query(addr) if self.files.procmap_query else self._parse(addr)
        self._last = NOWHERE if vma is None else vma
        return vma

    def _query(self, addr: int) -> Vma | None:
        asked = self._asked
        try:
            PROCMAP_ASK.pack_into(asked, 0, _ASKED, 0, addr)
            fcntl.ioctl(self.maps, PROCMAP_QUERY, asked)
        except OSError as error:
            if error.errno == errno.ENOTTY:  # before Linux 6.11
                self.files.procmap_query = False
                return self._parse(addr)
            if error.errno != errno.ENOENT:
                raise StaleError(f"the mm of pid {self.pid} is gone") from None
            return None
        _, _, _, start, end, flags, page_size, offset, ino, major, minor, *_ = PROCMAP.unpack(asked)
        return Vma(start, end, flags, page_size, offset, os.makedev(major, minor), ino)

    def _parse(self, addr: int) -> Vma | None:
        for vma in self.vmas():
            if vma.start <= addr < vma.end:
                return vma
        if not self.alive:
            raise StaleError(f"the mm of pid {self.pid} is gone")
        return None

    def forget(self) -> None:
        """What was looked up may have changed since."""
        self._last = self._before = NOWHERE

    def vmas(self) -> Iterator[Vma]:
        """All of them, ascending, from the text of maps: without page sizes."""
        if self.maps < 0:
            return
        os.lseek(self.maps, 0, os.SEEK_SET)
        text = b""
        while part := os.read(self.maps, 1 << 16):
            text += part
        yield from _parsed(text)

    # ---- identities ----

    def resolve(self, addr: int, npages: int, *, write: bool) -> list[PageRun]:
        try:
            return self._resolve(addr, npages, write=write)
        except StaleError:
            return []

    def _resolve(self, addr: int, npages: int, *, write: bool) -> list[PageRun]:
        runs: list[PageRun] = []
        addr &= PAGE_MASK
        end = addr + (npages << PAGE_SHIFT)
        while addr < end:
            vma = self.find(addr)
            if vma is None or not vma.flags & (WRITABLE if write else READABLE):
                break
            length = min(end, vma.end) - addr
            good = self._present(addr, length) if vma.ino else length if self._touch(addr) else 0
            file = self._file(vma, write=write)
            if file is None or not good:
                break
            page = addr if isinstance(file, PrivatePages) else vma.offset + addr - vma.start
            runs.append(PageRun(file, page >> PAGE_SHIFT, good >> PAGE_SHIFT))
            if good < length:
                break
            addr += length
        return runs

    def faultin(self, addr: int, npages: int, *, write: bool) -> list[PageRun]:
        """Pages of the addresses themselves: there is no notifier, so what is kept must not outlive a munmap()."""
        self.forget()
        found = sum(run.npages for run in self.resolve(addr, npages, write=write))
        return [PageRun(self.shown, addr >> PAGE_SHIFT, found)] if found else []

    def _file(self, vma: Vma, *, write: bool) -> PageFile | None:
        """What the pages of a VMA belong to; None for what cannot be pinned."""
        if vma.flags & SHARED:
            return self.files.mapped(self, vma, write=write)
        return self.private_huge if vma.page_size > PAGE_SIZE else self.private

    def _touch(self, addr: int) -> bool:
        """Whether there is a page: not so for device memory, and beyond the end of a file."""
        try:
            return len(os.pread(self.mem, 1, addr)) == 1
        except OSError:
            return False

    def _present(self, addr: int, length: int) -> int:
        """How much of a file's mapping lies before its end, in whole pages."""
        if self._touch(addr + length - PAGE_SIZE):
            return length
        low, high = 0, length >> PAGE_SHIFT  # pages below low are there, from high on they are not
        while low < high:
            middle = (low + high) // 2
            if self._touch(addr + (middle << PAGE_SHIFT)):
                low = middle + 1
            else:
                high = middle
        return low << PAGE_SHIFT


def open_mm(pid: int) -> tuple[int, int]:
    """/proc/PID/mem, which takes PTRACE_MODE_ATTACH, and maps, for which PTRACE_MODE_READ is enough. OSError."""
    mem = os.open(f"/proc/{pid}/mem", os.O_RDWR | os.O_CLOEXEC)
    try:
        return mem, os.open(f"/proc/{pid}/maps", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        os.close(mem)
        raise


def _parsed(text: bytes) -> Iterator[Vma]:
    for found in _MAPS_LINE.finditer(text):
        start, end, rights, offset, major, minor, ino = found.groups()
        flags = READABLE * (rights[0:1] == b"r") | WRITABLE * (rights[1:2] == b"w") | SHARED * (rights[3:] == b"s")
        dev = os.makedev(int(major, 16), int(minor, 16))
        yield Vma(int(start, 16), int(end, 16), flags, PAGE_SIZE, int(offset, 16), dev, int(ino))


def maps_of(pid: str, inode: tuple[int, int]) -> Iterator[Vma]:
    """Where a process, traced or not, maps a file; nothing if it may not be looked into."""
    try:
        with open(f"/proc/{pid}/maps", "rb") as file:
            text = file.read()
    except OSError:
        return
    if b" %d " % inode[1] in text:
        yield from (vma for vma in _parsed(text) if (vma.dev, vma.ino) == inode)
