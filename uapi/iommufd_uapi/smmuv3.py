"""Room uapi (mirrors Arm IHI0070, "SMMU architecture specification, version 3"): what a VMM writes and reads as bits.

Stream table entries and context descriptors (5.2, 5.3, 5.4), ID registers (6.3); with the commands (4) and event
records (7.3) of smmuv3_queue.py.
Field names are the specification's in lower case; the kernel's arm-smmu-v3.h has most of them too. Only what a
Non-secure SMMU without Realms, MPAM and permission indirection looks at; the rest of each structure must be zero.

    Ste.s1(cdtab, s1cdmax=4).words()[:2]         # what IOMMU_HWPT_DATA_ARM_SMMUV3 takes
    Cd.s1(ttb0, asid=5).pack()                   # into guest memory, where s1contextptr says
    Cmd.tlbi_nh_va(asid=5, va=0x1000).pack()     # an entry of IOMMU_VIOMMU_INVALIDATE_DATA_ARM_SMMUV3
    print(Event.decode(record))                  # F_TRANSLATION sid=0x10 rnw class=IN addr=0x1000

Not imported by `iommufd_uapi.iommufd`: who needs it pays for it.
"""

from enum import IntEnum
from typing import Annotated, Self

from .bits import Bitfield, address, bitfield, bits, flag
from .smmuv3_queue import (
    ATC_INV_SIZE_ALL,
    CFGI_RANGE_ALL,
    AtcInv,
    AtsEvent,
    Cfgi,
    CfgiAll,
    Class,
    Cmd,
    Command,
    Event,
    EventId,
    EventRecord,
    FaultEvent,
    FetchEvent,
    Op,
    Prefetch,
    PriResp,
    PriResponse,
    Resume,
    ResumeCommand,
    Sync,
    Tlbi,
    WalkEvent,
)

__all__ = [
    "Config", "S1Fmt", "S1Dss", "Eats", "Shcfg", "Sh", "Rgn", "Tg0", "Tg1", "OutputSize", "output_bits", "Ste",
    "STE_NESTING_ALLOWED", "MAIR_LINUX", "Cd", "L1Cd", "Idr0", "Idr1", "Idr2", "Idr3", "Idr4", "Idr5", "IDRS",
    "Op", "PriResp", "Resume", "CFGI_RANGE_ALL", "ATC_INV_SIZE_ALL", "Command", "Prefetch", "Cfgi", "CfgiAll", "Tlbi",
    "AtcInv", "PriResponse", "ResumeCommand", "Sync", "Cmd", "EventId", "Class", "EventRecord", "FetchEvent",
    "AtsEvent", "FaultEvent", "WalkEvent", "Event",
]  # fmt: skip

# ---- stream table entries ------------------------------------------------------------------------


class Config(IntEnum):
    """STE.Config. Values below 4 other than ABORT are reserved and abort too."""

    ABORT = 0
    BYPASS = 4
    S1_TRANS = 5
    S2_TRANS = 6
    NESTED = 7


class S1Fmt(IntEnum):
    """STE.S1Fmt: the shape of the CD table."""

    LINEAR = 0
    L2_4K = 1  #: leaves of 64 CDs
    L2_64K = 2  #: leaves of 1024 CDs


class S1Dss(IntEnum):
    """STE.S1DSS: what a transaction without SubstreamID meets."""

    TERMINATE = 0
    BYPASS = 1
    SSID0 = 2


class Eats(IntEnum):
    """STE.EATS: what becomes of ATS requests."""

    ABT = 0
    TRANS = 1
    S1CHK = 2  #: "split stage": stage 1 alone is translated for the device


class Shcfg(IntEnum):
    """STE.SHCFG"""

    NON_SHAREABLE = 0
    INCOMING = 1
    OUTER = 2
    INNER = 3


class Sh(IntEnum):
    """Shareability, as tables have it"""

    NSH = 0
    OSH = 2
    ISH = 3


class Rgn(IntEnum):
    """Cacheability of table walks"""

    NC = 0
    WBWA = 1
    WT = 2
    WB = 3


class Tg0(IntEnum):
    """Granule of TTB0 and of stage 2"""

    K4 = 0
    K64 = 1
    K16 = 2


class Tg1(IntEnum):
    """Granule of TTB1"""

    K16 = 1
    K4 = 2
    K64 = 3


class OutputSize(IntEnum):
    """CD.IPS, STE.S2PS, IDR5.OAS: `output_bits()` gives the number."""

    BITS_32 = 0
    BITS_36 = 1
    BITS_40 = 2
    BITS_42 = 3
    BITS_44 = 4
    BITS_48 = 5
    BITS_52 = 6


