"""Guests of an SMMUv3 that forget or botch one command, each with what its report must say."""

from __future__ import annotations

from typing import NamedTuple

from iommufd_uapi.smmuv3 import Cmd, L1Cd, S1Fmt

from .smmu_lab import CDS, PAGE
from .smmu_vmm import IOVA, M2, OTHER_POOL, VSID, A, B, C, SmmuVmm, fresh_table


class Said(NamedTuple):
    """What the report must say."""

    changed: str  # how the line on the change begins
    right: str  # the commands to send, with {viommu}
    cache: str = "IOTLB"
    iova: int = IOVA
    came: str = ""  # of the wrong one


PAGE_OF = "stage 1 level 1, the entry at "
CD = f"CD, word 1 of the entry at {CDS:#x}: "
VA = "CMD_TLBI_NH_VA asid=0x5 leaf addr=0x7f1234567000 on viommu {viommu}"
ASID = "CMD_TLBI_NH_ASID asid=0x5 on viommu {viommu}"
TABLE_2M = "CMD_TLBI_NH_VA scale=9 asid=0x5 tg=1 addr=0x7f1234400000 on viommu {viommu} without LEAF"
CFGI_CD = "CMD_CFGI_CD sid=0x100 leaf on viommu {viommu}"


def _moved(**options: object) -> SmmuVmm:
    """A page was used, and leads elsewhere now."""
    vmm = SmmuVmm(**options)  # type: ignore[arg-type]
    vmm.map(A)
    vmm.read()
    vmm.map(B)
    return vmm


def a_page_is_moved() -> tuple[SmmuVmm, Said]:
    vmm = _moved()
    vmm.read()
    return vmm, Said(PAGE_OF, VA)


def another_asid_is_flushed() -> tuple[SmmuVmm, Said]:
    vmm = _moved()
    vmm.send(Cmd.tlbi_nh_va(6, IOVA))
    vmm.read()
    return vmm, Said(PAGE_OF, VA, came="CMD_TLBI_NH_VA asid=0x6 leaf addr=0x7f1234567000 on viommu {viommu}: "
                                       "it is tagged for another address space")  # fmt: skip


def another_address_is_flushed() -> tuple[SmmuVmm, Said]:
    vmm = _moved()
    vmm.send(Cmd.tlbi_nh_va(5, A))  # the page's own address
    vmm.read()
    return vmm, Said(PAGE_OF, VA, came="CMD_TLBI_NH_VA asid=0x5 leaf addr=0x5000 on viommu {viommu}: "
                                       "0x5000..0x5fff does not cover it")  # fmt: skip


def a_range_is_one_page_short() -> tuple[SmmuVmm, Said]:
    vmm = SmmuVmm()
    first = IOVA - 3 * 4096
    for at in range(4):
        vmm.map(A, first + at * 4096)
    vmm.read(first, 4 * 4096)
    for at in range(4):
        vmm.map(B, first + at * 4096)
    vmm.send(Cmd.tlbi_nh_va(5, first, num=2, tg=1))  # NUM is one less than the number of pages
    vmm.read(first, 4 * 4096)
    came = "num=2 asid=0x5 leaf tg=1 addr=0x7f1234564000 on viommu {viommu}: 0x7f1234564000..0x7f1234566fff does not"
    return vmm, Said(PAGE_OF, VA, came=came)


def a_table_is_replaced() -> tuple[SmmuVmm, Said]:
    vmm = SmmuVmm()
    vmm.map(A)
    vmm.read()
    fresh_table(vmm, B)
    vmm.read()
    return vmm, Said("stage 1 level 2, the entry at ", TABLE_2M)


def leaf_is_given_although_a_table_changed() -> tuple[SmmuVmm, Said]:
    """The old table's page holds something else by now."""
    vmm = SmmuVmm()
    vmm.map(A)
    vmm.map(B, IOVA + 4096)
    vmm.read()
    old = fresh_table(vmm, A, B)
    vmm.ram.write(old, (C | PAGE).to_bytes(8, "little") * 512)
    vmm.send(Cmd.tlbi_nh_va(5, IOVA & -M2, scale=9, tg=1, leaf=True))
    vmm.read(IOVA + 4096)
    return vmm, Said("stage 1 level 2, the entry at ", TABLE_2M, "paging-structure cache", IOVA + 4096,
                     "LEAF leaves the tables that are kept")  # fmt: skip


