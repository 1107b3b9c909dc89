"""Traced processes and threads: what is kept of them, and their credentials and limits (struct task_struct)."""

from __future__ import annotations

import errno
import os
import re
import resource
import select
import signal
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from iommufdd.server.credentials import CAPABILITIES, DEFAULT_MEMLOCK, UNLIMITED
from iommufdd.user import PAGE_SHIFT, Caller, FaultGate, Task

from .descriptors import TargetDescriptors
from .procmm import ProcMm, StaleError, open_mm
from .strangers import StrangersDescriptors
from .sys import same_mm

if TYPE_CHECKING:
    from iommufdd.machine import Machine
    from iommufdd.server.credentials import Virtual
    from iommufdd.server.reactor import Reactor
    from iommufdd.server.serve import Server
    from iommufdd.user import User

    from .notify import Supervisor
    from .proc import FailNth
    from .procfile import TargetFiles
    from .procmm import Clock
    from .reach import Answer

MEMLOCK = b"Max locked memory"
DESCRIPTORS = 4  # that a process costs: pidfd, status, mem, maps
_STATUS = re.compile(
    rb"^(Tgid|PPid|Uid|NSpid|CapEff|CapPrm|CapInh):\s*(\S+)(?:.*\s(\S+))?$", re.MULTILINE
)  # first and last word


class Origin(NamedTuple):
    """What the keeper had when it started: virtual credentials hold until a process changes its own."""

    uid: int
    caps: int
    memlock: int

    @classmethod
    def of(cls, pid: int) -> Origin:
        """OSError"""
        with open(f"/proc/{pid}/status", "rb") as file:
            found = _status_words(file.read())
        memlock = _limit(pid, resource.RLIMIT_MEMLOCK, MEMLOCK, DEFAULT_MEMLOCK)
        return cls(int(found.get(b"Uid", b"-1")), int(found.get(b"CapEff", b"0"), 16), memlock)


T = TypeVar("T", bound="TaskFolder")


class Targets(Generic[T]):
    """Whoever answers the calls of processes, and keeps them: a seccomp listener, or a mount."""

    server: Server
    reactor: Reactor
    machine: Machine
    uid: int  # whose share of descriptors they cost
    origin: Origin
    virtual: Virtual
    clock: Clock
    files: TargetFiles

    def __init__(self) -> None:
        self.processes: dict[int, Process] = {}
        self.threads: dict[int, T] = {}

    def mm_of_keeper(self, tgid: int, others: tuple[int, ...]) -> Answer:
        """mem and maps of a process that we may not look into, as Reach.mm(). OSError, Waiting."""
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    def _forget_thread(self, tid: int) -> None:
        thread = self.threads.pop(tid, None)
        if thread is not None:
            thread.close()

    def forget_process(self, process: Process) -> None:
        """It has ended."""
        for tid in [tid for tid, thread in self.threads.items() if thread.process is process]:
            self._forget_thread(tid)
        if self.processes.get(process.tgid) is process:
            del self.processes[process.tgid]
        process.close()


class ProcTask(Task):
    """The credentials a process has now, or those it is said to have.

    What a process gives up or changes itself counts under virtual credentials too: setuid() ends them, setrlimit()
    sets the limit, a capability that is dropped is gone.
    """

    def __init__(self, process: Process, machine: Machine, virtual: Virtual, clock: Clock) -> None:
        self.name, self.pid = f"pid {process.tgid}", process.tgid
        self._process = process
        self._machine = machine
        self._virtual = virtual
        self._clock = clock
        self._read_at = -1
        self._origin = process.supervisor.origin
        self._uid, self._real_uid, self._caps = -1, -1, 0

    @property
    def user(self) -> User:  # type: ignore[override]
        """current_user(): that of the real uid."""
        self._refresh()
        return self._machine.user(self._uid)

    @property
    def cap_ipc_lock(self) -> bool:  # type: ignore[override]
        return self._capable("CAP_IPC_LOCK")

    @property
    def cap_sys_resource(self) -> bool:  # type: ignore[override]
        return self._capable("CAP_SYS_RESOURCE")

    @property
    def cap_sys_rawio(self) -> bool:  # type: ignore[override]
        return self._capable("CAP_SYS_RAWIO")

    def memlock_pages(self) -> int:
        limit = self._process.memlock()
        if self._virtual.memlock is not None and limit == self._origin.memlock:
            limit = self._virtual.memlock
        return (UNLIMITED if limit == resource.RLIM_INFINITY else limit) >> PAGE_SHIFT

    def _capable(self, name: str) -> bool:
        self._refresh()
        bit = CAPABILITIES[name]
        has = bool(self._caps >> bit & 1)
        if self._virtual.caps is None:
            return has
        kept = (
            has
            if self._origin.caps >> bit & 1
            else (self._real_uid == self._origin.uid and not self._process.dropped >> bit & 1)
        )
        return name in self._virtual.caps and kept

    def _refresh(self) -> None:
        if self._read_at == self._clock.now:
            return
        self._read_at = self._clock.now
        found = self._process.status()
        uid = self._real_uid = int(found.get(b"Uid", b"-1"))
        self._uid = uid if self._virtual.uid is None or uid != self._origin.uid else self._virtual.uid
        self._caps = int(found.get(b"CapEff", b"0"), 16) if self._process.same_user_ns else 0


