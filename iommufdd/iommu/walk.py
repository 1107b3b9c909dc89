"""What all walkers of page tables share: the access asked for, what a walk finds, and why it stops.

A walker is a pure function of one table format: it reads entries through `fetch` and, for a cached walk, sets accessed
and dirty bits through `update`. A fresh walk passes no `update` and has no side effects.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import NamedTuple, Self, TypeAlias

# An access is an OR of these. A set of accesses is an int with bit `1 << access` for each member.
READ = 1
WRITE = 2
EXEC = 4
PRIV = 8

RawStep: TypeAlias = tuple[int, int, int, int]  # the fields of a Step: walkers have no time for more
Fetch: TypeAlias = Callable[[int], int]  # the 64 bit entry at an address
Update: TypeAlias = Callable[[int, int, int], None]  # address, old, new: sets bits in the entry


class Why(enum.Enum):
    """Why a translation has no result. Models turn it into their own fault codes."""

    NOT_PRESENT = "not present"
    RESERVED = "a reserved bit is set"
    USER = "supervisor page, user request"
    READ = "no read permission"
    WRITE = "no write permission"
    EXECUTE = "no execute permission"
    CANONICAL = "the address is not canonical"
    ADDRESS_SIZE = "the address is beyond the table's input size"
    OUTPUT_SIZE = "the address in the entry is beyond the output size"
    ACCESS_FLAG = "the access flag is clear"
    UNREADABLE = "the entry cannot be read"
    NO_EXECUTE_REQUESTS = "execute requests are not enabled"
    NO_SUPERVISOR_REQUESTS = "supervisor requests are not enabled"
    INTERRUPT = "the address belongs to interrupts"
    CONTEXT = "the requester has no translation"
    BLOCKED = "the translation is set to abort"
    STALE = "the translation should have been flushed"


class During(enum.Enum):
    """What was being translated when stage 2 stopped."""

    ACCESS = "the access"
    WALK = "the address of a stage-1 entry"
    UPDATE = "the update of a stage-1 entry"
    CONTEXT = "the address of a context structure"


class Step(NamedTuple):
    """One entry that a walk has used."""

    stage: int
    level: int  # of the entry: 1 maps the smallest pages; 0 is a context structure, -1 one that leads to it
    address: int  # of the entry
    entry: int


class TranslationFault(Exception):
    """A translation without result. `addr`: the input address of the stage that stopped."""

    code = 0  # the model's fault reason
    name = ""  # of the code, in the specification's words
    steps: tuple[Step, ...] = ()
    stalled = False  # the transaction waits until the driver says what becomes of it (SMMUv3)

    def __init__(self, why: Why, *, stage: int, level: int, addr: int, during: During = During.ACCESS) -> None:
        self.why = why
        self.stage = stage
        self.level = level
        self.addr = addr
        self.during = during
        super().__init__(why)

    def bare(self) -> Self:
        """To be kept: without the frames that it came through, which hold the memory they have walked."""
        self.__traceback__ = self.__context__ = self.__cause__ = None
        return self

    def __str__(self) -> str:
        text = f"fault {self.code:#x}: {self.name}" if self.name else self.why.value
        if self.stage:
            text += f" (stage {self.stage} level {self.level} address {self.addr:#x})"
        if self.during is not During.ACCESS:
            text += f", translating {self.during.value}"
        return text


class Leaf(NamedTuple):
    """A mapping that a walk has found: [first, first + size) goes to [out, out + size)."""

    first: int
    out: int
    size: int
    allowed: int  # set of accesses that need no further walk


ALL = 0xFFFF  # every access
READS = sum(1 << access for access in range(16) if access & (READ | EXEC) and not access & WRITE) | 1 << 0 | 1 << PRIV
WRITES = sum(1 << access for access in range(16) if access & WRITE)
EXECS = sum(1 << access for access in range(16) if access & EXEC)
USERS = sum(1 << access for access in range(16) if not access & PRIV)
PRIVS = ALL & ~USERS


def allowed(*, readable: bool, writable: bool) -> int:
    """The accesses that a mapping with these rights allows; a write that also reads needs both."""
    return _ALLOWED[readable, writable]


_ALLOWED = {
    (r, w): sum(
        1 << access
        for access in range(16)
        if (r or not access & (READ | EXEC)) and (w or not access & WRITE)
    )
    for r in (False, True)
    for w in (False, True)
}


def describe(access: int) -> str:
    """The access in words: "write", "privileged read"."""
    words = [name for bit, name in ((PRIV, "privileged"), (READ, "read"), (WRITE, "write"), (EXEC, "execute"))
             if access & bit]  # fmt: skip
    return " ".join(words) or "nothing"
