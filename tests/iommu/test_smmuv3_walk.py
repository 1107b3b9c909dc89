"""SMMUv3's translations in their corners: both halves and their tags, rights and ends of stage 2, what caches keep."""

from __future__ import annotations

import pytest

import iommufd_uapi.iommufd as uapi
from iommufd_uapi.smmuv3 import Cmd
from iommufdd.device import IommufdDevice
from iommufdd.iommu.walk import EXEC, PRIV, READ, WRITE, TranslationFault

from . import smmu_tables as arm
from .lpae_tables import ArmTable
from .smmu_lab import CDS, POOL, Guest, SmmuLab, master
from .smmu_vmm import IOVA, M2, A, B, SmmuVmm, fresh_table

VA = 0x7F12_3456_7000
HIGH = 0xFFFF_8000_0000_0000 | VA
L2 = 0x30_0000
SID = 0x100


def ipa(lab: SmmuLab, idev: IommufdDevice, va: int = VA, access: int = READ, pasid: int | None = None) -> int:
    """Where a translation leads, by the hardware."""
    entry = master(idev).translate(pasid, va, access)
    assert entry.first <= va <= entry.last
    return entry.ipa + va - entry.first


def fresh(lab: SmmuLab, idev: IommufdDevice, va: int = VA, access: int = READ) -> int:
    """Where it would lead without caches."""
    entry = lab.iommu.walk_fresh(master(idev), None, va, access)
    return entry.ipa + va - entry.first


def refused(idev: IommufdDevice, va: int = VA, access: int = READ, pasid: int | None = None) -> tuple[int, int]:
    """(number, stage) of a translation that must fail."""
    with pytest.raises(TranslationFault) as caught:
        master(idev).translate(pasid, va, access)
    return caught.value.code, caught.value.stage


def guest(**options: int) -> tuple[SmmuLab, IommufdDevice, Guest]:
    lab = SmmuLab()
    idev = lab.device(pasids=20)
    made = Guest(lab, idev, **options)
    made.table.map(VA, A)
    return lab, idev, made


# ---- SubstreamIDs ----


@pytest.mark.parametrize("s1dss", [0, 1])
def test_substream_0_is_one_of_many_unless_it_stands_for_none(s1dss: int) -> None:
    lab, idev, made = guest(s1cdmax=2, s1dss=s1dss)
    made.start()
    assert ipa(lab, idev, pasid=0) == A


def test_a_format_counts_only_where_there_are_several_cds() -> None:
    lab, idev, made = guest()
    made.ste.s1fmt = 1
    made.start()
    assert ipa(lab, idev) == A


def test_a_pasid_whose_cd_the_kernel_never_made() -> None:
    lab = SmmuLab()
    idev = lab.device(pasids=20)
    ioas, _ = lab.ram()
    lab.attach(idev, ioas)
    assert refused(idev, A, pasid=5000)[0] == arm.C_BAD_SUBSTREAMID
    assert lab.iommu.events[-1].words == arm.event(arm.C_BAD_SUBSTREAMID, SID, ssid=5000)


# ---- halves and tags ----


def both_halves(**cd: int) -> tuple[SmmuLab, IommufdDevice, Guest, ArmTable]:
    lab, idev, made = guest()
    upper = ArmTable(made.ram, POOL + (1 << 20))
    upper.map(HIGH, B)
    made.ram.write(CDS, arm.cd(made.table.root, upper.root, EPD1=0, T1SZ=16, TG1=2, **cd))
    made.start()
    return lab, idev, made, upper


def test_bit_55_chooses_the_half() -> None:
    lab, idev, _, _ = both_halves(TBI0=1, TBI1=1)
    low = 2**56 - 1
    for tag in (0x00, 0x7F, 0x80, 0xFF):
        assert ipa(lab, idev, tag << 56 | VA) == A
        assert ipa(lab, idev, tag << 56 | HIGH & low) == B


def test_tags_are_ignored_in_one_half_alone() -> None:
    lab, idev, _, _ = both_halves(TBI0=1)
    tagged = 0xAB << 56
    assert ipa(lab, idev, tagged | VA) == A
    assert refused(idev, tagged | HIGH & 2**56 - 1) == (arm.F_TRANSLATION, 1)
    lab, idev, _, _ = both_halves(TBI1=1)
    assert refused(idev, tagged | VA) == (arm.F_TRANSLATION, 1)
    assert ipa(lab, idev, tagged | HIGH & 2**56 - 1) == B


