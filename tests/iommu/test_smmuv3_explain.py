"""What `walk` shows of an SMMUv3: STE, CD, both stages, and every cache, with what memory says instead."""

from __future__ import annotations

from iommufd_uapi.smmuv3 import Cmd, L1Cd, S1Fmt, Ste
from iommufdd.iommu.explain import Row, words
from iommufdd.iommu.walk import READ

from .smmu_lab import CDS
from .smmu_vmm import IOVA, M2, VSID, A, B, SmmuVmm, fresh_table


def text(rows: list[Row]) -> list[str]:
    """Without the entries' bits as numbers."""
    lines = []
    for row in rows:
        line = words(row._replace(words=()))
        if row.table is not None:
            line += f" ({row.at:#x})"
        lines.append("  " * row.depth + line + (f"  ! {row.differs}" if row.differs else ""))
    return lines


def shown(vmm: SmmuVmm, iova: int = IOVA, pasid: int | None = None) -> tuple[list[str], list[str], int]:
    """(rows, cached, the fault's number or 0)"""
    before = [event.words for event in vmm.lab.iommu.events]
    made = vmm.lab.iommu.explain(vmm.idev.dev, pasid, iova, READ)  # type: ignore[arg-type]
    assert [event.words for event in vmm.lab.iommu.events] == before
    return text(made.rows), text(made.cached), 0 if made.fault is None else made.fault.code


STE = (
    "v config=NESTED s1contextptr=0x100000 s1dss=SSID0 mev s2fwb s1stalld eats=TRANS shcfg=INCOMING s2vmid=0x1 "
    "s2t0sz=16 s2sl0=2 s2ps=BITS_48 s2aa64 s2ptw s2r s2ttb=0x{ttb:x}"
)
CD = "t0sz=16 epd1 v ips=BITS_48 aa64 r a aset asid=0x5 ttb0=0x110000"
WALKED = [
    "STE 0x100: {ste}",
    "  stage 2: (0x100000)",
    f"CD at 0x100000: {CD}",
    "  stage 2: (0x1107f0)",
    "stage 1 level 4 (Arm 0) at 0x1107f0: V T -> table at 0x111000",
    "  stage 2: (0x111240)",
    "stage 1 level 3 (Arm 1) at 0x111240: V T -> table at 0x112000",
    "  stage 2: (0x112d10)",
    "stage 1 level 2 (Arm 2) at 0x112d10: V T -> table at 0x113000",
    "  stage 2: (0x113b38)",
    "stage 1 level 1 (Arm 3) at 0x113b38: V T AP1 AF nG -> 4 KiB page at 0x5000",
    "  stage 2: (0x5000)",
]
TABLES = [
    "table of level 3 at 0x1107f0: V T -> table at 0x111000",
    "table of level 2 at 0x111240: V T -> table at 0x112000",
    "table of level 1 at 0x112d10: V T -> table at 0x113000",
]
ELSEWHERE = "  ! memory: a walk does not come by here"
SPAN = "0x7f1234567000..0x7f1234567fff rw -> memory + 0x5000"


def vmm_and_ste() -> tuple[SmmuVmm, str]:
    vmm = SmmuVmm(ats=True)
    vmm.map(A)
    return vmm, STE.format(ttb=Ste.of(vmm.lab.iommu.stream_table.read(VSID)).s2ttb)


def test_a_nested_walk() -> None:
    vmm, ste = vmm_and_ste()
    walked = [line.format(ste=ste) for line in WALKED]
    assert shown(vmm) == (walked, [], 0), "nothing is cached yet"
    vmm.read()
    cached = [f"STE cache: {ste}", f"CD cache, CD 0: {CD}", *TABLES, f"IOTLB, VMID 1 ASID 5: {SPAN}",
              f"device TLB: {SPAN}"]  # fmt: skip
    assert shown(vmm) == (walked, cached, 0)


def test_a_cd_that_leads_elsewhere() -> None:
    vmm, ste = vmm_and_ste()
    vmm.read()
    vmm.guest.store_cd(vmm.other(B))
    rows, cached, _ = shown(vmm)
    assert rows[2] == "CD at 0x100000: " + CD.replace("0x110000", "0x200000")
    assert rows[-2:] == ["stage 1 level 1 (Arm 3) at 0x203b38: V T AP1 AF nG -> 4 KiB page at 0x6000",
                         "  stage 2: (0x6000)"]  # fmt: skip
    assert cached == [
        f"STE cache: {ste}",
        f"CD cache, CD 0: {CD}  ! memory: {CD.replace('0x110000', '0x200000')}",
        *(table + ELSEWHERE for table in TABLES),
        f"IOTLB, VMID 1 ASID 5: {SPAN}  ! memory: memory + 0x6000",
        f"device TLB: {SPAN}  ! memory: memory + 0x6000",
    ]
    vmm.guest.store_cd(vmm.other(B, v=0))
    rows, cached, code = shown(vmm)
    assert (rows[1:], code) == (["  stage 2: (0x100000)", "CD at 0x100000: not valid"], 0xA)
    assert cached[1] == f"CD cache, CD 0: {CD}  ! memory: not valid"
    assert cached[-1] == f"device TLB: {SPAN}  ! memory: fault 0xa, the CD is invalid"
    vmm.ram.write(CDS, bytes(64))
    vmm.lab.iommu.contexts.entries.clear()
    assert shown(vmm)[1][1:] == [f"device TLB: {SPAN}  ! memory: fault 0xa, the CD is invalid"]


