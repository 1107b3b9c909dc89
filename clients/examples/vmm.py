"""A VMM prototype: guest memory behind an emulated IOMMU, a device that reaches it, and a mistake explained."""

import os

from iommufd_client import Iommufd
from iommufd_client.testing import Daemon
from iommufd_uapi import iommufd as uapi

GUEST_RAM = 0x100_0000  # where the guest sees its memory


def vmm(iommufd: Iommufd) -> None:
    ioas = iommufd.ioas_alloc()
    device = iommufd.mock_domain(ioas)  # the kernel's selftest device, attached to the address space
    print("the device reaches", [f"{first:#x}..{last:#x}" for first, last in iommufd.ioas_iova_ranges(ioas).ranges])

    with iommufd.guest_memory(16 << 20) as ram:
        iommufd.ioas_map(ioas, ram, iova=GUEST_RAM)
        ram.write(0x1000, b"from the guest")

        with iommufd.create_access(ioas) as dma:
            print("the device reads", iommufd.access_read(dma, GUEST_RAM + 0x1000, 14))
            iommufd.access_write(dma, GUEST_RAM + 0x2000, b"from the device")
        print("the guest reads", ram.read(0x2000, 15))

        parent = iommufd.hwpt_alloc(device.out_idev_id, ioas, flags=uapi.IOMMU_HWPT_ALLOC_NEST_PARENT)
        print("the page table for a vIOMMU is object", parent)

        try:
            iommufd.destroy(ioas)
        except OSError as error:
            print(error)  # errno as in the kernel, and the reason, which the kernel does not tell


if __name__ == "__main__":
    if os.environ.get("IOMMUFDD_SOCKET"):
        with Iommufd(explain=True) as iommufd:
            vmm(iommufd)
    else:
        with Daemon() as daemon, daemon.open() as iommufd:
            vmm(iommufd)
