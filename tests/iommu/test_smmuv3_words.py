"""Every class of fault of STE, CD and descriptor, and the four words of its event, by tables of an independent writer.

What is written and expected comes from smmu_tables.py and lpae_tables.py, which know no constant of the product.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import pytest

from iommufdd.device import IommufdDevice
from iommufdd.ioas import Ioas
from iommufdd.iommu.dma import Op, State
from iommufdd.iommu.walk import TranslationFault

from . import smmu_tables as arm
from .lab import GuestRam
from .lpae_tables import ArmTable
from .smmu_lab import SmmuLab, master
from .tables import Ram

SID = 0x100  # the device's BDF, and with it the host's StreamID
VSID = 0x77  # the guest's
CDS, L2, POOL, UPPER = 0x10_0000, 0x18_0000, 0x20_0000, 0x30_0000
HOLE = 0x4000_0000  # guest physical, not mapped
VA, PAGE = 0x7F12_3456_7000, 0x5000
HIGH = 0xFFFF_8000_0000_0000 | VA
READ, WRITE, EXEC, PRIV = 1, 2, 4, 8
NONE: Mapping[str, int] = MappingProxyType({})
SILENT = 0, (0, 0, 0, 0), False


class Case(NamedTuple):
    """A guest, a request, and what must come of it."""

    ste: Mapping[str, int] = NONE
    cd: Mapping[str, int] = NONE
    page: tuple[int, str] | None = (PAGE, "u")  # what VA leads to, and the letters of its rights
    tables: str = ""  # rights of the tables above
    pasid: int | None = None
    access: int = READ
    va: int = VA
    hardware: Mapping[str, object] = MappingProxyType({})
    cds: int = CDS  # where the STE finds the CD table
    l1cd: tuple[int, int] | None = None  # (pointer, valid) of all L1CDs
    level: int = 3  # Arm's, of the mapping
    host: Mapping[str, int] = NONE  # fields of the STE that the host's driver would not write


def at(number: int, va: int = VA, **fields: int) -> tuple[int, tuple[int, ...], bool]:
    """(number, words, relayed) of a fault in translation tables, by default of a read of stage 1."""
    words = {"rnw": 1, "cls": arm.CLASS_IN, **fields}
    return number, arm.event(number, SID, addr=va, **words), not words.get("s2", 0)


def of(number: int, **fields: int) -> tuple[int, tuple[int, ...], bool]:
    """(number, words, relayed) of a fault in configuration."""
    relayed = number in (arm.C_BAD_STE, arm.F_STREAM_DISABLED, arm.C_BAD_SUBSTREAMID, arm.C_BAD_CD)
    return number, arm.event(number, SID, **fields), relayed


BAD_CD = of(arm.C_BAD_CD)
TWO = {"S1CDMax": 7, "S1Fmt": 1, "S1DSS": 0}  # leaves of 64 CDs
CASES: dict[str, tuple[Case, tuple[int, tuple[int, ...], bool]]] = {
    # STE (5.2)
    "STE invalid": (Case(host={"V": 0}), of(arm.C_BAD_STE)),
    "STE aborts": (Case(ste={"Config": 0}), SILENT),
    "STE Config 1": (Case(host={"Config": 1}), SILENT),
    "STE Config 3": (Case(host={"Config": 3}), SILENT),
    "S1CDMax too large": (Case(ste={"S1CDMax": 21}), of(arm.C_BAD_STE)),
    "S1CDMax of 20 is not": (Case(ste={"S1CDMax": 20}, page=None), at(arm.F_TRANSLATION)),
    "S1CDMax above SSIDSIZE": (Case(ste={"S1CDMax": 5}, hardware={"ssid_bits": 4}), of(arm.C_BAD_STE)),
    "two levels without CD2L": (Case(ste=TWO, hardware={"two_level_cd": False}), of(arm.C_BAD_STE)),
    "one level without CD2L": (Case(ste={"S1CDMax": 7}, hardware={"two_level_cd": False}, page=None),
                               at(arm.F_TRANSLATION)),
    "EATS with S2S": (Case(host={"EATS": 1, "S2S": 1}), of(arm.C_BAD_STE)),
    "S1STALLD without stalls": (Case(host={"S1STALLD": 1}, hardware={"stall": "none"}), of(arm.C_BAD_STE)),
    # SubstreamIDs (3.9.2.1)
    "SSID without S1CDMax": (Case(pasid=3), of(arm.C_BAD_SUBSTREAMID, ssid=3)),
    "SSID with bypass": (Case(ste={"Config": 4, "S1DSS": 0, "S1STALLD": 0}, pasid=3),
                         of(arm.C_BAD_SUBSTREAMID, ssid=3)),
    "SSID too large": (Case(ste={"S1CDMax": 2}, pasid=4), of(arm.C_BAD_SUBSTREAMID, ssid=4)),
    "SSID just not too large": (Case(ste={"S1CDMax": 2}, pasid=3), of(arm.C_BAD_CD, ssv=1, ssid=3)),
    "SSID 0 with S1DSS 2": (Case(ste={"S1CDMax": 2}, pasid=0), of(arm.F_STREAM_DISABLED)),
    "no SSID with S1DSS 0": (Case(ste={"S1CDMax": 2, "S1DSS": 0}), of(arm.F_STREAM_DISABLED)),
    "no SSID with S1DSS 1": (Case(ste={"S1CDMax": 2, "S1DSS": 1}, va=HOLE),
                             at(arm.F_TRANSLATION, HOLE, s2=1, w3=HOLE)),
    "no SSID with S1DSS 1, large": (Case(ste={"S1CDMax": 2, "S1DSS": 1}, va=1 << 48),
                                    at(arm.F_ADDR_SIZE, 1 << 48)),
    "no SSID with S1DSS 3": (Case(ste={"S1CDMax": 2, "S1DSS": 3}), of(arm.F_STREAM_DISABLED)),
    # L1CD (5.3)
    "L1CD invalid": (Case(ste=TWO, l1cd=(L2, 0), pasid=70), of(arm.C_BAD_SUBSTREAMID, ssid=70)),
    "L1CD out of range": (Case(ste=TWO, l1cd=(1 << 48, 1), pasid=70), of(arm.C_BAD_SUBSTREAMID, ssid=70)),
    "L1CD leads into a hole": (Case(ste=TWO, l1cd=(HOLE, 1), pasid=70),
                               at(arm.F_TRANSLATION, ssv=1, ssid=70, s2=1, cls=arm.CLASS_CD, w3=HOLE)),
    "L1CD in a hole": (Case(ste=TWO, cds=HOLE, pasid=70),
                       at(arm.F_TRANSLATION, ssv=1, ssid=70, s2=1, cls=arm.CLASS_CD, w3=HOLE)),
    "CD in a hole": (Case(cds=HOLE), at(arm.F_TRANSLATION, s2=1, cls=arm.CLASS_CD, w3=HOLE)),
    "CD in a hole, write": (Case(cds=HOLE, access=WRITE),
                            at(arm.F_TRANSLATION, rnw=0, s2=1, cls=arm.CLASS_CD, w3=HOLE)),
    "the second page of CDs in a hole": (Case(ste={"S1CDMax": 8}, cds=0x3F_F000, pasid=64),
                                         at(arm.F_TRANSLATION, ssv=1, ssid=64, s2=1, cls=arm.CLASS_CD, w3=0x40_0000)),
    # CD (5.4)
    "CD invalid": (Case(cd={"V": 0}), BAD_CD),
    "CD with AA64 0": (Case(cd={"AA64": 0}), BAD_CD),
    "CD with A 0": (Case(cd={"A": 0}), BAD_CD),
    "CD with ENDI": (Case(cd={"ENDI": 1}), BAD_CD),
    "CD with ENDI, no walks": (Case(cd={"ENDI": 1, "EPD0": 1}), at(arm.F_TRANSLATION)),
    "CD with S and S1STALLD": (Case(cd={"S": 1}), BAD_CD),
    "CD without S, stalls forced": (Case(ste={"S1STALLD": 0}, hardware={"stall": "forced"}), BAD_CD),
    "CD with HA, no HTTU": (Case(cd={"HA": 1}, hardware={"httu": "none"}), BAD_CD),
    "CD with HD, HTTU of AF": (Case(cd={"HA": 1, "HD": 1}, hardware={"httu": "access"}), BAD_CD),
    "ASID too large": (Case(cd={"ASID": 256}, hardware={"asid_bits": 8}), BAD_CD),
    "T0SZ 15": (Case(cd={"T0SZ": 15}), BAD_CD),
    "T0SZ 39": (Case(cd={"T0SZ": 39}), at(arm.F_TRANSLATION)),
    "T0SZ 40": (Case(cd={"T0SZ": 40}), BAD_CD),
    "TG0 3": (Case(cd={"TG0": 3}), BAD_CD),
    "TG0 of 16 KiB that is not there": (Case(cd={"TG0": 2}, hardware={"granules": (4, 64)}), BAD_CD),
    "TG0 3, no walks": (Case(cd={"TG0": 3, "EPD0": 1}), at(arm.F_TRANSLATION)),
    "TG1 0": (Case(cd={"EPD1": 0, "T1SZ": 16, "TG1": 0}), BAD_CD),
    "T1SZ 15": (Case(cd={"EPD1": 0, "T1SZ": 15, "TG1": 2}), BAD_CD),
    "TTB0 beyond IPS": (Case(cd={"IPS": 0}, page=None, cds=CDS, tables="far"), BAD_CD),
    "bad CD of a PASID": (Case(ste={"S1CDMax": 2}, cd={"V": 0}, pasid=1), of(arm.C_BAD_CD, ssv=1, ssid=1)),
    "bad CD, large PASID": (Case(ste=TWO, l1cd=(L2, 1), pasid=127), of(arm.C_BAD_CD, ssv=1, ssid=127)),
    # descriptors, stage 1 (7.3.13 to 7.3.16; DDI0487 D8)
    "nothing mapped": (Case(page=None), at(arm.F_TRANSLATION)),
    "nothing mapped, write": (Case(page=None, access=WRITE), at(arm.F_TRANSLATION, rnw=0)),
    "nothing mapped, read and write": (Case(page=None, access=READ | WRITE), at(arm.F_TRANSLATION, rnw=0)),
    "nothing mapped, fetch": (Case(page=None, access=EXEC), at(arm.F_TRANSLATION, ind=1)),
    "nothing mapped, privileged": (Case(page=None, access=READ | PRIV), at(arm.F_TRANSLATION, pnu=1)),
    "nothing mapped, privileged fetch": (Case(page=None, access=EXEC | PRIV), at(arm.F_TRANSLATION, pnu=1, ind=1)),
    "nothing mapped, PASID": (Case(ste={"S1CDMax": 2}, page=None, pasid=1), at(arm.F_TRANSLATION, ssv=1, ssid=1)),
    "no walks through TTB0": (Case(cd={"EPD0": 1}), at(arm.F_TRANSLATION)),
    "no walks through TTB1": (Case(va=HIGH), at(arm.F_TRANSLATION, HIGH)),
    "address too large": (Case(va=1 << 48 | VA), at(arm.F_TRANSLATION, 1 << 48 | VA)),
    "address with a tag": (Case(va=0xAB << 56 | VA), at(arm.F_TRANSLATION, 0xAB << 56 | VA)),
    "address too large for T0SZ": (Case(cd={"T0SZ": 18}, page=None), at(arm.F_TRANSLATION)),
    "a block where none may be": (Case(level=0), at(arm.F_TRANSLATION)),
    "output beyond IPS": (Case(cd={"IPS": 1}, page=(1 << 36, "u")), at(arm.F_ADDR_SIZE)),
    "output within IPS, no stage 2": (Case(cd={"IPS": 1}, page=((1 << 36) - 4096, "u")),
                                      at(arm.F_TRANSLATION, s2=1, w3=(1 << 36) - 4096)),
    "not accessed": (Case(page=(PAGE, "uo")), at(arm.F_ACCESS)),
    "not accessed, write": (Case(page=(PAGE, "uo"), access=WRITE), at(arm.F_ACCESS, rnw=0)),
    "not accessed, block": (Case(page=(0, "uo"), level=2), at(arm.F_ACCESS)),
    "read-only": (Case(page=(PAGE, "ur"), access=WRITE), at(arm.F_PERMISSION, rnw=0)),
    "read-only with DBM, no HD": (Case(page=(PAGE, "urd"), access=WRITE), at(arm.F_PERMISSION, rnw=0)),
    "privileged page": (Case(page=(PAGE, "")), at(arm.F_PERMISSION)),
    "privileged page, write": (Case(page=(PAGE, ""), access=WRITE), at(arm.F_PERMISSION, rnw=0)),
    "PAN": (Case(cd={"PAN": 1}, access=READ | PRIV), at(arm.F_PERMISSION, pnu=1)),
    "never executed": (Case(page=(PAGE, "ux"), access=EXEC), at(arm.F_PERMISSION, ind=1)),
    "never executed privileged": (Case(page=(PAGE, "urp"), access=EXEC | PRIV), at(arm.F_PERMISSION, pnu=1, ind=1)),
    "WXN": (Case(cd={"WXN": 1}, access=EXEC), at(arm.F_PERMISSION, ind=1)),
    "a table of the kernel's": (Case(tables="k"), at(arm.F_PERMISSION)),
    "a read-only table": (Case(tables="r", access=WRITE), at(arm.F_PERMISSION, rnw=0)),
    "a table that is not executed": (Case(tables="x", access=EXEC), at(arm.F_PERMISSION, ind=1)),
    # stage 2 under stage 1
    "page in a hole": (Case(page=(HOLE, "u")), at(arm.F_TRANSLATION, s2=1, w3=HOLE)),
    "page in a hole, write": (Case(page=(HOLE, "u"), access=WRITE), at(arm.F_TRANSLATION, rnw=0, s2=1, w3=HOLE)),
    "page in a hole, in the middle": (Case(page=(HOLE, "u"), va=VA + 0x123),
                                      at(arm.F_TRANSLATION, VA + 0x123, s2=1, w3=HOLE)),
    "page in a hole, PASID": (Case(ste={"S1CDMax": 2}, page=(HOLE, "u"), pasid=1),
                              at(arm.F_TRANSLATION, ssv=1, ssid=1, s2=1, w3=HOLE)),
    "table in a hole": (Case(tables="hole"), at(arm.F_TRANSLATION, s2=1, cls=arm.CLASS_TT, ttrnw=1, w3=HOLE)),
    "table in a hole, write": (Case(tables="hole", access=WRITE),
                               at(arm.F_TRANSLATION, rnw=0, s2=1, cls=arm.CLASS_TT, ttrnw=1, w3=HOLE)),
}  # fmt: skip


def build(case: Case) -> tuple[SmmuLab, IommufdDevice, int]:
    """(lab, the bound device, its event queue)"""
    lab = SmmuLab(**case.hardware)  # type: ignore[arg-type]
    idev = lab.device(pasids=20)
    ioas, ram = lab.ram()
    viommu = lab.viommu(idev, lab.parent(idev, ioas))
    lab.c.vdevice(viommu, idev.id, VSID)
    queue = lab.veventq(viommu)
    root = table(ram, case)
    ssid = case.pasid or 0
    if case.cds + 64 <= 1024 * 4096:
        if case.l1cd is None:
            offset = 64 * ssid if case.ste.get("S1CDMax") else 0
            if ssid != 3 and case.cds + offset + 64 <= 1024 * 4096:
                ram.write(case.cds + offset, arm.cd(root, **case.cd))
        else:
            ram.write(case.cds, arm.l1cd(*case.l1cd) * 2)
    words = arm.ste(case.cds if case.ste.get("Config", 5) == 5 else 0, **case.ste)
    if case.ste.get("Config", 5) != 5:
        words = arm.changed((0,) * 8, V=1, Config=case.ste["Config"])
    if case.hardware.get("stall") == "none":
        words = arm.changed(words, S1STALLD=0)
    lab.attach(idev, lab.vste(idev, viommu, (words[0], words[1])))
    if case.host:
        now = lab.iommu.stream_table.read(SID)
        lab.iommu.stream_table.publish(SID, arm.changed(now, **case.host))
    return lab, idev, queue


def table(ram: Ram, case: Case) -> int:
    """The guest's table; its address."""
    if case.tables == "far":
        return 1 << 33
    made = ArmTable(ram, POOL)
    if case.tables == "hole":
        made.set(made.slot(VA, 1), HOLE | 3)
    elif case.page is not None:
        page, rights = case.page
        made.map(VA & (-1 << {3: 12, 2: 21, 0: 39}[case.level]), page, rights, level=case.level, tables=case.tables)
    return made.root


