"""Scenarios for the operations of the selftest command, and for VFIO."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import iommufd_uapi.iommufd as uapi
import iommufd_uapi.iommufd_test as test_uapi
from iommufd_uapi import vfio
from iommufdd.user import PAGE_SIZE

from .harness import APERTURE, ARGUMENT, DATA, OPS, PASID, PASID_DEVICE, Client
from .scenarios import (
    SIZE,
    mapped,
    ready,
    ready_test,
    scenario,
    unprivileged,
    with_device,
    with_dirty_pages,
    with_faults,
    with_viommu,
)

if TYPE_CHECKING:
    from .scenarios import Call

# ---- devices ----


@scenario
def mock_domain(c: Client) -> Call:
    """A new automatic HWPT, and pages to pin for it."""
    unprivileged(c)
    ioas, _ = mapped(c, domain=False)
    return ready_test(c, test_uapi.MockDomain(), ioas)


@scenario
def mock_domain_flags(c: Client) -> Call:
    """Into the automatic HWPT that is there."""
    ioas, _ = with_device(c)
    return ready_test(c, test_uapi.MockDomainFlags(dev_flags=PASID_DEVICE), ioas)


@scenario
def mock_domain_replace(c: Client) -> Call:
    """By a HWPT of another IOAS; the automatic one goes."""
    _, mock = with_device(c)
    other = c.hwpt(mock.idev, c.ioas_alloc())
    return ready_test(c, test_uapi.MockDomainReplace(other), mock.stdev)


@scenario
def mock_domain_replace_by_ioas(c: Client) -> Call:
    _, mock = with_device(c)
    unprivileged(c)
    ioas, _ = mapped(c, domain=False)
    return ready_test(c, test_uapi.MockDomainReplace(ioas), mock.stdev)


@scenario
def pasid_attach(c: Client) -> Call:
    ioas, mock = with_device(c)
    hwpt = c.hwpt(mock.idev, ioas, PASID)
    c.replace(mock.stdev, hwpt)
    return ready_test(c, test_uapi.PasidAttach(5, hwpt), mock.stdev)


@scenario
def pasid_replace(c: Client) -> Call:
    ioas, mock = with_device(c)
    first, second = c.hwpt(mock.idev, ioas, PASID), c.hwpt(mock.idev, ioas, PASID)
    c.replace(mock.stdev, first)
    c.pasid_attach(mock.stdev, 5, first)
    return ready_test(c, test_uapi.PasidReplace(5, second), mock.stdev)


@scenario
def pasid_detach(c: Client) -> Call:
    ioas, mock = with_device(c)
    hwpt = c.hwpt(mock.idev, ioas, PASID)
    c.replace(mock.stdev, hwpt)
    c.pasid_attach(mock.stdev, 5, hwpt)
    return ready_test(c, test_uapi.PasidDetach(5), mock.stdev)


@scenario
def pasid_check_hwpt(c: Client) -> Call:
    _, mock = with_device(c)
    return ready_test(c, test_uapi.PasidCheck(0, mock.hwpt), mock.stdev)


# ---- IOAS and memory ----


@scenario
def add_reserved(c: Client) -> Call:
    return ready_test(c, test_uapi.AddReserved(0x1000, 0x1000), c.ioas_alloc())


@scenario
def md_check_map(c: Client) -> Call:
    ioas = c.ioas_alloc()
    mock = c.mock_domain(ioas)
    addr = c.process.buffer()
    c.map(ioas, addr, SIZE, APERTURE)
    return ready_test(c, test_uapi.CheckMap(APERTURE, SIZE, addr), mock.hwpt)


@scenario
def md_check_refs(c: Client) -> Call:
    _, addr = mapped(c)
    return ready_test(c, test_uapi.CheckRefs(SIZE, addr, 1))


@scenario
def dirty(c: Client) -> Call:
    hwpt = with_dirty_pages(c)
    uptr = c.process.put(b"\x0f")
    return ready_test(c, test_uapi.Dirty(iova=APERTURE, length=SIZE, page_size=PAGE_SIZE, uptr=uptr), hwpt)


@scenario
def set_temp_memory_limit(c: Client) -> Call:
    return ready_test(c, test_uapi.MemoryLimit(4096))


# ---- accesses ----


@scenario
def create_access(c: Client) -> Call:
    ioas, _ = mapped(c, domain=False)
    return ready_test(c, test_uapi.CreateAccess(flags=1), ioas)


@scenario
def access_replace_ioas(c: Client) -> Call:
    """With pages pinned in the old one, which the callback lets go."""
    ioas, _ = mapped(c, domain=False)
    fd = c.access(ioas)
    c.pin(fd, APERTURE, PAGE_SIZE)
    return ready_test(c, test_uapi.AccessReplaceIoas(c.ioas_alloc()), fd)


@scenario
def access_pages(c: Client) -> Call:
    """Of two areas, compared with the caller's."""
    unprivileged(c)
    ioas, addr = mapped(c, domain=False)
    c.map(ioas, addr, SIZE, APERTURE + SIZE)
    fd = c.access(ioas)
    return ready_test(c, test_uapi.AccessPages(iova=APERTURE, length=SIZE, uptr=addr), fd)


