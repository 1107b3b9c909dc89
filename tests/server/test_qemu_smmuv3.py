"""What QEMU 11.1.3 does with `-device arm-smmuv3,accel=on` and a vfio-pci device: its ioctls, in its order and with its
values, natively; then the guest's own CD and table, through which the device does DMA."""

from __future__ import annotations

import errno
import fcntl
import os
import select
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from iommufd_client import DmaError, Endpoint, File, GuestMemory, Iommufd, IommufdOSError, VfioDevice
from iommufd_client.lpae import LpaeTable
from iommufd_client.memory import Buffers
from iommufd_client.testing import Daemon
from iommufd_uapi import iommufd as uapi
from iommufd_uapi import vfio
from iommufd_uapi.smmuv3 import Cmd, Command, Event, EventId, FaultEvent, Idr0, Idr1, Idr3, Idr5, Ste

RAM = 0x4000_0000  # where the virt machine has its memory
SIZE = 64 << 20
CD = 0x40A6_1000  # where the guest's driver has its CD: what the capture shows
TABLES = 0x4100_0000
VSID = 0x100  # bus 1, function 0
ASID = 1
IOVA = 0xFFFF_F000
BUFFER = 0x4200_0000
ABORT, BYPASS, S1 = (0x1, 0), (0x9, 0), (0x40A6_100B, 0xD6)
QEMU = 0x0D41_301B, 0x0273_0290, 0, 0x404, 0, 0x75  # the registers of the guest's SMMU


class Vmm(NamedTuple):
    """A QEMU after realize."""

    iommufd: Iommufd
    device: VfioDevice
    endpoint: Endpoint
    ram: GuestMemory
    dev: int
    parent: int
    viommu: int
    bypass: int
    abort: int


@pytest.fixture
def vmm() -> Iterator[Vmm]:
    with (
        Daemon("--machine", "smmuv3") as daemon,
        daemon.open() as iommufd,
        daemon.admin() as admin,
        iommufd.device("vfio1") as device,
        iommufd.guest_memory(SIZE, "mach-virt.ram") as ram,
    ):
        yield realize(iommufd, device, Endpoint(admin, "vfio1", iommufd), ram)


def realize(iommufd: Iommufd, device: VfioDevice, endpoint: Endpoint, ram: GuestMemory) -> Vmm:
    """A vfio-pci device's realize: bind, what the hardware has, stage 2, the vIOMMU with its two simple HWPTs."""
    bind = vfio.VfioDeviceBindIommufd(iommufd=iommufd.identity.fileno())
    device.ioctl(bind)
    dev = bind.out_devid
    ioas_cmd = uapi.IoasAlloc()
    iommufd.ioctl(ioas_cmd)
    host_smmu(iommufd, dev)
    parent = uapi.HwptAlloc(flags=uapi.IOMMU_HWPT_ALLOC_NEST_PARENT, dev_id=dev, pt_id=ioas_cmd.out_ioas_id)
    iommufd.ioctl(parent)
    device.ioctl(vfio.VfioDeviceAttachIommufdPt(pt_id=parent.out_hwpt_id))
    rights = uapi.IOMMU_IOAS_MAP_FIXED_IOVA | uapi.IOMMU_IOAS_MAP_WRITEABLE | uapi.IOMMU_IOAS_MAP_READABLE
    iommufd.ioctl(uapi.IoasMapFile(
        flags=rights, ioas_id=ioas_cmd.out_ioas_id, fd=ram.fd.fileno(), start=0, length=SIZE, iova=RAM
    ))  # fmt: skip
    viommu = uapi.ViommuAlloc(type=1, dev_id=dev, hwpt_id=parent.out_hwpt_id)
    assert viommu.size == 40
    iommufd.ioctl(viommu)
    made = Vmm(iommufd, device, endpoint, ram, dev, parent.out_hwpt_id, viommu.out_viommu_id, 0, 0)
    abort, bypass = nested(made, ABORT), nested(made, BYPASS)
    attach(made, bypass)
    return made._replace(abort=abort, bypass=bypass)


def host_smmu(iommufd: Iommufd, dev: int) -> None:
    """GET_HW_INFO: what QEMU compares before it accepts the host's SMMU; then the probe for a Tegra241 CMDQV."""
    buffers, room = Buffers(), bytearray(b"\xff" * 40)
    cmd = uapi.HwInfo(dev_id=dev, data_len=40, data_uptr=buffers.add(room))
    iommufd.ioctl(cmd, memory=buffers)
    assert cmd.data_type == uapi.IOMMU_HW_INFO_TYPE_ARM_SMMUV3
    info = uapi.HwInfoArmSmmuv3.unpack(room)
    assert info.aidr == 2
    for at, kind, equal, enough in (
        (0, Idr0, ["st_level"], ["ttf", "ats"]),
        (1, Idr1, [], ["sidsize", "ssidsize"]),
        (3, Idr3, [], ["ril"]),
        (5, Idr5, ["gran4k", "gran16k", "gran64k"], ["oas"]),
    ):
        host, mine = kind.of(info.idr[at:]), kind.of(QEMU[at:])
        assert [name for name in equal if getattr(host, name) != getattr(mine, name)] == []
        assert [name for name in enough if getattr(host, name) < getattr(mine, name)] == []
    buffers = Buffers()
    probe = uapi.HwInfo(flags=1, dev_id=dev, data_type=3, data_len=8, data_uptr=buffers.add(bytearray(8)))
    with pytest.raises(IommufdOSError) as error:
        iommufd.ioctl(probe, memory=buffers)
    assert error.value.errno == errno.EOPNOTSUPP


