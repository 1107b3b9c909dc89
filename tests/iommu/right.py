"""VMM programs that flush what they must, if late; each with the uses that must have raced."""

from __future__ import annotations

from typing import NamedTuple

import iommufd_uapi.iommufd as uapi
from iommufdd.iommu.dma import Op, State
from tests.core.harness import FAULT, PASID

from .lab import POOL, endpoint
from .tables import X86Table, flags
from .vmm import G1, IOVA, LEAF, M2, A, B, C, Vmm, fresh_table


class Right(NamedTuple):
    """What the counts must say of a program with nothing to report."""

    raced: int = 0


def nothing_changes() -> tuple[Vmm, Right]:
    vmm = Vmm()
    vmm.table.map(IOVA, A)
    for _ in range(5):
        vmm.write()
        vmm.read()
    return vmm, Right()


def a_page_becomes_present() -> tuple[Vmm, Right]:
    """Not present is not cached: no flush is due, not even after a fault."""
    vmm = Vmm()
    vmm.table.map(IOVA, A)
    vmm.read()
    vmm.lab.fault(vmm.idev, IOVA + 0x1000)
    vmm.table.map(IOVA + 0x1000, B)
    vmm.read(IOVA + 0x1000)
    return vmm, Right()


def a_table_becomes_present() -> tuple[Vmm, Right]:
    vmm = Vmm()
    vmm.table.map(IOVA, A)
    vmm.read()
    for iova in (IOVA + M2, IOVA + G1, IOVA ^ 1 << 40):
        vmm.lab.fault(vmm.idev, iova)
        vmm.table.map(iova, B)
        vmm.read(iova)
    return vmm, Right()


def write_permission_is_given() -> tuple[Vmm, Right]:
    vmm = Vmm()
    vmm.table.map(IOVA, A, "ru")
    vmm.read()
    vmm.lab.fault(vmm.idev, IOVA, Op.WRITE)
    vmm.table.map(IOVA, A)
    vmm.write()
    return vmm, Right()


def write_permission_is_given_to_a_whole_table() -> tuple[Vmm, Right]:
    """The table's old rights are kept: hardware may refuse until it looks again, and does."""
    vmm = Vmm()
    vmm.table.map(IOVA, A, make="ru")
    vmm.read()
    for level in (4, 3, 2):
        slot = vmm.table.slot(IOVA, level)
        vmm.table.set(slot, vmm.table.get(slot) | 2)
    vmm.lab.dma(vmm.idev, Op.WRITE, IOVA).run()
    return vmm, Right()


def hardware_sets_accessed_and_dirty() -> tuple[Vmm, Right]:
    vmm = Vmm()
    entry = vmm.table.map(IOVA, A)
    vmm.read()
    vmm.write()
    vmm.read()
    assert vmm.table.get(entry) == A | flags("rwuad")
    return vmm, Right()


def the_guest_clears_accessed_and_dirty() -> tuple[Vmm, Right]:
    vmm = Vmm()
    entry = vmm.table.map(IOVA, A)
    vmm.write()
    vmm.table.set(entry, A | flags("rwu"))
    vmm.write()
    return vmm, Right()


def a_page_is_moved_and_flushed() -> tuple[Vmm, Right]:
    vmm = Vmm()
    vmm.table.map(IOVA, A)
    vmm.read()
    vmm.table.map(IOVA, B)
    vmm.flush(IOVA, 1, LEAF)
    vmm.read()
    return vmm, Right()


def a_dma_races_with_the_flush() -> tuple[Vmm, Right]:
    vmm = Vmm()
    vmm.table.map(IOVA, A)
    vmm.read()
    vmm.table.map(IOVA, B)
    for _ in range(3):
        vmm.read()
    vmm.flush(IOVA, 1, LEAF)
    vmm.read()
    return vmm, Right(1)


def another_device_leaves_meanwhile() -> tuple[Vmm, Right]:
    vmm = Vmm()
    other = vmm.lab.device()
    vmm.lab.attach(other, vmm.hwpt)
    vmm.table.map(IOVA, A)
    vmm.read()
    vmm.table.map(IOVA, B)
    vmm.read()
    vmm.lab.detach(other)
    vmm.flush(IOVA, 1)
    return vmm, Right(1)


