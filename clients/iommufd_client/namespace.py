"""Room client: a private mount namespace in which a path is free to be mounted on (unshare(2), mount(2))."""

from __future__ import annotations

import ctypes
import os
import stat

CLONE_NEWNS, CLONE_NEWUSER = 0x0002_0000, 0x1000_0000
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 8, 4096, 16384, 1 << 18
MNT_DETACH = 2

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p]


def _check(result: int, path: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path)


def mount(source: str, target: str, kind: str, flags: int = 0, options: str = "") -> None:
    """mount(2). OSError."""
    words = (os.fsencode(source), os.fsencode(target), kind.encode(), flags, options.encode())
    _check(_libc.mount(*words), target)


def unmount(path: str) -> None:
    """umount(2), at once even where it is in use. No error when it is not mounted any more."""
    _libc.umount2(os.fsencode(path), MNT_DETACH)


def enter() -> None:
    """A mount namespace of our own; without the right to it, also a user namespace in which we are root. OSError."""
    uid, gid = os.geteuid(), os.getegid()
    if _libc.unshare(CLONE_NEWNS) < 0:
        _check(_libc.unshare(CLONE_NEWUSER | CLONE_NEWNS), "a new user namespace")
        _write("/proc/self/setgroups", "deny")
        _write("/proc/self/uid_map", f"0 {uid} 1")
        _write("/proc/self/gid_map", f"0 {gid} 1")
    mount("none", "/", "none", MS_REC | MS_PRIVATE)


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.write(text)


def make_place(path: str) -> None:
    """A file to mount on. Where there is none, the folder is replaced by a copy that has one. OSError."""
    if not os.path.exists(path):
        folder = os.path.dirname(path)
        while not os.path.isdir(folder):
            folder = os.path.dirname(folder)
        _mirror(folder)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o666))


def _mirror(folder: str) -> None:
    """A tmpfs over a folder, with all that is in the folder bound into it."""
    old = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    names = os.listdir(folder)
    # Not 1777: in a sticky folder, fs.protected_regular refuses `> /dev/null`.
    mount("iommufd", folder, "tmpfs", MS_NOSUID, "mode=755")
    try:
        for name in names:
            _bind(f"/proc/self/fd/{old}/{name}", os.path.join(folder, name))
    finally:
        os.close(old)


def _bind(source: str, target: str) -> None:
    mode = os.lstat(source).st_mode
    if stat.S_ISLNK(mode):
        os.symlink(os.readlink(source), target)
        return
    if stat.S_ISDIR(mode):
        os.mkdir(target)
    else:
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600))
    try:
        mount(source, target, "none", MS_BIND | MS_REC)
    except OSError:
        pass  # what cannot be bound stays empty
