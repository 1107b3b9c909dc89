"""Room uapi: include/uapi/linux/iommufd.h of Linux 7.2, in the header's order.

Fields have the kernel's names, `__reserved` without its underscores. The constants are plain integers: `&` of
two members of an IntFlag takes twenty times as long. The enum classes are for people and for traces.
"""

from enum import IntEnum, IntFlag
from typing import Annotated

from .layout import (
    Address,
    Const,
    FdIn,
    FdOut,
    Field,
    In,
    InOut,
    Ioctl,
    IovaBitmapBytes,
    Layout,
    Out,
    Times,
    array,
    ioctl,
    layout,
    raw,
    s32,
    u8,
    u16,
    u32,
    u64,
)

IOMMUFD_TYPE = ord(";")

IOMMUFD_CMD_BASE = 0x80
IOMMUFD_CMD_DESTROY = 0x80
IOMMUFD_CMD_IOAS_ALLOC = 0x81
IOMMUFD_CMD_IOAS_ALLOW_IOVAS = 0x82
IOMMUFD_CMD_IOAS_COPY = 0x83
IOMMUFD_CMD_IOAS_IOVA_RANGES = 0x84
IOMMUFD_CMD_IOAS_MAP = 0x85
IOMMUFD_CMD_IOAS_UNMAP = 0x86
IOMMUFD_CMD_OPTION = 0x87
IOMMUFD_CMD_VFIO_IOAS = 0x88
IOMMUFD_CMD_HWPT_ALLOC = 0x89
IOMMUFD_CMD_GET_HW_INFO = 0x8A
IOMMUFD_CMD_HWPT_SET_DIRTY_TRACKING = 0x8B
IOMMUFD_CMD_HWPT_GET_DIRTY_BITMAP = 0x8C
IOMMUFD_CMD_HWPT_INVALIDATE = 0x8D
IOMMUFD_CMD_FAULT_QUEUE_ALLOC = 0x8E
IOMMUFD_CMD_IOAS_MAP_FILE = 0x8F
IOMMUFD_CMD_VIOMMU_ALLOC = 0x90
IOMMUFD_CMD_VDEVICE_ALLOC = 0x91
IOMMUFD_CMD_IOAS_CHANGE_PROCESS = 0x92
IOMMUFD_CMD_VEVENTQ_ALLOC = 0x93
IOMMUFD_CMD_HW_QUEUE_ALLOC = 0x94


@ioctl(IOMMUFD_CMD_DESTROY, last="id")
class Destroy(Ioctl):
    """struct iommu_destroy"""

    id: u32 = 0


@ioctl(IOMMUFD_CMD_IOAS_ALLOC, last="out_ioas_id")
class IoasAlloc(Ioctl):
    """struct iommu_ioas_alloc"""

    flags: u32 = 0
    out_ioas_id: u32 = 0


@layout
class IovaRange(Layout):
    """struct iommu_iova_range"""

    start: u64 = 0
    last: u64 = 0


@ioctl(IOMMUFD_CMD_IOAS_IOVA_RANGES, last="out_iova_alignment")
class IoasIovaRanges(Ioctl):
    """struct iommu_ioas_iova_ranges

    Only as many ranges are written as there are. With too little room the answer is -EMSGSIZE and `num_iovas`
    says how many there are.
    """

    ioas_id: u32 = 0
    num_iovas: u32 = 0
    reserved: u32 = 0
    allowed_iovas: Annotated[u64, Out(Times(Field("num_iovas"), Const(16)))] = 0
    out_iova_alignment: u64 = 0


@ioctl(IOMMUFD_CMD_IOAS_ALLOW_IOVAS, last="allowed_iovas")
class IoasAllowIovas(Ioctl):
    """struct iommu_ioas_allow_iovas"""

    ioas_id: u32 = 0
    num_iovas: u32 = 0
    reserved: u32 = 0
    allowed_iovas: Annotated[u64, In(Times(Field("num_iovas"), Const(16)))] = 0


