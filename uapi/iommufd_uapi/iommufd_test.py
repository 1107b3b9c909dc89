"""Room uapi: drivers/iommu/iommufd/iommufd_test.h of Linux 7.2, the ioctl of the kernel's own test suite.

struct iommu_test_cmd has one union with a struct per operation. Here the union is 48 raw bytes, `u`, and each
operation has a layout of its own; TEST_OPS says which, and what else a carrier of the call must know.
"""

from typing import Annotated

import msgspec

from .iommufd import IOMMUFD_CMD_BASE
from .layout import (
    Address,
    BitmapBytes,
    Fd,
    FdIn,
    FdOut,
    Field,
    In,
    Ioctl,
    Layout,
    Out,
    Pointer,
    When,
    ioctl,
    layout,
    raw,
    s32,
    u32,
    u64,
)

SZ_16M = 16 << 20  # selftest.c refuses longer buffers


IOMMU_TEST_OP_ADD_RESERVED = 1
IOMMU_TEST_OP_MOCK_DOMAIN = 2
IOMMU_TEST_OP_MD_CHECK_MAP = 3
IOMMU_TEST_OP_MD_CHECK_REFS = 4
IOMMU_TEST_OP_CREATE_ACCESS = 5
IOMMU_TEST_OP_DESTROY_ACCESS_PAGES = 6
IOMMU_TEST_OP_ACCESS_PAGES = 7
IOMMU_TEST_OP_ACCESS_RW = 8
IOMMU_TEST_OP_SET_TEMP_MEMORY_LIMIT = 9
IOMMU_TEST_OP_MOCK_DOMAIN_REPLACE = 10
IOMMU_TEST_OP_ACCESS_REPLACE_IOAS = 11
IOMMU_TEST_OP_MOCK_DOMAIN_FLAGS = 12
IOMMU_TEST_OP_DIRTY = 13
IOMMU_TEST_OP_MD_CHECK_IOTLB = 14
IOMMU_TEST_OP_TRIGGER_IOPF = 15
IOMMU_TEST_OP_DEV_CHECK_CACHE = 16
IOMMU_TEST_OP_TRIGGER_VEVENT = 17
IOMMU_TEST_OP_PASID_ATTACH = 18
IOMMU_TEST_OP_PASID_REPLACE = 19
IOMMU_TEST_OP_PASID_DETACH = 20
IOMMU_TEST_OP_PASID_CHECK_HWPT = 21
IOMMU_TEST_OP_DMABUF_GET = 22
IOMMU_TEST_OP_DMABUF_REVOKE = 23

MOCK_IOMMUPT_DEFAULT = 0
MOCK_IOMMUPT_HUGE = 1

# For MOCK_IOMMUPT_DEFAULT:
MOCK_APERTURE_START = 1 << 24
MOCK_APERTURE_LAST = (1 << 31) - 1
MOCK_PAGE_SIZE = 2048
MOCK_HUGE_PAGE_SIZE = 512 * MOCK_PAGE_SIZE

MOCK_FLAGS_ACCESS_WRITE = 1 << 0
MOCK_FLAGS_ACCESS_SYZ = 1 << 16

MOCK_ACCESS_RW_WRITE = 1 << 0
MOCK_ACCESS_RW_SLOW_PATH = 1 << 2

MOCK_FLAGS_ACCESS_CREATE_NEEDS_PIN_PAGES = 1 << 0

MOCK_FLAGS_DEVICE_NO_DIRTY = 1 << 0
MOCK_FLAGS_DEVICE_PASID = 1 << 2

MOCK_NESTED_DOMAIN_IOTLB_ID_MAX = 3
MOCK_NESTED_DOMAIN_IOTLB_NUM = 4

MOCK_DEV_CACHE_ID_MAX = 3
MOCK_DEV_CACHE_NUM = 4

IOMMU_TEST_PASID_RESERVED = 1024


@layout
class AddReserved(Layout):
    """iommu_test_cmd.add_reserved"""

    start: u64 = 0
    length: u64 = 0


