"""The process that runs a program: address space, descriptors, credentials; system calls raise OSError."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from iommufdd.user import PAGE_SIZE, File

from .files import DEFAULT_POLLMASK, POLLERR, POLLHUP, POLLNVAL, CharDev, EventFd, FdTable, LocalFile
from .memory import F_ANY_WRITE, HUGE, PROT_WRITE, AddressSpace, MemFile, fail, round_up

if TYPE_CHECKING:
    from collections.abc import Callable

    from iommufdd.user import PageFile

GUARD_BASE = 0x1F0000000000
GUARD_BYTES = 1 << 16
MAP_SHARED, MAP_PRIVATE, MAP_FIXED_NOREPLACE = 1, 2, 0x100000
MEMLOCK = 8 << 20  # the kernel's default RLIMIT_MEMLOCK
FIOCLEX, FIONCLEX, FIONBIO = 0x5451, 0x5450, 0x5421  # answered before the file is asked: do_vfs_ioctl()
UID_SAME = 2**32 - 1  # setresuid(-1)


class Credentials:
    """struct cred and the limit that counts here: a process starts as root with every capability."""

    def __init__(self) -> None:
        self.uid = 0
        self.privileged = True
        self.memlock = MEMLOCK
        self.memlock_max = MEMLOCK

    def copy(self) -> Credentials:
        other = Credentials()
        vars(other).update(vars(self))
        return other


class Driver:
    """What stands behind /dev/iommu, and where memory comes from: here a machine without iommufd.

    Failures are OSErrors. Files that open() or an ioctl made come back in the other calls.
    """

    def new_space(self) -> AddressSpace:
        return AddressSpace()

    def new_pages(self, length: int, unit: int, *, private: bool) -> MemFile:
        return MemFile(length, unit=unit, private=private)

    def started(self, process: Process, parent: Process | None) -> None:
        """A process is there, with its address space filled."""

    def credentials_changed(self, process: Process) -> None:
        """Its uid or its limit is another one."""

    def exited(self, process: Process) -> None:
        """A process has ended."""

    def open(self, process: Process, path: str) -> File:
        raise fail(errno.ENOENT)

    def ioctl(self, process: Process, file: File, cmd: int, arg: int) -> int:
        raise NotImplementedError

    def read(self, process: Process, file: File, addr: int, count: int) -> int:
        raise NotImplementedError

    def write(self, process: Process, file: File, addr: int, count: int) -> int:
        raise NotImplementedError

    def poll(self, process: Process, file: File) -> int:
        raise NotImplementedError

    def mmap(self, process: Process, file: File, offset: int, length: int, prot: int, flags: int) -> PageFile:
        """A reference to the pages that the mapping shows."""
        raise NotImplementedError

    def pinned_kib(self, process: Process) -> tuple[int, int]:
        """VmPin and VmLck."""
        return 0, 0


IOMMU_PATHS = ("/dev/iommu", "/dev/vfio/vfio")


class Process:
    """A task with an address space and files of its own."""

    def __init__(self, driver: Driver, parent: Process | None = None) -> None:
        self.driver = driver
        self.space = driver.new_space()
        self.files = FdTable()
        self.parent = parent
        self.credentials: Credentials = parent.credentials.copy() if parent else Credentials()
        if parent:
            parent.space.fork_into(self.space)
            parent.files.fork_into(self.files)
        else:
            self.files.start()
            self.mmap(GUARD_BASE, GUARD_BYTES + PAGE_SIZE, 3, MAP_PRIVATE)
            self.space.mprotect(GUARD_BASE + GUARD_BYTES, PAGE_SIZE, 0)
        driver.started(self, parent)

    def fork(self) -> Process:
        return Process(self.driver, self)

    def exit(self) -> None:
        self.space.exit()
        self.files.exit()
        self.driver.exited(self)

    # Memory.

    def mmap(
        self,
        addr: int,
        length: int,
        prot: int,
        flags: int,
        fd: int | None = None,
        offset: int = 0,
        *,
        huge: bool = False,
    ) -> None:
        """mmap(2) with MAP_FIXED_NOREPLACE; without an fd MAP_ANONYMOUS, `huge` is MAP_HUGETLB."""
        if offset % PAGE_SIZE:
            raise fail(errno.EINVAL)
        file = None if fd is None else self.files.get(fd)
        unit = file.unit if isinstance(file, MemFile) else HUGE if huge else PAGE_SIZE
        if not length:
            raise fail(errno.EINVAL)
        length = round_up(length, unit)
        if length >> 64:
            raise fail(errno.ENOMEM)
        if offset + length > 2**64:
            raise fail(errno.EOVERFLOW)
        self.space.check_place(addr, length, unit)
        most = 2**63 - 1 if isinstance(file, MemFile) else 2**64 - 1
        if offset > most - length & -PAGE_SIZE:
            raise fail(errno.EOVERFLOW)
        pages = self._pages(file, unit, length, prot, flags, offset)
        self.space.place(addr, length, prot, pages, offset)
        pages.put()  # the mapping holds it

    def _pages(self, file: File | None, unit: int, length: int, prot: int, flags: int, offset: int) -> PageFile:
        """A reference to what the mapping shows."""
        private = bool(flags & MAP_PRIVATE)
        if isinstance(file, MemFile):
            return self._memfd_pages(file, length, prot, offset, private=private)
        if file is None or (isinstance(file, CharDev) and file.path == "/dev/zero"):
            return self.driver.new_pages(offset + length, unit, private=private)
        if isinstance(file, LocalFile):
            raise fail(errno.ENODEV)
        return self.driver.mmap(self, file, offset, length, prot, flags)

    def _memfd_pages(self, file: MemFile, length: int, prot: int, offset: int, *, private: bool) -> PageFile:
        if not private and prot & PROT_WRITE and file.seals & F_ANY_WRITE:
            raise fail(errno.EPERM)
        if offset % file.unit:
            raise fail(errno.EINVAL)
        if file.unit > PAGE_SIZE and prot & PROT_WRITE and file.length < offset + length:
            file.resize(offset + length)
        if not private:
            file.get()
            return file
        return file.copy()  # differs from Linux: later writes to the file do not show

    def memfd_create(self, length: int, *, huge: bool = False) -> int:
        """memfd_create(2) and ftruncate(2)."""
        file = self.driver.new_pages(0, HUGE if huge else PAGE_SIZE, private=False)
        try:
            file.truncate(length)
        except OSError:
            file.put()
            raise
        return self.files.add(file)

    def ftruncate(self, fd: int, length: int) -> None:
        if length < 0:
            raise fail(errno.EINVAL)
        file = self.files.get(fd)
        if not isinstance(file, MemFile):
            raise fail(errno.EINVAL)
        file.truncate(length)

    def add_seals(self, fd: int, seals: int) -> None:
        file = self.files.get(fd)
        if not isinstance(file, MemFile):
            raise fail(errno.EINVAL)
        file.add_seals(seals, mapped_writable=any(task.space.maps_writable(file) for task in self._family()))

    def _family(self) -> list[Process]:
        """This process and those that wait for it: all that are alive."""
        return [self, *(self.parent._family() if self.parent else [])]

    # Files.

    def open(self, path: str) -> int:
        if path in IOMMU_PATHS:
            return self.files.add(self.driver.open(self, path))
        if path in ("/dev/null", "/dev/zero"):
            return self.files.add(CharDev(path))
        raise fail(errno.ENOENT)

    def close(self, fd: int) -> None:
        self.files.close(fd)

    def dup(self, fd: int) -> int:
        return self.files.add(self.files.get(fd).get())

    def eventfd(self) -> int:
        return self.files.add(EventFd())

    def ioctl(self, fd: int, cmd: int, arg: int) -> int:
        file = self.files.get(fd)
        cmd &= 0xFFFFFFFF
        if cmd in (FIOCLEX, FIONCLEX):
            return 0
        if cmd == FIONBIO:
            if len(self.space.read(arg, 4)) < 4:
                raise fail(errno.EFAULT)
            return 0
        if isinstance(file, LocalFile | MemFile):
            raise fail(errno.ENOTTY)
        return self.driver.ioctl(self, file, cmd, arg)

    def read(self, fd: int, addr: int, count: int) -> int:
        file = self.files.get(fd)
        if isinstance(file, LocalFile):
            return file.read_into(self.space, addr, count)
        if not isinstance(file, MemFile):
            return self.driver.read(self, file, addr, count)
        data = file.read_at_pos(count)
        done = self.space.write(addr, data)
        if data and not done:
            raise fail(errno.EFAULT)
        file.pos += done
        return done

    def write(self, fd: int, addr: int, count: int) -> int:
        file = self.files.get(fd)
        if isinstance(file, LocalFile):
            return file.write_from(self.space, addr, count)
        if not isinstance(file, MemFile):
            return self.driver.write(self, file, addr, count)
        data = self.space.read(addr, count)
        if count and not data:
            raise fail(errno.EFAULT)
        return file.write_at_pos(data)

    def poll(self, fd: int, events: int) -> int:
        """poll(2) of one descriptor; nothing can happen meanwhile, so a timeout would pass in vain."""
        if fd < 0:
            return 0
        file = self.files.fget(fd)
        if file is None:
            return POLLNVAL
        return self._mask(file) & (events | POLLERR | POLLHUP)

    def _mask(self, file: File) -> int:
        if isinstance(file, MemFile):
            return DEFAULT_POLLMASK
        return file.poll() if isinstance(file, LocalFile) else self.driver.poll(self, file)

    def lseek(self, fd: int, offset: int) -> int:
        """lseek(2), SEEK_SET: our devices and their queues cannot; the fake ones stay at 0."""
        file = self.files.get(fd)
        if isinstance(file, LocalFile):
            return 0
        if not isinstance(file, MemFile):
            raise fail(errno.ESPIPE)
        if offset < 0:
            raise fail(errno.EINVAL)
        file.pos = offset
        return offset

    # Credentials.

    def setresuid(self, uid: int) -> None:
        """All three ids; leaving 0 drops every capability."""
        cred = self.credentials
        if uid == UID_SAME:
            return
        if not cred.privileged and uid != cred.uid:
            raise fail(errno.EPERM)
        cred.privileged = cred.privileged and uid == 0
        cred.uid = uid
        self.driver.credentials_changed(self)

    def set_memlock(self, limit: int) -> None:
        """setrlimit(RLIMIT_MEMLOCK), both limits."""
        cred = self.credentials
        if limit > cred.memlock_max and not cred.privileged:
            raise fail(errno.EPERM)
        cred.memlock = cred.memlock_max = limit
        self.driver.credentials_changed(self)


def answer(call: Callable[[], int | None]) -> tuple[int, int]:
    """(result, errno) as a C program sees them."""
    try:
        return call() or 0, 0
    except OSError as error:
        return -1, error.errno or 0