class IommufdIoasMapFlags(IntFlag):
    """enum iommufd_ioas_map_flags"""

    IOMMU_IOAS_MAP_FIXED_IOVA = 1 << 0
    IOMMU_IOAS_MAP_WRITEABLE = 1 << 1
    IOMMU_IOAS_MAP_READABLE = 1 << 2


IOMMU_IOAS_MAP_FIXED_IOVA, IOMMU_IOAS_MAP_WRITEABLE, IOMMU_IOAS_MAP_READABLE = map(int, IommufdIoasMapFlags)


@ioctl(IOMMUFD_CMD_IOAS_MAP, last="iova")
class IoasMap(Ioctl):
    """struct iommu_ioas_map"""

    flags: u32 = 0
    ioas_id: u32 = 0
    reserved: u32 = 0
    user_va: Annotated[u64, Address(Field("length"))] = 0
    length: u64 = 0
    iova: u64 = 0


@ioctl(IOMMUFD_CMD_IOAS_MAP_FILE, last="iova")
class IoasMapFile(Ioctl):
    """struct iommu_ioas_map_file"""

    flags: u32 = 0
    ioas_id: u32 = 0
    fd: Annotated[s32, FdIn()] = 0
    start: u64 = 0
    length: u64 = 0
    iova: u64 = 0


@ioctl(IOMMUFD_CMD_IOAS_COPY, last="src_iova")
class IoasCopy(Ioctl):
    """struct iommu_ioas_copy"""

    flags: u32 = 0
    dst_ioas_id: u32 = 0
    src_ioas_id: u32 = 0
    length: u64 = 0
    dst_iova: u64 = 0
    src_iova: u64 = 0


@ioctl(IOMMUFD_CMD_IOAS_UNMAP, last="length")
class IoasUnmap(Ioctl):
    """struct iommu_ioas_unmap"""

    ioas_id: u32 = 0
    iova: u64 = 0
    length: u64 = 0


class IommufdOption(IntEnum):
    """enum iommufd_option"""

    IOMMU_OPTION_RLIMIT_MODE = 0
    IOMMU_OPTION_HUGE_PAGES = 1


IOMMU_OPTION_RLIMIT_MODE, IOMMU_OPTION_HUGE_PAGES = map(int, IommufdOption)


class IommufdOptionOps(IntEnum):
    """enum iommufd_option_ops"""

    IOMMU_OPTION_OP_SET = 0
    IOMMU_OPTION_OP_GET = 1


IOMMU_OPTION_OP_SET, IOMMU_OPTION_OP_GET = map(int, IommufdOptionOps)


@ioctl(IOMMUFD_CMD_OPTION, last="val64")
class Option(Ioctl):
    """struct iommu_option

    The answer writes `val64` only, after a SET too.
    """

    option_id: u32 = 0
    op: u16 = 0
    reserved: u16 = 0
    object_id: u32 = 0
    val64: u64 = 0


class IommufdVfioIoasOp(IntEnum):
    """enum iommufd_vfio_ioas_op"""

    IOMMU_VFIO_IOAS_GET = 0
    IOMMU_VFIO_IOAS_SET = 1
    IOMMU_VFIO_IOAS_CLEAR = 2


IOMMU_VFIO_IOAS_GET, IOMMU_VFIO_IOAS_SET, IOMMU_VFIO_IOAS_CLEAR = map(int, IommufdVfioIoasOp)


@ioctl(IOMMUFD_CMD_VFIO_IOAS, last="reserved")
class VfioIoas(Ioctl):
    """struct iommu_vfio_ioas"""

    ioas_id: u32 = 0
    op: u16 = 0
    reserved: u16 = 0


class IommufdHwptAllocFlags(IntFlag):
    """enum iommufd_hwpt_alloc_flags"""

    IOMMU_HWPT_ALLOC_NEST_PARENT = 1 << 0
    IOMMU_HWPT_ALLOC_DIRTY_TRACKING = 1 << 1
    IOMMU_HWPT_FAULT_ID_VALID = 1 << 2
    IOMMU_HWPT_ALLOC_PASID = 1 << 3


