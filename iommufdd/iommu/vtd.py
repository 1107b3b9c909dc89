"""Intel VT-d in scalable mode: the driver's side, what iommufd calls (drivers/iommu/intel, 7.2)."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

from msgspec import structs

import iommufd_uapi.iommufd as uapi
from iommufdd.errors import ENOSPC, EOPNOTSUPP

from .endpoint import Endpoint
from .monitor import DEVICE_TLB, NOBODY, Due
from .ops import IOMMU_NO_PASID, Cap, Device, Domain
from .replace import Store, Switch
from .vtd_domain import VtdBlocked, VtdDomain, VtdNested, VtdPaging, flush_words, new_nested
from .vtd_hw import VtdHardware
from .vtd_kvm import VtdKvm, new_kvm
from .vtd_pasid import ABSENT, FIRST, PASS_THROUGH, SECOND, PasidEntry
from .vtd_regs import RECOVERABLE
from .walk import EXEC, PRIV, READ, WRITE, TranslationFault
from .x86_64 import HARDWARE_BITS, canonical

if TYPE_CHECKING:
    from collections.abc import Iterator

    from iommufdd.description import DeviceDescription, VtdIommu
    from iommufdd.user_data import UserData

    from .explain import Explanation, Row
    from .group import IommuGroup
    from .ops import PhysicalMemory, TdpMetadata
    from .walk import Step

FIRST_DID = 2  # IDA_START_DID: 0 is unused, 1 is FLPT_DEFAULT_DID
PAGE_RESPONSE_NEEDS_PASID = 1 << 2  # IOMMU_FAULT_PAGE_RESPONSE_NEEDS_PASID, which leaks into page requests
SECOND_FLAGS = (
    uapi.IOMMU_HWPT_ALLOC_NEST_PARENT | uapi.IOMMU_HWPT_ALLOC_DIRTY_TRACKING | uapi.IOMMU_HWPT_ALLOC_PASID
)


class TornDown(NamedTuple):
    """What intel_pasid_tear_down_entry() has done: the entry as it was, and the stores in their order."""

    words: tuple[int, ...]
    stores: list[str]


class Vtd(VtdHardware):
    """One VT-d unit: struct iommu_ops, and the invalidations that the driver sends to the hardware below it."""

    driver = "intel"
    user_pasid_table = False
    page_request_flags = PAGE_RESPONSE_NEEDS_PASID
    hardware_bits = HARDWARE_BITS

    def __init__(self, description: VtdIommu) -> None:
        super().__init__(description)
        self.name = description.name
        self.reserved = description.reserved
        self.blocked_domain: Domain = VtdBlocked(self)
        self.vendor_replace = description.replace == "vendor"  # replay the driver's own stores
        self._dids: dict[VtdDomain, list[int]] = {}  # id, users
        self._taken: Counter[int] = Counter()  # domains by id: two only while one takes over from the other

    def new_device(self, description: DeviceDescription, group: IommuGroup) -> Endpoint:
        """A function behind this unit; what the unit does not support is off."""
        d = self.description
        ats = description.ats and d.device_tlb
        return Endpoint(self, structs.replace(
            description, ats=ats, pri=description.pri and ats and d.page_requests,
            pasid_width=min(description.pasid_width, d.pasid_width),
        ), group)  # fmt: skip

    # ---- struct iommu_ops ----

    @property
    def nests(self) -> bool:
        """nested_supported()"""
        return self.description.nested

    @property
    def tracks_dirty(self) -> bool:
        """ssads_supported()"""
        return self.description.access_dirty and self.description.second_stage and self.description.coherent_walk

    def capable(self, dev: Device, cap: Cap) -> bool:
        """intel_iommu_capable()"""
        assert isinstance(dev, Endpoint)
        if cap is Cap.CACHE_COHERENCY:
            return dev.description.coherent
        if cap is Cap.ENFORCE_CACHE_COHERENCY:
            return self.description.snoop_control
        if cap is Cap.DIRTY_TRACKING:
            return self.tracks_dirty
        return cap is Cap.PCI_ATS_SUPPORTED and dev.ats

    def hw_info(self, dev: Device, info_type: int) -> tuple[int, bytes]:
        """intel_iommu_hw_info(): EOPNOTSUPP."""
        if info_type not in (uapi.IOMMU_HW_INFO_TYPE_DEFAULT, uapi.IOMMU_HW_INFO_TYPE_INTEL_VTD):
            raise EOPNOTSUPP(f"hw_info type {info_type:#x} is not VT-d's")
        info = uapi.HwInfoVtd(
            flags=uapi.IOMMU_HW_INFO_VTD_ERRATA_772415_SPR17, cap_reg=self.cap, ecap_reg=self.ecap
        )
        return uapi.IOMMU_HW_INFO_TYPE_INTEL_VTD, info.pack()

    def domain_alloc_paging(self, dev: Device, flags: int, user_data: UserData | None) -> Domain:
        """intel_iommu_domain_alloc_paging_flags(): a first stage if that will do, else a second. EOPNOTSUPP."""
        if user_data is not None:
            raise EOPNOTSUPP("VT-d's paging domains take no data")
        d = self.description
        if not flags & ~uapi.IOMMU_HWPT_ALLOC_PASID and d.first_stage:
            five = d.mgaw > 48 and 5 in d.levels
            return VtdPaging(self, stage=FIRST, levels=5 if five else 4, width=min(57 if five else 48, d.mgaw))
        parent = bool(flags & uapi.IOMMU_HWPT_ALLOC_NEST_PARENT)
        dirty = bool(flags & uapi.IOMMU_HWPT_ALLOC_DIRTY_TRACKING)
        if flags & ~SECOND_FLAGS or (parent and not self.nests) or (dirty and not self.tracks_dirty):
            raise EOPNOTSUPP("flags are not known, or this IOMMU has not what they ask for")
        if not d.second_stage:
            raise EOPNOTSUPP("this IOMMU has no second stage")
        levels, width = _second_stage(d)
        return VtdPaging(self, stage=SECOND, levels=levels, width=width, nest_parent=parent, dirty=dirty)

    def domain_alloc_nested(self, dev: Device, parent: Domain, flags: int, user_data: UserData) -> Domain:
        """intel_iommu_domain_alloc_nested()"""
        return new_nested(self, parent, flags, user_data)

    def domain_alloc_kvm(self, dev: Device, flags: int, tdp: TdpMetadata | None, memory: PhysicalMemory) -> Domain:
        """intel_iommu_domain_alloc_kvm()"""
        return new_kvm(self, flags, tdp, memory)

    # ---- for people ----

    def explain(self, dev: Endpoint, pasid: int | None, iova: int, access: int) -> Explanation:
        """The translation of one address, entry by entry, and what is cached of it."""
        from .vtd_explain import explain

        return explain(self, dev, pasid, iova, access)

    def step(self, step: Step) -> Row:
        """An entry that a walk has used."""
        from .vtd_explain import step_row

        return step_row(step)

    # ---- page requests ----

    def recoverable(self, fault: TranslationFault) -> bool:
        return fault.code in RECOVERABLE

    def page_request_refused(self, dev: Endpoint, pasid: int | None, iova: int, access: int) -> str:
        """prq_event_thread(): what it answers by itself."""
        if not canonical(iova, 5 if 5 in self.description.levels else 4):
            return f"address {iova:#x} is not canonical"
        if access & PRIV and access & (READ | WRITE):
            return "a privileged request"
        if access & EXEC and access & READ:
            return "an execute request"
        return ""

    # ---- for the sanitizer ----

    def _reach(self, dev: Endpoint, pasid: int | None) -> frozenset[object]:
        """The tags of the invalidations that drop what this requester has cached."""
        number = pasid or IOMMU_NO_PASID
        context = self.contexts.entries.get((dev, pasid))
        tags: set[object] = {(dev.name, number)}
        if context is not None:
            tags |= {context.entry.did, (context.entry.did, number)}
        return frozenset(tags)

    def due(
        self, dev: Endpoint, pasid: int | None, iova: int, access: int, level: int | None, *, leaf: bool, cache: str
    ) -> list[Due]:
        """The user's invalidation, which drops from both caches, or the driver's."""
        where = cache if cache == DEVICE_TLB else "IOTLB"
        reach = self._reach(dev, pasid)
        if level is None:
            return [Due(where, NOBODY, reach, user=False)]
        return [Due(where, self._flush_for(dev, pasid, iova, level, leaf=leaf), reach, leaf=leaf)]

    def _flush_for(self, dev: Endpoint, pasid: int | None, iova: int, level: int, *, leaf: bool) -> str:
        """The user's invalidation that has to follow a change of the first-stage entry of this level for iova."""
        handle = dev.group.handles.get(pasid or IOMMU_NO_PASID)
        size = 1 << 9 * level + 3
        words = flush_words(iova & -size, size >> 12)
        if not leaf:
            words += " without LEAF"
        caches = "IOTLB and device TLB" if dev.tlb is not None else "IOTLB"
        return f"{words} on hwpt {handle.domain.hwpt_id if handle is not None else '?'} ({caches})"

    # ---- domain ids ----

    def get_did(self, domain: VtdDomain, leaving: Domain | None = None) -> int:
        """domain_attach_iommu(): the domain's id on this unit; ENOSPC.

        leaving: what the driver has taken from the device before, so that its id is free if nobody else used it.
        """
        held = self._dids.get(domain)
        if held is not None:
            held[1] += 1
            return held[0]
        did = self._free_did(leaving)
        self._taken[did] += 1
        self._dids[domain] = [did, 1]
        domain.units[self] = None
        paging = domain.parent if isinstance(domain, VtdNested) else domain
        if isinstance(paging, VtdPaging | VtdKvm):
            self.set_root(paging.root, paging)
            paging.units[self] = None
        return did

    def _free_did(self, leaving: Domain | None) -> int:
        count = 1 << 4 + 2 * (self.cap & 7)  # cap_ndoms()
        did = next((n for n in range(FIRST_DID, count) if n not in self._taken), None)
        if did is not None:
            return did
        held = self._dids.get(leaving) if isinstance(leaving, VtdDomain) else None
        if held is None or held[1] > 1:
            raise ENOSPC("no domain id is free")
        return held[0]

    def put_did(self, domain: VtdDomain) -> None:
        """domain_detach_iommu()"""
        held = self._dids[domain]
        held[1] -= 1
        if not held[1]:
            del self._dids[domain]
            self._taken[held[0]] -= 1
            if not self._taken[held[0]]:
                del self._taken[held[0]]

    def did(self, domain: VtdDomain) -> int:
        return self._dids[domain][0]

    def freed(self, domain: VtdDomain) -> None:
        """A domain is gone; its id went with its last attachment."""
        if isinstance(domain, VtdPaging | VtdKvm) and self.roots.get(domain.root) is domain:
            self.set_root(domain.root, None)
        for monitor in self.monitors:
            monitor.freed(domain)

    # ---- switching ----

    def before_attach(self, dev: Endpoint, pasid: int) -> TornDown | None:
        """quirk, in mode vendor: the RID is blocked before anything is checked, and stays so when that fails."""
        return self._tear_down(dev, pasid) if self.vendor_replace and pasid == IOMMU_NO_PASID else None

    def switch(
        self, dev: Endpoint, pasid: int, old: Domain | None, new: VtdDomain, words: tuple[int, ...],
        torn_down: TornDown | None = None,
    ) -> None:  # fmt: skip
        """Store a PASID-table entry for new in the place of old's, and drop what was cached of old's."""
        switch = Switch(dev, pasid, old, new)
        if self.vendor_replace:
            self._vendor_switch(switch, words, torn_down or self._tear_down(dev, pasid))
        else:
            before = self.table(dev).read(pasid)
            self.table(dev).publish(pasid, words)
            switch.stores.append(Store("the whole entry", "new"))
            if before[0] & 1:
                for _ in self._forgetting(dev, pasid, PasidEntry.unpack(before)):
                    pass
        for monitor in self.monitors:
            monitor.switched(switch)

    def set_ssade(self, domain: VtdDomain, dev: Endpoint, pasid: int, *, enable: bool) -> None:
        """intel_pasid_setup_dirty_tracking(): one bit, then the caches that hold the entry."""
        words = self.table(dev).read(pasid)
        entry = PasidEntry.unpack(words)
        if not entry.present or entry.ssade == enable:
            return
        self.table(dev).store(pasid, 0, words[0] ^ 1 << 9)
        for _ in self._forgetting(dev, pasid, entry):
            pass

    def _forgetting(self, dev: Endpoint, pasid: int, before: PasidEntry) -> Iterator[str]:
        """What intel_pasid_tear_down_entry() flushes, one by one."""
        self.drop_context(dev, before.did, pasid)
        yield "the PASID-cache invalidation"
        if before.pgtt in (FIRST, PASS_THROUGH):
            self.drop_pasid(before.did, pasid)
        else:
            self.drop_domain(before.did)
        yield "the IOTLB invalidation"
        self.drop_devtlb(dev, pasid)
        yield "the device TLB invalidation"

    def _tear_down(self, dev: Endpoint, pasid: int) -> TornDown:
        """intel_pasid_tear_down_entry(): the entry as it was, and the stores made, in their order."""
        table = self.table(dev)
        words = table.read(pasid)
        done: list[str] = []
        if words[0] & 1:
            table.store(pasid, 0, words[0] & ~1)
            done.append("P cleared")
            done += self._forgetting(dev, pasid, PasidEntry.unpack(words))
            for word, value in enumerate(table.read(pasid)):
                if value:
                    table.store(pasid, word, 0)
                    done.append(f"word {word} cleared")
        return TornDown(words, done)

    def _vendor_switch(self, switch: Switch, words: tuple[int, ...], torn_down: TornDown) -> None:
        """Tear down, then build with P last (intel_pasid_setup_*); what a walk sees is noted after every store."""
        dev, pasid, table = switch.dev, switch.pasid, self.table(switch.dev)
        before, done = torn_down

        def note(what: str) -> None:
            switch.stores.append(Store(what, self.sees(dev, pasid, before, words)))

        for what in done:
            note(what)  # all of them leave the entry absent
        if words == ABSENT:
            return
        for word in (2, 1):
            if words[word]:
                table.store(pasid, word, words[word])
                note(f"word {word} built")
        table.store(pasid, 0, words[0] & ~1)
        note("word 0 built without P")
        table.store(pasid, 0, words[0])
        note("P set")


def _second_stage(d: VtdIommu) -> tuple[int, int]:
    """compute_vasz_lg2_ss(): the levels and the width.

    quirk: a width that fewer levels would hold takes one more where the hardware has them.
    """
    levels = set(d.levels)
    if d.mgaw > 48 and 5 in levels:
        return 5, min(57, d.mgaw)
    if d.mgaw > 39 and levels & {4, 5}:
        return 5 if 5 in levels else 4, min(48, d.mgaw)
    return 4 if 4 in levels else 5 if 5 in levels else 3, min(39, d.mgaw)
