"""A second stage whose tables are bytes: a VM's own, read as VT-d reads them (VT-d spec 9.8; RFC p18).

What a CPU understands otherwise is told to whoever watches: KVM's marks of MMIO, which it never takes for a page, and
bit 11, which it ignores.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from iommufdd.user import PageFile

from . import vtdss
from .tlb import Space, TlbEntry
from .walk import TranslationFault, Why

if TYPE_CHECKING:
    from collections.abc import Callable

    from iommufdd.description import VtdIommu

    from .ops import PhysicalMemory
    from .vtd_pasid import PasidEntry
    from .walk import RawStep


class NoMemory(PageFile):
    """What an entry shows that leads to no memory: nothing can be read there."""

    def size(self) -> int:
        return 0

    def pread(self, pos: int, length: int) -> bytes:
        return b""

    def pwrite(self, pos: int, data: bytes) -> int:
        return 0


NOWHERE = NoMemory()


class Kept(NamedTuple):
    """What the paging-structure cache holds: where to go on, and the entries that led there."""

    start: vtdss.Start
    steps: tuple[RawStep, ...]


class EptWalker:
    """Walks of one table."""

    __slots__ = ("_memory", "_misread", "_rules", "_start", "_steps")

    def __init__(
        self, entry: PasidEntry, memory: PhysicalMemory, description: VtdIommu,
        misread: Callable[[int, int, int, str], None],
    ) -> None:  # fmt: skip
        """entry: of the PASID table. misread: told of (guest address, level, entry, why)."""
        self._memory = memory
        self._misread = misread
        self._rules = vtdss.Rules(
            levels=entry.aw + 2, pages_2m=description.pages_2m, pages_1g=description.pages_1g, haw=description.haw,
            snoop=description.snoop_control, transient=description.device_tlb, access_dirty=entry.ssade,
        )  # fmt: skip
        self._start = vtdss.root(entry.ssptptr, self._rules)
        self._steps: list[RawStep] = []

    def translate(self, space: Space, gpa: int, access: int, steps: list[RawStep], *, cached: bool) -> TlbEntry:
        """The translation of a guest address. TranslationFault; `steps` has what was read then too."""
        kept = _kept(space, gpa, access, self._rules.levels) if cached else None
        start, before = kept or Kept(self._start, ())
        self._steps = steps
        update = self._update if cached else None
        try:
            leaf = vtdss.walk(self._fetch, update, start, self._rules, gpa, access, steps)
        finally:
            if cached:
                self._look(gpa, steps)
        if cached:
            _keep(space, start, before, gpa, steps)
        steps[:0] = before
        run = self._memory.run(leaf.out)
        file, pos = (NOWHERE, 0) if run is None else (run.file, run.pos + leaf.out - run.first)
        return TlbEntry(leaf.first, leaf.first + leaf.size - 1, file, pos, leaf.allowed, ipa=leaf.first,
                        raw_steps=tuple(steps))  # fmt: skip

    def _fetch(self, hpa: int) -> int:
        entry = self._memory.load(hpa)
        if entry is None:
            raise TranslationFault(Why.UNREADABLE, stage=2, level=self._rules.levels - len(self._steps), addr=hpa)
        return entry

    def _update(self, hpa: int, old: int, new: int) -> None:
        self._memory.store(hpa, new)

    def _look(self, gpa: int, steps: list[RawStep]) -> None:
        """Whether a CPU would have read the last entry otherwise."""
        if not steps:
            return
        _, level, _, entry = steps[-1]
        if entry & (vtdss.R | vtdss.W) == vtdss.W:
            self._misread(gpa, level, entry, "writable and not readable: KVM's mark of MMIO, a page to VT-d")
        elif entry & vtdss.R and entry & vtdss.SNP:
            self._misread(gpa, level, entry, "bit 11 is ignored by a CPU, and SNP to VT-d")


def _kept(space: Space, gpa: int, access: int, levels: int) -> Kept | None:
    """The lowest table kept. A request that rights above it refuse walks from the root, to fault there."""
    if space.tables:
        for level in range(1, levels):
            found = space.tables.get((level, gpa >> 9 * level + 12))
            if found is not None:
                assert isinstance(found, Kept)
                return found if vtdss.admits(found.start, access) else None
    return None


def _keep(space: Space, start: vtdss.Start, before: tuple[RawStep, ...], gpa: int, steps: list[RawStep]) -> None:
    """Every table that this walk has passed."""
    rights = start.rights
    for at, (_, level, _, entry) in enumerate(steps[:-1], 1):
        rights &= entry
        below = vtdss.Start(entry & vtdss.ADDRESS, level - 1, rights)
        space.keep_table(level - 1, gpa >> 9 * (level - 1) + 12, Kept(below, (*before, *steps[:at])))
