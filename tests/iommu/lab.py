"""A machine with a VT-d unit, a guest's memory behind an IOAS, and devices that do DMA."""

from __future__ import annotations

import iommufd_uapi.iommufd as uapi
from iommufdd.attach import attach, detach, replace
from iommufdd.description import Caches, DeviceDescription, VtdIommu
from iommufdd.device import IommufdDevice, bind, unbind
from iommufdd.hw_pagetable import HwptNested, HwptPaging
from iommufdd.iommu.dma import Dma, Op, State
from iommufdd.iommu.endpoint import Endpoint
from iommufdd.iommu.group import IommuGroup
from iommufdd.iommu.ops import IOMMU_NO_PASID
from iommufdd.iommu.vtd import Vtd
from iommufdd.iommu.vtd_domain import VtdDomain
from iommufdd.objects import Holder
from iommufdd.user import PAGE_SIZE
from tests.core.harness import NEST_PARENT, RW, Client
from tests.core.world import Memfd

from .tables import X86Table

POOL = 0x100000  # guest physical address of the guest's tables
RAM_PAGES = 1024


class GuestRam:
    """The guest's memory: guest physical address is the offset in a memfd."""

    def __init__(self, file: Memfd) -> None:
        self.file = file

    def read(self, addr: int, length: int) -> bytes:
        return self.file.pread(addr, length)

    def write(self, addr: int, data: bytes) -> None:
        assert self.file.pwrite(addr, data) == len(data)


