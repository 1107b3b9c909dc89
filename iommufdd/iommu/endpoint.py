"""A PCI function that issues DMA, with its device TLB (ATS) and page requests (PRI) (PCIe 10.2, 10.4)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from iommufdd.errors import EINVAL

from .dma import DONE, PARKED, Dma, DmaQueue
from .group import IOMMU_PAGE_RESP_FAILURE, IOMMU_PAGE_RESP_SUCCESS, Fault, IommuGroup, Iopf, IopfGroup
from .ops import IOMMU_NO_PASID, Device, IommuOps, ResvRegion
from .tlb import Tlb, TlbEntry
from .walk import EXEC, PRIV, READ, WRITE

if TYPE_CHECKING:
    from collections.abc import Iterable

    from iommufdd.description import Caches, DeviceDescription, Reserved

    from .monitor import Monitor
    from .walk import TranslationFault

# enum iommu_fault_page_request flags and IOMMU_FAULT_PERM_* (include/linux/iommu.h)
PAGE_REQUEST_PASID_VALID = 1 << 0
PAGE_REQUEST_LAST_PAGE = 1 << 1
PERM_READ, PERM_WRITE, PERM_EXEC, PERM_PRIV = 1, 2, 4, 8
GROUPS = 512  # page request group indexes of a function


class TranslatingIommu(IommuOps, Protocol):
    """An IOMMU that translates for endpoints."""

    monitors: list[Monitor]
    caches: Caches
    reserved: tuple[Reserved, ...]
    page_request_flags: int  # more flags of a page request that has a PASID

    def translate(self, dev: Endpoint, pasid: int | None, iova: int, access: int) -> TlbEntry:
        """The translation of one address; a refusal is recorded where the hardware would. TranslationFault."""
        ...

    def walk_fresh(self, dev: Endpoint, pasid: int | None, iova: int, access: int) -> TlbEntry:
        """What memory says now, past every cache and without side effects. TranslationFault."""
        ...

    def recoverable(self, fault: TranslationFault) -> bool:
        """A translation request (ATS) is answered with no permission, so that the device may ask for the page."""
        ...

    def page_request_refused(self, dev: Endpoint, pasid: int | None, iova: int, access: int) -> str:
        """Why the driver answers a page request with INVALID by itself; empty when it does not."""
        ...


class Counters:
    """What a device has done."""

    __slots__ = ("completed", "failed", "failures", "faults", "invalid", "page_requests", "read", "timeouts",
                 "withdrawn", "written")  # fmt: skip

    def __init__(self) -> None:
        self.read = self.written = 0  # bytes
        self.completed = self.failed = 0  # transfers
        self.faults = 0  # that the IOMMU has recorded
        self.page_requests = 0
        self.invalid = 0  # answered INVALID by the user or the driver
        self.failures = 0  # answered FAILURE: KVM has no page
        self.withdrawn = 0  # answered INVALID because the attachment ended
        self.timeouts = 0


class Endpoint(Device):
    """A function behind a translating IOMMU."""

    def __init__(self, iommu: TranslatingIommu, description: DeviceDescription, group: IommuGroup) -> None:
        self.iommu: TranslatingIommu = iommu
        self.group = group
        group.devices.append(self)
        self.description = description
        self.name = description.name
        self.sid = description.source_id
        self.ats = description.ats
        self.pri = description.pri
        self.max_pasids = 1 << description.pasid_width if description.pasid_width else 0
        self.iopf = Iopf(self)
        self.iopf.answered = self._answered
        self.tlb: Tlb | None = Tlb(iommu.caches) if self.ats else None  # the device TLB, a space per PASID
        self.queue = DmaQueue()  # the machine's, once it is part of one
        self.counters = Counters()
        self._waiting: dict[int, tuple[Dma, Fault | None]] = {}  # by page request group; None: not reported yet
        self._next_group = 0

    def resv_regions(self) -> Iterable[ResvRegion]:
        return [ResvRegion(region.start, region.last, region.kind) for region in self.iommu.reserved]

    def reset(self) -> None:
        """A function level reset (PCIe 6.6.2): the device TLB is empty, and transfers under way are given up."""
        if self.tlb is not None:
            self.tlb.drop_spaces(lambda _: True)
        for dma in (*self.queue.running, *(dma for dma, _ in self._waiting.values())):
            if dma.dev is self:  # the queue is the machine's
                dma.cancel("the function was reset")

    # ---- translation ----

    def translate(self, pasid: int | None, iova: int, access: int) -> TlbEntry:
        """Through the device TLB where there is one. TranslationFault."""
        iommu = self.iommu
        if self.tlb is None:
            entry = iommu.translate(self, pasid, iova, access)
        else:
            space = self.tlb.space(pasid)
            found = space.lookup(iova)
            if found is None or not found.allowed >> access & 1:
                granted = iommu.translate(self, pasid, iova, access)
                found = TlbEntry(granted.first, granted.last, granted.file, granted.pos, granted.allowed,
                                 ipa=granted.ipa, raw_steps=granted.raw_steps)  # fmt: skip
                found.origin = granted
                space.insert(found)
            entry = found
        if iommu.monitors:
            for monitor in iommu.monitors:
                monitor.used(self, pasid, iova, access, entry)
        return entry

    def waiting(self, group: int) -> Dma | None:
        """The transfer that waits for a page request group."""
        return self._waiting[group][0] if group in self._waiting else None

    def dma(self, dma: Dma) -> Dma:
        """Queue a transfer."""
        self.queue.submit(dma)
        return dma

    def finished(self, dma: Dma) -> None:
        """A transfer has ended (Dma says how)."""
        counters = self.counters
        if dma.state is DONE:
            counters.completed += 1
        else:
            counters.failed += 1
            self.queue.ended(dma)
            if dma.group >= 0:
                self._waiting.pop(dma.group, None)
        if dma.access & WRITE:
            counters.written += dma.done
        else:
            counters.read += dma.done
        if self.iommu.monitors:
            for monitor in self.iommu.monitors:
                monitor.finished(dma)

    # ---- page requests ----

    def request_page(self, dma: Dma, fault: TranslationFault) -> bool:
        """Ask for the page that dma misses; False when this device cannot, dma.error is set when it was refused."""
        iommu = self.iommu
        if not (self.pri and iommu.recoverable(fault) and self.iopf.enabled):
            return False
        iova = dma.iova + dma.done
        refusal = iommu.page_request_refused(self, dma.pasid, iova, dma.access)
        if refusal:
            self.counters.invalid += 1
            dma.fail(f"the driver answers the page request INVALID: {refusal}")
            return False
        number = self.wait(dma)
        return number is not None and self.report(dma, number, iova & -4096)

    def wait(self, dma: Dma) -> int | None:
        """A page request group for dma to wait in; None when all are taken, and dma has failed."""
        number = self._free_group()
        if number is None:
            dma.fail(f"all {GROUPS} page request groups are waiting")
            return None
        self.counters.page_requests += 1
        dma.group = number
        self._waiting[number] = dma, None
        for monitor in self.iommu.monitors:
            monitor.requested(self, dma.pasid, number, dma.iova + dma.done, dma.access)
        return number

    def report(self, dma: Dma, number: int, addr: int) -> bool:
        """Tell the driver that dma waits for the page at addr; False when it was refused, and dma has failed."""
        pasid = dma.pasid
        flags = PAGE_REQUEST_LAST_PAGE
        if pasid is not None:
            flags |= PAGE_REQUEST_PASID_VALID | self.iommu.page_request_flags
        request = Fault(flags, pasid or IOMMU_NO_PASID, number, _perm(dma.access), addr)
        self._waiting[number] = dma, request
        try:
            self.iopf.report(request, pasid_valid=pasid is not None, last=True)
        except EINVAL as refused:
            self.counters.invalid += 1
            dma.fail(f"the page request was answered INVALID: {refused.reason}")
            return False
        return True

    def _free_group(self) -> int | None:
        for _ in range(GROUPS):
            number = self._next_group
            self._next_group = (number + 1) % GROUPS
            if number not in self._waiting:
                return number
        return None

    def _answered(self, group: IopfGroup, code: int) -> None:
        """A page group response reaches the device."""
        for monitor in self.iommu.monitors:
            monitor.answered(self, group, code)
        request = group.faults[-1]
        if self._waiting.get(request.grpid, (None, None))[1] is request:  # else the number may be another's by now
            self.respond(request.grpid, success=code == IOMMU_PAGE_RESP_SUCCESS, withdrawn=group.withdrawn,
                         failure=code == IOMMU_PAGE_RESP_FAILURE)  # fmt: skip

    def respond(self, number: int, *, success: bool, withdrawn: bool, failure: bool = False) -> None:
        """What waits in a page request group goes on, or fails; failure: KVM has no page."""
        dma, _ = self._waiting.pop(number, (None, None))
        if dma is None:
            return  # it gave up before
        if success:
            dma.resume()
        elif withdrawn:
            self.counters.withdrawn += 1
            dma.fail("the page request was answered INVALID: its attachment ended")
        elif failure:
            self.counters.failures += 1
            dma.fail("the page request was answered FAILURE")
        else:
            self.counters.invalid += 1
            dma.fail("the page request was answered INVALID")

    def time_out(self, dma: Dma) -> None:
        """Nobody has answered for too long: the device gives up; an answer that still comes is ignored."""
        if dma.state is PARKED:
            self.counters.timeouts += 1
            dma.fail("the page request was not answered in time")

    def invalidate(self, pasid: int | None, first: int, last: int) -> list[TlbEntry]:
        """A device TLB invalidation; the entries dropped."""
        dropped: list[TlbEntry] = []
        for space in self.tlb.found(pasid) if self.tlb is not None else ():
            dropped = space.drop_all() if (first, last) == (0, 2**64 - 1) else space.drop(first, last)
        return dropped


def _perm(access: int) -> int:
    perm = 0
    for bit, name in ((READ, PERM_READ), (WRITE, PERM_WRITE), (EXEC, PERM_EXEC), (PRIV, PERM_PRIV)):
        if access & bit:
            perm |= name
    return perm