def test_a_table_that_was_replaced_and_a_hole() -> None:
    vmm, _ = vmm_and_ste()
    vmm.read()
    fresh_table(vmm)
    rows, cached, code = shown(vmm, IOVA + 4096)
    assert rows[-3:] == ["stage 1 level 2 (Arm 2) at 0x112d10: V T -> table at 0x114000", "  stage 2: (0x114b40)",
                         "stage 1 level 1 (Arm 3) at 0x114b40: not valid"]  # fmt: skip
    assert cached[2:] == [*TABLES[:2], TABLES[2] + "  ! memory: 0x0000000000114003"]
    assert code == 0x10


def test_where_stage_2_stops() -> None:
    hole = 0x4000_0000
    vmm = SmmuVmm(s1cdmax=2, start=False)
    vmm.map(hole)
    vmm.guest.start()
    rows, _, code = shown(vmm)
    assert (rows[-1], code) == ("  stage 2: nothing is mapped (0x40000000)", 0x10)
    vmm.guest.ste.s1contextptr = hole
    vmm.lab.replace(vmm.idev, vmm.guest.hwpt())
    rows, _, code = shown(vmm, pasid=3)
    assert (rows[1:], code) == (["  stage 2: nothing is mapped (0x400000c0)"], 0x10)


def test_an_l1cd_and_a_block() -> None:
    vmm = SmmuVmm(s1cdmax=7, start=False)
    vmm.ram.write(CDS + 8, L1Cd(v=1, l2ptr=0x30_0000).pack())
    vmm.ram.write(0x30_0000 + 64 * 6, vmm.guest.cd.pack())
    vmm.guest.ste.s1fmt = S1Fmt.L2_4K
    vmm.guest.start()
    vmm.map(0, IOVA & -M2, level=2)
    rows, _, code = shown(vmm, pasid=70)
    assert rows[1:5] == ["  stage 2: (0x100008)", "L1CD at 0x100008: V -> CDs at 0x300000", "  stage 2: (0x300180)",
                         f"CD at 0x300180: {CD}"]  # fmt: skip
    assert (rows[-2].partition(": ")[2], code) == ("V AP1 AF nG -> 2 MiB block at 0x0", 0)
    rows, _, code = shown(vmm, pasid=1)
    assert (rows[1:], code) == (["  stage 2: (0x100000)", "L1CD at 0x100000: not valid"], 8)


def test_the_kernels_own_tables() -> None:
    vmm = SmmuVmm()
    vmm.lab.replace(vmm.idev, vmm.guest.ioas)
    vmm.lab.read(vmm.idev, A)
    rows, cached, _ = shown(vmm, A)
    assert rows[1].startswith("CD 0: t0sz=16 epd1 v ")
    assert rows[2:] == ["stage 1: (0x5000)"]
    assert cached[2] == "IOTLB, VMID 0 ASID 1: 0x0..0x3fffff rw -> memory + 0x5000"
    vmm.lab.replace(vmm.idev, vmm.guest.parent)
    vmm.lab.read(vmm.idev, A)
    rows, cached, _ = shown(vmm, A)
    assert rows[0].startswith("STE 0x100: v config=S2_TRANS ")
    assert rows[1:] == ["stage 2: (0x5000)"]
    assert cached[1:] == ["IOTLB, VMID 1: 0x0..0x3fffff rw -> memory + 0x5000"]
    vmm.lab.detach(vmm.idev)
    assert shown(vmm) == (["STE 0x100: v config=ABORT"], [], 0)
    made = vmm.lab.iommu.explain(vmm.idev.dev, None, A, READ)  # type: ignore[arg-type]
    assert made.fault is not None
    assert made.fault.name == "the stream is set to abort"


def test_a_tagged_address() -> None:
    vmm = SmmuVmm(start=False)
    vmm.guest.cd.tbi0 = 1
    vmm.guest.store_cd(vmm.guest.cd)
    vmm.guest.start()
    vmm.map(A)
    vmm.read(0xAB << 56 | IOVA)
    _, cached, _ = shown(vmm, 0xCD << 56 | IOVA)
    assert cached[-1] == f"IOTLB, VMID 1 ASID 5: {SPAN}"
    vmm.map(B)
    assert shown(vmm, 0xCD << 56 | IOVA)[1][-1] == f"IOTLB, VMID 1 ASID 5: {SPAN}  ! memory: memory + 0x6000"
    vmm.send(Cmd.tlbi_nh_va(5, IOVA, leaf=False))
    assert shown(vmm, 0xCD << 56 | IOVA)[1][2:] == []
