"""The mock's vIOMMU: nested domains, device caches, two hardware queues and a page to map (selftest.c)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import iommufd_uapi.iommufd as uapi
import iommufd_uapi.iommufd_test as test_uapi
from iommufdd.errors import EEXIST, EINVAL, EIO, EOPNOTSUPP, IommufdError
from iommufdd.user import PAGE_SIZE

from .selftest_ops import SelftestDevice

if TYPE_CHECKING:
    from collections.abc import Callable

    from iommufdd.user import PageRun
    from iommufdd.user_data import UserData, UserDataArray

    from .ops import Domain, HwQueuePort, MmapRegion, ViommuPort

MMAP_LENGTH = 2 * PAGE_SIZE
INVALIDATE_TYPE = test_uapi.IOMMU_VIOMMU_INVALIDATE_DATA_SELFTEST


def invalidate(cache: list[int], flags: int, index: int) -> None:
    """Zero one entry, or all of them with IOMMU_TEST_INVALIDATE_FLAG_ALL: EOPNOTSUPP, EINVAL."""
    if flags & ~test_uapi.IOMMU_TEST_INVALIDATE_FLAG_ALL:
        raise EOPNOTSUPP(f"invalidation flags {flags:#x} are not known")
    if index >= len(cache):
        raise EINVAL(f"there is no cache entry {index}")
    if flags & test_uapi.IOMMU_TEST_INVALIDATE_FLAG_ALL:
        cache[:] = [0] * len(cache)
    else:
        cache[index] = 0


class MockViommu:
    """struct mock_viommu"""

    def __init__(
        self, core: ViommuPort, alloc_nested: Callable[[UserData, MockViommu], Domain], user_data: UserData | None
    ) -> None:
        self.core = core
        self._alloc_nested = alloc_nested
        self._queues: list[HwQueuePort | None] = [None] * test_uapi.IOMMU_TEST_HW_QUEUE_MAX
        self._region: MmapRegion | None = None
        if user_data is not None:
            self._set_up_mmap(user_data)

    def _set_up_mmap(self, user_data: UserData) -> None:
        """in_data comes back in out_data and at the start of a region to map."""
        viommu_type = test_uapi.IOMMU_VIOMMU_TYPE_SELFTEST
        data = user_data.copy_struct(test_uapi.ViommuSelftest, viommu_type, "out_data")
        region = self._region = self.core.alloc_mmap(MMAP_LENGTH)
        region.data[:4] = data.in_data.to_bytes(4, "little")
        data.out_data = data.in_data
        data.out_mmap_length = MMAP_LENGTH
        data.out_mmap_offset = region.offset
        try:
            user_data.copy_struct_to_user(data, viommu_type, "out_data")
        except IommufdError:
            self.destroy()
            raise

    def destroy(self) -> None:
        """mock_viommu_destroy()"""
        if self._region is not None:
            self.core.destroy_mmap(self._region)
            self._region = None

    def alloc_domain_nested(self, flags: int, user_data: UserData) -> Domain:
        """mock_viommu_alloc_domain_nested()"""
        if flags & ~uapi.IOMMU_HWPT_ALLOC_PASID:
            raise EOPNOTSUPP("the mock does not know these flags")
        return self._alloc_nested(user_data, self)

    def cache_invalidate(self, array: UserDataArray) -> None:
        """mock_viommu_cache_invalidate(): all entries are copied before any work; EINVAL, E2BIG, EFAULT, EOPNOTSUPP."""
        if not array.entry_num and array.data_type == INVALIDATE_TYPE:
            return  # quirk: an empty array tells whether the type is known
        try:
            entries = array.copy_all(test_uapi.ViommuInvalidateSelftest, INVALIDATE_TYPE)
        finally:
            array.entry_num = 0
        for entry in entries:
            if entry.flags & ~test_uapi.IOMMU_TEST_INVALIDATE_FLAG_ALL:
                raise EOPNOTSUPP(f"invalidation flags {entry.flags:#x} are not known")
            if entry.cache_id > test_uapi.MOCK_DEV_CACHE_ID_MAX:
                raise EINVAL(f"there is no cache entry {entry.cache_id}")
            dev = self.core.find_dev(entry.vdev_id)
            if not isinstance(dev, SelftestDevice):
                raise EINVAL(f"there is no vDEVICE {entry.vdev_id:#x}")
            invalidate(dev.cache, entry.flags, entry.cache_id)
            array.entry_num += 1

    def hw_queue_supported(self, queue_type: int) -> bool:
        """mock_viommu_get_hw_queue_size()"""
        return queue_type == test_uapi.IOMMU_HW_QUEUE_TYPE_SELFTEST

    def hw_queue_init(self, queue: HwQueuePort, index: int, base: tuple[PageRun, int]) -> Callable[[], None]:
        """mock_hw_queue_init_phys(): EINVAL, EEXIST, EIO (the queue before it is missing)."""
        if index >= len(self._queues):
            raise EINVAL(f"there is no queue {index}")
        if self._queues[index] is not None:
            raise EEXIST(f"queue {index} exists")
        before = self._queues[index - 1] if index else None
        if index and before is None:
            raise EIO(f"queue {index} needs queue {index - 1}")
        if before is not None:
            queue.depend(before)
        self._queues[index] = queue

        def destroy() -> None:
            # quirk: the queue never learns its index, so it is always queue 0 that is freed (mock_hw_queue_destroy)
            self._queues[0] = None
            if before is not None:
                queue.undepend(before)

        return destroy
