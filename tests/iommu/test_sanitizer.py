"""The sanitizer: twenty programs that forget or botch one flush are told so, twenty right ones are left alone.

Nothing here looks inside the sanitizer but through its report.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from iommufdd.finding import Outcome
from iommufdd.iommu.dma import Op, State
from iommufdd.sanitizer import MAX_PENDING, MAX_REPORTED, MAX_SHOWN, Mode, Sanitizer
from tests.core.harness import FAULT, PASID

from .lab import Lab
from .right import RIGHT, Right, must_be_left_alone
from .vmm import IOVA, LEAF, M2, A, B, C, Vmm, forgetful, fresh_table
from .wrong import WRONG, Said, must_be_told

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.mark.parametrize("program", WRONG, ids=lambda program: program.__name__)
def test_a_wrong_program_is_told(program: Callable[[], tuple[Vmm, Said]]) -> None:
    must_be_told(*program())


@pytest.mark.parametrize("program", RIGHT, ids=lambda program: program.__name__)
def test_a_right_program_is_left_alone(program: Callable[[], tuple[Vmm, Right]]) -> None:
    must_be_left_alone(*program())


def test_the_report_reads_like_this() -> None:
    vmm = forgetful()
    vmm.flush(IOVA + 0x2000, 1, LEAF)
    vmm.read()
    vmm.end()
    entry = vmm.table.slot(IOVA, 1)
    nearby = f"HWPT_INVALIDATE {{addr 0x7f1234569000, npages 1, LEAF}} on hwpt {vmm.hwpt}"
    assert vmm.sanitizer.summary() == [
        "sanitizer: 3 translations used; 1 never flushed, 0 used before their flush came",
        "never flushed: dev1, no PASID, read at iova 0x7f1234567000, 2 times",
        "  the IOTLB gave guest physical 0x5000 (its entry 2 was made 1 DMA before); memory says guest physical 0x6000",
        f"  changed: stage 1 level 1, the entry at {entry:#x}: 0x5007 then, 0x6007 now",
        f"  right: HWPT_INVALIDATE {{addr 0x7f1234567000, npages 1}} on hwpt {vmm.hwpt} (IOTLB)",
        f"  came: {nearby}: 0x7f1234569000..0x7f1234569fff does not cover it",
        "invalidations that dropped nothing, as no device had used what they name: 1",
        f"       1 {nearby}",
    ]


def test_settling_decides_what_is_pending() -> None:
    vmm = forgetful()
    assert "1 not flushed yet" in vmm.sanitizer.summary()[0]
    assert vmm.sanitizer.summary()[1].startswith("not flushed yet: dev1")
    vmm.sanitizer.settle()
    (finding,) = vmm.sanitizer.reported
    vmm.read()
    assert (finding.uses, vmm.sanitizer.counts.never) == (2, 1)
    vmm.flush(IOVA, 1)
    vmm.read()
    vmm.table.map(IOVA, C)
    vmm.read()
    vmm.end()
    assert [finding.uses for finding in vmm.sanitizer.reported] == [2, 1], "a change of its own"


def test_in_mode_fail_a_translation_known_to_be_stale_fails() -> None:
    vmm = forgetful(pri=True)
    vmm.sanitizer.mode = Mode.FAIL
    vmm.read()
    assert not vmm.sanitizer.failed
    vmm.sanitizer.settle()
    assert vmm.sanitizer.failed
    dma = vmm.lab.dma(vmm.idev, Op.READ, IOVA)
    assert dma.run() is State.FAILED
    assert dma.done == 0
    assert "never flushed: dev1" in dma.error
    assert "right: HWPT_INVALIDATE {addr 0x7f1234567000, npages 1}" in dma.error
    vmm.flush(IOVA, 1)
    vmm.read()


def test_only_never_flushed_fails_a_run() -> None:
    vmm = Vmm()
    vmm.sanitizer.mode = Mode.FAIL
    vmm.table.map(IOVA, A)
    vmm.read()
    vmm.table.map(IOVA, B)
    vmm.read()
    vmm.flush(IOVA, 1)
    vmm.flush(IOVA, 1)
    vmm.end()
    assert vmm.sanitizer.counts.useless == 1
    assert not vmm.sanitizer.failed
    assert not forgetful().sanitizer.failed
    reporting = forgetful()
    reporting.end()
    assert not reporting.sanitizer.failed


def test_pages_behind_one_changed_table_are_one_finding() -> None:
    vmm = Vmm()
    for page in range(8):
        vmm.table.map((IOVA & -M2) + page * 4096, A)
    vmm.read(IOVA & -M2, length=8 * 4096)
    vmm.table.set(vmm.table.slot(IOVA, 2), 0)
    for _ in range(2):
        vmm.read(IOVA & -M2, length=8 * 4096)
    (finding,) = vmm.end()
    assert (finding.pages, finding.uses, vmm.sanitizer.counts.never) == (8, 16, 8)
    assert "16 times, and 7 more translations like it" in finding.lines()[0]


def test_findings_are_bounded_and_counted() -> None:
    vmm = Vmm(pages=8192)
    pages = MAX_PENDING + 8
    for page in range(pages):
        vmm.table.map(page * 4096, A)
    vmm.read(0, length=pages * 4096)
    for page in range(pages):
        vmm.table.map(page * 4096, B)
    vmm.read(0, length=pages * 4096)
    assert len(vmm.sanitizer.summary()) < 400
    assert len(vmm.end()) == MAX_REPORTED
    assert (vmm.sanitizer.counts.never, vmm.sanitizer.counts.unfollowed) == (MAX_PENDING, 8)
    text = vmm.sanitizer.summary()
    assert f"more that were never flushed: {MAX_PENDING - MAX_SHOWN}" in text
    assert "stale uses that could not be followed: 8" in text


def test_whoever_listens_hears_each_step() -> None:
    vmm = Vmm()
    heard: list[tuple[Outcome, int]] = []
    vmm.sanitizer.listeners.append(lambda finding: heard.append((finding.outcome, finding.uses)))
    vmm.table.map(IOVA, A)
    vmm.read()
    vmm.table.map(IOVA, B)
    vmm.read()
    vmm.read()
    vmm.flush(IOVA, 1)
    vmm.read()
    vmm.table.map(IOVA, C)
    vmm.read()
    vmm.end()
    assert heard == [(Outcome.PENDING, 1), (Outcome.RACED, 2), (Outcome.PENDING, 1), (Outcome.NEVER, 1)]
    assert vmm.sanitizer.counts.longest == 2


def test_a_page_request_that_memory_does_not_explain() -> None:
    """Through a kept table the page is missing: the guest would be asked for a page that it has mapped."""
    vmm = Vmm(pri=True)
    fault_id, _ = vmm.lab.c.fault_queue()
    vmm.lab.replace(vmm.idev, vmm.lab.nested(vmm.idev, vmm.parent, vmm.table.root, flags=PASID | FAULT, fault=fault_id))
    vmm.table.map(IOVA, A)
    vmm.read()
    old = vmm.table.slot(IOVA, 1) & -4096
    fresh_table(vmm, A, B)
    vmm.ram.write(old, bytes(4096))
    dma = vmm.lab.dma(vmm.idev, Op.READ, IOVA + 0x1000)
    assert dma.run() is State.PARKED
    (finding,) = vmm.end()
    assert finding.gave.startswith("fault 0x71: ")
    assert finding.says == "guest physical 0x6000"


def test_a_flush_for_another_reason_is_enough_for_the_drivers_own_tables() -> None:
    """The driver's stores and its flush: what goes through in between is the driver's race."""
    vmm = Vmm()
    vmm.lab.iommu.vendor_replace = True
    vmm.table.map(IOVA, A)
    vmm.read()
    vmm.lab.iommu.stored = lambda dev, pasid: vmm.lab.dma(vmm.idev, Op.READ, IOVA).run() and None
    vmm.lab.replace(vmm.idev, vmm.ioas)
    vmm.lab.iommu.stored = None
    assert vmm.end() == []
    assert vmm.sanitizer.counts.raced == 1


def test_a_freed_domain_ends_its_window() -> None:
    vmm = forgetful()
    handle = vmm.idev.dev.group.handles[0]
    vmm.sanitizer.freed(vmm.lab.iommu.blocked_domain)
    assert not vmm.sanitizer.reported
    vmm.sanitizer.freed(handle.domain)
    assert len(vmm.sanitizer.reported) == 1


def test_it_watches_each_model_that_has_the_words_once() -> None:
    vmm = Vmm()
    assert vmm.sanitizer.watch(vmm.lab.iommu)
    assert vmm.lab.iommu.monitors == [vmm.sanitizer]
    assert not vmm.sanitizer.watch(vmm.lab.c.world.machine.mock)


def test_another_devices_end_decides_nothing() -> None:
    vmm = forgetful()
    other = vmm.lab.device()
    vmm.lab.attach(other, vmm.ioas)
    vmm.lab.detach(other)
    vmm.lab.attach(vmm.idev, vmm.nested(vmm.table.root), pasid=3)
    vmm.lab.detach(vmm.idev, pasid=3)
    assert not vmm.sanitizer.reported
    assert len(vmm.end()) == 1


def test_there_are_twenty() -> None:
    assert len(WRONG) >= 20
    assert len(RIGHT) >= 20


def test_a_stale_page_in_the_midst_of_a_stretch_fails_the_dma() -> None:
    """A large translation is kept; of the pages that memory has now, one that is not the first is another."""
    lab = Lab()
    idev = lab.device()
    hwpt, _, table = lab.guest(idev)
    lab.attach(idev, hwpt)
    sanitizer = Sanitizer(Mode.FAIL)
    sanitizer.watch(lab.iommu)
    large = 2 << 20
    table.map(large, large, level=2)
    lab.read(idev, large)
    table.set(table.slot(large, 2), 0)
    for page in range(4):
        table.map(large + page * 4096, large + (page if page != 2 else 9) * 4096)
    lab.read(idev, large, 4 * 4096)
    sanitizer.settle()
    dma = lab.dma(idev, Op.READ, large, 4 * 4096)
    assert (dma.run(), dma.done) == (State.FAILED, 0)
    assert "never flushed: dev1, no PASID, read at iova 0x202000" in dma.error
