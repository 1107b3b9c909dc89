"""Room uapi: what of include/uapi/linux/kvm.h leads to a table that an IOMMU shares, and the RFC's additions to it.

The RFC is "Sharing KVM TDP to IOMMU" (December 2023, never merged): KVM_CREATE_TDP_FD, and a data type for
IOMMU_HWPT_ALLOC. What it left without a number has a private one here: PRIVATE and what is made from it. All of these
are ioctls of a VM or of /dev/kvm; a number carries direction and size, and the structs have no size field.
"""

from collections.abc import Callable
from typing import Annotated, ClassVar, TypeVar

from .layout import FdIn, FdOut, Layout, array, layout, u32, u64

KVMIO = 0xAE
PRIVATE = 0x4B56_4D00  #: "KVM" and a byte: numbers that no kernel has given out

#: data_type of IOMMU_HWPT_ALLOC. The RFC's 3 is AMD's guest table by now.
IOMMU_HWPT_DATA_KVM = PRIVATE

KVM_ADDRESS_SPACE_NUM = 2  #: x86: normal and SMM
KVM_USER_MEM_SLOTS = 32764
KVM_MAX_VCPUS = 4096
KVM_MEM_MAX_NR_PAGES = (1 << 31) - 1

KVM_MEM_LOG_DIRTY_PAGES = 1 << 0
KVM_MEM_READONLY = 1 << 1

KVM_CAP_USER_MEMORY = 3
KVM_CAP_NR_VCPUS = 9
KVM_CAP_NR_MEMSLOTS = 10
KVM_CAP_MAX_VCPUS = 66
KVM_CAP_READONLY_MEM = 81
KVM_CAP_MULTI_ADDRESS_SPACE = 118
KVM_CAP_TDP_FD = PRIVATE  #: the RFC has no number: KVM_CREATE_TDP_FD is there
KVM_CAP_TDP_MAXPHYADDR = PRIVATE + 1  #: KVM_ENABLE_CAP: args[0] is the width in bits that vCPUs made from now on have
KVM_CAP_TDP_CHECK = PRIVATE + 2  #: KVM_ENABLE_CAP: args[0] 1: look after every change whether the sharing holds
KVM_CAP_TDP_MMIO_MARKS = PRIVATE + 3  #: KVM_ENABLE_CAP: args[0] 1: store MMIO entries, as the RFC does

KVM_TDP_TYPE_EPT = 1

_NONE, _WRITE, _READ = 0, 1, 2  #: direction bits of an ioctl's number, as user space sees it

K = TypeVar("K", bound="KvmIoctl")


class KvmIoctl(Layout, gc=False):
    """Base of every struct that a VM takes: its size is in the ioctl's number."""

    NR: ClassVar[int] = 0
    CMD: ClassVar[int] = 0
    MACRO: ClassVar[str] = ""


def io(nr: int) -> int:
    """_IO(KVMIO, nr): the argument is a number."""
    return KVMIO << 8 | nr


def kvm_ioctl(nr: int, macro: str, direction: int) -> Callable[[type[K]], type[K]]:
    """Class decorator: the argument of KVM's ioctl `nr`."""

    def decorate(cls: type[K]) -> type[K]:
        made = layout(cls)
        made.NR, made.MACRO = nr, macro
        made.CMD = direction << 30 | made.SIZEOF << 16 | io(nr)
        return made

    return decorate


KVM_API_VERSION = 12
KVM_GET_API_VERSION = io(0x00)
KVM_CREATE_VM = io(0x01)  #: the result is a descriptor
KVM_CHECK_EXTENSION = io(0x03)
KVM_CREATE_VCPU = io(0x41)  #: the result is a descriptor


@kvm_ioctl(0x42, "KVM_GET_DIRTY_LOG", _WRITE)
class KvmDirtyLog(KvmIoctl):
    """struct kvm_dirty_log

    The bitmap has a bit for each page of the slot, in whole u64. How long it is only KVM knows.
    """

    slot: u32 = 0
    padding: u32 = 0
    dirty_bitmap: u64 = 0


@kvm_ioctl(0x46, "KVM_SET_USER_MEMORY_REGION", _WRITE)
class KvmUserspaceMemoryRegion(KvmIoctl):
    """struct kvm_userspace_memory_region"""

    slot: u32 = 0
    flags: u32 = 0
    guest_phys_addr: u64 = 0
    memory_size: u64 = 0
    userspace_addr: u64 = 0


@kvm_ioctl(0xA3, "KVM_ENABLE_CAP", _WRITE)
class KvmEnableCap(KvmIoctl):
    """struct kvm_enable_cap"""

    cap: u32 = 0
    flags: u32 = 0
    args: Annotated[tuple[int, ...], array(u64, 4)] = (0, 0, 0, 0)
    pad: Annotated[tuple[int, ...], array(u64, 8)] = (0,) * 8


@kvm_ioctl(0xE4, "KVM_CREATE_TDP_FD", _READ | _WRITE)
class KvmCreateTdpFd(KvmIoctl):
    """struct kvm_create_tdp_fd"""

    as_id: u32 = 0
    mode: u32 = 0
    fd: Annotated[u32, FdOut()] = 0
    pad: u32 = 0


@kvm_ioctl(0xE5, "KVM_GET_TDP_INFO", _READ)
class KvmTdpInfo(KvmIoctl):
    """struct kvm_tdp_info

    Not the RFC's: what it hands to the driver (`type` to `rsvd_bits_mask`, 0 while nothing is exported), and counts.
    `rsvd_bits_mask[bit 7 of the entry * 5 + level - 1]` are the bits that an entry of the table never has.
    """

    type: u32 = 0
    level: u32 = 0
    root_hpa: u64 = 0
    max_huge_page_level: u64 = 0
    rsvd_bits_mask: Annotated[tuple[int, ...], array(u64, 10)] = (0,) * 10
    faults: u64 = 0  #: asked for by vCPUs and devices
    failed: u64 = 0  #: of those, without a page
    mapped: u64 = 0  #: leaf entries made
    zapped: u64 = 0  #: leaf entries taken away
    flushes: u64 = 0  #: of vCPUs and importers
    present: u64 = 0  #: bytes of guest memory mapped now
    tables: u64 = 0  #: pages of the table now
    importers: u64 = 0
    violations: u64 = 0  #: found since KVM_CAP_TDP_CHECK was enabled


@layout
class HwptKvm(Layout):
    """struct iommu_hwpt_kvm

    Data of IOMMU_HWPT_ALLOC with IOMMU_HWPT_DATA_KVM: the low 32 bits are what KVM_CREATE_TDP_FD gave.
    """

    fd: Annotated[u64, FdIn()] = 0


IOCTLS: tuple[type[KvmIoctl], ...] = (
    KvmDirtyLog,
    KvmUserspaceMemoryRegion,
    KvmEnableCap,
    KvmCreateTdpFd,
    KvmTdpInfo,
)

KVM_GET_DIRTY_LOG = KvmDirtyLog.CMD
KVM_SET_USER_MEMORY_REGION = KvmUserspaceMemoryRegion.CMD
KVM_ENABLE_CAP = KvmEnableCap.CMD
KVM_CREATE_TDP_FD = KvmCreateTdpFd.CMD
KVM_GET_TDP_INFO = KvmTdpInfo.CMD


def argument_size(cmd: int) -> int | None:
    """Bytes of the struct that a number of KVM's names, 0 if its argument is a number; None if it is not KVM's."""
    return cmd >> 16 & 0x3FFF if cmd >> 8 & 0xFF == KVMIO else None
