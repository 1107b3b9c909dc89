"""A translation that was used and that memory no longer gives: what the sanitizer has found, and how it reads."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, NamedTuple

from iommufd_uapi.events import NEVER_FLUSHED

from .iommu.walk import describe

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from .iommu.endpoint import Endpoint
    from .iommu.monitor import Due, Invalidation
    from .iommu.tlb import TlbEntry
    from .iommu.walk import Step

KEPT_TABLE = "paging-structure cache"
CD_CACHE = "CD cache"
_WORD = 2**64 - 1
MAX_CAME = 3  # wrong invalidations that are named


class Outcome(enum.Enum):
    """What became of a stale use."""

    PENDING = "not flushed yet"
    RACED = "used before the flush came"
    NEVER = NEVER_FLUSHED


class Change(NamedTuple):
    """An entry of the user's table: as the cached walk has read it, and as it is, but for what hardware sets."""

    stage: int
    level: int
    address: int
    was: int
    now: int
    leaf: bool  # it mapped a page and maps one or nothing: no table was cached because of it

    def __str__(self) -> str:
        if self.level > 0:
            where, was, now = f"stage {self.stage} level {self.level}, the entry", self.was, self.now
        else:
            word, was, now = next(pair for pair in _words(self.was, self.now) if pair[1] != pair[2])
            where = f"{'CD' if self.level == 0 else 'L1CD'}, word {word} of the entry"
        return f"{where} at {self.address:#x}: {was:#x} then, {now:#x} now"


def changed(then: Sequence[Step], now: Sequence[Step], ignored: int) -> tuple[Change | None, bool]:
    """The entry because of which two walks of one address differ, and whether it leads to another table.

    ignored: bits that hardware sets by itself. None when no entry differs that was read from memory: what a kernel
    has written into its own tables has changed.
    """
    both = list(zip(then, now, strict=False))
    common = next((at for at, (a, b) in enumerate(both) if a.address != b.address), len(both))
    differ = [at for at in range(common) if (both[at][0].entry ^ both[at][1].entry) & ~ignored]
    if not differ:
        return None, False
    at = differ[-1]  # the one that leads elsewhere, or where the walk of now has stopped
    old, new = both[at]
    leaf = at == len(then) - 1 and at == len(now) - 1
    change = Change(old.stage, old.level, old.address, old.entry & ~ignored, new.entry & ~ignored, leaf)
    return change, common < len(both)


class Use(NamedTuple):
    """One use of the hardware by a device, as the sanitizer was told of it."""

    dev: Endpoint
    pasid: int | None
    iova: int
    access: int

    def __str__(self) -> str:
        pasid = "no PASID" if self.pasid is None else f"PASID {self.pasid}"
        return f"{self.dev.name}, {pasid}, {describe(self.access)} at iova {self.iova:#x}"


class Came(NamedTuple):
    """A user's invalidation, and its commands."""

    at: int  # after so many DMAs
    text: str
    commands: tuple[Invalidation, ...]


