"""Room client: a folder that looks like /sys/kernel/debug of a kernel with fault injection, for `run --proc`.

It is a tmpfs that is mounted nowhere: only its descriptor names it, so nothing can be left behind. Making one needs
root, or a user namespace, which is then entered by a helper process that ends at once.
"""

from __future__ import annotations

import array
import ctypes
import os
import socket

SYS_FSOPEN, SYS_FSCONFIG, SYS_FSMOUNT = 430, 431, 432  # on every architecture
FSCONFIG_CMD_CREATE = 6
CLONE_NEWNS, CLONE_NEWUSER = 0x2_0000, 0x1000_0000
SWITCHES = {
    "failslab": ("ignore-gfp-wait", "verbose", "probability", "interval", "times", "task-filter"),
    "fail_page_alloc": ("ignore-gfp-wait", "ignore-gfp-highmem", "verbose", "min-order"),
}


def debug_folder() -> int:
    """A descriptor of the folder. OSError when no tmpfs can be had."""
    try:
        return _make()
    except PermissionError:
        return _make_in_namespace()


def _check(libc: ctypes.CDLL, result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def _make() -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    context = _check(libc, libc.syscall(SYS_FSOPEN, b"tmpfs", 1))
    try:
        _check(libc, libc.syscall(SYS_FSCONFIG, context, FSCONFIG_CMD_CREATE, None, None, 0))
        folder = _check(libc, libc.syscall(SYS_FSMOUNT, context, 1, 0))
    finally:
        os.close(context)
    before = os.umask(0)
    try:
        for name, switches in SWITCHES.items():
            os.mkdir(name, 0o777, dir_fd=folder)
            for switch in switches:
                os.close(os.open(f"{name}/{switch}", os.O_CREAT | os.O_WRONLY, 0o666, dir_fd=folder))
        opened = os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=folder)
    finally:
        os.umask(before)
        os.close(folder)
    return opened


def _make_in_namespace() -> int:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    child = os.fork()
    if not child:
        try:
            libc = ctypes.CDLL(None, use_errno=True)
            user, group = os.geteuid(), os.getegid()
            _check(libc, libc.unshare(CLONE_NEWUSER | CLONE_NEWNS))
            for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
                with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
                    file.write(text)
            rights = array.array("i", [_make()])
            theirs.sendmsg([b"d"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        finally:
            os._exit(0)
    theirs.close()
    with ours:
        _, ancillary, _, _ = ours.recvmsg(16, socket.CMSG_SPACE(4), socket.MSG_CMSG_CLOEXEC)
    os.waitpid(child, 0)
    for _, _, data in ancillary:
        return array.array("i", data)[0]
    raise PermissionError("fault injection needs root, or user namespaces")
