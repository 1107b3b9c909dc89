"""Room uapi (mirrors Arm IHI0070, chapters 4 and 7.3): SMMUv3's commands and event records, as bits.

    Cmd.tlbi_nh_va(asid=5, va=0x1000).pack()     # an entry of IOMMU_VIOMMU_INVALIDATE_DATA_ARM_SMMUV3
    print(Event.decode(record))                  # F_TRANSLATION sid=0x10 rnw class=IN addr=0x1000

All names are there in `iommufd_uapi.smmuv3` too.
"""

from enum import IntEnum
from typing import Annotated

from .bits import Bitfield, BytesLike, address, bitfield, bits, flag

# ---- commands ------------------------------------------------------------------------------------


class Op(IntEnum):
    """Opcodes of commands (4.1.3)"""

    PREFETCH_CONFIG = 0x01
    PREFETCH_ADDR = 0x02
    CFGI_STE = 0x03
    CFGI_ALL = 0x04  #: CFGI_STE_RANGE with the range of all
    CFGI_CD = 0x05
    CFGI_CD_ALL = 0x06
    TLBI_NH_ALL = 0x10
    TLBI_NH_ASID = 0x11
    TLBI_NH_VA = 0x12
    TLBI_NH_VAA = 0x13
    TLBI_EL2_ALL = 0x20
    TLBI_EL2_ASID = 0x21
    TLBI_EL2_VA = 0x22
    TLBI_EL2_VAA = 0x23
    TLBI_S12_VMALL = 0x28
    TLBI_S2_IPA = 0x2A
    TLBI_NSNH_ALL = 0x30
    ATC_INV = 0x40
    PRI_RESP = 0x41
    RESUME = 0x44
    SYNC = 0x46


class PriResp(IntEnum):
    """CMD_PRI_RESP.Resp"""

    DENY = 0
    FAIL = 1
    SUCCESS = 2


class Resume(IntEnum):
    """CMD_RESUME: Ac and Ab together"""

    TERM = 0
    RETRY = 1
    ABORT = 2


CFGI_RANGE_ALL = 31
ATC_INV_SIZE_ALL = 52


@bitfield(words=2)
class Command(Bitfield):
    """A command, 16 bytes: what all have, and all that is known of one without a class"""

    op: Annotated[int, bits(0, 7, 0, Op)] = 0

    def __str__(self) -> str:
        """``TLBI_NH_VA asid=5 leaf addr=0x1000``"""
        name = Op(self.op).name if self.op in set(Op) else f"command {self.op:#x}"
        return " ".join([name, *self.shown(but=("op",))])


@bitfield(words=2)
class Prefetch(Command):
    """CMD_PREFETCH_* (4.2)"""

    ssv: Annotated[int, flag(0, 11)] = 0
    ssid: Annotated[int, bits(0, 31, 12)] = 0
    sid: Annotated[int, bits(0, 63, 32)] = 0
    size: Annotated[int, bits(1, 4, 0)] = 0
    addr: Annotated[int, address(1, 63, 12)] = 0


@bitfield(words=2)
class Cfgi(Command):
    """CMD_CFGI_* (4.3)"""

    ssid: Annotated[int, bits(0, 31, 12)] = 0
    sid: Annotated[int, bits(0, 63, 32)] = 0
    leaf: Annotated[int, flag(1, 0)] = 0  #: the entry alone, and no table above it


@bitfield(words=2)
class CfgiAll(Command):
    """CMD_CFGI_STE_RANGE (4.3.2), and CMD_CFGI_ALL, which is its largest range"""

    sid: Annotated[int, bits(0, 63, 32)] = 0
    range: Annotated[int, bits(1, 4, 0)] = 0  #: log2(streams) - 1


@bitfield(words=2)
class Tlbi(Command):
    """CMD_TLBI_* (4.4). num, scale, ttl and tg make it a range (IDR3.RIL)."""

    num: Annotated[int, bits(0, 16, 12)] = 0
    scale: Annotated[int, bits(0, 24, 20)] = 0
    vmid: Annotated[int, bits(0, 47, 32)] = 0
    asid: Annotated[int, bits(0, 63, 48)] = 0
    leaf: Annotated[int, flag(1, 0)] = 0
    ttl: Annotated[int, bits(1, 9, 8)] = 0
    tg: Annotated[int, bits(1, 11, 10)] = 0
    addr: Annotated[int, address(1, 63, 12)] = 0

    @property
    def span(self) -> tuple[int, int] | None:
        """First and last address of a range of (num + 1) * 2^scale granules; None if tg says that it is no range."""
        if not self.tg:
            return None
        granule = 10 + 2 * self.tg
        return self.addr, self.addr + ((self.num + 1 << self.scale) << granule) - 1


