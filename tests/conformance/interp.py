"""The interpreter of ioctl programs: its output is that of the C runner, byte for byte.

A step prints as it goes, so that a signal or a program error leaves the line cut where C would leave it.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

from iommufdd.user import PAGE_SIZE

from .errnos import errno_name
from .memory import Signal
from .names import BUF_STEP, NOWHERE, Names
from .parse import MAX_BYTES, U64, Line, Options, ProgramError, c_int, c_long, fill_bytes, number, prot_of, unhex
from .process import GUARD_BASE, GUARD_BYTES, MAP_FIXED_NOREPLACE, MAP_PRIVATE, MAP_SHARED, answer

if TYPE_CHECKING:
    from collections.abc import Callable

    from .process import Process

KINDS = {  # shared, memfd, huge
    "anon": (False, False, False),
    "shared": (True, False, False),
    "anonhuge": (False, False, True),
    "sharedhuge": (True, False, True),
    "memfd": (True, True, False),
    "memfdhuge": (True, True, True),
}


class Interp(Names):
    """One process at work on a program: its names, and where it is."""

    def __init__(self, program: list[Line], process: Process, out: list[str]) -> None:
        super().__init__()
        self.program = program
        self.process = process
        self.out = out  # pieces of the output
        self.at = 0
        self.in_child = False
        self.skip = False

    def run(self) -> bool:
        """To the end of the program, or of the child; False after a program error."""
        while self.at < len(self.program):
            line = self.program[self.at]
            self.at += 1
            try:
                if line[0] == "child":
                    if not self.child(line):
                        return True
                elif not self.skip:
                    self.step(line)
            except ProgramError as error:
                self.print(f"{line.number} PROGRAM-ERROR {error}\n")
                return False
        self.print("end\n")
        return True

    def print(self, text: str) -> None:
        self.out.append(text)

    def child(self, line: Line) -> bool:
        """`child begin` forks and waits; `child end`; False where the child exits."""
        if line[1] == "begin":
            self.print(f"{line.number} child begin{line.end}\n")
            other = self.fork()
            try:
                other.run()
            finally:
                other.process.exit()
            self.skip = True
            return True
        if self.in_child:
            return False
        self.skip = False
        self.print(f"{line.number} child end{line.end}\n")
        return True

    def fork(self) -> Interp:
        other = Interp(self.program, self.process.fork(), self.out)
        other.at = self.at
        other.inherit(self)
        other.in_child = True
        other.skip = self.skip
        return other

    def step(self, line: Line) -> None:
        self.print(f"{line.number} {line[0]}")
        handler = STEPS.get(line[0])
        if handler is None:
            raise ProgramError(f"unknown op {line[0]}")
        try:
            handler(self, line)
        except Signal as signal:
            self.print(f" {signal}")
        self.print(f"{line.end}\n")

    # Pieces of output.

    def result(self, rc: int, error: int) -> None:
        self.print(f" rc={rc} e={errno_name(error if rc < 0 else 0)}")

    def call(self, call: Callable[[], int | None]) -> None:
        self.result(*answer(call))

    def new_fd(self, name: str, call: Callable[[], int]) -> tuple[int, int]:
        """A system call that answers with a descriptor: (0 or -1, errno)."""
        fd, error = answer(call)
        self.fds.set(name, fd)
        return min(fd, 0), error

    # Steps: files.

    def open(self, line: Line) -> None:
        path = line[2] if len(line) > 2 else "/dev/iommu"
        rc, error = self.new_fd(line[1], lambda: self.process.open(path))
        self.print(f" {line[1]} {path}")
        self.result(rc, error)

    def close(self, line: Line) -> None:
        fd = self.getfd(line[1])
        self.print(f" {line[1]}")
        self.call(lambda: self.process.close(fd))
        self.fds.set(line[1], -1)

    def dup(self, line: Line) -> None:
        fd = self.getfd(line[2])
        rc, error = self.new_fd(line[1], lambda: self.process.dup(fd))
        self.print(f" {line[1]} {line[2]}")
        self.result(rc, error)

    def eventfd(self, line: Line) -> None:
        rc, error = self.new_fd(line[1], self.process.eventfd)
        self.print(f" {line[1]}")
        self.result(rc, error)

    def poll(self, line: Line) -> None:
        events = self.expr(line[2]) & 0xFFFF
        revents = self.process.poll(self.getfd(line[1]), events)
        self.print(f" {line[1]}")
        self.result(int(revents != 0), 0)
        self.print(f" revents=0x{revents:x}")

    def lseek(self, line: Line) -> None:
        fd, offset = self.getfd(line[1]), c_long(self.expr(line[2]))
        self.print(f" {line[1]}")
        self.call(lambda: self.process.lseek(fd, offset))

    def read(self, line: Line) -> None:
        size = self.expr(line[2])
        if size > MAX_BYTES:
            raise ProgramError("read too long")
        at = line.option("at")
        addr = GUARD_BASE + GUARD_BYTES - size
        if at is not None:
            addr = self.bufaddr(at)
        else:
            self.process.space.store(addr, b"\xa5" * size)
        rc, error = answer(lambda: self.process.read(self.getfd(line[1]), addr, size))
        options = Options()
        for token in line.tokens[3:]:
            if not token.startswith("at="):
                options.parse(token, bytearray(size), self)
        options.patches.clear()  # C would patch what was read
        self.print(f" {line[1]} {size}")
        self.result(rc, error)
        self.print(" data=")
        data = self.process.space.load(addr, max(rc, 0))
        self.print(options.masked(data, ok=True))
        self.after(options, data, ok=rc > 0)

    def write(self, line: Line) -> None:
        data = unhex(line[2])
        at = line.option("at")
        options = Options()
        for token in line.tokens[3:]:
            if not token.startswith("at="):
                options.parse(token, data, self)
        addr = GUARD_BASE + GUARD_BYTES - len(data)
        if at is not None:
            addr = self.bufaddr(at)
        else:
            self.process.space.store(addr, data)
        rc, error = answer(lambda: self.process.write(self.getfd(line[1]), addr, len(data)))
        self.print(f" {line[1]} {len(data)}")
        self.result(rc, error)

    # Steps: mappings.

    def buf(self, line: Line) -> None:
        size, addr = self.expr(line[3]), number(line.option("addr") or "0")
        pattern, prot_text = line.option("fill"), line.option("prot")
        prot = prot_of(prot_text) if prot_text is not None and pattern is None else 3
        if line[2] not in KINDS:
            raise ProgramError(f"bad buffer kind {line[2]}")
        shared, memfd, huge = KINDS[line[2]]
        fd = None
        if memfd:
            self.new_fd(line[1], lambda: self.process.memfd_create(c_long(size), huge=huge))
            fd = self.getfd(line[1])
        addr = addr or self.place()
        flags = MAP_FIXED_NOREPLACE | (MAP_SHARED if shared else MAP_PRIVATE)
        rc, error = answer(lambda: self.process.mmap(addr, size, prot, flags, fd, huge=huge))
        self.print(f" {line[1]} {line[2]} 0x{size:x}")
        self.bufs.set(line[1], (self.next_addr - BUF_STEP, 0) if rc else (addr, size))
        if not rc and pattern is not None:
            self.store_fill(addr, pattern, size)
            if prot_text is not None:
                answer(lambda: self.process.space.mprotect(addr, size, prot_of(prot_text)))
        self.result(rc, error)

    def alias(self, line: Line) -> None:
        addr, size = self.place(), self.expr(line[3])
        offset = self.expr(line[4]) if len(line) > 4 else 0
        flags = MAP_SHARED | MAP_FIXED_NOREPLACE
        rc, error = answer(lambda: self.process.mmap(addr, size, 3, flags, self.getfd(line[2]), offset))
        self.bufs.set(line[1], (0, 0) if rc else (addr, size))
        self.print(f" {line[1]} {line[2]}")
        self.result(rc, error)

    def mmapfd(self, line: Line) -> None:
        offset, size = self.expr(line[3]), self.expr(line[4])
        addr, prot = self.place(), prot_of(line[5])
        flags = MAP_FIXED_NOREPLACE | (MAP_PRIVATE if line[6] == "private" else MAP_SHARED)
        rc, error = answer(lambda: self.process.mmap(addr, size, prot, flags, self.getfd(line[2]), offset))
        self.print(f" {line[1]} {line[2]} off=0x{offset:x} len=0x{size:x}")
        if not rc:
            self.bufs.set(line[1], (addr, size))
        self.result(rc, error)

    def munmap(self, line: Line) -> None:
        addr, size = self.bufs.get(line[1]) or (NOWHERE, PAGE_SIZE)
        if len(line) > 3:
            addr, size = addr + self.expr(line[2]) & U64, self.expr(line[3])
        self.print(f" {line[1]}")
        self.call(lambda: self.process.space.munmap(addr, size))

    def mprotect(self, line: Line) -> None:
        base, _ = self.bufs.get(line[1]) or (NOWHERE, PAGE_SIZE)
        addr, size, prot = base + self.expr(line[2]) & U64, self.expr(line[3]), prot_of(line[4])
        self.print(f" {line[1]}")
        self.call(lambda: self.process.space.mprotect(addr, size, prot))

    def seal(self, line: Line) -> None:
        fd, seals = self.getfd(line[1]), c_int(self.expr(line[2]))
        self.print(f" {line[1]}")
        self.call(lambda: self.process.add_seals(fd, seals))

    def ftruncate(self, line: Line) -> None:
        fd, length = self.getfd(line[1]), c_long(self.expr(line[2]))
        self.print(f" {line[1]}")
        self.call(lambda: self.process.ftruncate(fd, length))

    # Steps: bytes and variables.

    def load(self, line: Line) -> None:
        addr = self.bufaddr(line[2]) + self.expr(line[3]) & U64
        width = self.expr(line[4]) if len(line) > 4 else 8
        value = int.from_bytes(self.process.space.load(addr, min(width, 8)), "little")
        self.vars.set(line[1], value)
        self.print(f" {line[1]}=0x{value:x}")

    def set(self, line: Line) -> None:
        value = self.expr(line[2])
        self.vars.set(line[1], value)
        if self.vars.get(line[1]) is None:  # C reads the variable back, and finds none with such a long name
            raise Signal("SIGSEGV")
        self.print(f" {line[1]}=0x{value:x}")

    def poke(self, line: Line) -> None:
        addr, data = self.bufaddr(line[1]) + self.expr(line[2]) & U64, unhex(line[3])
        options = Options()
        for token in line.tokens[4:]:
            options.parse(token, data, self)
        self.process.space.store(addr, data)
        self.print(f" {line[1]}+0x{self.expr(line[2]):x} {len(data)}")

    def fill(self, line: Line) -> None:
        addr = self.bufaddr(line[1]) + self.expr(line[2]) & U64
        self.store_fill(addr, line[4], self.expr(line[3]))
        self.print(f" {line[1]}")

    def store_fill(self, addr: int, pattern: str, size: int) -> None:
        """No more than a little beyond the first fault is made up."""
        space = self.process.space
        space.store(addr, fill_bytes(pattern, min(size, space.writable(addr, size) + 8)))

    def look(self, line: Line) -> bytes:
        offset = self.expr(line[2])
        data = self.process.space.load(self.bufaddr(line[1]) + offset & U64, self.expr(line[3]))
        self.print(f" {line[1]}+0x{offset:x}")
        return data

    def dump(self, line: Line) -> None:
        data = self.look(line)
        self.print(f" {data.hex()}")

    def crc(self, line: Line) -> None:
        data = self.look(line)
        nonzero = len(data) - data.count(0)
        self.print(f" len=0x{len(data):x} crc={zlib.crc32(data):08x} nonzero={nonzero}")

    # Steps: ioctls.

    def command(self, text: str) -> int:
        cmd = number(text)
        return cmd if cmd > 0xFF else cmd | ord(";") << 8

    def ioctl(self, line: Line) -> None:
        cmd, data = self.command(line[2]), unhex(line[3])
        at, retfd = line.option("at"), line.option("retfd")
        options = Options()
        for token in line.tokens[4:]:
            if not token.startswith(("at=", "retfd=")) and not options.parse(token, data, self):
                raise ProgramError(f"bad token {token}")
        addr, size = self.argument(at, data)
        rc, error = answer(lambda: self.process.ioctl(self.getfd(line[1]), cmd, addr))
        self.print(f" {line[1]} {cmd & 0xFF:02x}" + (f"({cmd:x})" if cmd >> 8 != ord(";") else ""))
        self.ioctl_result(rc, error, retfd)
        after = self.process.space.load(addr, size)
        self.print(f" out={options.masked(after, ok=rc >= 0)}")
        self.after(options, after, ok=rc >= 0)

    def argument(self, at: str | None, data: bytearray) -> tuple[int, int]:
        """Puts the struct where it belongs: its address, and how many bytes of it are printed."""
        if at is not None and at.startswith("ro:"):
            return self.bufaddr(at[3:]), 0
        addr = GUARD_BASE + GUARD_BYTES - len(data) if at is None else self.bufaddr(at)
        self.process.space.store(addr, data)
        return addr, len(data)

    def ioctl_result(self, rc: int, error: int, retfd: str | None) -> None:
        if retfd is not None and rc >= 0:
            self.fds.set(retfd, rc)
            self.print(" rc=fd e=0")
            return
        if retfd is not None:
            self.fds.set(retfd, -1)
        self.result(rc, error)

    def after(self, options: Options, data: bytes, *, ok: bool) -> None:
        """Saves and new descriptors."""
        for after in options.after:
            part = data[after.offset : after.offset + after.width]
            whole = len(part) == after.width
            if after.kind == "s":
                self.vars.set(after.name, int.from_bytes(part, "little") if whole else 0)
            elif after.kind == "f":
                self.fds.set(after.name, c_int(int.from_bytes(part, "little")) if ok and whole else -1)

    def ioctlv(self, line: Line) -> None:
        cmd, arg = self.command(line[2]), self.expr(line[3])
        rc, error = answer(lambda: self.process.ioctl(self.getfd(line[1]), cmd, arg))
        self.print(f" {line[1]} {cmd & 0xFF:02x} arg={line[3]}")
        self.result(rc, error)

    # Steps: the process.

    def rlimit(self, line: Line) -> None:
        limit = self.expr(line[1])
        self.print(f" 0x{limit:x}")
        self.call(lambda: self.process.set_memlock(limit))

    def uid(self, line: Line) -> None:
        uid = self.expr(line[1]) & 0xFFFFFFFF
        self.call(lambda: self.process.setresuid(uid))

    def vmpin(self, line: Line) -> None:
        self.print(f" VmPin:{self.process.driver.pinned_kib(self.process)[0]}")

    def vmlck(self, line: Line) -> None:
        self.print(f" VmLck:{self.process.driver.pinned_kib(self.process)[1]}")

    def echo(self, line: Line) -> None:
        """The label says it."""


STEPS: dict[str, Callable[[Interp, Line], None]] = {
    name: getattr(Interp, name)
    for name in (
        *("open", "close", "dup", "eventfd", "poll", "lseek", "read", "write"),
        *("buf", "alias", "mmapfd", "munmap", "mprotect", "seal", "ftruncate"),
        *("load", "set", "poke", "fill", "dump", "crc"),
        *("ioctl", "ioctlv", "rlimit", "uid", "vmpin", "vmlck", "echo"),
    )
}


def replay(program: list[Line], process: Process, out: list[str]) -> None:
    """Append the pieces of a program's output; the process has exited then."""
    try:
        Interp(program, process, out).run()
    finally:
        process.exit()


def output_of(program: list[Line], process: Process) -> str:
    """The whole output of a program."""
    out: list[str] = []
    replay(program, process, out)
    return "".join(out)
