"""Which open file a caller's descriptor shows.

All files of a mount are one inode, and nothing under /proc tells them apart. Only a request names the file (fh): so a
thread of ours reads a byte from a copy of the descriptor, and waits in the kernel until we answer. It must be a read,
or a write: an ioctl from outside the user namespace of the mount is refused (fuse_allow_current_process).
"""

from __future__ import annotations

import errno
import os
import select
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .files import Opened
    from .session import Session

POLL_MS = 10


class Question(threading.Thread):
    """One that is being asked."""

    def __init__(self, own: int, mode: int) -> None:
        super().__init__(daemon=True)
        self._own, self._mode = own, mode
        self.opened: Opened | None = None

    def run(self) -> None:
        try:
            if self._mode == os.O_WRONLY:
                os.write(self._own, b"?")
            else:
                os.read(self._own, 1)  # less than any record: nothing is taken
        except OSError:
            pass

    def answers(self, pid: int, opened: Opened) -> bool:
        """Whether this read or write is ours."""
        if pid != self.native_id:
            return False
        self.opened = opened
        return True


def identify(session: Session, own: int, mode: int) -> Opened | None:
    """The open file behind a descriptor of ours, a copy of a caller's, opened with `mode`.

    None when it is only a path, or the mount has ended. Other requests that come meanwhile are answered too. OSError.
    """
    question = Question(own, mode)
    device = select.poll()
    device.register(session.device, select.POLLIN)
    try:
        question.start()
    except RuntimeError as error:
        raise OSError(errno.EAGAIN, str(error)) from None
    session.question = question
    while question.opened is None and question.is_alive():
        if device.poll(POLL_MS):
            session.pump()
    session.question = None
    question.join()
    return question.opened
