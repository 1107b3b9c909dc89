"""Making a stopped thread carry out system calls of ours (ptrace(2)); x86-64 only."""

from __future__ import annotations

import ctypes
import os
import signal
import struct

PTRACE_GETREGS = 12
PTRACE_SETREGS = 13
PTRACE_DETACH = 17
PTRACE_SYSCALL = 24
PTRACE_SEIZE = 0x4206
PTRACE_INTERRUPT = 0x4207
PTRACE_GETSIGMASK = 0x420A
PTRACE_SETSIGMASK = 0x420B
PTRACE_O_TRACESYSGOOD = 1
WALL = 0x4000_0000  # __WALL: children by clone() too

REGISTERS = struct.Struct("<27Q")  # struct user_regs_struct
R10, R9, R8, RAX, RDX, RSI, RDI, ORIG_RAX, RIP, CS = 7, 8, 9, 10, 12, 13, 14, 15, 16, 17
ARGUMENTS = (RDI, RSI, RDX, R10, R8, R9)
USER_CS = 0x33  # of 64-bit code
SYSCALL_INSN = b"\x0f\x05"
SYSCALL_STOP = signal.SIGTRAP | 0x80
ALL_SIGNALS = 2**64 - 1
NO_SYSCALL = 2**64 - 1
WORD = 2**64 - 1

_libc = ctypes.CDLL(None, use_errno=True)
_ptrace = _libc.ptrace
_ptrace.restype = ctypes.c_long
_ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]


class GoneError(Exception):
    """The thread has been killed."""


class Tracee:
    """A thread that will stop before it returns to user mode. Its signals wait until it is let go."""

    def __init__(self, tid: int) -> None:
        """OSError when it may not be traced, or is traced by another."""
        self.tid = tid
        self._buffer = ctypes.create_string_buffer(REGISTERS.size)
        self._mask: ctypes.c_uint64 | None = None  # its own, while every signal is blocked
        self._held: list[int] = []  # signals that cannot be blocked
        _check(PTRACE_SEIZE, tid, 0, PTRACE_O_TRACESYSGOOD)
        try:
            _check(PTRACE_INTERRUPT, tid)
        except OSError:
            _ptrace(PTRACE_DETACH, tid, 0, 0)
            raise

    def stopped(self) -> int:
        """Which signal or kind of stop it has stopped with; 0 when it has not yet. GoneError."""
        try:
            found, status = os.waitpid(self.tid, os.WNOHANG | WALL)
        except ChildProcessError:
            raise GoneError from None
        if not found:
            return 0
        if not os.WIFSTOPPED(status):
            raise GoneError
        return os.WSTOPSIG(status) or 1

    def block_signals(self) -> None:
        """OSError."""
        mask, every = ctypes.c_uint64(), ctypes.c_uint64(ALL_SIGNALS)
        _check(PTRACE_GETSIGMASK, self.tid, 8, ctypes.addressof(mask))
        _check(PTRACE_SETSIGMASK, self.tid, 8, ctypes.addressof(every))
        self._mask = mask

    def registers(self) -> list[int]:
        """OSError."""
        _check(PTRACE_GETREGS, self.tid, 0, ctypes.addressof(self._buffer))
        return list(REGISTERS.unpack(self._buffer.raw))

    def set_registers(self, registers: list[int]) -> None:
        """OSError."""
        self._buffer.raw = REGISTERS.pack(*registers)
        _check(PTRACE_SETREGS, self.tid, 0, ctypes.addressof(self._buffer))

    def resume(self) -> None:
        """As far as the next begin or end of a system call. OSError."""
        _check(PTRACE_SYSCALL, self.tid)

    def hold(self, number: int) -> None:
        """A signal that it stopped for, to be sent again at the end."""
        self._held.append(number)

    def let_go(self) -> bool:
        """Its own signal mask again, and on it goes; False when it is not stopped: it has been killed."""
        if self._mask is not None:
            _ptrace(PTRACE_SETSIGMASK, self.tid, 8, ctypes.addressof(self._mask))
        if _ptrace(PTRACE_DETACH, self.tid, 0, 0) < 0:
            return False
        for number in self._held:
            try:
                os.kill(self.tid, number)
            except OSError:
                pass
        return True


def call_registers(registers: list[int], number: int, args: tuple[int, ...]) -> list[int]:
    """The registers with which the `syscall` instruction before the instruction pointer makes another call."""
    changed = registers.copy()
    changed[RAX] = number
    changed[ORIG_RAX] = NO_SYSCALL  # nothing to restart
    changed[RIP] -= len(SYSCALL_INSN)
    for where, value in zip(ARGUMENTS, args, strict=False):
        changed[where] = value & WORD
    return changed


def _check(request: int, tid: int, addr: int = 0, data: int = 0) -> None:
    if _ptrace(request, tid, addr, data) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
