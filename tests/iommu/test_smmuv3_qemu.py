"""QEMU 11.1's `-device arm-smmuv3,accel=on`, call by call, down to DMA through the guest's stage 1 (CLIENTS.md A6)."""

from __future__ import annotations

import errno

import iommufd_uapi.iommufd as uapi
from iommufd_uapi.smmuv3 import Cd, Cmd, Event, EventId, FaultEvent, Idr0, Idr1, Idr3, Idr5
from iommufdd.device import IommufdDevice, bind
from iommufdd.iommu.dma import Op
from iommufdd.iommu.smmuv3 import SmmuV3
from iommufdd.machine_file import built_in
from iommufdd.wiring import new_machine
from tests.core.world import Memfd

from .smmu_lab import CDS, POOL, LpaeTable, SmmuLab

RAM = 0x4000_0000  # where the virt machine has its memory
VSID = 0x100


class Ram:
    """The guest's memory, which begins at RAM."""

    def __init__(self, file: Memfd) -> None:
        self.file = file

    def read(self, addr: int, length: int) -> bytes:
        return self.file.pread(addr - RAM, length)

    def write(self, addr: int, data: bytes) -> None:
        assert self.file.pwrite(addr - RAM, data) == len(data)


def start() -> tuple[SmmuLab, IommufdDevice, int, LpaeTable]:
    """(lab, device, nest parent, table): a VFIO device with its IOAS and the guest's memory, at RAM."""
    machine = new_machine("", built_in("smmuv3"))
    iommu = machine.iommus["smmu0"]
    assert isinstance(iommu, SmmuV3)
    lab = SmmuLab(iommu)
    idev = bind(lab.c.ictx, lab.c.caller, machine.devices["vfio1"], lab.driver)
    file = lab.c.world.memfd(1024)
    ioas = lab.c.ioas_alloc()
    lab.c.map(ioas, lab.c.process.map(file), 1024 * 4096, RAM)
    lab.attach(idev, ioas)
    parent = lab.c.hwpt(idev.id, ioas, uapi.IOMMU_HWPT_ALLOC_NEST_PARENT)
    lab.replace(idev, parent)

    return lab, idev, parent, LpaeTable(Ram(file), RAM + POOL)


def test_the_sequence() -> None:
    lab, idev, parent, table = start()
    dev_id = idev.id
    put = lab.c.process.put

    # realize: what the hardware has; no Tegra CMDQV
    info = lab.c.ioctl(uapi.HwInfo(dev_id=dev_id, data_len=40, data_uptr=put(bytes(40))))
    assert info.data_type == uapi.IOMMU_HW_INFO_TYPE_ARM_SMMUV3
    idr = uapi.HwInfoArmSmmuv3.unpack(lab.c.mm.read(info.data_uptr, 40)).idr
    idr0, idr1, idr3, idr5 = Idr0.of(idr), Idr1.of(idr[1:]), Idr3.of(idr[3:]), Idr5.of(idr[5:])
    assert (idr0.st_level, idr0.ttf, idr1.sidsize >= 16, idr3.ril) == (1, 2, True, 1)
    assert (idr5.gran4k, idr5.gran16k, idr5.gran64k, idr5.oas) == (1, 1, 1, 5)
    probe = uapi.HwInfo(flags=1, dev_id=dev_id, data_type=3, data_len=8, data_uptr=put(bytes(8)))
    lab.c.ioctl(probe, errno.EOPNOTSUPP)

    # the vIOMMU, and what the device uses before the guest has said anything
    viommu = lab.c.ioctl(uapi.ViommuAlloc(type=1, dev_id=dev_id, hwpt_id=parent)).out_viommu_id
    abort = lab.vste(idev, viommu, (0x1, 0))
    bypass = lab.vste(idev, viommu, (0x9, 0))
    lab.replace(idev, bypass)
    table.ram.write(RAM + 0x5000, b"boot")
    assert lab.read(idev, RAM + 0x5000, 4) == b"boot"

    # the guest's driver starts: CFGI_STE for the device's StreamID
    lab.c.vdevice(viommu, dev_id, VSID)
    lab.replace(idev, abort)
    assert lab.fault(idev, RAM + 0x5000) == 0
    assert lab.invalidate(viommu, Cmd.tlbi_nsnh_all()) == 1
    queue = uapi.VeventqAlloc(viommu_id=viommu, type=1, veventq_depth=32768)
    fd = lab.c.ioctl(queue).out_veventq_fd
    assert lab.c.read(fd, 40) == b""

    # it writes a CD, and an STE that leads there


    table.ram.write(RAM + CDS, Cd.s1(table.root, asid=1).pack())
    word = 0x40A6_100B & ~0xFFFF_FFC0 | RAM + CDS
    first = lab.vste(idev, viommu, (word, 0xD6))
    lab.replace(idev, first)
    assert lab.invalidate(viommu, Cmd.cfgi_cd(VSID)) == 1

    # DMA through the guest's stage 1
    iova = 0xFFFF_F000
    slot = table.map(iova, RAM + 0x7000)
    lab.write(idev, iova + 4, b"driven")
    assert table.ram.read(RAM + 0x7004, 6) == b"driven"
    table.set(slot, 0)
    assert lab.invalidate(viommu, Cmd.tlbi_nh_va(1, iova)) == 1
    assert lab.fault(idev, iova, Op.WRITE) == EventId.F_TRANSLATION
    flags, sequence, data = lab.event(fd)
    assert (flags, sequence) == (0, 0)
    assert Event.decode(data) == FaultEvent(id=EventId.F_TRANSLATION, sid=VSID, class_=2, addr=iova)
    assert lab.invalidate(viommu, Cmd.tlbi_nh_asid(1)) == 1

    # another STE: allocate, attach, destroy the old one
    again = lab.vste(idev, viommu, (word, 0xD6))
    lab.replace(idev, again)
    lab.c.destroy(first)
    table.map(iova, RAM + 0x8000)
    lab.write(idev, iova, b"again")
    assert table.ram.read(RAM + 0x8000, 5) == b"again"
