"""Room uapi: what of include/uapi/linux/vfio.h of Linux 7.2 leads to an iommufd, in the header's order.

Two kinds of fd take these ioctls. A *device* (/dev/vfio/devices/vfioX) is bound to an iommufd and attached to
a page table. A *container* (/dev/vfio/vfio) is the older interface, which iommufd serves too (vfio_compat.c).
Some numbers serve both kinds with different meanings: DEVICE_IOCTLS and CONTAINER_IOCTLS are two tables.

`argsz` covers the fixed part and the tail behind it. On output it is what the kernel wanted to write.
"""

from typing import Annotated

import msgspec

from .layout import (
    IOC_TYPE,
    Address,
    Const,
    FdIn,
    Field,
    In,
    Layout,
    Masked,
    Minus,
    Tail,
    Times,
    VfioIoctl,
    When,
    layout,
    s32,
    u16,
    u32,
    u64,
    vfio_ioctl,
)

VFIO_API_VERSION = 0

VFIO_TYPE1_IOMMU = 1
VFIO_SPAPR_TCE_IOMMU = 2
VFIO_TYPE1v2_IOMMU = 3
VFIO_DMA_CC_IOMMU = 4
VFIO_EEH = 5
__VFIO_RESERVED_TYPE1_NESTING_IOMMU = 6
VFIO_SPAPR_TCE_v2_IOMMU = 7
VFIO_NOIOMMU_IOMMU = 8
VFIO_UNMAP_ALL = 9
VFIO_UPDATE_VADDR = 10

VFIO_TYPE = ord(";")
VFIO_BASE = 100


def _behind(size: int) -> Minus:
    return Minus(Field("argsz"), Const(size))


@layout
class VfioInfoCapHeader(Layout):
    """struct vfio_info_cap_header

    `next` counts from the start of the info struct; 0 ends the chain.
    """

    id: u16 = 0
    version: u16 = 0
    next: u32 = 0


# ---- container -----------------------------------------------------------------------------------

# These three take a number, not a pointer.
VFIO_GET_API_VERSION = IOC_TYPE | VFIO_BASE + 0
VFIO_CHECK_EXTENSION = IOC_TYPE | VFIO_BASE + 1
VFIO_SET_IOMMU = IOC_TYPE | VFIO_BASE + 2

# ---- device --------------------------------------------------------------------------------------

VFIO_DEVICE_FLAGS_RESET = 1 << 0
VFIO_DEVICE_FLAGS_PCI = 1 << 1
VFIO_DEVICE_FLAGS_PLATFORM = 1 << 2
VFIO_DEVICE_FLAGS_AMBA = 1 << 3
VFIO_DEVICE_FLAGS_CCW = 1 << 4
VFIO_DEVICE_FLAGS_AP = 1 << 5
VFIO_DEVICE_FLAGS_FSL_MC = 1 << 6
VFIO_DEVICE_FLAGS_CAPS = 1 << 7
VFIO_DEVICE_FLAGS_CDX = 1 << 8


@vfio_ioctl(VFIO_BASE + 7, last="num_irqs", macro="VFIO_DEVICE_GET_INFO")
class VfioDeviceInfo(VfioIoctl):
    """struct vfio_device_info"""

    TAIL = Tail("caps", _behind(24))

    flags: u32 = 0
    num_regions: u32 = 0
    num_irqs: u32 = 0
    cap_offset: u32 = 0
    pad: u32 = 0


VFIO_REGION_INFO_FLAG_READ = 1 << 0
VFIO_REGION_INFO_FLAG_WRITE = 1 << 1
VFIO_REGION_INFO_FLAG_MMAP = 1 << 2
VFIO_REGION_INFO_FLAG_CAPS = 1 << 3


@vfio_ioctl(VFIO_BASE + 8, last="offset", macro="VFIO_DEVICE_GET_REGION_INFO")
class VfioRegionInfo(VfioIoctl):
    """struct vfio_region_info"""

    TAIL = Tail("caps", _behind(32))

    flags: u32 = 0
    index: u32 = 0
    cap_offset: u32 = 0
    size: u64 = 0
    offset: u64 = 0


VFIO_REGION_INFO_CAP_SPARSE_MMAP = 1


@layout
class VfioRegionSparseMmapArea(Layout):
    """struct vfio_region_sparse_mmap_area"""

    offset: u64 = 0
    size: u64 = 0


