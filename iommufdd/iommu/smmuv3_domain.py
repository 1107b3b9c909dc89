"""SMMUv3's domains of the kernel: paging through stage 1 or stage 2, and blocked (arm-smmu-v3.c)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from iommufd_uapi.smmuv3 import MAIR_LINUX, Cd, Cmd, Config, Eats, Op, Rgn, S1Dss, Sh, Ste, Tg0, Tlbi
from iommufdd.errors import EBUSY, EINVAL, ENOSPC
from iommufdd.user import PAGE_SIZE

from .ops import IOMMU_NO_PASID, Device, Domain, DomainType
from .smmuv3_attach import Attach, TableDomain, remove_pasid
from .smmuv3_dirty import SmmuDirty
from .smmuv3_hw import master_of, new_table
from .smmuv3_regs import size_field

if TYPE_CHECKING:
    from collections.abc import Iterator

    from iommufd_uapi.smmuv3 import Command

    from .endpoint import Endpoint
    from .smmuv3 import SmmuV3
    from .smmuv3_master import Master

SZ_2M, SZ_1G, SZ_4T = 1 << 21, 1 << 30, 1 << 42
PAGES = {4: 1 << 12 | SZ_2M | SZ_1G, 16: 1 << 14 | 1 << 25, 64: 1 << 16 | 1 << 29}  # sizes that come with a granule
TG = {12: Tg0.K4, 14: Tg0.K16, 16: Tg0.K64}


class SmmuPaging(TableDomain):
    """A stage 1 or 2 of the kernel's; the table's bytes are not kept, its areas translate."""

    owner: SmmuV3

    def __init__(self, owner: SmmuV3, *, stage: int, nest_parent: bool = False, dirty: bool = False) -> None:
        """arm_smmu_domain_finalise(): EBUSY, ENOSPC when no ASID or VMID is free."""
        super().__init__(owner)
        d = owner.description
        self.stage = stage
        self.nest_parent = nest_parent
        granule = next(size for size in (4, 16, 64) if size in d.granules)
        limit = 52 if granule == 64 else 48
        self.granule = granule.bit_length() + 9
        self.pgsize_bitmap = PAGES[granule] | (SZ_4T if granule == 64 and d.oas == 52 else 0)
        self.ias = min(d.vax if stage == 1 else d.oas, limit)
        self.oas = min(d.oas, limit)
        self.aperture_end = (1 << self.ias) - 1
        self.root = new_table()
        self.asid = self.vmid = 0
        if stage == 1:
            self.asid = owner.asids.take(EBUSY)
        else:
            self.vmid = owner.vmids.take(ENOSPC)
        self.dirty_bits = SmmuDirty(self) if dirty else None
        self.dirty_ops = self.dirty_bits
        owner.set_root(self.root, self)

    def free(self) -> None:
        """arm_smmu_domain_free_paging()"""
        if self.stage == 1:
            self.owner.asids.give(self.asid)
        else:
            self.owner.vmids.give(self.vmid)
        self.owner.freed(self)

    # ---- what attaches it ----

    def attach_dev(self, dev: Device, old: Domain | None) -> None:
        """arm_smmu_attach_dev(): EINVAL, EBUSY, EOPNOTSUPP."""
        master = _master(dev)
        smmu = master.smmu
        if self.owner is not smmu:
            raise EINVAL("the domain was made for another SMMU")
        if self.stage == 1:
            smmu.alloc_cd(master, IOMMU_NO_PASID)
        elif master.used_ssids:
            raise EBUSY(f"PASIDs of {master.name} are in use, and a stage 2 has none")
        attach = Attach(master, IOMMU_NO_PASID, old, self)
        if self.stage == 1:
            ste = smmu.cd_table_ste(master, S1Dss.SSID0, ats=attach.ats)
            attach.switch(cd=self.cd(master), ste=ste)
        else:
            attach.switch(ste=self.stage2_ste(master, ats=attach.ats), clear=True)
        attach.commit()

    def set_dev_pasid(self, dev: Device, pasid: int, old: Domain | None) -> None:
        """arm_smmu_s1_set_dev_pasid(): EINVAL, EOPNOTSUPP."""
        master = _master(dev)
        smmu = master.smmu
        if self.owner is not smmu or self.stage != 1:
            raise EINVAL("the domain was made for another SMMU, or is no stage 1")
        if not master.cd_table_in_ste and master.group.domain.type is not DomainType.BLOCKED:
            raise EINVAL(f"requests of {master.name} without PASID use no CD table")
        smmu.alloc_cd(master, pasid)
        attach = Attach(master, pasid, old, self)
        installed = master.cd_table_in_ste and master.ste_ats_enabled == attach.ats
        ste = None if installed else smmu.cd_table_ste(master, S1Dss.TERMINATE, ats=attach.ats)
        attach.switch(cd=self.cd(master), ste=ste)
        attach.commit()

    def enforce_cache_coherency(self) -> bool:
        """arm_smmu_enforce_cache_coherency()"""
        self.enforced = all(user.master.description.canwbs for user in self.users)
        return self.enforced

    def cd(self, master: Master) -> Cd:
        """arm_smmu_make_s1_cd()"""
        coherent = self.owner.description.coherent_walk
        region = Rgn.WBWA if coherent else Rgn.NC
        httu = self.dirty_bits is not None
        return Cd(
            v=1, aa64=1, r=1, a=1, aset=1, epd1=1, t0sz=64 - self.ias, tg0=TG[self.granule], ir0=region, or0=region,
            sh0=Sh.ISH if coherent else Sh.OSH, ips=size_field(self.oas), s=master.stall_enabled, ha=httu, hd=httu,
            asid=self.asid, ttb0=self.root, mair=MAIR_LINUX,
        )  # fmt: skip

    def stage2_ste(self, master: Master, *, ats: bool) -> Ste:
        """arm_smmu_make_s2_domain_ste()"""
        d = self.owner.description
        region = Rgn.WBWA if d.coherent_walk else Rgn.NC
        return Ste(
            v=1, config=Config.S2_TRANS, eats=Eats.TRANS if ats else Eats.ABT, s2fwb=d.s2fwb and self.nest_parent,
            shcfg=1, s2vmid=self.vmid, s2t0sz=64 - self.ias, s2sl0=self._sl0(), s2ir0=region, s2or0=region,
            s2sh0=Sh.ISH if d.coherent_walk else Sh.OSH, s2tg=TG[self.granule], s2ps=size_field(self.oas), s2aa64=1,
            s2ptw=1, s2s=master.stall_enabled, s2r=1, s2ttb=self.root,
        )  # fmt: skip

    def _sl0(self) -> int:
        """VTCR.SL0 (arm_64_lpae_alloc_pgtable_s2, arm_lpae_concat_mandatory)."""
        granule, oas = self.granule, self.oas
        start = 4 - -((granule - self.ias) // (granule - 3))
        joined = (
            (granule == 14 and start == 0 and 48 in (oas, self.ias))
            or (granule == 12 and start == 0 and oas in (40, 42))
            or (granule == 14 and start == 1 and oas == 40)
        )  # tables in a row, in the place of one more level
        return ~(start + joined + (granule == 12)) & 3

    # ---- what the driver flushes ----

    def unmapped(self, iova: int, last: int) -> None:
        """arm_smmu_iotlb_sync()"""
        if self.dirty_bits is not None:
            self.dirty_bits.forget(iova, last)
        self.invalidate(iova, last)

    def invalidate(self, iova: int, last: int) -> None:
        """arm_smmu_domain_inv_range(), in the order of the invalidation array: TLBI, first stages, ATC."""
        for command in self._invalidations(iova, last):
            self.owner.execute(command)

    def _invalidations(self, iova: int, last: int) -> Iterator[Command]:
        if not self.users:
            return
        op, everything = (Op.TLBI_NH_VA, Op.TLBI_NH_ASID) if self.stage == 1 else (Op.TLBI_S2_IPA, Op.TLBI_S12_VMALL)
        too_big = self._too_big(last - iova + 1)
        if too_big:
            yield Tlbi(op=everything, asid=self.asid, vmid=self.vmid)
        else:
            yield from self._ranges(op, iova, last)
            if self.nest_parent:  # which S12_VMALL does too
                yield Cmd.tlbi_nh_all(self.vmid)
        streams = {(sid, user.ssid) for user, use in self.users.items() if use.ats for sid in user.master.streams}
        for sid, ssid in sorted(streams):
            if self.nest_parent:
                yield Cmd.atc_inv(sid)
            else:
                addr, size = _span(iova, last)
                yield Cmd.atc_inv(sid, addr, size, ssid=ssid or None)

    def _too_big(self, size: int) -> bool:
        """arm_smmu_inv_size_too_big()"""
        if size >= 2**64 - 1:
            return True
        granule = PAGE_SIZE
        return not self.owner.description.range_invalidation and size >= (granule >> 3) * granule

    def _ranges(self, op: Op, iova: int, last: int) -> Iterator[Command]:
        """arm_smmu_cmdq_batch_add_range()"""
        granule = self.granule
        if not self.owner.description.range_invalidation:
            for addr in range(iova, last + 1, 1 << granule):
                yield Tlbi(op=op, asid=self.asid, vmid=self.vmid, leaf=1, addr=addr & -4096)
            return
        pages = (last - iova + 1) >> granule
        while pages > 0:
            scale = (pages & -pages).bit_length() - 1
            num = pages >> scale & 31
            yield Tlbi(op=op, asid=self.asid, vmid=self.vmid, leaf=1, ttl=3, tg=(granule - 10) // 2, num=num - 1,
                       scale=scale, addr=iova & -4096)  # fmt: skip
            pages -= num << scale
            iova += num << scale + granule

    def flush_tag(self) -> None:
        """arm_smmu_inv_flush_iotlb_tag(): nobody uses the ASID or VMID any more."""
        op = Op.TLBI_NH_ASID if self.stage == 1 else Op.TLBI_S12_VMALL
        self.owner.execute(Tlbi(op=op, asid=self.asid, vmid=self.vmid))


class SmmuBlocked(Domain):
    """arm_smmu_blocked_domain"""

    type = DomainType.BLOCKED
    owner: SmmuV3

    def attach_dev(self, dev: Device, old: Domain | None) -> None:
        """arm_smmu_attach_dev_blocked(); the CD table stays in the STE while PASIDs use it."""
        master = _master(dev)
        master.vmaster = None
        smmu = master.smmu
        attach = Attach(master, IOMMU_NO_PASID, old, self, cd_needs_ats=bool(master.used_ssids))
        ste = smmu.cd_table_ste(master, S1Dss.TERMINATE, ats=attach.ats) if master.used_ssids else Ste.abort()
        attach.switch(ste=ste, clear=True)
        attach.commit()

    def set_dev_pasid(self, dev: Device, pasid: int, old: Domain | None) -> None:
        """arm_smmu_blocking_set_dev_pasid()"""
        master = _master(dev)
        remove_pasid(master, pasid, old, self)
        sid_domain = master.group.domain
        if not master.used_ssids and sid_domain.type is DomainType.BLOCKED:
            self.attach_dev(dev, sid_domain)


def _master(dev: Device) -> Master:
    endpoint: Endpoint = dev  # type: ignore[assignment]
    return master_of(endpoint)


def _span(iova: int, last: int) -> tuple[int, int]:
    """arm_smmu_atc_inv_to_cmd(): the aligned power of two of 4 KiB pages that covers the range."""
    first, end = iova >> 12, last >> 12
    size = (first ^ end).bit_length()
    return first >> size << size + 12, size
