"""The translation sanitizer: which DMA used a cached translation that memory no longer gives, and what was not flushed.

It listens beside the models (Monitor) and walks past their caches for every use. A use between a change and its flush
is legitimate, and known as such only when the flush comes: a finding is pending until an invalidation covers it, then
it has raced. What ends without one (the device is detached or gets another domain, the domain is freed, somebody asks
by `settle()`) was never flushed. Eviction decides nothing: the flush may still come.

A user's table waits for the user's invalidation; a flush that the driver made for other reasons does not count.
"""

from __future__ import annotations

import enum
from collections import deque
from itertools import islice
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from .finding import CD_CACHE, KEPT_TABLE, Came, Finding, Outcome, Use, changed, gave
from .iommu.endpoint import TranslatingIommu
from .iommu.monitor import DEVICE_TLB, Monitor
from .iommu.ops import IOMMU_NO_PASID, DomainType
from .iommu.walk import TranslationFault, Why

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from .finding import Change
    from .iommu.endpoint import Endpoint
    from .iommu.monitor import Due, Invalidation
    from .iommu.ops import Domain
    from .iommu.replace import Switch
    from .iommu.tlb import TlbEntry

MAX_PENDING = 4096  # findings that wait for their flush
MAX_REPORTED = 256
MAX_SHOWN = 32  # findings in a summary
MAX_USELESS = 32
MAX_LOG = 256  # invalidations remembered, to name a wrong one
STATUS = 66  # exit status of `run --sanitize=fail`, as ThreadSanitizer's


class Mode(enum.Enum):
    """off; report; fail: report, and DMA through what was never flushed fails, and so does a run."""

    OFF = "off"
    REPORT = "report"
    FAIL = "fail"


@runtime_checkable
class SanitizedIommu(TranslatingIommu, Protocol):
    """A model that has the words."""

    hardware_bits: int  # of a table entry, that walks set by themselves
    user_pasid_table: bool  # a nested domain translates all PASIDs of the device

    def due(
        self, dev: Endpoint, pasid: int | None, iova: int, access: int, level: int | None, *, leaf: bool, cache: str
    ) -> list[Due]:
        """The invalidations that are missing, at least one, as an entry of this level for iova has changed.

        level: as Step has it; None when no entry of the user's has. leaf: it was and is a leaf. cache: that used it.
        """
        ...


