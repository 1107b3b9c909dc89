"""What is open on a mount, by the number that the kernel sends with each request (fh), and a caller's descriptors.

All files of a mount are one inode. An access or a dma-buf that comes back as an argument of an ioctl is known by its
position, a secret number that the thread was made to seek to: /proc/TID/fdinfo shows it.
"""

from __future__ import annotations

import os
import secrets
from collections import Counter
from typing import TYPE_CHECKING

from iommufdd.errors import EOPNOTSUPP, IommufdError
from iommufdd.eventq import EventqFile
from iommufdd.server.memory import OtherFile
from iommufdd.server.seccomp.procfile import reopened
from iommufdd.server.seccomp.sys import device_of

if TYPE_CHECKING:
    from iommufdd.server.instance import OpenContext
    from iommufdd.user import File

    from .caller import Thread
    from .session import Session

LEAST_TOKEN = 1 << 60
FDINFO = 64  # enough for its first line
OUR_DEVICES: Counter[int] = Counter()  # st_dev of every mount that this daemon serves
BACKED_DEVICES: set[int] = set()  # of those, where a page fault does not ask us


class Opened:
    """A struct file of the mount. `file` is None until an ioctl has filled it, and if none did."""

    def __init__(self, fh: int, context: OpenContext, file: File | None, token: int = 0) -> None:
        self.fh = fh
        self.context = context
        self.file = file
        self.token = token
        self.kh = 0  # by which the kernel knows who polls; 0 when nobody has


class OpenFiles:
    """All struct files of one mount."""

    def __init__(self) -> None:
        self.by_fh: dict[int, Opened] = {}
        self.by_token: dict[int, Opened] = {}
        self._next = 1

    def add(self, context: OpenContext, file: File | None, *, token: bool = False) -> Opened:
        secret = LEAST_TOKEN + secrets.randbits(60) if token else 0
        opened = self.by_fh[self._next] = Opened(self._next, context, file, secret)
        self._next += 1
        if token:
            self.by_token[secret] = opened
        return opened

    def release(self, fh: int) -> None:
        """The last descriptor is closed."""
        opened = self.by_fh.pop(fh, None)
        if opened is None:
            return
        self.by_token.pop(opened.token, None)
        if opened.file is not None:
            opened.file.on_change = None
            opened.file.put()


class MountDescriptors:
    """A `user.FileTable` over /proc/TID. One ioctl at most takes one new number: the thread has it already."""

    def __init__(self, session: Session, thread: Thread) -> None:
        self.session = session
        self.thread = thread
        self.refusal: IommufdError | None = None  # why there is no number
        self.number = -1
        self.slot: Opened | None = None  # what the number stands for
        self.installed = False

    def offer(self, number: int, slot: Opened | None, refusal: IommufdError | None) -> None:
        """For the ioctl to come."""
        self.number, self.slot, self.refusal, self.installed = number, slot, refusal, False

    def fget(self, fd: int) -> File | None:
        if not 0 <= fd < 1 << 31:
            return None
        try:
            opened = self.session.open_files.by_token.get(self._position(fd))
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            return OtherFile()
        if opened is not None:
            return opened.file
        try:
            if device_of(str(fd), self.thread.folder) in OUR_DEVICES:
                return OtherFile()  # to open it would be to wait for ourselves
            own = reopened(self.thread.folder, fd, cautious=self.session.files.cautious)
        except OSError:
            return OtherFile()
        return self.session.files.opened(own)

    def _position(self, fd: int) -> int:
        """pos: of /proc/TID/fdinfo/N. OSError, ValueError."""
        info = os.open(f"../fdinfo/{fd}", os.O_RDONLY | os.O_CLOEXEC, dir_fd=self.thread.folder)
        try:
            return int(os.read(info, FDINFO).split(b"\n")[0].split()[1])
        finally:
            os.close(info)

    def get_unused_fd(self) -> int:
        if self.refusal is not None:
            raise self.refusal
        if self.slot is None:
            raise EOPNOTSUPP("a second descriptor for one call")
        return self.number

    def put_unused_fd(self, fd: int) -> None:
        pass  # the thread closes it: see inject.py

    def fd_install(self, fd: int, file: File) -> None:
        assert self.slot is not None
        slot, self.slot, self.installed = self.slot, None, True
        slot.file = file
        if isinstance(file, EventqFile):
            file.on_change = lambda: self.session.poll_wakeup(slot)
