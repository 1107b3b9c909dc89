"""The synchronous client against a real daemon: each typed method, files, errors, the connection."""

from __future__ import annotations

import errno
import os
import select
from typing import TYPE_CHECKING

import pytest

from iommufd_client import Buffers, Iommufd, IommufdOSError
from iommufd_uapi import iommufd as uapi
from iommufd_uapi import iommufd_test as mock

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from iommufd_client.testing import Daemon

RAM = 0x100_0000

Device = tuple[int, mock.MockDomainFlags]  # an IOAS, and the ids of a mock device attached to it
Viommu = tuple[int, mock.ViommuSelftest, mock.MockDomainFlags]


def refused(call: Callable[[], object], number: int) -> IommufdOSError:
    with pytest.raises(IommufdOSError) as caught:
        call()
    assert caught.value.errno == number
    return caught.value


@pytest.fixture
def device(iommufd: Iommufd) -> Device:
    """An IOAS with a mock device."""
    ioas = iommufd.ioas_alloc()
    return ioas, iommufd.mock_domain(ioas, mock.MOCK_FLAGS_DEVICE_PASID)


# ---- IOAS ----


def test_destroy(iommufd: Iommufd) -> None:
    ioas = iommufd.ioas_alloc()
    iommufd.destroy(ioas)
    assert refused(lambda: iommufd.destroy(ioas), errno.ENOENT).struct == uapi.Destroy(id=ioas)


def test_guest_memory_is_mapped_and_pinned(iommufd: Iommufd, iommufdd_daemon: Daemon, device: Device) -> None:
    ioas, _ = device
    with iommufd.guest_memory(1 << 20) as ram, iommufdd_daemon.admin() as admin:
        assert admin.stats().regions == 1
        assert iommufd.ioas_map(ioas, ram, iova=RAM) == RAM
        assert admin.stats().pinned_pages == 256
        with iommufd.create_access(ioas) as dma:
            ram.write(0xFFF, b"over the border")
            assert iommufd.access_read(dma, RAM + 0xFFF, 15) == b"over the border"
            iommufd.access_write(dma, RAM + 5, b"back")
            assert ram.read(5, 4) == b"back"
            assert iommufd.ioas_unmap(ioas, RAM, 1 << 20) == 1 << 20
            refused(lambda: iommufd.access_read(dma, RAM, 1), errno.ENOENT)
        assert admin.stats().pinned_pages == 0


def test_a_mapping_outlives_its_guest_memory(iommufd: Iommufd, device: Device) -> None:
    ioas, _ = device
    with iommufd.guest_memory(8192) as ram:
        ram.write(4090, b"still here")
        iommufd.ioas_map(ioas, ram, iova=RAM)
        address = ram.address
    with iommufd.create_access(ioas) as dma, iommufd.channel(new_mm=True) as other:
        # The process that mapped it is read through its address; for others it is the pinned pages.
        refused(lambda: iommufd.access_read(dma, RAM + 4090, 10), errno.EFAULT)
        assert other.access_read(dma, RAM + 4090, 10) == b"still here"
    refused(lambda: iommufd.ioas_map(ioas, address, 4096, iova=RAM + 8192), errno.EFAULT)


def test_a_slice_is_mapped_read_only(iommufd: Iommufd, device: Device) -> None:
    ioas, _ = device
    with iommufd.guest_memory(0x4000) as ram:
        iova = iommufd.ioas_map(ioas, ram.slice(0x1000, 0x2000), writable=False)
        ram.write(0x1000, b"slice")
        with iommufd.create_access(ioas) as dma:
            assert iommufd.access_read(dma, iova, 5) == b"slice"
            refused(lambda: iommufd.access_write(dma, iova, b"x"), errno.EPERM)
        assert iommufd.ioas_unmap(ioas) == 0x2000


