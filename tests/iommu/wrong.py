"""VMM programs that forget or botch one flush, each with what its report must say."""

from __future__ import annotations

from typing import NamedTuple

from .tables import flags
from .vmm import G1, IOVA, LEAF, M2, A, B, C, Vmm, fresh_table


class Said(NamedTuple):
    """What the report must say."""

    level: int  # of the entry that changed
    right: str  # the invalidation to send, with {hwpt}
    iova: int = IOVA
    cache: str = "IOTLB"
    came: str = ""  # of the wrong one, with {hwpt}


ONE = "HWPT_INVALIDATE {{addr 0x7f1234567000, npages 1}} on hwpt {hwpt} (IOTLB)"
TABLE_2M = "HWPT_INVALIDATE {{addr 0x7f1234400000, npages 512}} without LEAF on hwpt {hwpt} (IOTLB)"
TABLE_1G = "HWPT_INVALIDATE {{addr 0x7f1200000000, npages 262144}} without LEAF on hwpt {hwpt} (IOTLB)"


def a_4k_page_is_moved() -> tuple[Vmm, Said]:
    vmm = Vmm()
    vmm.table.map(IOVA, A)
    vmm.read()
    vmm.table.map(IOVA, B)
    vmm.read()
    return vmm, Said(1, ONE)


def a_page_is_unmapped() -> tuple[Vmm, Said]:
    """What was flushed before is no attempt at this."""
    vmm = Vmm()
    vmm.flush(IOVA + 0x1000, 1)
    vmm.table.map(IOVA, A)
    vmm.write()
    vmm.table.unmap(IOVA)
    vmm.write()
    return vmm, Said(1, ONE)


def a_2m_page_is_moved() -> tuple[Vmm, Said]:
    vmm = Vmm(pages=4096)
    vmm.table.map(IOVA & -M2, 2 * M2, level=2)
    vmm.read()
    vmm.table.map(IOVA & -M2, 3 * M2, level=2)
    vmm.read()
    return vmm, Said(2, "HWPT_INVALIDATE {{addr 0x7f1234400000, npages 512}} on hwpt {hwpt} (IOTLB)")


def a_1g_page_is_moved() -> tuple[Vmm, Said]:
    vmm = Vmm()
    c = vmm.lab.c
    c.map(vmm.ioas, c.process.map(c.world.memfd(4)), 4 * 4096, G1)
    vmm.table.map(0x7F12_0000_0000, 0, level=3)
    vmm.read(0x7F12_0000_3000)
    vmm.table.map(0x7F12_0000_0000, G1, level=3)
    vmm.read(0x7F12_0000_3000)
    right = "HWPT_INVALIDATE {{addr 0x7f1200000000, npages 262144}} on hwpt {hwpt} (IOTLB)"
    return vmm, Said(3, right, 0x7F12_0000_3000)


def a_2m_page_is_split() -> tuple[Vmm, Said]:
    """All pages but one stay where they were; the DMA begins on one that stays."""
    vmm = Vmm(pages=2048)
    base = IOVA & -M2
    vmm.table.map(base, M2, level=2)
    vmm.read(base, length=8192)
    pages = vmm.table.page()
    for at in range(512):
        vmm.table.set(pages + 8 * at, M2 + at * 4096 | flags("rwu"))
    vmm.table.set(pages + 8, A | flags("rwu"))
    vmm.table.set(vmm.table.slot(base, 2), pages | flags("rwu"))
    vmm.read(base, length=8192)
    return vmm, Said(2, TABLE_2M, base + 0x1000)


def a_table_page_is_replaced() -> tuple[Vmm, Said]:
    vmm = Vmm()
    vmm.table.map(IOVA, A)
    vmm.read()
    fresh_table(vmm, B)
    vmm.read()
    return vmm, Said(2, TABLE_2M)


def write_permission_is_taken() -> tuple[Vmm, Said]:
    vmm = Vmm()
    vmm.table.map(IOVA, A)
    vmm.write()
    vmm.table.map(IOVA, A, "ruad")
    vmm.write()
    return vmm, Said(1, ONE)