@pytest.mark.parametrize("name", CASES)
def test_a_fault_and_its_words(name: str) -> None:
    case, (number, words, relayed) = CASES[name]
    lab, idev, queue = build(case)
    dev = master(idev)
    for attempt in range(2):  # the second one finds caches filled
        with pytest.raises(TranslationFault) as caught:
            dev.translate(case.pasid, case.va, case.access)
        assert caught.value.code == number
        with pytest.raises(TranslationFault) as fresh:
            lab.iommu.walk_fresh(dev, case.pasid, case.va, case.access)
        assert (fresh.value.code, fresh.value.stage, fresh.value.during) == (
            number, caught.value.stage, caught.value.during
        )  # fmt: skip
        if not number:
            assert not lab.iommu.events
            assert lab.c.read(queue, 40) == b""
            continue
        assert [f"{word:#x}" for word in lab.iommu.events[-1].words] == [f"{word:#x}" for word in words]
        assert (len(lab.iommu.events), lab.iommu.events[-1].relayed) == (attempt + 1, relayed)
        data = lab.c.read(queue, 40)
        if not relayed:
            assert data == b""
            continue
        guests = (words[0] % 2**32 + 2**32 * VSID, *words[1:])
        assert data[8:] == b"".join(word.to_bytes(8, "little") for word in guests)


