"""Mutants of the sharing: each breaks one promise, and the invariants say which."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from iommufdd.hw_pagetable import HwptKvm
from iommufdd.iommu.dma import Op
from iommufdd.iommu.vtd import Vtd
from iommufdd.iommu.vtd_kvm import VtdKvm
from iommufdd.kvm.mmu import Mmu
from iommufdd.kvm.tdp_fd import TdpFile
from iommufdd.mm import Region
from iommufdd.user import PAGE_SIZE

from .room import LOG, Room

if TYPE_CHECKING:
    from collections.abc import Callable

    from iommufdd.user import Mm


def reuse_before_the_flush(patch: pytest.MonkeyPatch) -> None:
    """Pages are given back, and only then caches are told."""
    flush = Mmu.flush

    def early(self: Mmu, first: int = 0, last: int = (1 << 52) - 1) -> None:
        self._reclaim()
        flush(self, first, last)

    patch.setattr(Mmu, "flush", early)


def importers_are_not_told(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(HwptKvm, "invalidate", lambda self, start, size: None)


def the_device_tlb_is_forgotten(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Vtd, "drop_devtlb", lambda self, dev, pasid, first=0, last=0, *, user=False: None)


def the_iotlb_is_forgotten(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Vtd, "drop_second", lambda self, did, first, last: None)
    patch.setattr(Vtd, "drop_domain", lambda self, did: None)


def ranges_that_are_no_whole_pages_are_dropped(patch: pytest.MonkeyPatch) -> None:
    """As the RFC does; here every range looks like one."""
    patch.setattr(VtdKvm, "cache_invalidate", lambda self, start, size: None)


def tables_kept_are_forgotten(patch: pytest.MonkeyPatch) -> None:
    """A page-selective flush that only looks at leaf entries, even where all is meant."""

    def drop_domain(self: Vtd, did: int) -> None:
        space = self.iotlb.space((did, -1))
        space.drop(0, 2**64 - 1)

    patch.setattr(Vtd, "drop_domain", drop_domain)


def the_root_is_dropped_with_a_slot(patch: pytest.MonkeyPatch) -> None:
    """As KVM does for a table that is not exported."""
    zap_all = Mmu.zap_all

    def fast(self: Mmu) -> None:
        zap_all(self)
        level, self.root = self.level, 0
        self.load_root(level)

    patch.setattr(Mmu, "zap_all", fast)


def the_dead_are_not_asked_for(patch: pytest.MonkeyPatch) -> None:
    """A fault is served although the VMM's address space has gone."""

    ask = TdpFile.fault

    def fault(self: TdpFile, mm: Mm, gfn: int, access: int) -> None:
        if mm.alive:
            ask(self, mm, gfn, access)
        elif self.vm.mmu.checks is not None:
            self.vm.mmu.checks.resolved()

    patch.setattr(TdpFile, "fault", fault)


def the_hwpt_does_not_hold_the_file(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(TdpFile, "get", lambda self: self)


def write_protection_is_not_flushed(patch: pytest.MonkeyPatch) -> None:
    """A dirty log that a device's writes pass by."""
    patch.setattr(Mmu, "_flush_all_of", lambda self, changed: None)


MUTANTS: dict[Callable[[pytest.MonkeyPatch], None], str] = {
    reuse_before_the_flush: "invariant 2",
    importers_are_not_told: "invariant 1",
    the_device_tlb_is_forgotten: "invariant 1",
    the_iotlb_is_forgotten: "invariant 1",
    ranges_that_are_no_whole_pages_are_dropped: "invariant 1",
    tables_kept_are_forgotten: "invariant 2",
    the_root_is_dropped_with_a_slot: "invariant 3",
    the_dead_are_not_asked_for: "invariant 4",
    the_hwpt_does_not_hold_the_file: "invariant 5",
    write_protection_is_not_flushed: "the dirty log",
}


def story() -> list[str]:
    """What a VM goes through that shares its table; what was found wrong."""
    room = Room()
    wrong: list[str] = []
    room.ram_slot(0, 0, 16, LOG)
    fd = room.runnable()
    idev = room.device(pri=True)
    room.attach(idev, room.hwpt_kvm(idev, fd))
    (slot,) = room.vm.slots[0]
    for page in range(4):
        room.write(idev, page * PAGE_SIZE, b"first")
    if room.dirty_log() != [0, 1, 2, 3]:
        wrong.append("the dirty log has not all")
    room.write(idev, 0, b"again")
    if room.dirty_log() != [0]:
        wrong.append("the dirty log has missed a write")
    fresh = room.c.world.memfd(16)
    fresh.data[PAGE_SIZE : PAGE_SIZE + 5] = b"fresh"
    start = slot.userspace_addr + PAGE_SIZE
    room.c.mm.map(Region(start, start + PAGE_SIZE, fresh, PAGE_SIZE, readable=True, writable=True))
    if room.read(idev, PAGE_SIZE, 5) != b"fresh":
        wrong.append("a DMA has read what is no longer there")
    room.slot(0, 0)
    room.ram_slot(0, 0, 4)
    room.dma(idev, Op.READ, 0).run()
    room.c.fds.close(fd)
    assert room.vm.mmu.checks is not None
    room.vm.mmu.checks.look()
    room.c.mm.exit()
    room.dma(idev, Op.READ, PAGE_SIZE).run()
    return [*wrong, *room.vm.mmu.checks.violations]


def test_nothing_is_wrong_with_it() -> None:
    assert story() == []


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_a_mutant_is_caught(mutant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    mutant(monkeypatch)
    found = story()
    assert any(text.startswith(MUTANTS[mutant]) for text in found), found
