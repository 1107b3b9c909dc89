"""Room client: what `iommufdctl doctor` tries. Each trial runs in a forked child, and leaves nothing behind."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import struct
import warnings
from typing import TYPE_CHECKING

from iommufd_uapi import seccomp

from . import namespace

if TYPE_CHECKING:
    from collections.abc import Callable

PR_SET_NO_NEW_PRIVS = 38
RET = 0x06  # BPF_RET | BPF_K
OTHER = 255  # exit status of a child that failed without an errno
DEV_FUSE, PLACE = "/dev/fuse", "/dev/iommu"


def outcome(work: Callable[[], None]) -> int:
    """Do it in a child that ends at once: 0, or the errno with which it failed (ENOSYS if a sandbox killed it)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fork() beside threads, which the child does not need
        child = os.fork()
    if child:
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return status if status >= 0 else errno.ENOSYS
    status = OTHER
    try:
        work()
        status = 0
    except OSError as error:
        status = error.errno or OTHER
    finally:
        os._exit(status)
    raise AssertionError


def said(number: int) -> str:
    """An outcome in words."""
    return "the trial failed" if number == OTHER else os.strerror(number)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _check(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


# ---- seccomp ----


def knows(numbers: seccomp.Syscalls, flags: int) -> int:
    """The errno of seccomp() with these flags and no filter: the flags are looked at first, so EFAULT means known."""
    _libc().syscall(
        ctypes.c_long(numbers.seccomp),
        ctypes.c_long(seccomp.SECCOMP_SET_MODE_FILTER),
        ctypes.c_long(flags),
        ctypes.c_void_p(None),
    )
    return ctypes.get_errno()


def listen(numbers: seccomp.Syscalls) -> int:
    """Install a filter that allows everything; its listener. OSError: EBUSY when one is around us. Child only."""
    libc = _libc()
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    code = ctypes.create_string_buffer(struct.pack("<HBBI", RET, 0, 0, seccomp.SECCOMP_RET_ALLOW), 8)
    fprog = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", 1, ctypes.addressof(code)), 16)
    flags = seccomp.SECCOMP_FILTER_FLAG_NEW_LISTENER | seccomp.SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV
    return _check(libc.syscall(numbers.seccomp, seccomp.SECCOMP_SET_MODE_FILTER, flags, fprog))


def wake_up(numbers: seccomp.Syscalls) -> None:
    """Ask a listener for SYNC_WAKE_UP. OSError before Linux 6.6. Child only."""
    listener = listen(numbers)
    fcntl.ioctl(listener, seccomp.SECCOMP_IOCTL_NOTIF_SET_FLAGS, seccomp.SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP)


# ---- memory of others ----


def reach() -> int:
    """The outcome of opening a process's memory from its sibling: what the daemon of `run` is to CMD."""
    return _of_a_process(lambda target: outcome(lambda: _open_memory(target)))


def reach_below() -> int:
    """The same from its parent: what the keeper of `run` is to CMD, who opens it for the daemon."""

    def trial(target: int) -> int:
        try:
            _open_memory(target)
        except OSError as error:
            return error.errno or OTHER
        return 0

    return _of_a_process(trial)


def _open_memory(pid: int) -> None:
    os.close(os.open(f"/proc/{pid}/mem", os.O_RDWR | os.O_CLOEXEC))


def _of_a_process(trial: Callable[[int], int]) -> int:
    """Try something with a child of ours."""
    waits, lives = os.pipe()

    def wait() -> None:
        os.close(lives)
        os.read(waits, 1)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        target = os.fork()
    if not target:
        try:
            wait()
        finally:
            os._exit(0)
    os.close(waits)
    try:
        return trial(target)
    finally:
        os.close(lives)
        os.waitpid(target, 0)


def map_files() -> int:
    """The outcome of opening a file through /proc/PID/map_files: EPERM without CAP_CHECKPOINT_RESTORE."""
    area = mmap.mmap(-1, mmap.PAGESIZE)  # shared
    start = ctypes.addressof(ctypes.c_char.from_buffer(area))
    try:
        path = f"/proc/self/map_files/{start:x}-{start + mmap.PAGESIZE:x}"
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return error.errno or OTHER
    return 0


# ---- namespaces and mounts ----


def user_namespace() -> None:
    """Become root of a new user namespace, and change its mounts. OSError. Child only."""
    user, group = os.geteuid(), os.getegid()
    _check(_libc().unshare(namespace.CLONE_NEWUSER | namespace.CLONE_NEWNS))
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
        with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
            file.write(text)
    namespace.mount("none", "/", "none", namespace.MS_REC | namespace.MS_PRIVATE)


def reach_in_user_namespace() -> None:
    """As reach(), where both are root of a user namespace, which Yama lets pass. OSError. Child only."""
    user_namespace()
    number = reach()
    if number:
        raise OSError(number, said(number))


def mount_for_all() -> None:
    """Mount a FUSE file with our own rights, though nobody sees it. OSError. Child only."""
    _check(_libc().unshare(namespace.CLONE_NEWNS))
    namespace.mount("none", "/", "none", namespace.MS_REC | namespace.MS_PRIVATE)
    _mount()


def mount_for_one() -> None:
    """As `iommufdctl mount PATH -- CMD` mounts. OSError. Child only."""
    namespace.enter()
    _mount()


def _mount() -> None:
    namespace.make_place(PLACE)
    fuse = os.open(DEV_FUSE, os.O_RDWR | os.O_CLOEXEC)
    flags = namespace.MS_NOSUID | namespace.MS_NODEV | namespace.MS_NOEXEC
    options = f"fd={fuse},rootmode=100666,user_id=0,group_id=0,allow_other"
    namespace.mount("iommufd", PLACE, "fuse.iommufd", flags, options)
