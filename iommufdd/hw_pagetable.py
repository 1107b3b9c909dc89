"""HWPT: a hardware page table, paging or nested (hw_pagetable.c)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import iommufd_uapi.iommufd as uapi

from .device import IommufdDevice
from .errors import EINVAL, ENOENT, EOPNOTSUPP, IommufdError
from .eventq import Fault
from .ioas import Ioas
from .iommu.ops import Cap, InvalidateDomain, InvalidateViommu, NestingOps, ViommuDriver
from .objects import IommufdObject, ObjectType
from .user import PAGE_SIZE, Gate
from .user_data import UserData, UserDataArray

if TYPE_CHECKING:
    from collections.abc import Callable

    from .iommu.group import AttachHandle
    from .iommu.ops import Domain
    from .ucmd import Ucmd
    from .user import Caller
    from .viommu import Viommu

PAGING_FLAGS = (
    uapi.IOMMU_HWPT_ALLOC_NEST_PARENT
    | uapi.IOMMU_HWPT_ALLOC_DIRTY_TRACKING
    | uapi.IOMMU_HWPT_FAULT_ID_VALID
    | uapi.IOMMU_HWPT_ALLOC_PASID
)
NESTED_FLAGS = uapi.IOMMU_HWPT_FAULT_ID_VALID | uapi.IOMMU_HWPT_ALLOC_PASID


class HwPagetable(IommufdObject):
    """struct iommufd_hw_pagetable; `domain` is None only while it is being born."""

    domain: Domain
    fault: Fault | None = None
    pasid_compat = False

    @property
    def paging(self) -> HwptPaging | None:
        """The paging HWPT that decides which IOVA exist (find_hwpt_paging)."""
        raise NotImplementedError

    def put(self) -> None:
        """iommufd_hw_pagetable_put(): an attachment let go."""

    def auto_response_faults(self, handle: AttachHandle | None) -> None:
        """What the user has not answered for this attachment is answered INVALID (iommufd_auto_response_faults)."""
        if self.fault is not None and handle is not None:
            self.fault.auto_response(handle)

    def _free(self) -> None:
        """__iommufd_hwpt_destroy()"""
        domain = getattr(self, "domain", None)
        if domain is not None:
            domain.free()


class HwptPaging(HwPagetable):
    """struct iommufd_hwpt_paging"""

    type = ObjectType.HWPT_PAGING
    auto_domain = False

    def __init__(self, ioas: Ioas, flags: int) -> None:
        super().__init__()
        self.ioas = ioas
        self.pasid_compat = bool(flags & uapi.IOMMU_HWPT_ALLOC_PASID)
        self.nest_parent = bool(flags & uapi.IOMMU_HWPT_ALLOC_NEST_PARENT)
        self.enforce_cache_coherency = False

    @property
    def paging(self) -> HwptPaging:
        return self

    def put(self) -> None:
        """An automatic HWPT goes with its last attachment."""
        if self.auto_domain and not self.holders:
            self.ioas.ictx.objects.remove(self.id)

    def destroy(self) -> None:
        if self in self.ioas.hwpt_list:
            self.ioas.hwpt_list.remove(self)
            self.ioas.iopt.remove_domain(self.domain)
        self._free()
        super().destroy()


class HwptNested(HwPagetable):
    """struct iommufd_hwpt_nested: a user's stage 1 over a paging HWPT."""

    type = ObjectType.HWPT_NESTED

    def __init__(self, parent: HwptPaging, viommu: Viommu | None, flags: int) -> None:
        super().__init__()
        self.parent = parent
        self.viommu = viommu
        self.pasid_compat = bool(flags & uapi.IOMMU_HWPT_ALLOC_PASID)

    @property
    def paging(self) -> HwptPaging:
        return self.parent

    def destroy(self) -> None:
        self._free()
        super().destroy()