@layout
class VfioRegionInfoCapSparseMmap(Layout):
    """struct vfio_region_info_cap_sparse_mmap"""

    TAIL = Tail("areas", Times(Field("nr_areas"), Const(VfioRegionSparseMmapArea.SIZEOF)))

    header: VfioInfoCapHeader = msgspec.field(default_factory=VfioInfoCapHeader)
    nr_areas: u32 = 0
    reserved: u32 = 0


VFIO_REGION_INFO_CAP_TYPE = 2


@layout
class VfioRegionInfoCapType(Layout):
    """struct vfio_region_info_cap_type"""

    header: VfioInfoCapHeader = msgspec.field(default_factory=VfioInfoCapHeader)
    type: u32 = 0
    subtype: u32 = 0


VFIO_REGION_INFO_CAP_MSIX_MAPPABLE = 3

VFIO_IRQ_INFO_EVENTFD = 1 << 0
VFIO_IRQ_INFO_MASKABLE = 1 << 1
VFIO_IRQ_INFO_AUTOMASKED = 1 << 2
VFIO_IRQ_INFO_NORESIZE = 1 << 3


@vfio_ioctl(VFIO_BASE + 9, last="count", macro="VFIO_DEVICE_GET_IRQ_INFO")
class VfioIrqInfo(VfioIoctl):
    """struct vfio_irq_info"""

    flags: u32 = 0
    index: u32 = 0
    count: u32 = 0


VFIO_IRQ_SET_DATA_NONE = 1 << 0
VFIO_IRQ_SET_DATA_BOOL = 1 << 1
VFIO_IRQ_SET_DATA_EVENTFD = 1 << 2
VFIO_IRQ_SET_ACTION_MASK = 1 << 3
VFIO_IRQ_SET_ACTION_UNMASK = 1 << 4
VFIO_IRQ_SET_ACTION_TRIGGER = 1 << 5


@vfio_ioctl(VFIO_BASE + 10, last="count", macro="VFIO_DEVICE_SET_IRQS")
class VfioIrqSet(VfioIoctl):
    """struct vfio_irq_set

    The tail has `count` u8, or `count` s32 fds of which -1 takes an eventfd away.
    """

    TAIL = Tail(
        "data",
        _behind(20),
        fds=Masked("flags", VFIO_IRQ_SET_DATA_EVENTFD, VFIO_IRQ_SET_DATA_EVENTFD, Field("count")),
    )

    flags: u32 = 0
    index: u32 = 0
    start: u32 = 0
    count: u32 = 0


VFIO_IRQ_SET_DATA_TYPE_MASK = VFIO_IRQ_SET_DATA_NONE | VFIO_IRQ_SET_DATA_BOOL | VFIO_IRQ_SET_DATA_EVENTFD
VFIO_IRQ_SET_ACTION_TYPE_MASK = (
    VFIO_IRQ_SET_ACTION_MASK | VFIO_IRQ_SET_ACTION_UNMASK | VFIO_IRQ_SET_ACTION_TRIGGER
)

VFIO_DEVICE_RESET = IOC_TYPE | VFIO_BASE + 11

VFIO_PCI_BAR0_REGION_INDEX = 0
VFIO_PCI_BAR1_REGION_INDEX = 1
VFIO_PCI_BAR2_REGION_INDEX = 2
VFIO_PCI_BAR3_REGION_INDEX = 3
VFIO_PCI_BAR4_REGION_INDEX = 4
VFIO_PCI_BAR5_REGION_INDEX = 5
VFIO_PCI_ROM_REGION_INDEX = 6
VFIO_PCI_CONFIG_REGION_INDEX = 7
VFIO_PCI_VGA_REGION_INDEX = 8
VFIO_PCI_NUM_REGIONS = 9

VFIO_PCI_INTX_IRQ_INDEX = 0
VFIO_PCI_MSI_IRQ_INDEX = 1
VFIO_PCI_MSIX_IRQ_INDEX = 2
VFIO_PCI_ERR_IRQ_INDEX = 3
VFIO_PCI_REQ_IRQ_INDEX = 4
VFIO_PCI_NUM_IRQS = 5

VFIO_DEVICE_FEATURE_MASK = 0xFFFF
VFIO_DEVICE_FEATURE_GET = 1 << 16
VFIO_DEVICE_FEATURE_SET = 1 << 17
VFIO_DEVICE_FEATURE_PROBE = 1 << 18
VFIO_DEVICE_FEATURE_DMA_BUF = 11


