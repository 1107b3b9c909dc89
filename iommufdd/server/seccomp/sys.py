"""System calls that Python has no function for, and the structures of <linux/fs.h> and inotify."""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
from collections.abc import Iterator

from iommufd_uapi.seccomp import native

SYS_PIDFD_GETFD = 438  # on every architecture
KCMP_VM = 1

IN_CLOSE = 0x18
IN_Q_OVERFLOW = 0x4000
INOTIFY_EVENT = struct.Struct("iIII")

PROCMAP_QUERY = 0xC068_6611
PROCMAP = struct.Struct("<QQQQQQQQQIIIIQQ")  # struct procmap_query
PROCMAP_ASK = struct.Struct("<QQQ")  # its input: size, flags, address

AT_FDCWD = -100
AT_STATX_DONT_SYNC = 0x4000
STATX_INO = 0x100
AT_EMPTY_PATH = 0x1000

_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long


def _check(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def pidfd_getfd(pidfd: int, fd: int) -> int:
    """A copy of another process's descriptor, close-on-exec."""
    return _check(_syscall(SYS_PIDFD_GETFD, pidfd, fd, 0))


def same_mm(one: int, other: int) -> bool:
    """Whether two tasks share their address space (kcmp); False if that cannot be found out."""
    numbers = native()
    return numbers is not None and _syscall(numbers.kcmp, one, other, KCMP_VM, 0, 0) == 0


def inode_of(path: str, dir_fd: int = AT_FDCWD) -> tuple[int, int]:
    """(st_dev, st_ino), as far as known: the file system is not asked, which may be one that we serve. OSError."""
    found = (ctypes.c_uint32 * 64)()  # struct statx
    _check(_libc.statx(dir_fd, path.encode(), AT_STATX_DONT_SYNC, STATX_INO, found))
    return os.makedev(found[34], found[35]), found[8] | found[9] << 32


def inodes_of(folder: str) -> Iterator[tuple[int, int]]:
    """Those of a /proc/PID/fd, as far as it may be looked at."""
    try:
        numbers = os.listdir(folder)
    except OSError:
        return
    for number in numbers:
        try:
            yield inode_of(f"{folder}/{number}")
        except OSError:
            continue


def device_of(path: str, dir_fd: int = AT_FDCWD) -> int:
    """st_dev alone, for which not even rights are needed. OSError."""
    found = (ctypes.c_uint32 * 64)()
    _check(_libc.statx(dir_fd, path.encode(), AT_STATX_DONT_SYNC, 0, found))
    return os.makedev(found[34], found[35])


def on_procfs(fd: int, mounter: int) -> bool:
    """Whether a file is on a /proc: ours, or one that a process sees mounted, each of which has a st_dev. OSError.

    fstat() and fstatfs() of a file that is on none could make us wait for whoever serves it.
    """
    found = (ctypes.c_uint32 * 64)()
    _check(_libc.statx(fd, b"", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, 0, found))
    if os.makedev(found[34], found[35]) == os.stat("/proc").st_dev:
        return True
    device = b"%d:%d" % (found[34], found[35])
    with open(f"/proc/{mounter}/mountinfo", "rb") as file:
        mounts = [line.partition(b" - ") for line in file]
    return any(place.split()[2] == device and kind.split()[0] == b"proc" for place, _, kind in mounts)


def inotify_init() -> int:
    """inotify_init1(2): a descriptor that does not wait. OSError."""
    return _check(_libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))


def inotify_add_watch(fd: int, path: str, mask: int) -> int:
    """inotify_add_watch(2): the watch. OSError."""
    return _check(_libc.inotify_add_watch(fd, path.encode(), mask))


def inotify_rm_watch(fd: int, wd: int) -> None:
    """inotify_rm_watch(2); nothing where the watch has gone by itself."""
    _libc.inotify_rm_watch(fd, wd)


def unopened(fd: int) -> bool:
    """Whether no description of a file is open, mapped or on its way but `fd`, opened read-only (a lease probe).

    A write lease is refused as long as the inode is open elsewhere; one made by memfd_create() does not count.
    """
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    except OSError:
        return False
    fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return True
