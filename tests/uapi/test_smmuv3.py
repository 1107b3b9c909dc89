"""SMMUv3's structures: words that others wrote, round trips, what people read."""

from __future__ import annotations

import struct
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iommufd_uapi import smmuv3
from iommufd_uapi.bits import Bitfield
from iommufd_uapi.smmuv3 import Cd, Cmd, Config, Event, L1Cd, Ste

CLASSES: list[type[Bitfield]] = [
    value for name in smmuv3.__all__ if isinstance(value := getattr(smmuv3, name), type) and issubclass(value, Bitfield)
]
COMMANDS = [cls for cls in CLASSES if issubclass(cls, smmuv3.Command)]
EVENTS = [cls for cls in CLASSES if issubclass(cls, smmuv3.EventRecord)]
SIZES: dict[type[Bitfield], int] = dict.fromkeys(COMMANDS, 16) | dict.fromkeys(EVENTS, 32)
SIZES |= dict.fromkeys(smmuv3.IDRS, 4) | {Ste: 64, Cd: 64, L1Cd: 8}


@pytest.mark.parametrize("cls", CLASSES)
def test_sizes_and_fields_that_do_not_overlap(cls: type[Bitfield]) -> None:
    assert cls.SIZEOF == SIZES[cls] == len(cls().pack())
    width = 8 * cls.SIZEOF // cls.WORDS
    taken = [0] * cls.WORDS
    for name, place in cls.FIELDS.items():
        mask = cls.mask(name)[place.word]
        assert mask.bit_length() <= width
        assert not taken[place.word] & mask, name
        taken[place.word] |= mask
    assert tuple(taken) == cls.mask()


@given(cls=st.sampled_from(CLASSES), data=st.binary(min_size=64, max_size=64))
def test_bytes_come_back_without_what_is_reserved(cls: type[Bitfield], data: bytes) -> None:
    entry = cls.unpack(data)
    words = cls.CODEC.unpack_from(data)
    assert entry.words() == tuple(word & mask for word, mask in zip(words, cls.mask(), strict=True))
    assert cls.unpack(entry.pack()) == entry == cls.of(entry.words())
    assert cls.unpack(bytes(8) + data, 8) == entry
    assert str(entry)


@given(cls=st.sampled_from(CLASSES), data=st.binary(min_size=64, max_size=64))
def test_construct_agrees(cls: type[Bitfield], data: bytes) -> None:
    """construct's BitStruct comes of the same declaration, and reads and writes the same bytes."""
    entry, container = cls.unpack(data), cls.describe(data)
    theirs = {name: int(container[f"word{place.word}"][name]) for name, place in cls.FIELDS.items()}
    assert theirs == {name: getattr(entry, name) for name in cls.FIELDS}
    assert cls.bit_struct().build(container) == entry.pack()
    assert cls.bit_struct().sizeof() == cls.SIZEOF


def test_construct_prints_words_and_names() -> None:
    shown = str(Ste.describe(Ste.s1(0x4000_0000, s1cdmax=4).pack()))
    assert "word0 = Container" in shown
    assert "config = (enum) S1_TRANS 5" in shown
    assert f"s1contextptr = {0x4000_0000}" in shown


