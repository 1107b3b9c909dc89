"""What VT-d hardware says of itself and of faults: CAP, ECAP (VT-d spec 11.4.2, 11.4.3) and fault reasons (7.1.3)."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

from .walk import During, TranslationFault, Why

if TYPE_CHECKING:
    from iommufdd.description import VtdIommu

_SAGAW = {3: 1 << 1, 4: 1 << 2, 5: 1 << 3}


def cap(d: VtdIommu) -> int:
    """The capability register."""
    nd = (d.domain_ids.bit_length() - 1 - 4) // 2
    return (
        nd | d.caching_mode << 7 | sum(_SAGAW[n] for n in set(d.levels)) << 8 | (d.mgaw - 1) << 16 | 1 << 22
        | 0x40 << 24 | d.pages_2m << 34 | d.pages_1g << 35 | d.page_selective << 39 | 7 << 40 | d.mamv << 48
        | 1 << 54 | 1 << 55 | (d.first_stage and d.pages_1g) << 56 | (d.first_stage and 5 in d.levels) << 60
    )  # fmt: skip


def ecap(d: VtdIommu) -> int:
    """The extended capability register."""
    pasid = d.pasid_width > 0
    return (
        d.coherent_walk | 1 << 1 | d.device_tlb << 2 | 1 << 6 | d.snoop_control << 7 | 0x50 << 8 | d.nested << 26
        | d.page_requests << 29 | d.execute << 30 | d.supervisor << 31 | d.extended_access << 34
        | (d.pasid_width - 1 if pasid else 0) << 35 | pasid << 40 | d.page_requests << 42 | 1 << 43
        | d.access_dirty << 45 | d.second_stage << 46 | d.first_stage << 47 | d.coherent_walk << 48
    )  # fmt: skip


class Reason(enum.IntEnum):
    """Scalable-mode fault reasons that a DMA can raise; text as in the specification's table."""

    PASID_DISABLED = 0x45
    PASID_TOO_LARGE = 0x46
    DIRECTORY_NOT_PRESENT = 0x51
    PASID_NOT_PRESENT = 0x59
    PASID_RESERVED = 0x5A
    PASID_INVALID = 0x5B
    NO_EXECUTE_REQUESTS = 0x5C
    NO_SUPERVISOR_REQUESTS = 0x5D
    FS_ACCESS = 0x70
    FS_NOT_PRESENT = 0x71
    FS_RESERVED = 0x72
    FS_ROOT_ACCESS = 0x73
    NESTED_BEYOND = 0x74
    NESTED_ROOT_READ = 0x75
    NESTED_READ = 0x76
    NESTED_WRITE = 0x77
    SS_ACCESS = 0x78
    SS_PERMISSION = 0x79
    SS_RESERVED = 0x7A
    SS_ROOT = 0x7B
    SS_NO_SNOOP = 0x7C
    NOT_CANONICAL = 0x80
    FS_USER = 0x81
    FS_EXECUTE = 0x82
    BEYOND_HARDWARE = 0x83
    SS_BEYOND = 0x84
    FS_WRITE = 0x85
    INTERRUPT = 0x87
    FS_NO_SNOOP = 0x90


