"""SMMUv3's caches and the commands that drop from them (IHI0070 chapter 4; 3.17 for the tags)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from iommufd_uapi.smmuv3 import ATC_INV_SIZE_ALL, AtcInv, Cfgi, Op, ResumeCommand, Tlbi

from .monitor import Invalidation, Monitor
from .tlb import ContextCache, Tlb, TlbEntry

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable

    from iommufd_uapi.smmuv3 import Command
    from iommufdd.description import SmmuV3Iommu

    from .smmuv3_hw import Stream
    from .smmuv3_master import Master
    from .smmuv3_walk import Context
    from .tlb import Space

STAGE2, TABLES = -1, -2  # in the place of an ASID: what stage 2 alone translates, and pages of stage-1 tables
EVERYTHING = 0, 2**64 - 1


class IllegalCommand(Exception):
    """CERROR_ILL: the command queue stops at a command that this SMMU does not know."""


class CommandQueue:
    """The caches of one SMMU, and what each command does to them, at once: every command is followed by CMD_SYNC."""

    def __init__(self, description: SmmuV3Iommu) -> None:
        self.description = description
        self.caches = description.caches
        self.iotlb = Tlb(description.caches)  # a space per (VMID, ASID)
        self.stes: ContextCache[Stream] = ContextCache(description.caches)  # by device
        self.l1cds: ContextCache[int] = ContextCache(description.caches)  # by (device, index)
        self.contexts: ContextCache[Context] = ContextCache(description.caches)  # the CD cache, by (device, PASID)
        self.streams: dict[int, Master] = {}
        self.monitors: list[Monitor] = []

    def execute(self, command: Command, *, user: bool = False) -> None:
        """Do it; user: a guest's command, with the host's VMID and StreamIDs in it. IllegalCommand."""
        op = command.op
        if isinstance(command, Tlbi) and op in _TLBI:
            _TLBI[op](self, command, user)
        elif isinstance(command, Cfgi):
            self._cfgi(command, user)
        elif op == Op.CFGI_ALL:
            self.stes.entries.clear()
            self._drop_cds(Invalidation("STE cache", "all", "all", user=user, command="CMD_CFGI_ALL"), None, None)
        elif isinstance(command, AtcInv):
            self._atc_inv(command, user)
        elif isinstance(command, ResumeCommand):
            master = self.streams.get(command.sid)
            if master is not None:
                master.resumed(command.stag, command.resp)
        elif op not in (Op.SYNC, Op.PREFETCH_CONFIG, Op.PREFETCH_ADDR, Op.PRI_RESP):
            raise IllegalCommand(f"{command}")

    def _dropped(self, what: Invalidation) -> None:
        for monitor in self.monitors:
            monitor.invalidated(what)

    # ---- configuration (4.3) ----

    def _cfgi(self, command: Cfgi, user: bool) -> None:
        master = self.streams.get(command.sid)
        if master is None:
            return
        name = f"CMD_{Op(command.op).name}"
        if command.op == Op.CFGI_STE:
            self.stes.drop(lambda key, _: key is master)
            what = Invalidation("STE cache", "stream", master.name, user=user, command=name)
            self._drop_cds(what, master, None)
        elif command.op == Op.CFGI_CD_ALL:
            self._drop_cds(Invalidation("CD cache", "stream", master.name, user=user, command=name), master, None)
        else:
            what = Invalidation("CD cache", "CD", (master.name, command.ssid), leaf=bool(command.leaf), user=user,
                                command=name)  # fmt: skip
            self._drop_cds(what, master, command.ssid)

    def _drop_cds(self, what: Invalidation, master: Master | None, ssid: int | None) -> None:
        """None: all of them. The L1CD stays when leaf is set."""
        gone = self.contexts.drop(
            lambda key, context: (master is None or _first(key) is master) and (ssid is None or context.ssid == ssid)
        )
        what.tables = len(gone)
        if not what.leaf:
            self.l1cds.drop(
                lambda key, _: (master is None or _first(key) is master)
                and (ssid is None or self.l1_index(master, ssid) == _second(key))
            )
        self._dropped(what)

    def l1_index(self, master: Master | None, ssid: int) -> int:
        """Which L1CD leads to a CD."""
        raise NotImplementedError

    # ---- translations (4.4) ----

    def _drop_spaces(self, what: Invalidation, spaces: Iterable[Space]) -> None:
        for space in spaces:
            what.tables += len(space.tables)
            what.dropped += space.drop_all()
        self._dropped(what)

    def _spaces(self, wanted: Callable[[int, int], bool]) -> list[Space]:
        """The spaces whose (VMID, ASID) is wanted."""
        return [space for tag, space in self.iotlb.spaces.items() if wanted(*_tag(tag))]

    def _nsnh_all(self, command: Tlbi, user: bool) -> None:
        what = Invalidation("IOTLB", "all", "all", user=user, command="CMD_TLBI_NSNH_ALL")
        self._drop_spaces(what, list(self.iotlb.spaces.values()))

    def _s12_vmall(self, command: Tlbi, user: bool) -> None:
        what = Invalidation("IOTLB", "VMID", command.vmid, user=user, command="CMD_TLBI_S12_VMALL")
        self._drop_spaces(what, self._spaces(lambda vmid, asid: vmid == command.vmid))

    def _nh_all(self, command: Tlbi, user: bool) -> None:
        """Stage 1 and what combines both stages; what stage 2 alone translates stays."""
        what = Invalidation("IOTLB", "VMID", command.vmid, user=user, command="CMD_TLBI_NH_ALL")
        self._drop_spaces(what, self._spaces(lambda vmid, asid: vmid == command.vmid and asid >= 0))

    def _nh_asid(self, command: Tlbi, user: bool) -> None:
        tag = command.vmid, command.asid
        what = Invalidation("IOTLB", "ASID", tag, user=user, command="CMD_TLBI_NH_ASID")
        self._drop_spaces(what, self.iotlb.found(tag))

    def _nh_va(self, command: Tlbi, user: bool) -> None:
        tag = command.vmid, command.asid
        self._drop_range("CMD_TLBI_NH_VA", tag, self.iotlb.found(tag), command, user)

    def _nh_vaa(self, command: Tlbi, user: bool) -> None:
        spaces = self._spaces(lambda vmid, asid: vmid == command.vmid and asid >= 0)
        self._drop_range("CMD_TLBI_NH_VAA", command.vmid, spaces, command, user)

    def _s2_ipa(self, command: Tlbi, user: bool) -> None:
        """What stage 2 alone translates; results that combine both stages stay."""
        spaces = self._spaces(lambda vmid, asid: vmid == command.vmid and asid < 0)
        self._drop_range("CMD_TLBI_S2_IPA", command.vmid, spaces, command, user)

    def _drop_range(self, name: str, tag: object, spaces: list[Space], command: Tlbi, user: bool) -> None:
        span = command.span if self.description.range_invalidation else None
        first, last = span or (command.addr, command.addr + 4095)
        last = min(last, 2**64 - 1)
        what = Invalidation("IOTLB", "page", tag, first, last, leaf=bool(command.leaf), user=user, command=name)
        for space in spaces:
            what.dropped += space.drop(first, last)
            if not command.leaf:
                what.tables += space.drop_tables(first, last, lambda shift: shift)
        self._dropped(what)

    # ---- the device TLB (4.5.1) ----

    def _atc_inv(self, command: AtcInv, user: bool) -> None:
        """Without a SubstreamID it reaches translations with and without PASID."""
        master = self.streams.get(command.sid)
        if master is None or master.tlb is None:
            return
        size = command.size
        first, last = EVERYTHING
        if size < ATC_INV_SIZE_ALL:
            first = command.addr & -(4096 << size)
            last = first + (4096 << size) - 1
        whole = (first, last) == EVERYTHING
        ssid = command.ssid if command.ssv and not command.global_ else None
        what = Invalidation("device TLB", ("all" if ssid is None else "PASID") if whole else "page",
                            (master.name, ssid), first, last, user=user, command="CMD_ATC_INV")  # fmt: skip
        what.dropped = _drop_atc(master.tlb, ssid, first, last)
        self._dropped(what)


def _drop_atc(tlb: Tlb, ssid: int | None, first: int, last: int) -> list[TlbEntry]:
    dropped: list[TlbEntry] = []
    for pasid, space in list(tlb.spaces.items()):
        if ssid is None or pasid == ssid:
            dropped += space.drop(first, last)
    return dropped


def _first(key: Hashable) -> object:
    assert isinstance(key, tuple)
    return key[0]


def _second(key: Hashable) -> object:
    assert isinstance(key, tuple)
    return key[1]


def _tag(key: Hashable) -> tuple[int, int]:
    assert isinstance(key, tuple)
    return key[0], key[1]


_TLBI: dict[int, Callable[[CommandQueue, Tlbi, bool], None]] = {
    Op.TLBI_NSNH_ALL: CommandQueue._nsnh_all,  # noqa: SLF001
    Op.TLBI_S12_VMALL: CommandQueue._s12_vmall,  # noqa: SLF001
    Op.TLBI_NH_ALL: CommandQueue._nh_all,  # noqa: SLF001
    Op.TLBI_NH_ASID: CommandQueue._nh_asid,  # noqa: SLF001
    Op.TLBI_NH_VA: CommandQueue._nh_va,  # noqa: SLF001
    Op.TLBI_NH_VAA: CommandQueue._nh_vaa,  # noqa: SLF001
    Op.TLBI_S2_IPA: CommandQueue._s2_ipa,  # noqa: SLF001
}
