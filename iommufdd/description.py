"""What a machine is made of: its IOMMUs and the devices behind them, as a machine file (TOML) describes them.

Keys are spelt with dashes, as here with underscores. What a machine file may say besides: machine_file.py (text as
"2M" for the numbers of Reserved) and machine_rules.py (what must fit together).
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

import msgspec

Bits: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=64)]
Iova: TypeAlias = Annotated[int, msgspec.Meta(ge=0)]
Name: TypeAlias = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.:-]{0,30}\Z")]
CacheMode: TypeAlias = Literal["faithful", "greedy", "off"]


class _Description(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="kebab"):
    """What all tables of a machine file share: unknown keys are errors."""


class Reserved(_Description, frozen=True):
    """IOVA that devices cannot use for DMA (struct iommu_resv_region): [start, last]."""

    start: Iova
    last: Iova
    kind: Literal["direct-relaxable", "reserved", "msi", "sw-msi"] = "reserved"


class Caches(_Description, frozen=True):
    """How an IOMMU caches: faithful keeps, and evicts by the seed when full; greedy never evicts; off."""

    mode: CacheMode = "faithful"
    iotlb_entries: Annotated[int, msgspec.Meta(ge=1, le=1 << 24)] = 4096
    seed: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)] = 0


class Iommu(_Description, frozen=True, tag_field="model"):
    """An IOMMU; the model decides which further keys there are."""

    name: Name
    reserved: tuple[Reserved, ...] = ()
    caches: Caches = Caches()
    replace: Literal["one-store", "vendor"] = "one-store"  # vendor: the driver's own order of stores, with its windows


class VtdIommu(Iommu, frozen=True, tag="vtd"):
    """Intel VT-d in scalable mode: what CAP and ECAP show (VT-d spec 11.4.2, 11.4.3)."""

    first_stage: bool = True  # ECAP.FLTS
    second_stage: bool = True  # ECAP.SLTS
    nested: bool = True  # ECAP.NEST
    levels: tuple[Literal[3, 4, 5], ...] = (4, 5)  # of second-stage tables: CAP.SAGAW; 5 also sets CAP.FL5LP
    mgaw: Annotated[int, msgspec.Meta(ge=30, le=57)] = 57  # CAP.MGAW: guest address width in bits
    haw: Annotated[int, msgspec.Meta(ge=32, le=52)] = 52  # host address width: more bits set in an entry are reserved
    pages_2m: bool = True  # CAP.SLLPS bit 0
    pages_1g: bool = True  # CAP.SLLPS bit 1, CAP.FS1GP
    domain_ids: Annotated[int, msgspec.Meta(ge=16, le=65536)] = 65536  # CAP.ND
    pasid_width: Annotated[int, msgspec.Meta(ge=0, le=20)] = 20  # ECAP.PSS + 1, and ECAP.PASID; 0: none
    page_requests: bool = True  # ECAP.PRS
    device_tlb: bool = True  # ECAP.DT
    access_dirty: bool = True  # ECAP.SLADS: dirty tracking
    coherent_walk: bool = True  # ECAP.SMPWC
    snoop_control: bool = True  # ECAP.SC
    supervisor: bool = True  # ECAP.SRS
    execute: bool = False  # ECAP.ERS
    extended_access: bool = True  # ECAP.EAFS
    caching_mode: bool = False  # CAP.CM
    page_selective: bool = True  # CAP.PSI
    mamv: Annotated[int, msgspec.Meta(ge=0, le=63)] = 18  # CAP.MAMV
    erratum_772415: bool = False  # IOMMU_HW_INFO_VTD_ERRATA_772415_SPR17
    reserved: tuple[Reserved, ...] = (Reserved(start=0xFEE00000, last=0xFEEFFFFF, kind="msi"),)


class SmmuV3Iommu(Iommu, frozen=True, tag="smmuv3"):
    """ARM SMMUv3 with AArch64 tables: what IDR0, IDR1, IDR3 and IDR5 show (IHI0070 6.3)."""

    stage1: bool = True  # IDR0.S1P
    stage2: bool = True  # IDR0.S2P
    coherent_walk: bool = True  # IDR0.COHACC
    httu: Literal["none", "access", "dirty"] = "dirty"  # IDR0.HTTU: which flags the hardware sets in descriptors
    ats: bool = True  # IDR0.ATS
    page_requests: bool = True  # IDR0.PRI; the driver denies them all
    asid_bits: Literal[8, 16] = 16  # IDR0.ASID16
    vmid_bits: Literal[8, 16] = 16  # IDR0.VMID16
    two_level_cd: bool = True  # IDR0.CD2L
    two_level_streams: bool = True  # IDR0.ST_LEVEL
    stall: Literal["supported", "none", "forced"] = "supported"  # IDR0.STALL_MODEL
    sid_bits: Annotated[int, msgspec.Meta(ge=0, le=32)] = 16  # IDR1.SIDSIZE
    ssid_bits: Annotated[int, msgspec.Meta(ge=0, le=20)] = 20  # IDR1.SSIDSIZE
    s2fwb: bool = True  # IDR3.FWB: stage 2 can force write-back
    range_invalidation: bool = True  # IDR3.RIL
    granules: tuple[Literal[4, 16, 64], ...] = (4, 16, 64)  # IDR5.GRAN4K, GRAN16K, GRAN64K: KiB
    oas: Literal[32, 36, 40, 42, 44, 48, 52] = 48  # IDR5.OAS: output address size in bits
    vax: Literal[48, 52] = 48  # IDR5.VAX: virtual address size in bits
    cmdqv: bool = False  # a Tegra241 CMDQV beside it
    vintfs_log2: Annotated[int, msgspec.Meta(ge=0, le=6)] = 6  # its PARAM.NUM_VINTF_LOG2; VINTF 0 is the host's
    vcmdqs_log2: Annotated[int, msgspec.Meta(ge=0, le=7)] = 7  # its PARAM.NUM_VCMDQ_LOG2: of all VINTFs together
    vintf_sids_log2: Annotated[int, msgspec.Meta(ge=0, le=4)] = 4  # its PARAM.NUM_SID_PER_VM_LOG2
    reserved: tuple[Reserved, ...] = (Reserved(start=0x0800_0000, last=0x080F_FFFF, kind="sw-msi"),)


class MockIommu(Iommu, frozen=True, tag="mock"):
    """The kernel selftest's IOMMU (selftest.c)."""