(
    IOMMU_HWPT_ALLOC_NEST_PARENT,
    IOMMU_HWPT_ALLOC_DIRTY_TRACKING,
    IOMMU_HWPT_FAULT_ID_VALID,
    IOMMU_HWPT_ALLOC_PASID,
) = map(int, IommufdHwptAllocFlags)


class IommuHwptVtdS1Flags(IntFlag):
    """enum iommu_hwpt_vtd_s1_flags"""

    IOMMU_VTD_S1_SRE = 1 << 0
    IOMMU_VTD_S1_EAFE = 1 << 1
    IOMMU_VTD_S1_WPE = 1 << 2


IOMMU_VTD_S1_SRE, IOMMU_VTD_S1_EAFE, IOMMU_VTD_S1_WPE = map(int, IommuHwptVtdS1Flags)


@layout
class HwptVtdS1(Layout):
    """struct iommu_hwpt_vtd_s1"""

    flags: u64 = 0
    pgtbl_addr: u64 = 0
    addr_width: u32 = 0
    reserved: u32 = 0


@layout
class HwptArmSmmuv3(Layout):
    """struct iommu_hwpt_arm_smmuv3"""

    ste: Annotated[tuple[int, ...], array(u64, 2)] = (0,) * 2


@layout
class HwptAmdGuest(Layout):
    """struct iommu_hwpt_amd_guest"""

    dte: Annotated[tuple[int, ...], array(u64, 4)] = (0,) * 4


class IommuHwptDataType(IntEnum):
    """enum iommu_hwpt_data_type"""

    IOMMU_HWPT_DATA_NONE = 0
    IOMMU_HWPT_DATA_VTD_S1 = 1
    IOMMU_HWPT_DATA_ARM_SMMUV3 = 2
    IOMMU_HWPT_DATA_AMD_GUEST = 3


(
    IOMMU_HWPT_DATA_NONE,
    IOMMU_HWPT_DATA_VTD_S1,
    IOMMU_HWPT_DATA_ARM_SMMUV3,
    IOMMU_HWPT_DATA_AMD_GUEST,
) = map(int, IommuHwptDataType)


@ioctl(IOMMUFD_CMD_HWPT_ALLOC, last="reserved")
class HwptAlloc(Ioctl):
    """struct iommu_hwpt_alloc"""

    flags: u32 = 0
    dev_id: u32 = 0
    pt_id: u32 = 0
    out_hwpt_id: u32 = 0
    reserved: u32 = 0
    data_type: u32 = 0
    data_len: u32 = 0
    data_uptr: Annotated[u64, In(Field("data_len"))] = 0
    fault_id: u32 = 0
    reserved2: u32 = 0


class IommuHwInfoVtdFlags(IntFlag):
    """enum iommu_hw_info_vtd_flags"""

    IOMMU_HW_INFO_VTD_ERRATA_772415_SPR17 = 1 << 0


(IOMMU_HW_INFO_VTD_ERRATA_772415_SPR17,) = map(int, IommuHwInfoVtdFlags)


@layout
class HwInfoVtd(Layout):
    """struct iommu_hw_info_vtd"""

    flags: u32 = 0
    reserved: u32 = 0
    cap_reg: u64 = 0
    ecap_reg: u64 = 0


@layout
class HwInfoArmSmmuv3(Layout):
    """struct iommu_hw_info_arm_smmuv3"""

    flags: u32 = 0
    reserved: u32 = 0
    idr: Annotated[tuple[int, ...], array(u32, 6)] = (0,) * 6
    iidr: u32 = 0
    aidr: u32 = 0


@layout
class HwInfoTegra241Cmdqv(Layout):
    """struct iommu_hw_info_tegra241_cmdqv"""

    flags: u32 = 0
    version: u8 = 0
    log2vcmdqs: u8 = 0
    log2vsids: u8 = 0
    reserved: u8 = 0


