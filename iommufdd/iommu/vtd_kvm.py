"""VT-d's domain over a VM's own table (RFC p18 to p22, intel/kvm.c there): second stage, root and entries KVM's."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import iommufd_uapi.iommufd as uapi
from iommufd_uapi.kvm import KVM_TDP_TYPE_EPT
from iommufdd.errors import EINVAL, EOPNOTSUPP
from iommufdd.user import PAGE_MASK, PAGE_SIZE

from .ops import Cached, DomainType
from .vtd_domain import AW, VtdDomain, iommu_of
from .vtd_ept import EptWalker, Kept
from .vtd_pasid import SECOND, PasidEntry

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .ops import PhysicalMemory, TdpMetadata
    from .tlb import Space
    from .vtd import Vtd
    from .vtd_hw import VtdHardware

EVERYTHING = 0, 2**64 - 1
WIDTH = {4: 48, 5: 57}
SNP = 1 << 11
MISREAD_KEPT = 64


class VtdKvm(VtdDomain):
    """struct dmar_domain of type KVM: never mapped through, always snooping."""

    type = DomainType.KVM
    dirty_bits = None

    def __init__(self, owner: Vtd, tdp: TdpMetadata, memory: PhysicalMemory) -> None:
        super().__init__(owner)
        self.tdp = tdp
        self.memory = memory
        self.root = tdp.root_hpa
        self.levels = tdp.level
        self.aperture_end = (1 << WIDTH[tdp.level]) - 1
        self.misread_count = 0
        self.misreads: deque[tuple[int, int, int, str]] = deque(maxlen=MISREAD_KEPT)

    def enforce_cache_coherency(self) -> bool:
        """Every PASID entry says so already."""
        return True

    def incompatible(self, iommu: Vtd) -> str:
        """What the IOMMU has not (kvm_domain_compatible); empty when nothing is missing.

        quirk: levels are compared with the most that the IOMMU has, not looked up among those it has.
        """
        d = iommu.description
        large = 2 if d.pages_1g else int(d.pages_2m)
        for has, what in (
            (d.second_stage and d.snoop_control, "second-stage translation with snoop control"),
            (d.coherent_walk, "coherent page walks"),
            (self.tdp.max_huge_page_level - 1 <= large, f"pages of level {self.tdp.max_huge_page_level}"),
            (self.levels <= max(d.levels), f"{self.levels} levels"),
        ):
            if not has:
                return what
        return ""

    def compatible(self, iommu: Vtd) -> None:
        missing = self.incompatible(iommu)
        if missing:
            raise EINVAL(f"the VM's table needs {missing}, which the device's IOMMU has not")

    def pasid_entry(self, iommu: Vtd, did: int) -> PasidEntry:
        """intel_pasid_setup_second_level() with PGSNP: bit 11 of the entries is not looked at."""
        return PasidEntry(present=True, pgtt=SECOND, aw=AW[self.levels], did=did, pwsnp=iommu.description.coherent_walk,
                          pgsnp=True, ssptptr=self.root)  # fmt: skip

    def walker(self, hw: VtdHardware, entry: PasidEntry) -> EptWalker:
        """Who walks the table for requests with this PASID entry."""

        def misread(gpa: int, level: int, table_entry: int, why: str) -> None:
            self.misread_count += 1
            self.misreads.append((gpa, level, table_entry, why))
            for monitor in hw.monitors:
                monitor.misread(self, gpa, level, table_entry, why)

        return EptWalker(entry, self.memory, hw.description, misread)

    # ---- KVM has changed its table ----

    def cache_invalidate(self, start: int, size: int) -> None:
        """The IOTLB of every unit first, then the device TLBs (RFC p22).

        A range is rounded outward to pages, where the RFC drops one that is not whole pages.
        """
        if (start, size) == EVERYTHING:
            first, last = EVERYTHING
        else:
            first, last = start & PAGE_MASK, (start + size + PAGE_SIZE - 1 & PAGE_MASK) - 1
        for iommu in {iommu_of(dev): None for dev, _ in self.tags}:
            if (first, last) == EVERYTHING:
                iommu.drop_domain(iommu.did(self))
            else:
                iommu.drop_second(iommu.did(self), first, last)
        for dev, pasid in self.tags:
            iommu_of(dev).drop_devtlb(dev, pasid, first, last)

    def cached(self) -> Iterator[Cached]:
        """What IOTLBs and device TLBs have."""
        for iommu in {iommu_of(dev): None for dev, _ in self.tags}:
            yield from _entries(f"the IOTLB of {iommu.name}", iommu.iotlb.space((iommu.did(self), -1)))
        for dev, pasid in self.tags:
            if dev.tlb is not None:
                yield from _entries(f"the device TLB of {dev.name}", dev.tlb.space(pasid or None))

    def cached_tables(self) -> Iterator[int]:
        """What the paging-structure caches have."""
        for iommu in {iommu_of(dev): None for dev, _ in self.tags}:
            for kept in iommu.iotlb.space((iommu.did(self), -1)).tables.values():
                assert isinstance(kept, Kept)
                yield kept.start.table


def _entries(where: str, space: Space) -> Iterator[Cached]:
    for entry in space.entries():
        yield Cached(where, entry.first, entry.last, entry.file, entry.pos, entry.allowed)


def new_kvm(owner: Vtd, flags: int, tdp: TdpMetadata | None, memory: PhysicalMemory) -> VtdKvm:
    """intel_iommu_domain_alloc_kvm() (RFC p18): EOPNOTSUPP, EINVAL."""
    if flags & uapi.IOMMU_HWPT_ALLOC_NEST_PARENT:
        raise EOPNOTSUPP("a VM's table is no nesting parent")
    if tdp is None or tdp.type != KVM_TDP_TYPE_EPT:
        raise EINVAL("the VM's table is no EPT")
    if tdp.level not in WIDTH:
        raise EOPNOTSUPP(f"an EPT of {tdp.level} levels")
    if not all(mask & SNP for mask in tdp.rsvd_bits_mask):
        raise EOPNOTSUPP("the EPT uses bit 11, which is SNP here")
    domain = VtdKvm(owner, tdp, memory)
    missing = domain.incompatible(owner)
    if missing:
        raise EOPNOTSUPP(f"the VM's table needs {missing}, which the device's IOMMU has not")
    return domain