def write_permission_is_taken_from_a_whole_table() -> tuple[Vmm, Said]:
    vmm = Vmm()
    vmm.table.map(IOVA, A)
    vmm.write()
    slot = vmm.table.slot(IOVA, 3)
    vmm.table.set(slot, vmm.table.get(slot) & ~2)
    vmm.write()
    return vmm, Said(3, TABLE_1G)


def the_root_is_cleared() -> tuple[Vmm, Said]:
    vmm = Vmm()
    vmm.table.map(IOVA, A)
    vmm.read()
    vmm.ram.write(vmm.table.root, bytes(4096))
    vmm.read()
    return vmm, Said(4, "HWPT_INVALIDATE {{addr 0x7f0000000000, npages 134217728}} without LEAF on hwpt {hwpt} (IOTLB)")


def the_wrong_page_is_flushed() -> tuple[Vmm, Said]:
    vmm = Vmm()
    vmm.table.map(IOVA, A)
    vmm.read()
    vmm.table.map(IOVA, B)
    vmm.flush(A, 1)  # the page's guest physical address
    vmm.read()
    return vmm, Said(
        1, ONE, came="HWPT_INVALIDATE {{addr 0x5000, npages 1}} on hwpt {hwpt}: 0x5000..0x5fff does not cover it"
    )


def too_few_pages_are_flushed() -> tuple[Vmm, Said]:
    vmm = Vmm()
    before = IOVA - 0x1000
    vmm.table.map(before, A)
    vmm.table.map(IOVA, B)
    vmm.read(before, length=8192)
    vmm.table.map(before, 0x10000)
    vmm.table.map(IOVA, 0x11000)
    vmm.flush(before, 1)
    vmm.read(before, length=8192)
    came = (
        "HWPT_INVALIDATE {{addr 0x7f1234566000, npages 1}} on hwpt {hwpt}: "
        "0x7f1234566000..0x7f1234566fff does not cover it"
    )
    return vmm, Said(1, ONE, came=came)


def the_wrong_hwpt_of_two_is_flushed() -> tuple[Vmm, Said]:
    """Two HWPTs over one table, each with its own device."""
    vmm = Vmm()
    other, second = vmm.lab.device(), vmm.nested(vmm.table.root)
    vmm.lab.attach(other, second)
    vmm.table.map(IOVA, A)
    vmm.read()
    vmm.lab.read(other, IOVA)
    vmm.table.map(IOVA, B)
    vmm.flush(IOVA, 1, LEAF, hwpt=second)
    vmm.read()
    vmm.lab.read(other, IOVA)  # sets A in the new entry, which changes nothing
    vmm.read()
    came = f"HWPT_INVALIDATE {{{{addr 0x7f1234567000, npages 1, LEAF}}}} on hwpt {second}: it is tagged for another"
    return vmm, Said(1, ONE, came=came)


def the_other_pasids_hwpt_is_flushed() -> tuple[Vmm, Said]:
    vmm = Vmm()
    second = vmm.nested(vmm.table.root)
    vmm.lab.attach(vmm.idev, second, pasid=7)
    vmm.table.map(IOVA, A)
    vmm.read(pasid=7)
    vmm.table.map(IOVA, B)
    vmm.flush(IOVA, 1)
    vmm.read(pasid=7)
    right = f"HWPT_INVALIDATE {{{{addr 0x7f1234567000, npages 1}}}} on hwpt {second} (IOTLB)"
    return vmm, Said(1, right, came="on hwpt {hwpt}: it is tagged for another address space")


def a_hwpt_that_no_device_uses_is_flushed() -> tuple[Vmm, Said]:
    vmm = Vmm()
    unused = vmm.nested(vmm.table.root)
    vmm.table.map(IOVA, A)
    vmm.read()
    vmm.table.map(IOVA, B)
    vmm.flush(IOVA, 1, hwpt=unused)
    vmm.read()
    return vmm, Said(1, ONE, came=f"on hwpt {unused}: no device uses that HWPT")


