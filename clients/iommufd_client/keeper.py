"""Room client: what `iommufdctl run`, and `mount --exact`, do while CMD runs.

It waits for CMD, passes signals on, prints what the daemon says, and opens for it what it may not (reach.py). When the
daemon dies the keeper answers in its place: ENODEV for what is /dev/iommu's, and everything else goes on as if nobody
listened.

The keeper is a child of the process that was started, which only waits: when CMD has ended before its children, that
one ends, and the keeper stays in the background until the last of them is gone. It is their subreaper, so that it is
the ancestor of all of them to the end.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import select
import signal
import socket
import struct
import sys
from typing import TYPE_CHECKING

from iommufd_uapi import seccomp

if TYPE_CHECKING:
    from .follower import Follower

SIGINFO = struct.Struct("<IiiI112x")  # struct signalfd_siginfo: signo, errno, code, pid
SI_KERNEL = 0x80  # a key on the terminal: the whole foreground group has it
FORWARDED = {signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2}
LONGEST = 65_536
OURS = "/memfd:iommufd"  # what /proc/PID/fd/N of the daemon's descriptors says
PATHS = (b"/dev/iommu", b"/dev/vfio/vfio")
KVM = b"/dev/kvm"
PATIENCE = 30.0  # seconds for the daemon to say its last words
EMPTY = bytes(seccomp.NOTIF.size)
PR_SET_PDEATHSIG = 1


HELLO_REPLY = struct.Struct("<IHHI36x")  # struct iofd_hello_reply: magic, version, kind, error


class RunError(RuntimeError):
    """CMD was not started, or has nobody to serve it; the message says why."""


def check_welcome(reply: bytes) -> None:
    """The daemon's reply to the hello. RunError."""
    if len(reply) < HELLO_REPLY.size:
        raise RunError("the daemon closed the connection; its log says why")
    number = HELLO_REPLY.unpack_from(reply)[3]
    if number:
        reason = reply[HELLO_REPLY.size :].decode(errors="replace")
        raise RunError(f"the daemon refuses: {reason or os.strerror(number)}")


