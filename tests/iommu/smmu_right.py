"""Guests of an SMMUv3 that send what they must, if late; each with the uses that must have raced."""

from __future__ import annotations

from iommufd_uapi.smmuv3 import Cmd
from iommufdd.iommu.dma import Op

from .smmu_lab import PAGE
from .smmu_vmm import IOVA, M2, OTHER_POOL, VSID, A, B, SmmuVmm, fresh_table

AF, DBM, AP2 = 1 << 10, 1 << 51, 1 << 7


def nothing_changes() -> tuple[SmmuVmm, int]:
    vmm = SmmuVmm()
    vmm.map(A)
    for _ in range(3):
        vmm.write()
        vmm.read()
    return vmm, 0


def a_page_becomes_valid() -> tuple[SmmuVmm, int]:
    vmm = SmmuVmm()
    vmm.fault()
    vmm.map(A)
    vmm.read()
    return vmm, 0


def everything_is_flushed() -> tuple[SmmuVmm, int]:
    """NSNH_ALL is for a guest all of its own."""
    vmm = SmmuVmm()
    vmm.map(A)
    vmm.read()
    vmm.map(B)
    vmm.read()
    vmm.send(Cmd.tlbi_nsnh_all())
    vmm.read()
    return vmm, 1


def an_address_is_flushed_for_all_asids() -> tuple[SmmuVmm, int]:
    vmm = SmmuVmm()
    vmm.map(A)
    vmm.read()
    vmm.map(B)
    vmm.send(Cmd.tlbi_nh_vaa(IOVA))
    vmm.read()
    return vmm, 0


def a_range_is_flushed_late() -> tuple[SmmuVmm, int]:
    vmm = SmmuVmm()
    first = IOVA - 3 * 4096
    for page in (A, B):
        for at in range(4):
            vmm.map(page, first + at * 4096)
        vmm.read(first, 4 * 4096)
    vmm.send(Cmd.tlbi_nh_va(5, first, num=3, tg=1))
    vmm.read(first, 4 * 4096)
    return vmm, 4


def a_table_is_replaced_and_flushed() -> tuple[SmmuVmm, int]:
    vmm = SmmuVmm()
    vmm.map(A)
    vmm.read()
    fresh_table(vmm, B)
    vmm.read()
    vmm.send(Cmd.tlbi_nh_va(5, IOVA & -M2, leaf=False, scale=9, tg=1))
    vmm.read()
    return vmm, 1


def a_cd_changes_and_all_is_sent() -> tuple[SmmuVmm, int]:
    vmm = SmmuVmm(ats=True)
    vmm.map(A)
    vmm.read()
    vmm.guest.store_cd(vmm.other(B))
    vmm.read()
    vmm.send(Cmd.cfgi_cd(VSID), Cmd.tlbi_nh_asid(5), Cmd.atc_inv(VSID))
    vmm.read()
    return vmm, 1


def a_cd_changes_and_all_is_sent_one_by_one() -> tuple[SmmuVmm, int]:
    """DMA goes on in between, as it may."""
    vmm = SmmuVmm()
    vmm.map(A)
    vmm.read()
    vmm.guest.store_cd(vmm.other(B))
    for command in (Cmd.cfgi_cd_all(VSID), Cmd.tlbi_nh_asid(5)):
        vmm.read()
        vmm.send(command)
    vmm.read()
    return vmm, 1


def a_cd_gets_another_asid() -> tuple[SmmuVmm, int]:
    vmm = SmmuVmm()
    vmm.map(A)
    vmm.read()
    vmm.guest.store_cd(vmm.other(B, asid=6))
    vmm.read()
    vmm.send(Cmd.cfgi_cd(VSID))
    vmm.read()
    return vmm, 1


def a_cd_becomes_valid() -> tuple[SmmuVmm, int]:
    """What is not valid is not cached."""
    vmm = SmmuVmm()
    vmm.map(A)
    vmm.guest.store_cd(vmm.other(B, v=0))
    vmm.fault()
    vmm.guest.store_cd(vmm.other(B))
    vmm.read()
    return vmm, 0