def output_bits(encoded: int) -> int:
    """The bits of an address size field; 7 is reserved and behaves as 6."""
    return (32, 36, 40, 42, 44, 48, 52, 52)[encoded]


@bitfield(words=8)
class Ste(Bitfield):
    """Stream table entry, 64 bytes (5.2)"""

    v: Annotated[int, flag(0, 0)] = 0
    config: Annotated[int, bits(0, 3, 1, Config)] = 0
    s1fmt: Annotated[int, bits(0, 5, 4, S1Fmt)] = 0
    s1contextptr: Annotated[int, address(0, 51, 6)] = 0
    s1cdmax: Annotated[int, bits(0, 63, 59)] = 0  #: log2 of the number of CDs
    s1dss: Annotated[int, bits(1, 1, 0, S1Dss)] = 0
    s1cir: Annotated[int, bits(1, 3, 2, Rgn)] = 0
    s1cor: Annotated[int, bits(1, 5, 4, Rgn)] = 0
    s1csh: Annotated[int, bits(1, 7, 6, Sh)] = 0
    dre: Annotated[int, flag(1, 12)] = 0
    cont: Annotated[int, bits(1, 16, 13)] = 0
    dcp: Annotated[int, flag(1, 17)] = 0
    ppar: Annotated[int, flag(1, 18)] = 0
    mev: Annotated[int, flag(1, 19)] = 0  #: events may be merged
    s2fwb: Annotated[int, flag(1, 25)] = 0
    s1stalld: Annotated[int, flag(1, 27)] = 0  #: stage 1 may not stall
    eats: Annotated[int, bits(1, 29, 28, Eats)] = 0
    strw: Annotated[int, bits(1, 31, 30)] = 0
    memattr: Annotated[int, bits(1, 35, 32)] = 0
    mtcfg: Annotated[int, flag(1, 36)] = 0
    alloccfg: Annotated[int, bits(1, 40, 37)] = 0
    shcfg: Annotated[int, bits(1, 45, 44, Shcfg)] = 0
    nscfg: Annotated[int, bits(1, 47, 46)] = 0
    privcfg: Annotated[int, bits(1, 49, 48)] = 0
    instcfg: Annotated[int, bits(1, 51, 50)] = 0
    s2vmid: Annotated[int, bits(2, 15, 0)] = 0
    s2t0sz: Annotated[int, bits(2, 37, 32)] = 0
    s2sl0: Annotated[int, bits(2, 39, 38)] = 0
    s2ir0: Annotated[int, bits(2, 41, 40, Rgn)] = 0
    s2or0: Annotated[int, bits(2, 43, 42, Rgn)] = 0
    s2sh0: Annotated[int, bits(2, 45, 44, Sh)] = 0
    s2tg: Annotated[int, bits(2, 47, 46, Tg0)] = 0
    s2ps: Annotated[int, bits(2, 50, 48, OutputSize)] = 0
    s2aa64: Annotated[int, flag(2, 51)] = 0
    s2endi: Annotated[int, flag(2, 52)] = 0
    s2affd: Annotated[int, flag(2, 53)] = 0
    s2ptw: Annotated[int, flag(2, 54)] = 0
    s2hd: Annotated[int, flag(2, 55)] = 0
    s2ha: Annotated[int, flag(2, 56)] = 0
    s2s: Annotated[int, flag(2, 57)] = 0
    s2r: Annotated[int, flag(2, 58)] = 0
    s2ttb: Annotated[int, address(3, 51, 4)] = 0

    @classmethod
    def abort(cls) -> Self:
        """Everything is terminated, silently."""
        return cls(v=1, config=Config.ABORT)

    @classmethod
    def bypass(cls) -> Self:
        """No translation; a vSTE says no more than this, the host adds SHCFG."""
        return cls(v=1, config=Config.BYPASS)

    @classmethod
    def s1(
        cls,
        s1contextptr: int,
        *,
        s1cdmax: int = 0,
        s1fmt: int = S1Fmt.LINEAR,
        s1dss: int = S1Dss.SSID0,
        eats: int = Eats.ABT,
        s1stalld: bool = False,
    ) -> Self:
        """Stage 1 through the CD table at s1contextptr, which is 2^s1cdmax CDs (arm_smmu_make_cdtable_ste())."""
        return cls(v=1, config=Config.S1_TRANS, s1fmt=s1fmt, s1contextptr=s1contextptr, s1cdmax=s1cdmax, s1dss=s1dss,
                   s1cir=Rgn.WBWA, s1cor=Rgn.WBWA, s1csh=Sh.ISH, eats=eats, s1stalld=s1stalld)  # fmt: skip


