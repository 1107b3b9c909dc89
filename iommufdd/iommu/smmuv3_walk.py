"""SMMUv3's translation of one request: stage 1, stage 2, or one through the other (IHI0070 3.3, 3.4).

A kernel's own table is what its areas show; a guest's stage 1 and its CDs are bytes, read through stage 2. A cached
walk fills the caches and updates flags (HTTU); a fresh one has no side effects.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple

from iommufd_uapi.smmuv3 import Cd, Ste
from iommufdd.errors import IommufdError

from . import lpae
from .smmuv3_ste import ZERO, Words
from .tlb import Space, TlbEntry, entry_of, entry_of_both
from .walk import EXEC, PRIV, READ, WRITE, WRITES, During, Step, TranslationFault, Why, allowed

if TYPE_CHECKING:
    from iommufdd.user import PageFile

    from .ops import Extent
    from .smmuv3_domain import SmmuPaging
    from .walk import RawStep

_entry_at = struct.Struct("<Q")
_NOWHERE = 1, 0, memoryview(b""), 0
_TAG = 0xFF << 56


class Kept(NamedTuple):
    """What the walk cache holds: where to go on, and the entries that led there."""

    start: lpae.Start
    steps: tuple[RawStep, ...]


class Context:
    """An STE with the CD that it leads to, decoded, and the caches that their tags select."""

    __slots__ = ("cd", "cd_words", "domain", "oas", "regimes", "space", "ssid", "ste", "steps", "tables", "tagged")

    def __init__(
        self, ste: Ste, cd: Cd | None, ssid: int, domain: SmmuPaging, space: Space, tables: Space, oas: int,
        cd_words: Words = ZERO, steps: tuple[RawStep, ...] = (),
    ) -> None:  # fmt: skip
        """domain: the kernel's table. ssid: index of the CD. tables: what stage 2 gives for pages of stage-1 tables.

        steps: the guest's L1CD and CD.

        Without a CD stage 2 alone translates; with a CD and an STE without stage 2 the domain is its stage 1.
        """
        self.ste = ste
        self.cd = cd
        self.ssid = ssid
        self.domain = domain
        self.space = space
        self.tables = tables
        self.oas = oas
        self.cd_words = cd_words
        self.steps = steps
        self.regimes: tuple[tuple[lpae.Rules, lpae.Start], ...] = ()
        self.tagged = (False, False)  # TBI of the halves
        if cd is not None:
            halves = lpae.stage1(cd, oas)
            self.regimes = tuple(
                (rules, lpae.root(ttb, rules)) for rules, ttb in zip(halves, (cd.ttb0, cd.ttb1), strict=True)
            )
            self.tagged = halves[0].tbi, halves[1].tbi

    @property
    def nested(self) -> bool:
        """Both stages translate."""
        return self.cd is not None and bool(self.ste.config & 2)

    def untagged(self, iova: int) -> int:
        """The address without the byte that TBI ignores."""
        upper = iova >> 55 & 1
        if not self.tagged[upper]:
            return iova
        return iova | _TAG if upper else iova & ~_TAG


def retagged(entry: TlbEntry, iova: int, untagged: int) -> TlbEntry:
    """The entry as it looks from an address with another top byte."""
    shift = iova - untagged
    return TlbEntry(entry.first + shift, entry.last + shift, entry.file, entry.pos, entry.allowed, ipa=entry.ipa,
                    raw_steps=entry.raw_steps)  # fmt: skip


class Stage2:
    """The second stage of one walk: a nest parent, or any domain of the kernel's."""

    __slots__ = ("_seen", "cached", "domain", "tables")

    def __init__(self, domain: SmmuPaging, tables: Space, *, cached: bool) -> None:
        self.domain = domain
        self.tables = tables
        self.cached = cached
        self._seen: tuple[int, int, memoryview, int] = _NOWHERE  # memory found last: from, to, view, offset in it

    def translate(self, ipa: int, access: int, during: During) -> tuple[Extent, int]:
        """Its answer, and the accesses that need not ask again. TranslationFault."""
        why = Why.NOT_PRESENT
        if ipa <= self.domain.aperture_end:
            translation = self.domain.translation
            extent = translation.extent(ipa) if translation is not None else None
            if extent is not None:
                if extent.allowed >> access & 1:
                    return extent, extent.allowed
                why = Why.WRITE if extent.readable else Why.READ
        raise TranslationFault(why, stage=2, level=1, addr=ipa, during=during)

    def page(self, ipa: int, access: int, during: During) -> TlbEntry:
        """Memory of the guest's tables."""
        if self.cached:
            found = self.tables.lookup(ipa)
            if found is not None and found.allowed >> access & 1:
                return found
        extent, rights = self.translate(ipa, access, during)
        entry = entry_of(extent, rights)
        if self.cached:
            self.tables.insert(entry)
        return entry

    def read(self, ipa: int, length: int) -> bytes | None:
        """Bytes of a context structure; None when there is no such memory. TranslationFault of stage 2."""
        page = self.page(ipa, READ, During.CONTEXT)
        data = _pread(page.file, page.pos + ipa - page.first, length)
        return data if len(data) == length else None

    def fetch(self, ipa: int) -> int:
        """A stage-1 descriptor. TranslationFault."""
        first, last, view, offset = self._seen
        if first <= ipa <= last:
            value: int = _entry_at.unpack_from(view, ipa + offset)[0]
            return value
        page = self.page(ipa, READ, During.WALK)
        if page.view is not None and not self.cached:
            self._seen = page.first, page.last, page.view, page.pos - page.first
        return _entry(page.view, page.file, page.pos + ipa - page.first, ipa)

    def update(self, ipa: int, old: int, new: int) -> None:
        """Store a descriptor with other flags. TranslationFault."""
        page = self.page(ipa, READ | WRITE, During.UPDATE)
        pos = page.pos + ipa - page.first
        if page.view is not None:
            _entry_at.pack_into(page.view, pos, new)
        else:
            try:
                page.file.pwrite(pos, new.to_bytes(8, "little"))
            except IommufdError:
                raise TranslationFault(Why.UNREADABLE, stage=1, level=0, addr=ipa) from None


