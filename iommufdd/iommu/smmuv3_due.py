"""Which SMMUv3 commands are missing before a translation is again what memory says: found by looking into the caches.

A changed CD needs CMD_CFGI_CD, and CMD_TLBI_NH_ASID where its ASID stays; a changed descriptor CMD_TLBI_NH_VA; what the
device keeps by itself CMD_ATC_INV (IHI0070 3.17, 3.21, 4.3 to 4.5).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from iommufd_uapi.smmuv3 import ATC_INV_SIZE_ALL, Cmd

from .monitor import DEVICE_TLB, NOBODY, Due
from .smmuv3_hw import master_of
from .walk import TranslationFault

if TYPE_CHECKING:
    from iommufd_uapi.smmuv3 import Command

    from .endpoint import Endpoint
    from .smmuv3_hw import SmmuV3Hardware
    from .smmuv3_master import Master
    from .smmuv3_walk import Context
    from .tlb import TlbEntry
    from .walk import RawStep

IOTLB, CD_CACHE, STE_CACHE = "IOTLB", "CD cache", "STE cache"  # as Invalidation.cache has them


class Request(NamedTuple):
    """What has used a translation."""

    dev: Master
    pasid: int | None
    iova: int
    access: int


def due(
    hw: SmmuV3Hardware, dev: Endpoint, pasid: int | None, iova: int, access: int, level: int | None, *, leaf: bool,
    cache: str,
) -> list[Due]:  # fmt: skip
    """See SanitizedIommu.due()."""
    return _Caches(hw, Request(master_of(dev), pasid, iova, access), level, leaf=leaf, cache=cache).due()


class _Caches:
    """What they have for one request, and what memory has."""

    def __init__(self, hw: SmmuV3Hardware, request: Request, level: int | None, *, leaf: bool, cache: str) -> None:
        self.hw = hw
        self.request = request
        self.level = level
        self.leaf = leaf
        self.cache = cache
        self.cached = hw.contexts.entries.get((request.dev, request.pasid))
        self.fresh: Context | None = None
        self.steps: tuple[RawStep, ...] = ()
        try:
            self.fresh = hw.decode(request.dev, request.pasid, cached=False)
            self.steps = self.fresh.steps
        except TranslationFault as fault:
            self.steps = tuple(tuple(step) for step in fault.steps)  # type: ignore[misc]
        self.user = level is not None or self._moved()

    def due(self) -> list[Due]:
        """The missing commands, in the order in which a driver sends them."""
        found = self._configuration()
        if self._iotlb_stale() or (self.cache not in (DEVICE_TLB, IOTLB) and not found):
            found.append(self._tlbi())
        if self._device_tlb_stale():
            found.append(self._atc_inv())
        return found or [self._atc_inv() if self.cache == DEVICE_TLB else self._tlbi()]

    # ---- which caches differ from memory ----

    def _moved(self) -> bool:
        """Another STE leads to another CD, and what the guest's ASID has cached came through the old one."""
        entry = self._in_iotlb()
        return bool(entry is not None and entry.raw_steps and self.steps and entry.raw_steps[0][2] != self.steps[0][2])

    def _in_iotlb(self) -> TlbEntry | None:
        fresh = self.fresh
        return fresh.space.lookup(fresh.untagged(self.request.iova)) if fresh is not None else None

    def _iotlb_stale(self) -> bool:
        return self.fresh is not None and self._stale(self._in_iotlb(), self.fresh.untagged(self.request.iova))

    def _device_tlb_stale(self) -> bool:
        dev, pasid, iova, _ = self.request
        return dev.tlb is not None and self._stale(dev.tlb.space(pasid).lookup(iova), iova)

    def _stale(self, entry: TlbEntry | None, iova: int) -> bool:
        """An entry that would be used, and differs from what memory gives."""
        dev, pasid, _, access = self.request
        if entry is None or not entry.allowed >> access & 1:
            return False
        try:
            return not entry.same_as(self.hw.walk_fresh(dev, pasid, iova, access))
        except TranslationFault:
            return True

    def _configuration(self) -> list[Due]:
        dev, pasid, _, _ = self.request
        cached, stream = self.cached, self.hw.stes.entries.get(dev)
        if stream is not None and stream.words != self.hw.stream_table.read(dev.sid):
            return [Due(STE_CACHE, NOBODY, frozenset((dev.name,)), user=False)]
        if cached is None:
            return []
        reach = frozenset((dev.name, (dev.name, cached.ssid)))
        if not cached.nested:
            same = self.fresh is not None and cached.cd_words == self.fresh.cd_words
            return [] if same else [Due(CD_CACHE, NOBODY, reach, leaf=True, user=False)]
        if cached.steps == self.steps:
            return []
        leaf = self.level == 0
        command = Cmd.cfgi_cd(self._vsid, pasid or 0, leaf=leaf)
        return [Due(CD_CACHE, self._words(command) + ("" if leaf else " without LEAF"), reach, leaf=leaf)]

    # ---- the commands ----

    @property
    def _vsid(self) -> int:
        vmaster = self.request.dev.vmaster
        return self.request.dev.sid if vmaster is None else vmaster.vsid

    def _words(self, command: Command) -> str:
        vmaster = self.request.dev.vmaster
        return f"CMD_{command}" + ("" if vmaster is None else f" on {vmaster.vsmmu.core}")

    def _shift(self) -> int:
        """log2 of what the changed descriptor translates."""
        context = self.fresh or self.cached
        assert context is not None
        assert self.level is not None
        rules = context.regimes[self.request.iova >> 55 & 1][0]
        return rules.granule + (rules.granule - 3) * (self.level - 1)

    def _tlbi(self) -> Due:
        context = self.fresh or self.cached
        vmid = asid = 0
        if context is not None:
            vmid, asid = context.ste.s2vmid, context.cd.asid if context.cd is not None else -1
        reach = frozenset((vmid, (vmid, asid)))
        if not self.user or context is None:
            return Due(IOTLB, NOBODY, reach, leaf=True, user=False)
        if not self.level or self.level < 0:
            return Due(IOTLB, self._words(Cmd.tlbi_nh_asid(asid)), reach)
        iova = context.untagged(self.request.iova)
        if self.leaf:
            return Due(IOTLB, self._words(Cmd.tlbi_nh_va(asid, iova & -(1 << self._shift()))), reach, leaf=True)
        return Due(IOTLB, self._words(self._range(asid, iova, context)) + " without LEAF", reach)

    def _range(self, asid: int, iova: int, context: Context) -> Command:
        """Everything below a table."""
        if not self.hw.description.range_invalidation:
            return Cmd.tlbi_nh_asid(asid)
        granule, shift = context.regimes[iova >> 55 & 1][0].granule, self._shift()
        return Cmd.tlbi_nh_va(asid, iova & -(1 << shift), leaf=False, scale=shift - granule, tg=(granule - 10) // 2)

    def _atc_inv(self) -> Due:
        dev, pasid, iova, _ = self.request
        reach = frozenset(((dev.name, None), (dev.name, pasid)))
        if not self.user:
            return Due(DEVICE_TLB, NOBODY, reach, user=False)
        size, addr = ATC_INV_SIZE_ALL, 0
        if self.level is not None and self.level > 0 and (self.fresh or self.cached) is not None:
            size, addr = self._shift() - 12, iova & -(1 << self._shift())
        return Due(DEVICE_TLB, self._words(Cmd.atc_inv(self._vsid, addr, size, ssid=pasid)), reach)
