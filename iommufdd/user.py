"""Ports to the caller: its memory, credentials and files; the fault gate.

The core knows the outside through these classes alone. The server (sockets, seccomp, FUSE) and the tests supply the
concrete ones. Nothing here waits or owns an OS resource.
"""

from __future__ import annotations

import enum
import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from .errors import EBADF, EFAULT, EINVAL, EMFILE, ENOENT, ENOMEM, IommufdError
from .spans import UseCounts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from .event_port import Events

PAGE_SHIFT = 12
PAGE_SIZE = 1 << PAGE_SHIFT
PAGE_MASK = ~(PAGE_SIZE - 1)
ULONG_MAX = 2**64 - 1


class Gate(enum.Enum):
    """Kinds of acquisition that can be made to fail: what is acquired, and the errno the kernel gives there."""

    OBJECT = "object", ENOMEM  # an object and its id: _iommufd_object_alloc()
    LOOKUP = "lookup", ENOENT  # iommufd_get_object()
    COPY_IN = "copy_in", EFAULT  # copy_from_user()
    COPY_OUT = "copy_out", EFAULT  # copy_to_user()
    MEMORY = "memory", ENOMEM  # any other allocation on the caller's behalf
    PIN = "pin", EFAULT  # pfn_reader_user_pin(), iopt_pages_rw_page()
    CHARGE = "charge", ENOMEM  # pfn_reader_user_update_pinned()
    RESERVE = "reserve", EINVAL  # iopt_table_enforce_dev_resv_regions()
    DOMAIN = "domain", ENOMEM  # domain_alloc_*()
    ATTACH = "attach", ENOMEM  # the handle of an attachment
    FD = "fd", EMFILE  # get_unused_fd_flags(), anon_inode_getfile()
    MMAP = "mmap", ENOMEM  # a mapping of device registers

    @property
    def error(self) -> type[IommufdError]:
        error: type[IommufdError] = self.value[1]
        return error


class FaultGate:
    """Every acquisition passes here; armed with n, the n-th pass fails (/proc/self/fail-nth).

    `watching` tells whether anybody looks: the busiest callers ask it first, for a call costs more than they do.
    """

    __slots__ = ("_nth", "_passed", "fired", "watching")

    def __init__(self) -> None:
        self._nth = 0
        self._passed: list[Gate] | None = None
        self.fired: Gate | None = None
        self.watching = False

    @property
    def nth(self) -> int:
        """Passes from now until one fails; 0: none will."""
        return self._nth

    @nth.setter
    def nth(self, nth: int) -> None:
        self._nth = nth
        self.watching = bool(nth) or self._passed is not None

    @property
    def passed(self) -> list[Gate] | None:
        """The gates met, when a list was set to note them in."""
        return self._passed

    @passed.setter
    def passed(self, passed: list[Gate] | None) -> None:
        self._passed = passed
        self.watching = bool(self._nth) or passed is not None

    def arm(self, nth: int) -> None:
        """Fail the nth pass from now, counted from 1; 0 disarms."""
        self.nth = nth
        self.fired = None

    def __call__(self, gate: Gate) -> None:
        if not self.watching:
            return
        if self._passed is not None:
            self._passed.append(gate)
        if self._nth:
            self.nth -= 1
            if not self._nth:
                self.fired = gate
                raise gate.error(f"fault injected at gate {gate.name}")


class UserMemory(Protocol):
    """Memory the caller's pointers name, for the time of one call."""

    def read(self, addr: int, length: int) -> bytes:
        """The readable prefix of [addr, addr + length)."""
        ...

    def write(self, addr: int, data: bytes) -> int:
        """Write the longest writable prefix; how many bytes were written."""
        ...


