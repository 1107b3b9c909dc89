"""The descriptor table of a task whose /proc/TID/fd we may not look into: through the keeper (reach.py).

What is behind a number is read from an fdinfo file, which the keeper opens once for each number. Numbers that are
not open, and files that are not ours, are asked for call by call.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from iommufd_uapi import args
from iommufd_uapi.layout import Direction
from iommufdd.errors import EMFILE, IommufdError
from iommufdd.server.memory import OtherFile

from .descriptors import TargetDescriptors
from .reach import Waiting
from .sys import AT_FDCWD

if TYPE_CHECKING:
    from iommufdd.server.files import FileKey
    from iommufdd.user import File

    from .notify import Supervisor
    from .target import Thread

MANY_NUMBERS = 64
LONGEST = 256  # bytes of an ioctl's struct


class StrangersDescriptors(TargetDescriptors):
    """A `user.FileTable` over descriptors of /proc/TID/fdinfo/N."""

    def __init__(self, supervisor: Supervisor, thread: Thread) -> None:
        super().__init__(supervisor, thread)
        self._infos: dict[int, int] = {}

    def close(self) -> None:
        for info in self._infos.values():
            os.close(info)
        self.supervisor.server.nofile.uncharge(self.supervisor.uid, len(self._infos))
        self._infos.clear()

    def key(self, fd: int) -> FileKey | None:
        """As of any task. Waiting."""
        info = self._infos.get(fd)
        if info is None:
            info = self._info(fd)
        inode = None if info is None else self.supervisor.reach.inode(info)
        if inode is None:
            return None
        # fdinfo tells no owner, by whom numbers that have come round are told apart: only files of one user are found.
        key = *inode, os.geteuid()
        found = self.supervisor.find(key)
        return key if found is not None and found.opened.uid == self.supervisor.uid else (*inode, -1)

    def _info(self, fd: int) -> int | None:
        """The fdinfo of a number; None when it is not open, or we can have no more descriptors. Waiting."""
        if not 0 <= fd < 1 << 31:
            return None
        try:
            info = self.supervisor.reach.fdinfo(self.thread.tid, fd)
        except OSError:
            return None
        if len(self._infos) >= MANY_NUMBERS:
            self.close()
        try:
            self.supervisor.server.nofile.charge(self.supervisor.uid)
        except IommufdError:
            os.close(info)
            return None
        self._infos[fd] = info
        return info

    def prepare(self, cmd: int, arg: int) -> None:
        """Ask for all that an ioctl will want to know of descriptors: it cannot wait once it has begun. Waiting."""
        data = self.thread.caller.memory.read(arg, LONGEST).ljust(LONGEST, b"\0")
        new = args.returns_fd(cmd, data)
        for offset, direction in args.fds(cmd, data):
            if direction is Direction.OUT:
                new = True
            else:
                self._prepare(int.from_bytes(data[offset : offset + 4], "little", signed=True))
        for pointer, offset in args.pointed_fds(cmd, data):
            place = int.from_bytes(data[pointer : pointer + 8], "little") + offset
            self._prepare(int.from_bytes(self.thread.caller.memory.read(place, 4), "little", signed=True))
        if new:
            self.prepare_number()

    def prepare_number(self, least: int = 0) -> None:
        """Ask which number is free. Waiting."""
        try:
            self.free_number(least)
        except EMFILE:
            pass

    def _prepare(self, fd: int) -> None:
        key = self.key(fd)
        if key is not None and self.supervisor.find(key) is None:
            try:
                os.close(self._own(fd))
            except OSError:
                pass

    def fget(self, fd: int) -> File | None:
        try:
            return super().fget(fd)
        except Waiting:
            return OtherFile()  # another thread has changed the struct since prepare()

    def _own(self, fd: int) -> int:
        return self.supervisor.reach.file(self.thread.process.tgid, fd)

    def place(self, folder: int) -> str:
        """As of any task. Waiting."""
        reach = self.supervisor.reach
        own = reach.cwd(self.thread.tid) if folder == AT_FDCWD else self._own(folder)
        try:
            return os.readlink(f"/proc/self/fd/{own}")
        finally:
            os.close(own)

    def free_number(self, least: int = 0, *, lowest: bool = False) -> int:
        """The lowest free number from the base (or `least`) on; the lowest of all if none is. EMFILE, Waiting."""
        limit = self.thread.process.nofile()
        base = 0 if lowest else max(self.supervisor.base, least)
        reach, tid = self.supervisor.reach, self.thread.tid
        try:
            for start in (base, 0):
                if start < limit and (fd := reach.free_number(tid, start)) < limit:
                    return fd
        except OSError:
            pass
        raise EMFILE(f"all {limit} descriptor numbers are in use")

    def get_unused_fd(self) -> int:
        try:
            return super().get_unused_fd()
        except Waiting:
            raise EMFILE("another thread has changed the call") from None
