"""The built-in machine `smmuv3` through the client library and a daemon: the control path of a VMM that nests."""

from __future__ import annotations

import errno

import pytest

from iommufd_client import IommufdOSError
from iommufd_client.testing import Daemon
from iommufd_uapi import iommufd as uapi
from iommufd_uapi.smmuv3 import Cmd, Command, Idr0, Ste


def invalidation(command: Command) -> uapi.ViommuArmSmmuv3Invalidate:
    return uapi.ViommuArmSmmuv3Invalidate(cmd=command.words())


def test_a_vmm_that_nests() -> None:
    with Daemon("--machine", "smmuv3") as daemon, daemon.open() as iommufd, iommufd.device("vfio1") as device:
        devid = device.bind(iommufd)
        info = iommufd.get_hw_info(devid)
        assert isinstance(info.info, uapi.HwInfoArmSmmuv3)
        assert Idr0.of(info.info.idr).s1p
        ioas = iommufd.ioas_alloc()
        with iommufd.guest_memory(1 << 20) as ram:
            iommufd.ioas_map(ioas, ram, iova=0)
            parent = iommufd.hwpt_alloc(devid, ioas, flags=uapi.IOMMU_HWPT_ALLOC_NEST_PARENT)
            device.attach(parent)
            viommu = iommufd.viommu_alloc(devid, parent, uapi.IOMMU_VIOMMU_TYPE_ARM_SMMUV3)
            _, events = iommufd.veventq_alloc(viommu, uapi.IOMMU_VEVENTQ_TYPE_ARM_SMMUV3, 16)
            vste = uapi.HwptArmSmmuv3(ste=Ste.s1(0x1000).words()[:2])
            nested = iommufd.hwpt_alloc(devid, viommu, data=vste)
            with pytest.raises(IommufdOSError) as caught:
                device.attach(nested)
            assert (caught.value.errno, "is no vDEVICE" in caught.value.reason) == (errno.ENOENT, True)
            iommufd.vdevice_alloc(viommu, devid, 0x100)
            device.attach(nested)
            good = [invalidation(Cmd.cfgi_cd(0x100)), invalidation(Cmd.tlbi_nsnh_all())]
            assert iommufd.hwpt_invalidate(viommu, good) == 2
            with pytest.raises(IommufdOSError) as caught:
                iommufd.hwpt_invalidate(viommu, [invalidation(Cmd.cfgi_ste(0x100))])
            assert caught.value.errno == errno.EIO
            events.close()
            device.detach()
