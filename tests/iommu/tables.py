"""Writers that share nothing with the walkers: a guest's page tables, and VT-d's PASID-table entries."""

from __future__ import annotations

from typing import Protocol

SIZES = {1: 12, 2: 21, 3: 30}


class Ram(Protocol):
    """Guest memory, by guest physical address."""

    def read(self, addr: int, length: int) -> bytes: ...

    def write(self, addr: int, data: bytes) -> None: ...


class Table:
    """Tables of 512 entries whose pages are taken from guest memory, from `pool` on."""

    def __init__(self, ram: Ram, pool: int) -> None:
        self.ram = ram
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


class X86Table(Table):
    """A first-stage table of `levels` levels."""

    def __init__(self, ram: Ram, pool: int, levels: int = 4) -> None:
        super().__init__(ram, pool)
        self.levels = levels

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
    """r present, w writable, u user, x no execution, a accessed, d dirty, e extended accessed."""
    bits = {"r": 0, "w": 1, "u": 2, "a": 5, "d": 6, "e": 10, "x": 63}
    return sum(1 << bits[letter] for letter in rights)


# Of a scalable-mode PASID-table entry: (first bit, bits) of each field (SEMANTICS 7.1).
PASID_FIELDS = {
    "p": (0, 1), "fpd": (1, 1), "aw": (2, 3), "pgtt": (6, 3), "ssade": (9, 1), "sspt": (12, 52), "did": (64, 16),
    "pwsnp": (87, 1), "pgsnp": (88, 1), "sre": (128, 1), "ere": (129, 1), "fspm": (130, 2), "wpe": (132, 1),
    "eafe": (135, 1), "fspt": (140, 52),
}  # fmt: skip


def pasid_entry(**fields: int) -> int:
    """The 512 bits of a PASID-table entry; sspt and fspt are addresses of tables, p is 1 unless it is given."""
    value = 0
    for name, field in {"p": 1, **fields}.items():
        first, bits = PASID_FIELDS[name]
        number = field >> 12 if name in ("sspt", "fspt") else field
        assert number >> bits == 0, name
        value |= number << first
    return value


def words(entry: int) -> tuple[int, ...]:
    """The eight words of a PASID-table entry."""
    return tuple(entry >> 64 * at & (1 << 64) - 1 for at in range(8))
