"""VT-d's translation of one request: first stage, second stage, or one through the other (VT-d spec 3.6 to 3.8).

A kernel's own table is what its areas show; a guest's first stage is bytes, walked through the second stage. A cached
walk fills the caches and sets accessed and dirty bits; a fresh one has no side effects.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple

from iommufdd.errors import IommufdError

from .ops import Extent
from .tlb import Space, TlbEntry, entry_of, entry_of_both
from .vtd_pasid import FIRST, SECOND
from .vtd_regs import Reason
from .walk import (
    ALL,
    EXEC,
    EXECS,
    PRIV,
    READ,
    USERS,
    WRITE,
    WRITES,
    During,
    Step,
    TranslationFault,
    Why,
    allowed,
)
from .x86_64 import ADDRESS, XD, Rules, Start, admits, canonical, root, walk

if TYPE_CHECKING:
    from iommufdd.description import VtdIommu
    from iommufdd.user import PageFile

    from .vtd_domain import VtdPaging
    from .vtd_ept import EptWalker
    from .vtd_hw import VtdHardware
    from .vtd_kvm import VtdKvm
    from .vtd_pasid import PasidEntry
    from .walk import RawStep

_entry_at = struct.Struct("<Q")
_NOWHERE = 1, 0, memoryview(b""), 0
INTERRUPTS = range(0xFEE00000, 0xFEF00000)  # not translated for requests without PASID


class Kept(NamedTuple):
    """What the paging-structure cache holds: where to go on, and the entries that led there."""

    start: Start
    steps: tuple[RawStep, ...]


class Context:
    """A PASID-table entry, decoded, with the caches that its tag selects."""

    __slots__ = ("consent", "domain", "entry", "ept", "pasid", "rules", "space", "start", "tables")

    def __init__(
        self, entry: PasidEntry, pasid: int, domain: VtdPaging | VtdKvm, space: Space, tables: Space,
        description: VtdIommu, ept: EptWalker | None = None,
    ) -> None:  # fmt: skip
        """domain: the kernel's table that the entry names; tables: what the second stage gives for table pages.

        ept: of a second stage that is bytes.
        """
        self.entry = entry
        self.ept = ept
        self.pasid = pasid
        self.domain = domain
        self.space = space
        self.tables = tables
        self.rules = Rules(levels=4 + entry.fspm, pages_1g=description.pages_1g, haw=description.haw,
                           write_protect=entry.wpe, extended_access=entry.eafe)  # fmt: skip
        self.start = root(entry.fsptptr, self.rules)
        # A device TLB must not allow what check_request() would refuse.
        self.consent = (ALL if entry.sre else USERS) & (ALL if entry.ere else ~EXECS)

    def check_request(self, access: int) -> None:
        """Execute and privileged requests need the entry's consent. TranslationFault."""
        for bit, consent, why, code in (
            (EXEC, self.entry.ere, Why.NO_EXECUTE_REQUESTS, Reason.NO_EXECUTE_REQUESTS),
            (PRIV, self.entry.sre, Why.NO_SUPERVISOR_REQUESTS, Reason.NO_SUPERVISOR_REQUESTS),
        ):
            if access & bit and not consent:
                raise _without_consent(why, code)


def _without_consent(why: Why, code: Reason) -> TranslationFault:
    fault = TranslationFault(why, stage=0, level=0, addr=0)
    fault.code = code
    return fault