def a_block_is_moved() -> tuple[SmmuVmm, Said]:
    vmm = SmmuVmm()
    vmm.map(0, IOVA & -M2, level=2)
    vmm.read()
    vmm.map(M2, IOVA & -M2, level=2)
    vmm.read()
    return vmm, Said("stage 1 level 2, the entry at ",
                     "CMD_TLBI_NH_VA asid=0x5 leaf addr=0x7f1234400000 on viommu {viommu}")  # fmt: skip


def a_cd_leads_elsewhere() -> tuple[SmmuVmm, Said]:
    vmm = SmmuVmm()
    vmm.map(A)
    vmm.read()
    vmm.guest.store_cd(vmm.other(B))
    vmm.read()
    return vmm, Said(CD, f"{CFGI_CD}, {ASID}")


def a_cd_leads_elsewhere_and_only_its_asid_is_flushed() -> tuple[SmmuVmm, Said]:
    vmm = SmmuVmm()
    vmm.map(A)
    vmm.read()
    vmm.guest.store_cd(vmm.other(B))
    vmm.send(Cmd.tlbi_nh_asid(5))
    vmm.read()
    return vmm, Said(CD, f"{CFGI_CD}, {ASID}", "CD cache",
                     came=f"{ASID}: the CD cache had not been told, and the page was cached again")  # fmt: skip


def a_cd_leads_elsewhere_and_its_asid_is_forgotten() -> tuple[SmmuVmm, Said]:
    vmm = SmmuVmm()
    vmm.map(A)
    vmm.read()
    vmm.guest.store_cd(vmm.other(B))
    vmm.read()
    vmm.send(Cmd.cfgi_cd(VSID))
    vmm.read()
    return vmm, Said(CD, ASID)


def a_cd_gets_another_asid() -> tuple[SmmuVmm, Said]:
    """Nothing has that ASID, so CFGI_CD would have been enough."""
    vmm = SmmuVmm()
    vmm.map(A)
    vmm.read()
    vmm.guest.store_cd(vmm.other(B, asid=6))
    vmm.read()
    return vmm, Said("CD, word 0 of the entry at ", CFGI_CD, came="")


def another_ssids_cd_is_flushed() -> tuple[SmmuVmm, Said]:
    vmm = SmmuVmm(s1cdmax=2, start=False)
    vmm.guest.store_cd(vmm.guest.cd, ssid=1)
    vmm.guest.start()
    vmm.map(A)
    vmm.read(pasid=1)
    vmm.guest.store_cd(vmm.other(B, asid=6), ssid=1)
    vmm.send(Cmd.cfgi_cd(VSID, 2))
    vmm.read(pasid=1)
    return vmm, Said("CD, word 0 of the entry at ", "CMD_CFGI_CD ssid=0x1 sid=0x100 leaf on viommu {viommu}",
                     came="CMD_CFGI_CD ssid=0x2 sid=0x100 leaf on viommu {viommu}: it is tagged")  # fmt: skip


def an_l1cd_leads_elsewhere() -> tuple[SmmuVmm, Said]:
    """LEAF forgets the CD, and not the descriptor that led to it."""
    vmm = SmmuVmm(s1cdmax=7, start=False)
    old, new = 0x30_0000, 0x30_1000
    vmm.ram.write(CDS, L1Cd(v=1, l2ptr=old).pack())
    vmm.ram.write(old, vmm.guest.cd.pack())
    vmm.guest.ste.s1fmt = S1Fmt.L2_4K
    vmm.guest.start()
    vmm.map(A)
    vmm.read()
    vmm.ram.write(new, vmm.other(B, asid=6).pack())
    vmm.ram.write(CDS, L1Cd(v=1, l2ptr=new).pack())
    vmm.send(Cmd.cfgi_cd(VSID, leaf=True))
    vmm.read()
    return vmm, Said("L1CD, word 0 of the entry at ", "CMD_CFGI_CD sid=0x100 on viommu {viommu} without LEAF",
                     came="CMD_CFGI_CD sid=0x100 leaf on viommu {viommu}: LEAF leaves")  # fmt: skip


def another_vdevices_cds_are_flushed() -> tuple[SmmuVmm, Said]:
    vmm = SmmuVmm()
    second = vmm.lab.device()
    vmm.lab.c.vdevice(vmm.guest.viommu, second.id, 0x200)
    vmm.map(A)
    vmm.read()
    vmm.guest.store_cd(vmm.other(B, asid=6))
    vmm.send(Cmd.cfgi_cd_all(0x200))
    vmm.read()
    return vmm, Said("CD, word 0 of the entry at ", CFGI_CD,
                     came="CMD_CFGI_CD_ALL sid=0x200 on viommu {viommu}: it is tagged for another")  # fmt: skip


