"""One attachment as the SMMUv3 driver makes it: prepare, store to CD and STE, commit (arm_smmu_attach_state)."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from iommufd_uapi.smmuv3 import Cd, Cmd, Config, Eats, EventId, S1Dss, Ste
from iommufdd.errors import EINVAL, EOPNOTSUPP

from .ops import IOMMU_NO_PASID, Domain
from .replace import Store, Switch
from .smmuv3_regs import NONE, TEXT
from .smmuv3_ste import CD_FORMAT, STE_FORMAT, ZERO, Format, Words, cd_used, ste_safe, ste_used, update

if TYPE_CHECKING:
    from collections.abc import Callable

    from .ops import IommuOps
    from .smmuv3_master import Master, Vmaster
    from .smmuv3_tables import Table

Effect: TypeAlias = str | tuple[int, ...]  # what a request meets: a fault, or the bits that translate it


class User(NamedTuple):
    """struct arm_smmu_master_domain: somebody whose STE or CD names a paging domain's table."""

    master: Master
    domain: Domain  # the paging domain itself, or a nested one on it
    ssid: int


class Use(NamedTuple):
    """What came with it."""

    ats: bool
    iopf: bool  # page faults were switched on for it


class Write(NamedTuple):
    """An entry to be made equal to `target`."""

    table: Table
    at: int
    target: Words
    fmt: Format


class TableDomain(Domain):
    """struct arm_smmu_domain: a domain whose own table STEs and CDs name."""

    def __init__(self, owner: IommuOps) -> None:
        super().__init__(owner)
        self.users: dict[User, Use] = {}
        self.enforced = False  # enforce_cache_coherency

    def flush_tag(self) -> None:
        """arm_smmu_inv_flush_iotlb_tag(): nobody uses the ASID or VMID any more."""
        raise NotImplementedError


class NestedOn(Domain):
    """What a nested domain offers: the domain whose table is below it, and its device as the guest knows it."""

    parent: TableDomain

    def vmaster(self, master: Master) -> Vmaster | None:
        """arm_smmu_attach_prepare_vmaster(): ENOENT."""
        raise NotImplementedError


class Attach:
    """struct arm_smmu_attach_state: made by arm_smmu_attach_prepare(), after which nothing fails any more."""

    def __init__(
        self, master: Master, ssid: int, old: Domain | None, new: Domain, *, disable_ats: bool = False,
        cd_needs_ats: bool = False,
    ) -> None:  # fmt: skip
        """ENOENT (a nested domain whose device is no vDEVICE), EOPNOTSUPP, EINVAL."""
        self.master = master
        self.ssid = ssid
        self.old = old
        self.new = new
        paging = paging_of(new)
        wanted = paging is not None or cd_needs_ats
        self.ats = wanted and not disable_ats and master.ats_supported
        self.vmaster: Vmaster | None = new.vmaster(master) if isinstance(new, NestedOn) else None
        if paging is not None:
            iopf = new.iopf_handler is not None and _enable_iopf(master, new)
            if paging.enforced and not master.description.canwbs:
                if iopf:
                    master.iopf.disable(new)
                raise EINVAL(f"the domain forces write-back, which {master.name} cannot")
            paging.users[User(master, new, ssid)] = Use(self.ats, iopf)
        if not self.ats and master.ats_enabled:
            master.disable_ats()
        self._switch = Switch(master, ssid, old, new)

    # ---- the stores ----

    def switch(self, *, cd: Cd | None = None, ste: Ste | None = None, clear: bool = False) -> None:
        """Store a CD, then the STE of every stream; clear: then the CD that is not used any more."""
        master = self.master
        plan: list[Write] = []
        table = master.cd_table
        if cd is not None and table is not None:
            plan.append(Write(table, self.ssid, cd.words(), CD_FORMAT))
        if ste is not None:
            words = ste.words()
            plan += [Write(master.smmu.stream_table, sid, words, STE_FORMAT) for sid in master.streams]
            master.cd_table_in_ste = ste.config == Config.S1_TRANS
            master.ste_ats_enabled = ste.eats == Eats.TRANS
        if clear and table is not None and table.has_leaf(self.ssid):
            plan.append(Write(table, self.ssid, ZERO, CD_FORMAT))
        _carry_out(self._switch, master, plan)

    def commit(self) -> None:
        """arm_smmu_attach_commit(): caches of the device, then what the old domain had of it."""
        master = self.master
        master.vmaster = self.vmaster
        if self.ats and not master.ats_enabled:
            _atc_inv(master, IOMMU_NO_PASID)
            master.enable_ats()
        elif self.ats:
            _atc_inv(master, self.ssid)
        leave(master, self.ssid, self.old)
        _tell(self._switch, master)


def paging_of(domain: Domain | None) -> TableDomain | None:
    """to_smmu_domain_devices(): the domain whose table is used; none when blocked."""
    if isinstance(domain, NestedOn):
        return domain.parent
    return domain if isinstance(domain, TableDomain) else None


def leave(master: Master, ssid: int, old: Domain | None) -> None:
    """arm_smmu_remove_master_domain(), arm_smmu_install_old_domain_invs()"""
    paging = paging_of(old)
    if paging is None or old is None:
        return
    use = paging.users.pop(User(master, old, ssid), None)
    if use is not None and use.iopf:
        master.iopf.disable(old)
    if not paging.users:
        paging.flush_tag()