@layout
class MockDomain(Layout):
    """iommu_test_cmd.mock_domain"""

    out_stdev_id: u32 = 0
    out_hwpt_id: u32 = 0
    out_idev_id: u32 = 0


@layout
class MockDomainFlags(Layout):
    """iommu_test_cmd.mock_domain_flags"""

    out_stdev_id: u32 = 0
    out_hwpt_id: u32 = 0
    out_idev_id: u32 = 0
    dev_flags: u32 = 0


@layout
class MockDomainReplace(Layout):
    """iommu_test_cmd.mock_domain_replace"""

    pt_id: u32 = 0


@layout
class CheckMap(Layout):
    """iommu_test_cmd.check_map

    The pages behind `uptr` are compared with those mapped at `iova`: as pages, not as bytes.
    """

    iova: u64 = 0
    length: u64 = 0
    uptr: Annotated[u64, Address(Field("length"))] = 0


@layout
class CheckRefs(Layout):
    """iommu_test_cmd.check_refs

    Compares the pin count of each page behind `uptr`.
    """

    length: u64 = 0
    uptr: Annotated[u64, Address(Field("length"))] = 0
    refs: u32 = 0


@layout
class CreateAccess(Layout):
    """iommu_test_cmd.create_access"""

    out_access_fd: Annotated[u32, FdOut()] = 0
    flags: u32 = 0


@layout
class DestroyAccessPages(Layout):
    """iommu_test_cmd.destroy_access_pages"""

    access_pages_id: u32 = 0


@layout
class AccessPages(Layout):
    """iommu_test_cmd.access_pages

    Pins, and compares the pages with those behind `uptr`.
    """

    flags: u32 = 0
    out_access_pages_id: u32 = 0
    iova: u64 = 0
    length: u64 = 0
    uptr: Annotated[u64, Address(Field("length").upto(SZ_16M))] = 0


_RW_BYTES = Field("length").upto(SZ_16M)


@layout
class AccessRw(Layout):
    """iommu_test_cmd.access_rw"""

    iova: u64 = 0
    length: u64 = 0
    uptr: Annotated[u64, When("flags", MOCK_ACCESS_RW_WRITE, In(_RW_BYTES), Out(_RW_BYTES))] = 0
    flags: u32 = 0


@layout
class MemoryLimit(Layout):
    """iommu_test_cmd.memory_limit"""

    limit: u32 = 0


@layout
class AccessReplaceIoas(Layout):
    """iommu_test_cmd.access_replace_ioas"""

    ioas_id: u32 = 0


@layout
class Dirty(Layout):
    """iommu_test_cmd.dirty"""

    flags: u32 = 0
    iova: u64 = 0
    length: u64 = 0
    page_size: u64 = 0
    uptr: Annotated[u64, In(BitmapBytes("length", "page_size").upto(SZ_16M))] = 0
    out_nr_dirty: u64 = 0


@layout
class CheckIotlb(Layout):
    """iommu_test_cmd.check_iotlb"""

    id: u32 = 0
    iotlb: u32 = 0


@layout
class TriggerIopf(Layout):
    """iommu_test_cmd.trigger_iopf"""

    dev_id: u32 = 0
    pasid: u32 = 0
    grpid: u32 = 0
    perm: u32 = 0
    addr: u64 = 0


@layout
class CheckDevCache(Layout):
    """iommu_test_cmd.check_dev_cache"""

    id: u32 = 0
    cache: u32 = 0


@layout
class TriggerVevent(Layout):
    """iommu_test_cmd.trigger_vevent"""

    dev_id: u32 = 0


@layout
class PasidAttach(Layout):
    """iommu_test_cmd.pasid_attach"""

    pasid: u32 = 0
    pt_id: u32 = 0


@layout
class PasidReplace(Layout):
    """iommu_test_cmd.pasid_replace"""

    pasid: u32 = 0
    pt_id: u32 = 0


@layout
class PasidDetach(Layout):
    """iommu_test_cmd.pasid_detach"""

    pasid: u32 = 0


@layout
class PasidCheck(Layout):
    """iommu_test_cmd.pasid_check"""

    pasid: u32 = 0
    hwpt_id: u32 = 0