def a_dma_through_a_device_tlb_races() -> tuple[Vmm, Right]:
    vmm = Vmm(ats=True)
    vmm.table.map(IOVA, A)
    vmm.write()
    vmm.table.unmap(IOVA)
    vmm.write()
    vmm.flush(IOVA, 1)
    vmm.lab.fault(vmm.idev, IOVA)
    return vmm, Right(1)


def several_changes_share_a_flush() -> tuple[Vmm, Right]:
    """Flushes come late and out of order; others come between."""
    vmm = Vmm()
    for page in range(8):
        vmm.table.map(IOVA + page * 4096, A + page * 4096)
    vmm.read(length=8 * 4096)
    for page in range(8):
        vmm.table.map(IOVA + page * 4096, 0x20000 + page * 4096)
        vmm.read(IOVA + page * 4096)
    vmm.flush(IOVA + 0x7000, 1)
    vmm.flush(0x1000, 1)
    vmm.flush(IOVA, 7)
    vmm.read(length=8 * 4096)
    return vmm, Right(8)


def a_table_is_replaced_and_flushed() -> tuple[Vmm, Right]:
    vmm = Vmm()
    vmm.table.map(IOVA, A)
    vmm.read()
    fresh_table(vmm, B)
    vmm.read()
    vmm.flush(IOVA & -M2, 512)
    vmm.read()
    return vmm, Right(1)


def everything_is_flushed() -> tuple[Vmm, Right]:
    vmm = Vmm()
    vmm.table.map(IOVA, A)
    vmm.read()
    vmm.ram.write(vmm.table.root, bytes(4096))
    vmm.read()
    vmm.flush()
    vmm.lab.fault(vmm.idev, IOVA)
    return vmm, Right(1)


def a_large_page_is_split_where_nobody_looks() -> tuple[Vmm, Right]:
    """The same pages in smaller entries: every DMA reaches what it should, and the flush comes."""
    vmm = Vmm(pages=2048)
    base = IOVA & -M2
    vmm.table.map(base, M2, level=2)
    vmm.read(base, length=8192)
    pages = vmm.table.page()
    for at in range(512):
        vmm.table.set(pages + 8 * at, M2 + at * 4096 | flags("rwu"))
    vmm.table.set(vmm.table.slot(base, 2), pages | flags("rwu"))
    vmm.read(base, length=8192)
    vmm.flush(base, 512)
    vmm.read(base, length=8192)
    return vmm, Right()


def a_domain_is_replaced() -> tuple[Vmm, Right]:
    """The driver flushes; a DMA between its stores sees the old domain, which is no user's fault."""
    vmm = Vmm()
    other = X86Table(vmm.ram, POOL + (1 << 20))
    other.map(IOVA, B)
    vmm.table.map(IOVA, A)
    vmm.read()
    second = vmm.nested(other.root)
    vmm.lab.iommu.stored = lambda dev, pasid: vmm.lab.dma(vmm.idev, Op.READ, IOVA).run() and None
    vmm.lab.replace(vmm.idev, second)
    vmm.lab.iommu.stored = None
    vmm.read()
    vmm.lab.replace(vmm.idev, vmm.ioas)
    vmm.read(A)
    return vmm, Right(1)


def the_table_of_a_detached_hwpt_changes() -> tuple[Vmm, Right]:
    vmm = Vmm()
    vmm.table.map(IOVA, A)
    vmm.read()
    vmm.lab.detach(vmm.idev)
    vmm.table.map(IOVA, B)
    vmm.lab.attach(vmm.idev, vmm.hwpt)
    vmm.read()
    return vmm, Right()


def memory_is_unmapped_under_the_parent() -> tuple[Vmm, Right]:
    """The kernel flushes both stages."""
    vmm = Vmm(ats=True)
    c = vmm.lab.c
    spare = c.map(vmm.ioas, c.process.map(c.world.memfd(1)), 4096)
    vmm.table.map(IOVA, spare)
    vmm.write()
    c.unmap(vmm.ioas, spare, 4096)
    vmm.lab.fault(vmm.idev, IOVA)
    c.map(vmm.ioas, c.process.map(c.world.memfd(1)), 4096, spare)
    assert vmm.read() == bytes(8)
    return vmm, Right()