def test_a_good_guest_has_no_fault() -> None:
    """The same tables, spoiled by nothing, with every right that they give."""
    for ste, cd, pasid in (({}, {}, None), ({"S1CDMax": 2}, {}, 1), ({"S1CDMax": 2}, {"TBI0": 1}, 2)):
        lab, idev, _ = build(Case(ste=ste, cd=cd, pasid=pasid))
        for access in (READ, WRITE, READ | WRITE, EXEC, READ | PRIV, WRITE | PRIV):
            assert master(idev).translate(pasid, VA + 5, access).ipa == PAGE
        assert not lab.iommu.events


def test_the_upper_half_has_a_table_of_its_own() -> None:
    lab, idev, _ = build(Case())
    guest_ram = _ram(lab)
    upper = ArmTable(guest_ram, UPPER)
    upper.map(HIGH, 0x6000)
    guest_ram.write(CDS, arm.cd(POOL, upper.root, EPD1=0, T1SZ=16, TG1=2, TBI1=1))
    dev = master(idev)
    assert dev.translate(None, HIGH, READ).ipa == 0x6000
    assert dev.translate(None, HIGH & ~(0xFF << 56) | 0x80 << 56, READ).ipa == 0x6000, "TBI1"
    assert dev.translate(None, VA, READ).ipa == PAGE


