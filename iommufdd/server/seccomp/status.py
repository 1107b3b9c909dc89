"""fstat and its kin on descriptors of ours: character devices, as a kernel shows them, and not the memfds they are.

QEMU takes a VFIO device only if fstat() says S_IFCHR and the numbers that sysfs has. Times, owner and inode stay those
of the memfd, so that two descriptors of one open file can still be told to be the same.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from typing import TYPE_CHECKING

from iommufdd.server.devices import OpenDevice
from iommufdd.server.vms import OpenKvm, OpenVm

if TYPE_CHECKING:
    from collections.abc import Callable

    from iommufd_uapi.seccomp import Syscalls
    from iommufdd.server.vms import AnyOpened

    from .fds import Installed
    from .target import Thread

    Fill = Callable[[Thread, Installed, list[int]], int]

AT_EMPTY_PATH = 0x1000
STATX_BASIC_STATS = 0x7FF
MODE = stat.S_IFCHR | 0o660
MISC_MAJOR = 10  # include/linux/major.h
IOMMU_MINOR = 124  # a dynamic one
VFIO_MINOR = 196  # include/linux/miscdevice.h: /dev/vfio/vfio
KVM_MINOR = 232
VFIO_MAJOR = 511  # a dynamic one, the first that alloc_chrdev_region() gives from there down
NOT_OURS = 1 << 60

STAT_X86_64 = struct.Struct("<3Q3I4xQ3q6q24x")  # arch/x86/include/uapi/asm/stat.h
STAT_GENERIC = struct.Struct("<2Q4IQ8xqi4xq6q8x")  # include/uapi/asm-generic/stat.h
STATX = struct.Struct("<2IQ3IH2x4QqI4x16xqI4xqI4x4I112x")  # include/uapi/linux/stat.h; no birth time


def table(n: Syscalls) -> dict[int, Fill]:
    """By system call number: what fills the caller's buffer; NOT_OURS for all the kernel does as well."""
    fill = _stat_x86_64 if n.open >= 0 else _stat_generic
    return {
        n.fstat: lambda thread, file, args: _write(thread, args[1], fill(file)),
        n.newfstatat: lambda thread, file, args: (
            _write(thread, args[2], fill(file)) if _names_fd(thread, args[1], args[3]) else NOT_OURS
        ),
        n.statx: lambda thread, file, args: (
            _write(thread, args[4], _statx(file)) if _names_fd(thread, args[1], args[2]) else NOT_OURS
        ),
    }


def rdev(opened: AnyOpened) -> int:
    """st_rdev of the node that was opened: a VFIO device's minor is its place among the devices of the machine."""
    if isinstance(opened, OpenDevice):
        return os.makedev(VFIO_MAJOR, list(opened.instance.machine.devices).index(opened.name))
    if isinstance(opened, OpenKvm):
        return os.makedev(MISC_MAJOR, KVM_MINOR)
    assert not isinstance(opened, OpenVm)
    return os.makedev(MISC_MAJOR, VFIO_MINOR if opened.container else IOMMU_MINOR)


def _names_fd(thread: Thread, path_at: int, flags: int) -> bool:
    """AT_EMPTY_PATH with an empty path, or none (Linux 6.11)."""
    return bool(flags & AT_EMPTY_PATH) and (not path_at or thread.caller.memory.read(path_at, 1) == b"\0")


def _write(thread: Thread, at: int, data: bytes) -> int:
    return 0 if thread.caller.memory.write(at, data) == len(data) else -errno.EFAULT


def _times(found: os.stat_result) -> list[int]:
    return [part for ns in (found.st_atime_ns, found.st_mtime_ns, found.st_ctime_ns) for part in divmod(ns, 10**9)]


def _stat_x86_64(file: Installed) -> bytes:
    found = os.fstat(file.probe)
    owner, times = (found.st_uid, found.st_gid), _times(found)
    return STAT_X86_64.pack(found.st_dev, found.st_ino, 1, MODE, *owner, rdev(file.opened), 0, 4096, 0, *times)


def _stat_generic(file: Installed) -> bytes:
    found = os.fstat(file.probe)
    owner, times = (found.st_uid, found.st_gid), _times(found)
    return STAT_GENERIC.pack(found.st_dev, found.st_ino, MODE, 1, *owner, rdev(file.opened), 0, 4096, 0, *times)


def _statx(file: Installed) -> bytes:
    found, node = os.fstat(file.probe), rdev(file.opened)
    atime, atime_ns, mtime, mtime_ns, ctime, ctime_ns = _times(found)
    numbers = os.major(node), os.minor(node), os.major(found.st_dev), os.minor(found.st_dev)
    return STATX.pack(
        STATX_BASIC_STATS, 4096, 0, 1, found.st_uid, found.st_gid, MODE, found.st_ino, 0, 0, 0,
        atime, atime_ns, ctime, ctime_ns, mtime, mtime_ns, *numbers,
    )  # fmt: skip
