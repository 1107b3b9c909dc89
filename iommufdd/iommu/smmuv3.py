"""ARM SMMUv3: the driver's side, what iommufd calls (drivers/iommu/arm/arm-smmu-v3, 7.2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import iommufd_uapi.iommufd as uapi
from iommufd_uapi.smmuv3 import Config, Eats, EventRecord, Rgn, S1Dss, Sh, Ste
from iommufdd.errors import EINVAL, EOPNOTSUPP, IommufdError

from .lpae import AF
from .ops import Cap, Device, Domain
from .smmuv3_domain import SmmuBlocked, SmmuPaging
from .smmuv3_hw import SmmuV3Hardware
from .smmuv3_master import Master
from .smmuv3_regs import RELAYED, TRANSLATION_RELATED
from .smmuv3_viommu import Vsmmu
from .tegra241_cmdqv import Cmdqv, Vintf
from .walk import TranslationFault

if TYPE_CHECKING:
    from iommufdd.description import DeviceDescription, SmmuV3Iommu
    from iommufdd.user_data import UserData

    from .endpoint import Endpoint
    from .explain import Explanation, Row
    from .group import IommuGroup
    from .monitor import Due
    from .ops import ViommuDriver, ViommuPort
    from .walk import Step

PAGING_FLAGS = uapi.IOMMU_HWPT_ALLOC_DIRTY_TRACKING | uapi.IOMMU_HWPT_ALLOC_PASID | uapi.IOMMU_HWPT_ALLOC_NEST_PARENT


class Ids:
    """ASIDs or VMIDs in use; 0 is never given away."""

    def __init__(self, bits: int) -> None:
        self._bits = bits
        self._taken: set[int] = {0}
        self._next = 1  # no id below it is free

    def take(self, error: type[IommufdError]) -> int:
        """The lowest that is free; `error` when none is."""
        while self._next in self._taken:
            self._next += 1
        if self._next >> self._bits:
            raise error(f"all {(1 << self._bits) - 1} ids are taken")
        self._taken.add(self._next)
        return self._next

    def give(self, number: int) -> None:
        self._taken.discard(number)
        self._next = min(self._next, number)


class SmmuV3(SmmuV3Hardware):
    """One SMMU: struct iommu_ops, and the commands that the driver sends to the hardware below it."""

    driver = "arm-smmu-v3"
    user_pasid_table = True
    page_request_flags = 0
    hardware_bits = AF

    def __init__(self, description: SmmuV3Iommu) -> None:
        super().__init__(description)
        self.name = description.name
        self.reserved = description.reserved
        self.asids = Ids(description.asid_bits)
        self.vmids = Ids(description.vmid_bits)
        self.cmdqv = Cmdqv(description) if description.cmdqv else None
        self.blocked_domain: Domain = SmmuBlocked(self)
        self.vendor_replace = False  # replay the driver's own stores

    def new_device(self, description: DeviceDescription, group: IommuGroup) -> Endpoint:
        """A function behind this SMMU (arm_smmu_probe_device)."""
        master = Master(self, description, group)
        for sid in master.streams:
            self.streams[sid] = master
            self.stream_table.add(sid)
        return master

    # ---- struct iommu_ops ----

    @property
    def nests(self) -> bool:
        """ARM_SMMU_FEAT_NESTING"""
        return self.description.stage1 and self.description.stage2

    def capable(self, dev: Device, cap: Cap) -> bool:
        """arm_smmu_capable()"""
        assert isinstance(dev, Master)
        d = self.description
        if cap is Cap.CACHE_COHERENCY:
            return d.coherent_walk
        if cap is Cap.ENFORCE_CACHE_COHERENCY:
            return dev.description.canwbs
        if cap is Cap.DIRTY_TRACKING:
            return d.httu == "dirty" and d.coherent_walk
        return cap is Cap.PCI_ATS_SUPPORTED and dev.ats_supported

    def hw_info(self, dev: Device, info_type: int) -> tuple[int, bytes]:
        """arm_smmu_hw_info(): EOPNOTSUPP."""
        if info_type == uapi.IOMMU_HW_INFO_TYPE_TEGRA241_CMDQV and self.cmdqv is not None:
            return info_type, self.cmdqv.hw_info()
        if info_type not in (uapi.IOMMU_HW_INFO_TYPE_DEFAULT, uapi.IOMMU_HW_INFO_TYPE_ARM_SMMUV3):
            raise EOPNOTSUPP(f"hw_info type {info_type:#x} is not this SMMU's")
        info = uapi.HwInfoArmSmmuv3(idr=self.idr, aidr=self.aidr)
        return uapi.IOMMU_HW_INFO_TYPE_ARM_SMMUV3, info.pack()

    def domain_alloc_paging(self, dev: Device, flags: int, user_data: UserData | None) -> Domain:
        """arm_smmu_domain_alloc_paging_flags(): EOPNOTSUPP, EBUSY, ENOSPC."""
        d = self.description
        if flags & ~PAGING_FLAGS or user_data is not None:
            raise EOPNOTSUPP("flags are not known, or there is data, which SMMUv3's paging domains do not take")
        if flags == uapi.IOMMU_HWPT_ALLOC_NEST_PARENT:
            if not self.nests:
                raise EOPNOTSUPP("this SMMU does not nest")
            return SmmuPaging(self, stage=2, nest_parent=True)
        if flags & uapi.IOMMU_HWPT_ALLOC_NEST_PARENT or (flags and not d.stage1):
            raise EOPNOTSUPP("a nest parent has neither PASIDs nor dirty tracking, and these need a stage 1")
        dirty = bool(flags & uapi.IOMMU_HWPT_ALLOC_DIRTY_TRACKING)
        return SmmuPaging(self, stage=1 if d.stage1 else 2, dirty=dirty)

    # ---- struct iommu_ops: vIOMMU ----

    def viommu_supported(self, dev: Device, viommu_type: int) -> bool:
        """arm_smmu_get_viommu_size(): a guest's memory attributes must not reach behind the caches."""
        assert isinstance(dev, Master)
        coherent = dev.description.canwbs or self.description.s2fwb
        known = viommu_type == uapi.IOMMU_VIOMMU_TYPE_ARM_SMMUV3 or (
            viommu_type == uapi.IOMMU_VIOMMU_TYPE_TEGRA241_CMDQV and self.cmdqv is not None
        )
        return self.nests and coherent and known

    def viommu_init(self, viommu: ViommuPort, parent: Domain, user_data: UserData | None) -> ViommuDriver:
        """arm_vsmmu_init(): EINVAL, and what a Vintf raises."""
        if not isinstance(parent, SmmuPaging) or parent.owner is not self:
            raise EINVAL("the parent was made for another SMMU")
        if viommu.viommu_type == uapi.IOMMU_VIOMMU_TYPE_TEGRA241_CMDQV:
            return Vintf(self, viommu, parent, user_data)
        return Vsmmu(self, viommu, parent)

    # ---- for people and the sanitizer ----

    def tag_words(self, tag: object) -> str:
        """The tag of an Invalidation: "vmid 1", "vmid 1, asid 5", "vfio0", "vfio0, ssid 3", "all"."""
        if not isinstance(tag, tuple):
            return f"vmid {tag}" if isinstance(tag, int) else str(tag)
        of, number = tag
        if isinstance(of, int):
            return f"vmid {of}, asid {number}"
        return str(of) if number is None else f"{of}, ssid {number}"

    def explain(self, dev: Endpoint, pasid: int | None, iova: int, access: int) -> Explanation:
        """The translation of one address, entry by entry, and what is cached of it."""
        from .smmuv3_explain import explain

        return explain(self, dev, pasid, iova, access)

    def step(self, step: Step) -> Row:
        """An entry that a walk has used."""
        from .smmuv3_explain import step_row

        return step_row(step)

    def due(
        self, dev: Endpoint, pasid: int | None, iova: int, access: int, level: int | None, *, leaf: bool, cache: str
    ) -> list[Due]:
        """The commands that are missing."""
        from .smmuv3_due import due

        return due(self, dev, pasid, iova, access, level, leaf=leaf, cache=cache)

    # ---- page requests and events ----

    def recoverable(self, fault: TranslationFault) -> bool:
        return fault.code in TRANSLATION_RELATED

    def page_request_refused(self, dev: Endpoint, pasid: int | None, iova: int, access: int) -> str:
        """arm_smmu_handle_ppr()"""
        return "the driver denies all page requests (PRI)"

    def handle_event(self, dev: Master, entry: EventRecord) -> bool:
        """arm_smmu_handle_event(), of what is not stalled: to the vIOMMU when the guest's own stage stopped."""
        stage2 = bool(getattr(entry, "s2", 0))
        if entry.id not in RELAYED or dev.vmaster is None or stage2:
            return False
        try:
            dev.vmaster.vsmmu.report_event(dev.vmaster.vsid, entry)
        except EOPNOTSUPP:
            return False
        return True

    # ---- the kernel's tables ----

    def alloc_cd(self, master: Master, ssid: int) -> None:
        """arm_smmu_alloc_cd_ptr(): the CD table of a device, and the leaf for a CD."""
        if master.cd_table is None:
            master.cd_table = self.new_cd_table(master, master.ssid_bits)
        master.cd_table.add(ssid)

    def cd_table_ste(self, master: Master, s1dss: S1Dss, *, ats: bool) -> Ste:
        """arm_smmu_make_cdtable_ste()"""
        table = master.cd_table
        assert table is not None
        return Ste(
            v=1, config=Config.S1_TRANS, s1fmt=table.s1fmt, s1contextptr=table.address, s1cdmax=table.s1cdmax,
            s1dss=s1dss, s1cir=Rgn.WBWA, s1cor=Rgn.WBWA, s1csh=Sh.ISH, eats=Eats.TRANS if ats else Eats.ABT,
            s1stalld=self.description.stall != "none" and not master.stall_enabled,
            shcfg=s1dss == S1Dss.BYPASS,
        )  # fmt: skip

    def freed(self, domain: SmmuPaging) -> None:
        """A domain is gone, and its table with it."""
        self.set_root(domain.root, None)
        for monitor in self.monitors:
            monitor.freed(domain)
