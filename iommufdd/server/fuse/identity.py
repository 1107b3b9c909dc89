"""Which open file a caller's descriptor shows.

All files of a mount are one inode, and nothing under /proc tells them apart. Only a request names the file (fh): so a
thread of ours makes one on a copy of the descriptor, with a secret number, and waits in the kernel until we answer.
"""

from __future__ import annotations

import ctypes
import secrets
import select
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .files import Opened
    from .session import Session

WHICH = 0x3BFF  # _IO(IOMMUFD_TYPE, 0xff): without a size, so the kernel hands the argument on as it is
POLL_MS = 10

_ioctl = ctypes.CDLL(None).ioctl
_ioctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong]


class Question:
    """One that is being asked."""

    def __init__(self) -> None:
        self.secret = secrets.randbits(63)
        self.opened: Opened | None = None

    def answers(self, cmd: int, arg: int, opened: Opened) -> bool:
        """Whether this ioctl is ours."""
        if cmd != WHICH or arg != self.secret:
            return False
        self.opened = opened
        return True


def identify(session: Session, own: int) -> Opened | None:
    """The open file behind a descriptor of ours, a copy of a caller's; None when the mount has ended.

    Other requests that come meanwhile are answered too.
    """
    question = session.question = Question()
    asking = threading.Thread(target=_ioctl, args=(own, WHICH, question.secret), daemon=True)
    device = select.poll()
    device.register(session.device, select.POLLIN)
    asking.start()
    while question.opened is None and asking.is_alive():
        if device.poll(POLL_MS):
            session.pump()
    session.question = None
    asking.join()
    return question.opened