def a_device_tlb_is_forgotten() -> tuple[SmmuVmm, Said]:
    vmm = _moved(ats=True)
    vmm.send(Cmd.tlbi_nh_va(5, IOVA))
    vmm.read()
    return vmm, Said(PAGE_OF, "CMD_ATC_INV sid=0x100 addr=0x7f1234567000 on viommu {viommu}", "device TLB")


def another_device_tlb_is_flushed() -> tuple[SmmuVmm, Said]:
    """All of another device's."""
    vmm = _moved(ats=True)
    second = vmm.lab.device(ats=True)
    vmm.lab.c.vdevice(vmm.guest.viommu, second.id, 0x200)
    vmm.lab.attach(second, vmm.guest.hwpt())
    vmm.send(Cmd.tlbi_nsnh_all(), Cmd.atc_inv(0x200))
    vmm.read()
    return vmm, Said(PAGE_OF, "CMD_ATC_INV sid=0x100 addr=0x7f1234567000 on viommu {viommu}", "device TLB",
                     came="CMD_ATC_INV sid=0x200 size=52 on viommu {viommu}: it is tagged for another")  # fmt: skip


def the_iotlb_is_forgotten_behind_a_device_tlb() -> tuple[SmmuVmm, Said]:
    vmm = _moved(ats=True)
    vmm.read()
    vmm.send(Cmd.atc_inv(VSID))
    vmm.read()
    return vmm, Said(PAGE_OF, VA, "device TLB")


def all_of_it_is_forgotten() -> tuple[SmmuVmm, Said]:
    vmm = SmmuVmm(ats=True)
    vmm.map(A)
    vmm.read()
    vmm.guest.store_cd(vmm.other(B))
    vmm.read()
    return vmm, Said(CD, f"{CFGI_CD}, {ASID}, CMD_ATC_INV sid=0x100 size=52 on viommu {{viommu}}", "device TLB")


def another_ste_keeps_the_asid() -> tuple[SmmuVmm, Said]:
    """The VMM attaches the new STE, and the guest's own ASID stays cached."""
    vmm = SmmuVmm()
    vmm.map(A)
    vmm.read()
    vmm.ram.write(OTHER_POOL - 4096, vmm.other(B).pack())
    vmm.guest.ste.s1contextptr = OTHER_POOL - 4096
    vmm.lab.replace(vmm.idev, vmm.guest.hwpt())
    vmm.read()
    return vmm, Said("a table that the driver keeps", ASID)


def a_fault_that_memory_does_not_explain() -> tuple[SmmuVmm, Said]:
    """The CD that is cached leads to a table without the page."""
    vmm = SmmuVmm()
    vmm.fault()
    vmm.guest.store_cd(vmm.other(B))
    vmm.fault()
    return vmm, Said(CD, CFGI_CD, "CD cache")


WRONG = (
    a_page_is_moved, another_asid_is_flushed, another_address_is_flushed, a_range_is_one_page_short,
    a_table_is_replaced, leaf_is_given_although_a_table_changed, a_block_is_moved, a_cd_leads_elsewhere,
    a_cd_leads_elsewhere_and_only_its_asid_is_flushed, a_cd_leads_elsewhere_and_its_asid_is_forgotten,
    a_cd_gets_another_asid, another_ssids_cd_is_flushed, an_l1cd_leads_elsewhere, another_vdevices_cds_are_flushed,
    a_device_tlb_is_forgotten, another_device_tlb_is_flushed, the_iotlb_is_forgotten_behind_a_device_tlb,
    all_of_it_is_forgotten, another_ste_keeps_the_asid, a_fault_that_memory_does_not_explain,
)  # fmt: skip


def must_be_told(vmm: SmmuVmm, said: Said) -> None:
    """Nothing is reported while the command might still come; at the end one finding, which says all of it."""
    assert not vmm.sanitizer.reported
    findings = vmm.end()
    assert len(findings) == 1, [str(finding) for finding in findings]
    lines = findings[0].lines()
    text, viommu = "\n".join(lines), vmm.guest.viommu
    assert lines[2].startswith(f"  changed: {said.changed}"), text
    assert lines[3] == f"  right: {said.right.format(viommu=viommu)}", text
    assert (findings[0].cache, findings[0].use.iova) == (said.cache, said.iova), text
    if said.came:
        assert said.came.format(viommu=viommu) in "\n".join(findings[0].came), text
    else:
        assert not findings[0].came, text