class Process:
    """A thread group. Its pidfd is in the reactor and tells when it has ended."""

    dropped: int = 0  # virtual capabilities that it gave up, or its parent did before it
    mm_type: type[ProcMm] = ProcMm
    stranger = False  # we may not even look at it: all must come through the keeper

    def __init__(self, supervisor: Targets[Any], tgid: int) -> None:
        """OSError when it is gone or may not be looked into; EMFILE; Waiting."""
        self.supervisor = supervisor
        self.tgid = tgid
        self._nofile = supervisor.server.nofile
        self._nofile.charge(supervisor.uid, DESCRIPTORS)
        try:
            self._open(supervisor, tgid)
        except BaseException:
            self._nofile.uncharge(supervisor.uid, DESCRIPTORS)
            raise
        self.gate = FaultGate()
        self.fail_nth: FailNth | None = None
        self.task = ProcTask(self, supervisor.machine, supervisor.virtual, supervisor.clock)
        supervisor.reactor.register(self.pidfd, self, select.EPOLLIN)

    def _open(self, supervisor: Targets[Any], tgid: int) -> None:
        opened = [os.pidfd_open(tgid)]
        try:
            opened.append(os.open(f"/proc/{tgid}/status", os.O_RDONLY | os.O_CLOEXEC))
            self.pidfd, self._status = opened
            self.same_user_ns = _uid_map(str(tgid)) == _uid_map("self")
            parent = supervisor.processes.get(int(self.status().get(b"PPid", b"0")))
            if parent is not None:
                self.dropped = parent.dropped
            self.shares_mm = False
            self.mm = self._find_mm()
        except BaseException:
            for fd in opened:
                os.close(fd)
            raise

    def _find_mm(self) -> ProcMm:
        """The mm of a process that shares one (vfork), or its own."""
        others = {other.tgid: other.mm for other in self.supervisor.processes.values() if other is not self}
        alive = {tgid: mm for tgid, mm in others.items() if mm.mem >= 0}
        shared = next((mm for tgid, mm in alive.items() if same_mm(self.tgid, tgid)), None)
        opened: tuple[int, int] | None = None
        if shared is None:
            try:
                opened = open_mm(self.tgid)
            except PermissionError:
                shared, opened = self._mm_of_keeper(alive)
        self.shares_mm = shared is not None
        if shared is not None:
            mm = shared
        else:
            assert opened is not None
            mm = self.mm_type(self.tgid, self.supervisor.files, self.supervisor.clock, opened)
            self.supervisor.files.mms.add(mm)
        mm.users.add(self)
        return mm

    def _mm_of_keeper(self, others: dict[int, ProcMm]) -> tuple[ProcMm | None, tuple[int, int] | None]:
        """The mm of another that this one shares, or its mem and maps. OSError, Waiting."""
        self.stranger = not _may_look_at(self.tgid)
        answer = self.supervisor.mm_of_keeper(self.tgid, tuple(others) if self.stranger else ())
        if not answer.fds:
            return others[answer.value], None
        mem, maps = answer.fds
        return None, (os.dup(mem), os.dup(maps))

    def renew(self) -> None:
        """It may have called exec. OSError, Waiting."""
        before = self.mm
        if before.alive and not self.shares_mm:
            return
        self.mm = self._find_mm()
        if self.mm is not before:
            before.leave(self)

    @property
    def ended(self) -> bool:
        try:
            signal.pidfd_send_signal(self.pidfd, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass
        return False

    def ready(self, mask: int) -> None:
        """The pidfd: the process has ended."""
        self.supervisor.forget_process(self)

    def close(self) -> None:
        self.supervisor.reactor.unregister(self.pidfd)
        os.close(self.pidfd)
        os.close(self._status)
        self._nofile.uncharge(self.supervisor.uid, DESCRIPTORS)
        if self.fail_nth is not None:
            self.fail_nth.close()
        self.mm.leave(self)

    def uid(self) -> int:
        """The real uid; -1 when it has ended."""
        return int(self.status().get(b"Uid", b"-1"))

    def pid_inside(self) -> int:
        """Its number in its own pid namespace."""
        return int(self.status().get(b"NSpid, last", b"0"))

    def status(self) -> dict[bytes, bytes]:
        """The first words of some lines of /proc/PID/status; nothing when it has ended."""
        try:
            return _status_words(os.pread(self._status, 4096, 0))
        except OSError:
            return {}

    def memlock(self) -> int:
        """RLIMIT_MEMLOCK in bytes, or RLIM_INFINITY."""
        if self.ended:
            return DEFAULT_MEMLOCK
        return _limit(self.tgid, resource.RLIMIT_MEMLOCK, MEMLOCK, DEFAULT_MEMLOCK)

    def nofile(self) -> int:
        """RLIMIT_NOFILE."""
        soft = _limit(self.tgid, resource.RLIMIT_NOFILE, b"Max open files", 1024)
        return 1 << 20 if soft == resource.RLIM_INFINITY else soft


class TaskFolder:
    """The /proc/TID/fd of a task that has called."""

    def __init__(self, process: Process, tid: int) -> None:
        """OSError when it is gone; EMFILE."""
        self.process = process
        self.tid = tid
        self._nofile, self._uid = process.supervisor.server.nofile, process.supervisor.uid
        self.folder = -1
        if process.stranger:
            return
        self._nofile.charge(self._uid)
        try:
            self.folder = os.open(f"/proc/{tid}/fd", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            self._nofile.uncharge(self._uid)
            raise

    def close(self) -> None:
        if self.folder >= 0:
            os.close(self.folder)
            self._nofile.uncharge(self._uid)


class Thread(TaskFolder):
    """A task that has made a trapped call: its descriptor table, and who calls."""

    def __init__(self, supervisor: Supervisor, process: Process, tid: int) -> None:
        """OSError when it is gone; EMFILE."""
        super().__init__(process, tid)
        kind = StrangersDescriptors if process.stranger else TargetDescriptors
        self.files: TargetDescriptors = kind(supervisor, self)
        self.caller = Caller(process.task, process.mm, CallerMemory(process), self.files, process.gate)

    def close(self) -> None:
        self.files.close()
        super().close()


class CallerMemory:
    """What the pointers of a call name: the process's memory. A `user.UserMemory`."""

    __slots__ = ("_process",)

    def __init__(self, process: Process) -> None:
        self._process = process

    def read(self, addr: int, length: int) -> bytes:
        return self._process.mm.load(addr, length)

    def write(self, addr: int, data: bytes) -> int:
        return self._process.mm.store(addr, data)


def _may_look_at(tgid: int) -> bool:
    """PTRACE_MODE_READ, which Yama does not forbid."""
    try:
        os.close(os.open(f"/proc/{tgid}/maps", os.O_RDONLY | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def tgid_of(tid: int) -> int:
    """The thread group of a thread. OSError."""
    with open(f"/proc/{tid}/status", "rb") as file:
        found = _status_words(file.read(1024))
    if b"Tgid" not in found:
        raise StaleError("no Tgid")
    return int(found[b"Tgid"])


def _uid_map(pid: str) -> str:
    with open(f"/proc/{pid}/uid_map", encoding="ascii") as file:
        return file.read()


def _limit(tgid: int, which: int, name: bytes, unknown: int) -> int:
    """A soft limit. prlimit() wants CAP_SYS_RESOURCE over another user's process, the text wants nothing."""
    try:
        return resource.prlimit(tgid, which)[0]
    except PermissionError:
        return _limit_in_text(tgid, name, unknown)
    except OSError:
        return unknown


def _limit_in_text(tgid: int, name: bytes, unknown: int) -> int:
    try:
        with open(f"/proc/{tgid}/limits", "rb") as file:
            found = re.search(rb"^" + name + rb"\s+(\d+|unlimited)", file.read(), re.MULTILINE)
    except OSError:
        return unknown
    if found is None:
        return unknown
    return resource.RLIM_INFINITY if found[1] == b"unlimited" else int(found[1])


def _status_words(text: bytes) -> dict[bytes, bytes]:
    """By name the first word of a line, by "name, last" the last one."""
    found: dict[bytes, bytes] = {}
    for name, first, last in _STATUS.findall(text):
        found[name], found[name + b", last"] = first, last or first
    return found