@vfio_ioctl(VFIO_BASE + 17, last="flags", macro="VFIO_DEVICE_FEATURE")
class VfioDeviceFeature(VfioIoctl):
    """struct vfio_device_feature

    The low bits of `flags` number the feature, whose own struct is the tail. Pointers in there are not known
    here.
    """

    TAIL = Tail("data", _behind(8))
    RETURNS_FD = Masked(
        "flags",
        VFIO_DEVICE_FEATURE_PROBE | VFIO_DEVICE_FEATURE_GET | VFIO_DEVICE_FEATURE_MASK,
        VFIO_DEVICE_FEATURE_GET | VFIO_DEVICE_FEATURE_DMA_BUF,
    )

    flags: u32 = 0


VFIO_DEVICE_BIND_FLAG_TOKEN = 1 << 0


@vfio_ioctl(VFIO_BASE + 18, last="out_devid", macro="VFIO_DEVICE_BIND_IOMMUFD")
class VfioDeviceBindIommufd(VfioIoctl):
    """struct vfio_device_bind_iommufd"""

    flags: u32 = 0
    iommufd: Annotated[s32, FdIn()] = 0
    out_devid: u32 = 0
    token_uuid_ptr: Annotated[
        u64, When("flags", VFIO_DEVICE_BIND_FLAG_TOKEN, In(Const(16)), Address(Const(0)))
    ] = 0


VFIO_DEVICE_ATTACH_PASID = 1 << 0


@vfio_ioctl(VFIO_BASE + 19, last="pt_id", macro="VFIO_DEVICE_ATTACH_IOMMUFD_PT")
class VfioDeviceAttachIommufdPt(VfioIoctl):
    """struct vfio_device_attach_iommufd_pt

    `pasid` is read only with VFIO_DEVICE_ATTACH_PASID.
    """

    flags: u32 = 0
    pt_id: u32 = 0
    pasid: u32 = 0


VFIO_DEVICE_DETACH_PASID = 1 << 0


@vfio_ioctl(VFIO_BASE + 20, last="flags", macro="VFIO_DEVICE_DETACH_IOMMUFD_PT")
class VfioDeviceDetachIommufdPt(VfioIoctl):
    """struct vfio_device_detach_iommufd_pt

    `pasid` is read only with VFIO_DEVICE_DETACH_PASID.
    """

    flags: u32 = 0
    pasid: u32 = 0


# ---- container, type 1 ---------------------------------------------------------------------------

VFIO_IOMMU_INFO_PGSIZES = 1 << 0
VFIO_IOMMU_INFO_CAPS = 1 << 1


@vfio_ioctl(VFIO_BASE + 12, last="iova_pgsizes", macro="VFIO_IOMMU_GET_INFO")
class VfioIommuType1Info(VfioIoctl):
    """struct vfio_iommu_type1_info"""

    TAIL = Tail("caps", _behind(24))

    flags: u32 = 0
    iova_pgsizes: u64 = 0
    cap_offset: u32 = 0
    pad: u32 = 0


VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE = 1


@layout
class VfioIovaRange(Layout):
    """struct vfio_iova_range"""

    start: u64 = 0
    end: u64 = 0


@layout
class VfioIommuType1InfoCapIovaRange(Layout):
    """struct vfio_iommu_type1_info_cap_iova_range"""

    TAIL = Tail("iova_ranges", Times(Field("nr_iovas"), Const(VfioIovaRange.SIZEOF)))

    header: VfioInfoCapHeader = msgspec.field(default_factory=VfioInfoCapHeader)
    nr_iovas: u32 = 0
    reserved: u32 = 0


VFIO_IOMMU_TYPE1_INFO_CAP_MIGRATION = 2


@layout
class VfioIommuType1InfoCapMigration(Layout):
    """struct vfio_iommu_type1_info_cap_migration"""

    header: VfioInfoCapHeader = msgspec.field(default_factory=VfioInfoCapHeader)
    flags: u32 = 0
    pgsize_bitmap: u64 = 0
    max_dirty_bitmap_size: u64 = 0


VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL = 3


@layout
class VfioIommuType1InfoDmaAvail(Layout):
    """struct vfio_iommu_type1_info_dma_avail"""

    header: VfioInfoCapHeader = msgspec.field(default_factory=VfioInfoCapHeader)
    avail: u32 = 0


