"""Room client: x86-64 page tables in guest memory, as a guest's driver writes them for VT-d's first stage."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .guest import GuestMemory

PAGE_SIZE = 4096
P, RW, US, PS = 1 << 0, 1 << 1, 1 << 2, 1 << 7
_ADDRESS = 0x000F_FFFF_FFFF_F000


class PageTable:
    """A table of 4 or 5 levels, in guest memory that begins at guest-physical address 0.

    `root` goes into HwptVtdS1.pgtbl_addr. Pages for tables are taken from `pool` on, upward. Nothing is flushed
    here: what the IOMMU has cached stays until IOMMU_HWPT_INVALIDATE.
    """

    def __init__(self, ram: GuestMemory, pool: int, levels: int = 4) -> None:
        self.ram = ram
        self.levels = levels
        self._next = pool
        self.root = self._page()

    def _page(self) -> int:
        page, self._next = self._next, self._next + PAGE_SIZE
        self.ram.write(page, bytes(PAGE_SIZE))
        return page

    def entry(self, address: int) -> int:
        """The entry at a guest-physical address."""
        return int.from_bytes(self.ram.read(address, 8), "little")

    def store(self, address: int, entry: int) -> None:
        self.ram.write(address, entry.to_bytes(8, "little"))

    def slot(self, iova: int, level: int = 1) -> int:
        """Where the entry for iova lies: level 1 maps 4 KiB, 2 maps 2 MiB, 3 maps 1 GiB. Tables above it are made."""
        table = self.root
        for above in range(self.levels, level, -1):
            address = table + (iova >> 9 * above + 3 & 0x1FF) * 8
            entry = self.entry(address)
            if not entry & P:
                entry = self._page() | P | RW | US
                self.store(address, entry)
            table = entry & _ADDRESS
        return table + (iova >> 9 * level + 3 & 0x1FF) * 8

    def map(self, iova: int, gpa: int, *, writable: bool = True, level: int = 1) -> None:
        """Let iova lead to a guest-physical address."""
        self.store(self.slot(iova, level), gpa | P | US | (RW if writable else 0) | (PS if level > 1 else 0))

    def unmap(self, iova: int, level: int = 1) -> None:
        """Clear the entry."""
        self.store(self.slot(iova, level), 0)
