"""VT-d's domains: paging through a first or second stage, and a guest's first stage nested on a second (intel/*.c)."""

from __future__ import annotations

import itertools
from contextlib import ExitStack
from typing import TYPE_CHECKING

import iommufd_uapi.iommufd as uapi
from iommufdd.errors import EINVAL, ENODEV, EOPNOTSUPP
from iommufdd.user import PAGE_SIZE

from .dirty import DirtyBits
from .endpoint import Endpoint
from .ops import IOMMU_NO_PASID, Device, Domain, DomainType
from .vtd_pasid import ABSENT, FIRST, NESTED, POINTER, SECOND, PasidEntry

if TYPE_CHECKING:
    from collections.abc import Iterator

    from iommufdd.user_data import UserData, UserDataArray

    from .vtd import Vtd
    from .vtd_hw import VtdHardware

SZ_2M, SZ_1G = 1 << 21, 1 << 30
AW = {3: 1, 4: 2, 5: 3}
_roots = itertools.count(0x1000_0000_0000 >> 12)  # pages for top tables of the kernel's own, seen in PASID entries


class VtdDomain(Domain):
    """What VT-d's domains share: an id per IOMMU, and the (device, PASID) pairs that use it, its cache tags."""

    owner: Vtd

    def __init__(self, owner: Vtd) -> None:
        super().__init__(owner)
        self.tags: dict[tuple[Endpoint, int], None] = {}
        self.units: dict[Vtd, None] = {owner: None}  # those that have ever used it

    def attach_dev(self, dev: Device, old: Domain | None) -> None:
        """EINVAL, ENODEV, ENOSPC; see _attach()."""
        assert isinstance(dev, Endpoint)
        self._attach(dev, IOMMU_NO_PASID, old)

    def set_dev_pasid(self, dev: Device, pasid: int, old: Domain | None) -> None:
        """EOPNOTSUPP, EINVAL, ENODEV, ENOSPC."""
        assert isinstance(dev, Endpoint)
        if not iommu_of(dev).description.pasid_width:
            raise EOPNOTSUPP("this IOMMU has no PASIDs")
        self._attach(dev, pasid, old)

    def _attach(self, dev: Endpoint, pasid: int, old: Domain | None) -> None:
        """Check, take an id and page faults, then switch the hardware; undone in turn when something refuses."""
        iommu = iommu_of(dev)
        torn_down = iommu.before_attach(dev, pasid)
        self.compatible(iommu)
        with ExitStack() as undo:
            iopf_first = self.type is DomainType.PAGING and pasid == IOMMU_NO_PASID
            if iopf_first:
                self._enable_iopf(dev, undo)
            did = iommu.get_did(self, leaving=old if pasid == IOMMU_NO_PASID else None)
            undo.callback(iommu.put_did, self)
            if not iopf_first:
                self._enable_iopf(dev, undo)
            entry = self.pasid_entry(iommu, did)
            undo.pop_all()
        self.tags[dev, pasid] = None
        iommu.switch(dev, pasid, old, self, entry.pack(), torn_down)
        self._leave(dev, pasid, old)

    def _leave(self, dev: Endpoint, pasid: int, old: Domain | None) -> None:
        """What the domain before had of this device."""
        if isinstance(old, VtdDomain) and old is not self:
            old.tags.pop((dev, pasid), None)
            if not isinstance(old, VtdBlocked):
                iommu_of(dev).put_did(old)
        dev.iopf.disable(old)

    def _enable_iopf(self, dev: Endpoint, undo: ExitStack) -> None:
        """intel_iommu_enable_iopf(): ENODEV."""
        if self.iopf_handler is not None and not dev.pri:
            raise ENODEV(f"{dev.name} has no page requests (PRI)")
        dev.iopf.enable(self)
        undo.callback(dev.iopf.disable, self)

    def compatible(self, iommu: Vtd) -> None:
        """paging_domain_compatible(): EINVAL."""

    def free(self) -> None:
        for unit in self.units:
            unit.freed(self)

    def pasid_entry(self, iommu: Vtd, did: int) -> PasidEntry:
        """The PASID-table entry that attaches this domain."""
        raise NotImplementedError