def _ram(lab: SmmuLab) -> Ram:
    """The memory of the first IOAS."""
    ioas = next(obj for obj in lab.c.ictx.objects if isinstance(obj, Ioas))
    extent = ioas.iopt.extent(0)
    assert extent is not None
    return GuestRam(extent.file)  # type: ignore[arg-type]


def test_an_unknown_stream() -> None:
    lab, idev, _ = build(Case())
    dev = master(idev)
    dev.sid = 0x999
    with pytest.raises(TranslationFault):
        dev.translate(None, VA, READ)
    assert lab.iommu.events[-1].words == arm.event(arm.C_BAD_STREAMID, 0x999)
    assert not lab.iommu.events[-1].relayed


SECOND = POOL + 0x1000 + 8 * (VA >> 30 & 511)  # the descriptor of level 1 that is read


@pytest.mark.parametrize(("size", "words"), [
    (CDS, arm.event(arm.F_CD_FETCH, SID, w3=CDS)),
    (POOL + 0x1000, arm.event(arm.F_WALK_EABT, SID, rnw=1, cls=arm.CLASS_TT, addr=VA, w3=SECOND)),
])  # fmt: skip
def test_memory_that_is_gone(size: int, words: tuple[int, ...]) -> None:
    """An external abort: of the CD, or of a table below the first."""
    lab, idev, _ = build(Case())
    _ram(lab).file.truncate(size)  # type: ignore[attr-defined]
    with pytest.raises(TranslationFault):
        master(idev).translate(None, VA, READ)
    assert lab.iommu.events[-1].words == words
    assert not lab.iommu.events[-1].relayed