@bitfield(words=2)
class AtcInv(Command):
    """CMD_ATC_INV (4.5.1): 2^size pages of 4 KiB, naturally aligned"""

    global_: Annotated[int, flag(0, 9)] = 0
    ssv: Annotated[int, flag(0, 11)] = 0
    ssid: Annotated[int, bits(0, 31, 12)] = 0
    sid: Annotated[int, bits(0, 63, 32)] = 0
    size: Annotated[int, bits(1, 5, 0)] = 0
    addr: Annotated[int, address(1, 63, 12)] = 0


@bitfield(words=2)
class PriResponse(Command):
    """CMD_PRI_RESP (4.5.2)"""

    ssv: Annotated[int, flag(0, 11)] = 0
    ssid: Annotated[int, bits(0, 31, 12)] = 0
    sid: Annotated[int, bits(0, 63, 32)] = 0
    prgindex: Annotated[int, bits(1, 8, 0)] = 0
    resp: Annotated[int, bits(1, 13, 12, PriResp)] = 0


@bitfield(words=2)
class ResumeCommand(Command):
    """CMD_RESUME (4.6.1)"""

    resp: Annotated[int, bits(0, 13, 12, Resume)] = 0
    sid: Annotated[int, bits(0, 63, 32)] = 0
    stag: Annotated[int, bits(1, 15, 0)] = 0


@bitfield(words=2)
class Sync(Command):
    """CMD_SYNC (4.7.3)"""

    cs: Annotated[int, bits(0, 13, 12)] = 0
    msh: Annotated[int, bits(0, 23, 22)] = 0
    msiattr: Annotated[int, bits(0, 27, 24)] = 0
    msidata: Annotated[int, bits(0, 63, 32)] = 0
    msiaddress: Annotated[int, address(1, 51, 2)] = 0


_COMMANDS: dict[int, type[Command]] = {
    **dict.fromkeys((Op.PREFETCH_CONFIG, Op.PREFETCH_ADDR), Prefetch),
    **dict.fromkeys((Op.CFGI_STE, Op.CFGI_CD, Op.CFGI_CD_ALL), Cfgi),
    Op.CFGI_ALL: CfgiAll,
    **dict.fromkeys((op for op in Op if op.name.startswith("TLBI_")), Tlbi),
    Op.ATC_INV: AtcInv,
    Op.PRI_RESP: PriResponse,
    Op.RESUME: ResumeCommand,
    Op.SYNC: Sync,
}


