"""The selftest's mock: its numbers, its tables, and what it remembers of a vIOMMU (selftest.c)."""

import pytest

import iommufd_uapi.iommufd_test as test_uapi
from iommufdd.errors import EINVAL, ENOENT
from iommufdd.iommu.mock import MockDevice, MockIommu, MockPaging
from iommufdd.iommu.mock_viommu import invalidate
from iommufdd.iommu.ops import Cap
from iommufdd.user import PAGE_SIZE


def test_numbers_of_devices_that_went_are_used_again() -> None:
    iommu = MockIommu()
    first, second = iommu.new_device(0), iommu.new_device(0)
    assert (first.name, second.name) == ("iommufd_mock0", "iommufd_mock1")
    assert first.group is not second.group
    iommu.forget_device(first)
    assert iommu.new_device(0).name == "iommufd_mock0"
    assert iommu.new_device(0).name == "iommufd_mock2"


@pytest.mark.parametrize("flags", [2, 8, 1 << 31])
def test_flags_of_nobody_make_no_device(flags: int) -> None:
    iommu = MockIommu()
    with pytest.raises(EINVAL):
        iommu.new_device(flags)
    assert iommu.new_device(0).number == 0


def test_what_a_device_can_do() -> None:
    iommu = MockIommu()
    plain = iommu.new_device(0)
    other = iommu.new_device(test_uapi.MOCK_FLAGS_DEVICE_NO_DIRTY | test_uapi.MOCK_FLAGS_DEVICE_PASID)
    assert {cap for cap in Cap if iommu.capable(plain, cap)} == {Cap.CACHE_COHERENCY, Cap.DIRTY_TRACKING}
    assert {cap for cap in Cap if iommu.capable(other, cap)} == {Cap.CACHE_COHERENCY}
    assert (plain.max_pasids, other.max_pasids) == (1, 1 << test_uapi.MOCK_PASID_WIDTH)


def test_tables() -> None:
    iommu = MockIommu()
    small, huge = (MockPaging(iommu, huge=one, dirty=False) for one in (False, True))
    assert small.pgsize_bitmap & -small.pgsize_bitmap == test_uapi.MOCK_PAGE_SIZE
    assert (small.aperture_start, small.aperture_end) == (test_uapi.MOCK_APERTURE_START, test_uapi.MOCK_APERTURE_LAST)
    assert huge.pgsize_bitmap == PAGE_SIZE | test_uapi.MOCK_HUGE_PAGE_SIZE
    assert (huge.aperture_start, huge.aperture_end) == (0, 2**38 - 1)
    assert small.dirty_ops is None


def test_an_event_needs_a_viommu() -> None:
    device = MockIommu().new_device(0)
    assert isinstance(device, MockDevice)
    with pytest.raises(ENOENT):
        device.trigger_vevent()


def test_one_entry_of_a_cache_or_all() -> None:
    cache = [1, 2, 3, 4]
    invalidate(cache, 0, 2)
    assert cache == [1, 2, 0, 4]
    with pytest.raises(EINVAL):
        invalidate(cache, test_uapi.IOMMU_TEST_INVALIDATE_FLAG_ALL, 4)  # the number is looked at all the same
    invalidate(cache, test_uapi.IOMMU_TEST_INVALIDATE_FLAG_ALL, 3)
    assert cache == [0] * 4
