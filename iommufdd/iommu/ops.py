"""What a hardware model is to the core: struct iommu_ops, iommu_domain_ops, iommu_dirty_ops, iommufd_viommu_ops.

Small Protocols split by capability, as the kernel splits its tables of functions: having the method is supporting it.
This file lies below the core and beside no model: core and models never import each other.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

from .walk import allowed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from iommufdd.user import PageFile, PageRun
    from iommufdd.user_data import UserData, UserDataArray

    from .group import IommuGroup, IopfGroup

IOMMU_NO_PASID = 0


class Cap(enum.Enum):
    """enum iommu_cap"""

    CACHE_COHERENCY = enum.auto()
    ENFORCE_CACHE_COHERENCY = enum.auto()
    DIRTY_TRACKING = enum.auto()
    PCI_ATS_SUPPORTED = enum.auto()


class DomainType(enum.Enum):
    """IOMMU_DOMAIN_*"""

    BLOCKED = enum.auto()
    PAGING = enum.auto()
    NESTED = enum.auto()
    KVM = enum.auto()


class ResvRegion(NamedTuple):
    """struct iommu_resv_region: IOVA a device cannot use for DMA."""

    start: int
    last: int
    kind: str  # "direct-relaxable", "reserved", "msi", "sw-msi"


@dataclass(slots=True, eq=False)
class Extent:
    """[first, last] of an address space, shown by consecutive bytes of one file."""

    first: int
    last: int
    file: PageFile
    pos: int  # byte of the file behind `first`
    readable: bool
    writable: bool

    allowed: int = field(init=False)  # the accesses that these rights allow; there is one right at least

    def __post_init__(self) -> None:
        self.allowed = allowed(readable=self.readable, writable=self.writable)

    def part(self, first: int, size: int) -> Extent:
        """`size` bytes of it."""
        return Extent(first, first + size - 1, self.file, self.pos + first - self.first, self.readable, self.writable)


class Translation(Protocol):
    """The address space behind a paging domain: what the kernel would have written into its table."""

    def translate(self, iova: int) -> tuple[PageRun, int, bool, bool] | None:
        """(page, byte in the page, readable, writable) of a mapped iova."""
        ...

    def extent(self, iova: int) -> Extent | None:
        """The largest stretch around a mapped iova that is contiguous in memory and has one set of rights."""
        ...

    def entry(self, iova: int, pgsizes: int) -> tuple[int, int] | None:
        """(first IOVA, bytes) of the table entry that the kernel would have made for iova with these page sizes."""
        ...


class Domain:
    """struct iommu_domain, with the operations every domain has."""

    type = DomainType.PAGING
    pgsize_bitmap = 0
    aperture_start = 0
    aperture_end = 2**64 - 1
    refuses_read_only = False  # its table has no read-only entries: IOMMU_IOAS_MAP needs WRITEABLE
    translation: Translation | None = None  # of a paging domain, once it is in an IOAS
    iopf_handler: Callable[[IopfGroup], None] | None = None
    dirty_ops: DirtyOps | None = None
    hwpt_id = 0  # of the HWPT that has it, for people

    def __init__(self, owner: IommuOps) -> None:
        self.owner = owner

    def attach_dev(self, dev: Device, old: Domain | None) -> None:
        """Let dev translate through this domain instead of `old`. EINVAL: it does not fit the device."""
        raise NotImplementedError

    def enforce_cache_coherency(self) -> bool:
        """Make all DMA through this domain snoop; False when its IOMMU cannot."""
        return False

    def unmapped(self, iova: int, last: int) -> None:
        """[iova, last] has left the address space: flush it."""

    def free(self) -> None:
        """iommu_domain_free()."""


class Device:
    """struct device with its dev_iommu: a requester of DMA."""

    iommu: IommuOps
    group: IommuGroup
    name = ""
    max_pasids = 0  # 0: no PASID capability
    is_mock = False  # the selftest's own device: exempt from interrupt isolation
    drvdata: object = None  # what the driver bound to it keeps (dev_set_drvdata)

    def resv_regions(self) -> Iterable[ResvRegion]:
        """iommu_get_resv_regions()."""
        return ()

    def reset(self) -> None:
        """A function level reset: what only the device keeps, such as its TLB, is lost."""


class MmapRegion(Protocol):
    """Registers that user space can map."""

    offset: int
    length: int
    data: memoryview


class IommuOps(Protocol):
    """struct iommu_ops together with its struct iommu_device: one IOMMU instance."""

    driver: str  # whose iommu_ops these are: instances of one driver may share domains
    blocked_domain: Domain
    user_pasid_table: bool  # a PASID nobody attached belongs to the user's own table

    def capable(self, dev: Device, cap: Cap) -> bool:
        """device_iommu_capable()."""
        ...

    def domain_alloc_paging(self, dev: Device, flags: int, user_data: UserData | None) -> Domain:
        """domain_alloc_paging_flags(). EOPNOTSUPP flags or data it does not know."""
        ...


@runtime_checkable
class HwInfoOps(Protocol):
    """An IOMMU that describes itself."""

    def hw_info(self, dev: Device, info_type: int) -> tuple[int, bytes]:
        """(enum iommu_hw_info_type, the structure). EOPNOTSUPP for a type asked for that it has not."""
        ...


@runtime_checkable
class NestingOps(Protocol):
    """An IOMMU that nests a user's stage 1 directly on a paging domain."""

    def domain_alloc_nested(self, dev: Device, parent: Domain, flags: int, user_data: UserData) -> Domain: ...


