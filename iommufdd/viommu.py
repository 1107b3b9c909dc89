"""vIOMMU, vDEVICE and HW queue: a slice of an IOMMU for a guest (viommu.c, driver.c)."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import iommufd_uapi.iommufd as uapi

from .access import Access
from .device import IommufdDevice
from .errors import EEXIST, EFAULT, EINVAL, ENOENT, ENOMEM, EOPNOTSUPP, EOVERFLOW, ERANGE, IommufdError
from .hw_pagetable import NESTED_FLAGS, HwptNested, HwptPaging, NestingParent, finish_nested
from .iommu import ops
from .iommu.ops import HwQueueViommu, NestingViommu, VdeviceViommu, ViommuOps
from .objects import IommufdObject, ObjectType
from .user import PAGE_SIZE, ULONG_MAX, Gate
from .user_data import UserData

if TYPE_CHECKING:
    from collections.abc import Callable

    from .context import Context
    from .iommu.ops import Device, HwQueuePort, IommuOps
    from .mmap import MmapRegion
    from .ucmd import Ucmd
    from .user import Caller, PageRun
    from .veventq import Veventq


class Viommu(NestingParent):
    """struct iommufd_viommu; `driver` is the model's half."""

    type = ObjectType.VIOMMU

    def __init__(self, ictx: Context, caller: Caller, viommu_type: int, hwpt: HwptPaging, iommu: IommuOps) -> None:
        super().__init__()
        self.ictx = ictx
        self.caller = caller  # of the allocation
        self.viommu_type = viommu_type
        self.hwpt = hwpt
        self.iommu = iommu
        self.vdevs: dict[int, Vdevice] = {}  # by virt_id
        self.veventqs: list[Veventq] = []

    def destroy(self) -> None:
        if self.driver is not None:
            self.driver.destroy()
        super().destroy()

    def hwpt_nested_alloc(self, ucmd: Ucmd, idev: IommufdDevice, flags: int, user_data: UserData) -> HwptNested:
        """iommufd_viommu_alloc_hwpt_nested(): EINVAL, EOPNOTSUPP, the driver's."""
        driver = self.driver
        if self.iommu is not idev.dev.iommu:
            raise EINVAL(f"{idev} is behind another IOMMU than {self}")
        if flags & ~NESTED_FLAGS or not user_data.len or not isinstance(driver, NestingViommu):
            raise EOPNOTSUPP("flags are not known, there is no data, or this vIOMMU does not nest")
        plain = flags & ~uapi.IOMMU_HWPT_FAULT_ID_VALID
        return finish_nested(
            ucmd, HwptNested(self.hwpt, self, flags), self, lambda: driver.alloc_domain_nested(plain, user_data)
        )

    # ---- what the driver half calls (driver.c) ----

    def find_dev(self, virt_id: int) -> Device | None:
        """iommufd_viommu_find_dev()"""
        vdev = self.vdevs.get(virt_id)
        return None if vdev is None else vdev.idev.dev

    def get_vdev_id(self, dev: Device) -> int | None:
        """iommufd_viommu_get_vdev_id()"""
        return next((virt_id for virt_id, vdev in self.vdevs.items() if vdev.idev.dev is dev), None)

    def find_veventq(self, event_type: int) -> Veventq | None:
        return next((veventq for veventq in self.veventqs if veventq.event_type == event_type), None)

    def report_event(self, event_type: int, data: bytes) -> None:
        """iommufd_viommu_report_event(): EOPNOTSUPP when there is no queue for the type."""
        veventq = self.find_veventq(event_type)
        if veventq is None:
            raise EOPNOTSUPP(f"{self} has no vEVENTQ of type {event_type:#x}")
        veventq.report(data)

    def alloc_mmap(self, length: int) -> MmapRegion:
        """iommufd_viommu_alloc_mmap(): ENOMEM."""
        self.caller.gate(Gate.MMAP)
        return self.ictx.mmaps.alloc(self, length)

    def destroy_mmap(self, region: ops.MmapRegion) -> None:
        """iommufd_viommu_destroy_mmap()"""
        self.ictx.mmaps.destroy(region)

    def add_doorbell(self, doorbell: ops.Doorbell) -> None:
        """Have it looked at, on every ioctl of this context too."""
        self.ictx.doorbells.add(doorbell)

    def remove_doorbell(self, doorbell: ops.Doorbell) -> None:
        """It rings no more."""
        self.ictx.doorbells.remove(doorbell)


