"""The selftest's mock IOMMU (selftest.c): paging domains of 2 KiB pages, and no hardware behind them."""

from __future__ import annotations

import iommufd_uapi.iommufd as uapi
import iommufd_uapi.iommufd_test as test_uapi
from iommufdd.errors import EINVAL, ENOENT, ENOMEM, EOPNOTSUPP
from iommufdd.user import PAGE_SIZE
from iommufdd.user_data import UserData, UserDataArray

from .dirty import DirtyBits
from .group import IommuGroup, Iopf
from .mock_viommu import MockViommu, invalidate
from .ops import Cap, Device, Domain, DomainType, ViommuPort
from .selftest_ops import SelftestDevice

PAGING_FLAGS = (
    uapi.IOMMU_HWPT_ALLOC_DIRTY_TRACKING | uapi.IOMMU_HWPT_ALLOC_NEST_PARENT | uapi.IOMMU_HWPT_ALLOC_PASID
)
VA_LAST = 2**38 - 1  # three levels of tables of 2 KiB (amdv1pt_iommu_fmt_init)
PGSIZES = 2**37 - 2**11  # AMDv1 with a granule of 2 KiB and three levels maps any power of two up to 64 GiB


class MockDevice(SelftestDevice):
    """struct mock_dev: each has a group of its own."""

    def __init__(self, iommu: MockIommu, number: int, flags: int) -> None:
        self.iommu = iommu
        self.group = IommuGroup(iommu.blocked_domain)
        self.group.devices.append(self)
        self.name = f"iommufd_mock{number}"
        self.number = number
        self.no_dirty = bool(flags & test_uapi.MOCK_FLAGS_DEVICE_NO_DIRTY)
        # quirk: a pasid-num-bits of 0 still makes room for one PASID (dev_iommu_get_max_pasids)
        self.max_pasids = 1 << test_uapi.MOCK_PASID_WIDTH if flags & test_uapi.MOCK_FLAGS_DEVICE_PASID else 1
        self.cache = [test_uapi.IOMMU_TEST_DEV_CACHE_DEFAULT] * test_uapi.MOCK_DEV_CACHE_NUM
        self.iopf = Iopf(self)
        self.viommu: MockViommu | None = None
        self.vdev_id = 0
        self.domain: Domain | None = None
        self.pasid_fake_error = False

    def trigger_vevent(self) -> None:
        """iommufd_test_trigger_vevent(): ENOENT, EOPNOTSUPP. quirk: a vDEVICE with virt_id 0 is none."""
        if self.viommu is None or not self.vdev_id:
            raise ENOENT(f"{self.name} is attached to no vIOMMU")
        event = test_uapi.ViommuEventSelftest(virt_id=self.vdev_id & 0xFFFFFFFF)  # quirk: a __u32
        self.viommu.core.report_event(test_uapi.IOMMU_VEVENTQ_TYPE_SELFTEST, event.pack())


class MockDomain(Domain):
    """What the mock's paging, nested and blocking domains share."""

    mock_viommu: MockViommu | None = None

    def attach_dev(self, dev: Device, old: Domain | None) -> None:
        """mock_domain_nop_attach(). quirk: what changed of the vIOMMU stays when fault set-up fails."""
        assert isinstance(dev, MockDevice)
        if self.dirty_ops is not None and dev.no_dirty:
            raise EINVAL("the domain tracks dirty pages, the device cannot")
        vdev_id = 0
        if self.mock_viommu is not None:
            found = self.mock_viommu.core.get_vdev_id(dev)
            if found is None:
                raise ENOENT(f"{dev.name} has no vDEVICE in the vIOMMU")
            vdev_id = found
        if self.mock_viommu is not dev.viommu:
            dev.viommu, dev.vdev_id = self.mock_viommu, vdev_id
        dev.iopf.enable(self)
        dev.iopf.disable(dev.domain)
        dev.domain = self

    def set_dev_pasid(self, dev: Device, pasid: int, old: Domain | None) -> None:
        """mock_domain_set_dev_pasid_nop(): the second set of PASID 1024 fails once with ENOMEM."""
        assert isinstance(dev, MockDevice)
        if pasid == test_uapi.IOMMU_TEST_PASID_RESERVED:
            failing = dev.pasid_fake_error and self.type is not DomainType.BLOCKED
            dev.pasid_fake_error = self.type is not DomainType.BLOCKED and not failing
            if failing:
                raise ENOMEM(f"the mock fails the second set of PASID {pasid}")
        dev.iopf.enable(self)
        dev.iopf.disable(old)


class MockPaging(MockDomain):
    """struct mock_iommu_domain"""

    def __init__(self, owner: MockIommu, *, huge: bool, dirty: bool) -> None:
        super().__init__(owner)
        self.pgsize_bitmap = test_uapi.MOCK_HUGE_PAGE_SIZE | PAGE_SIZE if huge else PGSIZES
        self.aperture_start = 0 if huge else test_uapi.MOCK_APERTURE_START
        self.aperture_end = VA_LAST if huge else test_uapi.MOCK_APERTURE_LAST
        self.dirty_bits = DirtyBits(self, test_uapi.MOCK_PAGE_SIZE) if dirty else None
        self.dirty_ops = self.dirty_bits

    def unmapped(self, iova: int, last: int) -> None:
        if self.dirty_bits is not None:
            self.dirty_bits.forget(iova, last)