@layout
class HwInfoAmd(Layout):
    """struct iommu_hw_info_amd"""

    efr: u64 = 0
    efr2: u64 = 0


class IommuHwInfoType(IntEnum):
    """enum iommu_hw_info_type"""

    IOMMU_HW_INFO_TYPE_NONE = 0
    IOMMU_HW_INFO_TYPE_DEFAULT = 0  # as an input; NONE is an output
    IOMMU_HW_INFO_TYPE_INTEL_VTD = 1
    IOMMU_HW_INFO_TYPE_ARM_SMMUV3 = 2
    IOMMU_HW_INFO_TYPE_TEGRA241_CMDQV = 3
    IOMMU_HW_INFO_TYPE_AMD = 4


(
    IOMMU_HW_INFO_TYPE_NONE,
    IOMMU_HW_INFO_TYPE_INTEL_VTD,
    IOMMU_HW_INFO_TYPE_ARM_SMMUV3,
    IOMMU_HW_INFO_TYPE_TEGRA241_CMDQV,
    IOMMU_HW_INFO_TYPE_AMD,
) = map(int, IommuHwInfoType)
IOMMU_HW_INFO_TYPE_DEFAULT = IOMMU_HW_INFO_TYPE_NONE


class IommufdHwCapabilities(IntFlag):
    """enum iommufd_hw_capabilities"""

    IOMMU_HW_CAP_DIRTY_TRACKING = 1 << 0
    IOMMU_HW_CAP_PCI_PASID_EXEC = 1 << 1
    IOMMU_HW_CAP_PCI_PASID_PRIV = 1 << 2
    IOMMU_HW_CAP_PCI_ATS_NOT_SUPPORTED = 1 << 3


(
    IOMMU_HW_CAP_DIRTY_TRACKING,
    IOMMU_HW_CAP_PCI_PASID_EXEC,
    IOMMU_HW_CAP_PCI_PASID_PRIV,
    IOMMU_HW_CAP_PCI_ATS_NOT_SUPPORTED,
) = map(int, IommufdHwCapabilities)


class IommufdHwInfoFlags(IntFlag):
    """enum iommufd_hw_info_flags"""

    IOMMU_HW_INFO_FLAG_INPUT_TYPE = 1 << 0


(IOMMU_HW_INFO_FLAG_INPUT_TYPE,) = map(int, IommufdHwInfoFlags)


@ioctl(IOMMUFD_CMD_GET_HW_INFO, last="reserved", macro="IOMMU_GET_HW_INFO")
class HwInfo(Ioctl):
    """struct iommu_hw_info

    `data_type` is the union of `in_data_type` and `out_data_type`. What of the buffer the hardware does not
    fill is zeroed.
    """

    flags: u32 = 0
    dev_id: u32 = 0
    data_len: u32 = 0
    data_uptr: Annotated[u64, Out(Field("data_len"))] = 0
    data_type: u32 = 0
    out_max_pasid_log2: u8 = 0
    reserved: Annotated[bytes, raw(3)] = bytes(3)
    out_capabilities: u64 = 0


class IommufdHwptSetDirtyTrackingFlags(IntFlag):
    """enum iommufd_hwpt_set_dirty_tracking_flags"""

    IOMMU_HWPT_DIRTY_TRACKING_ENABLE = 1


(IOMMU_HWPT_DIRTY_TRACKING_ENABLE,) = map(int, IommufdHwptSetDirtyTrackingFlags)


@ioctl(IOMMUFD_CMD_HWPT_SET_DIRTY_TRACKING, last="reserved")
class HwptSetDirtyTracking(Ioctl):
    """struct iommu_hwpt_set_dirty_tracking"""

    flags: u32 = 0
    hwpt_id: u32 = 0
    reserved: u32 = 0


class IommufdHwptGetDirtyBitmapFlags(IntFlag):
    """enum iommufd_hwpt_get_dirty_bitmap_flags"""

    IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR = 1


(IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR,) = map(int, IommufdHwptGetDirtyBitmapFlags)


