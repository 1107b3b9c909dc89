"""Room uapi: how people read the fields: which are flags, enums, ids and addresses, and what lies behind pointers.

The names are those of the headers. Facts that a carrier of a call needs stand on the fields themselves (rules.py);
nothing here changes what a call does.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag
from types import ModuleType
from typing import TypeAlias

import msgspec

from . import iommufd as uapi
from . import iommufd_test as test
from . import kvm, vfio
from .layout import Layout


class Names(msgspec.Struct, frozen=True):
    """Values, or bits, by number."""

    known: dict[int, str]
    bits: bool = False

    def text(self, value: int) -> str:
        """IOMMU_IOAS_MAP_READABLE|0x80, IOMMU_HWPT_DATA_NONE; the number where there is no name."""
        if not self.bits:
            return self.known.get(value) or (str(value) if value < 4096 else hex(value))
        found = [name for bit, name in self.known.items() if value & bit]
        rest = value & ~sum(self.known)
        return "|".join([*found, hex(rest)] if rest else found) or "0"


Field: TypeAlias = tuple[type[Layout], str]


def _enum(enum: type[IntEnum], **more: int) -> Names:
    return Names({**{int(each): each.name for each in enum}, **{value: name for name, value in more.items()}})


def _flags(enum: type[IntFlag]) -> Names:
    return Names({int(each): each.name or "" for each in enum}, bits=True)


def _constants(module: ModuleType, prefix: str, *, bits: bool = True) -> Names:
    """Of a header that has macros where others have enums."""
    found = {value: name for name, value in vars(module).items() if name.startswith(prefix)}
    return Names(found, bits)


_MAP = _flags(uapi.IommufdIoasMapFlags)
_VFIO = {
    name: value for name, value in vars(vfio).items() if name.endswith("_IOMMU") and name.startswith(("VFIO_", "__"))
}
VFIO_EXTENSIONS: dict[int, str] = {
    **{value: name for name, value in _VFIO.items() if isinstance(value, int) and value < 16},
    vfio.VFIO_EEH: "VFIO_EEH",
    vfio.VFIO_UNMAP_ALL: "VFIO_UNMAP_ALL",
    vfio.VFIO_UPDATE_VADDR: "VFIO_UPDATE_VADDR",
}
#: ioctls whose argument is a number, or nothing
PLAIN: dict[int, str] = {
    value: name
    for name, value in vars(vfio).items()
    if name in {
        "VFIO_GET_API_VERSION", "VFIO_CHECK_EXTENSION", "VFIO_SET_IOMMU",
        "VFIO_DEVICE_RESET", "VFIO_IOMMU_ENABLE", "VFIO_IOMMU_DISABLE",
    }
}  # fmt: skip
PLAIN |= {
    kvm.KVM_GET_API_VERSION: "KVM_GET_API_VERSION",
    kvm.KVM_CREATE_VM: "KVM_CREATE_VM",
    kvm.KVM_CHECK_EXTENSION: "KVM_CHECK_EXTENSION",
    kvm.KVM_CREATE_VCPU: "KVM_CREATE_VCPU",
}

NAMES: dict[Field, Names] = {
    (uapi.IoasMap, "flags"): _MAP,
    (uapi.IoasMapFile, "flags"): _MAP,
    (uapi.IoasCopy, "flags"): _MAP,
    (uapi.Option, "option_id"): _enum(uapi.IommufdOption),
    (uapi.Option, "op"): _enum(uapi.IommufdOptionOps),
    (uapi.VfioIoas, "op"): _enum(uapi.IommufdVfioIoasOp),
    (uapi.HwptAlloc, "flags"): _flags(uapi.IommufdHwptAllocFlags),
    (uapi.HwptAlloc, "data_type"): _enum(
        uapi.IommuHwptDataType, IOMMU_HWPT_DATA_SELFTEST=test.IOMMU_HWPT_DATA_SELFTEST,
        IOMMU_HWPT_DATA_KVM=kvm.IOMMU_HWPT_DATA_KVM,
    ),
    (uapi.HwptVtdS1, "flags"): _flags(uapi.IommuHwptVtdS1Flags),
    (uapi.HwInfo, "flags"): _flags(uapi.IommufdHwInfoFlags),
    (uapi.HwInfo, "data_type"): _enum(
        uapi.IommuHwInfoType, IOMMU_HW_INFO_TYPE_SELFTEST=test.IOMMU_HW_INFO_TYPE_SELFTEST
    ),
    (uapi.HwInfo, "out_capabilities"): _flags(uapi.IommufdHwCapabilities),
    (uapi.HwInfoVtd, "flags"): _flags(uapi.IommuHwInfoVtdFlags),
    (uapi.HwptSetDirtyTracking, "flags"): _flags(uapi.IommufdHwptSetDirtyTrackingFlags),
    (uapi.HwptGetDirtyBitmap, "flags"): _flags(uapi.IommufdHwptGetDirtyBitmapFlags),
    (uapi.HwptInvalidate, "data_type"): _enum(
        uapi.IommuHwptInvalidateDataType,
        IOMMU_HWPT_INVALIDATE_DATA_SELFTEST=test.IOMMU_HWPT_INVALIDATE_DATA_SELFTEST,
        IOMMU_HWPT_INVALIDATE_DATA_SELFTEST_INVALID=test.IOMMU_HWPT_INVALIDATE_DATA_SELFTEST_INVALID,
    ),
    (uapi.HwptVtdS1Invalidate, "flags"): _flags(uapi.IommuHwptVtdS1InvalidateFlags),
    (uapi.HwptPgfault, "flags"): _flags(uapi.IommuHwptPgfaultFlags),
    (uapi.HwptPgfault, "perm"): _flags(uapi.IommuHwptPgfaultPerm),
    (uapi.HwptPageResponse, "code"): _enum(uapi.IommufdPageResponseCode),
    (uapi.ViommuAlloc, "type"): _enum(
        uapi.IommuViommuType, IOMMU_VIOMMU_TYPE_SELFTEST=test.IOMMU_VIOMMU_TYPE_SELFTEST
    ),
    (uapi.IommufdVeventHeader, "flags"): _flags(uapi.IommuVeventqFlag),
    (uapi.VeventqAlloc, "type"): _enum(
        uapi.IommuVeventqType, IOMMU_VEVENTQ_TYPE_SELFTEST=test.IOMMU_VEVENTQ_TYPE_SELFTEST
    ),
    (uapi.HwQueueAlloc, "type"): _enum(
        uapi.IommuHwQueueType, IOMMU_HW_QUEUE_TYPE_SELFTEST=test.IOMMU_HW_QUEUE_TYPE_SELFTEST
    ),
    (test.MockDomainFlags, "dev_flags"): _constants(test, "MOCK_FLAGS_DEVICE_"),
    (test.CreateAccess, "flags"): _constants(test, "MOCK_FLAGS_ACCESS_CREATE_"),
    (test.AccessPages, "flags"): Names(
        {test.MOCK_FLAGS_ACCESS_WRITE: "MOCK_FLAGS_ACCESS_WRITE", test.MOCK_FLAGS_ACCESS_SYZ: "MOCK_FLAGS_ACCESS_SYZ"},
        bits=True,
    ),
    (test.AccessRw, "flags"): _constants(test, "MOCK_ACCESS_RW_"),
    (test.TriggerIopf, "perm"): _flags(uapi.IommuHwptPgfaultPerm),
    (test.HwptSelftest, "pagetable_type"): _constants(test, "MOCK_IOMMUPT_", bits=False),
    (test.HwptInvalidateSelftest, "flags"): _constants(test, "IOMMU_TEST_INVALIDATE_FLAG_"),
    (test.ViommuInvalidateSelftest, "flags"): _constants(test, "IOMMU_TEST_INVALIDATE_FLAG_"),
    (vfio.VfioIommuType1DmaMap, "flags"): _constants(vfio, "VFIO_DMA_MAP_FLAG_"),
    (vfio.VfioIommuType1DmaUnmap, "flags"): _constants(vfio, "VFIO_DMA_UNMAP_FLAG_"),
    (vfio.VfioIommuType1Info, "flags"): Names(
        {vfio.VFIO_IOMMU_INFO_PGSIZES: "VFIO_IOMMU_INFO_PGSIZES", vfio.VFIO_IOMMU_INFO_CAPS: "VFIO_IOMMU_INFO_CAPS"},
        bits=True,
    ),
    (vfio.VfioIommuType1DirtyBitmap, "flags"): _constants(vfio, "VFIO_IOMMU_DIRTY_PAGES_FLAG_"),
    (vfio.VfioDeviceInfo, "flags"): _constants(vfio, "VFIO_DEVICE_FLAGS_"),
    (vfio.VfioRegionInfo, "flags"): _constants(vfio, "VFIO_REGION_INFO_FLAG_"),
    (vfio.VfioIrqInfo, "flags"): _constants(vfio, "VFIO_IRQ_INFO_"),
    (vfio.VfioDeviceBindIommufd, "flags"): _constants(vfio, "VFIO_DEVICE_BIND_FLAG_"),
    (vfio.VfioDeviceAttachIommufdPt, "flags"): _constants(vfio, "VFIO_DEVICE_ATTACH_PASID"),
    (vfio.VfioDeviceDetachIommufdPt, "flags"): _constants(vfio, "VFIO_DEVICE_DETACH_PASID"),
}

#: fields that name an object of the context; beside them `id` of struct iommu_destroy
IDS = frozenset([
    "ioas_id", "out_ioas_id", "dst_ioas_id", "src_ioas_id", "dev_id", "pt_id", "hwpt_id", "out_hwpt_id", "fault_id",
    "out_fault_id", "viommu_id", "out_viommu_id", "out_vdevice_id", "out_veventq_id", "out_hw_queue_id", "object_id",
    "out_stdev_id", "out_idev_id", "out_devid",
])  # fmt: skip

PADS = frozenset(["reserved", "reserved2", "pad"])  #: must be 0: told only if they are not

#: addresses, lengths of memory and registers, whatever their size
HEX = frozenset([
    "iova", "length", "user_va", "start", "last", "dst_iova", "src_iova", "data", "data_uptr", "uptr", "page_size",
    "nesting_parent_iova", "addr", "pgtbl_addr", "virt_id", "allowed_iovas", "out_iova_alignment", "cap_reg",
    "ecap_reg", "efr", "efr2", "iidr", "aidr", "test_reg", "iotlb", "out_vintf_mmap_offset", "out_vintf_mmap_length",
    "out_mmap_offset", "out_mmap_length", "vaddr", "size", "offset", "iova_pgsizes", "cap_offset", "token_uuid_ptr",
    "in_data", "out_data", "limit",
])  # fmt: skip

#: the struct behind data_uptr, by the ioctl and its data type
NESTED: dict[tuple[type[Layout], int], type[Layout]] = {
    (uapi.HwptAlloc, uapi.IOMMU_HWPT_DATA_VTD_S1): uapi.HwptVtdS1,
    (uapi.HwptAlloc, kvm.IOMMU_HWPT_DATA_KVM): kvm.HwptKvm,
    (uapi.HwptAlloc, uapi.IOMMU_HWPT_DATA_ARM_SMMUV3): uapi.HwptArmSmmuv3,
    (uapi.HwptAlloc, uapi.IOMMU_HWPT_DATA_AMD_GUEST): uapi.HwptAmdGuest,
    (uapi.HwptAlloc, test.IOMMU_HWPT_DATA_SELFTEST): test.HwptSelftest,
    (uapi.HwInfo, uapi.IOMMU_HW_INFO_TYPE_INTEL_VTD): uapi.HwInfoVtd,
    (uapi.HwInfo, uapi.IOMMU_HW_INFO_TYPE_ARM_SMMUV3): uapi.HwInfoArmSmmuv3,
    (uapi.HwInfo, uapi.IOMMU_HW_INFO_TYPE_TEGRA241_CMDQV): uapi.HwInfoTegra241Cmdqv,
    (uapi.HwInfo, uapi.IOMMU_HW_INFO_TYPE_AMD): uapi.HwInfoAmd,
    (uapi.HwInfo, test.IOMMU_HW_INFO_TYPE_SELFTEST): test.TestHwInfo,
    (uapi.ViommuAlloc, uapi.IOMMU_VIOMMU_TYPE_TEGRA241_CMDQV): uapi.ViommuTegra241Cmdqv,
    (uapi.ViommuAlloc, test.IOMMU_VIOMMU_TYPE_SELFTEST): test.ViommuSelftest,
}

#: one entry of IOMMU_HWPT_INVALIDATE: on a vIOMMU?, data type
INVALIDATIONS: dict[tuple[bool, int], type[Layout]] = {
    (False, uapi.IOMMU_HWPT_INVALIDATE_DATA_VTD_S1): uapi.HwptVtdS1Invalidate,
    (False, test.IOMMU_HWPT_INVALIDATE_DATA_SELFTEST): test.HwptInvalidateSelftest,
    (True, uapi.IOMMU_VIOMMU_INVALIDATE_DATA_ARM_SMMUV3): uapi.ViommuArmSmmuv3Invalidate,
    (True, test.IOMMU_VIOMMU_INVALIDATE_DATA_SELFTEST): test.ViommuInvalidateSelftest,
}

#: what follows the header of an event, by the type of the vEVENTQ
RECORDS: dict[int, type[Layout]] = {
    uapi.IOMMU_VEVENTQ_TYPE_ARM_SMMUV3: uapi.VeventArmSmmuv3,
    uapi.IOMMU_VEVENTQ_TYPE_TEGRA241_CMDQV: uapi.VeventTegra241Cmdqv,
    test.IOMMU_VEVENTQ_TYPE_SELFTEST: test.ViommuEventSelftest,
}