class Vdevice(IommufdObject):
    """struct iommufd_vdevice: a device of the guest; it holds the vIOMMU, and its device can revoke it."""

    type = ObjectType.VDEVICE

    def __init__(self, viommu: Viommu, idev: IommufdDevice, virt_id: int) -> None:
        super().__init__()
        self.viommu = viommu
        self.idev = idev
        self.virt_id = virt_id
        self.driver_destroy: Callable[[], None] | None = None

    def destroy(self) -> None:
        if self.driver_destroy is not None:
            self.driver_destroy()
        if self.viommu.vdevs.get(self.virt_id) is self:
            del self.viommu.vdevs[self.virt_id]
        self.idev.vdev = None
        super().destroy()


class HwQueue(IommufdObject):
    """struct iommufd_hw_queue: guest memory that hardware reads by physical address, so it is pinned and locked."""

    type = ObjectType.HW_QUEUE

    def __init__(self, viommu: Viommu, base_addr: int, length: int) -> None:
        super().__init__()
        self.viommu = viommu
        self.base_addr = base_addr
        self.length = length
        self.access: Access | None = None
        self.driver_destroy: Callable[[], None] | None = None

    def depend(self, on: HwQueuePort) -> None:
        assert isinstance(on, HwQueue)
        self.hold(on)

    def undepend(self, on: HwQueuePort) -> None:
        assert isinstance(on, HwQueue)
        self.let_go(on)

    def destroy(self) -> None:
        if self.driver_destroy is not None:
            self.driver_destroy()
        if self.access is not None:
            self.access.unpin_pages(*_whole_pages(self.base_addr, self.length))
            self._drop_access(self.access)
        super().destroy()

    def pin(self, caller: Caller) -> tuple[PageRun, int]:
        """iommufd_hw_queue_alloc_phys(): (first page, byte in it). ERANGE, ENOMEM, EFAULT, and what pinning raises."""
        iova, length = _whole_pages(self.base_addr, self.length)
        caller.gate(Gate.MEMORY)
        if length // PAGE_SIZE * 8 > 2**31 - 1:
            raise ENOMEM("the array of the queue's pages is too large")  # kvmalloc refuses
        objects = self.viommu.ictx.objects
        access = objects.alloc(Access(pins=True, unmap=None), caller.gate)
        objects.finalize(access)
        self.hold(access)
        try:
            access.change_ioas(caller, self.viommu.hwpt.ioas)
            runs = access.pin_pages(caller, iova, length, write=False)
            first = runs[0]
            if not _consecutive(runs):
                access.unpin_pages(iova, length)
                raise EFAULT("the queue's pages are not consecutive in one file")
        except IommufdError:
            self._drop_access(access)
            raise
        self.access = access
        return first, self.base_addr % PAGE_SIZE

    def _drop_access(self, access: Access) -> None:
        self.let_go(access)
        self.viommu.ictx.objects.destroy_user(access)


def _whole_pages(iova: int, length: int) -> tuple[int, int]:
    """The pages around [iova, iova + length)."""
    offset = iova % PAGE_SIZE
    return iova - offset, (offset + length + PAGE_SIZE - 1) // PAGE_SIZE * PAGE_SIZE


def _consecutive(runs: list[PageRun]) -> bool:
    return all(b.file is a.file and b.page == a.page + a.npages for a, b in itertools.pairwise(runs))


