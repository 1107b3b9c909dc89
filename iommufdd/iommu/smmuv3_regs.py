"""What SMMUv3 hardware says of itself and of faults: IDR0 to IDR5 (IHI0070 6.3) and event records (7.3)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from iommufd_uapi.smmuv3 import (
    AtsEvent,
    Class,
    EventId,
    EventRecord,
    FaultEvent,
    FetchEvent,
    Idr0,
    Idr1,
    Idr3,
    Idr5,
    OutputSize,
    WalkEvent,
    output_bits,
)

from .walk import EXEC, PRIV, WRITE, During, TranslationFault, Why

if TYPE_CHECKING:
    from iommufdd.description import SmmuV3Iommu

AIDR = 2  # SMMUv3.2
QUEUE_SIZE = 19  # log2 of the entries of its queues
STALLS = 512  # transactions that can be stalled
_HTTU = {"none": 0, "access": 1, "dirty": 2}
_STALL_MODEL = {"supported": 0, "none": 1, "forced": 2}
ADDRESS, PAGE = 0x000F_FFFF_FFFF_FFF8, 0x000F_FFFF_FFFF_F000
NONE = 0  # no event: the transaction is aborted in silence


def idr(d: SmmuV3Iommu) -> tuple[int, int, int, int, int, int]:
    """IDR0 to IDR5."""
    idr0 = Idr0(
        s2p=d.stage2, s1p=d.stage1, ttf=2, cohacc=d.coherent_walk, httu=_HTTU[d.httu], ats=d.ats,
        asid16=d.asid_bits == 16, msi=1, pri=d.page_requests, vmid16=d.vmid_bits == 16, cd2l=d.two_level_cd,
        ttendian=2, stall_model=_STALL_MODEL[d.stall], term_model=1, st_level=d.two_level_streams,
    )  # fmt: skip
    idr1 = Idr1(sidsize=d.sid_bits, ssidsize=d.ssid_bits, priqs=QUEUE_SIZE * d.page_requests, eventqs=QUEUE_SIZE,
                cmdqs=QUEUE_SIZE, attr_types_ovr=1)  # fmt: skip
    idr3 = Idr3(fwb=d.s2fwb, ril=d.range_invalidation)
    idr5 = Idr5(oas=size_field(d.oas), gran4k=4 in d.granules, gran16k=16 in d.granules, gran64k=64 in d.granules,
                vax=d.vax == 52, stall_max=STALLS if d.stall != "none" else 0)  # fmt: skip
    return idr0.words()[0], idr1.words()[0], 0, idr3.words()[0], 0, idr5.words()[0]


def size_field(bits: int) -> int:
    """The value of OAS, IPS or S2PS for an address size."""
    return next(size for size in OutputSize if output_bits(size) == bits)


TEXT: dict[int, str] = {
    NONE: "the stream is set to abort",
    EventId.C_BAD_STREAMID: "there is no such stream",
    EventId.F_STE_FETCH: "the STE cannot be read",
    EventId.C_BAD_STE: "the STE is invalid",
    EventId.F_BAD_ATS_TREQ: "the STE does not allow translation requests (ATS)",
    EventId.F_STREAM_DISABLED: "the STE disables this kind of request",
    EventId.F_TRANSL_FORBIDDEN: "the STE does not allow translated requests (ATS)",
    EventId.C_BAD_SUBSTREAMID: "the stream has no such substream",
    EventId.F_CD_FETCH: "the CD cannot be read",
    EventId.C_BAD_CD: "the CD is invalid",
    EventId.F_WALK_EABT: "a translation table cannot be read",
    EventId.F_TRANSLATION: "no translation",
    EventId.F_ADDR_SIZE: "an output address is too large",
    EventId.F_ACCESS: "the access flag is clear",
    EventId.F_PERMISSION: "no permission",
}

TRANSLATION_RELATED = frozenset((EventId.F_TRANSLATION, EventId.F_ADDR_SIZE, EventId.F_ACCESS, EventId.F_PERMISSION))
"""Events that can stall, and that a translation request (ATS) answers with no permission."""

RELAYED = TRANSLATION_RELATED | {
    EventId.C_BAD_STE, EventId.F_STREAM_DISABLED, EventId.C_BAD_SUBSTREAMID, EventId.C_BAD_CD
}  # fmt: skip
"""Events that arm_smmu_handle_event() knows; the others stay in the host's log."""