class Cmd:
    """Builders of commands, and their decoder. Addresses are cut to the pages they lie in."""

    @staticmethod
    def decode(data: BytesLike) -> Command:
        """The command in 16 bytes, of the class for its opcode; struct.error if there are fewer."""
        return _COMMANDS.get(data[0] if data else 0, Command).unpack(data)

    @staticmethod
    def cfgi_ste(sid: int, *, leaf: bool = True) -> Cfgi:
        """Forget an STE, and the CDs found through it."""
        return Cfgi(op=Op.CFGI_STE, sid=sid, leaf=leaf)

    @staticmethod
    def cfgi_all() -> CfgiAll:
        """Forget all STEs and CDs."""
        return CfgiAll(op=Op.CFGI_ALL, range=CFGI_RANGE_ALL)

    @staticmethod
    def cfgi_cd(sid: int, ssid: int = 0, *, leaf: bool = True) -> Cfgi:
        """Forget a CD."""
        return Cfgi(op=Op.CFGI_CD, sid=sid, ssid=ssid, leaf=leaf)

    @staticmethod
    def cfgi_cd_all(sid: int) -> Cfgi:
        """Forget all CDs of a stream."""
        return Cfgi(op=Op.CFGI_CD_ALL, sid=sid)

    @staticmethod
    def tlbi_nsnh_all() -> Tlbi:
        """Forget all translations of EL1; a guest's are only its own."""
        return Tlbi(op=Op.TLBI_NSNH_ALL)

    @staticmethod
    def tlbi_nh_all(vmid: int = 0) -> Tlbi:
        """Forget a VMID's first stages. In a guest's commands the VMID is the host's to fill in."""
        return Tlbi(op=Op.TLBI_NH_ALL, vmid=vmid)

    @staticmethod
    def tlbi_nh_asid(asid: int, vmid: int = 0) -> Tlbi:
        """Forget an ASID, global translations excepted."""
        return Tlbi(op=Op.TLBI_NH_ASID, asid=asid, vmid=vmid)

    @staticmethod
    def tlbi_nh_va(
        asid: int, va: int, *, leaf: bool = True, vmid: int = 0, num: int = 0, scale: int = 0, ttl: int = 0, tg: int = 0
    ) -> Tlbi:
        """Forget what translates va; with tg, what translates (num + 1) * 2^scale granules from va on."""
        return Tlbi(op=Op.TLBI_NH_VA, asid=asid, vmid=vmid, leaf=leaf, addr=va & -4096, num=num, scale=scale, ttl=ttl,
                    tg=tg)  # fmt: skip

    @staticmethod
    def tlbi_nh_vaa(
        va: int, *, leaf: bool = True, vmid: int = 0, num: int = 0, scale: int = 0, ttl: int = 0, tg: int = 0
    ) -> Tlbi:
        """As tlbi_nh_va(), for all ASIDs."""
        return Tlbi(op=Op.TLBI_NH_VAA, vmid=vmid, leaf=leaf, addr=va & -4096, num=num, scale=scale, ttl=ttl, tg=tg)

    @staticmethod
    def tlbi_s12_vmall(vmid: int) -> Tlbi:
        """Forget both stages of a VMID."""
        return Tlbi(op=Op.TLBI_S12_VMALL, vmid=vmid)

    @staticmethod
    def tlbi_s2_ipa(vmid: int, ipa: int, *, leaf: bool = True) -> Tlbi:
        """Forget what stage 2 has for an IPA."""
        return Tlbi(op=Op.TLBI_S2_IPA, vmid=vmid, leaf=leaf, addr=ipa & -4096)

    @staticmethod
    def atc_inv(sid: int, addr: int = 0, size: int = ATC_INV_SIZE_ALL, *, ssid: int | None = None) -> AtcInv:
        """Forget 2^size pages in the device's own cache; all by default."""
        return AtcInv(op=Op.ATC_INV, sid=sid, ssv=ssid is not None, ssid=ssid or 0, size=size, addr=addr & -4096)

    @staticmethod
    def pri_resp(sid: int, prgindex: int, resp: int = PriResp.SUCCESS, *, ssid: int | None = None) -> PriResponse:
        """Answer a page request group."""
        return PriResponse(op=Op.PRI_RESP, sid=sid, ssv=ssid is not None, ssid=ssid or 0, prgindex=prgindex, resp=resp)

    @staticmethod
    def resume(sid: int, stag: int, resp: int = Resume.RETRY) -> ResumeCommand:
        """What becomes of a stalled transaction."""
        return ResumeCommand(op=Op.RESUME, sid=sid, stag=stag, resp=resp)

    @staticmethod
    def sync() -> Sync:
        """Wait for the commands before; nobody is told (CS is SIG_NONE)."""
        return Sync(op=Op.SYNC)


# ---- event records -------------------------------------------------------------------------------


class EventId(IntEnum):
    """Event numbers (7.3)"""

    F_UUT = 0x01
    C_BAD_STREAMID = 0x02
    F_STE_FETCH = 0x03
    C_BAD_STE = 0x04
    F_BAD_ATS_TREQ = 0x05
    F_STREAM_DISABLED = 0x06
    F_TRANSL_FORBIDDEN = 0x07
    C_BAD_SUBSTREAMID = 0x08
    F_CD_FETCH = 0x09
    C_BAD_CD = 0x0A
    F_WALK_EABT = 0x0B
    F_TRANSLATION = 0x10
    F_ADDR_SIZE = 0x11
    F_ACCESS = 0x12
    F_PERMISSION = 0x13
    F_TLB_CONFLICT = 0x20
    F_CFG_CONFLICT = 0x21
    E_PAGE_REQUEST = 0x24
    F_VMS_FETCH = 0x25