class File:
    """struct file: what a file descriptor refers to; `refs` counts descriptors and other holders."""

    refs = 1
    on_change: Callable[[], None] | None = None  # whoever shows poll() to a process listens here

    def get(self) -> File:
        self.refs += 1
        return self

    def put(self) -> None:
        self.refs -= 1
        if not self.refs:
            self.release()

    def release(self) -> None:
        """The last reference is gone."""

    def read(self, caller: Caller, addr: int, count: int) -> int:
        """read(2) at position 0: bytes copied to addr."""
        raise EINVAL("this file cannot be read")

    def write(self, caller: Caller, addr: int, count: int) -> int:
        """write(2) at position 0: bytes taken from addr."""
        raise EINVAL("this file cannot be written")

    def poll(self) -> int:
        """The poll(2) mask that is true now."""
        return 0

    def changed(self) -> None:
        """The answer of poll() may have changed."""
        if self.on_change is not None:
            self.on_change()


class IoctlFile(File):
    """A file with ioctls, which whoever listens on its machine is told of: a context, an open VFIO device, a VM."""

    events: Events

    def ioctl(self, caller: Caller, cmd: int, uptr: int) -> int:
        """One ioctl(2): the result, or minus an errno with caller.error telling why."""
        events = self.events
        entered = events.enter(self, caller, cmd, uptr) if events.listening else None
        caller.error = None
        try:
            rc = self._ioctl(caller, cmd, uptr)
        except IommufdError as error:
            caller.error = error
            rc = -error.errno
        if entered is not None:
            events.ioctl(self, caller, cmd, uptr, rc, entered)
        return rc

    def _ioctl(self, caller: Caller, cmd: int, uptr: int) -> int:
        """The result, never negative; IommufdError."""
        raise NotImplementedError


class Pinner(Protocol):
    """Something that has pinned pages: struct iopt_pages."""

    def pinned_runs(self) -> Iterable[PageRun]: ...


class PageFile(File):
    """A file made of pages: a memfd, the file behind a shared mapping, or the private pages of an mm.

    The object itself is the identity: (PageFile, page index) names a page.
    """

    pinnable = True  # memfd_pin_folios() takes shmem and hugetlbfs only
    compound = False  # hugetlb: the selftest cannot count references of such pages

    def __str__(self) -> str:
        return "memory"

    @functools.cached_property
    def pinners(self) -> dict[Pinner, int]:
        """Who has pinned pages of this file, in how many runs."""
        return {}

    @property
    def pins(self) -> UseCounts:
        """How often each page is pinned, by anyone: what the kernel has in the page's reference count."""
        counts = UseCounts()
        for pinner in self.pinners:
            for run in pinner.pinned_runs():
                if run.file is self:
                    counts.add(run.page, run.page + run.npages - 1)
        return counts

    def size(self) -> int:
        """Bytes now: it can shrink at any time unless sealed."""
        raise NotImplementedError

    def view(self, end: int) -> memoryview | None:
        """At least the first `end` bytes, where nobody can take pages away under it; it may be kept.

        Hardware reads tables and moves data through it; where there is none, through pread() and pwrite().
        """
        return None

    def pread(self, pos: int, length: int) -> bytes:
        """Bytes at pos; shorter at the end of the file."""
        raise NotImplementedError

    def pwrite(self, pos: int, data: bytes) -> int:
        """Store data at pos; shorter at the end of the file."""
        raise NotImplementedError


class PageRun(NamedTuple):
    """Consecutive pages of one file: the identity of `npages` pages from index `page`."""

    file: PageFile
    page: int
    npages: int


class MmuNotifier(Protocol):
    """struct mmu_notifier: who uses an address space without pinning it, and must let go in time."""

    def invalidate_range(self, start: int, end: int) -> None:
        """What [start, end) shows is about to change."""
        ...

    def mm_release(self) -> None:
        """The address space is about to go."""
        ...


