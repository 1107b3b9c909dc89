"""What a VMM does for a guest with an SMMUv3: a vIOMMU, the guest's STE, DMA through its tables, an event read back."""

from iommufd_client import DmaError
from iommufd_client.lpae import LpaeTable
from iommufd_client.testing import Daemon
from iommufd_uapi import iommufd as uapi
from iommufd_uapi.smmuv3 import Cmd, Event, Ste

CD, TABLES, BUFFER, VSID = 0x8_0000, 0x10_0000, 0x20_0000, 0x10

with (
    Daemon("--machine", "smmuv3") as daemon,
    daemon.open(explain=True) as iommufd,
    daemon.admin() as admin,
    iommufd.device("vfio1") as device,
    iommufd.guest_memory(4 << 20) as ram,
):
    dev, ioas = device.bind(iommufd), iommufd.ioas_alloc()
    iommufd.ioas_map(ioas, ram, iova=0)
    parent = iommufd.hwpt_alloc(dev, ioas, flags=uapi.IOMMU_HWPT_ALLOC_NEST_PARENT)
    viommu = iommufd.viommu_alloc(dev, parent, uapi.IOMMU_VIOMMU_TYPE_ARM_SMMUV3)
    iommufd.vdevice_alloc(viommu, dev, VSID)  # the guest knows the device by this StreamID

    table = LpaeTable(ram, TABLES)  # what the guest's driver writes into its memory
    table.map(0x1000, BUFFER)
    ram.write(CD, table.cd(asid=5).pack())
    ste = uapi.HwptArmSmmuv3(ste=Ste.s1(CD, s1stalld=True).words()[:2])
    device.attach(iommufd.hwpt_alloc(dev, viommu, data=ste))

    endpoint = admin.endpoint("vfio1", iommufd)
    endpoint.write(0x1000, b"through both stages")
    print("the guest reads", ram.read(BUFFER, 19))

    with iommufd.veventq_alloc(viommu, uapi.IOMMU_VEVENTQ_TYPE_ARM_SMMUV3, 16)[1] as events:
        table.unmap(0x1000)
        flush = uapi.ViommuArmSmmuv3Invalidate(cmd=Cmd.tlbi_nh_va(asid=5, va=0x1000).words())
        iommufd.hwpt_invalidate(viommu, [flush])
        try:
            endpoint.read(0x1000, 1)
        except DmaError as error:
            print(error)
        print("the guest is told", Event.decode(events.read(40)[uapi.IommufdVeventHeader.SIZEOF :]))