def test_what_is_cached_under_a_tag_is_flushed_without() -> None:
    lab, idev, made, upper = both_halves(TBI0=1, TBI1=1)
    low = 2**56 - 1
    for va, table in ((VA, made.table), (HIGH, upper)):
        tagged = 0x12 << 56 | va & low
        before = ipa(lab, idev, tagged)
        table.map(va, 0x9000)
        assert ipa(lab, idev, tagged) == before
        assert lab.invalidate(made.viommu, Cmd.tlbi_nh_va(5, va)) == 1
        assert ipa(lab, idev, tagged) == 0x9000


# ---- stage 2 ----


def two_areas(first: int, second: int) -> tuple[SmmuLab, IommufdDevice, Guest]:
    """A page at A with these rights, and one behind it."""
    lab, idev, made = guest()
    lab.c.unmap(made.ioas, 0, 1024 * 4096)
    file = made.ram.file
    for page, last, rights in ((0, 5, 6), (5, 6, first), (6, 7, second), (7, 1024, 6)):
        if rights:
            addr = lab.c.process.map(file, page=page)
            lab.c.map(made.ioas, addr, (last - page) * 4096, page * 4096, rights)
    made.start()
    return lab, idev, made


def test_memory_that_may_only_be_written() -> None:
    lab, idev, _ = two_areas(uapi.IOMMU_IOAS_MAP_WRITEABLE, 6)
    assert refused(idev) == (arm.F_PERMISSION, 2)
    assert ipa(lab, idev, access=WRITE) == A
    assert refused(idev) == (arm.F_PERMISSION, 2), "what is cached by now lets only writes pass"
    assert refused(idev, access=EXEC) == (arm.F_PERMISSION, 2)


def test_memory_that_may_only_be_read() -> None:
    lab, idev, _ = two_areas(uapi.IOMMU_IOAS_MAP_READABLE, 6)
    assert refused(idev, access=WRITE) == (arm.F_PERMISSION, 2)
    assert ipa(lab, idev) == A
    assert refused(idev, access=WRITE) == (arm.F_PERMISSION, 2)
    assert refused(idev, access=READ | WRITE | PRIV) == (arm.F_PERMISSION, 2)


def test_stage_1s_rights_count_beside_stage_2s() -> None:
    lab, idev, made = two_areas(6, 6)
    made.table.map(VA, A, 0b11 | 1 << 6 | 1 << 7 | 1 << 10)
    assert ipa(lab, idev) == A
    assert refused(idev, access=WRITE) == (arm.F_PERMISSION, 1)


def test_a_block_ends_where_stage_2_does() -> None:
    _, idev, made = two_areas(6, 0)
    base = VA & -M2
    made.table.map(base, 0, level=2)
    made.table.set(made.table.slot(VA, 2), 1 | 1 << 6 | 1 << 10)
    entry = master(idev).translate(None, base + A + 8, READ)
    assert (entry.first, entry.last, entry.ipa) == (base + A, base + A + 4095, A)
    assert refused(idev, base + B) == (arm.F_TRANSLATION, 2)
    entry = master(idev).translate(None, base + B + 4096, READ)
    assert (entry.first, entry.last, entry.ipa) == (base + B + 4096, base + M2 - 1, B + 4096)


def test_a_bypassed_stage_1_reaches_all_of_stage_2() -> None:
    lab, idev, made = guest(s1cdmax=2, s1dss=1)
    made.start()
    assert ipa(lab, idev, A) == A
    assert refused(idev, (1 << 48) - 1) == (arm.F_TRANSLATION, 2)
    assert refused(idev, 1 << 48) == (arm.F_ADDR_SIZE, 1)


# ---- the kernel's own tables ----


def test_privileged_code_does_not_run_from_writable_memory() -> None:
    lab = SmmuLab()
    idev = lab.device()
    ioas, _ = lab.ram()
    lab.attach(idev, ioas)
    assert ipa(lab, idev, A, EXEC) == A
    assert refused(idev, A, EXEC | PRIV) == (arm.F_PERMISSION, 1)