def a_device_tlb_is_flushed_late() -> tuple[SmmuVmm, int]:
    vmm = SmmuVmm(ats=True)
    vmm.map(A)
    vmm.read()
    vmm.map(B)
    vmm.read()
    vmm.send(Cmd.tlbi_nh_va(5, IOVA))
    vmm.read()
    vmm.send(Cmd.atc_inv(VSID, IOVA, 0))
    vmm.read()
    return vmm, 1


def another_ste_and_its_asid() -> tuple[SmmuVmm, int]:
    vmm = SmmuVmm(ats=True)
    vmm.map(A)
    vmm.read()
    vmm.ram.write(OTHER_POOL - 4096, vmm.other(B).pack())
    vmm.guest.ste.s1contextptr = OTHER_POOL - 4096
    vmm.lab.replace(vmm.idev, vmm.guest.hwpt())
    vmm.send(Cmd.tlbi_nh_asid(5), Cmd.atc_inv(VSID))
    vmm.read()
    return vmm, 0


def memory_is_unmapped_under_the_parent() -> tuple[SmmuVmm, int]:
    """The kernel flushes both stages, and the device TLBs."""
    vmm = SmmuVmm(ats=True)
    c = vmm.lab.c
    spare = c.map(vmm.guest.ioas, c.process.map(c.world.memfd(1)), 4096)
    vmm.map(spare)
    vmm.write()
    c.unmap(vmm.guest.ioas, spare, 4096)
    vmm.fault()
    c.map(vmm.guest.ioas, c.process.map(c.world.memfd(1)), 4096, spare)
    assert vmm.read() == bytes(8)
    return vmm, 0


def a_domain_of_the_kernel_is_replaced() -> tuple[SmmuVmm, int]:
    """Store by store: a DMA in between uses the old domain, which is no user's fault."""
    vmm = SmmuVmm(ats=True)
    lab, idev = vmm.lab, vmm.lab.device(ats=True)
    lab.attach(idev, vmm.guest.ioas)
    lab.read(idev, A)
    other, _ = lab.ram()
    lab.iommu.vendor_replace = True
    lab.iommu.stored = lambda dev, pasid: lab.dma(idev, Op.READ, A).run() and None
    lab.replace(idev, other)
    lab.iommu.stored = None
    lab.read(idev, A)
    lab.detach(idev)
    vmm.map(A)
    vmm.read()
    return vmm, 1


def hardware_sets_flags() -> tuple[SmmuVmm, int]:
    vmm = SmmuVmm(start=False, httu="dirty")
    vmm.guest.cd.ha = vmm.guest.cd.hd = 1
    vmm.guest.store_cd(vmm.guest.cd)
    vmm.guest.start()
    entry = vmm.map(A, attributes=PAGE & ~AF | DBM | AP2)
    vmm.read()
    vmm.write()
    vmm.read()
    assert vmm.table.get(entry) == A | PAGE | DBM
    return vmm, 0


def nothing_is_cached() -> tuple[SmmuVmm, int]:
    vmm = SmmuVmm(mode="off", ats=True)
    for page in (A, B):
        vmm.map(page)
        vmm.read()
    vmm.guest.store_cd(vmm.other(A))
    vmm.read()
    return vmm, 0


RIGHT = (
    nothing_changes, a_page_becomes_valid, everything_is_flushed, an_address_is_flushed_for_all_asids,
    a_range_is_flushed_late, a_table_is_replaced_and_flushed, a_cd_changes_and_all_is_sent,
    a_cd_changes_and_all_is_sent_one_by_one, a_cd_gets_another_asid, a_cd_becomes_valid, a_device_tlb_is_flushed_late,
    another_ste_and_its_asid, memory_is_unmapped_under_the_parent, a_domain_of_the_kernel_is_replaced,
    hardware_sets_flags, nothing_is_cached,
)  # fmt: skip


def must_be_left_alone(vmm: SmmuVmm, raced: int) -> None:
    """Nothing is reported, and the races are known as such."""
    findings = vmm.end()
    assert findings == [], [line for finding in findings for line in finding.lines()]
    counts = vmm.sanitizer.counts
    assert (counts.never, counts.raced) == (0, raced)
    assert counts.checked > 0
