"""Room client: the seccomp listener of `iommufdctl mount --exact`.

A process that can mount may also install a filter without no_new_privs: set-user-ID programs go on working.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

from iommufd_uapi import seccomp

from . import run
from .filter import exact_program
from .keeper import Keeper, RunError

if TYPE_CHECKING:
    import socket


class ExactKeeper(Keeper):
    """Without the daemon the file is dead, and the kernel's answers are as good as any."""

    farewell = "the file answers ENOTCONN from now on"
    in_work = None  # most likely it was on another file

    def is_ours(self, pid: int, nr: int, args: list[int]) -> bool:
        return False


def exact_listener() -> int:
    """Install the filter in this process; the listener. RunError."""
    return run.install(ctypes.CDLL(None, use_errno=True), _numbers(), exact_program(_numbers()))


def exact_keeper(connection: socket.socket, listener: int, page: int, child: int, front: int) -> Keeper:
    """Who stays while CMD runs."""
    return ExactKeeper(connection, listener, page, child, _numbers(), front=front, welcome=False)


def _numbers() -> seccomp.Syscalls:
    numbers = seccomp.native()
    if numbers is None:
        raise RunError("--exact is made for x86_64 and aarch64 only")
    return numbers
