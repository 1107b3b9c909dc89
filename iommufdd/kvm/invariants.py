"""What must hold while a table is shared: looked at after every change of it, when asked for.

1. No IOTLB or device TLB keeps what a zap has taken, once the importers have been told.
2. A page is given back only when no cache leads to it any more.
3. The top table is the same for as long as the descriptor lives.
4. Once the VMM's address space is gone, no fault succeeds.
5. A HWPT keeps the descriptor, and the descriptor the VM.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from iommufdd.iommu.walk import READ, WRITE
from iommufdd.user import PAGE_SHIFT

from . import ept

if TYPE_CHECKING:
    from collections.abc import Iterator

    from iommufdd.iommu.ops import Cached
    from iommufdd.user import PageFile

    from .mmu import Entry
    from .tdp_fd import TdpFile
    from .vm import Vm

KEPT = 64  # texts


class Invariants:
    """The five, for one VM."""

    def __init__(self, vm: Vm) -> None:
        self.vm = vm
        self.count = 0
        self.violations: list[str] = []  # the first ones, in words
        vm.machine.memory.watchers.append(self)

    def end(self) -> None:
        """Stop looking."""
        self.vm.machine.memory.watchers.remove(self)

    # ---- what happens ----

    def flushed(self, start: int, size: int) -> None:
        """Importers have been told that [start, start + size) has changed."""
        for cached in self._cached():
            if cached.first < start + size and start <= cached.last:
                self._broken(1, f"{_words(cached)} survived the flush of {start:#x}..{start + size - 1:#x}")
            elif not self._agrees(cached):
                self._broken(1, f"{_words(cached)} is not what the table says")
        self.look()

    def page_free(self, file: PageFile, pos: int, size: int) -> None:
        """Bytes of a file are about to be given back."""
        for cached in self._cached():
            last = cached.pos + cached.last - cached.first
            if cached.file is file and cached.pos < pos + size and pos <= last and not self._agrees(cached):
                self._broken(2, f"{_words(cached)} leads to a page that is given back")

    def table_free(self, hpa: int) -> None:
        """The page of a table is about to be given back."""
        for importer in list(self.vm.mmu.importers):
            if hpa in importer.cached_tables():
                self._broken(2, f"a cache begins at the table at {hpa:#x}, which is given back")

    def resolved(self) -> None:
        """A device's fault had success."""
        if not self.vm.mm.alive:
            self._broken(4, "a fault had success after the VMM's address space was gone")
        self.look()

    def released(self, tdp: TdpFile) -> None:
        """The last reference of an exported table is gone."""
        if tdp.importers:
            self._broken(5, f"the table's descriptor has gone before its {len(tdp.importers)} importers")

    def look(self) -> None:
        """What holds at any time."""
        for tdp in self.vm.exported.values():
            if tdp.root_hpa != self.vm.mmu.root:
                self._broken(3, f"the top table is {self.vm.mmu.root:#x}, and {tdp.root_hpa:#x} was exported")
            if tdp.refs < max(len(tdp.importers), 1) or self.vm.refs < 1 or self.vm.dying:
                self._broken(5, f"{len(tdp.importers)} importers, {tdp.refs} references, VM {self.vm.refs}")

    # ---- what is cached ----

    def _cached(self) -> Iterator[Cached]:
        for importer in list(self.vm.mmu.importers):
            yield from importer.cached()

    def _agrees(self, cached: Cached) -> bool:
        """The table gives the same bytes and at least these rights."""
        at = self.vm.mmu.lookup(cached.first >> PAGE_SHIFT)
        if at is None or not at.entry & ept.PRESENT or at.last_gfn < cached.last >> PAGE_SHIFT:
            return False
        rights = ept.R * (cached.allowed >> READ & 1) | ept.W * (cached.allowed >> WRITE & 1)
        if rights & ~at.entry:
            return False
        return self._bytes(at, cached.first) == (cached.file, cached.pos)

    def _bytes(self, at: Entry, gpa: int) -> tuple[PageFile, int] | None:
        hpa = (at.entry & ept.ADDRESS) + gpa - (at.gfn << PAGE_SHIFT)
        run = self.vm.machine.memory.run(hpa)
        return None if run is None else (run.file, run.pos + hpa - run.first)

    def _broken(self, number: int, text: str) -> None:
        self.count += 1
        if len(self.violations) < KEPT:
            self.violations.append(f"invariant {number}: {text}")


def _words(cached: Cached) -> str:
    return f"{cached.where} of {cached.first:#x}..{cached.last:#x}"
