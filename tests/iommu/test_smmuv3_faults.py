"""Every way in which SMMUv3 refuses a request, and the event record that it writes (IHI0070 5.2, 5.4, 7.3)."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from iommufd_uapi.smmuv3 import (
    AtsEvent,
    Cd,
    Class,
    EventId,
    EventRecord,
    FaultEvent,
    FetchEvent,
    L1Cd,
    S1Dss,
    S1Fmt,
    Ste,
)
from iommufdd.device import IommufdDevice
from iommufdd.iommu.dma import Op, State
from iommufdd.iommu.smmuv3_regs import record as report
from iommufdd.iommu.smmuv3_ste import WORDS
from iommufdd.iommu.walk import EXEC, PRIV, READ, WRITE, TranslationFault, Why

from .smmu_lab import CDS, PAGE, POOL, Guest, SmmuLab, master

VA = 0x7F12_3456_7000
AP2, AF, UXN = 1 << 7, 1 << 10, 1 << 54
SID = 0x100  # both the device's BDF and the guest's name for it
HOLE = 0x4000_0000  # guest physical, not mapped


def refused(lab: SmmuLab, idev: IommufdDevice, access: int = READ, pasid: int | None = None, va: int = VA) -> int:
    """The code of a translation that must fail."""
    with pytest.raises(TranslationFault) as caught:
        master(idev).translate(pasid, va, access)
    with pytest.raises(TranslationFault) as fresh:
        lab.iommu.walk_fresh(master(idev), pasid, va, access)
    assert fresh.value.code == caught.value.code
    return caught.value.code


def bad_id(code: EventId, ssid: int | None = None) -> EventRecord:
    """A record that names the stream alone."""
    return EventRecord(id=code, sid=SID, ssv=ssid is not None, ssid=ssid or 0)


# ---- streams (5.2) ----

STREAMS: list[tuple[Ste, int | None, EventRecord | None]] = [
    (Ste(), None, None),  # an invalid vSTE becomes one that aborts
    (Ste.abort(), None, None),
    (Ste.bypass(), 3, EventRecord(id=EventId.C_BAD_SUBSTREAMID, sid=SID, ssid=3)),
    (Ste.s1(CDS), 3, EventRecord(id=EventId.C_BAD_SUBSTREAMID, sid=SID, ssid=3)),
    (Ste.s1(CDS), 0, EventRecord(id=EventId.C_BAD_SUBSTREAMID, sid=SID)),
    (Ste.s1(CDS, s1cdmax=2), 4, EventRecord(id=EventId.C_BAD_SUBSTREAMID, sid=SID, ssid=4)),
    (Ste.s1(CDS, s1cdmax=2), 0, bad_id(EventId.F_STREAM_DISABLED)),
    (Ste.s1(CDS, s1cdmax=2, s1dss=S1Dss.TERMINATE), None, bad_id(EventId.F_STREAM_DISABLED)),
    (Ste.s1(CDS, s1cdmax=2, s1dss=3), None, bad_id(EventId.F_STREAM_DISABLED)),  # reserved, as TERMINATE
    (Ste.s1(CDS, s1cdmax=21), None, bad_id(EventId.C_BAD_STE)),
    (Ste.s1(CDS, s1cdmax=2), 2, bad_id(EventId.C_BAD_CD, 2)),
    (Ste.s1(HOLE, s1cdmax=2), 2, FaultEvent(id=EventId.F_TRANSLATION, sid=SID, ssv=1, ssid=2, rnw=1, s2=1,
                                            class_=Class.CD, addr=VA, ipa=HOLE)),
    (Ste.s1(HOLE), None, FaultEvent(id=EventId.F_TRANSLATION, sid=SID, rnw=1, s2=1, class_=Class.CD, addr=VA,
                                    ipa=HOLE)),
]  # fmt: skip


@pytest.mark.parametrize(("ste", "pasid", "record"), STREAMS)
def test_streams(ste: Ste, pasid: int | None, record: EventRecord | None) -> None:
    lab = SmmuLab()
    idev = lab.device(pasids=20)
    guest = Guest(lab, idev)
    lab.attach(idev, guest.hwpt(ste))
    code = refused(lab, idev, pasid=pasid)
    if record is None:
        assert code == 0
        assert not lab.iommu.events
        return
    assert code == record.id
    assert [event.words for event in lab.iommu.events] == [record.words()]
    relayed = not getattr(record, "s2", 0)
    assert lab.iommu.events[0].relayed == relayed
    if relayed:
        assert lab.event(guest.fd) == (0, 0, record.pack())
    else:
        assert lab.c.read(guest.fd, 40) == b""


def test_an_ste_that_is_not_valid() -> None:
    """What the driver never leaves there; its own stores are the only ones that could."""
    lab = SmmuLab()
    idev = lab.device()
    ioas, _ = lab.ram()
    lab.attach(idev, ioas)
    lab.iommu.stream_table.publish(SID, (0,) * 8)
    lab.iommu.stes.entries.clear()
    assert refused(lab, idev) == EventId.C_BAD_STE
    assert lab.records() == [bad_id(EventId.C_BAD_STE)]


# ---- context descriptors (5.4) ----

BAD_CDS: list[dict[str, int]] = [
    {"v": 0},
    {"aa64": 0},
    {"a": 0},  # TERM_MODEL
    {"endi": 1},  # TTENDIAN
    {"t0sz": 15},
    {"t0sz": 40},
    {"tg0": 3},
    {"ips": 0, "ttb0": 1 << 32},
    {"s": 1},  # S1STALLD
    {"epd1": 0},  # with TG1 reserved
]


@pytest.mark.parametrize("fields", BAD_CDS)
def test_context_descriptors(fields: dict[str, int]) -> None:
    lab = SmmuLab()
    idev = lab.device()
    guest = Guest(lab, idev)
    guest.table.map(VA, 0x5000)
    for name, value in fields.items():
        setattr(guest.cd, name, value)
    guest.store_cd(guest.cd)
    guest.start()
    assert refused(lab, idev) == EventId.C_BAD_CD
    assert lab.event(guest.fd) == (0, 0, bad_id(EventId.C_BAD_CD).pack())


@pytest.mark.parametrize(("httu", "ha", "hd", "good"), [("none", 1, 0, False), ("access", 1, 1, False),
                                                        ("access", 1, 0, True), ("dirty", 1, 1, True)])  # fmt: skip
def test_flags_that_hardware_does_not_set(httu: str, ha: int, hd: int, good: bool) -> None:
    lab = SmmuLab(httu=httu)
    idev = lab.device()
    guest = Guest(lab, idev, ha=ha, hd=hd)
    guest.table.map(VA, 0x5000)
    guest.start()
    if good:
        lab.read(idev, VA)
    else:
        assert refused(lab, idev) == EventId.C_BAD_CD


def test_an_asid_of_16_bits_where_there_are_8() -> None:
    lab = SmmuLab(asid_bits=8)
    idev = lab.device()
    guest = Guest(lab, idev, asid=0x100)
    guest.start()
    assert refused(lab, idev) == EventId.C_BAD_CD


@pytest.mark.parametrize(("fmt", "cds"), [(S1Fmt.L2_4K, 64), (S1Fmt.L2_64K, 1024)])
def test_two_levels_of_context_descriptors(fmt: S1Fmt, cds: int) -> None:
    lab = SmmuLab()
    idev = lab.device(pasids=20)
    guest = Guest(lab, idev)
    leaf = 0x20_0000
    ssid = 3 * cds + 7
    guest.table.map(VA, 0x5000)
    guest.ram.write(CDS, bytes(4096))
    guest.ram.write(CDS + 8 * 3, L1Cd(v=1, l2ptr=leaf).pack())
    guest.ram.write(leaf + 64 * 7, guest.cd.pack())
    guest.ste.s1fmt, guest.ste.s1cdmax, guest.ste.s1dss = fmt, 13, S1Dss.TERMINATE
    guest.start()
    lab.write(idev, VA, b"leaf", pasid=ssid)
    assert guest.ram.read(0x5000, 4) == b"leaf"
    assert refused(lab, idev, pasid=2 * cds) == EventId.C_BAD_SUBSTREAMID  # its L1CD is not valid
    assert refused(lab, idev, pasid=ssid + 1) == EventId.C_BAD_CD
    guest.ram.write(CDS + 8 * 5, L1Cd(v=1, l2ptr=1 << 50).pack())
    assert refused(lab, idev, pasid=5 * cds) == EventId.C_BAD_SUBSTREAMID  # out of range
    guest.ram.write(CDS + 8 * 6, L1Cd(v=1, l2ptr=HOLE).pack())
    assert refused(lab, idev, pasid=6 * cds + 1) == EventId.F_TRANSLATION
    record = lab.records()[-1]
    assert isinstance(record, FaultEvent)
    assert (record.s2, record.class_, record.ipa) == (1, Class.CD, HOLE)


# ---- translation tables (7.3.13 to 7.3.16) ----


def fault(code: EventId, **fields: int) -> FaultEvent:
    return FaultEvent(id=code, sid=SID, addr=VA, **{"class_": Class.IN, "rnw": 1, **fields})


FAULTS: list[tuple[str, int, Callable[[Guest], object], FaultEvent]] = [
    ("hole", READ, lambda g: None, fault(EventId.F_TRANSLATION)),
    ("hole, write", WRITE, lambda g: None, fault(EventId.F_TRANSLATION, rnw=0)),
    ("hole, fetch", EXEC, lambda g: None, fault(EventId.F_TRANSLATION, ind=1)),
    ("hole, privileged", READ | PRIV, lambda g: None, fault(EventId.F_TRANSLATION, pnu=1)),
    ("invalid page", READ, lambda g: g.table.map(VA, 0x5000, PAGE & ~1), fault(EventId.F_TRANSLATION)),
    ("reserved kind", READ, lambda g: g.table.map(VA, 0x5000, PAGE & ~2), fault(EventId.F_TRANSLATION)),
    ("too large", READ, lambda g: g.table.map(VA, 1 << 41), fault(EventId.F_ADDR_SIZE)),
    ("not accessed", READ, lambda g: g.table.map(VA, 0x5000, PAGE & ~AF), fault(EventId.F_ACCESS)),
    ("read-only", WRITE, lambda g: g.table.map(VA, 0x5000, PAGE | AP2), fault(EventId.F_PERMISSION, rnw=0)),
    ("privileged page", READ, lambda g: g.table.map(VA, 0x5000, PAGE & ~(1 << 6)), fault(EventId.F_PERMISSION)),
    ("never executed", EXEC, lambda g: g.table.map(VA, 0x5000, PAGE | UXN), fault(EventId.F_PERMISSION, ind=1)),
    ("stage 2 hole", READ, lambda g: g.table.map(VA, HOLE), fault(EventId.F_TRANSLATION, s2=1, ipa=HOLE)),
    ("table in a hole", READ, lambda g: g.table.set(g.table.slot(VA, 1), HOLE | 3),
     fault(EventId.F_TRANSLATION, s2=1, class_=Class.TT, ttrnw=1, ipa=HOLE)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "access", "spoil", "record"), FAULTS, ids=[row[0] for row in FAULTS])
def test_translation_tables(name: str, access: int, spoil: Callable[[Guest], object], record: FaultEvent) -> None:
    lab = SmmuLab()
    idev = lab.device()
    guest = Guest(lab, idev, ips=2)  # 40 bits
    spoil(guest)
    guest.start()
    assert refused(lab, idev, access) == record.id
    assert [str(each) for each in lab.records()] == [str(record)]
    assert lab.records()[0].words() == record.words()
    assert lab.iommu.events[0].relayed is not bool(record.s2)


def test_a_guest_that_wants_no_record_gets_none() -> None:
    lab = SmmuLab()
    idev = lab.device()
    guest = Guest(lab, idev, r=0)
    guest.start()
    assert refused(lab, idev) == EventId.F_TRANSLATION
    assert not lab.iommu.events
    guest.table.map(VA, HOLE)  # stage 2's records are the host's to decide
    assert refused(lab, idev) == EventId.F_TRANSLATION
    assert len(lab.iommu.events) == 1


@pytest.mark.parametrize("va", [1 << 48, 0xFFFF_0000_0000_0000, 1 << 60 | VA])
def test_addresses_outside_the_lower_half(va: int) -> None:
    lab = SmmuLab()
    idev = lab.device()
    guest = Guest(lab, idev)
    guest.table.map(VA, 0x5000)
    guest.start()
    assert refused(lab, idev, va=va) == EventId.F_TRANSLATION
    record = lab.records()[0]
    assert isinstance(record, FaultEvent)
    assert record.addr == va


def test_the_upper_half_and_tagged_addresses() -> None:
    lab = SmmuLab()
    idev = lab.device()
    guest = Guest(lab, idev, tbi0=1, epd1=0, t1sz=16, tg1=2, ttb1=POOL)
    guest.table.map(VA, 0x5000)
    guest.start()
    upper = 0xFFFF << 48 | VA
    lab.write(idev, upper, b"both")
    tagged = 0xAB << 56 | VA
    assert lab.read(idev, tagged + 2, 2) == b"th"
    assert lab.read(idev, VA + 2, 2) == b"th"
    assert refused(lab, idev, va=0xAB << 56 | upper & (1 << 56) - 1) == EventId.F_TRANSLATION  # TBI1 is off


# ---- ATS (3.9.1, 7.3.6) ----


def test_translation_requests_record_nothing_but_that_they_are_forbidden() -> None:
    lab = SmmuLab()
    idev = lab.device(ats=True)
    guest = Guest(lab, idev, eats=1)
    guest.start()
    assert master(idev).ats_enabled
    assert refused(lab, idev) == EventId.F_TRANSLATION
    assert not lab.iommu.events
    guest.table.map(VA, 0x5000)
    lab.read(idev, VA)
    words = list(lab.iommu.stream_table.read(SID))
    words[1] &= ~(3 << 28)
    lab.iommu.stream_table.publish(SID, tuple(words))
    lab.iommu.stes.entries.clear()
    lab.iommu.contexts.entries.clear()
    with pytest.raises(TranslationFault):
        master(idev).translate(None, VA + 0x1234, READ)
    assert lab.records() == [AtsEvent(id=EventId.F_BAD_ATS_TREQ, sid=SID, addr=VA + 0x1000)]


def test_the_guest_decides_whether_ats_is_on() -> None:
    lab = SmmuLab()
    idev = lab.device(ats=True)
    guest = Guest(lab, idev, eats=0)
    guest.start()
    assert not master(idev).ats_enabled
    lab.replace(idev, guest.ioas)
    assert master(idev).ats_enabled


# ---- stalls ----


def test_a_stalling_device_without_a_handler_is_aborted() -> None:
    lab = SmmuLab()
    idev = lab.device(stall=True)
    guest = Guest(lab, idev, s=1)
    guest.start()
    dma = lab.dma(idev, Op.READ, VA)
    dma.run()
    assert "INVALID" in dma.error
    record = lab.records()[0]
    assert isinstance(record, FaultEvent)
    assert record.stall
    assert lab.c.read(guest.fd, 40) == b""


def test_memory_that_is_gone_under_a_cd() -> None:
    lab = SmmuLab()
    idev = lab.device()
    guest = Guest(lab, idev)
    guest.start()
    guest.ram.file.truncate(CDS >> 12)
    assert refused(lab, idev) == EventId.F_CD_FETCH
    assert lab.records() == [FetchEvent(id=EventId.F_CD_FETCH, sid=SID, fetchaddr=CDS)]
    assert not lab.iommu.events[0].relayed


def test_cds_of_the_kernel_are_bytes() -> None:
    lab = SmmuLab()
    idev = lab.device(pasids=4)
    ioas, _ = lab.ram()
    lab.attach(idev, ioas)
    table = master(idev).cd_table
    assert table is not None
    cd = Cd.of(table.read(0))
    assert (cd.v, cd.asid, cd.t0sz, cd.epd1) == (1, 1, 16, 1)
    assert WORDS.pack(*table.read(1)) == bytes(64)


def test_a_guest_that_lets_a_device_stall_which_cannot() -> None:
    """quirk: the driver never sends the RESUME that the transaction waits for (arm_smmu_page_response)."""
    lab = SmmuLab()
    idev = lab.device()
    guest = Guest(lab, idev, s=1)
    guest.start()
    dma = lab.dma(idev, Op.READ, VA)
    assert dma.run() is State.PARKED
    assert not master(idev).iopf.responses
    master(idev).time_out(dma)
    assert dma.state is State.FAILED


def test_no_write_is_an_instruction() -> None:
    why = TranslationFault(Why.WRITE, stage=1, level=1, addr=VA)
    why.code = EventId.F_PERMISSION
    assert report(why, 1, None, VA, WRITE | EXEC) == FaultEvent(id=EventId.F_PERMISSION, sid=1, class_=2, addr=VA)