@pytest.mark.parametrize(("access", "op"), [(READ, Op.READ), (WRITE, Op.WRITE)])
def test_a_stalled_transaction(access: int, op: Op) -> None:
    """STALL and STAG; the host's log has it, and the driver the page request."""
    lab = SmmuLab()
    idev = lab.device(stall=True)
    ioas, ram = lab.ram()
    viommu = lab.viommu(idev, lab.parent(idev, ioas))
    lab.c.vdevice(viommu, idev.id, VSID)
    queue = lab.veventq(viommu)
    made = ArmTable(ram, POOL)
    ram.write(CDS, arm.cd(made.root, S=1))
    words = arm.ste(CDS, S1STALLD=0)
    fault_id, fd = lab.c.fault_queue()
    lab.attach(idev, lab.vste(idev, viommu, (words[0], words[1]), flags=4, fault=fault_id))
    dmas = [lab.dma(idev, op, VA + 8) for _ in range(2)]
    assert [dma.run() for dma in dmas] == [State.PARKED] * 2
    seen = [event.words for event in lab.iommu.events]
    rnw = int(access == READ)
    assert seen == [
        arm.event(arm.F_TRANSLATION, SID, stag=stag, stall=1, rnw=rnw, cls=arm.CLASS_IN, addr=VA + 8)
        for stag in (0, 1)
    ]
    assert lab.c.read(queue, 40) == b""
    assert len(lab.c.read(fd, 80)) == 80


