"""Calls that never reach a FUSE file (`mount --exact`): a filter notifies them, and a device's answers are given here.

The VFS answers them for a regular file: mmap(), reads and writes of nothing, some ioctls. On any other file they go
on as always.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
from typing import TYPE_CHECKING

from iommufd_uapi.seccomp import native
from iommufdd.errors import EINVAL, IommufdError
from iommufdd.server import log
from iommufdd.server.seccomp import rw
from iommufdd.server.seccomp.listener import CONTINUE, Listener, signed_int
from iommufdd.server.seccomp.procmm import StaleError
from iommufdd.server.seccomp.registers import drop_unmapped, keep, map_registers
from iommufdd.server.seccomp.sys import device_of, pidfd_getfd

from .identity import identify
from .inject import map_in_caller

if TYPE_CHECKING:
    from iommufdd.mmap import Vma
    from iommufdd.server.instance import OpenContext
    from iommufdd.server.seccomp.fds import Installed

    from .caller import Thread
    from .files import Opened
    from .session import Session

PIDFD_THREAD = os.O_EXCL  # since Linux 6.9


class Exact(Listener):
    """The listener of one command's processes. Ends with the last of them, which may be after the mount."""

    def __init__(self, session: Session, listener: int, page: int) -> None:
        """Takes over `listener`. EINVAL, EMFILE."""
        numbers = native()
        if numbers is None:
            raise EINVAL(f"system calls of {os.uname().machine} are not known")
        super().__init__(session.reactor, listener, page)
        self.session = session
        self.watch = session.server.watch()
        self._numbers = numbers
        self._on_file = rw.table(numbers)
        self.reactor.register(listener, self, select.EPOLLIN)

    def ended(self) -> None:
        self.close()
        self.session.end_if_over()

    def close(self) -> None:
        if self.listener >= 0:
            self.reactor.unregister(self.listener)
            os.close(self.listener)
            self.listener = -1
            self._page.close()

    # ---- notifications ----

    def notified(self, tid: int, nr: int, args: list[int]) -> int:
        fd = signed_int(args[4 if nr == self._numbers.mmap else 0])
        session = self.session
        try:
            if device_of(f"/proc/{tid}/fd/{fd}") != session.config.dev or session.device < 0:
                return CONTINUE
            return self._ours(tid, fd, nr, args)
        except (OSError, StaleError):
            return CONTINUE  # it is gone, may not be looked into, or has closed the file
        except IommufdError as error:
            return -error.errno
        except Exception as error:
            log.bug(error, uid=session.uid, pid=tid)
            return -errno.EIO
        finally:
            session.run_deferred()

    def _ours(self, tid: int, fd: int, nr: int, args: list[int]) -> int:
        """A call on a file of the mount. OSError, StaleError, IommufdError."""
        own = self._copy(tid, fd)
        try:
            if device_of(f"/proc/self/fd/{own}") != self.session.config.dev:
                return CONTINUE  # another file by now
            mode = fcntl.fcntl(own, fcntl.F_GETFL) & os.O_ACCMODE
            opened = identify(self.session, own, mode)
            if opened is None or opened.file is None:
                return CONTINUE
            self.settle()
            if nr == self._numbers.ioctl:
                return -errno.ENOTTY
            thread = self._thread(tid)
            if nr == self._numbers.mmap:
                return self._mmap(thread, opened, mode, args)
            return self._on_file[nr](thread.caller, opened.file, args)
        finally:
            os.close(own)

    def _copy(self, tid: int, fd: int) -> int:
        """A copy of a descriptor of the caller's. OSError."""
        try:
            pidfd = os.pidfd_open(tid, PIDFD_THREAD)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            pidfd = os.dup(self._thread(tid).process.pidfd)
        try:
            own = pidfd_getfd(pidfd, fd)
        finally:
            os.close(pidfd)
        if self.valid():
            return own
        os.close(own)
        raise ProcessLookupError(errno.ESRCH, "killed meanwhile")

    def _thread(self, tid: int) -> Thread:
        """OSError, EMFILE."""
        thread = self.session.thread(tid)
        if not thread.process.mm.alive:  # it has called exec
            thread = self.session.look_up(tid)
        if not self.valid():  # what was opened may be another's, who has the number now
            self.session.forget(thread)
            raise ProcessLookupError(errno.ESRCH, "killed meanwhile")
        return thread

    # ---- registers ----

    def _mmap(self, thread: Thread, opened: Opened, mode: int, args: list[int]) -> int:
        """The caller is made to map the context's own file in place of this one."""
        context, file = opened.context, opened.file
        assert file is not None
        vma = map_registers(thread.caller, context, file, args, mode=mode)
        try:
            installed = self._shown(context)
        except IommufdError:
            vma.put()
            raise
        keep(installed, vma, self.session.files.mms)
        rc = self._map(thread, (context, installed), mode, args)
        if rc < 0:
            _take_back(installed, vma)
        installed.check()
        return rc

    def _map(self, thread: Thread, shown: tuple[OpenContext, Installed], mode: int, args: list[int]) -> int:
        """OSError"""
        context, installed = shown
        own = os.open(f"/proc/self/fd/{installed.probe}", mode | os.O_CLOEXEC)
        try:
            return map_in_caller(self.session, thread, self, (context, own), args)
        finally:
            os.close(own)

    def _shown(self, context: OpenContext) -> Installed:
        """The context's file, watched: its mappings keep the context. EMFILE."""
        installed = self.watch.by_key.get(context.key)
        if installed is None:
            try:
                installed = self.watch.install(context, context.ctx.get(), context.identity)
            except IommufdError:
                context.ctx.put()
                raise
        return installed

    def settle(self) -> None:
        """Let go of what was unmapped or closed before now."""
        while self.watch.pending.poll(0):
            self.watch.ready(0)
            self.session.server.pipes.ready(0)

    def before_destroy(self, context: OpenContext) -> None:
        """Mappings of which only some are gone."""
        installed = self.watch.by_key.get(context.key)
        if installed is not None:
            drop_unmapped(installed, self.session.files.mms)


def _take_back(installed: Installed, vma: Vma) -> None:
    if vma in installed.maps:
        installed.maps.remove(vma)
        vma.put()