def test_map_file_and_copy(iommufd: Iommufd) -> None:
    first, second = iommufd.ioas_alloc(), iommufd.ioas_alloc()
    fd = os.memfd_create("ram")
    os.ftruncate(fd, 0x4000)
    os.pwrite(fd, b"in a file", 0x1000)
    iova = iommufd.ioas_map_file(first, fd, 0x1000, 0x2000)
    os.close(fd)
    copy = iommufd.ioas_copy(second, first, iova, 0x2000, iova=0x8000)
    assert copy == 0x8000
    with iommufd.create_access(second) as dma:
        assert iommufd.access_read(dma, 0x8000, 9) == b"in a file"
    refused(lambda: iommufd.ioas_map_file(first, -1, 0, 4096), errno.EBADF)


def test_an_address_needs_a_length(iommufd: Iommufd) -> None:
    with pytest.raises(TypeError, match="length"):
        iommufd.ioas_map(1, 0x1000)


def test_iova_ranges_asks_until_all_fit(iommufd: Iommufd) -> None:
    ioas = iommufd.ioas_alloc()
    assert iommufd.ioas_iova_ranges(ioas).ranges == [(0, 2**64 - 1)]
    for number in range(20):
        iommufd.test(mock.AddReserved(start=0x10000 * number, length=0x1000), ioas)
    found = iommufd.ioas_iova_ranges(ioas)
    assert len(found.ranges) == 20
    assert found.ranges[0] == (0x1000, 0xFFFF)
    assert found.alignment == 1


def test_allow_iovas(iommufd: Iommufd) -> None:
    ioas = iommufd.ioas_alloc()
    iommufd.ioas_allow_iovas(ioas, [(0x10_0000, 0x1F_FFFF), (0x40_0000, 0x4F_FFFF)])
    assert iommufd.ioas_map(ioas, 0x2000, 0x1000) == 0x10_0000
    refused(lambda: iommufd.ioas_allow_iovas(ioas, [(5, 4)]), errno.EINVAL)


def test_option(iommufd: Iommufd) -> None:
    ioas = iommufd.ioas_alloc()
    assert iommufd.option(uapi.IOMMU_OPTION_HUGE_PAGES, object_id=ioas) == 1
    assert iommufd.option(uapi.IOMMU_OPTION_HUGE_PAGES, 0, object_id=ioas) == 0
    assert iommufd.option(uapi.IOMMU_OPTION_HUGE_PAGES, object_id=ioas) == 0
    refused(lambda: iommufd.option(99), errno.EOPNOTSUPP)


def test_vfio_ioas(iommufd: Iommufd) -> None:
    refused(iommufd.vfio_ioas_get, errno.ENODEV)
    ioas = iommufd.ioas_alloc()
    iommufd.vfio_ioas_set(ioas)
    assert iommufd.vfio_ioas_get() == ioas
    iommufd.vfio_ioas_clear()
    refused(iommufd.vfio_ioas_get, errno.ENODEV)


def test_change_process(iommufd: Iommufd) -> None:
    iommufd.ioas_change_process()
    ioas = iommufd.ioas_alloc()
    iommufd.ioas_map(ioas, 0x1000, 0x1000)
    refused(iommufd.ioas_change_process, errno.EINVAL)  # memory that is no file cannot move


# ---- devices and page tables ----


def test_hw_info(iommufd: Iommufd, device: Device) -> None:
    _, ids = device
    info = iommufd.get_hw_info(ids.out_idev_id)
    assert info.data_type == mock.IOMMU_HW_INFO_TYPE_SELFTEST
    assert info.info == mock.TestHwInfo(test_reg=mock.IOMMU_HW_INFO_SELFTEST_REGVAL)
    assert info.max_pasid_log2 == mock.MOCK_PASID_WIDTH
    assert iommufd.get_hw_info(ids.out_idev_id, mock.IOMMU_HW_INFO_TYPE_SELFTEST) == info
    refused(lambda: iommufd.get_hw_info(ids.out_idev_id, 1), errno.EOPNOTSUPP)


