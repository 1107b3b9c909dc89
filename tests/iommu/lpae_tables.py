"""A writer of LPAE tables that shares nothing with the walkers: ARM's level numbers, shifts as printed."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .tables import Ram

KIB = 1024
#: lowest address bit that a level translates, by granule in KiB and ARM level (DDI0487 D8.2)
SHIFT = {
    4: {0: 39, 1: 30, 2: 21, 3: 12},
    16: {0: 47, 1: 36, 2: 25, 3: 14},
    64: {1: 42, 2: 29, 3: 16},
}
WIDTH = {4: 9, 16: 11, 64: 13}  #: address bits that a level translates
START = {  #: the smallest input size whose walk starts at a level
    4: {0: 40, 1: 31, 2: 22, 3: 13},
    16: {0: 48, 1: 37, 2: 26, 3: 15},
    64: {1: 43, 2: 30, 3: 17},
}
TG0 = {4: 0, 16: 2, 64: 1}
TG1 = {4: 2, 16: 1, 64: 3}


def start_level(granule: int, size: int) -> int:
    """Where the walk of addresses of `size` bits starts."""
    return min(level for level, least in START[granule].items() if size >= least)


class ArmTable:
    """A table of one granule (in KiB) for addresses of `size` bits; its pages are taken from memory from `pool` on."""

    def __init__(self, ram: Ram, pool: int, granule: int = 4, size: int = 48, first: int | None = None) -> None:
        """first: the start level of a stage 2, if not the usual one."""
        self.ram = ram
        self.granule = granule
        self.size = size
        self.first = start_level(granule, size) if first is None else first
        self._next = pool
        self.root = self.page(max(8 << size - SHIFT[granule][self.first], granule * KIB))

    def page(self, length: int = 0) -> int:
        """A fresh table, aligned to its length; one granule by default."""
        length = length or self.granule * KIB
        page = -(-self._next // length) * length
        self._next = page + length
        self.ram.write(page, bytes(length))
        return page

    def get(self, addr: int) -> int:
        """The entry at an address."""
        return int.from_bytes(self.ram.read(addr, 8), "little")

    def set(self, addr: int, entry: int) -> None:
        """Store an entry."""
        self.ram.write(addr, entry.to_bytes(8, "little"))

    def slot(self, va: int, level: int = 3, *, tables: str = "") -> int:
        """Where the entry of this level for va lies; tables above it are made with the attributes `tables`."""
        table = self.root
        for above in range(self.first, level):
            addr = table + 8 * self._index(va, above)
            entry = self.get(addr)
            if not entry & 1:
                entry = self.packed(self.page()) | 3 | table_bits(tables)
                self.set(addr, entry)
            table = self.unpacked(entry)
        return table + 8 * self._index(va, level)

    def map(self, va: int, pa: int, rights: str = "u", *, level: int = 3, tables: str = "") -> int:
        """Map one page or block; the address of its entry. AF is set unless rights has "o" (old)."""
        addr = self.slot(va, level, tables=tables)
        self.set(addr, self.packed(pa) | leaf_bits(rights) | (3 if level == 3 else 1))
        return addr

    def unmap(self, va: int, level: int = 3) -> None:
        """Clear the entry, and flush nothing."""
        self.set(self.slot(va, level), 0)

    def packed(self, pa: int) -> int:
        """An address as entries have it."""
        return pa & 0xFFFFFFFFFFFF | pa >> 48 << 12

    def unpacked(self, entry: int) -> int:
        """The table that an entry names."""
        low = entry & 0xFFFFFFFFF000 & -self.granule * KIB
        return low | (entry >> 12 & 15) << 48 if self.granule == 64 else low

    def _index(self, va: int, level: int) -> int:
        shift = SHIFT[self.granule][level]
        above = self.size if level == self.first else shift + WIDTH[self.granule]
        return va % (1 << above) >> shift


def leaf_bits(rights: str) -> int:
    """u unprivileged too, r read-only, o old (AF clear), d DBM, c contiguous, p no privileged execution, x no other."""
    bits = {"u": 6, "r": 7, "d": 51, "c": 52, "p": 53, "x": 54}
    return sum(1 << bits[letter] for letter in rights if letter != "o") | (0 if "o" in rights else 1 << 10)


def table_bits(rights: str) -> int:
    """p no privileged execution below, x no other, k kernel alone, r read-only."""
    bits = {"p": 59, "x": 60, "k": 61, "r": 62}
    return sum(1 << bits[letter] for letter in rights)
