"""A VMM prototype: a guest's page table nested on its memory behind a VT-d, DMA through both, and two mistakes."""

import os

from iommufd_client import Admin, DmaError, Iommufd
from iommufd_client.pagetable import PageTable
from iommufd_client.testing import Daemon
from iommufd_uapi import iommufd as uapi

IOVA = 0x7F12_3456_7000
TABLES, BUFFER = 0x10_0000, 0x20_0000  # guest-physical addresses


def vmm(iommufd: Iommufd, admin: Admin) -> None:
    with iommufd.device("vfio0") as device, iommufd.guest_memory(16 << 20) as ram:
        dev = device.bind(iommufd)
        ioas = iommufd.ioas_alloc()
        iommufd.ioas_map(ioas, ram, iova=0)  # stage 2: where the guest sees its memory
        parent = iommufd.hwpt_alloc(dev, ioas, flags=uapi.IOMMU_HWPT_ALLOC_NEST_PARENT)
        table = PageTable(ram, TABLES)  # stage 1: what the guest's driver writes
        table.map(IOVA, BUFFER)
        nested = iommufd.hwpt_alloc(dev, parent, data=uapi.HwptVtdS1(pgtbl_addr=table.root, addr_width=48))
        device.attach(nested)
        dma = admin.endpoint("vfio0", iommufd)
        ram.write(BUFFER, b"from the guest")
        print("the device reads", dma.read(IOVA, 14))
        dma.write(IOVA + 0x100, b"from the device")
        print("the guest reads", ram.read(BUFFER + 0x100, 15))
        table.unmap(IOVA)
        print("unmapped, but not yet invalidated, it still reads", dma.read(IOVA, 14))
        iommufd.hwpt_invalidate(nested, [uapi.HwptVtdS1Invalidate(addr=IOVA, npages=1)])
        for mistake in (lambda: dma.read(IOVA, 14)), (lambda: iommufd.destroy(ioas)):
            try:
                mistake()
            except (DmaError, OSError) as error:
                print(error)  # errno as in the kernel, and the reason, which the kernel does not tell


if __name__ == "__main__":
    if os.environ.get("IOMMUFDD_SOCKET"):
        with Iommufd(machine="@vtd", explain=True) as iommufd, Admin() as admin:
            vmm(iommufd, admin)
    else:
        with Daemon() as daemon, daemon.open(machine="@vtd") as iommufd, daemon.admin() as admin:
            vmm(iommufd, admin)