def an_ioas_without_a_guest() -> tuple[Vmm, Right]:
    vmm = Vmm()
    c, other = vmm.lab.c, vmm.lab.device(ats=True)
    vmm.lab.attach(other, vmm.ioas)
    spare = c.map(vmm.ioas, c.process.map(c.world.memfd(1)), 4096)
    vmm.lab.write(other, spare, b"here")
    c.unmap(vmm.ioas, spare, 4096)
    vmm.lab.fault(other, spare)
    c.map(vmm.ioas, c.process.map(c.world.memfd(1)), 4096, spare)
    assert vmm.lab.read(other, spare) == bytes(8)
    return vmm, Right()


def two_devices_share_a_hwpt() -> tuple[Vmm, Right]:
    vmm = Vmm(ats=True)
    other = vmm.lab.device(ats=True)
    vmm.lab.attach(other, vmm.hwpt)
    vmm.table.map(IOVA, A)
    vmm.read()
    vmm.lab.read(other, IOVA)
    vmm.table.map(IOVA, B)
    vmm.read()
    vmm.lab.read(other, IOVA)
    vmm.flush(IOVA, 1)
    vmm.read()
    vmm.lab.read(other, IOVA)
    return vmm, Right(2)


def a_page_fault_is_answered() -> tuple[Vmm, Right]:
    vmm = Vmm(pri=True)
    fault_id, fd = vmm.lab.c.fault_queue()
    hwpt = vmm.lab.nested(vmm.idev, vmm.parent, vmm.table.root, flags=PASID | FAULT, fault=fault_id)
    vmm.lab.replace(vmm.idev, hwpt)
    dma = vmm.lab.dma(vmm.idev, Op.WRITE, IOVA)
    assert dma.run() is State.PARKED
    request = uapi.HwptPgfault.unpack(vmm.lab.c.read(fd, 40))
    vmm.table.map(IOVA, A)
    vmm.lab.c.write(fd, uapi.HwptPageResponse(cookie=request.cookie, code=0).pack())
    assert endpoint(vmm.idev).queue.running.popleft().run() is State.DONE
    return vmm, Right()


def a_large_page_lies_around_the_interrupt_range() -> tuple[Vmm, Right]:
    """Its translation does not reach into the range; what is refused there is no finding."""
    vmm = Vmm(ats=True)
    vmm.table.map(0xFEE00000, M2, level=2)
    vmm.read(0xFEF00000)
    assert vmm.lab.fault(vmm.idev, 0xFEE00000) == 0x87
    return vmm, Right()


def nothing_is_cached() -> tuple[Vmm, Right]:
    vmm = Vmm(mode="off", ats=True)
    for page in (A, B, C):
        vmm.table.map(IOVA, page)
        vmm.read()
    return vmm, Right()


def evicted_before_its_flush() -> tuple[Vmm, Right]:
    """The cache is small: the stale entry is gone before the flush comes, which comes all the same."""
    vmm = Vmm(mode="faithful", entries=8)
    vmm.table.map(IOVA, A)
    for page in range(1, 64):
        vmm.table.map(IOVA + page * 4096, 0x10000)
    vmm.read()
    vmm.table.map(IOVA, B)
    vmm.read()
    vmm.read(IOVA + 0x1000, length=63 * 4096)
    assert vmm.lab.iommu.iotlb.evicted > 8
    vmm.flush(IOVA, 1)
    vmm.read()
    return vmm, Right(1)


RIGHT = (
    nothing_changes, a_page_becomes_present, a_table_becomes_present, write_permission_is_given,
    write_permission_is_given_to_a_whole_table, hardware_sets_accessed_and_dirty, the_guest_clears_accessed_and_dirty,
    a_page_is_moved_and_flushed, a_dma_races_with_the_flush, a_dma_through_a_device_tlb_races,
    another_device_leaves_meanwhile, several_changes_share_a_flush, a_table_is_replaced_and_flushed,
    everything_is_flushed, a_large_page_is_split_where_nobody_looks, a_domain_is_replaced,
    the_table_of_a_detached_hwpt_changes, memory_is_unmapped_under_the_parent, an_ioas_without_a_guest,
    two_devices_share_a_hwpt, a_page_fault_is_answered, a_large_page_lies_around_the_interrupt_range,
    nothing_is_cached, evicted_before_its_flush,
)  # fmt: skip


def must_be_left_alone(vmm: Vmm, right: Right) -> None:
    """Nothing is reported, and the races are known as such."""
    findings = vmm.end()
    assert findings == [], [str(finding) for finding in findings]
    counts = vmm.sanitizer.counts
    assert (counts.never, counts.raced) == (0, right.raced)
    assert counts.checked > 0