class NestingParent(IommufdObject):
    """What makes nested HWPTs of its own kind: the vIOMMU. `driver` is None only while it is being born."""

    driver: ViommuDriver | None = None

    def hwpt_nested_alloc(self, ucmd: Ucmd, idev: IommufdDevice, flags: int, user_data: UserData) -> HwptNested:
        """A nested HWPT for idev, unpublished."""
        raise NotImplementedError


def paging_alloc(
    caller: Caller,
    ioas: Ioas,
    idev: IommufdDevice,
    flags: int,
    user_data: UserData | None,
    *,
    before_fill: Callable[[HwptPaging], object] | None = None,
    undo: Callable[[], None] | None = None,
) -> HwptPaging:
    """A HWPT that shows the IOAS, unpublished (iommufd_hwpt_paging_alloc).

    before_fill attaches the device before the pages are shown, undo detaches it when that fails.
    EOPNOTSUPP, EINVAL, EADDRINUSE, ENOMEM, EFAULT, the driver's.
    """
    if flags & ~PAGING_FLAGS:
        raise EOPNOTSUPP(f"flags {flags & ~PAGING_FLAGS:#x} are not known")
    iommu, dev = idev.dev.iommu, idev.dev
    if flags & uapi.IOMMU_HWPT_ALLOC_DIRTY_TRACKING and not iommu.capable(dev, Cap.DIRTY_TRACKING):
        raise EOPNOTSUPP("the device's IOMMU cannot track dirty pages")
    if flags & uapi.IOMMU_HWPT_FAULT_ID_VALID and flags & uapi.IOMMU_HWPT_ALLOC_NEST_PARENT:
        raise EOPNOTSUPP("a nest parent takes no fault queue")
    objects = ioas.ictx.objects
    hwpt = objects.alloc(HwptPaging(ioas, flags), caller.gate)
    try:
        hwpt.hold(ioas)
        caller.gate(Gate.DOMAIN)
        hwpt.domain = iommu.domain_alloc_paging(dev, flags & ~uapi.IOMMU_HWPT_FAULT_ID_VALID, user_data)
        if idev.enforce_cache_coherency:
            hwpt.enforce_cache_coherency = hwpt.domain.enforce_cache_coherency()
        if before_fill is not None:
            before_fill(hwpt)
        try:
            ioas.iopt.add_domain(caller, hwpt.domain)
        except IommufdError:
            if undo is not None:
                undo()
            raise
    except IommufdError:
        objects.abort(hwpt)
        raise
    ioas.hwpt_list.append(hwpt)
    return hwpt


def hwpt_alloc(ucmd: Ucmd, cmd: uapi.HwptAlloc) -> None:
    """IOMMU_HWPT_ALLOC: EOPNOTSUPP, EINVAL, ENOENT, and what paging_alloc() and the driver raise.

    quirk: reserved2 is not looked at.
    """
    if cmd.reserved:
        raise EOPNOTSUPP("reserved is not 0")
    if (cmd.data_type == uapi.IOMMU_HWPT_DATA_NONE) != (not cmd.data_len):
        raise EINVAL(f"data type {cmd.data_type} with {cmd.data_len} bytes of data")
    idev = ucmd.get(cmd.dev_id, IommufdDevice)
    try:
        pt = ucmd.get_any(cmd.pt_id)
    except ENOENT as error:
        raise EINVAL(error.reason) from None  # quirk: the one id whose absence is EINVAL
    user_data = UserData(ucmd.caller, cmd.data_type, cmd.data_uptr, cmd.data_len)
    hwpt: HwPagetable
    if isinstance(pt, Ioas):
        hwpt = paging_alloc(ucmd.caller, pt, idev, cmd.flags, user_data if user_data.len else None)
    elif isinstance(pt, HwptPaging):
        hwpt = _nested_alloc(ucmd, pt, idev, cmd.flags, user_data)
    elif isinstance(pt, NestingParent):
        hwpt = pt.hwpt_nested_alloc(ucmd, idev, cmd.flags, user_data)
    else:
        raise EINVAL(f"object {cmd.pt_id} is a {pt.type.name.lower()}: nothing to build a HWPT on")
    ucmd.new_obj = hwpt
    if cmd.flags & uapi.IOMMU_HWPT_FAULT_ID_VALID:
        hwpt.fault = hwpt.hold(ucmd.get(cmd.fault_id, Fault))
        hwpt.domain.iopf_handler = hwpt.fault.iopf_handler
    cmd.out_hwpt_id = hwpt.id
    ucmd.respond(cmd)


