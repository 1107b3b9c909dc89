"""A seccomp listener in the reactor: notifications are received one by one, and answered.

The id of the notification in work stands in a page that the keeper shares: if the daemon is killed, the keeper knows
whom to answer. Nothing is ever read from there.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import select
from typing import TYPE_CHECKING

from iommufd_uapi.seccomp import (
    NOTIF,
    NOTIF_ADDFD,
    NOTIF_PAGE,
    NOTIF_RESP,
    SECCOMP_ADDFD_FLAG_SEND,
    SECCOMP_ADDFD_FLAG_SETFD,
    SECCOMP_IOCTL_NOTIF_ADDFD,
    SECCOMP_IOCTL_NOTIF_ID_VALID,
    SECCOMP_IOCTL_NOTIF_RECV,
    SECCOMP_IOCTL_NOTIF_SEND,
    SECCOMP_IOCTL_NOTIF_SET_FLAGS,
    SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP,
    SECCOMP_USER_NOTIF_FLAG_CONTINUE,
)
from iommufdd.errors import EINVAL
from iommufdd.server.memory import get_seals

from .reach import Waiting

if TYPE_CHECKING:
    from iommufdd.server.reactor import Reactor

    from .reach import Ask

CONTINUE = 1 << 62  # the kernel carries the call out
ANSWERED = 1 << 61  # nothing more is to be sent

EMPTY = bytes(NOTIF.size)
NONE = bytes(8)


def signed_int(value: int) -> int:
    """An argument of type int."""
    value &= 0xFFFF_FFFF
    return value - (1 << 32) if value >> 31 else value


class Listener:
    """The descriptor, and the notification in work."""

    def __init__(self, reactor: Reactor, listener: int, page: int) -> None:
        """Takes over `listener`, which is yet to be registered; `page` is the file of the page. EINVAL."""
        self.reactor = reactor
        self.listener = listener
        self._parked: tuple[int, int, list[int]] | None = None  # the call that waits for the keeper
        self.current = 0  # the notification in work
        self._received = bytearray(NOTIF.size)
        try:
            self._check_listener()
            self._page = _shared_page(page)
        except (OSError, ValueError) as error:
            raise EINVAL(f"no seccomp listener, or no page for it: {error}") from None

    def _check_listener(self) -> None:
        """OSError unless this is a listener. Wakes the target on our CPU, where the kernel can (Linux 6.6)."""
        try:
            fcntl.ioctl(self.listener, SECCOMP_IOCTL_NOTIF_ID_VALID, bytearray(8))
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise
        try:
            fcntl.ioctl(self.listener, SECCOMP_IOCTL_NOTIF_SET_FLAGS, SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP)
        except OSError:
            pass

    def notified(self, tid: int, nr: int, args: list[int]) -> int:
        """A call: its result, minus an errno, CONTINUE or ANSWERED; Waiting if it must begin again at resume()."""
        raise NotImplementedError

    def ask(self, ask: Ask) -> None:
        """The keeper, for the call in work; then comes resume()."""
        raise NotImplementedError

    def answered(self) -> None:
        """A call that has waited need not any more."""

    def ended(self) -> None:
        """No process has the filter any more."""
        raise NotImplementedError

    def ready(self, mask: int) -> None:
        if mask & select.EPOLLIN:
            self._turn()
        else:
            self.ended()

    def _turn(self) -> None:
        page, received = self._page, self._received
        received[:] = EMPTY
        try:
            fcntl.ioctl(self.listener, SECCOMP_IOCTL_NOTIF_RECV, received)
        except OSError:
            return  # ENOENT: the caller was killed meanwhile
        page[:8] = received[:8]
        self.current, tid, _, nr, _, _, *args = NOTIF.unpack(received)
        self._carry_out(tid, nr, args)

    def _carry_out(self, tid: int, nr: int, args: list[int]) -> None:
        """Answer the notification in work, or let it wait for the keeper: the other processes wait then too."""
        try:
            answer = self.notified(tid, nr, args)
        except Waiting as waiting:
            self._parked = tid, nr, args
            self.reactor.modify(self.listener, 0)
            self.ask(waiting.ask)
            return
        if answer is not ANSWERED:
            self.send(answer)
        self._page[:8] = NONE

    def resume(self) -> None:
        """The call that waits, if there is one, begins again."""
        call, self._parked = self._parked, None
        if call is None or self.listener < 0:
            return
        self.reactor.modify(self.listener, select.EPOLLIN)
        self._carry_out(*call)
        if self._parked is None:
            self.answered()

    def send(self, answer: int) -> None:
        """The result of the call, minus an errno, or CONTINUE."""
        if answer is CONTINUE:
            response = NOTIF_RESP.pack(self.current, 0, 0, SECCOMP_USER_NOTIF_FLAG_CONTINUE)
        elif answer < 0:
            response = NOTIF_RESP.pack(self.current, 0, answer, 0)
        else:
            response = NOTIF_RESP.pack(self.current, answer, 0, 0)
        try:
            fcntl.ioctl(self.listener, SECCOMP_IOCTL_NOTIF_SEND, response)
        except OSError:
            pass  # ENOENT: killed meanwhile

    def add(self, own: int, fd: int = -1, *, cloexec: bool = True, send: bool = False) -> int:
        """Put a descriptor of ours into the process; its number there. OSError.

        `fd`: at this number, whatever is there; else at the lowest. `send` also answers the call with the number.
        """
        flags = SECCOMP_ADDFD_FLAG_SETFD * (fd >= 0) | SECCOMP_ADDFD_FLAG_SEND * send
        fields = self.current, flags, own, max(fd, 0), os.O_CLOEXEC if cloexec else 0
        request = bytearray(NOTIF_ADDFD.pack(*fields))
        return int(fcntl.ioctl(self.listener, SECCOMP_IOCTL_NOTIF_ADDFD, request))

    def valid(self) -> bool:
        """Whether the notification's caller still waits: what was opened by its number is then its own."""
        try:
            fcntl.ioctl(self.listener, SECCOMP_IOCTL_NOTIF_ID_VALID, self.current.to_bytes(8, "little"))
        except OSError:
            return False
        return True


def _shared_page(fd: int) -> mmap.mmap:
    """OSError, ValueError; also for a file that could be cut under us, which would raise SIGBUS."""
    seals = get_seals(fd)
    if seals is None or not seals & fcntl.F_SEAL_SHRINK or os.fstatvfs(fd).f_bsize > mmap.PAGESIZE:
        raise ValueError("the page is no memfd sealed with F_SEAL_SHRINK")
    return mmap.mmap(fd, NOTIF_PAGE)