class NeverFlushed(TranslationFault):
    """A DMA met a translation that is known to be stale, in mode fail."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(Why.STALE, stage=0, level=0, addr=finding.use.iova)
        self.finding = finding

    def __str__(self) -> str:
        return f"the sanitizer: {self.finding}; right: {self.finding.right}"


class Counts:
    """What was seen."""

    def __init__(self) -> None:
        self.checked = 0  # uses of translations
        self.never = 0  # findings never flushed, those that are not listed included
        self.raced = 0
        self.longest = 0  # DMAs from the first stale use to its flush
        self.unfollowed = 0  # stale uses beyond MAX_PENDING
        self.useless = 0  # users' invalidations that dropped nothing


class Sanitizer(Monitor):
    """Watches the IOMMUs of a machine. `reported`: findings never flushed, each change once."""

    def __init__(self, mode: Mode = Mode.REPORT) -> None:
        self.mode = mode
        self.listeners: list[Callable[[Finding], None]] = []
        """Called whenever a finding is new or its outcome decided. They must not wait or raise."""
        self.counts = Counts()
        self.reported: list[Finding] = []
        self.useless: dict[str, int] = {}  # invalidations that dropped nothing, how often
        self._pending: dict[object, Finding] = {}
        self._never: dict[object, Finding] = {}  # by translation and by change: what later uses belong to
        self._commands: deque[Invalidation] = deque(maxlen=MAX_LOG)  # of the user's invalidation in work
        self._useful = False  # one of them dropped something
        self._log: deque[Came] = deque(maxlen=MAX_LOG)
        self._source = "", 0, 0  # _served() of the use in work
        self._fresh_last = -1  # the end of what has been compared for the use in work

    def watch(self, iommu: object) -> bool:
        """Listen to a model, once; False when it does not translate, or has not the words."""
        if not isinstance(iommu, SanitizedIommu):
            return False
        if self not in iommu.monitors:
            iommu.monitors.append(self)
        return True

    @property
    def pending(self) -> int:
        """Findings that wait for their flush."""
        return len(self._pending)

    @property
    def failed(self) -> bool:
        """A run in mode fail has to."""
        return self.mode is Mode.FAIL and self.counts.never > 0

    # ---- DMA ----

    def used(self, dev: Endpoint, pasid: int | None, iova: int, access: int, entry: TlbEntry) -> None:
        """NeverFlushed."""
        self.counts.checked += 1
        self._source = self._served(entry)
        self._check(Use(dev, pasid, iova, access), entry)

    def moving(self, dev: Endpoint, pasid: int | None, iova: int, count: int, access: int, entry: TlbEntry) -> None:
        """The rest of the stretch, where the translation used is larger than what memory has now. NeverFlushed."""
        while self._fresh_last < iova + count - 1:
            self._check(Use(dev, pasid, self._fresh_last + 1, access), entry)

    def _check(self, use: Use, entry: TlbEntry) -> None:
        dev, pasid, iova, access = use
        try:
            fresh = dev.iommu.walk_fresh(dev, pasid, iova, access)
        except TranslationFault as fault:
            self._fresh_last = entry.last
            if fault.why is Why.INTERRUPT:  # of the request, not of a table: a device TLB need not know
                return
            steps, says = fault.steps, str(fault)
        else:
            self._fresh_last = fresh.last
            if entry.same_as(fresh):
                return
            steps, says = fresh.steps, gave(fresh, iova, nested=bool(fresh.steps))
        change, _ = changed(entry.steps, steps, self._ignored(dev))
        key = use.dev, use.pasid, entry.first, change
        finding = self._known(key, use)
        if finding is None:
            cache, filled, seq = self._source
            finding = self._finding(use, entry.first, entry.last, cache, change)
            finding.gave, finding.says = gave(entry, iova, nested=bool(entry.steps)), says
            finding.seq, finding.age = seq, self.counts.checked - filled
            self._add(key, finding)

    def _served(self, entry: TlbEntry) -> tuple[str, int, int]:
        """(the cache that gave it, the number of the DMA that filled it, its number there)."""
        now = self.counts.checked
        origin, cache = entry.origin, DEVICE_TLB if entry.origin is not None else "IOTLB"
        if entry.mark:
            return cache, entry.mark, entry.seq
        entry.mark = now
        if origin is not None and origin.mark:
            return "IOTLB", origin.mark, origin.seq
        if origin is not None:
            origin.mark = now
        return KEPT_TABLE, now, entry.seq

    def _ignored(self, dev: Endpoint) -> int:
        assert isinstance(dev.iommu, SanitizedIommu)
        return dev.iommu.hardware_bits

    # ---- DMA that was refused although memory allows it ----

    def fault(self, dev: Endpoint, pasid: int | None, iova: int, access: int, fault: TranslationFault) -> None:
        self._refused(Use(dev, pasid, iova, access), fault)

    def requested(self, dev: Endpoint, pasid: int | None, group: int, iova: int, access: int) -> None:
        dma = dev.waiting(group)
        if dma is not None and dma.fault is not None:
            self._refused(Use(dev, pasid, iova, access), dma.fault)

    def _refused(self, use: Use, fault: TranslationFault) -> None:
        """A walk through a kept table has ended where memory has a mapping: the table is another one now."""
        try:
            fresh = use.dev.iommu.walk_fresh(*use)
        except TranslationFault:
            return
        change, _ = changed(fault.steps, fresh.steps, self._ignored(use.dev))
        key = use.dev, use.pasid, use.iova >> 12, change, "refused"
        if change is None or self._known(key, use, may_fail=False) is not None:
            return
        finding = self._finding(use, use.iova & -4096, use.iova | 4095, KEPT_TABLE, change)
        finding.gave, finding.says = str(fault), gave(fresh, use.iova, nested=True)
        self._add(key, finding)

    # ---- findings ----

    def _known(self, key: object, use: Use, *, may_fail: bool = True) -> Finding | None:
        """The finding that a stale use belongs to. NeverFlushed."""
        finding = self._pending.get(key)
        if finding is None:
            finding = self._never.get(key)
            if finding is not None and may_fail and self.mode is Mode.FAIL:
                finding.uses += 1
                raise NeverFlushed(finding)
        if finding is not None:
            finding.uses += 1
            finding.until = self.counts.checked
        return finding

    def _finding(self, use: Use, first: int, last: int, cache: str, change: Change | None) -> Finding:
        iommu = use.dev.iommu
        assert isinstance(iommu, SanitizedIommu)
        level, leaf = (None, False) if change is None else (change.level, change.leaf)
        due = iommu.due(*use, level, leaf=leaf, cache=cache)
        if cache == KEPT_TABLE and due[0].cache == CD_CACHE:
            cache = CD_CACHE
        finding = Finding(use, first, last, cache=cache, gave="", says="", change=change, due=due,
                          at=self.counts.checked)  # fmt: skip
        handles = use.dev.group.handles
        finding.handle = handles.get(use.pasid or IOMMU_NO_PASID) or handles.get(IOMMU_NO_PASID)
        return finding

    def _add(self, key: object, finding: Finding) -> None:
        if len(self._pending) >= MAX_PENDING:
            self.counts.unfollowed += 1
            return
        self._pending[key] = finding
        self._tell(finding)

    def _tell(self, finding: Finding) -> None:
        for listener in self.listeners:
            listener(finding)

    def settle(self) -> None:
        """What waits for its flush now was never flushed."""
        self._end(lambda _: True)

    def _end(self, wanted: Callable[[Finding], bool]) -> None:
        for key in [key for key, finding in self._pending.items() if wanted(finding)]:
            self._report(key, self._pending.pop(key))

    def _report(self, key: object, finding: Finding) -> None:
        """Never flushed: listed once for each entry that changed, however many pages that stands for."""
        finding.settle(Outcome.NEVER, self._log)
        self.counts.never += 1
        group = (finding.use.dev, finding.use.pasid, finding.change or finding.first)
        head = self._never.get(group)
        if head is not None:
            head.pages += 1
            head.uses += finding.uses
        elif len(self.reported) < MAX_REPORTED:
            head = self._never[group] = finding
            self.reported.append(finding)
        if head is not None and len(self._never) < MAX_PENDING:
            self._never[key] = head
        self._tell(finding)

    # ---- invalidations ----

    def invalidated(self, what: Invalidation) -> None:
        """The right one: what was used before it has raced, and what is used after it is another matter."""
        if what.user:
            self._commands.append(what.bare())
            self._useful = self._useful or bool(what.dropped or what.tables)
        for known in (self._pending, self._never):
            covered = [key for key, finding in known.items() if finding.covered(what)]
            for key in covered:
                finding = known.pop(key)
                if known is self._pending:
                    self._raced(finding)

    def _raced(self, finding: Finding) -> None:
        finding.settle(Outcome.RACED, ())
        self.counts.raced += 1
        self.counts.longest = max(self.counts.longest, self.counts.checked - finding.at + 1)
        self._tell(finding)

    def flushed(self, text: str) -> None:
        commands = tuple(self._commands)
        self._commands.clear()
        self._log.append(Came(self.counts.checked, text, commands))
        useful, self._useful = self._useful, False
        if not useful:
            self.counts.useless += 1
            if text in self.useless or len(self.useless) < MAX_USELESS:
                self.useless[text] = self.useless.get(text, 0) + 1

    # ---- the end of a window ----

    def switched(self, switch: Switch) -> None:
        """Detach and replace flush everything, which comes too late for what the user forgot."""
        iommu = switch.dev.iommu
        assert isinstance(iommu, SanitizedIommu)
        nested = switch.old is not None and switch.old.type is DomainType.NESTED
        whole = nested and iommu.user_pasid_table

        def ends(finding: Finding) -> bool:
            number = finding.use.pasid or IOMMU_NO_PASID
            return finding.use.dev is switch.dev and (whole or number == switch.pasid)

        self._end(ends)
        self._forget(ends)

    def freed(self, domain: Domain) -> None:
        self._end(lambda finding: getattr(finding.handle, "domain", None) is domain)

    def _forget(self, wanted: Callable[[Finding], bool]) -> None:
        """Nothing of this is cached any more: a later use belongs to another finding."""
        for key in [key for key, finding in self._never.items() if wanted(finding)]:
            del self._never[key]

    # ---- telling ----

    def summary(self) -> list[str]:
        """The report, in lines; what is pending is said to be so."""
        counts = self.counts
        lines = [
            f"sanitizer: {counts.checked} translations used; {counts.never} never flushed, "
            f"{counts.raced} used before their flush came"
            + (f" (at most {counts.longest} DMAs before)" if counts.raced else "")
            + (f", {len(self._pending)} not flushed yet" if self._pending else "")
        ]
        reported = self.reported[:MAX_SHOWN]
        pending = list(islice(self._pending.values(), MAX_SHOWN - len(reported)))
        for finding in (*reported, *pending):
            lines += finding.lines()
        lines += _count("more that were never flushed", counts.never - sum(finding.pages for finding in reported))
        lines += _count("more that are not flushed yet", len(self._pending) - len(pending))
        lines += _count("stale uses that could not be followed", counts.unfollowed)
        lines += _count("invalidations that dropped nothing, as no device had used what they name", counts.useless)
        lines += [f"  {count:6} {text}" for text, count in self.useless.items()]
        return lines


def _count(what: str, count: int) -> Iterable[str]:
    return [f"{what}: {count}"] if count else []