class VtdBlocked(VtdDomain):
    """blocking_domain: the entry is absent."""

    type = DomainType.BLOCKED

    def _attach(self, dev: Endpoint, pasid: int, old: Domain | None) -> None:
        iommu_of(dev).switch(dev, pasid, old, self, ABSENT)
        self._leave(dev, pasid, old)


class VtdPaging(VtdDomain):
    """struct dmar_domain of the kernel's own table; the table's bytes are not kept, its areas translate."""

    def __init__(
        self, owner: Vtd, *, stage: int, levels: int, width: int, nest_parent: bool = False, dirty: bool = False
    ) -> None:
        """width: bits of IOVA (second stage), or of the canonical address (first stage)."""
        super().__init__(owner)
        description = owner.description
        self.stage = stage
        self.levels = levels
        self.width = width
        self.nest_parent = nest_parent
        self.refuses_read_only = nest_parent  # ERRATA_772415_SPR17, on all hardware
        self.root = next(_roots) << 12
        self.pgsize_bitmap = PAGE_SIZE | SZ_2M * description.pages_2m | SZ_1G * description.pages_1g
        if stage == FIRST:
            self.pgsize_bitmap |= SZ_2M
        self.aperture_end = (1 << (width - 1 if stage == FIRST else width)) - 1
        self.dirty_bits = VtdDirty(self) if dirty else None
        self.dirty_ops = self.dirty_bits
        self.force_snooping = False
        self.children: dict[VtdNested, None] = {}

    @property
    def tracking(self) -> bool:
        """Second-stage A/D bits are on (SSADE)."""
        return self.dirty_bits is not None and self.dirty_bits.tracking

    def enforce_cache_coherency(self) -> bool:
        """intel_iommu_enforce_cache_coherency_fs(), ..._ss(): a bit of the PASID entry, or of all entries."""
        self.force_snooping = all(iommu_of(dev).description.snoop_control for dev, _ in self.tags)
        return self.force_snooping

    def compatible(self, iommu: Vtd) -> None:
        """paging_domain_compatible_first_stage(), ..._second_stage()"""
        d = iommu.description
        if self.stage == FIRST:
            self._need(d.first_stage, "first-stage translation")
            self._need(d.coherent_walk or not self.owner.description.coherent_walk, "coherent page walks")
            self._need(self.levels == 4 or 5 in d.levels, "five levels")
            self._need(d.pages_1g or not self.pgsize_bitmap & SZ_1G, "1 GiB pages")
            return
        self._need(self.dirty_bits is None or iommu.tracks_dirty, "second-stage accessed and dirty bits")
        self._need(not self.nest_parent or iommu.nests, "nested translation")
        self._need(d.second_stage, "second-stage translation")
        self._need(d.coherent_walk or not self.owner.description.coherent_walk, "coherent page walks")
        self._need(d.mgaw >= self.width, f"{self.width} bits of guest address")
        self._need(self.levels in d.levels, f"{self.levels} levels")
        self._need(d.pages_2m or not self.pgsize_bitmap & SZ_2M, "2 MiB pages")
        self._need(d.pages_1g or not self.pgsize_bitmap & SZ_1G, "1 GiB pages")
        self._need(d.snoop_control or not self.force_snooping, "snoop control")
        self._need(not d.caching_mode or self.owner.description.caching_mode, "no flush on map")

    def _need(self, has: bool, what: str) -> None:
        if not has:
            raise EINVAL(f"the domain needs {what}, which the device's IOMMU has not")

    def pasid_entry(self, iommu: Vtd, did: int) -> PasidEntry:
        """pasid_pte_config_first_level(), ..._second_level()"""
        coherent = iommu.description.coherent_walk
        if self.stage == FIRST:
            return PasidEntry(present=True, pgtt=FIRST, aw=AW[max(iommu.description.levels)], did=did, pwsnp=coherent,
                              pgsnp=self.force_snooping, fspm=self.levels - 4, fsptptr=self.root)  # fmt: skip
        return PasidEntry(present=True, pgtt=SECOND, aw=AW[self.levels], did=did, pwsnp=coherent, ssade=self.tracking,
                          ssptptr=self.root)  # fmt: skip

    def walker(self, hw: VtdHardware, entry: PasidEntry) -> None:
        """Nobody: its table is not bytes."""
        return

    def unmapped(self, iova: int, last: int) -> None:
        """intel_iommu_tlb_sync(), and every child's caches, which hold results of this stage."""
        if self.dirty_bits is not None:
            self.dirty_bits.forget(iova, last)
        self.flush(iova, last)

    def flush(self, iova: int, last: int) -> None:
        """cache_tag_flush_range() over the domain's own tags and those of nested domains."""
        iova, last = cover(iova, last)
        for dev, pasid in self.tags:
            iommu_of(dev).flush_paging(self, dev, pasid, iova, last)
        for child in self.children:
            for dev, pasid in child.tags:
                iommu_of(dev).flush_parent(child, dev, pasid)

    def users(self) -> Iterator[tuple[VtdDomain, Endpoint, int]]:
        """Everything whose PASID entry names this domain's table."""
        for domain in (self, *self.children):
            for dev, pasid in domain.tags:
                yield domain, dev, pasid