def test_construct_is_imported_when_it_is_asked_for() -> None:
    code = """
import sys
from iommufd_uapi.smmuv3 import Cd
Cd.s1(0x1000, asid=1).pack()
assert "construct" not in sys.modules
print(Cd.describe(bytes(64)).word0.v, "construct" in sys.modules)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "0 True\n"


@pytest.mark.parametrize("cls", CLASSES)
def test_every_field_alone(cls: type[Bitfield]) -> None:
    for name, place in cls.FIELDS.items():
        most = place.mask if place.in_place else place.mask >> place.low
        entry = cls(**{name: most})
        assert entry.words() == cls.mask(name)
        assert getattr(cls.of(entry.words()), name) == most
        for bad in (-1, 1 << 64, most + 1, *([place.mask | place.mask >> 1] if place.in_place else [])):
            with pytest.raises(ValueError, match=f"{cls.__name__}.{name} = .* does not fit in word {place.word} bits"):
                cls(**{name: bad}).words()


def test_short_bytes() -> None:
    for read in (Ste.unpack, Cmd.decode, Event.decode):
        for length in (0, 1, 15):
            with pytest.raises(struct.error):
                read(bytes(length))
    assert Ste.of((1,)) == Ste(v=1)


# ---- golden words: what arm-smmu-v3-test.c's structures come to -----------------------------------

TTB = 0xDAEDBEEFDEADBEEF  # the table address of the kernel's KUnit tests
CDTAB = 0xF0F0F0F0F0F0


def test_the_kernels_context_descriptor() -> None:
    """arm_smmu_test_make_s1_cd(): ips 1, tg 2, sh 3, orgn 1, irgn 2, tsz 4; arm_smmu_make_s1_cd() adds the rest."""
    cd = Cd(t0sz=4, tg0=2, ir0=2, or0=1, sh0=3, epd1=1, v=1, ips=1, aa64=1, r=1, a=1, aset=1, asid=1997,
            ttb0=TTB & 0xFFFFFFFFFFFF0, mair=0xABCDEF012345678)  # fmt: skip
    assert cd.words() == (0x07CD_E201_C000_3684, 0x000D_BEEF_DEAD_BEE0, 0, 0x0ABC_DEF0_1234_5678, 0, 0, 0, 0)
    assert Cd.of((0x07CD_E201_C000_3684, 0x000D_BEEF_DEAD_BEE0, 0, 0x0ABC_DEF0_1234_5678)) == cd


def test_the_kernels_stream_table_entries() -> None:
    """abort, bypass with SHCFG, a CD table with ATS, a second stage (arm_smmu_test_make_s2_ste())."""
    assert Ste.abort().words() == (1, *[0] * 7)
    assert Ste.bypass().words() == (9, *[0] * 7)
    assert Ste(v=1, config=Config.BYPASS, shcfg=1).words()[:2] == (9, 0x1000_0000_0000)
    s1 = Ste.s1(CDTAB & ~63, s1cdmax=31, s1fmt=2, s1dss=2, eats=1, s1stalld=True)
    assert s1.words() == (0xF800_F0F0_F0F0_F0EB, 0x1800_00D6, *[0] * 6)
    s2 = Ste(v=1, config=Config.S2_TRANS, eats=1, shcfg=1, s2t0sz=4, s2sl0=3, s2ir0=2, s2or0=1, s2sh0=3, s2tg=2,
             s2ps=1, s2aa64=1, s2ptw=1, s2r=1, s2ttb=TTB & 0xFFFFFFFFFFFF0)  # fmt: skip
    assert s2.words()[:4] == (0xD, 0x1000_1000_0000, 0x0449_B6C4_0000_0000, 0x000D_BEEF_DEAD_BEE0)


def test_the_words_of_a_guest_under_qemu() -> None:
    """QEMU 11.1 with arm-smmuv3,accel=on: HWPT_ALLOC's STEs, and the registers it accepts."""
    assert Ste.of((1, 0)) == Ste.abort()
    assert Ste.of((9, 0)) == Ste.bypass()
    ste = Ste.of((0x40A6_100B, 0xD6))
    assert ste == Ste.s1(0x40A6_1000)
    assert str(ste) == "Ste v config=S1_TRANS s1contextptr=0x40a61000 s1dss=SSID0 s1cir=WBWA s1cor=WBWA s1csh=ISH"
    idrs = (0x0D41_301B, 0x0273_0290, 0, 0x404, 0, 0x75)
    idr0, idr1, _, idr3, _, idr5 = (cls.of((value,)) for cls, value in zip(smmuv3.IDRS, idrs, strict=True))
    assert [cls.of((value,)).words()[0] for cls, value in zip(smmuv3.IDRS, idrs, strict=True)] == list(idrs)
    assert str(idr0) == "Idr0 s2p s1p ttf=2 cohacc asid16 msi pri ttendian=2 stall_model=1 term_model st_level=1"
    assert str(idr1) == "Idr1 sidsize=16 ssidsize=10 eventqs=19 cmdqs=19"
    assert (str(idr3), str(idr5)) == ("Idr3 had ril", "Idr5 oas=BITS_48 gran4k gran16k gran64k")