def test_a_guest_that_wants_no_records() -> None:
    lab, idev, queue = build(Case(cd={"R": 0}, page=None))
    with pytest.raises(TranslationFault):
        master(idev).translate(None, VA, READ)
    assert not lab.iommu.events
    assert lab.c.read(queue, 40) == b""


def test_hardware_cannot_mark_a_page_in_read_only_memory() -> None:
    """HTTU: the update of a descriptor is a write that stage 2 refuses: CLASS TT, TTRnW 0."""
    lab = SmmuLab()
    idev = lab.device()
    ioas, ram = lab.ram()
    viommu = lab.viommu(idev, lab.parent(idev, ioas))
    lab.c.vdevice(viommu, idev.id, VSID)
    made = ArmTable(ram, POOL)
    entry = made.map(VA, PAGE, "uo")
    ram.write(CDS, arm.cd(made.root, HA=1))
    words = arm.ste(CDS)
    lab.attach(idev, lab.vste(idev, viommu, (words[0], words[1])))
    at_page = entry & -4096
    lab.c.unmap(ioas, 0, 1024 * 4096)
    for first, last, rights in ((0, at_page, 7), (at_page, at_page + 4096, 5), (at_page + 4096, 1024 * 4096, 7)):
        lab.c.map(ioas, lab.c.process.map(ram.file, page=first >> 12), last - first, first, rights)
    with pytest.raises(TranslationFault):
        master(idev).translate(None, VA, READ)
    assert lab.iommu.events[-1].words == arm.event(
        arm.F_PERMISSION, SID, rnw=1, s2=1, cls=arm.CLASS_TT, ttrnw=0, addr=VA, w3=at_page
    )
