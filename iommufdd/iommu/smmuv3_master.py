"""A device behind an SMMUv3: struct arm_smmu_master, with the streams of an Endpoint (arm-smmu-v3.c)."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from iommufd_uapi.smmuv3 import Cmd, Resume

from .endpoint import Endpoint
from .walk import TranslationFault

if TYPE_CHECKING:
    from iommufdd.description import DeviceDescription

    from .dma import Dma
    from .group import IommuGroup
    from .smmuv3 import SmmuV3
    from .smmuv3_tables import CdTable
    from .smmuv3_viommu import Vsmmu

LINEAR_CDMAX = 10  # CTXDESC_LINEAR_CDMAX: log2 of the CDs that fit in 64 KiB


class Vmaster(NamedTuple):
    """struct arm_smmu_vmaster: whose vDEVICE it was when it was attached."""

    vsmmu: Vsmmu
    vsid: int


class Master(Endpoint):
    """A function with its StreamIDs, its CD table, and what is switched on for it."""

    def __init__(self, iommu: SmmuV3, description: DeviceDescription, group: IommuGroup) -> None:
        super().__init__(iommu, description, group)
        self.smmu = iommu
        d = iommu.description
        self.streams = tuple(description.stream_ids)
        self.sid = self.streams[0]
        self.ssid_bits = min(description.pasid_width, d.ssid_bits, 20 if d.two_level_cd else LINEAR_CDMAX)
        self.max_pasids = 1 << self.ssid_bits if self.ssid_bits else 0
        self.stall_enabled = d.stall == "forced" or (d.stall == "supported" and description.stall)
        self.ats_supported = self.ats and d.ats
        self._atc, self.tlb = self.tlb, None  # PCI's ATS is off until a domain wants it
        self.cd_table: CdTable | None = None
        self.used_ssids = 0
        self.cd_table_in_ste = False
        self.ste_ats_enabled = False
        self.vmaster: Vmaster | None = None
        self._withdrawn: set[int] = set()  # STAGs whose page request ended with its attachment

    @property
    def ats_enabled(self) -> bool:
        """PCI's ATS is on."""
        return self.tlb is not None

    def enable_ats(self) -> None:
        """pci_enable_ats()"""
        self.tlb = self._atc

    def disable_ats(self) -> None:
        """pci_disable_ats(): what the device has cached is not used any more."""
        if self._atc is not None:
            self._atc.drop_spaces(lambda _: True)
        self.tlb = None

    # ---- stalls (IHI0070 3.12.2; arm_smmu_handle_event, arm_smmu_page_response) ----

    def request_page(self, dma: Dma, fault: TranslationFault) -> bool:
        """A stalled transaction waits under its STAG. The driver denies every page request (PRI)."""
        if not fault.stalled:
            return False
        number = self.wait(dma)
        if number is None:
            return False
        iova = dma.iova + dma.done
        self.smmu.record_event(self, dma.pasid, iova, dma.access, fault, stag=number)
        if not self.stall_enabled:
            return True  # quirk: the driver sends no RESUME for a device that was not said to stall
        return self.report(dma, number, iova)

    def respond(self, number: int, *, success: bool, withdrawn: bool, failure: bool = False) -> None:
        """arm_smmu_page_response()"""
        if withdrawn:
            self._withdrawn.add(number)
        self.smmu.execute(Cmd.resume(self.sid, number, Resume.RETRY if success else Resume.ABORT))

    def resumed(self, stag: int, resp: int) -> None:
        """CMD_RESUME: the transaction tries again, or is aborted."""
        withdrawn = stag in self._withdrawn
        self._withdrawn.discard(stag)
        super().respond(stag, success=resp == Resume.RETRY, withdrawn=withdrawn)