def test_what_a_guest_decides_of_its_entry() -> None:
    """STRTAB_STE_0_NESTING_ALLOWED and STRTAB_STE_1_NESTING_ALLOWED"""
    assert smmuv3.STE_NESTING_ALLOWED == (0xF80F_FFFF_FFFF_FFFF, 0x3800_00FF)


def test_a_context_descriptor_as_linux_makes_it() -> None:
    cd = Cd.s1(0x4000_0000, asid=5)
    assert cd.words()[:4] == (0x0005_E205_C000_3510, 0x4000_0000, 0, 0xF404_FF44)
    assert Cd.s1(0, asid=1, httu=True, s=True).words()[0] == 0x0001_FE05_C000_3510
    assert L1Cd(v=1, l2ptr=0x8_1234_5000).pack() == (0x8_1234_5001).to_bytes(8, "little")


@pytest.mark.parametrize(
    ("command", "words", "text"),
    [
        (Cmd.cfgi_ste(0x100), (0x100_0000_0003, 1), "CFGI_STE sid=0x100 leaf"),
        (Cmd.cfgi_all(), (4, 31), "CFGI_ALL range=31"),
        (Cmd.cfgi_cd(0x100, 7), (0x100_0000_7005, 1), "CFGI_CD ssid=0x7 sid=0x100 leaf"),
        (Cmd.cfgi_cd(0x100, leaf=False), (0x100_0000_0005, 0), "CFGI_CD sid=0x100"),
        (Cmd.cfgi_cd_all(0x100), (0x100_0000_0006, 0), "CFGI_CD_ALL sid=0x100"),
        (Cmd.tlbi_nsnh_all(), (0x30, 0), "TLBI_NSNH_ALL"),
        (Cmd.tlbi_nh_all(9), (0x9_0000_0010, 0), "TLBI_NH_ALL vmid=0x9"),
        (Cmd.tlbi_nh_asid(5), (0x5_0000_0000_0011, 0), "TLBI_NH_ASID asid=0x5"),
        (Cmd.tlbi_nh_va(5, 0x1FFF), (0x5_0000_0000_0012, 0x1001), "TLBI_NH_VA asid=0x5 leaf addr=0x1000"),
        (
            Cmd.tlbi_nh_va(5, 0xFFFF_0000_0000_0000, leaf=False, vmid=2, num=3, scale=1, ttl=3, tg=1),
            (0x5_0002_0010_3012, 0xFFFF_0000_0000_0700),
            "TLBI_NH_VA num=3 scale=1 vmid=0x2 asid=0x5 ttl=3 tg=1 addr=0xffff000000000000",
        ),
        (Cmd.tlbi_nh_vaa(0x2000), (0x13, 0x2001), "TLBI_NH_VAA leaf addr=0x2000"),
        (Cmd.tlbi_s12_vmall(1), (0x1_0000_0028, 0), "TLBI_S12_VMALL vmid=0x1"),
        (Cmd.tlbi_s2_ipa(1, 0x3000), (0x1_0000_002A, 0x3001), "TLBI_S2_IPA vmid=0x1 leaf addr=0x3000"),
        (Cmd.atc_inv(8), (0x8_0000_0040, 52), "ATC_INV sid=0x8 size=52"),
        (Cmd.atc_inv(8, 0x5000, 0, ssid=0), (0x8_0000_0840, 0x5000), "ATC_INV ssv sid=0x8 addr=0x5000"),
        (Cmd.pri_resp(8, 3, ssid=4), (0x8_0000_4841, 0x2003), "PRI_RESP ssv ssid=0x4 sid=0x8 prgindex=3 resp=SUCCESS"),
        (Cmd.resume(8, 0xABC), (0x8_0000_1044, 0xABC), "RESUME resp=RETRY sid=0x8 stag=0xabc"),
        (Cmd.sync(), (0x46, 0), "SYNC"),
        (smmuv3.Prefetch(op=1, sid=8), (0x8_0000_0001, 0), "PREFETCH_CONFIG sid=0x8"),
        (smmuv3.Command(op=0x99), (0x99, 0), "command 0x99"),
    ],
    ids=lambda value: value.split()[0] if isinstance(value, str) else "",
)
def test_commands(command: smmuv3.Command, words: tuple[int, int], text: str) -> None:
    """Opcode and places as in arm-smmu-v3.h's arm_smmu_make_cmd_*()."""
    assert command.words() == words
    assert str(command) == text
    assert Cmd.decode(struct.pack("<2Q", *words)) == command
    assert type(Cmd.decode(command.pack())) is type(command)


