"""read, write and lseek, in all their forms, on descriptors of ours: what the kernel's files answer.

Only event queues can be read and written. They have neither a position nor ->read_iter(), so vectors are taken one
by one, and calls with a position are refused. The iommufd, a VFIO device and /dev/kvm are character devices: those get
as far as vfs_read().
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING

from iommufdd.context import Context
from iommufdd.errors import EINVAL, IommufdError
from iommufdd.eventq import EventqFile
from iommufdd.kvm.dev import KvmDevice, KvmFile
from iommufdd.kvm.vm import Vcpu
from iommufdd.vfio.device_cdev import VfioDeviceFile

if TYPE_CHECKING:
    from iommufd_uapi.seccomp import Syscalls
    from iommufdd.user import Caller, File

OnFile = Callable[["Caller", "File", list[int]], int]

MAX_RW_COUNT = 0x7FFF_F000  # include/linux/fs.h
UIO_MAXIOV = 1024
IOVEC = struct.Struct("<QQ")
RWF_HIPRI = 1
SEEK_MAX = 4  # include/uapi/linux/fs.h
ADDRESS_END = 1 << 47  # TASK_SIZE_MAX, as access_ok() has it


def table(n: Syscalls) -> dict[int, OnFile]:
    """The handlers by system call number."""
    return {
        n.lseek: _lseek,
        n.read: _read,
        n.write: _write,
        n.pread64: _positioned,
        n.pwrite64: _positioned,
        n.readv: _readv,
        n.writev: _writev,
        n.preadv: _positioned,
        n.pwritev: _positioned,
        n.preadv2: _preadv2,
        n.pwritev2: _pwritev2,
    }


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _lseek(caller: Caller, file: File, args: list[int]) -> int:
    """KVM's files take a seek, and stay where they are (noop_llseek)."""
    if isinstance(file, KvmFile | Vcpu):
        return 0 if args[2] & 0xFFFF_FFFF <= SEEK_MAX else -errno.EINVAL
    return -errno.ESPIPE


def _read(caller: Caller, file: File, args: list[int]) -> int:
    return _transfer(caller, file, args[1], args[2], write=False)


def _write(caller: Caller, file: File, args: list[int]) -> int:
    return _transfer(caller, file, args[1], args[2], write=True)


def _transfer(caller: Caller, file: File, addr: int, count: int, *, write: bool) -> int:
    """vfs_read(), vfs_write()"""
    if not isinstance(file, EventqFile) or _signed(count) < 0:
        return -errno.EINVAL
    if addr + count > ADDRESS_END:
        return -errno.EFAULT
    count = min(count, MAX_RW_COUNT)
    return file.write(caller, addr, count) if write else file.read(caller, addr, count)


def _positioned(caller: Caller, file: File, args: list[int]) -> int:
    """pread() and the like."""
    if _signed(args[3]) < 0:
        return -errno.EINVAL
    return -errno.EINVAL if isinstance(file, Context | VfioDeviceFile | KvmDevice) else -errno.ESPIPE


def _readv(caller: Caller, file: File, args: list[int]) -> int:
    return _vector(caller, file, args[1], args[2], write=False)


def _writev(caller: Caller, file: File, args: list[int]) -> int:
    return _vector(caller, file, args[1], args[2], write=True)


def _preadv2(caller: Caller, file: File, args: list[int]) -> int:
    return _vector2(caller, file, args, write=False)


def _pwritev2(caller: Caller, file: File, args: list[int]) -> int:
    return _vector2(caller, file, args, write=True)


def _vector2(caller: Caller, file: File, args: list[int], *, write: bool) -> int:
    """With a position of -1 it is readv(), and takes flags."""
    if _signed(args[3]) != -1:
        return _positioned(caller, file, args)
    if args[5] & ~RWF_HIPRI:
        return -errno.EOPNOTSUPP
    return _vector(caller, file, args[1], args[2], write=write)


def _vector(caller: Caller, file: File, at: int, count: int, *, write: bool) -> int:
    """do_loop_readv_writev(): until one of them is not filled."""
    if not isinstance(file, EventqFile) or count > UIO_MAXIOV:
        return -errno.EINVAL
    parts = list(IOVEC.iter_unpack(caller.copy_from_user(at, count * IOVEC.size)))
    if any(_signed(length) < 0 for _, length in parts):
        raise EINVAL("a negative length")
    done = 0
    for addr, length in parts:
        part = _transfer_or_errno(caller, file, addr, length, write=write)
        if part < 0:
            return done or part
        done += part
        if part != length:
            break
    return done


def _transfer_or_errno(caller: Caller, file: File, addr: int, length: int, *, write: bool) -> int:
    try:
        return _transfer(caller, file, addr, length, write=write)
    except IommufdError as error:
        return -error.errno
