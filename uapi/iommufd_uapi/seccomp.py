"""Room uapi (mirrors include/uapi/linux/seccomp.h): user notification, shared by the daemon and `iommufdctl run`.

Plain `struct`s, no layouts: `run` must start fast, and construct is slow to import.
"""

import os
import struct
from typing import NamedTuple

SECCOMP_SET_MODE_FILTER = 1
SECCOMP_FILTER_FLAG_NEW_LISTENER = 1 << 3
SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV = 1 << 5  #: since Linux 5.19

SECCOMP_RET_USER_NOTIF = 0x7FC0_0000
SECCOMP_RET_ALLOW = 0x7FFF_0000

SECCOMP_IOCTL_NOTIF_RECV = 0xC050_2100
SECCOMP_IOCTL_NOTIF_SEND = 0xC018_2101
SECCOMP_IOCTL_NOTIF_ID_VALID = 0x4008_2102
SECCOMP_IOCTL_NOTIF_ADDFD = 0x4018_2103
SECCOMP_IOCTL_NOTIF_SET_FLAGS = 0x4008_2104
SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP = 1  #: since Linux 6.6
SECCOMP_USER_NOTIF_FLAG_CONTINUE = 1
SECCOMP_ADDFD_FLAG_SETFD = 1
SECCOMP_ADDFD_FLAG_SEND = 2

NOTIF = struct.Struct("<QIIIIQ6Q")  #: struct seccomp_notif: id, pid, flags, nr, arch, instruction pointer, args
NOTIF_RESP = struct.Struct("<QqiI")  #: struct seccomp_notif_resp: id, val, error, flags
NOTIF_ADDFD = struct.Struct("<QIIII")  #: struct seccomp_notif_addfd: id, flags, srcfd, newfd, newfd_flags

# What a daemon asks its keeper for (docs/PROTOCOL.md section 7), where it may not open it itself.
REACH_ASK = struct.Struct("<4xIII")  #: struct iofd_reach: zero, as no line of text begins; what, pid, number
REACH_ANSWER = struct.Struct("<iI")  #: struct iofd_reach_reply: errno, value
REACH_MM, REACH_FDINFO, REACH_FILE, REACH_NUMBER, REACH_CWD = 1, 2, 3, 4, 5  #: iofd_reach.what
REACH_PIDS = 4096  #: pids after a REACH_MM at most

NOTIF_PAGE = 4096  #: bytes of the file that shows the id of the notification in work, so that the keeper can answer it

#: The upper half of mmap's fd, which the kernel ignores, in the daemon's own calls: the filter of `mount --exact` lets
#: them by.
MARK = 0x696F_6664

#: ioctls of a regular file that the VFS answers; ENOTTY on a device: FIONREAD, FIBMAP, FIOQSIZE
VFS_IOCTLS = (0x541B, 0x0001, 0x5460)


class Syscalls(NamedTuple):
    """System call numbers of an architecture; -1 for one that it does not have."""

    audit: int  #: AUDIT_ARCH_*
    seccomp: int
    kcmp: int
    capget: int
    capset: int
    open: int
    openat: int
    openat2: int
    ioctl: int
    mmap: int
    fcntl: int
    dup: int
    lseek: int
    read: int
    write: int
    pread64: int
    pwrite64: int
    readv: int
    writev: int
    preadv: int
    pwritev: int
    preadv2: int
    pwritev2: int
    fstat: int
    newfstatat: int
    statx: int


ARCHITECTURES = {
    "x86_64": Syscalls(
        audit=0xC000_003E, seccomp=317, kcmp=312, capget=125, capset=126,
        open=2, openat=257, openat2=437, ioctl=16, mmap=9, fcntl=72, dup=32,
        lseek=8, read=0, write=1, pread64=17, pwrite64=18, readv=19, writev=20, preadv=295, pwritev=296,
        preadv2=327, pwritev2=328, fstat=5, newfstatat=262, statx=332,
    ),
    "aarch64": Syscalls(
        audit=0xC000_00B7, seccomp=277, kcmp=272, capget=90, capset=91,
        open=-1, openat=56, openat2=437, ioctl=29, mmap=222, fcntl=25,
        dup=23, lseek=62, read=63, write=64, pread64=67, pwrite64=68, readv=65, writev=66, preadv=69, pwritev=70,
        preadv2=286, pwritev2=287, fstat=80, newfstatat=79, statx=291,
    ),
}  # fmt: skip


def native() -> Syscalls | None:
    """The numbers of this machine; None for an architecture that is not known here."""
    return ARCHITECTURES.get(os.uname().machine)
