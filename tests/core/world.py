"""What calls come from and go to: memfds, descriptor tables, processes, and the machine they all share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from iommufdd.errors import EMFILE
from iommufdd.mm import Region, RegisteredMm
from iommufdd.user import PAGE_SIZE, Caller, FaultGate, File, PageFile, Task
from iommufdd.wiring import new_machine

if TYPE_CHECKING:
    from iommufdd.context import Context
    from iommufdd.mmap import Vma
    from iommufdd.objects import Holder

ARGUMENT = 0x7F000000  # where a process keeps the struct of a call, and what its pointers name
DATA = ARGUMENT + PAGE_SIZE


class Memfd(PageFile):
    """A memfd that is all in a bytearray."""

    def __init__(self, npages: int = 16, *, name: str = "", compound: bool = False) -> None:
        self.name = name
        self.compound = compound
        self.data = bytearray(npages * PAGE_SIZE)

    def size(self) -> int:
        return len(self.data)

    def view(self, end: int) -> memoryview | None:
        return memoryview(self.data) if end <= len(self.data) else None

    def pread(self, pos: int, length: int) -> bytes:
        return bytes(self.data[pos : pos + length])

    def pwrite(self, pos: int, data: bytes) -> int:
        data = data[: max(len(self.data) - pos, 0)]
        self.data[pos : pos + len(data)] = data
        return len(data)

    def truncate(self, size: int) -> None:
        self.data = self.data[:size].ljust(size, b"\0")


class FdTable:
    """struct files_struct: the lowest free number, from 3; `room` numbers in all."""

    def __init__(self, room: int = 1024) -> None:
        self.files: dict[int, File | None] = {}  # None: reserved, not yet open
        self.room = room

    def fget(self, fd: int) -> File | None:
        return self.files.get(fd)

    def get_unused_fd(self) -> int:
        for fd in range(3, 3 + self.room):
            if fd not in self.files:
                self.files[fd] = None
                return fd
        raise EMFILE("no number is left")

    def put_unused_fd(self, fd: int) -> None:
        assert self.files.pop(fd) is None

    def fd_install(self, fd: int, file: File) -> None:
        assert self.files[fd] is None
        self.files[fd] = file

    def close(self, fd: int) -> None:
        file = self.files.pop(fd)
        assert file is not None
        file.put()


class World:
    """A machine, and everything that tests made on it."""

    def __init__(self) -> None:
        self.machine = new_machine("test")
        self.contexts: list[Context] = []
        self.memfds: list[Memfd] = []  # the world holds one reference of each
        self.processes: list[Process] = []
        self.vmas: list[Vma] = []  # live mappings of registers
        self.drivers: list[Holder] = []  # of devices that tests bound by hand
        self.lost_count = False  # CHANGE_PROCESS moved pages whose charge it could not move

    def memfd(self, npages: int = 16, *, compound: bool = False) -> Memfd:
        file = Memfd(npages, name=f"memfd{len(self.memfds)}", compound=compound)
        self.memfds.append(file)
        return file

    def process(self, *, uid: int = 0, privileged: bool = True, memlock: int = 8 << 20) -> Process:
        task = Task(self.machine.user(uid), cap_ipc_lock=privileged, cap_sys_resource=privileged, memlock=memlock)
        return Process(self, task)


class Process:
    """A task with an address space and descriptors."""

    def __init__(self, world: World, task: Task) -> None:
        self.world = world
        self.mm = RegisteredMm()
        self.fds = FdTable()
        self.caller = Caller(task, self.mm, self.mm, self.fds, FaultGate())
        self._next = 0x10000000
        stack = Memfd(16)
        self.mm.map(Region(ARGUMENT, ARGUMENT + stack.size(), stack, 0, readable=True, writable=True))
        stack.put()
        world.processes.append(self)

    def fork(self) -> Process:
        """A child with its own address space of shared mappings, and the same open files."""
        task = self.caller.task
        child = Process(
            self.world, Task(task.user, task.cap_ipc_lock, task.cap_sys_resource, task.cap_sys_rawio, task.memlock)
        )
        for region in list(self.mm.regions()):
            if region.start != ARGUMENT:
                child.mm.map(region)
        child.fds.files = {fd: file.get() for fd, file in self.fds.files.items() if file is not None}
        child._next = self._next
        return child

    def exit(self) -> None:
        self.mm.exit()
        for fd in list(self.fds.files):
            self.fds.close(fd)

    def map(self, file: PageFile, npages: int = 0, *, page: int = 0, writable: bool = True) -> int:
        """The address of a new shared mapping, with a gap behind it."""
        start = self._next
        end = start + (npages * PAGE_SIZE or file.size() - page * PAGE_SIZE)
        self._next = end + PAGE_SIZE
        self.mm.map(Region(start, end, file, page * PAGE_SIZE, readable=True, writable=writable))
        return start

    def buffer(self, npages: int = 16) -> int:
        """The address of fresh memory."""
        return self.map(self.world.memfd(npages))

    def install(self, file: File) -> int:
        """A descriptor of its own for a file."""
        fd = self.fds.get_unused_fd()
        self.fds.fd_install(fd, file.get())
        return fd

    def put(self, data: bytes, at: int = DATA) -> int:
        """Data for a pointer of the next call to name."""
        assert self.mm.write(at, data) == len(data)
        return at