#: What a guest decides of its STE (STRTAB_STE_0_NESTING_ALLOWED and its twin), by word; EIO for any other bit.
STE_NESTING_ALLOWED = (
    Ste.mask("v", "config", "s1fmt", "s1contextptr", "s1cdmax")[0],
    Ste.mask("s1dss", "s1cir", "s1cor", "s1csh", "s1stalld", "eats")[1],
)


# ---- context descriptors -------------------------------------------------------------------------

#: MAIR as Linux's io-pgtable-arm writes it: attributes 0 NC, 1 WBRWA, 2 device, 3 inner NC outer WBRWA.
MAIR_LINUX = 0xF404FF44


@bitfield(words=8)
class Cd(Bitfield):
    """Context descriptor, 64 bytes (5.4)"""

    t0sz: Annotated[int, bits(0, 5, 0)] = 0  #: TTB0 translates addresses of 64 - t0sz bits
    tg0: Annotated[int, bits(0, 7, 6, Tg0)] = 0
    ir0: Annotated[int, bits(0, 9, 8, Rgn)] = 0
    or0: Annotated[int, bits(0, 11, 10, Rgn)] = 0
    sh0: Annotated[int, bits(0, 13, 12, Sh)] = 0
    epd0: Annotated[int, flag(0, 14)] = 0  #: no walks through TTB0
    endi: Annotated[int, flag(0, 15)] = 0
    t1sz: Annotated[int, bits(0, 21, 16)] = 0
    tg1: Annotated[int, bits(0, 23, 22, Tg1)] = 0
    ir1: Annotated[int, bits(0, 25, 24, Rgn)] = 0
    or1: Annotated[int, bits(0, 27, 26, Rgn)] = 0
    sh1: Annotated[int, bits(0, 29, 28, Sh)] = 0
    epd1: Annotated[int, flag(0, 30)] = 0
    v: Annotated[int, flag(0, 31)] = 0
    ips: Annotated[int, bits(0, 34, 32, OutputSize)] = 0
    affd: Annotated[int, flag(0, 35)] = 0  #: a clear access flag is no fault
    wxn: Annotated[int, flag(0, 36)] = 0
    uwxn: Annotated[int, flag(0, 37)] = 0
    tbi0: Annotated[int, flag(0, 38)] = 0
    tbi1: Annotated[int, flag(0, 39)] = 0
    pan: Annotated[int, flag(0, 40)] = 0
    aa64: Annotated[int, flag(0, 41)] = 0
    hd: Annotated[int, flag(0, 42)] = 0
    ha: Annotated[int, flag(0, 43)] = 0
    s: Annotated[int, flag(0, 44)] = 0  #: stall
    r: Annotated[int, flag(0, 45)] = 0  #: record
    a: Annotated[int, flag(0, 46)] = 0  #: abort
    aset: Annotated[int, flag(0, 47)] = 0
    asid: Annotated[int, bits(0, 63, 48)] = 0
    nscfg0: Annotated[int, flag(1, 0)] = 0
    had0: Annotated[int, flag(1, 1)] = 0
    e0pd0: Annotated[int, flag(1, 2)] = 0
    haft: Annotated[int, flag(1, 3)] = 0
    ttb0: Annotated[int, address(1, 51, 4)] = 0
    epan: Annotated[int, flag(1, 59)] = 0
    nscfg1: Annotated[int, flag(2, 0)] = 0
    had1: Annotated[int, flag(2, 1)] = 0
    e0pd1: Annotated[int, flag(2, 2)] = 0
    ttb1: Annotated[int, address(2, 51, 4)] = 0
    ds: Annotated[int, flag(2, 58)] = 0
    mair: Annotated[int, bits(3, 63, 0)] = 0
    amair: Annotated[int, bits(4, 63, 0)] = 0

    @classmethod
    def s1(cls, ttb0: int, *, asid: int, t0sz: int = 16, tg0: int = Tg0.K4, ips: int = OutputSize.BITS_48,
           s: bool = False, httu: bool = False) -> Self:  # fmt: skip
        """A valid CD that uses TTB0 alone, as Linux makes it (arm_smmu_make_s1_cd()). httu: HA and HD."""
        return cls(v=1, aa64=1, r=1, a=1, aset=1, epd1=1, t0sz=t0sz, tg0=tg0, ir0=Rgn.WBWA, or0=Rgn.WBWA, sh0=Sh.ISH,
                   ips=ips, s=s, asid=asid, ttb0=ttb0, mair=MAIR_LINUX, ha=httu, hd=httu)  # fmt: skip


@bitfield(words=1)
class L1Cd(Bitfield):
    """Level 1 context descriptor, 8 bytes (5.3)"""

    v: Annotated[int, flag(0, 0)] = 0
    l2ptr: Annotated[int, address(0, 51, 12)] = 0


# ---- ID registers --------------------------------------------------------------------------------


