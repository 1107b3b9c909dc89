"""Descriptors for callers of a mount.

FUSE cannot put a descriptor into a process. So the calling thread opens the file again: it is traced while it waits
for its ioctl, is answered, stops before it returns to user mode, and there makes system calls of ours: mmap() for a
page that holds a path, openat() of /proc/thread-self/fd/N, for which the kernel asks us and gets the new file,
munmap(). Only then the ioctl is carried out, with a number that is known to be good; its result is written to the
thread's registers, and it goes on.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from logging import WARNING
from typing import TYPE_CHECKING

from iommufd_uapi.seccomp import MARK
from iommufdd.errors import EMFILE, EOPNOTSUPP, IommufdError
from iommufdd.server import log
from iommufdd.server.seccomp.listener import ANSWERED, Listener

from . import abi
from .ptrace import (
    CS,
    ORIG_RAX,
    RAX,
    RDI,
    RIP,
    SYSCALL_INSN,
    SYSCALL_STOP,
    USER_CS,
    WORD,
    GoneError,
    Tracee,
    call_registers,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from iommufdd.server.instance import OpenContext

    from .caller import Thread
    from .files import Opened
    from .session import Session

CLOSE, LSEEK, MMAP, MUNMAP, IOCTL, OPENAT = 3, 8, 9, 11, 16, 257  # x86-64
AT_FDCWD = -100
PAGE = 4096
PATIENCE = 2.0  # seconds for the thread to come to a stop, when the host is overloaded
ERRORS = range(-4095, 0)


class RefusedError(Exception):
    """There will be no descriptor; why, and the errno that the core is to give."""

    def __init__(self, why: str, number: int = 0) -> None:
        super().__init__(why)
        full = number in (errno.EMFILE, errno.ENFILE)
        self.error: IommufdError = EMFILE(why) if full else EOPNOTSUPP(f"no descriptor for the caller: {why}")


class StuckError(Exception):
    """A thread did not stop in time (it is frozen, or the host is)."""


class Injection:
    """One thread that is made to carry out calls."""

    def __init__(self, session: Session, thread: Thread, context: OpenContext, *, seekable: bool) -> None:
        """OSError when it may not be traced."""
        if os.uname().machine != "x86_64":
            raise OSError(errno.ENOSYS, "only on x86-64")
        self.session = session
        self.thread = thread
        self.context = context
        self.slot: Opened | None = None
        self._seekable = seekable
        self._registers: list[int] = []
        self._tracee = Tracee(thread.tid)

    def open(self) -> Opened:
        """The kernel asks for the file that our openat() opens."""
        self.slot = self.session.open_files.add(self.context, None, token=self._seekable)
        return self.slot

    def begin(self) -> None:
        """The request has been answered; the thread stops. GoneError, StuckError, OSError."""
        self._stop()
        self._tracee.block_signals()
        self._registers = self._tracee.registers()

    def new_descriptor(self) -> int:
        """Its number in the thread. RefusedError, GoneError, OSError."""
        mm, registers = self.thread.process.mm, self._registers
        self._check(IOCTL)
        page = self._call(MMAP, 0, PAGE, 3, 0x22, -1, 0)  # PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS
        if page in ERRORS:
            raise RefusedError(f"mmap: {os.strerror(-page)}")
        try:
            os.pwrite(mm.mem, b"/proc/thread-self/fd/%d\0" % (registers[RDI] & 0xFFFF_FFFF), page)
            number = self._call(OPENAT, AT_FDCWD, page, os.O_RDWR | os.O_CLOEXEC, 0)
        finally:
            self._call(MUNMAP, page, PAGE)
        if number in ERRORS:
            raise RefusedError(f"open: {os.strerror(-number)}", -number)
        if self.slot is None:
            self.close(number)
            raise RefusedError("what it opened is not this mount")
        if self.slot.token:
            self._call(LSEEK, number, self.slot.token, os.SEEK_SET)
        return number

    def _check(self, number: int) -> None:
        """Whether the thread has made this system call in a way that can be repeated. RefusedError, OSError."""
        registers, length = self._registers, len(SYSCALL_INSN)
        instruction = os.pread(self.thread.process.mm.mem, length, registers[RIP] - length)
        if registers[CS] != USER_CS or registers[ORIG_RAX] != number or instruction != SYSCALL_INSN:
            raise RefusedError("the call was not made by the instruction syscall")

    def map(self, number: int, args: list[int]) -> int:
        """Its mmap() again, of another descriptor that it has, which is closed. RefusedError, GoneError, OSError."""
        self._check(MMAP)
        addr, length, prot, flags, _, offset = args
        rc = self._call(MMAP, addr, length, prot, flags, MARK << 32 | number, offset)
        self.close(number)
        return rc

    def close(self, number: int) -> None:
        """GoneError, OSError."""
        self._call(CLOSE, number)

    def finish(self, rc: int) -> None:
        """The ioctl returns rc. A thread that was killed must be waited for: else its parent never can."""
        if self._registers:
            self._registers[RAX] = rc & WORD
            try:
                self._tracee.set_registers(self._registers)
            except OSError:
                pass  # it has been killed
        try:
            while not self._tracee.let_go():
                self._stop()
        except GoneError:
            pass
        except StuckError:
            self.session.stuck.append(self)

    def freed(self) -> bool:
        """A thread that did not stop in time: let it go if it has by now. Its ioctl returns EIO."""
        try:
            if not self._tracee.stopped():
                return False
            self._registers = self._registers or self._tracee.registers()
        except (GoneError, OSError):
            return True
        self.finish(-errno.EIO)
        return True

    def _call(self, number: int, *args: int) -> int:
        """The result of a system call. GoneError, StuckError, OSError."""
        self._tracee.set_registers(call_registers(self._registers, number, args))
        for _ in ("begin", "end"):
            self._tracee.resume()
            while (kind := self._stop()) != SYSCALL_STOP:
                if kind == signal.SIGSTOP:
                    self._tracee.hold(kind)
                self._tracee.resume()
        result = self._tracee.registers()[RAX]
        return result - (1 << 64) if result >> 63 else result

    def _stop(self) -> int:
        """Wait for a stop, and answer requests meanwhile: one of them is its own. GoneError, StuckError."""
        end = time.monotonic() + PATIENCE
        while not (kind := self._tracee.stopped()):
            if not self.session.pump():
                os.sched_yield()
                if time.monotonic() > end:
                    raise StuckError("the thread does not stop")
        return kind


def ioctl_with_descriptor(
    session: Session, thread: Thread, context: OpenContext, unique: int, call: tuple[int, int], *, seekable: bool
) -> int | None:
    """An ioctl that gives a descriptor: its result, or None when the thread has it already. StaleError."""
    try:
        injection = Injection(session, thread, context, seekable=seekable)
    except OSError as error:
        _refuse(session, thread, RefusedError(f"it cannot be traced: {error.strerror}"))
        return session.ioctl(thread, context.ctx, *call)
    _carry_out(
        injection,
        lambda: session.reply(unique, abi.IOCTL_OUT.pack(0, 0, 0, 0)),
        lambda: _stopped(session, thread, context, call),
    )
    return None


def map_in_caller(
    session: Session, thread: Thread, listener: Listener, file: tuple[OpenContext, int], args: list[int]
) -> int:
    """A notified mmap() carried out on a descriptor of ours: minus an errno, or ANSWERED when the thread has it.

    ENODEV where the thread cannot be traced, ENOMEM when it has no number left.
    """
    context, own = file
    try:
        injection = Injection(session, thread, context, seekable=False)
    except OSError as error:
        if error.errno != errno.ESRCH:  # else it has been killed
            _say_refused(session, thread, f"it cannot be traced: {error.strerror}")
        return -errno.ENODEV
    made = -errno.ENODEV

    def answer() -> None:
        nonlocal made
        try:
            made = listener.add(own)
        except OSError:
            made = -errno.ENOMEM
        listener.send(0)

    def work() -> int:
        try:
            return injection.map(made, args) if made >= 0 else made
        except RefusedError as refused:
            _say_refused(session, thread, str(refused))
            injection.close(made)
            return -errno.ENODEV

    rc = _carry_out(injection, answer, work)
    return rc if rc in ERRORS else ANSWERED


def _carry_out(injection: Injection, answer: Callable[[], object], work: Callable[[], int]) -> int:
    """Answer a thread, which stops then; what it finds as the result of its call, or EIO."""
    session, thread = injection.session, injection.thread
    session.injection = injection
    rc = -errno.EIO
    try:
        answer()
        injection.begin()
        rc = work()
    except StuckError as error:
        log.event(WARNING, "caller-lost", pid=thread.tid, why=error)
        session.stuck.append(injection)
        return rc
    except GoneError:
        pass  # killed
    except OSError as error:
        if error.errno != errno.ESRCH:
            log.event(WARNING, "caller-lost", pid=thread.tid, why=error.strerror)
    except Exception:
        injection.finish(rc)
        raise
    finally:
        session.injection = None
    injection.finish(rc)
    return rc


def _stopped(session: Session, thread: Thread, context: OpenContext, call: tuple[int, int]) -> int:
    """While the thread is stopped. GoneError, OSError."""
    injection = session.injection
    assert injection is not None
    number = -1
    try:
        number = injection.new_descriptor()
        thread.files.offer(number, injection.slot, None)
    except RefusedError as refused:
        _refuse(session, thread, refused)
    session.clock.now += 1
    rc = session.ioctl(thread, context.ctx, *call)
    if number >= 0 and not thread.files.installed:
        injection.close(number)
    return rc


def _refuse(session: Session, thread: Thread, why: RefusedError) -> None:
    thread.files.offer(-1, None, why.error)
    if why.error.errno != errno.EMFILE:
        _say_refused(session, thread, str(why))


def _say_refused(session: Session, thread: Thread, why: str) -> None:
    if session.server.ratelimit("no-descriptor"):
        log.event(WARNING, "no-descriptor", pid=thread.tid, why=why)
