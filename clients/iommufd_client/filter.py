"""Room client: the seccomp filters of `run` and of `mount --exact`, classic BPF made of a few lines of assembler.

What is cheap is decided here, in the kernel: only opens for reading and writing, ioctls of iommufd's type, and
calls on descriptor numbers from a base on (where the daemon puts its own) are notified. All else runs at its speed.
"""

from __future__ import annotations

import os
import struct
from typing import NamedTuple

from iommufd_uapi.seccomp import MARK, SECCOMP_RET_ALLOW, SECCOMP_RET_USER_NOTIF, VFS_IOCTLS, Syscalls

LD_ABS, ALU_AND, ALU_RSH, JMP_JA, RET = 0x20, 0x54, 0x74, 0x05, 0x06  # include/uapi/linux/bpf_common.h
JEQ, JGE, JSET = 0x15, 0x35, 0x45
INSTRUCTION = struct.Struct("<HBBI")  # struct sock_filter
NR, ARCH, ARGS = 0, 4, 16  # offsets in struct seccomp_data
HIGH = 4  # of the upper half of an argument

O_ACCMODE, O_RDWR = 3, 2
MAP_ANONYMOUS = 0x20
MAP_DENYWRITE = 0x800  # the mark of glibc's loader
F_DUPFD, F_DUPFD_CLOEXEC = 0, 1030
X32_SYSCALL_BIT = 0x4000_0000
IOC_TYPE = ord(";")


class Jump(NamedTuple):
    """An instruction with the label to go to when the comparison holds; otherwise the next one."""

    code: int
    k: int
    label: str


class Plain(NamedTuple):
    """An instruction without a jump."""

    code: int
    k: int


Line = Jump | Plain | str  # a str is a label


def program(numbers: Syscalls, base: int, *, proc: bool = False, caps: bool = False) -> bytes:
    """The filter; `base` is the lowest number of our descriptors.

    `proc` also notifies opens of folders, and of files with flags that are exactly 0, as fopen() has them; `caps`
    capget and capset.
    """
    return assemble(_lines(numbers, base, proc=proc, caps=caps))


def exact_program(numbers: Syscalls) -> bytes:
    """The filter of `mount --exact`: what never reaches a FUSE file.

    mmap of a file, but not glibc's loader's; reads and writes of nothing; the ioctls that the VFS answers itself.
    """
    return assemble(_exact_lines(numbers))


def _lines(n: Syscalls, base: int, *, proc: bool, caps: bool) -> list[Line]:
    on_arg0 = [n.read, n.write, n.lseek, n.pread64, n.pwrite64, n.readv, n.writev, n.preadv, n.pwritev]
    on_arg0 += [n.preadv2, n.pwritev2, n.dup, n.fstat, n.newfstatat, n.statx]
    labels = [(n.open, "open"), (n.openat, "openat"), (n.ioctl, "ioctl"), (n.mmap, "mmap"), (n.fcntl, "fcntl")]
    labels += [(number, "arg0") for number in on_arg0] + [(n.openat2, "notify")]
    if caps:
        labels += [(n.capget, "notify"), (n.capset, "notify")]
    return [
        _load(ARCH),
        Jump(JEQ, n.audit, "native"),
        "allow",
        Plain(RET, SECCOMP_RET_ALLOW),
        "native",
        _load(NR),
        *(Jump(JEQ, number, label) for number, label in labels if number >= 0),
        _go("allow2"),
        "open",
        _load(_arg(1)),
        _go("flags"),
        "openat",
        _load(_arg(2)),
        "flags",
        *([Jump(JEQ, 0, "notify"), Jump(JSET, os.O_DIRECTORY, "notify")] if proc else []),
        Plain(ALU_AND, O_ACCMODE),
        Jump(JEQ, O_RDWR, "notify"),
        _go("allow2"),
        "fcntl",
        _load(_arg(1)),
        Jump(JEQ, F_DUPFD, "arg0"),
        Jump(JEQ, F_DUPFD_CLOEXEC, "arg0"),
        _go("allow2"),
        "mmap",
        _load(_arg(3)),
        Jump(JSET, MAP_ANONYMOUS, "allow2"),
        _load(_arg(4)),
        _go("fd"),
        "ioctl",
        _load(_arg(1)),
        Plain(ALU_RSH, 8),
        Plain(ALU_AND, 0xFF),
        Jump(JEQ, IOC_TYPE, "notify"),
        "arg0",
        _load(_arg(0)),
        "fd",
        Jump(JGE, 1 << 31, "allow2"),
        Jump(JGE, base, "notify"),
        "allow2",
        Plain(RET, SECCOMP_RET_ALLOW),
        "notify",
        Plain(RET, SECCOMP_RET_USER_NOTIF),
    ]


def _exact_lines(n: Syscalls) -> list[Line]:
    counted = [n.read, n.write, n.pread64, n.pwrite64, n.readv, n.writev, n.preadv, n.pwritev, n.preadv2, n.pwritev2]
    labels = [(n.mmap, "mmap"), (n.ioctl, "ioctl"), *((number, "count") for number in counted)]
    return [
        _load(ARCH),
        Jump(JEQ, n.audit, "native"),
        _go("allow"),
        "native",
        _load(NR),
        *(Jump(JEQ, number, label) for number, label in labels),
        _go("allow"),
        "mmap",
        _load(_arg(3)),
        Jump(JSET, MAP_ANONYMOUS | MAP_DENYWRITE, "allow"),
        _load(_arg(4)),
        Jump(JGE, 1 << 31, "allow"),
        _load(_arg(4) + HIGH),
        Jump(JEQ, MARK, "allow"),
        _go("notify"),
        "count",
        _load(_arg(2)),
        Jump(JEQ, 0, "notify"),
        _go("allow"),
        "ioctl",
        _load(_arg(1)),
        *(Jump(JEQ, cmd, "notify") for cmd in VFS_IOCTLS),
        "allow",
        Plain(RET, SECCOMP_RET_ALLOW),
        "notify",
        Plain(RET, SECCOMP_RET_USER_NOTIF),
    ]


def _load(offset: int) -> Plain:
    return Plain(LD_ABS, offset)


def _go(label: str) -> Jump:
    return Jump(JMP_JA, 0, label)


def _arg(index: int) -> int:
    """The low half of an argument: file descriptors, flags and ioctl numbers are 32 bits wide."""
    return ARGS + 8 * index


def assemble(lines: list[Line]) -> bytes:
    """struct sock_filter[]: labels become distances, which are forward and below 256."""
    places: dict[str, int] = {}
    code: list[Jump | Plain] = []
    for line in lines:
        if isinstance(line, str):
            places[line] = len(code)
        else:
            code.append(line)
    return b"".join(_encode(line, at, places) for at, line in enumerate(code))


def _encode(line: Jump | Plain, at: int, places: dict[str, int]) -> bytes:
    if isinstance(line, Plain):
        return INSTRUCTION.pack(line.code, 0, 0, line.k)
    distance = places[line.label] - at - 1
    if line.code == JMP_JA:
        return INSTRUCTION.pack(JMP_JA, 0, 0, distance)
    return INSTRUCTION.pack(line.code, distance, 0, line.k)