@ioctl(IOMMUFD_CMD_HWPT_GET_DIRTY_BITMAP, last="data")
class HwptGetDirtyBitmap(Ioctl):
    """struct iommu_hwpt_get_dirty_bitmap

    Bits are set in the caller's bitmap, none is cleared.
    """

    hwpt_id: u32 = 0
    flags: u32 = 0
    reserved: u32 = 0
    iova: u64 = 0
    length: u64 = 0
    page_size: u64 = 0
    data: Annotated[u64, InOut(IovaBitmapBytes("iova", "length", "page_size"))] = 0


class IommuHwptInvalidateDataType(IntEnum):
    """enum iommu_hwpt_invalidate_data_type"""

    IOMMU_HWPT_INVALIDATE_DATA_VTD_S1 = 0
    IOMMU_VIOMMU_INVALIDATE_DATA_ARM_SMMUV3 = 1


IOMMU_HWPT_INVALIDATE_DATA_VTD_S1, IOMMU_VIOMMU_INVALIDATE_DATA_ARM_SMMUV3 = map(
    int, IommuHwptInvalidateDataType
)


class IommuHwptVtdS1InvalidateFlags(IntFlag):
    """enum iommu_hwpt_vtd_s1_invalidate_flags"""

    IOMMU_VTD_INV_FLAGS_LEAF = 1 << 0


(IOMMU_VTD_INV_FLAGS_LEAF,) = map(int, IommuHwptVtdS1InvalidateFlags)


@layout
class HwptVtdS1Invalidate(Layout):
    """struct iommu_hwpt_vtd_s1_invalidate"""

    addr: u64 = 0
    npages: u64 = 0
    flags: u32 = 0
    reserved: u32 = 0


@layout
class ViommuArmSmmuv3Invalidate(Layout):
    """struct iommu_viommu_arm_smmuv3_invalidate"""

    cmd: Annotated[tuple[int, ...], array(u64, 2)] = (0,) * 2


@ioctl(IOMMUFD_CMD_HWPT_INVALIDATE, last="reserved")
class HwptInvalidate(Ioctl):
    """struct iommu_hwpt_invalidate

    The answer is written back after an error too: `entry_num` then counts the requests done. The limits of
    the entries are hw_pagetable.c's.
    """

    hwpt_id: u32 = 0
    data_uptr: Annotated[u64, In(Times(Field("entry_len").upto(4096), Field("entry_num").upto(1 << 19)))] = 0
    data_type: u32 = 0
    entry_len: u32 = 0
    entry_num: u32 = 0
    reserved: u32 = 0


class IommuHwptPgfaultFlags(IntFlag):
    """enum iommu_hwpt_pgfault_flags"""

    IOMMU_PGFAULT_FLAGS_PASID_VALID = 1 << 0
    IOMMU_PGFAULT_FLAGS_LAST_PAGE = 1 << 1


IOMMU_PGFAULT_FLAGS_PASID_VALID, IOMMU_PGFAULT_FLAGS_LAST_PAGE = map(int, IommuHwptPgfaultFlags)


class IommuHwptPgfaultPerm(IntFlag):
    """enum iommu_hwpt_pgfault_perm"""

    IOMMU_PGFAULT_PERM_READ = 1 << 0
    IOMMU_PGFAULT_PERM_WRITE = 1 << 1
    IOMMU_PGFAULT_PERM_EXEC = 1 << 2
    IOMMU_PGFAULT_PERM_PRIV = 1 << 3


(
    IOMMU_PGFAULT_PERM_READ,
    IOMMU_PGFAULT_PERM_WRITE,
    IOMMU_PGFAULT_PERM_EXEC,
    IOMMU_PGFAULT_PERM_PRIV,
) = map(int, IommuHwptPgfaultPerm)


@layout
class HwptPgfault(Layout):
    """struct iommu_hwpt_pgfault"""

    flags: u32 = 0
    dev_id: u32 = 0
    pasid: u32 = 0
    grpid: u32 = 0
    perm: u32 = 0
    reserved: u32 = 0
    addr: u64 = 0
    length: u32 = 0
    cookie: u32 = 0