class Mm:
    """struct mm_struct: an address space, alive as long as a process or channel has it."""

    alive = True
    notifiers: tuple[MmuNotifier, ...] = ()
    locked_vm = 0  # pages charged to RLIMIT_MEMLOCK of the process
    pinned_vm = 0  # pages pinned, whoever is charged

    def read(self, addr: int, length: int) -> bytes:
        """copy_from_user: the readable prefix."""
        raise NotImplementedError

    def write(self, addr: int, data: bytes) -> int:
        """copy_to_user: the length of the writable prefix, stored."""
        raise NotImplementedError

    def resolve(self, addr: int, npages: int, *, write: bool) -> list[PageRun]:
        """get_user_pages: the identity of npages pages from the page-aligned addr.

        Shorter at the first page that is not mapped, or without the right asked for.
        """
        raise NotImplementedError

    def faultin(self, addr: int, npages: int, *, write: bool) -> list[PageRun]:
        """As resolve(), for who pins nothing and lets go when a notifier says so (kvm_faultin_pfn).

        Where no notifier hears of changes, the pages are those that the addresses show whenever they are used.
        """
        return self.resolve(addr, npages, write=write)


class User:
    """struct user_struct: what all processes of one uid have locked."""

    __slots__ = ("locked_vm", "uid")

    def __init__(self, uid: int) -> None:
        self.uid = uid
        self.locked_vm = 0


@dataclass
class Task:
    """struct task_struct: credentials and limits of the calling process; they may change between calls."""

    user: User
    cap_ipc_lock: bool = False
    cap_sys_resource: bool = False
    cap_sys_rawio: bool = False
    memlock: int | Callable[[], int] = 8 << 20  # RLIMIT_MEMLOCK in bytes
    name: str = ""  # for people, in an ENOMEM reason
    pid: int = 0  # of the process, as the daemon sees it; 0 when it does not

    def memlock_pages(self) -> int:
        limit = self.memlock if isinstance(self.memlock, int) else self.memlock()
        return limit >> PAGE_SHIFT


class FileTable(Protocol):
    """struct files_struct of the caller."""

    def fget(self, fd: int) -> File | None:
        """The open file, without a reference of its own."""
        ...

    def get_unused_fd(self) -> int:
        """Reserve a number; EMFILE."""
        ...

    def put_unused_fd(self, fd: int) -> None: ...

    def fd_install(self, fd: int, file: File) -> None:
        """Publish: the table takes over one reference of the file."""
        ...


class Caller:
    """`current`: the task, address space and files on whose behalf a call runs.

    `memory` is what the pointers of this call name: the packet's segments for a native client, the whole address space
    under an interposer. All acquisitions of the core go through the methods here, and so through the fault gate.
    """

    __slots__ = ("error", "files", "gate", "memory", "mm", "task")

    def __init__(self, task: Task, mm: Mm, memory: UserMemory, files: FileTable, gate: FaultGate) -> None:
        self.task = task
        self.mm = mm
        self.memory = memory
        self.files = files
        self.gate = gate
        self.error: IommufdError | None = None  # of the last call, with its reason

    def copy_from_user(self, addr: int, length: int) -> bytes:
        """EFAULT unless all of it is readable."""
        if self.gate.watching:
            self.gate(Gate.COPY_IN)
        data = self.memory.read(addr, length)
        if len(data) != length:
            raise EFAULT(f"memory at {addr + len(data):#x} cannot be read")
        return data

    def copy_to_user(self, addr: int, data: bytes) -> None:
        """EFAULT unless all of it is writable; the writable prefix is stored all the same."""
        if self.gate.watching:
            self.gate(Gate.COPY_OUT)
        done = self.memory.write(addr, data)
        if done != len(data):
            raise EFAULT(f"memory at {addr + done:#x} cannot be written")

    def get_user_pages(self, addr: int, npages: int, *, write: bool = False) -> list[PageRun]:
        """The pages now behind an address of the caller, as many as there are in a row."""
        self.gate(Gate.PIN)
        return self.mm.resolve(addr & PAGE_MASK, npages, write=write)

    def fget(self, fd: int) -> File:
        """EBADF unless fd is open."""
        file = self.files.fget(fd)
        if file is None:
            raise EBADF(f"fd {fd} is not open")
        return file

    def get_unused_fd(self) -> int:
        self.gate(Gate.FD)
        return self.files.get_unused_fd()