AnyIommu: TypeAlias = VtdIommu | SmmuV3Iommu | MockIommu


class DeviceDescription(_Description, frozen=True):
    """An endpoint: a PCI function that issues DMA."""

    name: Name  # of its file: /dev/vfio/devices/NAME
    bdf: Annotated[str, msgspec.Meta(pattern=r"^([0-9a-f]{4}:)?[0-9a-f]{2}:[01][0-9a-f]\.[0-7]\Z")]
    iommu: Name
    group: Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)] | None = None  # shared by number; none: one of its own
    ats: bool = False  # has a device TLB
    pri: bool = False  # takes page faults; needs ats
    pasid_width: Annotated[int, msgspec.Meta(ge=0, le=20)] = 0
    coherent: bool = True
    virtual_function: bool = False
    stream_id: Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)] | None = None  # behind an SMMUv3; none: that of the BDF
    streams: Annotated[int, msgspec.Meta(ge=1, le=256)] = 1  # how many stream ids it has, from that one on
    stall: bool = False  # its transactions may wait for a page fault to be answered (dma-can-stall)
    canwbs: bool = False  # its root complex can force write-back (IORT's CANWBS)

    @property
    def source_id(self) -> int:
        """The requester id of its BDF: bus, device, function."""
        bus, device, function = self.bdf.replace(".", ":").split(":")[-3:]
        return int(bus, 16) << 8 | int(device, 16) << 3 | int(function)

    @property
    def stream_ids(self) -> range:
        """What it is to an SMMUv3."""
        first = self.source_id if self.stream_id is None else self.stream_id
        return range(first, first + self.streams)


class MachineDescription(_Description, frozen=True):
    """A machine file."""

    name: Name
    iommu: tuple[AnyIommu, ...] = ()
    device: tuple[DeviceDescription, ...] = ()


MOCK = MachineDescription(name="mock")  # nothing of its own: the selftest's mock IOMMU is in every machine