def remove_pasid(master: Master, ssid: int, old: Domain | None, blocked: Domain) -> None:
    """arm_smmu_blocking_set_dev_pasid(): clear the CD."""
    table, switch = master.cd_table, None
    if table is not None and table.has_leaf(ssid):
        switch = Switch(master, ssid, old, blocked)
        _carry_out(switch, master, [Write(table, ssid, ZERO, CD_FORMAT)])
    if master.ats_enabled:
        _atc_inv(master, ssid)
    leave(master, ssid, old)
    if switch is not None:
        _tell(switch, master)


def _enable_iopf(master: Master, new: Domain) -> bool:
    """arm_smmu_enable_iopf(): nothing for a device that does not stall. EOPNOTSUPP."""
    if not master.stall_enabled:
        return False
    if len(master.streams) != 1:
        raise EOPNOTSUPP(f"{master.name} stalls and has {len(master.streams)} streams")
    master.iopf.enable(new)
    return True


def _atc_inv(master: Master, ssid: int) -> None:
    """arm_smmu_atc_inv_master()"""
    for sid in master.streams:
        master.smmu.execute(Cmd.atc_inv(sid, ssid=ssid or None))


# ---- carrying out, and what a walk sees meanwhile ----


def _carry_out(switch: Switch, master: Master, plan: list[Write]) -> None:
    """Store by store, as the driver does, or entry by entry; what a walk sees is noted after each."""
    ssid = switch.pasid
    before, after = _now(master, ssid), _planned(master, ssid, plan)

    def note(what: str) -> None:
        now = _now(master, ssid)
        sees = "new" if now == after else "old" if now == before else now if isinstance(now, str) else "a third entry"
        switch.stores.append(Store(what, sees))

    for write in plan:
        _count(master, write)
        _write(master, write, note)


def _tell(switch: Switch, master: Master) -> None:
    """All caches have been told."""
    for monitor in master.smmu.monitors:
        monitor.switched(switch)


def _write(master: Master, write: Write, note: Callable[[str], None]) -> None:
    """arm_smmu_write_entry(), or the whole entry in one store."""
    table, at, target, fmt = write
    entry = table.read(at)
    if entry == target:
        return
    if not master.smmu.vendor_replace:
        table.publish(at, target)
        note(f"the whole {fmt.name}")
        _sync(master, write)
        return
    for stores in update(entry, target, fmt):
        for word, value in stores:
            table.store(at, word, value)
            note(f"{fmt.name} word {word}")
        _sync(master, write)


def _sync(master: Master, write: Write) -> None:
    """arm_smmu_sync_cd(), arm_smmu_ste_writer_sync_entry()"""
    if write.fmt is STE_FORMAT:
        master.smmu.execute(Cmd.cfgi_ste(write.at))
    else:
        for sid in master.streams:
            master.smmu.execute(Cmd.cfgi_cd(sid, write.at))


def _count(master: Master, write: Write) -> None:
    """arm_smmu_write_cd_entry(): how many CDs of PASIDs are valid."""
    if write.fmt is CD_FORMAT and write.at != IOMMU_NO_PASID:
        valid = Cd.mask("v")[0]
        master.used_ssids += bool(write.target[0] & valid) - bool(write.table.read(write.at)[0] & valid)


def _now(master: Master, ssid: int) -> Effect:
    table = master.cd_table
    cd = table.read(ssid) if table is not None else ZERO
    return effect(master.smmu.stream_table.read(master.sid), cd, ssid)


def _planned(master: Master, ssid: int, plan: list[Write]) -> Effect:
    """When all is stored."""
    table = master.cd_table
    ste = master.smmu.stream_table.read(master.sid)
    cd = table.read(ssid) if table is not None else ZERO
    for write in plan:
        if write.fmt is STE_FORMAT:
            ste = write.target
        else:
            cd = write.target
    return effect(ste, cd, ssid)


@functools.lru_cache(1024)
def effect(ste_words: Words, cd_words: Words, ssid: int) -> Effect:
    """What a request meets with this STE and CD of the kernel's: the event, or the bits that count."""
    ste, cd = Ste.of(ste_words), Cd.of(cd_words)
    if not ste.v:
        return _fault(EventId.C_BAD_STE)
    if ste.config < 4:
        return TEXT[NONE]
    if ste.config != Config.S1_TRANS:
        return _masked(ste_words, ste_used(ste_words), ste_safe(ste_words, ste_words))
    if ssid == IOMMU_NO_PASID and ste.s1cdmax and ste.s1dss != S1Dss.SSID0:
        return _fault(EventId.F_STREAM_DISABLED) if ste.s1dss != S1Dss.BYPASS else ()
    if not cd.v:
        return _fault(EventId.C_BAD_CD)
    return _masked(cd_words, cd_used(cd_words), ZERO)


def _masked(words: Words, used: Words, safe: Words) -> tuple[int, ...]:
    return tuple(word & use & ~free for word, use, free in zip(words, used, safe, strict=True))


def _fault(code: EventId) -> str:
    return f"fault {code:#x}: {code.name}, {TEXT[code]}"