def leaf_is_given_although_a_table_changed() -> tuple[Vmm, Said]:
    vmm = Vmm()
    vmm.table.map(IOVA, A)
    vmm.read()
    fresh_table(vmm, B)
    vmm.flush(IOVA, 1, LEAF)
    vmm.read()
    came = "npages 1, LEAF}} on hwpt {hwpt}: LEAF leaves the tables that are kept"
    return vmm, Said(2, TABLE_2M, cache="paging-structure cache", came=came)


def leaf_is_given_and_the_device_tlb_is_clean() -> tuple[Vmm, Said]:
    """The IOTLB served it, which other devices fill too."""
    vmm = Vmm(ats=True)
    other = vmm.lab.device()
    vmm.lab.attach(other, vmm.hwpt)
    vmm.table.map(IOVA, A)
    vmm.lab.read(other, IOVA)
    fresh_table(vmm, B)
    vmm.read()
    vmm.flush(IOVA, 1, LEAF)
    right = "HWPT_INVALIDATE {{addr 0x7f1234400000, npages 512}} without LEAF on hwpt {hwpt} (IOTLB and device TLB)"
    return vmm, Said(2, right, came="on hwpt {hwpt}: LEAF leaves the tables that are kept")


def a_device_tlb_is_forgotten() -> tuple[Vmm, Said]:
    vmm = Vmm(ats=True)
    vmm.table.map(IOVA, A)
    vmm.read()
    vmm.table.map(IOVA, B)
    vmm.read()
    right = "HWPT_INVALIDATE {{addr 0x7f1234567000, npages 1}} on hwpt {hwpt} (IOTLB and device TLB)"
    return vmm, Said(1, right, cache="device TLB")


def one_of_two_devices_is_forgotten() -> tuple[Vmm, Said]:
    """The other one has a HWPT of its own over the same table, and is the only one that is flushed."""
    vmm = Vmm(ats=True)
    other, second = vmm.lab.device(ats=True), vmm.nested(vmm.table.root)
    vmm.lab.attach(other, second)
    vmm.table.map(IOVA, A)
    for idev in (vmm.idev, other):
        vmm.lab.write(idev, IOVA, b"before")
    vmm.table.unmap(IOVA)
    vmm.flush(IOVA, 1, hwpt=second)
    vmm.read()
    right = "HWPT_INVALIDATE {{addr 0x7f1234567000, npages 1}} on hwpt {hwpt} (IOTLB and device TLB)"
    return vmm, Said(1, right, cache="device TLB", came=f"on hwpt {second}: it is tagged for another address space")


def a_table_is_freed_and_used_again() -> tuple[Vmm, Said]:
    """The old table page holds other entries now; a page that was never cached goes through it."""
    vmm = Vmm()
    vmm.table.map(IOVA, A)
    vmm.table.map(IOVA + 0x1000, B)
    vmm.read()
    old = vmm.table.slot(IOVA, 1) & -4096
    fresh_table(vmm, A, B)
    vmm.flush(IOVA, 1, LEAF)
    vmm.ram.write(old, (C | flags("rwu")).to_bytes(8, "little") * 512)
    vmm.read(IOVA + 0x1000)
    came = "HWPT_INVALIDATE {{addr 0x7f1234567000, npages 1, LEAF}} on hwpt {hwpt}: 0x7f1234567000..0x7f1234567fff"
    return vmm, Said(2, TABLE_2M, IOVA + 0x1000, "paging-structure cache", came)


def five_levels() -> tuple[Vmm, Said]:
    vmm = Vmm(levels=5)
    iova = 0xAB_7F12_3456_7000
    vmm.table.map(iova, A)
    vmm.read(iova)
    slot = vmm.table.slot(iova, 5)
    vmm.table.set(slot, 0)
    vmm.table.map(iova, B)
    vmm.read(iova)
    right = "HWPT_INVALIDATE {{addr 0xab000000000000, npages 68719476736}} without LEAF on hwpt {hwpt} (IOTLB)"
    return vmm, Said(5, right, iova)