@layout
class DmabufGet(Layout):
    """iommu_test_cmd.dmabuf_get"""

    length: u32 = 0
    open_flags: u32 = 0


@layout
class DmabufRevoke(Layout):
    """iommu_test_cmd.dmabuf_revoke"""

    dmabuf_fd: Annotated[s32, FdIn()] = 0
    revoked: u32 = 0


@ioctl(IOMMUFD_CMD_BASE + 32, last="last")
class TestCmd(Ioctl):
    """struct iommu_test_cmd"""

    __test__ = False  # pytest: not a test, whatever the name says

    op: u32 = 0
    id: u32 = 0
    reserved: u32 = 0
    u: Annotated[bytes, raw(48, align=8)] = bytes(48)
    last: u32 = 0


IOMMU_TEST_CMD = TestCmd.CMD


class TestOp(msgspec.Struct, frozen=True):
    """One operation of IOMMU_TEST_CMD."""

    __test__ = False

    name: str
    union: type[Layout]
    id_is_fd: bool = False
    returns_fd: bool = False

    def pointers(self) -> tuple[Pointer, ...]:
        """Pointers, at their offsets in struct iommu_test_cmd."""
        base = TestCmd.offsetof("u")
        return tuple(msgspec.structs.replace(p, offset=base + p.offset) for p in self.union.POINTERS)

    def fds(self) -> tuple[Fd, ...]:
        """fds, at their offsets in struct iommu_test_cmd."""
        base = TestCmd.offsetof("u")
        found = tuple(msgspec.structs.replace(fd, offset=base + fd.offset) for fd in self.union.FDS)
        return (Fd("id", TestCmd.offsetof("id"), FdIn.direction), *found) if self.id_is_fd else found


TEST_OPS: dict[int, TestOp] = {
    IOMMU_TEST_OP_ADD_RESERVED: TestOp("IOMMU_TEST_OP_ADD_RESERVED", AddReserved),
    IOMMU_TEST_OP_MOCK_DOMAIN: TestOp("IOMMU_TEST_OP_MOCK_DOMAIN", MockDomain),
    IOMMU_TEST_OP_MD_CHECK_MAP: TestOp("IOMMU_TEST_OP_MD_CHECK_MAP", CheckMap),
    IOMMU_TEST_OP_MD_CHECK_REFS: TestOp("IOMMU_TEST_OP_MD_CHECK_REFS", CheckRefs),
    IOMMU_TEST_OP_CREATE_ACCESS: TestOp("IOMMU_TEST_OP_CREATE_ACCESS", CreateAccess),
    IOMMU_TEST_OP_DESTROY_ACCESS_PAGES: TestOp(
        "IOMMU_TEST_OP_DESTROY_ACCESS_PAGES", DestroyAccessPages, id_is_fd=True
    ),
    IOMMU_TEST_OP_ACCESS_PAGES: TestOp("IOMMU_TEST_OP_ACCESS_PAGES", AccessPages, id_is_fd=True),
    IOMMU_TEST_OP_ACCESS_RW: TestOp("IOMMU_TEST_OP_ACCESS_RW", AccessRw, id_is_fd=True),
    IOMMU_TEST_OP_SET_TEMP_MEMORY_LIMIT: TestOp("IOMMU_TEST_OP_SET_TEMP_MEMORY_LIMIT", MemoryLimit),
    IOMMU_TEST_OP_MOCK_DOMAIN_REPLACE: TestOp("IOMMU_TEST_OP_MOCK_DOMAIN_REPLACE", MockDomainReplace),
    IOMMU_TEST_OP_ACCESS_REPLACE_IOAS: TestOp(
        "IOMMU_TEST_OP_ACCESS_REPLACE_IOAS", AccessReplaceIoas, id_is_fd=True
    ),
    IOMMU_TEST_OP_MOCK_DOMAIN_FLAGS: TestOp("IOMMU_TEST_OP_MOCK_DOMAIN_FLAGS", MockDomainFlags),
    IOMMU_TEST_OP_DIRTY: TestOp("IOMMU_TEST_OP_DIRTY", Dirty),
    IOMMU_TEST_OP_MD_CHECK_IOTLB: TestOp("IOMMU_TEST_OP_MD_CHECK_IOTLB", CheckIotlb),
    IOMMU_TEST_OP_TRIGGER_IOPF: TestOp("IOMMU_TEST_OP_TRIGGER_IOPF", TriggerIopf),
    IOMMU_TEST_OP_DEV_CHECK_CACHE: TestOp("IOMMU_TEST_OP_DEV_CHECK_CACHE", CheckDevCache),
    IOMMU_TEST_OP_TRIGGER_VEVENT: TestOp("IOMMU_TEST_OP_TRIGGER_VEVENT", TriggerVevent),
    IOMMU_TEST_OP_PASID_ATTACH: TestOp("IOMMU_TEST_OP_PASID_ATTACH", PasidAttach),
    IOMMU_TEST_OP_PASID_REPLACE: TestOp("IOMMU_TEST_OP_PASID_REPLACE", PasidReplace),
    IOMMU_TEST_OP_PASID_DETACH: TestOp("IOMMU_TEST_OP_PASID_DETACH", PasidDetach),
    IOMMU_TEST_OP_PASID_CHECK_HWPT: TestOp("IOMMU_TEST_OP_PASID_CHECK_HWPT", PasidCheck),
    IOMMU_TEST_OP_DMABUF_GET: TestOp("IOMMU_TEST_OP_DMABUF_GET", DmabufGet, returns_fd=True),
    IOMMU_TEST_OP_DMABUF_REVOKE: TestOp("IOMMU_TEST_OP_DMABUF_REVOKE", DmabufRevoke),
}

