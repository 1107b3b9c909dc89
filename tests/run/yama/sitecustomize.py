"""Makes the daemon as powerless as Yama's ptrace_scope 1 does, on hosts without Yama: see tests/run/test_strangers.py.

Python imports this at its start, from PYTHONPATH. Nothing of PTRACE_MODE_ATTACH is left to iommufdd: no open of
/proc/PID/mem (by an audit hook), no pidfd_getfd() (by seccomp). What takes PTRACE_MODE_READ works, as under Yama.
"""

import ctypes
import errno
import os
import re
import struct
import sys

MEM = re.compile(r"/proc/\d+/mem")
ARCHES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
SYS_PIDFD_GETFD = 438
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2


def refuse(event: str, arguments: tuple[object, ...]) -> None:
    if event == "open" and isinstance(arguments[0], str) and MEM.fullmatch(arguments[0]):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), arguments[0])


def forbid(number: int) -> None:
    """EPERM for a system call."""
    lines = [
        (0x20, 0, 0, 4),  # load the architecture
        (0x15, 0, 3, ARCHES[os.uname().machine]),
        (0x20, 0, 0, 0),  # load the number
        (0x15, 0, 1, number),
        (0x06, 0, 0, 0x0005_0000 | errno.EPERM),  # SECCOMP_RET_ERRNO
        (0x06, 0, 0, 0x7FFF_0000),  # SECCOMP_RET_ALLOW
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *line) for line in lines))
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(lines), ctypes.addressof(code)))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, program) < 0:
        raise OSError(ctypes.get_errno(), "prctl")


if "iommufdd.cli" in sys.orig_argv:
    sys.addaudithook(refuse)
    forbid(SYS_PIDFD_GETFD)
