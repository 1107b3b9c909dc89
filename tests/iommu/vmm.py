"""A VMM with a guest's table over an IOAS and a device that uses it, watched by the sanitizer."""

from __future__ import annotations

import iommufd_uapi.iommufd as uapi
from iommufdd.finding import Finding
from iommufdd.sanitizer import Sanitizer
from tests.core.harness import PASID

from .lab import POOL, Lab
from .tables import X86Table, flags

LEAF = uapi.IOMMU_VTD_INV_FLAGS_LEAF
IOVA = 0x7F12_3456_7000
M2, G1 = 1 << 21, 1 << 30
A, B, C = 0x5000, 0x6000, 0x7000  # pages of the guest's memory


class Vmm:
    """A guest's table behind one device, watched."""

    def __init__(
        self, *, ats: bool = False, pri: bool = False, levels: int = 4, pages: int = 1024, **lab: object
    ) -> None:
        self.lab = Lab(**lab)  # type: ignore[arg-type]
        self.sanitizer = Sanitizer()
        assert self.sanitizer.watch(self.lab.iommu)
        self.idev = self.lab.device(ats=ats, pri=pri, pasids=20)
        self.ioas, self.ram = self.lab.ram(pages)
        self.table = X86Table(self.ram, POOL, levels)
        self.levels = levels
        self.parent = self.lab.parent(self.idev, self.ioas, PASID)
        self.hwpt = self.nested(self.table.root)
        self.lab.attach(self.idev, self.hwpt)

    def nested(self, root: int) -> int:
        """A further HWPT over a table."""
        width = 48 if self.levels == 4 else 57
        return self.lab.nested(self.idev, self.parent, root, width=width, flags=PASID)

    def read(self, iova: int = IOVA, pasid: int | None = None, length: int = 8) -> bytes:
        """A DMA."""
        return self.lab.read(self.idev, iova, length, pasid)

    def write(self, iova: int = IOVA, pasid: int | None = None) -> None:
        self.lab.write(self.idev, iova, b"written", pasid)

    def flush(self, iova: int = 0, npages: int = 2**64 - 1, flags: int = 0, hwpt: int = 0) -> None:
        self.lab.invalidate(hwpt or self.hwpt, iova, npages, flags)

    def end(self) -> list[Finding]:
        """The program ends: its device is detached. What was reported."""
        for pasid in list(self.idev.dev.group.handles):
            self.lab.detach(self.idev, pasid)
        return self.sanitizer.reported


def fresh_table(vmm: Vmm, *pages: int) -> None:
    """A new last-level table in the place of the one for IOVA, with pages from IOVA on."""
    table = vmm.table.page()
    vmm.table.set(vmm.table.slot(IOVA, 2), table | flags("rwu"))
    for at, page in enumerate(pages):
        vmm.table.set(table + 8 * ((IOVA >> 12) + at & 511), page | flags("rwu"))


def forgetful(**options: object) -> Vmm:
    """A VMM that has used a page whose change it did not flush."""
    vmm = Vmm(**options)  # type: ignore[arg-type]
    vmm.table.map(IOVA, A)
    vmm.read()
    vmm.table.map(IOVA, B)
    vmm.read()
    return vmm
