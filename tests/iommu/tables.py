"""A writer of x86-64 tables that shares nothing with the walkers: a guest's own page tables in guest memory."""

from __future__ import annotations

from typing import Protocol

SIZES = {1: 12, 2: 21, 3: 30}


class Ram(Protocol):
    """Guest memory, by guest physical address."""

    def read(self, addr: int, length: int) -> bytes: ...

    def write(self, addr: int, data: bytes) -> None: ...


class X86Table:
    """A first-stage table of `levels` levels whose pages are taken from guest memory, from `pool` on."""

    def __init__(self, ram: Ram, pool: int, levels: int = 4) -> None:
        self.ram = ram
        self.levels = levels
        self._next = pool
        self.root = self.page()

    def page(self) -> int:
        """A fresh page for a table."""
        page, self._next = self._next, self._next + 4096
        self.ram.write(page, bytes(4096))
        return page

    def get(self, addr: int) -> int:
        """The entry at an address."""
        return int.from_bytes(self.ram.read(addr, 8), "little")

    def set(self, addr: int, entry: int) -> None:
        """Store an entry."""
        self.ram.write(addr, entry.to_bytes(8, "little"))

    def slot(self, iova: int, level: int, *, make: str = "rwu") -> int:
        """Where the entry of this level for iova lies; tables above it are made with the rights `make`."""
        table = self.root
        for above in range(self.levels, level, -1):
            addr = table + 8 * (iova >> (12 + 9 * (above - 1)) & 511)
            entry = self.get(addr)
            if not entry & 1:
                entry = self.page() | flags(make)
                self.set(addr, entry)
            table = entry & 0x000FFFFFFFFFF000
        return table + 8 * (iova >> (12 + 9 * (level - 1)) & 511)

    def map(self, iova: int, gpa: int, rights: str = "rwu", *, level: int = 1, make: str = "rwu") -> int:
        """Map one page of the level's size; the address of its entry."""
        addr = self.slot(iova, level, make=make)
        self.set(addr, gpa | flags(rights) | (1 << 7 if level > 1 else 0))
        return addr

    def unmap(self, iova: int, level: int = 1) -> None:
        """Clear the entry, and flush nothing."""
        self.set(self.slot(iova, level), 0)


def flags(rights: str) -> int:
    """r present, w writable, u user, x no execution, a accessed, d dirty."""
    bits = {"r": 0, "w": 1, "u": 2, "a": 5, "d": 6, "x": 63}
    return sum(1 << bits[letter] for letter in rights)