class Walk:
    """One translation of one context."""

    __slots__ = ("_before", "_cached", "_context", "_hw", "_level", "_seen", "_steps")

    def __init__(self, hw: VtdHardware, context: Context, *, cached: bool) -> None:
        self._hw = hw
        self._context = context
        self._cached = cached
        self._before: tuple[RawStep, ...] = ()  # the entries that led to the table where this walk begins
        self._steps: list[RawStep] = []
        self._level = 0  # of the first-stage entry that is read first
        self._seen: tuple[int, int, memoryview, int] = _NOWHERE  # guest memory found last: from, to, view, offset in it

    def translate(self, iova: int, access: int) -> TlbEntry:
        """The translation, kept in the IOTLB if this walk is cached. TranslationFault with the steps made."""
        pgtt = self._context.entry.pgtt
        try:
            if pgtt == FIRST:
                entry = self._first(iova, access)
            elif self._context.ept is not None:
                entry = self._context.ept.translate(self._context.space, iova, access, self._steps, cached=self._cached)
            elif pgtt == SECOND:
                extent, rights = self._second(iova, access, During.ACCESS)
                entry = entry_of(extent, rights)
            else:
                entry = self._nested(iova, access)
        except TranslationFault as fault:
            fault.steps = tuple(map(Step._make, (*self._before, *self._steps)))
            raise
        entry.allowed &= self._context.consent
        if entry.first < INTERRUPTS.stop and entry.last >= INTERRUPTS.start:
            entry = _beside_interrupts(entry, iova)
        if self._cached and iova not in INTERRUPTS:  # a hit is not asked whether it has a PASID
            self._context.space.insert(entry)
        return entry

    # ---- the kernel's tables ----

    def _first(self, iova: int, access: int) -> TlbEntry:
        """A first stage of the kernel's: mapped is readable and executable, for users (x86_64_pt_iommu_set_prot)."""
        levels = self._context.rules.levels
        if not canonical(iova, levels):
            raise TranslationFault(Why.CANONICAL, stage=1, level=levels, addr=iova)
        extent = self._extent(iova)
        if extent is None:
            raise TranslationFault(Why.NOT_PRESENT, stage=1, level=1, addr=iova)
        if access & WRITE and not extent.writable:
            raise TranslationFault(Why.WRITE, stage=1, level=1, addr=iova)
        return entry_of(extent, allowed(readable=True, writable=extent.writable))

    def _second(self, ipa: int, access: int, during: During) -> tuple[Extent, int]:
        """The second stage's answer, and the accesses that need not ask again. TranslationFault."""
        context = self._context
        if ipa > context.domain.aperture_end:
            raise self._stop(Why.ADDRESS_SIZE, ipa, during)
        extent = self._extent(ipa)
        if extent is None:
            raise self._stop(Why.NOT_PRESENT, ipa, during)
        rights = extent.allowed
        if not rights >> access & 1:
            raise self._stop(Why.WRITE if extent.readable else Why.READ, ipa, during)
        if context.entry.ssade:
            return self._dirty(extent, rights, ipa, access, during)
        return extent, rights

    def _dirty(self, extent: Extent, rights: int, ipa: int, access: int, during: During) -> tuple[Extent, int]:
        """With A/D bits a translation is one table entry, and may be written once its D bit is set."""
        domain = self._context.domain
        assert domain.translation is not None
        found = domain.translation.entry(ipa, domain.pgsize_bitmap)
        if found is not None:
            extent = extent.part(*found)
        if not access & WRITE:
            return extent, rights & ~WRITES
        if not self._context.entry.pwsnp:
            raise self._stop(Why.ACCESS_FLAG, ipa, during)
        if self._cached and domain.dirty_bits is not None:
            domain.dirty_bits.set_dirty(ipa)
        return extent, rights

    def _extent(self, address: int) -> Extent | None:
        translation = self._context.domain.translation
        return translation.extent(address) if translation is not None else None

    def _stop(self, why: Why, ipa: int, during: During) -> TranslationFault:
        level = self._level - len(self._steps) if during is not During.ACCESS else 1
        return TranslationFault(why, stage=2, level=level, addr=ipa, during=during)

    # ---- a guest's first stage ----

    def _nested(self, iova: int, access: int) -> TlbEntry:
        kept = self._kept(iova, access) if self._cached else None
        start, before = kept or (self._context.start, ())
        self._before = before
        self._level = start.level
        steps = self._steps
        fetch, update = (self._fetch, self._update) if self._cached else (self._fetch_fresh, None)
        leaf = walk(fetch, update, start, self._context.rules, iova, access, steps)
        if self._cached:
            self._keep(start, before, iova)
        gpa = leaf.out + iova - leaf.first
        extent, rights = self._second(gpa, access, During.ACCESS)
        return entry_of_both(leaf, iova, gpa, extent, rights, (*before, *steps))

    def _fetch(self, gpa: int) -> int:
        page = self._table(gpa, READ, During.WALK)
        return self._entry(page.view, page.file, page.pos + gpa - page.first, gpa)

    def _fetch_fresh(self, gpa: int) -> int:
        """As _fetch(), with a look at the second stage only where the entry read before does not show it."""
        first, last, view, offset = self._seen
        if first <= gpa <= last:
            value: int = _entry_at.unpack_from(view, gpa + offset)[0]
            return value
        extent, _ = self._second(gpa, READ, During.WALK)
        pos = extent.pos + gpa - extent.first
        found = extent.file.view(extent.pos + extent.last - extent.first + 1)
        if found is not None:
            self._seen = extent.first, extent.last, found, extent.pos - extent.first
        return self._entry(found, extent.file, pos, gpa)

    def _entry(self, view: memoryview | None, file: PageFile, pos: int, gpa: int) -> int:
        if view is not None:
            value: int = _entry_at.unpack_from(view, pos)[0]
            return value
        try:
            data = file.pread(pos, 8)
        except IommufdError:  # private memory of a process that has ended
            data = b""
        if len(data) < 8:
            raise TranslationFault(Why.UNREADABLE, stage=1, level=self._level - len(self._steps), addr=gpa)
        return int.from_bytes(data, "little")

    def _update(self, gpa: int, old: int, new: int) -> None:
        """Set A, D or EA: the low two bytes, if nobody has changed them meanwhile."""
        if not self._context.entry.pwsnp:
            raise TranslationFault(Why.ACCESS_FLAG, stage=1, level=self._level - len(self._steps) + 1, addr=gpa)
        page = self._table(gpa, READ | WRITE, During.UPDATE)
        pos = page.pos + gpa - page.first
        new_bytes = (new & 0xFFFF).to_bytes(2, "little")
        if page.view is not None:
            if page.view[pos] == old & 0xFF:
                page.view[pos : pos + 2] = new_bytes
        else:
            try:
                page.file.pwrite(pos, new_bytes)
            except IommufdError:
                level = self._level - len(self._steps) + 1
                raise TranslationFault(Why.UNREADABLE, stage=1, level=level, addr=gpa) from None

    def _table(self, gpa: int, access: int, during: During) -> TlbEntry:
        """The page of a first-stage table, through the second stage."""
        tables = self._context.tables
        if self._cached:
            found = tables.lookup(gpa)
            if found is not None and found.allowed >> access & 1:
                return found
        extent, rights = self._second(gpa, access, during)
        entry = entry_of(extent, rights)
        if self._cached:
            tables.insert(entry)
        return entry

    # ---- the paging-structure cache ----

    def _kept(self, iova: int, access: int) -> Kept | None:
        """The lowest table kept. A request that rights above it refuse walks from the root, to fault there."""
        tables = self._context.space.tables
        if tables:
            for level in range(1, self._context.rules.levels):
                found = tables.get((level, iova >> 9 * level + 12))
                if found is not None:
                    assert isinstance(found, Kept)
                    return found if admits(found.start, self._context.rules, access) else None
        return None

    def _keep(self, start: Start, before: tuple[RawStep, ...], iova: int) -> None:
        """Every table that this walk has passed."""
        rights = start.rights
        steps = self._steps
        for at, step in enumerate(steps[:-1], 1):
            _, level, _, entry = step
            level -= 1
            rights &= entry ^ XD
            kept = Kept(Start(entry & ADDRESS, level, rights), (*before, *steps[:at]))
            self._context.space.keep_table(level, iova >> 9 * level + 12, kept)


def _beside_interrupts(entry: TlbEntry, iova: int) -> TlbEntry:
    """The part of an entry around iova that is all interrupt addresses, or none."""
    first, last = entry.first, entry.last
    if iova < INTERRUPTS.start:
        last = INTERRUPTS.start - 1
    elif iova >= INTERRUPTS.stop:
        first = INTERRUPTS.stop
    else:
        first, last = max(first, INTERRUPTS.start), min(last, INTERRUPTS.stop - 1)
    ahead = first - entry.first
    return TlbEntry(first, last, entry.file, entry.pos + ahead, entry.allowed, ipa=entry.ipa + ahead,
                    raw_steps=entry.raw_steps)  # fmt: skip