def test_dirty_tracking(iommufd: Iommufd, device: Device) -> None:
    ioas, ids = device
    with iommufd.guest_memory(1 << 20) as ram:
        iommufd.ioas_map(ioas, ram, iova=RAM)
        hwpt = iommufd.hwpt_alloc(ids.out_idev_id, ioas, flags=uapi.IOMMU_HWPT_ALLOC_DIRTY_TRACKING)
        iommufd.hwpt_set_dirty_tracking(hwpt, enable=True)
        buffers = Buffers()
        bits = buffers.add(b"\x05".ljust(32, b"\0"))
        arg = mock.Dirty(iova=RAM, length=1 << 20, page_size=4096, uptr=bits)
        iommufd.test(arg, hwpt, memory=buffers)
        assert arg.out_nr_dirty == 2
        bitmap = bytearray(b"\x80" * 32)  # bits are set, none is cleared
        assert iommufd.hwpt_get_dirty_bitmap(hwpt, RAM, 1 << 20, bitmap=bitmap, clear=False) is bitmap
        assert bitmap == b"\x85" + b"\x80" * 31
        assert iommufd.hwpt_get_dirty_bitmap(hwpt, RAM, 1 << 20) == b"\x05".ljust(32, b"\0")
        assert not any(iommufd.hwpt_get_dirty_bitmap(hwpt, RAM, 1 << 20))
        iommufd.hwpt_set_dirty_tracking(hwpt, enable=False)


def test_a_bitmap_larger_than_a_packet(iommufd: Iommufd, device: Device) -> None:
    ioas, ids = device
    length = 1 << 30
    fd = os.memfd_create("large")
    os.ftruncate(fd, length)
    iova = iommufd.ioas_map_file(ioas, fd, 0, length, iova=RAM)
    os.close(fd)
    hwpt = iommufd.hwpt_alloc(ids.out_idev_id, ioas, flags=uapi.IOMMU_HWPT_ALLOC_DIRTY_TRACKING)
    iommufd.hwpt_set_dirty_tracking(hwpt, enable=True)
    page = mock.MOCK_PAGE_SIZE
    last = iova + length - 2 * page
    for size in (65_536, 131_072, 1 << 20):  # inline, and in the scratch file
        for at in (iova, last):
            buffers = Buffers()
            arg = mock.Dirty(iova=at, length=page, page_size=page, uptr=buffers.add(b"\1"))
            iommufd.test(arg, hwpt, memory=buffers)
        found = iommufd.hwpt_get_dirty_bitmap(hwpt, iova, length, page, bytearray(size))
        assert (found[0], found[65_535], sum(map(int.bit_count, found))) == (1, 0x40, 2)
    assert len(iommufd.hwpt_get_dirty_bitmap(hwpt, iova, length, page)) == 65_536


def test_long_transfers_use_the_scratch_file(iommufd: Iommufd) -> None:
    ioas = iommufd.ioas_alloc()
    with iommufd.guest_memory(8 << 20) as ram:
        iommufd.ioas_map(ioas, ram, iova=RAM)
        pattern = bytes(range(256)) * 4096
        with iommufd.create_access(ioas) as dma:
            for length in (1000, 65_536, 65_537, 131_072, 131_073, 1 << 20):
                iommufd.access_write(dma, RAM + 77, pattern[:length])
                assert ram.read(77, length) == pattern[:length]
                assert iommufd.access_read(dma, RAM + 77, length) == pattern[:length]
            assert len(iommufd.access_read(dma, RAM, 8 << 20)) == 8 << 20


def test_nested(iommufd: Iommufd, device: Device) -> None:
    ioas, ids = device
    parent = iommufd.hwpt_alloc(ids.out_idev_id, ioas, flags=uapi.IOMMU_HWPT_ALLOC_NEST_PARENT)
    nested = iommufd.hwpt_alloc(ids.out_idev_id, parent, data=mock.HwptSelftest(iotlb=mock.IOMMU_TEST_IOTLB_DEFAULT))
    check = mock.CheckIotlb(id=1, iotlb=mock.IOMMU_TEST_IOTLB_DEFAULT)
    assert iommufd.test(check, nested) == 0
    assert iommufd.hwpt_invalidate(nested, [mock.HwptInvalidateSelftest(iotlb_id=1)]) == 1
    assert iommufd.test(mock.CheckIotlb(id=1, iotlb=0), nested) == 0
    refused(lambda: iommufd.test(check, nested), errno.EINVAL)
    bad = [mock.HwptInvalidateSelftest(iotlb_id=2), mock.HwptInvalidateSelftest(iotlb_id=9)]
    error = refused(lambda: iommufd.hwpt_invalidate(nested, bad), errno.EINVAL)
    assert isinstance(error.struct, uapi.HwptInvalidate)
    assert error.struct.entry_num == 1
    assert iommufd.hwpt_invalidate(nested, [], data_type=mock.IOMMU_HWPT_INVALIDATE_DATA_SELFTEST, entry_len=8) == 0