MOCK_PASID_WIDTH = 20

IOMMU_HW_INFO_TYPE_SELFTEST = 0xFEEDBEEF
IOMMU_HW_INFO_SELFTEST_REGVAL = 0xDEADBEEF


@layout
class TestHwInfo(Layout):
    """struct iommu_test_hw_info"""

    __test__ = False

    flags: u32 = 0
    test_reg: u32 = 0


IOMMU_HWPT_DATA_SELFTEST = 0xDEAD
IOMMU_TEST_IOTLB_DEFAULT = 0xBADBEEF
IOMMU_TEST_DEV_CACHE_DEFAULT = 0xBADDAD


@layout
class HwptSelftest(Layout):
    """struct iommu_hwpt_selftest"""

    iotlb: u32 = 0
    pagetable_type: u32 = 0


IOMMU_HWPT_INVALIDATE_DATA_SELFTEST = 0xDEADBEEF
IOMMU_HWPT_INVALIDATE_DATA_SELFTEST_INVALID = 0xDADBEEF
IOMMU_TEST_INVALIDATE_FLAG_ALL = 1 << 0


@layout
class HwptInvalidateSelftest(Layout):
    """struct iommu_hwpt_invalidate_selftest"""

    flags: u32 = 0
    iotlb_id: u32 = 0


IOMMU_VIOMMU_TYPE_SELFTEST = 0xDEADBEEF


@layout
class ViommuSelftest(Layout):
    """struct iommu_viommu_selftest"""

    in_data: u32 = 0
    out_data: u32 = 0
    out_mmap_offset: u64 = 0
    out_mmap_length: u64 = 0


IOMMU_VIOMMU_INVALIDATE_DATA_SELFTEST = 0xDEADBEEF
IOMMU_VIOMMU_INVALIDATE_DATA_SELFTEST_INVALID = 0xDADBEEF


@layout
class ViommuInvalidateSelftest(Layout):
    """struct iommu_viommu_invalidate_selftest"""

    flags: u32 = 0
    vdev_id: u32 = 0
    cache_id: u32 = 0


IOMMU_VEVENTQ_TYPE_SELFTEST = 0xBEEFBEEF


@layout
class ViommuEventSelftest(Layout):
    """struct iommu_viommu_event_selftest"""

    virt_id: u32 = 0


IOMMU_HW_QUEUE_TYPE_SELFTEST = 0xDEADBEEF
IOMMU_TEST_HW_QUEUE_MAX = 2