class VtdDirty(DirtyBits):
    """Dirty bits of a second stage: hardware sets them where SSADE is on, and caches that it has."""

    def __init__(self, domain: VtdPaging) -> None:
        super().__init__(domain, PAGE_SIZE)
        self._paging = domain

    def set_dirty_tracking(self, *, enable: bool) -> None:
        """intel_iommu_set_dirty_tracking(): SSADE in the entries of all users, then their caches."""
        super().set_dirty_tracking(enable=enable)
        for domain, dev, pasid in self._paging.users():
            iommu_of(dev).set_ssade(domain, dev, pasid, enable=enable)

    def read_and_clear_dirty(self, iova: int, last: int, *, clear: bool) -> Iterator[tuple[int, int]]:
        yield from super().read_and_clear_dirty(iova, last, clear=clear)
        if clear:
            self._paging.flush(iova, last)


class VtdNested(VtdDomain):
    """A guest's first stage, in guest memory, over a nest parent (intel/nested.c)."""

    type = DomainType.NESTED

    def __init__(self, owner: Vtd, parent: VtdPaging, config: uapi.HwptVtdS1) -> None:
        super().__init__(owner)
        self.parent = parent
        self.config = config
        parent.children[self] = None

    def compatible(self, iommu: Vtd) -> None:
        self.parent.compatible(iommu)

    def pasid_entry(self, iommu: Vtd, did: int) -> PasidEntry:
        """intel_pasid_setup_nested(): the content is checked now, not when it was given. EINVAL."""
        d, flags = iommu.description, self.config.flags
        if self.config.addr_width not in (48, 57) or (self.config.addr_width == 57 and 5 not in d.levels):
            raise EINVAL(f"a stage-1 address width of {self.config.addr_width} bits")
        if flags & uapi.IOMMU_VTD_S1_SRE and not d.supervisor:
            raise EINVAL("this IOMMU has no supervisor requests (SRE)")
        if flags & uapi.IOMMU_VTD_S1_EAFE and not d.extended_access:
            raise EINVAL("this IOMMU has no extended accessed flag (EAFE)")
        sre = bool(flags & uapi.IOMMU_VTD_S1_SRE)
        return PasidEntry(
            present=True, pgtt=NESTED, aw=AW[self.parent.levels], did=did, pwsnp=d.coherent_walk,
            ssade=self.parent.tracking, ssptptr=self.parent.root, sre=sre,
            wpe=sre and bool(flags & uapi.IOMMU_VTD_S1_WPE), eafe=bool(flags & uapi.IOMMU_VTD_S1_EAFE),
            fspm=int(self.config.addr_width == 57), fsptptr=self.config.pgtbl_addr & POINTER,
        )  # fmt: skip

    def _leave(self, dev: Endpoint, pasid: int, old: Domain | None) -> None:
        """quirk: attaching a nested domain to the RID never gives up the old domain's page faults."""
        keeps = old.iopf_handler is not None if old is not None and pasid == IOMMU_NO_PASID else False
        super()._leave(dev, pasid, old)
        if keeps:
            dev.iopf.enable(old)

    def cache_invalidate_user(self, array: UserDataArray) -> None:
        """intel_nested_cache_invalidate_user(): EINVAL, EFAULT, EOPNOTSUPP; entry by entry."""
        total, array.entry_num = array.entry_num, 0
        data_type = uapi.IOMMU_HWPT_INVALIDATE_DATA_VTD_S1
        if array.data_type != data_type:
            raise EINVAL(f"data type {array.data_type:#x} is not VT-d's stage 1")
        for at in range(total):
            entry = array.copy_entry(uapi.HwptVtdS1Invalidate, data_type, at, "reserved")
            if entry.flags & ~uapi.IOMMU_VTD_INV_FLAGS_LEAF or entry.reserved:
                raise EOPNOTSUPP("flags are not known or reserved is not 0")
            if entry.addr % PAGE_SIZE or (entry.npages == 2**64 - 1 and entry.addr):
                raise EINVAL(f"address {entry.addr:#x} with {entry.npages:#x} pages")
            leaf = bool(entry.flags & uapi.IOMMU_VTD_INV_FLAGS_LEAF)
            first, last = cover(entry.addr, entry.addr + entry.npages * PAGE_SIZE - 1)
            for dev, pasid in self.tags:
                iommu_of(dev).flush_nested(self, dev, pasid, first, last, leaf=leaf)
            self._tell(entry)
            array.entry_num = at + 1

    def _tell(self, entry: uapi.HwptVtdS1Invalidate) -> None:
        """The units' monitors hear of what was asked, also when no device uses the domain."""
        units = self.owner, *(iommu_of(dev) for dev, _ in self.tags)
        for monitor in dict.fromkeys(monitor for unit in units for monitor in unit.monitors):
            monitor.flushed(f"{flush_words(entry.addr, entry.npages, entry.flags)} on hwpt {self.hwpt_id}")

    def free(self) -> None:
        """intel_nested_domain_free()"""
        del self.parent.children[self]
        super().free()