class Finding:
    """A stale use, and those like it that followed.

    `first`, `last`: the input range of the translation. `cache`: what served it; the paging-structure cache also when
    a translation was made anew through a table that it has kept. `seq`, `age`: the translation was the cache's seq-th,
    made so many DMAs before. `change`: None for tables that are not the user's. `missing`: the invalidations to
    send.
    """

    def __init__(
        self, use: Use, first: int, last: int, *, cache: str, gave: str, says: str, change: Change | None,
        due: Sequence[Due], at: int,
    ) -> None:  # fmt: skip
        """due: what has to come before it is right again. at: the number of the DMA."""
        self.use = use
        self.first = first
        self.last = last
        self.cache = cache
        self.gave = gave
        self.says = says
        self.change = change
        self.missing = self._due = list(due)
        self.at = at
        self.seq = 0
        self.age = 0
        self.uses = 1
        self.until = at  # the last use's number
        self.pages = 1  # translations with this change that were found
        self.outcome = Outcome.PENDING
        self.came: list[str] = []  # invalidations that did not do it
        self.handle: object = None  # the attachment it was used through

    @property
    def right(self) -> str:
        """What has to be sent."""
        return ", ".join(due.text for due in self.missing)

    @property
    def since(self) -> int:
        """The number of the DMA that made what was stale; 0 for a kept table, which is older than the translation."""
        return 0 if self.cache in (KEPT_TABLE, CD_CACHE) else self.at - self.age

    def _refusal(self, due: Due, what: Invalidation) -> str:
        """Why an invalidation is not the one that is due; empty when it is."""
        if not _reaches(due, what):
            return "it is tagged for another address space"
        if what.first > self.last or what.last < self.first:
            return f"{what.first:#x}..{what.last:#x} does not cover it"
        if what.leaf and not due.leaf:
            return "LEAF leaves the tables that are kept, and the entry that changed is no leaf"
        return ""

    def covered(self, what: Invalidation) -> bool:
        """An invalidation has come: nothing is due any more."""
        self._due = [due for due in self._due if not self._is(due, what)]
        if self.outcome is Outcome.PENDING and self._due:
            self.missing = self._due
        return not self._due

    def _is(self, due: Due, what: Invalidation) -> bool:
        return (what.user or not due.user) and _concerns(due, what) and not self._refusal(due, what)

    def settle(self, outcome: Outcome, log: Sequence[Came]) -> None:
        """It is decided; log has the invalidations that came."""
        self.outcome = outcome
        if outcome is Outcome.NEVER:
            self.came = self._name(log)

    def _name(self, log: Sequence[Came]) -> list[str]:
        """The invalidations that may have been meant for it, with what is wrong with each, likeliest first."""
        ranked: list[tuple[int, int, str]] = []
        for came in log:
            rank, distance, why = min(map(self._rank, came.commands), default=(3, 0, "no device uses that HWPT"))
            if rank == 4:
                why = why or "that was before the change, and the page was cached again"
            elif came.at < self.since:
                continue
            if rank < 5:
                ranked.append((rank, distance, f"{came.text}: {why}"))
        best: dict[int, str] = {}
        for rank, _, text in sorted(ranked):
            best.setdefault(rank, text)
        return list(best.values())[:MAX_CAME]

    def _rank(self, what: Invalidation) -> tuple[int, int, str]:
        """As the likeliest of what is missing."""
        return min(self._rank_as(due, what) for due in self.missing)

    def _rank_as(self, due: Due, what: Invalidation) -> tuple[int, int, str]:
        """(how unlikely it was meant for this, the distance of its range, what is wrong with it).

        0: of leaf entries only; 1: of another address space, but this range; 2: of another range; 4: nothing is
        wrong but the time; 5: it has nothing to do with this.
        """
        distance = max(what.first - self.last, self.first - what.last, 0)
        why = self._refusal(due, what)
        if not _concerns(due, what):
            rank = 5
        elif not _reaches(due, what):
            rank = 5 if distance else 1
        else:
            rank = 2 if distance else 0 if why else 4
            if rank == 4 and due is not self.missing[0]:
                why = f"the {self.missing[0].cache} had not been told, and the page was cached again"
        return rank, distance, why

    def __str__(self) -> str:
        return f"{self.outcome.value}: {self.use}"

    def lines(self) -> list[str]:
        """The report."""
        times = f", {self.uses} times" if self.uses > 1 else ""
        pages = f", and {self.pages - 1} more translations like it" if self.pages > 1 else ""
        dmas = "1 DMA" if self.age == 1 else f"{self.age} DMAs"
        made = f"its entry {self.seq} was made {dmas} before" if self.age else "made just then"
        changed = self.change or "a table that the driver keeps"
        return [
            f"{self}{times}{pages}",
            f"  the {self.cache} gave {self.gave} ({made}); memory says {self.says}",
            f"  changed: {changed}",
            f"  right: {self.right}",
            *(f"  came: {text}" for text in self.came),
        ]


def _words(was: int, now: int) -> Iterator[tuple[int, int, int]]:
    """(number, word then, word now) of two entries of several 64 bit words."""
    for word in range(max(was.bit_length(), now.bit_length(), 1) + 63 >> 6):
        yield word, was >> 64 * word & _WORD, now >> 64 * word & _WORD


def _concerns(due: Due, what: Invalidation) -> bool:
    """It drops from that cache; what forgets an STE forgets its CDs."""
    return what.cache == due.cache or (due.cache == CD_CACHE and what.cache == "STE cache")


def _reaches(due: Due, what: Invalidation) -> bool:
    return what.tag == "all" or what.tag in due.reach


def gave(entry: TlbEntry, iova: int, *, nested: bool) -> str:
    """Where a translation leads, as far as the user knows the address."""
    if nested:
        return f"guest physical {entry.ipa + iova - entry.first:#x}"
    return f"byte {entry.pos + iova - entry.first:#x} of its memory"