class Walk:
    """One translation of one context."""

    __slots__ = ("_cached", "_context", "_stage2", "_steps")

    def __init__(self, context: Context, *, cached: bool) -> None:
        self._context = context
        self._cached = cached
        self._stage2 = Stage2(context.domain, context.tables, cached=cached)
        self._steps: list[RawStep] = []

    def translate(self, iova: int, access: int) -> TlbEntry:
        """The translation, kept in the TLB if this walk is cached. TranslationFault with the steps made."""
        context = self._context
        try:
            if context.cd is None:
                entry = self._second(iova, access)
            elif context.nested:
                entry = self._nested(iova, access)
            else:
                entry = self._first(iova, access)
        except TranslationFault as fault:
            fault.steps = tuple(map(Step._make, (*context.steps, *self._steps)))
            raise
        if self._cached:
            context.space.insert(entry)
        return entry

    # ---- the kernel's tables ----

    def _first(self, iova: int, access: int) -> TlbEntry:
        """A stage 1 of the kernel's: mapped is readable and executable, for users too."""
        context = self._context
        domain, cd = context.domain, context.cd
        assert cd is not None
        translation = domain.translation
        extent = translation.extent(iova) if translation is not None and iova <= domain.aperture_end else None
        if extent is None:
            raise TranslationFault(Why.NOT_PRESENT, stage=1, level=1, addr=iova)
        if access & WRITE and not extent.writable:
            raise TranslationFault(Why.WRITE, stage=1, level=1, addr=iova)
        if access & EXEC and access & PRIV and extent.writable:  # what users can write is never executed privileged
            raise TranslationFault(Why.EXECUTE, stage=1, level=1, addr=iova)
        rights = allowed(readable=True, writable=extent.writable)
        if extent.writable:
            rights &= ~_PRIVILEGED_EXEC
        if cd.ha and cd.hd:
            extent, rights = self._dirty(extent, rights, iova, access)
        return entry_of(extent, rights)

    def _dirty(self, extent: Extent, rights: int, iova: int, access: int) -> tuple[Extent, int]:
        """With HTTU a translation is one table entry, and may be written once that is dirty."""
        domain = self._context.domain
        assert domain.translation is not None
        found = domain.translation.entry(iova, domain.pgsize_bitmap)
        if found is not None:
            extent = extent.part(*found)
        bits = domain.dirty_bits
        if bits is None or not bits.clean(extent.first):
            return extent, rights
        if not access & WRITE:
            return extent, rights & ~WRITES
        if self._cached:
            bits.set_dirty(extent.first, extent.last)
        return extent, rights

    def _second(self, iova: int, access: int) -> TlbEntry:
        """Stage 2 alone; stage 1 that is bypassed checks the address's size."""
        if iova >> self._context.oas:
            raise TranslationFault(Why.OUTPUT_SIZE, stage=1, level=0, addr=iova)
        extent, rights = self._stage2.translate(iova, access, During.ACCESS)
        return entry_of(extent, rights)

    # ---- a guest's stage 1 ----

    def _nested(self, iova: int, access: int) -> TlbEntry:
        rules, root = self._context.regimes[iova >> 55 & 1]
        kept = self._kept(rules, iova) if self._cached else None
        start, before = kept or (root, ())
        steps = self._steps
        stage2 = self._stage2
        update = stage2.update if self._cached else None
        try:
            leaf = lpae.walk(stage2.fetch, update, start, rules, iova, access, steps)
        except TranslationFault as fault:
            if fault.during is not During.ACCESS or fault.why is Why.UNREADABLE:  # a descriptor was not to be had
                fault.level = max(start.level - len(steps), 1)
            steps[:0] = before
            raise
        if self._cached:
            self._keep(rules, start, before, iova)
        steps[:0] = (*self._context.steps, *before)
        ipa = leaf.out + iova - leaf.first
        extent, rights = stage2.translate(ipa, access & ~PRIV, During.ACCESS)
        return entry_of_both(leaf, iova, ipa, extent, rights, tuple(steps))

    # ---- the walk cache: a table is found by the bits of the address above those that it translates ----

    def _kept(self, rules: lpae.Rules, iova: int) -> Kept | None:
        tables = self._context.space.tables
        if tables:
            for level in range(1, rules.levels):
                shift = rules.granule + (rules.granule - 3) * level
                found = tables.get((shift, iova >> shift))
                if found is not None:
                    assert isinstance(found, Kept)
                    return found
        return None

    def _keep(self, rules: lpae.Rules, start: lpae.Start, before: tuple[RawStep, ...], iova: int) -> None:
        """Every table that this walk has passed."""
        steps = self._steps
        for at, step in enumerate(steps[:-1], 1):
            start = lpae.below(start, step[3], rules)
            shift = rules.granule + (rules.granule - 3) * start.level
            self._context.space.keep_table(shift, iova >> shift, Kept(start, (*before, *steps[:at])))


_PRIVILEGED_EXEC = sum(1 << access for access in range(16) if access & EXEC and access & PRIV)


def _pread(file: PageFile, pos: int, length: int) -> bytes:
    try:
        return file.pread(pos, length)
    except IommufdError:  # private memory of a process that has ended
        return b""


def _entry(view: memoryview | None, file: PageFile, pos: int, ipa: int) -> int:
    if view is not None:
        value: int = _entry_at.unpack_from(view, pos)[0]
        return value
    data = _pread(file, pos, 8)
    if len(data) < 8:
        raise TranslationFault(Why.UNREADABLE, stage=1, level=0, addr=ipa)
    return int.from_bytes(data, "little")