# ---- vIOMMU and files ----


@pytest.fixture
def viommu(iommufd: Iommufd, device: Device) -> Viommu:
    ioas, ids = device
    parent = iommufd.hwpt_alloc(ids.out_idev_id, ioas, flags=uapi.IOMMU_HWPT_ALLOC_NEST_PARENT)
    data = mock.ViommuSelftest(in_data=0x1234)
    return iommufd.viommu_alloc(ids.out_idev_id, parent, mock.IOMMU_VIOMMU_TYPE_SELFTEST, data), data, ids


def test_viommu(iommufd: Iommufd, viommu: Viommu) -> None:
    id, data, ids = viommu
    assert data.out_data == 0x1234
    vdevice = iommufd.vdevice_alloc(id, ids.out_idev_id, 0x77)
    refused(lambda: iommufd.vdevice_alloc(id, ids.out_idev_id, 0x77), errno.EEXIST)
    iommufd.destroy(vdevice)


def test_viommu_data_as_bytes(iommufd: Iommufd, device: Device) -> None:
    ioas, ids = device
    parent = iommufd.hwpt_alloc(ids.out_idev_id, ioas, flags=uapi.IOMMU_HWPT_ALLOC_NEST_PARENT)
    data = bytearray(mock.ViommuSelftest(in_data=5).pack())
    iommufd.viommu_alloc(ids.out_idev_id, parent, mock.IOMMU_VIOMMU_TYPE_SELFTEST, data)
    assert mock.ViommuSelftest.unpack(data).out_data == 5


def test_registers(iommufd: Iommufd, viommu: Viommu) -> None:
    id, data, _ = viommu
    with iommufd.mmap(data.out_mmap_length, data.out_mmap_offset) as registers:
        assert bytes(registers.view[:4]) == (0x1234).to_bytes(4, "little")
        refused(lambda: iommufd.destroy(id), errno.EBUSY)
    registers.close()
    iommufd.destroy(id)
    refused(lambda: iommufd.mmap(4096, 0x100_0000), errno.ENXIO)


def test_events(iommufd: Iommufd, viommu: Viommu) -> None:
    id, _, ids = viommu
    iommufd.vdevice_alloc(id, ids.out_idev_id, 0x77)
    nested = iommufd.hwpt_alloc(ids.out_idev_id, id, data=mock.HwptSelftest(mock.IOMMU_TEST_IOTLB_DEFAULT))
    iommufd.test(mock.MockDomainReplace(pt_id=nested), ids.out_stdev_id)
    queue, file = iommufd.veventq_alloc(id, mock.IOMMU_VEVENTQ_TYPE_SELFTEST, 4)
    with file:
        assert file.read(100) == b""
        assert not select.select([file], [], [], 0)[0]
        iommufd.test(mock.TriggerVevent(dev_id=ids.out_idev_id))
        assert select.select([file], [], [], 5)[0]
        event = file.read(100)
        assert uapi.IommufdVeventHeader.unpack(event) == uapi.IommufdVeventHeader(0, 0)
        assert mock.ViommuEventSelftest.unpack(event, 8).virt_id == 0x77
        assert not select.select([file], [], [], 0)[0]
        refused(lambda: file.read(4), errno.EINVAL)
        refused(lambda: iommufd.destroy(queue), errno.EBUSY)
    iommufd.destroy(queue)


