"""Room client: what `iommufdctl run` does while CMD runs.

It waits for CMD, passes signals on, prints what the daemon says. When the daemon dies the keeper answers in its
place: ENODEV for what is /dev/iommu's, and everything else goes on as if nobody listened. When CMD has ended before
its children, a copy of the keeper stays in the background until the last of them is gone.
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

from iommufd_uapi import seccomp

SIGINFO = struct.Struct("<Iii116x")  # struct signalfd_siginfo: signo, errno, code
SI_KERNEL = 0x80  # a key on the terminal: the whole foreground group has it
FORWARDED = {signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2}
LONGEST = 65_536
OURS = "/memfd:iommufd"  # what /proc/PID/fd/N of the daemon's descriptors says
PATHS = (b"/dev/iommu", b"/dev/vfio/vfio")
PATIENCE = 30.0  # seconds for the daemon to say its last words
EMPTY = bytes(seccomp.NOTIF.size)


HELLO_REPLY = struct.Struct("<IHHI36x")  # struct iofd_hello_reply: magic, version, kind, error


class RunError(RuntimeError):
    """CMD was not started, or has nobody to serve it; the message says why."""


def check_welcome(reply: bytes) -> None:
    """The daemon's reply to the hello. RunError."""
    if len(reply) != HELLO_REPLY.size:
        raise RunError("the daemon closed the connection; its log says why")
    number = HELLO_REPLY.unpack(reply)[3]
    if number:
        raise RunError(f"the daemon refuses: {os.strerror(number)}")


class Keeper:
    """One run of CMD."""

    def __init__(
        self,
        connection: socket.socket,
        listener: int,
        page: int,
        child: int,
        numbers: seccomp.Syscalls,
        *,
        welcome: bool,
    ) -> None:
        """`welcome`: the reply to the hello is still to come."""
        self.welcome = welcome
        self.connection = connection
        self.listener = listener
        self.page = mmap.mmap(page, seccomp.NOTIF_PAGE)
        self.child = child
        self.numbers = numbers
        self.daemon_lives = True
        self.verdict = 0  # the exit status if CMD's own is 0
        self._poll = select.poll()

    def run(self, *, last_words: bool) -> int:
        """Until CMD has ended (and, for its last words, the daemon); CMD's exit status."""
        exited, signals = os.pidfd_open(self.child), _signalfd()
        poll = self._poll
        for fd in (exited, signals, self.connection.fileno()):
            poll.register(fd, select.POLLIN)
        while True:
            ready = dict(poll.poll())
            if signals in ready:
                self._forward(os.read(signals, SIGINFO.size))
            if self.connection.fileno() in ready:
                self._listen()
            if self.listener in ready:
                self.answer(ready[self.listener])
            if exited in ready:
                break
        status = os.waitstatus_to_exitcode(os.waitpid(self.child, 0)[1])
        poll.unregister(exited)
        poll.unregister(signals)
        self._outlive(last_words=last_words)
        return status or self.verdict if status >= 0 else 128 - status

    def _forward(self, data: bytes) -> None:
        number, _, code = SIGINFO.unpack(data)
        if code != SI_KERNEL:  # else CMD has it already
            os.kill(self.child, number)

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
        elif text[:1] == b"\0":
            self.verdict = text[1]
        elif text:
            sys.stderr.write("".join(f"iommufd: {line}\n" for line in text.decode(errors="replace").splitlines()))
            sys.stderr.flush()
        elif self.daemon_lives:
            self.daemon_lives = False
            self._poll.unregister(self.connection.fileno())
            self._take_over()

    # ---- after CMD ----

    def _outlive(self, *, last_words: bool) -> None:
        """If other processes are left: a copy of us stays for them, without a terminal or standard files."""
        if not self._processes_left():
            if last_words:
                self._last_words()
            return
        if os.fork():
            return
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        for fd in range(3):
            os.dup2(null, fd)
        while self.daemon_lives or self._processes_left():
            for fd, mask in self._poll.poll():
                if fd == self.listener:
                    self.answer(mask)
                else:
                    self._listen()
        os._exit(0)

    def _processes_left(self) -> bool:
        poll = select.poll()
        poll.register(self.listener, 0)
        return not any(mask & select.POLLHUP for _, mask in poll.poll(0))

    def _last_words(self) -> None:
        """The daemon hangs up when it has said all."""
        self.connection.settimeout(PATIENCE)
        while self.daemon_lives:
            self._listen()

    # ---- in place of the daemon ----

    def _take_over(self) -> None:
        """Answer the call that the daemon had in work, and those that come."""
        if not self._processes_left():
            return
        sys.stderr.write("iommufdctl: the daemon is gone; /dev/iommu answers ENODEV from now on\n")
        sys.stderr.flush()
        current = int.from_bytes(self.page[:8], "little")
        if current:
            self._send(current, -errno.ENODEV)
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
            ours = self._is_ours(pid, nr, args)
        except (OSError, OverflowError):
            ours = False
        self._send(notification, -errno.ENODEV if ours else None)

    def _is_ours(self, pid: int, nr: int, args: list[int]) -> bool:
        """Whether the call was the daemon's to answer. OSError."""
        numbers = self.numbers
        if nr in (numbers.open, numbers.openat, numbers.openat2):
            with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
                path = os.pread(memory.fileno(), 64, args[nr != numbers.open])
            return path.partition(b"\0")[0] in PATHS
        fd = args[4 if nr == numbers.mmap else 0] & 0xFFFF_FFFF
        return os.readlink(f"/proc/{pid}/fd/{fd}").startswith(OURS)

    def _send(self, notification: int, answer: int | None) -> None:
        flags = seccomp.SECCOMP_USER_NOTIF_FLAG_CONTINUE if answer is None else 0
        response = seccomp.NOTIF_RESP.pack(notification, 0, answer or 0, flags)
        try:
            fcntl.ioctl(self.listener, seccomp.SECCOMP_IOCTL_NOTIF_SEND, response)
        except OSError:
            pass  # answered already, or killed


def _signalfd() -> int:
    """A descriptor that tells of the signals that are passed on; they are blocked otherwise."""
    signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
    mask = sum(1 << number - 1 for number in FORWARDED)
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.signalfd(-1, ctypes.byref((ctypes.c_ulong * 16)(mask)), os.O_CLOEXEC)
    if fd < 0:
        raise OSError(ctypes.get_errno(), "signalfd")
    return int(fd)