def nested(vmm: Vmm, ste: tuple[int, int]) -> int:
    """HWPT_ALLOC on the vIOMMU with the first 16 bytes of the guest's STE."""
    buffers = Buffers()
    data = uapi.HwptArmSmmuv3(ste=ste).pack()
    cmd = uapi.HwptAlloc(dev_id=vmm.dev, pt_id=vmm.viommu, data_type=2, data_len=16, data_uptr=buffers.add(data))
    vmm.iommufd.ioctl(cmd, memory=buffers)
    return cmd.out_hwpt_id


def attach(vmm: Vmm, hwpt: int) -> None:
    vmm.device.ioctl(vfio.VfioDeviceAttachIommufdPt(pt_id=hwpt))


def invalidate(vmm: Vmm, command: Command) -> None:
    """A command of the guest's queue, as it stands there."""
    buffers = Buffers()
    cmd = uapi.HwptInvalidate(
        hwpt_id=vmm.viommu, data_type=1, entry_len=16, entry_num=1, data_uptr=buffers.add(command.pack())
    )
    vmm.iommufd.ioctl(cmd, memory=buffers)
    assert cmd.entry_num == 1


def events(vmm: Vmm) -> File:
    """VEVENTQ_ALLOC, then the descriptor is made not to wait."""
    cmd = uapi.VeventqAlloc(viommu_id=vmm.viommu, type=1, veventq_depth=32768)
    assert cmd.size == 32
    vmm.iommufd.ioctl(cmd)
    file = vmm.iommufd.file(cmd.out_veventq_fd)
    fcntl.fcntl(file, fcntl.F_SETFL, fcntl.fcntl(file, fcntl.F_GETFL) | os.O_NONBLOCK)
    return file


def waits(file: File) -> bool:
    """poll(2)"""
    poll = select.poll()
    poll.register(file, select.POLLIN)
    return poll.poll(0) == [(file.fileno(), select.POLLIN)]


def event(file: File) -> tuple[int, FaultEvent]:
    """read(fd, 40): (sequence, record)"""
    data = file.read(40)
    assert len(data) == 40
    header = uapi.IommufdVeventHeader.unpack(data)
    assert header.flags == 0
    record = Event.decode(data[8:])
    assert isinstance(record, FaultEvent)
    return header.sequence, record


def driver_starts(vmm: Vmm) -> LpaeTable:
    """The guest's driver resets the SMMU and installs its own STE: CFGI_STE makes QEMU name the device."""
    vmm.iommufd.ioctl(uapi.VdeviceAlloc(viommu_id=vmm.viommu, dev_id=vmm.dev, virt_id=VSID))
    attach(vmm, vmm.abort)
    invalidate(vmm, Cmd.tlbi_nsnh_all())
    table = LpaeTable(vmm.ram, TABLES, base=RAM)
    vmm.ram.write(CD - RAM, table.cd(ASID).pack())
    assert Ste.s1(CD).words()[:2] == S1
    return table


def test_a_guest_does_dma_through_its_own_cd_and_table(vmm: Vmm) -> None:
    vmm.ram.write(0x5000, b"before the guest's SMMU driver")
    assert vmm.endpoint.read(RAM + 0x5000, 30) == b"before the guest's SMMU driver"  # bypass: guest physical
    table = driver_starts(vmm)
    with pytest.raises(DmaError, match="the stream is set to abort"):
        vmm.endpoint.read(RAM + 0x5000, 1)
    with events(vmm) as queue:
        assert (waits(queue), queue.read(40)) == (False, b"")  # an abort is silent
        first = nested(vmm, S1)
        attach(vmm, first)
        invalidate(vmm, Cmd.cfgi_cd(VSID))
        for page in range(16):
            table.map(IOVA - page * 4096, BUFFER + page * 4096)
        vmm.endpoint.write(IOVA - 6, b"over the edge of a page")
        assert vmm.ram.read(BUFFER - RAM, 17) == b"he edge of a page"
        assert vmm.ram.read(BUFFER + 0x1FFA - RAM, 6) == b"over t"

        # the guest unmaps; a DMA that comes after is its own to know
        table.unmap(IOVA)
        invalidate(vmm, Cmd.tlbi_nh_va(ASID, IOVA))
        for sequence in range(3):
            with pytest.raises(DmaError, match="0x10"):
                vmm.endpoint.write(IOVA + 8, b"late")
            assert waits(queue)
            record = FaultEvent(id=EventId.F_TRANSLATION, sid=VSID, class_=2, addr=IOVA + 8)
            assert event(queue) == (sequence, record)
        assert not waits(queue)
        invalidate(vmm, Cmd.tlbi_nh_asid(ASID))

        # another STE: the new HWPT is attached before the old one goes
        second = nested(vmm, S1)
        attach(vmm, second)
        vmm.iommufd.ioctl(uapi.Destroy(id=first))
        assert vmm.endpoint.read(IOVA - 0x1000, 5) == vmm.ram.read(BUFFER + 0x1000 - RAM, 5)
        # the guest turns its SMMU off
        attach(vmm, vmm.bypass)
        vmm.iommufd.ioctl(uapi.Destroy(id=second))
        assert vmm.endpoint.read(RAM + 0x5000, 6) == b"before"


def test_a_command_that_qemu_must_not_pass_on(vmm: Vmm) -> None:
    driver_starts(vmm)
    for command in (Cmd.cfgi_ste(VSID), Cmd.cfgi_cd(VSID + 1), Cmd.sync()):
        with pytest.raises(IommufdOSError) as error:
            invalidate(vmm, command)
        assert error.value.errno == errno.EIO