def _nested_alloc(ucmd: Ucmd, parent: HwptPaging, idev: IommufdDevice, flags: int, user_data: UserData) -> HwptNested:
    """iommufd_hwpt_nested_alloc(): EOPNOTSUPP, EINVAL, the driver's."""
    iommu = idev.dev.iommu
    if flags & ~NESTED_FLAGS or not user_data.len or not isinstance(iommu, NestingOps):
        raise EOPNOTSUPP("flags are not known, there is no data, or this IOMMU does not nest on a HWPT")
    if parent.auto_domain or not parent.nest_parent or parent.domain.owner.driver != iommu.driver:
        raise EINVAL(f"{parent} is not a nesting parent for this device")
    return finish_nested(
        ucmd, HwptNested(parent, None, flags), parent,
        lambda: iommu.domain_alloc_nested(
            idev.dev, parent.domain, flags & ~uapi.IOMMU_HWPT_FAULT_ID_VALID, user_data
        ),
    )  # fmt: skip


def finish_nested(
    ucmd: Ucmd, hwpt: HwptNested, holds: IommufdObject, alloc_domain: Callable[[], Domain]
) -> HwptNested:
    """Id, hold and domain of a nested HWPT, unpublished."""
    objects = ucmd.ictx.objects
    objects.alloc(hwpt, ucmd.caller.gate)
    try:
        hwpt.hold(holds)
        ucmd.caller.gate(Gate.DOMAIN)
        hwpt.domain = alloc_domain()
    except IommufdError:
        objects.abort(hwpt)
        raise
    return hwpt


# ---- invalidation ----

INVALIDATE_ENTRY_NUM_MAX = 1 << 19


def hwpt_invalidate(ucmd: Ucmd, cmd: uapi.HwptInvalidate) -> None:
    """IOMMU_HWPT_INVALIDATE: EOPNOTSUPP, EINVAL, ENOENT, the driver's; entry_num says on errors too what was done."""
    array = UserDataArray(ucmd.caller, cmd.data_type, cmd.data_uptr, cmd.entry_len, cmd.entry_num)
    cmd.entry_num = 0
    error: IommufdError | None = None
    try:
        work = _invalidate_op(ucmd, cmd, array)
        try:
            work(array)
        finally:
            cmd.entry_num = array.entry_num
    except IommufdError as failed:
        error = failed
    ucmd.respond(cmd)  # EFAULT takes the place of an earlier error
    if error is not None:
        raise error


def _invalidate_op(ucmd: Ucmd, cmd: uapi.HwptInvalidate, array: UserDataArray) -> Callable[[UserDataArray], None]:
    """The driver's function for this object, after all checks of the core."""
    if cmd.reserved:
        raise EOPNOTSUPP("reserved is not 0")
    if array.entry_num and (
        not array.uptr or not 0 < array.entry_len <= PAGE_SIZE or array.entry_num > INVALIDATE_ENTRY_NUM_MAX
    ):
        raise EINVAL("entries without a pointer or a length, or too many of them")
    pt = ucmd.get_any(cmd.hwpt_id)
    if isinstance(pt, HwptNested):
        if not isinstance(pt.domain, InvalidateDomain):
            raise EOPNOTSUPP(f"the caches of {pt} cannot be invalidated")
        return pt.domain.cache_invalidate_user
    if isinstance(pt, NestingParent):
        if not isinstance(pt.driver, InvalidateViommu):
            raise EOPNOTSUPP(f"{pt} takes no invalidations")
        return pt.driver.cache_invalidate
    raise EINVAL(f"object {cmd.hwpt_id} is a {pt.type.name.lower()}: neither nested HWPT nor vIOMMU")