class PhysicalRun(NamedTuple):
    """[first, last] of host-physical memory, shown by consecutive bytes of one file."""

    first: int
    last: int
    file: PageFile
    pos: int  # byte of the file behind `first`


class PhysicalMemory(Protocol):
    """Host-physical memory, as hardware reaches it."""

    def load(self, hpa: int) -> int | None:
        """The 64 bit entry at an address; None where there is no memory."""
        ...

    def store(self, hpa: int, entry: int) -> None:
        """Write the 64 bit entry at an address that load() has found."""
        ...

    def run(self, hpa: int) -> PhysicalRun | None:
        """Consecutive bytes of one file around an address; None where there is no memory of a file."""
        ...


class TdpMetadata(NamedTuple):
    """struct kvm_exported_tdp_header and kvm_exported_tdp_ept: a VM's table, as KVM shows it to a driver."""

    type: int
    level: int
    root_hpa: int
    max_huge_page_level: int  # 1: 4 KiB, 2: 2 MiB, 3: 1 GiB
    rsvd_bits_mask: tuple[int, ...]  # [bit 7 of the entry * 5 + level - 1]


class Cached(NamedTuple):
    """A translation that hardware has kept of a VM's table: guest-physical [first, last] to bytes of a file."""

    where: str
    first: int
    last: int
    file: PageFile
    pos: int
    allowed: int  # set of accesses (walk.py)


@runtime_checkable
class KvmDomain(Protocol):
    """A domain over a VM's table."""

    def cache_invalidate(self, start: int, size: int) -> None:
        """The table has changed: bytes from guest address `start`; (0, all ones) is everything."""
        ...

    def cached(self) -> Iterable[Cached]:
        """What is kept of the table now."""
        ...

    def cached_tables(self) -> Iterable[int]:
        """Addresses of table pages that a walk may begin at."""
        ...


@runtime_checkable
class KvmOps(Protocol):
    """An IOMMU that walks a VM's table (the RFC's domain_alloc_kvm)."""

    def domain_alloc_kvm(self, dev: Device, flags: int, tdp: TdpMetadata | None, memory: PhysicalMemory) -> Domain: ...


@runtime_checkable
class ViommuOps(Protocol):
    """An IOMMU with a slice to give to a guest."""

    def viommu_supported(self, dev: Device, viommu_type: int) -> bool:
        """get_viommu_size() is not 0."""
        ...

    def viommu_init(self, viommu: ViommuPort, parent: Domain, user_data: UserData | None) -> ViommuDriver:
        """viommu_init()."""
        ...