class IommufdPageResponseCode(IntEnum):
    """enum iommufd_page_response_code"""

    IOMMUFD_PAGE_RESP_SUCCESS = 0
    IOMMUFD_PAGE_RESP_INVALID = 1


IOMMUFD_PAGE_RESP_SUCCESS, IOMMUFD_PAGE_RESP_INVALID = map(int, IommufdPageResponseCode)


@layout
class HwptPageResponse(Layout):
    """struct iommu_hwpt_page_response"""

    cookie: u32 = 0
    code: u32 = 0


@ioctl(IOMMUFD_CMD_FAULT_QUEUE_ALLOC, last="out_fault_fd", macro="IOMMU_FAULT_QUEUE_ALLOC")
class FaultAlloc(Ioctl):
    """struct iommu_fault_alloc"""

    flags: u32 = 0
    out_fault_id: u32 = 0
    out_fault_fd: Annotated[u32, FdOut()] = 0


class IommuViommuType(IntEnum):
    """enum iommu_viommu_type"""

    IOMMU_VIOMMU_TYPE_DEFAULT = 0
    IOMMU_VIOMMU_TYPE_ARM_SMMUV3 = 1
    IOMMU_VIOMMU_TYPE_TEGRA241_CMDQV = 2


(
    IOMMU_VIOMMU_TYPE_DEFAULT,
    IOMMU_VIOMMU_TYPE_ARM_SMMUV3,
    IOMMU_VIOMMU_TYPE_TEGRA241_CMDQV,
) = map(int, IommuViommuType)


@layout
class ViommuTegra241Cmdqv(Layout):
    """struct iommu_viommu_tegra241_cmdqv"""

    out_vintf_mmap_offset: u64 = 0
    out_vintf_mmap_length: u64 = 0


@ioctl(IOMMUFD_CMD_VIOMMU_ALLOC, last="out_viommu_id")
class ViommuAlloc(Ioctl):
    """struct iommu_viommu_alloc"""

    flags: u32 = 0
    type: u32 = 0
    dev_id: u32 = 0
    hwpt_id: u32 = 0
    out_viommu_id: u32 = 0
    data_len: u32 = 0
    reserved: u32 = 0
    data_uptr: Annotated[u64, InOut(Field("data_len"))] = 0


@ioctl(IOMMUFD_CMD_VDEVICE_ALLOC, last="virt_id")
class VdeviceAlloc(Ioctl):
    """struct iommu_vdevice_alloc"""

    viommu_id: u32 = 0
    dev_id: u32 = 0
    out_vdevice_id: u32 = 0
    virt_id: u64 = 0


@ioctl(IOMMUFD_CMD_IOAS_CHANGE_PROCESS, last="reserved")
class IoasChangeProcess(Ioctl):
    """struct iommu_ioas_change_process"""

    reserved: u32 = 0


class IommuVeventqFlag(IntFlag):
    """enum iommu_veventq_flag"""

    IOMMU_VEVENTQ_FLAG_LOST_EVENTS = 1 << 0


(IOMMU_VEVENTQ_FLAG_LOST_EVENTS,) = map(int, IommuVeventqFlag)


@layout
class IommufdVeventHeader(Layout):
    """struct iommufd_vevent_header"""

    flags: u32 = 0
    sequence: u32 = 0


class IommuVeventqType(IntEnum):
    """enum iommu_veventq_type"""

    IOMMU_VEVENTQ_TYPE_DEFAULT = 0
    IOMMU_VEVENTQ_TYPE_ARM_SMMUV3 = 1
    IOMMU_VEVENTQ_TYPE_TEGRA241_CMDQV = 2


(
    IOMMU_VEVENTQ_TYPE_DEFAULT,
    IOMMU_VEVENTQ_TYPE_ARM_SMMUV3,
    IOMMU_VEVENTQ_TYPE_TEGRA241_CMDQV,
) = map(int, IommuVeventqType)