@pytest.mark.parametrize(("tg", "granule"), [(1, 4 << 10), (2, 16 << 10), (3, 64 << 10)])
def test_the_span_of_a_range(tg: int, granule: int) -> None:
    command = Cmd.tlbi_nh_va(1, 0x10_0000, num=4, scale=3, tg=tg)
    assert command.span == (0x10_0000, 0x10_0000 + 5 * 8 * granule - 1)
    assert Cmd.tlbi_nh_va(1, 0x10_0000, num=4).span is None


@pytest.mark.parametrize(
    ("record", "words", "text"),
    [
        (smmuv3.EventRecord(id=4, sid=0x10), (0x10_0000_0004, 0, 0, 0), "C_BAD_STE sid=0x10"),
        (
            smmuv3.EventRecord(id=8, sid=0x10, ssv=1, ssid=3),
            (0x10_0000_3808, 0, 0, 0),
            "C_BAD_SUBSTREAMID ssv ssid=0x3 sid=0x10",
        ),
        (
            smmuv3.FetchEvent(id=9, sid=1, fetchaddr=0x1238),
            (0x1_0000_0009, 0, 0, 0x1238),
            "F_CD_FETCH sid=0x1 fetchaddr=0x1238",
        ),
        (
            smmuv3.FaultEvent(id=0x10, sid=1, rnw=1, class_=2, addr=0xFFFF_0000_0000_1234),
            (0x1_0000_0010, 0x208_0000_0000, 0xFFFF_0000_0000_1234, 0),
            "F_TRANSLATION sid=0x1 rnw class=IN addr=0xffff000000001234",
        ),
        (
            smmuv3.FaultEvent(id=0x13, sid=1, stag=7, stall=1, pnu=1, ind=1, s2=1, class_=1, ttrnw=1, ipa=0x5000),
            (0x1_0000_0013, 0x1186_8000_0007, 0, 0x5000),
            "F_PERMISSION sid=0x1 stag=0x7 stall pnu ind s2 class=TT ttrnw ipa=0x5000",
        ),
        (
            smmuv3.WalkEvent(id=0xB, reason=2, class_=1, fetchaddr=8),
            (0xB, 0x100_0000_0002, 0, 8),
            "F_WALK_EABT reason=0x2 class=TT fetchaddr=0x8",
        ),
        (
            smmuv3.AtsEvent(id=7, rnw=1, addr=0x1000),
            (7, 0x8_0000_0000, 0x1000, 0),
            "F_TRANSL_FORBIDDEN rnw addr=0x1000",
        ),
        (smmuv3.EventRecord(id=0x77), (0x77, 0, 0, 0), "event 0x77"),
    ],
    ids=lambda value: value.split()[0] if isinstance(value, str) else "",
)
def test_events(record: smmuv3.EventRecord, words: tuple[int, ...], text: str) -> None:
    assert record.words() == words
    assert str(record) == text
    assert Event.decode(struct.pack("<4Q", *words)) == record
    assert type(Event.decode(record.pack())) is type(record)


def test_output_sizes() -> None:
    assert [smmuv3.output_bits(value) for value in range(8)] == [32, 36, 40, 42, 44, 48, 52, 52]


def test_nobody_pays_for_it_who_does_not_ask() -> None:
    check = "import iommufd_uapi.iommufd; assert not {'iommufd_uapi.smmuv3', 'iommufd_uapi.bits'} & {*sys.modules}"
    path = [each for each in sys.path if each]
    subprocess.run([sys.executable, "-c", f"import sys; sys.path[:0] = {path!r}\n{check}"], check=True, timeout=30)