def test_a_fresh_walk_marks_nothing_dirty() -> None:
    lab = SmmuLab(httu="dirty")
    idev = lab.device()
    ioas, _ = lab.ram()
    hwpt = lab.c.hwpt(idev.id, ioas, uapi.IOMMU_HWPT_ALLOC_DIRTY_TRACKING)
    lab.attach(idev, hwpt)
    dirty = master(idev).group.domain.dirty_ops
    assert dirty is not None
    assert list(dirty.read_and_clear_dirty(0, 1 << 22, clear=True)) == [(0, 1 << 22)], "all begins dirty"
    fresh(lab, idev, A, WRITE)
    assert list(dirty.read_and_clear_dirty(0, 1 << 22, clear=False)) == []
    assert ipa(lab, idev, A, READ) == A
    assert list(dirty.read_and_clear_dirty(0, 1 << 22, clear=False)) == []
    assert ipa(lab, idev, A, WRITE) == A
    assert list(dirty.read_and_clear_dirty(0, 1 << 22, clear=False)) != []


def test_a_table_that_is_gone_translates_nothing() -> None:
    lab = SmmuLab()
    idev = lab.device()
    ioas, _ = lab.ram()
    hwpt = lab.c.hwpt(idev.id, ioas)
    lab.attach(idev, hwpt)
    dev = master(idev)
    assert ipa(lab, idev, A) == A
    assert dev.cd_table is not None
    ste, cd = lab.iommu.stream_table.read(SID), dev.cd_table.read(0)
    lab.detach(idev)
    lab.c.destroy(hwpt)
    lab.iommu.stream_table.publish(SID, ste)
    dev.cd_table.publish(0, cd)
    assert refused(idev, A) == (0, 0)


# ---- what caches keep, and fresh walks do not look at ----


def test_a_fresh_walk_reads_ste_l1cd_and_tables_again() -> None:
    vmm = SmmuVmm(s1cdmax=7, start=False)
    lab, idev = vmm.lab, vmm.idev
    vmm.ram.write(CDS, arm.l1cd(L2))
    vmm.ram.write(L2, arm.cd(vmm.table.root))
    vmm.guest.ste.s1fmt = 1
    vmm.guest.start()
    vmm.map(A)
    vmm.map(A, IOVA + 4096)
    assert ipa(lab, idev, IOVA) == A
    tables = lab.iommu.contexts.entries[idev.dev, None].space.tables
    assert len(tables) == 3, "the tables of levels 1 to 3 are kept, and no page"

    fresh_table(vmm, B, B)
    assert fresh(lab, idev, IOVA + 4096) == B
    assert ipa(lab, idev, IOVA + 4096) == A, "through the table that is kept"

    vmm.ram.write(L2 + 4096, arm.cd(ArmTable(vmm.ram, L2 + 8192).root, ASID=6))
    vmm.ram.write(CDS, arm.l1cd(L2 + 4096))
    lab.invalidate(vmm.guest.viommu, Cmd.cfgi_cd(0x100, leaf=True))
    assert ipa(lab, idev, IOVA) == A, "through the L1CD that is kept"
    with pytest.raises(TranslationFault):
        fresh(lab, idev, IOVA)
    lab.invalidate(vmm.guest.viommu, Cmd.cfgi_cd(0x100, leaf=False))
    assert refused(idev, IOVA) == (arm.F_TRANSLATION, 1)

    lab.iommu.stream_table.publish(SID, (1, *(0,) * 7))
    assert refused(idev, IOVA) == (arm.F_TRANSLATION, 1), "the STE that is kept"
    with pytest.raises(TranslationFault) as caught:
        fresh(lab, idev, IOVA)
    assert caught.value.code == 0


def test_hardware_that_caches_nothing() -> None:
    vmm = SmmuVmm(mode="off")
    vmm.map(A)
    assert ipa(vmm.lab, vmm.idev, IOVA) == A
    vmm.map(B)
    assert ipa(vmm.lab, vmm.idev, IOVA) == B
    vmm.guest.store_cd(vmm.other(A))
    assert ipa(vmm.lab, vmm.idev, IOVA) == A