TEXT = {
    Reason.PASID_DISABLED: "PASID enable is clear in the context entry",
    Reason.PASID_TOO_LARGE: "the PASID is beyond the context entry's directory",
    Reason.DIRECTORY_NOT_PRESENT: "the PASID directory entry is not present",
    Reason.PASID_NOT_PRESENT: "the PASID table entry is not present",
    Reason.PASID_RESERVED: "a reserved field of the PASID table entry is set",
    Reason.PASID_INVALID: "the PASID table entry is invalid",
    Reason.NO_EXECUTE_REQUESTS: "ERE is clear in the PASID table entry",
    Reason.NO_SUPERVISOR_REQUESTS: "SRE is clear in the PASID table entry",
    Reason.FS_ACCESS: "a first-stage entry cannot be read",
    Reason.FS_NOT_PRESENT: "a first-stage entry is not present",
    Reason.FS_RESERVED: "a reserved field of a first-stage entry is set",
    Reason.FS_ROOT_ACCESS: "the first-stage root table cannot be read",
    Reason.NESTED_BEYOND: "a first-stage entry's address is beyond the guest address width",
    Reason.NESTED_ROOT_READ: "no second-stage read permission for the first-stage root table",
    Reason.NESTED_READ: "no second-stage read permission for a first-stage table",
    Reason.NESTED_WRITE: "no second-stage write permission to set A or D in a first-stage entry",
    Reason.SS_ACCESS: "a second-stage entry cannot be read",
    Reason.SS_PERMISSION: "no read or write permission in a second-stage entry",
    Reason.SS_RESERVED: "a reserved field of a second-stage entry is set",
    Reason.SS_ROOT: "the second-stage table pointer is invalid",
    Reason.SS_NO_SNOOP: "a second-stage A or D bit must be set and page walks do not snoop",
    Reason.NOT_CANONICAL: "the address is not canonical",
    Reason.FS_USER: "a user request for a supervisor page",
    Reason.FS_EXECUTE: "no execute permission",
    Reason.BEYOND_HARDWARE: "the address is beyond what the hardware supports",
    Reason.SS_BEYOND: "the address is beyond the second stage's width",
    Reason.FS_WRITE: "no write permission in a first-stage entry",
    Reason.INTERRUPT: "the interrupt address range is no memory",
    Reason.FS_NO_SNOOP: "a first-stage A or D bit must be set and page walks do not snoop",
}

_FIRST = {
    Why.NOT_PRESENT: Reason.FS_NOT_PRESENT,
    Why.RESERVED: Reason.FS_RESERVED,
    Why.USER: Reason.FS_USER,
    Why.WRITE: Reason.FS_WRITE,
    Why.EXECUTE: Reason.FS_EXECUTE,
    Why.CANONICAL: Reason.NOT_CANONICAL,
    Why.UNREADABLE: Reason.FS_ACCESS,
    Why.ACCESS_FLAG: Reason.FS_NO_SNOOP,
}
_SECOND = {
    Why.NOT_PRESENT: Reason.SS_PERMISSION,
    Why.READ: Reason.SS_PERMISSION,
    Why.WRITE: Reason.SS_PERMISSION,
    Why.RESERVED: Reason.SS_RESERVED,
    Why.UNREADABLE: Reason.SS_ACCESS,
    Why.ADDRESS_SIZE: Reason.SS_BEYOND,
    Why.ACCESS_FLAG: Reason.SS_NO_SNOOP,
}


def reason(fault: TranslationFault, *, nested: bool, levels: int) -> Reason:
    """The fault reason of a walk that stopped; levels: of the first stage."""
    if fault.why is Why.INTERRUPT:
        return Reason.INTERRUPT
    if fault.stage == 1:
        if fault.why is Why.UNREADABLE and fault.level == levels:
            return Reason.FS_ROOT_ACCESS
        return _FIRST[fault.why]
    if nested and fault.why is Why.ADDRESS_SIZE:
        return Reason.NESTED_BEYOND
    if fault.during is During.WALK:
        return Reason.NESTED_ROOT_READ if fault.level == levels else Reason.NESTED_READ
    if fault.during is During.UPDATE:
        return Reason.NESTED_WRITE
    return _SECOND[fault.why]


RECOVERABLE = frozenset(
    (
        Reason.FS_NOT_PRESENT,
        Reason.NESTED_ROOT_READ,
        Reason.NESTED_READ,
        Reason.NESTED_WRITE,
        Reason.SS_PERMISSION,
        Reason.FS_USER,
        Reason.FS_EXECUTE,
        Reason.FS_WRITE,
        Reason.NOT_CANONICAL,
        Reason.SS_BEYOND,
        Reason.NESTED_BEYOND,
    )
)
"""Reasons that a translation request answers with no permission, so that a device may ask for the page (spec 7.1.3)."""