def viommu_alloc(ucmd: Ucmd, cmd: uapi.ViommuAlloc) -> None:
    """IOMMU_VIOMMU_ALLOC: EOPNOTSUPP, ENOENT, EINVAL, ENOMEM, the driver's. quirk: reserved is not looked at."""
    if cmd.flags or cmd.type == uapi.IOMMU_VIOMMU_TYPE_DEFAULT:
        raise EOPNOTSUPP("flags are not known, or the type is 0")
    idev = ucmd.get(cmd.dev_id, IommufdDevice)
    iommu = idev.dev.iommu
    if not isinstance(iommu, ViommuOps) or not iommu.viommu_supported(idev.dev, cmd.type):
        raise EOPNOTSUPP(f"the device's IOMMU makes no vIOMMU of type {cmd.type:#x}")
    hwpt = ucmd.get(cmd.hwpt_id, HwptPaging)
    if not hwpt.nest_parent:
        raise EINVAL(f"{hwpt} was not made with IOMMU_HWPT_ALLOC_NEST_PARENT")
    viommu = ucmd.alloc(Viommu(ucmd.ictx, ucmd.caller, cmd.type, hwpt, iommu))
    viommu.hold(hwpt)
    data = UserData(ucmd.caller, cmd.type, cmd.data_uptr, cmd.data_len)
    viommu.driver = iommu.viommu_init(viommu, hwpt.domain, data if cmd.data_len else None)
    cmd.out_viommu_id = viommu.id
    ucmd.respond(cmd)


def vdevice_alloc(ucmd: Ucmd, cmd: uapi.VdeviceAlloc) -> None:
    """IOMMU_VDEVICE_ALLOC: ENOENT, EINVAL, EEXIST, ENOMEM, the driver's."""
    viommu = ucmd.get(cmd.viommu_id, Viommu)
    idev = ucmd.get(cmd.dev_id, IommufdDevice)
    if viommu.iommu is not idev.dev.iommu:
        raise EINVAL(f"{idev} is behind another IOMMU than {viommu}")
    if idev.destroying:
        raise ENOENT(f"{idev} is going away")
    if idev.vdev is not None:
        raise EEXIST(f"{idev} already is {idev.vdev}")
    vdev = ucmd.alloc(Vdevice(viommu, idev, cmd.virt_id))
    vdev.hold(viommu)
    idev.vdev = vdev
    if cmd.virt_id in viommu.vdevs:
        raise EEXIST(f"virt_id {cmd.virt_id:#x} is taken in {viommu}")
    if isinstance(viommu.driver, VdeviceViommu):
        vdev.driver_destroy = viommu.driver.vdevice_init(idev.dev, cmd.virt_id)
    viommu.vdevs[cmd.virt_id] = vdev
    cmd.out_vdevice_id = vdev.id
    ucmd.respond(cmd)


def hw_queue_alloc(ucmd: Ucmd, cmd: uapi.HwQueueAlloc) -> None:
    """IOMMU_HW_QUEUE_ALLOC: EOPNOTSUPP, EINVAL, EOVERFLOW, ENOENT, ERANGE, what pinning raises, the driver's."""
    if cmd.flags or cmd.type == uapi.IOMMU_HW_QUEUE_TYPE_DEFAULT:
        raise EOPNOTSUPP("flags are not known, or the type is 0")
    if not cmd.length:
        raise EINVAL("length is 0")
    if cmd.nesting_parent_iova + cmd.length - 1 > ULONG_MAX:
        raise EOVERFLOW("nesting_parent_iova + length wraps")
    viommu = ucmd.get(cmd.viommu_id, Viommu)
    driver = viommu.driver
    if not isinstance(driver, HwQueueViommu) or not driver.hw_queue_supported(cmd.type):
        raise EOPNOTSUPP(f"{viommu} has no queues of type {cmd.type:#x}")
    queue = ucmd.alloc(HwQueue(viommu, cmd.nesting_parent_iova, cmd.length))
    if cmd.nesting_parent_iova % PAGE_SIZE + cmd.length + PAGE_SIZE - 1 > ULONG_MAX:
        raise ERANGE("rounding to pages overflows")
    base = queue.pin(ucmd.caller)
    queue.hold(viommu)
    queue.driver_destroy = driver.hw_queue_init(queue, cmd.index, base)
    cmd.out_hw_queue_id = queue.id
    ucmd.respond(cmd)