def test_faults(iommufd: Iommufd, device: Device) -> None:
    ioas, ids = device
    parent = iommufd.hwpt_alloc(ids.out_idev_id, ioas, flags=uapi.IOMMU_HWPT_ALLOC_NEST_PARENT)
    queue, file = iommufd.fault_queue_alloc()
    data = mock.HwptSelftest(mock.IOMMU_TEST_IOTLB_DEFAULT)
    nested = iommufd.hwpt_alloc(ids.out_idev_id, parent, data=data, fault_id=queue)
    iommufd.test(mock.MockDomainReplace(pt_id=nested), ids.out_stdev_id)
    with file:
        refused(lambda: file.read(39), errno.ESPIPE)
        iommufd.test(mock.TriggerIopf(dev_id=ids.out_idev_id, grpid=3, perm=1, addr=0x5000))
        fault = uapi.HwptPgfault.unpack(file.read(40))
        assert (fault.dev_id, fault.grpid, fault.addr) == (ids.out_idev_id, 3, 0x5000)
        assert file.write(uapi.HwptPageResponse(fault.cookie, 0).pack()) == 8
        refused(lambda: file.write(uapi.HwptPageResponse(fault.cookie, 0).pack()), errno.EINVAL)


def test_files_of_others(iommufd: Iommufd) -> None:
    fd = os.memfd_create("no queue")
    refused(lambda: iommufd.read(fd, 8), errno.EINVAL)
    os.close(fd)
    refused(lambda: iommufd.read(fd, 8), errno.EBADF)
    refused(lambda: iommufd.access_read(fd, 0, 1), errno.EBADFD)


def test_dmabuf(iommufd: Iommufd) -> None:
    ioas = iommufd.ioas_alloc()
    with iommufd.dmabuf_get(0x2000) as dmabuf:
        iova = iommufd.ioas_map_file(ioas, dmabuf, 0, 0x2000)
        assert iommufd.ioas_unmap(ioas, iova, 0x2000) == 0x2000
    refused(lambda: iommufd.dmabuf_get(0), errno.EINVAL)


# ---- the connection ----


def test_reasons(iommufdd_daemon: Daemon) -> None:
    with iommufdd_daemon.open(explain=True) as one, iommufdd_daemon.open(explain=False) as other:
        assert "7" in refused(lambda: one.destroy(7), errno.ENOENT).reason
        error = refused(lambda: other.destroy(7), errno.ENOENT)
        assert (error.reason, str(error)) == ("", "[Errno 2] No such file or directory")


def test_a_container(iommufdd_daemon: Daemon) -> None:
    with Iommufd(iommufdd_daemon.socket_path, container=True) as container:
        assert container.option(uapi.IOMMU_OPTION_RLIMIT_MODE) == 1


def test_machines(iommufdd_daemon: Daemon) -> None:
    with iommufdd_daemon.admin() as admin:
        before = admin.stats().instances
        with iommufdd_daemon.open(machine="shared"), iommufdd_daemon.open(machine="shared"), iommufdd_daemon.open():
            assert admin.stats().instances == before + 2


def test_no_daemon(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        Iommufd(str(tmp_path / "nothing"))
    assert caught.value.filename == str(tmp_path / "nothing")


def test_the_daemon_s_own_refusal(iommufdd_daemon: Daemon) -> None:
    fd = os.memfd_create("no context")
    with pytest.raises(IommufdOSError) as caught:
        Iommufd.from_identity(fd, iommufdd_daemon.socket_path)
    os.close(fd)
    assert caught.value.errno == errno.EBADFD


def test_where_the_socket_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from iommufd_client.connection import default_socket_path

    monkeypatch.delenv("IOMMUFDD_SOCKET", raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert default_socket_path() == "/run/iommufdd/iommufdd.sock"
    (tmp_path / "iommufdd.sock").touch()
    assert default_socket_path() == str(tmp_path / "iommufdd.sock")
    monkeypatch.setenv("IOMMUFDD_SOCKET", "/somewhere")
    assert default_socket_path() == "/somewhere"


def test_a_closed_channel(iommufdd_daemon: Daemon) -> None:
    iommufd = iommufdd_daemon.open()
    iommufd.close()
    iommufd.close()
    assert iommufd.closed
    with pytest.raises(OSError, match="Bad file"):
        iommufd.ioas_alloc()
