"""What the keeper opens for us, where we may not: it is the ancestor of the processes, we are a stranger to them.

Yama (ptrace_scope 1) keeps all but ancestors from /proc/PID/mem and pidfd_getfd(); they may still be looked at. Of
another user's process, or from a user namespace below, nothing may be opened. Descriptors name what they were opened
on, so those of the keeper serve as well as our own.

A question takes a while, and nobody waits in the reactor: the call in work is left as if it had not begun (Waiting),
no other of its listener is received, and it begins again when the answer is there. So what must be asked for is asked
before anything is done that cannot be done twice.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
import struct
from typing import TYPE_CHECKING, NamedTuple

from iommufd_uapi.seccomp import (
    REACH_ANSWER,
    REACH_ASK,
    REACH_CWD,
    REACH_FDINFO,
    REACH_FILE,
    REACH_MM,
    REACH_NUMBER,
    REACH_PIDS,
)
from iommufdd.errors import ProtocolError

from .sys import on_procfs

if TYPE_CHECKING:
    from .notify import Supervisor

FDINFO = re.compile(rb"^mnt_id:\s*(\d+)\nino:\s*(\d+)$", re.MULTILINE)
KNOWN = {errno.ENOENT, errno.ESRCH, errno.EBADF, errno.EPERM, errno.EACCES}  # all that a keeper may say
WANTED = {REACH_MM: 2, REACH_FDINFO: 1, REACH_FILE: 1, REACH_NUMBER: 0, REACH_CWD: 1}  # descriptors


class Ask(NamedTuple):
    """struct iofd_reach, and the pids that follow it."""

    what: int
    pid: int
    number: int = 0
    others: tuple[int, ...] = ()

    def pack(self) -> bytes:
        return REACH_ASK.pack(*self[:3]) + struct.pack(f"<{len(self.others)}I", *self.others)


class Answer(NamedTuple):
    """struct iofd_reach_reply, and the descriptors that came with it: ours until the call is answered."""

    error: int
    value: int
    fds: tuple[int, ...]


class Waiting(Exception):
    """The call must begin again when the keeper has answered this."""

    def __init__(self, ask: Ask) -> None:
        super().__init__(ask)
        self.ask = ask


class Reach:
    """The questions and answers for the notification in work of one supervisor."""

    def __init__(self, supervisor: Supervisor) -> None:
        self.supervisor = supervisor
        self.willing = False  # whether the keeper answers
        self.waiting: Ask | None = None
        self._answers: dict[Ask, Answer] = {}
        self._devices: dict[int, int] = {}

    def mm(self, pid: int, others: tuple[int, ...]) -> Answer:
        """/proc/PID/mem and maps; or value is the one of `others` that shares its mm. OSError, Waiting."""
        return self._ask(Ask(REACH_MM, pid, 0, others[:REACH_PIDS]))

    def fdinfo(self, tid: int, fd: int) -> int:
        """/proc/TID/fdinfo/N, which tells what that number shows whenever it is read. OSError, Waiting."""
        return os.dup(self._ask(Ask(REACH_FDINFO, tid, fd)).fds[0])

    def file(self, pid: int, fd: int) -> int:
        """A copy of a process's descriptor. OSError, Waiting."""
        return os.dup(self._ask(Ask(REACH_FILE, pid, fd)).fds[0])

    def cwd(self, tid: int) -> int:
        """/proc/TID/cwd, by O_PATH. OSError, Waiting."""
        return os.dup(self._ask(Ask(REACH_CWD, tid)).fds[0])

    def free_number(self, tid: int, least: int) -> int:
        """The lowest number from `least` on that is not open. OSError, Waiting."""
        return self._ask(Ask(REACH_NUMBER, tid, least)).value

    def _ask(self, ask: Ask) -> Answer:
        answer = self._answers.get(ask)
        if answer is None:
            if not self.willing:
                raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
            raise Waiting(ask)
        if answer.error:
            raise OSError(answer.error, os.strerror(answer.error))
        return answer

    # ---- the keeper ----

    def take(self, packet: bytes, fds: list[int]) -> None:
        """The answer. ProtocolError; EACCES takes the place of what is not what was asked for."""
        ask, self.waiting = self.waiting, None
        if ask is None or len(packet) != REACH_ANSWER.size:
            raise ProtocolError("a keeper has nothing more to say")
        error, value = REACH_ANSWER.unpack(packet)
        if error:
            self._answers[ask] = Answer(error if error in KNOWN else errno.EACCES, 0, ())
        elif self._is_right(ask, value, fds):
            self._answers[ask] = Answer(0, value, tuple(fds))
            fds.clear()
        else:
            self._answers[ask] = Answer(errno.EACCES, 0, ())

    def give_up(self) -> None:
        """The keeper is gone: what was asked for cannot be had."""
        self.willing = False
        if self.waiting is not None:
            self._answers[self.waiting] = Answer(errno.EPERM, 0, ())
            self.waiting = None

    def _is_right(self, ask: Ask, value: int, fds: list[int]) -> bool:
        """Whether the descriptors are what was asked for, of a caller that has waited all the time."""
        if ask.what == REACH_MM and not fds:
            return value in ask.others
        if len(fds) != WANTED[ask.what] or not self.supervisor.valid():
            return False
        if ask.what == REACH_MM:
            parts = [("mem", os.O_RDWR), ("maps", os.O_RDONLY)]
        elif ask.what == REACH_FDINFO:
            parts = [(f"fdinfo/{ask.number}", os.O_RDONLY)]
        else:
            return True  # a descriptor of theirs, as any client may send; or a number
        keeper = self.supervisor.keeper
        return all(
            _is_of_proc(fd, f"/proc/{ask.pid}/{name}", access, keeper)
            for fd, (name, access) in zip(fds, parts, strict=True)
        )

    def clear(self) -> None:
        """The notification is answered."""
        for answer in self._answers.values():
            for fd in answer.fds:
                os.close(fd)
        self._answers.clear()

    # ---- inodes ----

    def inode(self, info: int) -> tuple[int, int] | None:
        """(st_dev, st_ino) by a descriptor of fdinfo; st_dev is -1 where nothing of ours can be. None: not open."""
        try:
            found = FDINFO.search(os.pread(info, 512, 0))
        except OSError:
            return None
        if found is None:
            return None
        return self._device(int(found[1])), int(found[2])

    def _device(self, mount: int) -> int:
        """st_dev of a mount, known of the two that our files are on: those of memfds and of pipes."""
        if not self._devices:
            ours = [os.memfd_create("iommufd", os.MFD_CLOEXEC), *os.pipe()]
            self._devices = dict(map(_mount_and_device, ours))
            for fd in ours:
                os.close(fd)
        return self._devices.get(mount, -1)


def _mount_and_device(fd: int) -> tuple[int, int]:
    with open(f"/proc/self/fdinfo/{fd}", "rb") as file:
        found = FDINFO.search(file.read())
    return int(found[1]) if found is not None else -1, os.fstat(fd).st_dev


def _is_of_proc(fd: int, path: str, access: int, keeper: int) -> bool:
    """Whether a descriptor is that file of a /proc. Another could make us wait, or die."""
    try:
        return (
            on_procfs(fd, keeper)
            and os.readlink(f"/proc/self/fd/{fd}") == path
            and stat.S_ISREG(os.fstat(fd).st_mode)
            and fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == access
        )
    except OSError:
        return False
