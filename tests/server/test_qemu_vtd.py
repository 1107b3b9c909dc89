"""What QEMU 11.1.3 does with `-device intel-iommu,scalable-mode=on,fsts=on` and a vfio-pci device: its ioctls, in its
order and with its values, natively; then the guest's own table, through which the device does DMA."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from iommufd_client import DmaError, Endpoint, GuestMemory, Iommufd, IommufdOSError, VfioDevice
from iommufd_client.memory import Buffers
from iommufd_client.pagetable import PageTable
from iommufd_client.testing import Daemon
from iommufd_uapi import iommufd as uapi
from iommufd_uapi import vfio

RAM = 64 << 20
HOLE = 0xA0000  # VGA: what SeaBIOS moves about
GUEST_TABLE = 0x100_0000  # where the guest's kernel has its first-stage table
IOVA = 0x7FFF_F000_0000
BUFFER = 0x200_0000


class Vmm(NamedTuple):
    """A QEMU after realize."""

    iommufd: Iommufd
    device: VfioDevice
    endpoint: Endpoint
    ram: GuestMemory
    dev: int
    ioas: int
    parent: int


@pytest.fixture
def vmm() -> Iterator[Vmm]:
    with (
        Daemon("--machine", "vtd") as daemon,
        daemon.open() as iommufd,
        daemon.admin() as admin,
        iommufd.device("vfio1") as device,
        iommufd.guest_memory(RAM, "pc.ram") as ram,
    ):
        yield realize(iommufd, device, Endpoint(admin, "vfio1", iommufd), ram)


def realize(iommufd: Iommufd, device: VfioDevice, endpoint: Endpoint, ram: GuestMemory) -> Vmm:
    """Steps 1 to 23 of a vfio-pci device's realize, as far as they are iommufd's."""
    bind = vfio.VfioDeviceBindIommufd(iommufd=iommufd.identity.fileno())
    assert bind.argsz == 24
    device.ioctl(bind)
    dev = bind.out_devid
    ioas_cmd = uapi.IoasAlloc()
    iommufd.ioctl(ioas_cmd)
    ioas = ioas_cmd.out_ioas_id
    capabilities = host_iommu(iommufd, dev)
    flags = uapi.IOMMU_HWPT_ALLOC_NEST_PARENT
    if capabilities & uapi.IOMMU_HW_CAP_DIRTY_TRACKING:
        flags |= uapi.IOMMU_HWPT_ALLOC_DIRTY_TRACKING
    parent = uapi.HwptAlloc(flags=flags, dev_id=dev, pt_id=ioas)
    iommufd.ioctl(parent)
    attach = vfio.VfioDeviceAttachIommufdPt(pt_id=parent.out_hwpt_id)
    assert attach.argsz == 16
    device.ioctl(attach)
    ranges(iommufd, ioas)
    map_ram(iommufd, ioas, ram)
    info = vfio.VfioDeviceInfo()
    device.ioctl(info)
    assert info.flags & (vfio.VFIO_DEVICE_FLAGS_PCI | vfio.VFIO_DEVICE_FLAGS_RESET) == 3
    assert (info.num_regions >= 8, info.num_irqs >= 3) == (True, True)
    device.reset()
    return Vmm(iommufd, device, endpoint, ram, dev, ioas, parent.out_hwpt_id)


def host_iommu(iommufd: Iommufd, dev: int) -> int:
    """GET_HW_INFO twice with 40 bytes of room; the capabilities."""
    for _ in range(2):
        buffers, room = Buffers(), bytearray(b"\xff" * 40)
        cmd = uapi.HwInfo(dev_id=dev, data_len=40, data_uptr=buffers.add(room))
        iommufd.ioctl(cmd, memory=buffers)
        assert cmd.data_type == uapi.IOMMU_HW_INFO_TYPE_INTEL_VTD
        assert room[24:] == bytes(16)  # the tail is cleared
        info = uapi.HwInfoVtd.unpack(room)
        assert info.cap_reg >> 56 & 1  # FS1GP, else "First stage 1GB large page is unsupported"
        assert info.flags & uapi.IOMMU_HW_INFO_VTD_ERRATA_772415_SPR17  # so QEMU maps nothing read-only
    return cmd.out_capabilities


def ranges(iommufd: Iommufd, ioas: int) -> None:
    """IOVA_RANGES with no room, then with enough: all of guest memory, and 48 bits at least."""
    cmd = uapi.IoasIovaRanges(ioas_id=ioas)
    with pytest.raises(IommufdOSError) as error:
        iommufd.ioctl(cmd)
    assert error.value.errno == errno.EMSGSIZE
    buffers, room = Buffers(), bytearray(16 * cmd.num_iovas)
    cmd.allowed_iovas = buffers.add(room)
    iommufd.ioctl(cmd, memory=buffers)
    found = [uapi.IovaRange.unpack(room, 16 * at) for at in range(cmd.num_iovas)]
    assert found[0].start == 0
    assert found[0].last >= RAM
    assert found[-1].last.bit_length() >= 48
    assert cmd.out_iova_alignment == 4096


def map_ram(iommufd: Iommufd, ioas: int, ram: GuestMemory) -> None:
    """MAP_FILE of all of it; then the churn of shadow RAM: unmapped whole, mapped again in pieces."""
    rights = uapi.IOMMU_IOAS_MAP_FIXED_IOVA | uapi.IOMMU_IOAS_MAP_WRITEABLE | uapi.IOMMU_IOAS_MAP_READABLE

    def map_file(start: int, length: int) -> None:
        iommufd.ioctl(uapi.IoasMapFile(
            flags=rights, ioas_id=ioas, fd=ram.fd.fileno(), start=start, length=length, iova=start
        ))  # fmt: skip

    map_file(0, RAM)
    unmap = uapi.IoasUnmap(ioas_id=ioas, iova=0, length=RAM)
    iommufd.ioctl(unmap)
    assert unmap.length == RAM
    map_file(0, HOLE)
    map_file(0x100000, RAM - 0x100000)


def set_pasid_entry(vmm: Vmm, table: PageTable, old: int = 0) -> int:
    """The guest programs its PASID entry: a nested HWPT, the device moves to it, the one before goes."""
    buffers = Buffers()
    data = uapi.HwptVtdS1(flags=0, pgtbl_addr=table.root, addr_width=48).pack()
    cmd = uapi.HwptAlloc(
        dev_id=vmm.dev, pt_id=vmm.parent, data_type=1, data_len=len(data), data_uptr=buffers.add(data)
    )
    assert len(data) == 24
    vmm.iommufd.ioctl(cmd, memory=buffers)
    vmm.device.ioctl(vfio.VfioDeviceAttachIommufdPt(pt_id=cmd.out_hwpt_id))
    if old:
        vmm.iommufd.ioctl(uapi.Destroy(id=old))
    return cmd.out_hwpt_id


def invalidate(vmm: Vmm, hwpt: int, addr: int, npages: int, flags: int = 0) -> None:
    """A PASID-based IOTLB invalidation of the guest."""
    buffers = Buffers()
    data = uapi.HwptVtdS1Invalidate(addr=addr, npages=npages, flags=flags).pack()
    cmd = uapi.HwptInvalidate(hwpt_id=hwpt, data_uptr=buffers.add(data), entry_len=24, entry_num=1)
    vmm.iommufd.ioctl(cmd, memory=buffers)
    assert cmd.entry_num == 1


def test_a_guest_does_dma_through_its_own_table(vmm: Vmm) -> None:
    vmm.ram.write(0x5000, b"before the guest's IOMMU driver")
    assert vmm.endpoint.read(0x5000, 31) == b"before the guest's IOMMU driver"  # bypass: guest physical
    table = PageTable(vmm.ram, GUEST_TABLE)
    hwpt = set_pasid_entry(vmm, table)
    with pytest.raises(DmaError) as error:
        vmm.endpoint.read(0x5000, 31)
    assert error.value.fault is not None
    assert error.value.fault.code == 0x71
    for page in range(16):
        table.map(IOVA + page * 4096, BUFFER + (15 - page) * 4096)
    vmm.endpoint.write(IOVA + 4090, b"over the edge of a page")
    assert vmm.ram.read(BUFFER + 14 * 4096, 17) == b"he edge of a page"
    assert vmm.ram.read(BUFFER + 15 * 4096 + 4090, 6) == b"over t"
    table.unmap(IOVA)
    invalidate(vmm, hwpt, IOVA, 1, uapi.IOMMU_VTD_INV_FLAGS_LEAF)
    with pytest.raises(DmaError, match="0x71"):
        vmm.endpoint.read(IOVA, 1)
    assert vmm.endpoint.read(IOVA + 4096, 17) == b"he edge of a page"
    # kexec: another kernel, another table
    other = PageTable(vmm.ram, GUEST_TABLE + 0x80_0000)
    other.map(IOVA, BUFFER + 14 * 4096)
    second = set_pasid_entry(vmm, other, old=hwpt)
    assert vmm.endpoint.read(IOVA, 17) == b"he edge of a page"
    invalidate(vmm, second, 0, 2**64 - 1)
    # the guest turns its IOMMU off: back to the parent
    vmm.device.ioctl(vfio.VfioDeviceAttachIommufdPt(pt_id=vmm.parent))
    vmm.iommufd.ioctl(uapi.Destroy(id=second))
    assert vmm.endpoint.read(0x5000, 6) == b"before"


def test_migration_sees_what_the_device_wrote(vmm: Vmm) -> None:
    """Dirty tracking of the parent while the device writes through the guest's table."""
    table = PageTable(vmm.ram, GUEST_TABLE)
    hwpt = set_pasid_entry(vmm, table)
    table.map(IOVA, BUFFER)
    vmm.iommufd.ioctl(uapi.HwptSetDirtyTracking(flags=1, hwpt_id=vmm.parent))
    dirty(vmm)
    vmm.endpoint.write(IOVA + 5, b"dirt")
    assert dirty(vmm) == {BUFFER}
    assert dirty(vmm) == set()
    vmm.endpoint.write(IOVA + 5, b"more")  # the flush that reading implies makes hardware set the bit again
    assert dirty(vmm) == {BUFFER}
    vmm.iommufd.ioctl(uapi.HwptSetDirtyTracking(flags=0, hwpt_id=vmm.parent))
    vmm.device.ioctl(vfio.VfioDeviceDetachIommufdPt())
    vmm.iommufd.ioctl(uapi.Destroy(id=hwpt))


def dirty(vmm: Vmm) -> set[int]:
    """GET_DIRTY_BITMAP of the RAM above the hole: guest-physical addresses of dirty pages, without the tables."""
    start = 0x100000
    buffers, bitmap = Buffers(), bytearray((RAM - start) // 4096 // 8)
    cmd = uapi.HwptGetDirtyBitmap(
        hwpt_id=vmm.parent, iova=start, length=RAM - start, page_size=4096, data=buffers.add(bitmap)
    )
    vmm.iommufd.ioctl(cmd, memory=buffers)
    pages = {start + 4096 * (8 * at + bit) for at, byte in enumerate(bitmap) for bit in range(8) if byte >> bit & 1}
    return {page for page in pages if not GUEST_TABLE <= page < GUEST_TABLE + 0x10_0000}
