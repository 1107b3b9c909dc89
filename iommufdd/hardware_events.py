"""What the hardware of a machine does, told on its event port: DMA, faults, page requests, invalidations, switches,
entries that it reads as no CPU would, and what its sanitizer finds.

A monitor listens to each IOMMU only while somebody listens to the port, so that the models pay nothing otherwise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

from iommufd_uapi import events
from iommufd_uapi.iommufd import IommufdPageResponseCode

from .iommu.endpoint import PAGE_REQUEST_PASID_VALID
from .iommu.group import IOMMU_PAGE_RESP_FAILURE
from .iommu.monitor import Monitor
from .iommu.ops import DomainType
from .iommu.walk import PRIV, describe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from .event_port import Events
    from .finding import Finding
    from .iommu.dma import Dma
    from .iommu.endpoint import Endpoint
    from .iommu.group import IopfGroup
    from .iommu.monitor import Invalidation
    from .iommu.ops import Domain
    from .iommu.replace import Switch
    from .iommu.walk import TranslationFault


@runtime_checkable
class Watched(Protocol):
    """An IOMMU that tells monitors what happens; the selftest's mock does not."""

    name: str
    monitors: list[Monitor]

    def tag_words(self, tag: object) -> str:
        """What an Invalidation's tag names: "did 2, pasid 0"."""
        ...


def connect(port: Events, iommus: Iterable[object]) -> None:
    """From now on what these IOMMUs do is told on the port, while anybody listens there."""
    told = [(iommu, HardwareEvents(port, iommu)) for iommu in iommus if isinstance(iommu, Watched)]

    def changed() -> None:
        for iommu, monitor in told:
            if port.listening:
                iommu.monitors.append(monitor)
            else:
                iommu.monitors.remove(monitor)

    port.on_change = changed


class HardwareEvents(Monitor):
    """Tells of one IOMMU and the devices behind it."""

    def __init__(self, port: Events, iommu: Watched) -> None:
        self._port = port
        self._iommu = iommu

    def finished(self, dma: Dma) -> None:
        outcome = dma.error or events.DONE
        if dma.error and dma.done:
            outcome = f"{dma.done:#x} bytes, then {outcome}"
        op = f"privileged {dma.op.value}" if dma.access & PRIV else dma.op.value
        self._port.hardware(events.Dma(dma.dev.name, dma.pasid, dma.iova, dma.length, op, outcome))

    def fault(self, dev: Endpoint, pasid: int | None, iova: int, access: int, fault: TranslationFault) -> None:
        self._port.hardware(events.Fault(dev.name, pasid, iova, describe(access), fault.code, fault.name))

    def requested(self, dev: Endpoint, pasid: int | None, group: int, iova: int, access: int) -> None:
        self._port.hardware(events.PageRequest(dev.name, pasid, iova & -4096, describe(access), group))

    def answered(self, dev: Endpoint, group: IopfGroup, code: int) -> None:
        request = group.faults[-1]
        pasid = request.pasid if request.flags & PAGE_REQUEST_PASID_VALID else None
        name = "FAILURE" if code == IOMMU_PAGE_RESP_FAILURE else IommufdPageResponseCode(code).name
        name = name.removeprefix("IOMMUFD_PAGE_RESP_")
        self._port.hardware(events.PageResponse(dev.name, pasid, request.grpid, name))

    def invalidated(self, what: Invalidation) -> None:
        self._port.hardware(events.Invalidate(
            self._iommu.name, what.cache, what.granularity, self._iommu.tag_words(what.tag), what.first, what.last,
            leaf=what.leaf, user=what.user, dropped=len(what.dropped), tables=what.tables,
        ))  # fmt: skip

    def misread(self, domain: Domain, gpa: int, level: int, entry: int, why: str) -> None:
        self._port.hardware(events.Misread(_name(domain), gpa, level, entry, why))

    def switched(self, switch: Switch) -> None:
        old, new, opens = _name(switch.old), _name(switch.new), switch.opens
        replaced = bool(old and new)
        self._port.hardware(events.Replace(
            switch.dev.name, switch.pasid, old, new, verdict=switch.verdict if replaced else "",
            opens=opens.what if replaced and opens is not None else "",
        ))  # fmt: skip


def tell_stale(port: Events) -> Callable[[Finding], None]:
    """A listener of a sanitizer that tells its findings on the port."""

    def tell(finding: Finding) -> None:
        if port.listening:
            use = finding.use
            port.hardware(events.Stale(
                use.dev.name, use.pasid, use.iova, describe(use.access), finding.outcome.value, finding.cache,
                finding.gave, finding.says, str(finding.change or "a table that the driver keeps"), finding.right,
            ))  # fmt: skip

    return tell


def _name(domain: Domain | None) -> str:
    """By the HWPT that has it, as `show` names objects; empty for none."""
    if domain is None or domain.type is DomainType.BLOCKED:
        return ""
    return f"hwpt_{domain.type.name.lower()}:{domain.hwpt_id}"