_EVENT = {
    Why.NOT_PRESENT: EventId.F_TRANSLATION,
    Why.ADDRESS_SIZE: EventId.F_TRANSLATION,
    Why.CANONICAL: EventId.F_TRANSLATION,
    Why.RESERVED: EventId.F_TRANSLATION,
    Why.OUTPUT_SIZE: EventId.F_ADDR_SIZE,
    Why.ACCESS_FLAG: EventId.F_ACCESS,
    Why.READ: EventId.F_PERMISSION,
    Why.WRITE: EventId.F_PERMISSION,
    Why.EXECUTE: EventId.F_PERMISSION,
    Why.USER: EventId.F_PERMISSION,
    Why.UNREADABLE: EventId.F_WALK_EABT,
}
_CLASS = {During.CONTEXT: Class.CD, During.WALK: Class.TT, During.UPDATE: Class.TT, During.ACCESS: Class.IN}


def event(fault: TranslationFault) -> EventId:
    """The event of a walk that stopped."""
    return _EVENT[fault.why]


def refusal(code: int, addr: int = 0) -> TranslationFault:
    """A request that finds no translation tables; addr: of the structure that cannot be read."""
    fault = TranslationFault(Why.BLOCKED if code == NONE else Why.CONTEXT, stage=0, level=0, addr=addr)
    fault.code, fault.name = code, TEXT[code]
    return fault


def record(
    fault: TranslationFault, sid: int, ssid: int | None, iova: int, access: int, stag: int | None = None
) -> EventRecord:
    """The event record of a fault; stag: the transaction is stalled under this tag."""
    code = fault.code
    if code == EventId.F_STREAM_DISABLED:
        return EventRecord(id=code, sid=sid)
    if code == EventId.C_BAD_SUBSTREAMID:
        return EventRecord(id=code, sid=sid, ssid=ssid or 0)  # which needs no SSV (7.3.9)
    if code == EventId.F_BAD_ATS_TREQ:
        return AtsEvent(id=code, sid=sid, ssv=ssid is not None, ssid=ssid or 0, addr=iova & -4096)
    if code in (EventId.F_CD_FETCH, EventId.F_STE_FETCH):
        return FetchEvent(id=code, sid=sid, ssv=ssid is not None, ssid=ssid or 0, fetchaddr=fault.addr & ADDRESS)
    if code == EventId.F_WALK_EABT:
        return WalkEvent(id=code, sid=sid, ssv=ssid is not None, ssid=ssid or 0, pnu=bool(access & PRIV),
                         ind=_instruction(access), rnw=not access & WRITE, s2=fault.stage == 2, class_=Class.TT,
                         addr=iova, fetchaddr=fault.addr & ADDRESS)  # fmt: skip
    if code not in TRANSLATION_RELATED:
        return EventRecord(id=code, sid=sid, ssv=ssid is not None, ssid=ssid or 0)
    second = fault.stage == 2
    return FaultEvent(
        id=code, sid=sid, ssv=ssid is not None, ssid=ssid or 0, stag=stag or 0, stall=stag is not None,
        pnu=bool(access & PRIV), ind=_instruction(access), rnw=not access & WRITE, s2=second,
        class_=_CLASS[fault.during], ttrnw=second and fault.during is During.WALK, addr=iova,
        ipa=fault.addr & PAGE if second else 0,
    )  # fmt: skip


def _instruction(access: int) -> bool:
    """InD, which no write has."""
    return bool(access & EXEC) and not access & WRITE