def cover(start: int, last: int) -> tuple[int, int]:
    """The aligned power of two that holds both ends; everything from bit 63 on (calculate_psi_aligned_address)."""
    start &= 2**64 - PAGE_SIZE
    last &= 2**64 - 1
    order = (start ^ last).bit_length()
    if order <= 12:
        return start, start + PAGE_SIZE - 1
    if order >= 64:
        return 0, 2**64 - 1
    base = start & -(1 << order)
    return base, base + (1 << order) - 1


def flush_words(addr: int, npages: int, flags: int = 0) -> str:
    """One entry of IOMMU_HWPT_INVALIDATE, for people."""
    pages = "all" if npages == 2**64 - 1 else npages
    leaf = ", LEAF" if flags & uapi.IOMMU_VTD_INV_FLAGS_LEAF else ""
    return f"HWPT_INVALIDATE {{addr {addr:#x}, npages {pages}{leaf}}}"


def iommu_of(dev: Endpoint) -> Vtd:
    """The VT-d unit behind which dev sits."""
    iommu: Vtd = dev.iommu  # type: ignore[assignment]
    return iommu


def new_nested(owner: Vtd, parent: Domain, flags: int, user_data: UserData) -> VtdNested:
    """intel_iommu_domain_alloc_nested(): EOPNOTSUPP, EINVAL, EFAULT."""
    if not owner.nests or flags & ~uapi.IOMMU_HWPT_ALLOC_PASID:
        raise EOPNOTSUPP("this IOMMU does not nest, or the flags are not known")
    if user_data.data_type != uapi.IOMMU_HWPT_DATA_VTD_S1:
        raise EOPNOTSUPP(f"data type {user_data.data_type:#x} is not VT-d's stage 1")
    if not isinstance(parent, VtdPaging) or not parent.nest_parent:
        raise EINVAL("the parent is no second stage made with IOMMU_HWPT_ALLOC_NEST_PARENT")
    config = user_data.copy_struct(uapi.HwptVtdS1, uapi.IOMMU_HWPT_DATA_VTD_S1, "reserved")
    return VtdNested(owner, parent, config)