class Keeper:
    """One run of CMD."""

    farewell = "/dev/iommu answers ENODEV from now on"  # when the daemon is gone
    kvm = False  # /dev/kvm was the daemon's too
    in_work: int | None = -errno.ENODEV  # the answer to the call it had in work; None: the kernel's

    def __init__(
        self,
        connection: socket.socket,
        listener: int,
        page: int,
        child: int,
        numbers: seccomp.Syscalls,
        *,
        front: int,
        welcome: bool,
        follower: Follower | None = None,
    ) -> None:
        """`front`: a pipe to wait_for_keeper(). `welcome`: the reply to the hello is still to come."""
        self.front = front
        self.follower = follower
        self.welcome = welcome
        self.connection = connection
        self.listener = listener
        self.page = mmap.mmap(page, seccomp.NOTIF_PAGE)
        self.child = child
        self.numbers = numbers
        self.daemon_lives = True
        self.verdict = 0  # the exit status if CMD's own is 0
        self._status: int | None = None  # of CMD
        self._signals = -1
        self._poll = select.poll()

    def run(self, *, last_words: bool) -> int:
        """Until CMD has ended (and, for its last words, the daemon); CMD's exit status."""
        self._signals = _signalfd(FORWARDED | {signal.SIGCHLD})
        for fd in (self._signals, self.connection.fileno()):
            self._poll.register(fd, select.POLLIN)
        if self.follower is not None:
            self._poll.register(self.follower, select.POLLIN)
        self._reap()
        while self._status is None:
            self._turn()
        self._outlive(self._status, last_words=last_words)
        return self._status or self.verdict

    def _turn(self) -> None:
        """Whatever comes next."""
        ready = dict(self._poll.poll())
        self._follow(ready)
        if self._signals in ready:
            self._signal(os.read(self._signals, SIGINFO.size))
        if self.connection.fileno() in ready:
            self._listen()
        if self.listener in ready:
            self.answer(ready[self.listener])

    def _follow(self, ready: dict[int, int]) -> None:
        """What the daemon tells of events."""
        follower = self.follower
        if follower is not None and follower.fileno() in ready and not follower.pump():
            self._poll.unregister(follower)
            follower.close()
            self.follower = None

    def _signal(self, data: bytes) -> None:
        number, _, _, sender = SIGINFO.unpack(data)
        if number == signal.SIGCHLD:
            self._reap()
        elif sender == os.getppid() and self._status is None:  # it passes on what is not CMD's already
            os.kill(self.child, number)

    def _reap(self) -> None:
        """CMD, what it has left behind, and a private daemon."""
        try:
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if ended[0] == self.child:
                    self._status = shell_status(ended[1])
        except ChildProcessError:
            pass

    def _listen(self) -> None:
        """What the daemon says, or that it is gone."""
        try:
            text = self.connection.recv(LONGEST)
        except OSError:
            text = b""
        if text and self.welcome:
            self.welcome = False
            try:
                check_welcome(text)
            except RunError as error:
                sys.stderr.write(f"iommufdctl: {error}\n")
        elif text.startswith(b"\0"):
            if len(text) == 2:
                self.verdict = text[1]
            else:
                self._hand_over(text)
        elif text:
            sys.stderr.write("".join(f"iommufd: {line}\n" for line in text.decode(errors="replace").splitlines()))
            sys.stderr.flush()
        elif self.daemon_lives:
            self.daemon_lives = False
            self._poll.unregister(self.connection.fileno())
            self._take_over()

    def _hand_over(self, packet: bytes) -> None:
        from .reach import hand_over

        try:
            hand_over(self.connection, packet, self.numbers)
        except OSError:
            pass  # which the next recv() will tell

    # ---- after CMD ----

    def _outlive(self, status: int, *, last_words: bool) -> None:
        """If other processes are left: stay for them, without a terminal or standard files."""
        if not self._processes_left():
            if last_words:
                self._last_words()
            self._finish_trace()
            return
        die_with_parent(0)
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        for fd in range(3):
            os.dup2(null, fd)
        os.write(self.front, status.to_bytes(4, "little"))
        os.close(self.front)
        while self.daemon_lives or self._processes_left():
            self._turn()
        self._finish_trace()

    def _processes_left(self) -> bool:
        poll = select.poll()
        poll.register(self.listener, 0)
        return not any(mask & select.POLLHUP for _, mask in poll.poll(0))

    def _last_words(self) -> None:
        """The daemon hangs up when it has said all."""
        self.connection.settimeout(PATIENCE)
        while self.daemon_lives:
            self._listen()

    def _finish_trace(self) -> None:
        """The rest: the daemon closes the socket when it has told all."""
        while self.follower is not None and self.follower.pump():
            pass

    # ---- in place of the daemon ----

    def _take_over(self) -> None:
        """Answer the call that the daemon had in work, and those that come."""
        if not self._processes_left():
            return
        sys.stderr.write(f"iommufdctl: the daemon is gone; {self.farewell}\n")
        sys.stderr.flush()
        current = int.from_bytes(self.page[:8], "little")
        if current:
            self._send(current, self.in_work)
        self._poll.register(self.listener, select.POLLIN)

    def answer(self, mask: int) -> None:
        """One notification, if there is one."""
        if not mask & select.POLLIN:
            self._poll.unregister(self.listener)
            return
        data = bytearray(EMPTY)
        try:
            fcntl.ioctl(self.listener, seccomp.SECCOMP_IOCTL_NOTIF_RECV, data)
        except OSError:
            return  # killed meanwhile
        notification, pid, _, nr, _, _, *args = seccomp.NOTIF.unpack(data)
        try:
            ours = self.is_ours(pid, nr, args)
        except (OSError, OverflowError):
            ours = False
        self._send(notification, -errno.ENODEV if ours else None)

    def is_ours(self, pid: int, nr: int, args: list[int]) -> bool:
        """Whether the call was the daemon's to answer. OSError."""
        numbers = self.numbers
        if nr in (numbers.open, numbers.openat, numbers.openat2):
            with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
                path = os.pread(memory.fileno(), 64, args[nr != numbers.open])
            path = path.partition(b"\0")[0]
            return path in PATHS or (path == KVM and self.kvm)
        fd = args[4 if nr == numbers.mmap else 0] & 0xFFFF_FFFF
        return os.readlink(f"/proc/{pid}/fd/{fd}").startswith(OURS)

    def _send(self, notification: int, answer: int | None) -> None:
        flags = seccomp.SECCOMP_USER_NOTIF_FLAG_CONTINUE if answer is None else 0
        response = seccomp.NOTIF_RESP.pack(notification, 0, answer or 0, flags)
        try:
            fcntl.ioctl(self.listener, seccomp.SECCOMP_IOCTL_NOTIF_SEND, response)
        except OSError:
            pass  # answered already, or killed


def wait_for_keeper(keeper: int, stays: int) -> int:
    """What the process that was started does: CMD's exit status, once CMD has ended.

    `stays` is a pipe: the keeper tells the status if it stays itself.
    """
    signals = _signalfd(FORWARDED)
    poll = select.poll()
    for fd in (signals, stays):
        poll.register(fd, select.POLLIN)
    while True:
        ready = dict(poll.poll())
        if signals in ready:
            number, _, code, _ = SIGINFO.unpack(os.read(signals, SIGINFO.size))
            if code != SI_KERNEL:  # else CMD has it already
                os.kill(keeper, number)
        if stays in ready:
            told = os.read(stays, 4)
            return int.from_bytes(told, "little") if told else shell_status(os.waitpid(keeper, 0)[1])


def shell_status(status: int) -> int:
    """As a shell tells it: 128+N for signal N."""
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def die_with_parent(number: int) -> None:
    """PR_SET_PDEATHSIG; 0 ends it."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number, 0, 0, 0)


def _signalfd(numbers: set[signal.Signals]) -> int:
    """A descriptor that tells of signals; they are blocked otherwise."""
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    mask = sum(1 << number - 1 for number in numbers)
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.signalfd(-1, ctypes.byref((ctypes.c_ulong * 16)(mask)), os.O_CLOEXEC)
    if fd < 0:
        raise OSError(ctypes.get_errno(), "signalfd")
    return int(fd)