class Class(IntEnum):
    """CLASS of an event: what the SMMU did when it stopped"""

    CD = 0
    TT = 1
    IN = 2


@bitfield(words=4)
class EventRecord(Bitfield):
    """An event record, 32 bytes: what all have, and all that C_BAD_* and F_STREAM_DISABLED have"""

    id: Annotated[int, bits(0, 7, 0, EventId)] = 0
    ssv: Annotated[int, flag(0, 11)] = 0
    ssid: Annotated[int, bits(0, 31, 12)] = 0
    sid: Annotated[int, bits(0, 63, 32)] = 0

    def __str__(self) -> str:
        """``F_TRANSLATION sid=0x10 rnw class=IN addr=0x1000``"""
        name = EventId(self.id).name if self.id in set(EventId) else f"event {self.id:#x}"
        return " ".join([name, *self.shown(but=("id",))])


@bitfield(words=4)
class FetchEvent(EventRecord):
    """F_STE_FETCH, F_CD_FETCH, F_VMS_FETCH"""

    reason: Annotated[int, bits(1, 15, 0)] = 0
    fetchaddr: Annotated[int, address(3, 51, 3)] = 0


@bitfield(words=4)
class AtsEvent(EventRecord):
    """F_BAD_ATS_TREQ, F_TRANSL_FORBIDDEN"""

    rnw: Annotated[int, flag(1, 35)] = 0  #: of F_TRANSL_FORBIDDEN
    addr: Annotated[int, bits(2, 63, 0)] = 0


@bitfield(words=4)
class FaultEvent(EventRecord):
    """F_TRANSLATION, F_ADDR_SIZE, F_ACCESS, F_PERMISSION (7.3.13 to 7.3.16)"""

    stag: Annotated[int, bits(1, 15, 0)] = 0
    stall: Annotated[int, flag(1, 31)] = 0
    pnu: Annotated[int, flag(1, 33)] = 0  #: privileged
    ind: Annotated[int, flag(1, 34)] = 0  #: instruction
    rnw: Annotated[int, flag(1, 35)] = 0  #: read
    nsipa: Annotated[int, flag(1, 36)] = 0
    s2: Annotated[int, flag(1, 39)] = 0
    class_: Annotated[int, bits(1, 41, 40, Class)] = 0
    ttrnw: Annotated[int, flag(1, 44)] = 0
    addr: Annotated[int, bits(2, 63, 0)] = 0
    ipa: Annotated[int, address(3, 51, 12)] = 0


@bitfield(words=4)
class WalkEvent(EventRecord):
    """F_WALK_EABT (7.3.12)"""

    reason: Annotated[int, bits(1, 15, 0)] = 0
    pnu: Annotated[int, flag(1, 33)] = 0
    ind: Annotated[int, flag(1, 34)] = 0
    rnw: Annotated[int, flag(1, 35)] = 0
    nsipa: Annotated[int, flag(1, 36)] = 0
    s2: Annotated[int, flag(1, 39)] = 0
    class_: Annotated[int, bits(1, 41, 40, Class)] = 0
    ttrnw: Annotated[int, flag(1, 44)] = 0
    addr: Annotated[int, bits(2, 63, 0)] = 0
    fetchaddr: Annotated[int, address(3, 51, 3)] = 0


_EVENTS: dict[int, type[EventRecord]] = {
    **dict.fromkeys((EventId.F_STE_FETCH, EventId.F_CD_FETCH, EventId.F_VMS_FETCH), FetchEvent),
    **dict.fromkeys((EventId.F_BAD_ATS_TREQ, EventId.F_TRANSL_FORBIDDEN), AtsEvent),
    **dict.fromkeys((EventId.F_TRANSLATION, EventId.F_ADDR_SIZE, EventId.F_ACCESS, EventId.F_PERMISSION), FaultEvent),
    EventId.F_WALK_EABT: WalkEvent,
}


class Event:
    """The decoder of event records: build one with its class."""

    @staticmethod
    def decode(data: BytesLike) -> EventRecord:
        """The record in 32 bytes, of the class for its number; struct.error if there are fewer."""
        return _EVENTS.get(data[0] if data else 0, EventRecord).unpack(data)
