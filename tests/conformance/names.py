"""The names of a program: descriptors, buffers and variables live in three separate name spaces."""

from __future__ import annotations

from typing import Generic, TypeVar

from .parse import U64, ProgramError, c_int, number, terms

BUF_BASE = 0x200000000000
BUF_STEP = 1 << 32
NOWHERE = 0x1E0000000000  # the address of an unknown buffer: nothing is ever mapped there

T = TypeVar("T")


class Table(Generic[T]):
    """One name space; names are cut to 47 bytes when they are stored."""

    def __init__(self, what: str, limit: int) -> None:
        self.what = what
        self.limit = limit
        self.entries: dict[str, T] = {}

    def get(self, name: str) -> T | None:
        return self.entries.get(name)

    def set(self, name: str, value: T) -> None:
        if len(self.entries) >= self.limit and name[:47] not in self.entries:
            raise ProgramError(f"too many {self.what}")
        self.entries[name[:47]] = value

    def copy(self) -> Table[T]:
        other: Table[T] = Table(self.what, self.limit)
        other.entries.update(self.entries)
        return other


class Names:
    """What a process knows by name, and where its next mapping goes. A `parse.Lookup`."""

    def __init__(self) -> None:
        self.fds: Table[int] = Table("fds", 512)
        self.bufs: Table[tuple[int, int]] = Table("buffers", 512)  # address, size
        self.vars: Table[int] = Table("vars", 2048)
        self.next_addr = BUF_BASE

    def inherit(self, parent: Names) -> None:
        """fork(): copies of all the parent's."""
        self.fds, self.bufs, self.vars = parent.fds.copy(), parent.bufs.copy(), parent.vars.copy()
        self.next_addr = parent.next_addr

    def place(self) -> int:
        """The address of the next mapping; a failed one uses it up as well."""
        self.next_addr += BUF_STEP
        return self.next_addr - BUF_STEP

    def expr(self, text: str) -> int:
        """Numbers and variables joined by + and -; an unknown variable is 0."""
        total = 0
        for sign, term in terms(text):
            total += sign * (number(term) if term[:1].isdigit() else self.vars.get(term) or 0)
        return total & U64

    def bufaddr(self, text: str) -> int:
        """BUF[+EXPR]"""
        cut = min((text.find(sign) for sign in "+-" if sign in text), default=len(text))
        if cut > 63:
            raise ProgramError("buf too long")
        base, _ = self.bufs.get(text[:cut]) or (NOWHERE, 0)
        return base + self.expr(text[cut:]) & U64

    def getfd(self, text: str) -> int:
        """A name, or =N; -1 for an unknown one."""
        if text[:1] == "=":
            return c_int(number(text[1:]))
        fd = self.fds.get(text)
        return -1 if fd is None else fd
