"""Room client: LPAE tables in guest memory, as a guest's driver writes them for an SMMUv3's first stage."""

from __future__ import annotations

from typing import TYPE_CHECKING

from iommufd_uapi.smmuv3 import Cd, Tg0

if TYPE_CHECKING:
    from .guest import GuestMemory

VALID, TABLE = 1 << 0, 1 << 1  # TABLE: a table, or on the last level a page
AP_USER, AP_READ_ONLY = 1 << 6, 1 << 7
SH_INNER, AF, NG = 3 << 8, 1 << 10, 1 << 11
ADDRESS_BITS = 48
GRANULES = {4: Tg0.K4, 16: Tg0.K16, 64: Tg0.K64}  # in KiB


class LpaeTable:
    """A table for 48 bit addresses, in guest memory that begins at guest-physical address `base`.

    Levels count from the page up: 1 is Arm's level 3. Pages for tables are taken from `pool` on, upward. Nothing is
    flushed here: what the SMMU has cached stays until IOMMU_HWPT_INVALIDATE.
    """

    def __init__(self, ram: GuestMemory, pool: int, granule: int = 4, base: int = 0) -> None:
        """granule: 4, 16 or 64, in KiB."""
        self.ram = ram
        self.base = base
        self.granule = granule
        self._shift = (granule << 10).bit_length() - 1
        self._stride = self._shift - 3  # bits that a level translates
        self.levels = -(-(ADDRESS_BITS - self._shift) // self._stride)
        self._next = pool
        self.root = self._page()

    def cd(self, asid: int, *, stall: bool = False) -> Cd:
        """The context descriptor that leads here, as Linux makes it."""
        return Cd.s1(self.root, asid=asid, tg0=GRANULES[self.granule], s=stall)

    def _page(self) -> int:
        size = self.granule << 10
        page = -(-self._next // size) * size
        self._next = page + size
        self.ram.write(page - self.base, bytes(size))
        return page

    def descriptor(self, address: int) -> int:
        """The descriptor at a guest-physical address."""
        return int.from_bytes(self.ram.read(address - self.base, 8), "little")

    def store(self, address: int, descriptor: int) -> None:
        self.ram.write(address - self.base, descriptor.to_bytes(8, "little"))

    def slot(self, iova: int, level: int = 1) -> int:
        """Where the descriptor of this level for iova lies; tables above it are made."""
        table = self.root
        for above in range(self.levels, level, -1):
            address = table + self._index(iova, above)
            descriptor = self.descriptor(address)
            if not descriptor & VALID:
                descriptor = self._page() | VALID | TABLE
                self.store(address, descriptor)
            table = descriptor & (1 << ADDRESS_BITS) - (1 << self._shift)
        return table + self._index(iova, level)

    def _index(self, iova: int, level: int) -> int:
        shift = self._shift + self._stride * (level - 1)
        return (iova >> shift & (1 << min(self._stride, ADDRESS_BITS - shift)) - 1) * 8

    def map(self, iova: int, gpa: int, *, writable: bool = True, level: int = 1) -> None:
        """Let iova lead to a guest-physical address; level 2 maps a block."""
        kind = VALID | TABLE if level == 1 else VALID
        attributes = AP_USER | SH_INNER | AF | NG | (0 if writable else AP_READ_ONLY)
        self.store(self.slot(iova, level), gpa | kind | attributes)

    def unmap(self, iova: int, level: int = 1) -> None:
        """Clear the descriptor."""
        self.store(self.slot(iova, level), 0)