VFIO_DMA_MAP_FLAG_READ = 1 << 0
VFIO_DMA_MAP_FLAG_WRITE = 1 << 1
VFIO_DMA_MAP_FLAG_VADDR = 1 << 2


@vfio_ioctl(VFIO_BASE + 13, last="size", macro="VFIO_IOMMU_MAP_DMA")
class VfioIommuType1DmaMap(VfioIoctl):
    """struct vfio_iommu_type1_dma_map"""

    flags: u32 = 0
    vaddr: Annotated[u64, Address(Field("size"))] = 0
    iova: u64 = 0
    size: u64 = 0


@layout
class VfioBitmap(Layout):
    """struct vfio_bitmap"""

    pgsize: u64 = 0
    size: u64 = 0
    data: u64 = 0


VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP = 1 << 0
VFIO_DMA_UNMAP_FLAG_ALL = 1 << 1
VFIO_DMA_UNMAP_FLAG_VADDR = 1 << 2


@vfio_ioctl(VFIO_BASE + 14, last="size", macro="VFIO_IOMMU_UNMAP_DMA")
class VfioIommuType1DmaUnmap(VfioIoctl):
    """struct vfio_iommu_type1_dma_unmap

    The tail is a struct vfio_bitmap with VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP, which iommufd refuses before
    it looks at the tail.
    """

    TAIL = Tail("data", _behind(24))

    flags: u32 = 0
    iova: u64 = 0
    size: u64 = 0


VFIO_IOMMU_ENABLE = IOC_TYPE | VFIO_BASE + 15
VFIO_IOMMU_DISABLE = IOC_TYPE | VFIO_BASE + 16

VFIO_IOMMU_DIRTY_PAGES_FLAG_START = 1 << 0
VFIO_IOMMU_DIRTY_PAGES_FLAG_STOP = 1 << 1
VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP = 1 << 2


@vfio_ioctl(VFIO_BASE + 17, last="flags", macro="VFIO_IOMMU_DIRTY_PAGES")
class VfioIommuType1DirtyBitmap(VfioIoctl):
    """struct vfio_iommu_type1_dirty_bitmap

    The tail is a struct vfio_iommu_type1_dirty_bitmap_get. iommufd does not know this ioctl.
    """

    TAIL = Tail("data", _behind(8))

    flags: u32 = 0


@layout
class VfioIommuType1DirtyBitmapGet(Layout):
    """struct vfio_iommu_type1_dirty_bitmap_get"""

    iova: u64 = 0
    size: u64 = 0
    bitmap: VfioBitmap = msgspec.field(default_factory=VfioBitmap)


DEVICE_IOCTLS: tuple[type[VfioIoctl], ...] = (
    VfioDeviceInfo,
    VfioRegionInfo,
    VfioIrqInfo,
    VfioIrqSet,
    VfioDeviceFeature,
    VfioDeviceBindIommufd,
    VfioDeviceAttachIommufdPt,
    VfioDeviceDetachIommufdPt,
)

CONTAINER_IOCTLS: tuple[type[VfioIoctl], ...] = (
    VfioIommuType1Info,
    VfioIommuType1DmaMap,
    VfioIommuType1DmaUnmap,
    VfioIommuType1DirtyBitmap,
)

VFIO_DEVICE_GET_INFO = VfioDeviceInfo.CMD
VFIO_DEVICE_GET_REGION_INFO = VfioRegionInfo.CMD
VFIO_DEVICE_GET_IRQ_INFO = VfioIrqInfo.CMD
VFIO_DEVICE_SET_IRQS = VfioIrqSet.CMD
VFIO_DEVICE_FEATURE = VfioDeviceFeature.CMD
VFIO_DEVICE_BIND_IOMMUFD = VfioDeviceBindIommufd.CMD
VFIO_DEVICE_ATTACH_IOMMUFD_PT = VfioDeviceAttachIommufdPt.CMD
VFIO_DEVICE_DETACH_IOMMUFD_PT = VfioDeviceDetachIommufdPt.CMD
VFIO_IOMMU_GET_INFO = VfioIommuType1Info.CMD
VFIO_IOMMU_MAP_DMA = VfioIommuType1DmaMap.CMD
VFIO_IOMMU_UNMAP_DMA = VfioIommuType1DmaUnmap.CMD
VFIO_IOMMU_DIRTY_PAGES = VfioIommuType1DirtyBitmap.CMD
