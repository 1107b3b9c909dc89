"""A VMM whose guest has an SMMUv3: an STE, CDs and LPAE tables in its memory, watched by the sanitizer."""

from __future__ import annotations

from iommufd_uapi.bits import Bitfield
from iommufd_uapi.smmuv3 import Cd
from iommufdd.finding import Finding
from iommufdd.iommu.dma import Op
from iommufdd.sanitizer import Sanitizer

from .smmu_lab import PAGE, Guest, LpaeTable, SmmuLab

VSID = 0x100
OTHER_POOL = 0x20_0000  # of another address space's tables
IOVA = 0x7F12_3456_7000
M2 = 1 << 21
A, B, C = 0x5000, 0x6000, 0x7000  # pages of the guest's memory


class SmmuVmm:
    """A guest's CD and table behind one device, watched."""

    def __init__(self, *, ats: bool = False, s1cdmax: int = 0, mode: str = "greedy", start: bool = True,
                 **lab: object) -> None:  # fmt: skip
        self.lab = SmmuLab(mode=mode, **lab)  # type: ignore[arg-type]
        self.sanitizer = Sanitizer()
        assert self.sanitizer.watch(self.lab.iommu)
        self.idev = self.lab.device(ats=ats, pasids=4)
        self.guest = Guest(self.lab, self.idev, vsid=VSID, eats=int(ats), s1cdmax=s1cdmax)
        self.table, self.ram = self.guest.table, self.guest.ram
        if start:
            self.guest.start()

    def map(self, page: int, iova: int = IOVA, attributes: int = PAGE, level: int = 3) -> int:
        """A page or block of stage 1; the address of its descriptor."""
        return self.table.map(iova, page, attributes, level)

    def other(self, page: int, asid: int = 5, **cd: int) -> Cd:
        """A CD with a table of its own, in which IOVA leads to page."""
        table = LpaeTable(self.ram, OTHER_POOL)
        table.map(IOVA, page)
        made = Cd.s1(table.root, asid=asid)
        for name, value in cd.items():
            setattr(made, name, value)
        return made

    def send(self, *commands: Bitfield) -> None:
        """HWPT_INVALIDATE on the vIOMMU."""
        assert self.lab.invalidate(self.guest.viommu, *commands) == len(commands)

    def read(self, iova: int = IOVA, length: int = 8, pasid: int | None = None) -> bytes:
        """A DMA."""
        return self.lab.read(self.idev, iova, length, pasid)

    def write(self, iova: int = IOVA) -> None:
        self.lab.write(self.idev, iova, b"written")

    def fault(self, iova: int = IOVA, op: Op = Op.READ) -> int:
        return self.lab.fault(self.idev, iova, op)

    def end(self) -> list[Finding]:
        """The program ends: its device is detached. What was reported."""
        for pasid in list(self.idev.dev.group.handles):
            self.lab.detach(self.idev, pasid)
        return self.sanitizer.reported


def fresh_table(vmm: SmmuVmm, *pages: int) -> int:
    """A new last-level table in the place of the one for IOVA, with pages from IOVA on; the old one."""
    table, slot = vmm.table.page(), vmm.table.slot(IOVA, 2)
    old = vmm.table.get(slot) & 0xFFFF_FFFF_F000
    vmm.table.set(slot, table | 3)
    for at, page in enumerate(pages):
        vmm.table.set(table + 8 * ((IOVA >> 12) + at & 511), page | PAGE)
    return old