@layout
class VeventArmSmmuv3(Layout):
    """struct iommu_vevent_arm_smmuv3"""

    evt: Annotated[tuple[int, ...], array(u64, 4)] = (0,) * 4


@layout
class VeventTegra241Cmdqv(Layout):
    """struct iommu_vevent_tegra241_cmdqv"""

    lvcmdq_err_map: Annotated[tuple[int, ...], array(u64, 2)] = (0,) * 2


@ioctl(IOMMUFD_CMD_VEVENTQ_ALLOC, last="out_veventq_fd")
class VeventqAlloc(Ioctl):
    """struct iommu_veventq_alloc"""

    flags: u32 = 0
    viommu_id: u32 = 0
    type: u32 = 0
    veventq_depth: u32 = 0
    out_veventq_id: u32 = 0
    out_veventq_fd: Annotated[u32, FdOut()] = 0
    reserved: u32 = 0


class IommuHwQueueType(IntEnum):
    """enum iommu_hw_queue_type"""

    IOMMU_HW_QUEUE_TYPE_DEFAULT = 0
    IOMMU_HW_QUEUE_TYPE_TEGRA241_CMDQV = 1


IOMMU_HW_QUEUE_TYPE_DEFAULT, IOMMU_HW_QUEUE_TYPE_TEGRA241_CMDQV = map(int, IommuHwQueueType)


@ioctl(IOMMUFD_CMD_HW_QUEUE_ALLOC, last="length")
class HwQueueAlloc(Ioctl):
    """struct iommu_hw_queue_alloc"""

    flags: u32 = 0
    viommu_id: u32 = 0
    type: u32 = 0
    index: u32 = 0
    out_hw_queue_id: u32 = 0
    nesting_parent_iova: u64 = 0
    length: u64 = 0


IOCTLS: tuple[type[Ioctl], ...] = (
    Destroy,
    IoasAlloc,
    IoasAllowIovas,
    IoasCopy,
    IoasIovaRanges,
    IoasMap,
    IoasUnmap,
    Option,
    VfioIoas,
    HwptAlloc,
    HwInfo,
    HwptSetDirtyTracking,
    HwptGetDirtyBitmap,
    HwptInvalidate,
    FaultAlloc,
    IoasMapFile,
    ViommuAlloc,
    VdeviceAlloc,
    IoasChangeProcess,
    VeventqAlloc,
    HwQueueAlloc,
)

IOMMU_DESTROY = Destroy.CMD
IOMMU_IOAS_ALLOC = IoasAlloc.CMD
IOMMU_IOAS_ALLOW_IOVAS = IoasAllowIovas.CMD
IOMMU_IOAS_COPY = IoasCopy.CMD
IOMMU_IOAS_IOVA_RANGES = IoasIovaRanges.CMD
IOMMU_IOAS_MAP = IoasMap.CMD
IOMMU_IOAS_UNMAP = IoasUnmap.CMD
IOMMU_OPTION = Option.CMD
IOMMU_VFIO_IOAS = VfioIoas.CMD
IOMMU_HWPT_ALLOC = HwptAlloc.CMD
IOMMU_GET_HW_INFO = HwInfo.CMD
IOMMU_HWPT_SET_DIRTY_TRACKING = HwptSetDirtyTracking.CMD
IOMMU_HWPT_GET_DIRTY_BITMAP = HwptGetDirtyBitmap.CMD
IOMMU_HWPT_INVALIDATE = HwptInvalidate.CMD
IOMMU_FAULT_QUEUE_ALLOC = FaultAlloc.CMD
IOMMU_IOAS_MAP_FILE = IoasMapFile.CMD
IOMMU_VIOMMU_ALLOC = ViommuAlloc.CMD
IOMMU_VDEVICE_ALLOC = VdeviceAlloc.CMD
IOMMU_IOAS_CHANGE_PROCESS = IoasChangeProcess.CMD
IOMMU_VEVENTQ_ALLOC = VeventqAlloc.CMD
IOMMU_HW_QUEUE_ALLOC = HwQueueAlloc.CMD