@bitfield(words=1, width=32)
class Idr0(Bitfield):
    """SMMU_IDR0 (6.3.1)"""

    s2p: Annotated[int, flag(0, 0)] = 0
    s1p: Annotated[int, flag(0, 1)] = 0
    ttf: Annotated[int, bits(0, 3, 2)] = 0  #: 2: AArch64 tables alone
    cohacc: Annotated[int, flag(0, 4)] = 0
    btm: Annotated[int, flag(0, 5)] = 0
    httu: Annotated[int, bits(0, 7, 6)] = 0  #: 1: AF, 2: dirty too, 3: AF of tables too
    dormhint: Annotated[int, flag(0, 8)] = 0
    hyp: Annotated[int, flag(0, 9)] = 0
    ats: Annotated[int, flag(0, 10)] = 0
    ns1ats: Annotated[int, flag(0, 11)] = 0
    asid16: Annotated[int, flag(0, 12)] = 0
    msi: Annotated[int, flag(0, 13)] = 0
    sev: Annotated[int, flag(0, 14)] = 0
    atos: Annotated[int, flag(0, 15)] = 0
    pri: Annotated[int, flag(0, 16)] = 0
    vmw: Annotated[int, flag(0, 17)] = 0
    vmid16: Annotated[int, flag(0, 18)] = 0
    cd2l: Annotated[int, flag(0, 19)] = 0
    vatos: Annotated[int, flag(0, 20)] = 0
    ttendian: Annotated[int, bits(0, 22, 21)] = 0
    atsrecerr: Annotated[int, flag(0, 23)] = 0
    stall_model: Annotated[int, bits(0, 25, 24)] = 0
    term_model: Annotated[int, flag(0, 26)] = 0
    st_level: Annotated[int, bits(0, 28, 27)] = 0


@bitfield(words=1, width=32)
class Idr1(Bitfield):
    """SMMU_IDR1 (6.3.2)"""

    sidsize: Annotated[int, bits(0, 5, 0)] = 0
    ssidsize: Annotated[int, bits(0, 10, 6)] = 0
    priqs: Annotated[int, bits(0, 15, 11)] = 0
    eventqs: Annotated[int, bits(0, 20, 16)] = 0
    cmdqs: Annotated[int, bits(0, 25, 21)] = 0
    attr_perms_ovr: Annotated[int, flag(0, 26)] = 0
    attr_types_ovr: Annotated[int, flag(0, 27)] = 0
    rel: Annotated[int, flag(0, 28)] = 0
    queues_preset: Annotated[int, flag(0, 29)] = 0
    tables_preset: Annotated[int, flag(0, 30)] = 0


@bitfield(words=1, width=32)
class Idr2(Bitfield):
    """SMMU_IDR2 (6.3.3)"""

    ba_vatos: Annotated[int, bits(0, 9, 0)] = 0


@bitfield(words=1, width=32)
class Idr3(Bitfield):
    """SMMU_IDR3 (6.3.4)"""

    had: Annotated[int, flag(0, 2)] = 0
    pbha: Annotated[int, flag(0, 3)] = 0
    xnx: Annotated[int, flag(0, 4)] = 0
    pps: Annotated[int, flag(0, 5)] = 0
    mpam: Annotated[int, flag(0, 7)] = 0
    fwb: Annotated[int, flag(0, 8)] = 0
    stt: Annotated[int, flag(0, 9)] = 0
    ril: Annotated[int, flag(0, 10)] = 0
    bbml: Annotated[int, bits(0, 12, 11)] = 0
    e0pd: Annotated[int, flag(0, 13)] = 0
    ptwnnc: Annotated[int, flag(0, 14)] = 0
    dpt: Annotated[int, flag(0, 15)] = 0


@bitfield(words=1, width=32)
class Idr4(Bitfield):
    """SMMU_IDR4 (6.3.5)"""

    impl_def: Annotated[int, bits(0, 31, 0)] = 0


@bitfield(words=1, width=32)
class Idr5(Bitfield):
    """SMMU_IDR5 (6.3.6)"""

    oas: Annotated[int, bits(0, 2, 0, OutputSize)] = 0
    gran4k: Annotated[int, flag(0, 4)] = 0
    gran16k: Annotated[int, flag(0, 5)] = 0
    gran64k: Annotated[int, flag(0, 6)] = 0
    ds: Annotated[int, flag(0, 7)] = 0
    vax: Annotated[int, bits(0, 11, 10)] = 0  #: 1: virtual addresses of 52 bits
    stall_max: Annotated[int, bits(0, 31, 16)] = 0


IDRS: tuple[type[Bitfield], ...] = (Idr0, Idr1, Idr2, Idr3, Idr4, Idr5)  #: in the order of iommu_hw_info_arm_smmuv3.idr