def it_is_flushed_before_the_change() -> tuple[Vmm, Said]:
    vmm = Vmm()
    vmm.table.map(IOVA, A)
    vmm.read()
    vmm.flush(IOVA, 1)
    vmm.read()
    vmm.table.map(IOVA, B)
    vmm.read()
    return vmm, Said(1, ONE, came="on hwpt {hwpt}: that was before the change, and the page was cached again")


def it_is_flushed_between_two_changes() -> tuple[Vmm, Said]:
    vmm = Vmm()
    vmm.table.map(IOVA, A)
    vmm.read()
    vmm.table.map(IOVA, B)
    vmm.read()  # races
    vmm.flush(IOVA, 1)
    vmm.read()
    vmm.table.map(IOVA, C)
    vmm.read()
    return vmm, Said(1, ONE, came="that was before the change")


def the_first_stage_of_a_kernel_flush_is_not_the_guests() -> tuple[Vmm, Said]:
    """Unmapping guest memory drops the cached translation, by chance: the guest's flush is still missing."""
    vmm = Vmm()
    spare = vmm.lab.c.map(vmm.ioas, vmm.lab.c.process.map(vmm.lab.c.world.memfd(1)), 4096)
    vmm.table.map(IOVA, A)
    vmm.read()
    vmm.table.map(IOVA, B)
    vmm.read()
    vmm.lab.c.unmap(vmm.ioas, spare, 4096)
    vmm.read()
    return vmm, Said(1, ONE)


def a_fault_that_memory_does_not_explain() -> tuple[Vmm, Said]:
    """The old table page was cleared: the walk through it faults, although the new table maps the page."""
    vmm = Vmm()
    vmm.table.map(IOVA, A)
    vmm.read()
    old = vmm.table.slot(IOVA, 1) & -4096
    fresh_table(vmm, A, B)
    vmm.ram.write(old, bytes(4096))
    vmm.lab.fault(vmm.idev, IOVA + 0x1000)
    return vmm, Said(2, TABLE_2M, IOVA + 0x1000, "paging-structure cache")


WRONG = (
    a_4k_page_is_moved, a_page_is_unmapped, a_2m_page_is_moved, a_1g_page_is_moved, a_2m_page_is_split,
    a_table_page_is_replaced, write_permission_is_taken, write_permission_is_taken_from_a_whole_table,
    the_root_is_cleared, the_wrong_page_is_flushed, too_few_pages_are_flushed, the_wrong_hwpt_of_two_is_flushed,
    the_other_pasids_hwpt_is_flushed, a_hwpt_that_no_device_uses_is_flushed, leaf_is_given_although_a_table_changed,
    leaf_is_given_and_the_device_tlb_is_clean, a_device_tlb_is_forgotten, one_of_two_devices_is_forgotten,
    a_table_is_freed_and_used_again, five_levels, it_is_flushed_before_the_change, it_is_flushed_between_two_changes,
    the_first_stage_of_a_kernel_flush_is_not_the_guests, a_fault_that_memory_does_not_explain,
)  # fmt: skip


def must_be_told(vmm: Vmm, said: Said) -> None:
    """Nothing is reported while the flush might still come; at the end one finding, which says all of it."""
    assert not vmm.sanitizer.reported
    findings = vmm.end()
    assert len(findings) == 1, [str(finding) for finding in findings]
    finding, change = findings[0], findings[0].change
    text = "\n".join(finding.lines())
    assert finding.outcome.name == "NEVER"
    assert change is not None, text
    assert (change.stage, change.level) == (1, said.level), text
    assert finding.use.iova == said.iova, text
    assert finding.cache == said.cache, text
    assert finding.right == said.right.format(hwpt=vmm.hwpt), text
    if said.came:
        assert said.came.format(hwpt=vmm.hwpt) in "\n".join(finding.came), text
    else:
        assert not finding.came, text