@scenario
def access_pages_of_two_areas(c: Client) -> Call:
    unprivileged(c)
    ioas, addr = mapped(c, domain=False)
    c.map(ioas, addr, SIZE, APERTURE + SIZE)
    fd = c.access(ioas)
    return ready_test(c, test_uapi.AccessPages(iova=APERTURE + PAGE_SIZE, length=SIZE), fd)


@scenario
def destroy_access_pages(c: Client) -> Call:
    ioas, _ = mapped(c, domain=False)
    fd = c.access(ioas)
    return ready_test(c, test_uapi.DestroyAccessPages(c.pin(fd, APERTURE, PAGE_SIZE)), fd)


@scenario
def access_rw(c: Client) -> Call:
    """Read, as the process itself."""
    ioas, _ = mapped(c, domain=False)
    return ready_test(c, test_uapi.AccessRw(APERTURE, 64, DATA, 0), c.access(ioas))


@scenario
def access_rw_slow(c: Client) -> Call:
    """Written, through pages looked up one by one and in a row."""
    ioas, addr = mapped(c, domain=False)
    c.map(ioas, addr, SIZE, APERTURE + SIZE)
    data = c.process.put(bytes(PAGE_SIZE + 128))
    flags = test_uapi.MOCK_ACCESS_RW_WRITE | test_uapi.MOCK_ACCESS_RW_SLOW_PATH
    op = test_uapi.AccessRw(APERTURE + SIZE - PAGE_SIZE - 64, PAGE_SIZE + 128, data, flags)
    return ready_test(c, op, c.access(ioas))


# ---- caches, faults, events, dma-bufs ----


@scenario
def md_check_iotlb(c: Client) -> Call:
    _, mock, viommu = with_viommu(c)
    return ready_test(c, test_uapi.CheckIotlb(1, 0xBEEF), c.nested(mock.idev, viommu))


@scenario
def dev_check_cache(c: Client) -> Call:
    _, mock = with_device(c)
    return ready_test(c, test_uapi.CheckDevCache(1, test_uapi.IOMMU_TEST_DEV_CACHE_DEFAULT), mock.idev)


@scenario
def trigger_iopf(c: Client) -> Call:
    _, mock = with_faults(c)
    return ready_test(c, test_uapi.TriggerIopf(dev_id=mock.idev, grpid=9))


@scenario
def trigger_vevent(c: Client) -> Call:
    _, mock, viommu = with_viommu(c)
    c.vdevice(viommu, mock.idev, 7)
    c.replace(mock.stdev, c.nested(mock.idev, viommu))
    c.veventq(viommu)
    return ready_test(c, test_uapi.TriggerVevent(mock.idev))


@scenario
def dmabuf_get(c: Client) -> Call:
    return ready_test(c, test_uapi.DmabufGet(SIZE))


@scenario
def dmabuf_revoke(c: Client) -> Call:
    fd = c.result(test_uapi.TestCmd(op=OPS[test_uapi.DmabufGet], u=test_uapi.DmabufGet(SIZE).pack()))
    return ready_test(c, test_uapi.DmabufRevoke(fd, 1))


# ---- VFIO ----


def with_compat_ioas(c: Client, *, type1: bool = False) -> int:
    ioas = c.ioas_alloc()
    c.vfio_ioas(uapi.IOMMU_VFIO_IOAS_SET, ioas)
    if type1:
        c.vfio(vfio.VFIO_SET_IOMMU, vfio.VFIO_TYPE1_IOMMU)
    c.mock_domain(ioas)
    return ioas


@scenario
def vfio_get_api_version(c: Client) -> Call:
    return lambda: c.rc(vfio.VFIO_GET_API_VERSION, 0)


@scenario
def vfio_check_extension(c: Client) -> Call:
    with_compat_ioas(c)
    return lambda: c.rc(vfio.VFIO_CHECK_EXTENSION, vfio.VFIO_DMA_CC_IOMMU)


@scenario
def vfio_set_iommu(c: Client) -> Call:
    with_compat_ioas(c)
    return lambda: c.rc(vfio.VFIO_SET_IOMMU, vfio.VFIO_TYPE1_IOMMU)


@scenario
def vfio_iommu_get_info(c: Client) -> Call:
    with_compat_ioas(c)
    return ready(c, vfio.VfioIommuType1Info(argsz=4096))


@scenario
def vfio_iommu_map_dma(c: Client) -> Call:
    with_compat_ioas(unprivileged(c))
    return ready(c, vfio.VfioIommuType1DmaMap(flags=3, vaddr=c.process.buffer(), iova=APERTURE, size=SIZE))


@scenario
def vfio_iommu_unmap_dma(c: Client) -> Call:
    """A hole in the middle of an area, which is cut twice."""
    with_compat_ioas(c, type1=True)
    c.map_dma(c.process.buffer(), SIZE, APERTURE)
    return ready(c, vfio.VfioIommuType1DmaUnmap(iova=APERTURE + PAGE_SIZE, size=PAGE_SIZE))


@scenario
def unknown_number(c: Client) -> Call:
    """ENOTTY is its success: it reads the size all the same."""
    c.process.put(uapi.IoasAlloc().pack(), ARGUMENT)

    def call() -> int:
        rc = c.rc(0x3B95, ARGUMENT)
        return 0 if rc == -errno.ENOTTY else rc

    return call
