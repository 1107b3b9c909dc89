"""What is installed in traced processes, and how the daemon learns that the last copy of it is closed.

An iommufd, a device, an access, a dma-buf and what KVM gives are memfds opened anew: they poll as the kernel's files
do, and registers can be mapped from an iommufd. An inotify watch tells of close() before it returns, provided that the
watch is read before each notification is answered; as equal events are merged, it is only a hint, and a lease probe
gives the answer.

An event queue is the pipe of server/files.py, which polls right and whose end shows by itself.
"""

from __future__ import annotations

import os
import select
from typing import TYPE_CHECKING

from iommufdd.errors import EMFILE
from iommufdd.server import log
from iommufdd.server.files import FileKey, file_key

from .sys import IN_CLOSE, IN_Q_OVERFLOW, INOTIFY_EVENT, inotify_add_watch, inotify_init, inotify_rm_watch, unopened

if TYPE_CHECKING:
    from iommufdd.mmap import Vma
    from iommufdd.server.nofile import Nofile
    from iommufdd.server.reactor import Reactor
    from iommufdd.server.vms import AnyOpened
    from iommufdd.user import File

    from .report import Report

DESCRIPTORS = 2  # that an installed memfd costs at most


class Installed:
    """A memfd in traced processes: `file` is released when nothing has it open or mapped any more."""

    def __init__(self, watch: Watch, opened: AnyOpened, file: File, memfd: int) -> None:
        """`memfd` is what memfd_create() gave; only descriptions opened anew count as open. OSError."""
        self.watch = watch
        self.opened = opened
        self.file = file
        self.maps: list[Vma] = []  # live mappings of registers
        self.report: Report | None = None  # who wants to know what is left in it
        self.key = file_key(memfd)
        self.probe = os.open(f"/proc/self/fd/{memfd}", os.O_RDONLY | os.O_CLOEXEC)
        self.wd = inotify_add_watch(watch.fd, f"/proc/self/fd/{self.probe}", IN_CLOSE)
        watch.by_wd[self.wd] = watch.by_key[self.key] = self

    def open(self) -> int:
        """A description for the process; our descriptor is to be closed when it is installed."""
        return os.open(f"/proc/self/fd/{self.probe}", os.O_RDWR | os.O_CLOEXEC)

    def check(self) -> None:
        """Release the file if nobody has it."""
        if self.probe >= 0 and unopened(self.probe):
            self.release()

    def release(self) -> None:
        del self.watch.by_wd[self.wd], self.watch.by_key[self.key]
        inotify_rm_watch(self.watch.fd, self.wd)
        os.close(self.probe)
        self.probe = -1
        self.watch.nofile.uncharge(self.opened.uid, DESCRIPTORS)
        try:
            if self.report is not None:
                self.report.closed(self.file)
            for vma in self.maps:
                vma.put()
            self.file.put()
        except Exception as error:
            log.bug(error, uid=self.opened.uid)


class Watch:
    """All memfds installed anywhere, and the inotify instance that tells of their ends: one of a daemon."""

    def __init__(self, reactor: Reactor, nofile: Nofile, pipes: select.epoll) -> None:
        """EMFILE."""
        self.nofile = nofile
        self._euid = os.geteuid()
        self.by_wd: dict[int, Installed] = {}
        self.by_key: dict[FileKey, Installed] = {}
        try:
            self.fd = inotify_init()
        except OSError as error:
            raise EMFILE(f"inotify: {error.strerror}") from None
        self.reactor = reactor
        self.pending = select.epoll()  # readable when some descriptor may have been closed
        self.pending.register(self.fd, select.EPOLLIN)
        self.pending.register(pipes, select.EPOLLIN)
        reactor.register(self.fd, self, select.EPOLLIN, first=True)

    def install(self, opened: AnyOpened, file: File, memfd: int = -1) -> Installed:
        """Make a file known; without a memfd of its own it gets one. EMFILE."""
        self.nofile.charge(opened.uid, DESCRIPTORS)
        made = -1
        try:
            if memfd < 0:
                memfd = made = os.memfd_create("iommufd", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            return Installed(self, opened, file, memfd)
        except OSError as error:
            self.nofile.uncharge(opened.uid, DESCRIPTORS)
            raise EMFILE(f"the daemon has no descriptor or watch left: {error.strerror}") from None
        finally:
            if made >= 0:
                os.close(made)

    def has(self, inode: tuple[int, int]) -> bool:
        """Whether it is one of ours, which our uid has made."""
        return (*inode, self._euid) in self.by_key

    def ready(self, mask: int) -> None:
        """Some descriptors were closed."""
        try:
            events = os.read(self.fd, 1 << 14)
        except BlockingIOError:
            return
        seen = [INOTIFY_EVENT.unpack_from(events, at)[:2] for at in range(0, len(events), INOTIFY_EVENT.size)]
        if any(mask & IN_Q_OVERFLOW for _, mask in seen):
            touched = list(self.by_wd)
        else:
            touched = list(dict.fromkeys(wd for wd, _ in seen))
        for wd in touched:
            installed = self.by_wd.get(wd)
            if installed is not None:
                installed.check()

    def close(self) -> None:
        for installed in list(self.by_wd.values()):
            installed.release()
        self.reactor.unregister(self.fd)
        self.pending.close()
        os.close(self.fd)
