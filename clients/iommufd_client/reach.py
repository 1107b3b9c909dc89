"""Room client: what the keeper of `iommufdctl run` opens for the daemon where that may not (docs/PROTOCOL.md, 7).

The keeper is CMD's ancestor, to whom Yama's ptrace_scope 1 leaves what it takes from a sibling; and it has CMD's uid.
It hands over nothing but of the processes below it.
"""

from __future__ import annotations

import array
import ctypes
import errno
import os
import socket
import struct
from typing import TYPE_CHECKING, NamedTuple

from iommufd_uapi.seccomp import REACH_ANSWER, REACH_ASK, REACH_CWD, REACH_FDINFO, REACH_FILE, REACH_MM, REACH_NUMBER

if TYPE_CHECKING:
    from iommufd_uapi.seccomp import Syscalls

SYS_PIDFD_GETFD = 438  # on every architecture
KCMP_VM = 1
GENERATIONS = 1000  # of processes, below us
_libc = ctypes.CDLL(None, use_errno=True)


class Given(NamedTuple):
    """An answer: a number, and descriptors that are closed when they are sent."""

    value: int = 0
    fds: tuple[int, ...] = ()


def hand_over(connection: socket.socket, packet: bytes, numbers: Syscalls) -> None:
    """Answer a question of the daemon. OSError when it is gone."""
    given, error = Given(), 0
    try:
        what, pid, number = REACH_ASK.unpack_from(packet)
        others = [each for (each,) in struct.iter_unpack("<I", packet[REACH_ASK.size :])]
        given = _open(what, pid, number, others, numbers)
        if not _is_below(pid):  # asked after it was opened: so it was below us then
            _close(given)
            given, error = Given(), errno.EPERM
    except OSError as refusal:
        error = refusal.errno or errno.EACCES
    except struct.error:
        error = errno.EINVAL
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", given.fds))] if given.fds else []
    try:
        connection.sendmsg([REACH_ANSWER.pack(error, given.value)], rights)
    finally:
        _close(given)


def _close(given: Given) -> None:
    for fd in given.fds:
        os.close(fd)


def _open(what: int, pid: int, number: int, others: list[int], numbers: Syscalls) -> Given:
    """OSError"""
    folder = f"/proc/{pid}"
    if what == REACH_MM:
        return _mm(pid, others, numbers)
    if what == REACH_FDINFO:
        return Given(fds=(_opened(f"{folder}/fdinfo/{number}", os.O_RDONLY),))
    if what == REACH_FILE:
        return Given(fds=(_copy(pid, number),))
    if what == REACH_CWD:
        return Given(fds=(_opened(f"{folder}/cwd", os.O_PATH),))
    if what == REACH_NUMBER:
        taken = set(map(int, os.listdir(f"{folder}/fd")))
        return Given(next(fd for fd in range(number, number + len(taken) + 1) if fd not in taken))
    raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))


def _mm(pid: int, others: list[int], numbers: Syscalls) -> Given:
    """mem and maps; or the one of the others that has the same."""
    for other in others:
        if _libc.syscall(numbers.kcmp, pid, other, KCMP_VM, 0, 0) == 0:
            return Given(other)
    mem = _opened(f"/proc/{pid}/mem", os.O_RDWR)
    try:
        return Given(fds=(mem, _opened(f"/proc/{pid}/maps", os.O_RDONLY)))
    except OSError:
        os.close(mem)
        raise


def _opened(path: str, mode: int) -> int:
    return os.open(path, mode | os.O_CLOEXEC)


def _copy(pid: int, number: int) -> int:
    pidfd = os.pidfd_open(pid)
    try:
        fd = _libc.syscall(SYS_PIDFD_GETFD, pidfd, number, 0)
    finally:
        os.close(pidfd)
    if fd < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return int(fd)


def _is_below(pid: int) -> bool:
    """Whether it is a descendant of ours. OSError."""
    ours = os.getpid()
    for _ in range(GENERATIONS):
        with open(f"/proc/{pid}/status", "rb") as file:
            pid = int(file.read().split(b"\nPPid:")[1].split()[0])
        if pid == ours:
            return True
        if pid <= 1:
            return False
    return False