class Lab:
    """One context, one VT-d unit, devices on demand."""

    def __init__(
        self, iommu: Vtd | None = None, *, mode: str = "greedy", entries: int = 4096, **capabilities: object
    ) -> None:
        """mode, entries: of the caches. capabilities: keys of VtdIommu."""
        caches = Caches(mode=mode, iotlb_entries=entries)  # type: ignore[arg-type]
        self.c = Client()
        self.iommu = iommu or Vtd(VtdIommu(name="dmar0", caches=caches, **capabilities))  # type: ignore[arg-type]
        self.driver = Holder()
        self.c.world.drivers.append(self.driver)
        self._made = 0

    # ---- devices ----

    def device(
        self, *, ats: bool = False, pri: bool = False, pasids: int = 0, group: IommuGroup | None = None
    ) -> IommufdDevice:
        """A device, bound."""
        self._made += 1
        description = DeviceDescription(
            name=f"dev{self._made}", bdf=f"0000:{self._made:02x}:00.0", iommu="dmar0", ats=ats or pri, pri=pri,
            pasid_width=pasids,
        )  # fmt: skip
        dev = self.iommu.new_device(description, group or IommuGroup(self.iommu.blocked_domain))
        return bind(self.c.ictx, self.c.caller, dev, self.driver)

    def attach(self, idev: IommufdDevice, pt: int, pasid: int = IOMMU_NO_PASID) -> int:
        return attach(self.c.caller, idev, pasid, pt)

    def replace(self, idev: IommufdDevice, pt: int, pasid: int = IOMMU_NO_PASID) -> int:
        return replace(self.c.caller, idev, pasid, pt)

    def refuses(
        self, idev: IommufdDevice, pt: int, expect: int, pasid: int = IOMMU_NO_PASID, *, replacing: bool = False
    ) -> None:
        """An attach, or a replace, that must fail."""
        self.c.fails(lambda: (self.replace if replacing else self.attach)(idev, pt, pasid), expect)

    def detach(self, idev: IommufdDevice, pasid: int = IOMMU_NO_PASID) -> None:
        detach(idev, pasid)

    def unbind(self, idev: IommufdDevice) -> None:
        unbind(idev, self.driver)

    # ---- a guest ----

    def ram(self, pages: int = RAM_PAGES) -> tuple[int, GuestRam]:
        """(an IOAS with guest memory at IOVA 0, the memory)"""
        file = self.c.world.memfd(pages)
        ioas = self.c.ioas_alloc()
        self.c.map(ioas, self.c.process.map(file), pages * PAGE_SIZE, 0, RW)
        return ioas, GuestRam(file)

    def parent(self, idev: IommufdDevice, ioas: int, flags: int = 0) -> int:
        """A nest parent over the IOAS."""
        return self.c.hwpt(idev.id, ioas, NEST_PARENT | flags)

    def nested(
        self, idev: IommufdDevice, parent: int, root: int, *, width: int = 48, s1_flags: int = 0, flags: int = 0,
        fault: int = 0, expect: int = 0,
    ) -> int:  # fmt: skip
        """A nested HWPT over the guest's table at `root`."""
        data = uapi.HwptVtdS1(flags=s1_flags, pgtbl_addr=root, addr_width=width).pack()
        cmd = uapi.HwptAlloc(
            flags=flags, dev_id=idev.id, pt_id=parent, fault_id=fault, data_type=uapi.IOMMU_HWPT_DATA_VTD_S1,
            data_len=len(data), data_uptr=self.c.process.put(data),
        )  # fmt: skip
        return self.c.ioctl(cmd, expect).out_hwpt_id

    def guest(self, idev: IommufdDevice, levels: int = 4) -> tuple[int, GuestRam, X86Table]:
        """(nested HWPT over an empty table, memory, the table)"""
        ioas, ram = self.ram()
        table = X86Table(ram, POOL, levels)
        parent = self.parent(idev, ioas)
        return self.nested(idev, parent, table.root, width=48 if levels == 4 else 57), ram, table

    def invalidate(
        self, hwpt: int, addr: int = 0, npages: int = 2**64 - 1, flags: int = 0, expect: int = 0
    ) -> int:
        """HWPT_INVALIDATE with one entry; the entries done."""
        data = uapi.HwptVtdS1Invalidate(addr=addr, npages=npages, flags=flags).pack()
        cmd = uapi.HwptInvalidate(
            hwpt_id=hwpt, data_uptr=self.c.process.put(data), data_type=uapi.IOMMU_HWPT_INVALIDATE_DATA_VTD_S1,
            entry_len=len(data), entry_num=1,
        )  # fmt: skip
        return self.c.ioctl(cmd, expect).entry_num

    # ---- DMA ----

    def read(self, idev: IommufdDevice, iova: int, length: int = 8, pasid: int | None = None) -> bytes:
        """A DMA read that must succeed."""
        dma = self.dma(idev, Op.READ, iova, length, pasid=pasid)
        assert dma.run() is State.DONE, dma.error
        return bytes(dma.data)

    def write(self, idev: IommufdDevice, iova: int, data: bytes, pasid: int | None = None) -> None:
        """A DMA write that must succeed."""
        dma = self.dma(idev, Op.WRITE, iova, len(data), data=data, pasid=pasid)
        assert dma.run() is State.DONE, dma.error

    def dma(
        self, idev: IommufdDevice, op: Op, iova: int, length: int = 8, *, data: bytes = b"", pasid: int | None = None,
        priv: int = 0,
    ) -> Dma:  # fmt: skip
        """A DMA, not yet begun."""
        return Dma(endpoint(idev), op, iova, length, data=data or bytes(length), pasid=pasid, priv=priv)

    def fault(self, idev: IommufdDevice, iova: int, op: Op = Op.READ, pasid: int | None = None, priv: int = 0) -> int:
        """The fault reason of a DMA that must fail."""
        dma = self.dma(idev, op, iova, 1, pasid=pasid, priv=priv)
        assert dma.run() is State.FAILED
        assert dma.fault is not None, dma.error
        return dma.fault.code


def endpoint(idev: IommufdDevice) -> Endpoint:
    """The device behind a bound one."""
    assert isinstance(idev.dev, Endpoint)
    return idev.dev


def domain(lab: Lab, hwpt: int) -> VtdDomain:
    """The domain of a HWPT."""
    found = lab.c.ictx.objects.get(hwpt)
    assert isinstance(found, HwptPaging | HwptNested)
    assert isinstance(found.domain, VtdDomain)
    return found.domain


def word(lab: Lab, idev: IommufdDevice, number: int, pasid: int = 0) -> int:
    """A word of the device's PASID-table entry."""
    return lab.iommu.table(endpoint(idev)).read(pasid)[number]


def behind(lab: Lab, unit: Vtd, *, pasids: int = 0, group: IommuGroup | None = None) -> IommufdDevice:
    """A device of the lab's context behind another unit."""
    mine, lab.iommu = lab.iommu, unit
    try:
        return lab.device(pasids=pasids, group=group)
    finally:
        lab.iommu = mine