class MockNested(MockDomain):
    """struct mock_iommu_domain_nested: four numbers that play an IOTLB."""

    type = DomainType.NESTED

    def __init__(self, owner: MockIommu, user_data: UserData, mock_viommu: MockViommu | None) -> None:
        """__mock_domain_alloc_nested(): EOPNOTSUPP, EINVAL, EFAULT."""
        super().__init__(owner)
        if user_data.data_type != test_uapi.IOMMU_HWPT_DATA_SELFTEST:
            raise EOPNOTSUPP(f"the mock does not know data type {user_data.data_type:#x}")
        config = user_data.copy_struct(test_uapi.HwptSelftest, test_uapi.IOMMU_HWPT_DATA_SELFTEST, "iotlb")
        self.iotlb = [config.iotlb] * test_uapi.MOCK_NESTED_DOMAIN_IOTLB_NUM
        self.mock_viommu = mock_viommu

    def cache_invalidate_user(self, array: UserDataArray) -> None:
        """mock_domain_cache_invalidate_user(): EINVAL, EFAULT, EOPNOTSUPP; entry by entry."""
        total, array.entry_num = array.entry_num, 0
        if array.data_type != test_uapi.IOMMU_HWPT_INVALIDATE_DATA_SELFTEST:
            raise EINVAL(f"data type {array.data_type:#x} is not the mock's")
        for at in range(total):
            entry = array.copy_entry(
                test_uapi.HwptInvalidateSelftest, test_uapi.IOMMU_HWPT_INVALIDATE_DATA_SELFTEST, at, "iotlb_id"
            )
            invalidate(self.iotlb, entry.flags, entry.iotlb_id)
            array.entry_num = at + 1


class MockIommu:
    """struct mock_iommu_device with mock_ops: one instance for all mock devices of a machine."""

    driver = "mock"
    user_pasid_table = True

    def __init__(self) -> None:
        self.blocked_domain: Domain = MockDomain(self)
        self.blocked_domain.type = DomainType.BLOCKED
        self._numbers: set[int] = set()  # mock_dev_ida

    def new_device(self, flags: int) -> MockDevice:
        """mock_dev_create(): EINVAL for flags it does not know."""
        if flags & ~(test_uapi.MOCK_FLAGS_DEVICE_NO_DIRTY | test_uapi.MOCK_FLAGS_DEVICE_PASID):
            raise EINVAL(f"device flags {flags:#x} are not known")
        number = next(n for n in range(len(self._numbers) + 1) if n not in self._numbers)
        self._numbers.add(number)
        return MockDevice(self, number, flags)

    def forget_device(self, dev: Device) -> None:
        """mock_dev_release()"""
        assert isinstance(dev, MockDevice)
        self._numbers.discard(dev.number)

    def capable(self, dev: Device, cap: Cap) -> bool:
        """mock_domain_capable()"""
        assert isinstance(dev, MockDevice)
        return cap is Cap.CACHE_COHERENCY or (cap is Cap.DIRTY_TRACKING and not dev.no_dirty)

    def hw_info(self, dev: Device, info_type: int) -> tuple[int, bytes]:
        """mock_domain_hw_info()"""
        if info_type not in (uapi.IOMMU_HW_INFO_TYPE_DEFAULT, test_uapi.IOMMU_HW_INFO_TYPE_SELFTEST):
            raise EOPNOTSUPP(f"hw_info type {info_type:#x} is not known")
        info = test_uapi.TestHwInfo(test_reg=test_uapi.IOMMU_HW_INFO_SELFTEST_REGVAL)
        return test_uapi.IOMMU_HW_INFO_TYPE_SELFTEST, info.pack()

    def domain_alloc_paging(self, dev: Device, flags: int, user_data: UserData | None) -> Domain:
        """mock_domain_alloc_paging_flags()"""
        assert isinstance(dev, MockDevice)
        dirty = bool(flags & uapi.IOMMU_HWPT_ALLOC_DIRTY_TRACKING)
        if flags & ~PAGING_FLAGS or (dirty and dev.no_dirty):
            raise EOPNOTSUPP("the mock does not know these flags")
        config = test_uapi.HwptSelftest()
        if user_data is not None:
            if user_data.data_type not in (test_uapi.IOMMU_HWPT_DATA_SELFTEST, uapi.IOMMU_HWPT_DATA_NONE):
                raise EOPNOTSUPP(f"the mock does not know data type {user_data.data_type:#x}")
            config = user_data.copy_struct(test_uapi.HwptSelftest, test_uapi.IOMMU_HWPT_DATA_SELFTEST, "iotlb")
        if config.pagetable_type not in (test_uapi.MOCK_IOMMUPT_DEFAULT, test_uapi.MOCK_IOMMUPT_HUGE):
            raise EOPNOTSUPP(f"page table type {config.pagetable_type} is not known")
        return MockPaging(self, huge=config.pagetable_type == test_uapi.MOCK_IOMMUPT_HUGE, dirty=dirty)

    def domain_alloc_nested(self, dev: Device, parent: Domain, flags: int, user_data: UserData) -> Domain:
        """mock_domain_alloc_nested()"""
        if flags & ~uapi.IOMMU_HWPT_ALLOC_PASID:
            raise EOPNOTSUPP("the mock does not know these flags")
        return MockNested(self, user_data, None)

    def viommu_supported(self, dev: Device, viommu_type: int) -> bool:
        """mock_get_viommu_size()"""
        return viommu_type == test_uapi.IOMMU_VIOMMU_TYPE_SELFTEST

    def viommu_init(self, viommu: ViommuPort, parent: Domain, user_data: UserData | None) -> MockViommu:
        """mock_viommu_init()"""
        return MockViommu(viommu, lambda data, driver: MockNested(self, data, driver), user_data)