@runtime_checkable
class PasidDomain(Protocol):
    """A domain that a PASID can use."""

    def set_dev_pasid(self, dev: Device, pasid: int, old: Domain | None) -> None: ...


@runtime_checkable
class InvalidateDomain(Protocol):
    """A nested domain whose caches the user can invalidate."""

    def cache_invalidate_user(self, array: UserDataArray) -> None:
        """Work on array; leave the number of entries done in array.entry_num, on errors too."""
        ...


class DirtyOps(Protocol):
    """struct iommu_dirty_ops"""

    def set_dirty_tracking(self, *, enable: bool) -> None: ...

    def read_and_clear_dirty(self, iova: int, last: int, *, clear: bool) -> Iterable[tuple[int, int]]:
        """Dirty stretches (iova, bytes) within [iova, last]."""
        ...


class ViommuPort(Protocol):
    """What a vIOMMU of the core offers its driver half (driver.c)."""

    viommu_type: int

    def find_dev(self, virt_id: int) -> Device | None:
        """iommufd_viommu_find_dev()."""
        ...

    def get_vdev_id(self, dev: Device) -> int | None:
        """iommufd_viommu_get_vdev_id()."""
        ...

    def report_event(self, event_type: int, data: bytes) -> None:
        """iommufd_viommu_report_event(); EOPNOTSUPP when nobody listens."""
        ...

    def alloc_mmap(self, length: int) -> MmapRegion:
        """iommufd_viommu_alloc_mmap(): zeroed bytes with an offset for mmap(2); ENOMEM."""
        ...

    def destroy_mmap(self, region: MmapRegion) -> None:
        """iommufd_viommu_destroy_mmap()."""
        ...

    def add_doorbell(self, doorbell: Doorbell) -> None:
        """Have it looked at: on every ioctl, and from time to time."""
        ...

    def remove_doorbell(self, doorbell: Doorbell) -> None:
        """The guest cannot ring it any more."""
        ...


class Doorbell(Protocol):
    """Registers that a guest writes without a trap: only looking tells."""

    def poll(self, commands: int | None = None) -> int:
        """Do what the guest has asked for, at most `commands` of it; how much that was, 0 for nothing."""
        ...


class HwQueuePort(Protocol):
    """What a HW queue of the core shows its driver half."""

    base_addr: int
    length: int

    def depend(self, on: HwQueuePort) -> None:
        """iommufd_hw_queue_depend(): `on` cannot go before this one."""
        ...

    def undepend(self, on: HwQueuePort) -> None: ...


class ViommuDriver(Protocol):
    """struct iommufd_viommu_ops with the driver's struct."""

    def destroy(self) -> None: ...


@runtime_checkable
class NestingViommu(Protocol):
    """A vIOMMU that makes nested domains."""

    def alloc_domain_nested(self, flags: int, user_data: UserData) -> Domain: ...


@runtime_checkable
class VdeviceViommu(Protocol):
    """A vIOMMU that has a say in which devices it takes."""

    def vdevice_init(self, dev: Device, virt_id: int) -> Callable[[], None] | None:
        """vdevice_init(); the vDEVICE is not yet to be found. Returns its destroy, if it needs one."""
        ...


@runtime_checkable
class InvalidateViommu(Protocol):
    """A vIOMMU that takes a guest's invalidations."""

    def cache_invalidate(self, array: UserDataArray) -> None: ...


@runtime_checkable
class HwQueueViommu(Protocol):
    """A vIOMMU with hardware queues."""

    def hw_queue_supported(self, queue_type: int) -> bool:
        """get_hw_queue_size() is not 0."""
        ...

    def hw_queue_init(self, queue: HwQueuePort, index: int, base: tuple[PageRun, int]) -> Callable[[], None]:
        """hw_queue_init_phys(): returns the queue's destroy."""
        ...
