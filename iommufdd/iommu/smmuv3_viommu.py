"""vIOMMU type ARM_SMMUV3: nested domains from vSTEs, vDEVICEs, invalidations and events (arm-smmu-v3-iommufd.c)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import iommufd_uapi.iommufd as uapi
from iommufd_uapi.smmuv3 import STE_NESTING_ALLOWED, Cmd, Config, Eats, EventRecord, Op, Ste
from iommufdd.errors import EBUSY, EINVAL, EIO, ENOENT, EOPNOTSUPP

from .ops import IOMMU_NO_PASID, Device, Domain, DomainType
from .smmuv3_attach import Attach, NestedOn
from .smmuv3_hw import master_of
from .smmuv3_master import Master, Vmaster

if TYPE_CHECKING:
    from collections.abc import Callable

    from iommufd_uapi.smmuv3 import AtcInv, Cfgi, Command, Tlbi
    from iommufdd.user_data import UserData, UserDataArray

    from .ops import ViommuPort
    from .smmuv3 import SmmuV3
    from .smmuv3_domain import SmmuPaging

BATCH = 63  # commands that go to the hardware together: CMDQ_BATCH_ENTRIES - 1
_VMID_OPS = frozenset((Op.TLBI_NH_VA, Op.TLBI_NH_VAA, Op.TLBI_NH_ALL, Op.TLBI_NH_ASID))
_SID_OPS = frozenset((Op.ATC_INV, Op.CFGI_CD, Op.CFGI_CD_ALL))


class Vsmmu:
    """struct arm_vsmmu"""

    def __init__(self, smmu: SmmuV3, core: ViommuPort, parent: SmmuPaging) -> None:
        self.smmu = smmu
        self.core = core
        self.parent = parent
        self.vmid = parent.vmid

    def destroy(self) -> None:
        """It has nothing of its own."""

    def alloc_domain_nested(self, flags: int, user_data: UserData) -> Domain:
        """arm_vsmmu_alloc_domain_nested(): EOPNOTSUPP, EINVAL, EFAULT, EIO (the STE)."""
        if flags:
            raise EOPNOTSUPP(f"a nested domain takes no flags, not {flags:#x}")
        arg = user_data.copy_struct(uapi.HwptArmSmmuv3, uapi.IOMMU_HWPT_DATA_ARM_SMMUV3, "ste")
        return SmmuNested(self, _valid_vste(arg.ste))

    def vdevice_init(self, dev: Device, virt_id: int) -> Callable[[], None] | None:
        """arm_vsmmu_vdevice_init(): EOPNOTSUPP."""
        one_stream(dev)
        return None

    def cache_invalidate(self, array: UserDataArray) -> None:
        """arm_vsmmu_cache_invalidate(): EINVAL, E2BIG, EFAULT, EIO; all entries are copied before any work.

        quirk: entry_num counts what was converted, though what came after the last whole batch was not issued.
        """
        total, array.entry_num = array.entry_num, 0
        kind = uapi.IOMMU_VIOMMU_INVALIDATE_DATA_ARM_SMMUV3
        whole = type(array)(array.caller, array.data_type, array.uptr, array.entry_len, total)
        entries = whole.copy_all(uapi.ViommuArmSmmuv3Invalidate, kind)
        batch: list[tuple[Command, str]] = []
        for entry in entries:
            command = Cmd.decode(entry.pack())
            text = f"CMD_{command} on {self.core}" if self.smmu.monitors else ""  # before the host's ids are in it
            batch.append((self._convert(command), text))
            array.entry_num += 1
            if len(batch) == BATCH or array.entry_num == total:
                self._issue(batch)
                batch.clear()

    def _issue(self, batch: list[tuple[Command, str]]) -> None:
        """arm_smmu_cmdq_issue_cmdlist()"""
        for command, text in batch:
            self.smmu.execute(command, user=True)
            for monitor in self.smmu.monitors:
                monitor.flushed(text)

    def _convert(self, command: Command) -> Command:
        """arm_vsmmu_convert_user_cmd(): the host's VMID and StreamID in the place of the guest's. EIO."""
        op = command.op
        if op == Op.TLBI_NSNH_ALL:
            return Cmd.tlbi_nh_all(self.vmid)
        if op in _VMID_OPS:
            tlbi: Tlbi = command  # type: ignore[assignment]
            tlbi.vmid = self.vmid
        elif op in _SID_OPS:
            addressed: Cfgi | AtcInv = command  # type: ignore[assignment]
            dev = self.core.find_dev(addressed.sid)
            if dev is None:
                raise EIO(f"no vDEVICE has the StreamID {addressed.sid:#x} ({command})")
            addressed.sid = _master(dev).sid
        else:
            raise EIO(f"{command} is not for a guest")
        return command

    def report_event(self, vsid: int, record: EventRecord) -> None:
        """arm_vmaster_report_event(): EOPNOTSUPP when nobody listens."""
        words = record.words()
        w0 = words[0] & 0xFFFF_FFFF | (vsid & 0xFFFF_FFFF) << 32
        data = uapi.VeventArmSmmuv3(evt=(w0, *words[1:])).pack()
        self.core.report_event(uapi.IOMMU_VEVENTQ_TYPE_ARM_SMMUV3, data)


class SmmuNested(NestedOn):
    """struct arm_smmu_nested_domain: what a guest's STE asks for, over the vIOMMU's second stage."""

    type = DomainType.NESTED
    owner: SmmuV3
    parent: SmmuPaging

    def __init__(self, vsmmu: Vsmmu, vste: Ste) -> None:
        super().__init__(vsmmu.smmu)
        self.vsmmu = vsmmu
        self.parent = vsmmu.parent
        self.config = vste.config  # 0 of an invalid STE, which aborts
        self.enable_ats = vste.config == Config.S1_TRANS and vste.eats == Eats.TRANS
        vste.eats = Eats.ABT
        self.vste = vste

    def attach_dev(self, dev: Device, old: Domain | None) -> None:
        """arm_smmu_attach_dev_nested(): EINVAL, EBUSY, ENOENT, EOPNOTSUPP."""
        master = _master(dev)
        if self.owner is not master.smmu:
            raise EINVAL("the vIOMMU belongs to another SMMU")
        if master.used_ssids:
            raise EBUSY(f"PASIDs of {master.name} are in use")
        disable = self.config == Config.S1_TRANS and not self.enable_ats  # or the guest would not flush the ATC
        attach = Attach(master, IOMMU_NO_PASID, old, self, disable_ats=disable)
        attach.switch(ste=self.ste(master, ats=attach.ats))
        attach.commit()

    def ste(self, master: Master, *, ats: bool) -> Ste:
        """arm_smmu_make_nested_domain_ste()"""
        if self.config not in (Config.S1_TRANS, Config.BYPASS):
            return Ste.abort()
        ste = self.parent.stage2_ste(master, ats=ats)
        if self.config == Config.S1_TRANS:
            ste.config, ste.mev = Config.NESTED, 1
            for name in ("s1fmt", "s1contextptr", "s1cdmax", "s1dss", "s1cir", "s1cor", "s1csh", "s1stalld"):
                setattr(ste, name, getattr(self.vste, name))
        return ste

    def vmaster(self, master: Master) -> Vmaster | None:
        """arm_smmu_attach_prepare_vmaster(): without a vDEVICE only abort and bypass will do. ENOENT."""
        vsid = self.vsmmu.core.get_vdev_id(master)
        if vsid is not None:
            return Vmaster(self.vsmmu, vsid)
        if self.config in (Config.ABORT, Config.BYPASS):
            return None
        raise ENOENT(f"{master.name} is no vDEVICE of the vIOMMU")

    def free(self) -> None:
        """arm_smmu_domain_nested_free()"""
        for monitor in self.owner.monitors:
            monitor.freed(self)


def _valid_vste(words: tuple[int, ...]) -> Ste:
    """arm_smmu_validate_vste(): EIO."""
    vste = Ste.of(words)
    if not vste.v:
        return Ste()
    for at, mask in enumerate(STE_NESTING_ALLOWED):
        if words[at] & ~mask:
            raise EIO(f"the STE has bits {words[at] & ~mask:#x} in word {at}, which are the host's")
    if vste.config not in (Config.ABORT, Config.BYPASS, Config.S1_TRANS):
        raise EIO(f"the STE has Config {vste.config}")
    if vste.eats not in (Eats.ABT, Eats.TRANS):
        raise EIO(f"the STE has EATS {vste.eats}")
    return vste


def one_stream(dev: Device) -> None:
    """EOPNOTSUPP unless the device has one StreamID."""
    if len(_master(dev).streams) != 1:
        raise EOPNOTSUPP(f"{dev.name} has {len(_master(dev).streams)} streams, a vDEVICE has one")


def _master(dev: Device) -> Master:
    assert isinstance(dev, Master)
    return master_of(dev)
