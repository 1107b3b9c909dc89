"""HWPT: a hardware page table, paging or nested (hw_pagetable.c)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import iommufd_uapi.iommufd as uapi
from iommufd_uapi.kvm import IOMMU_HWPT_DATA_KVM
from iommufd_uapi.kvm import HwptKvm as HwptKvmData

from .device import IommufdDevice
from .errors import EFAULT, EINVAL, ENOENT, EOPNOTSUPP, IommufdError
from .eventq import Fault
from .ioas import Ioas
from .iommu.group import IOMMU_PAGE_RESP_FAILURE, IOMMU_PAGE_RESP_INVALID, IOMMU_PAGE_RESP_SUCCESS
from .iommu.ops import Cap, InvalidateDomain, InvalidateViommu, KvmDomain, KvmOps, NestingOps, ViommuDriver
from .kvm.tdp_fd import TdpFile
from .objects import IommufdObject, ObjectType
from .user import PAGE_SHIFT, PAGE_SIZE, Gate
from .user_data import UserData, UserDataArray

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from .iommu.group import AttachHandle, IopfGroup
    from .iommu.ops import Cached, Domain
    from .ucmd import Ucmd
    from .user import Caller, Mm
    from .viommu import Viommu

PAGING_FLAGS = (
    uapi.IOMMU_HWPT_ALLOC_NEST_PARENT
    | uapi.IOMMU_HWPT_ALLOC_DIRTY_TRACKING
    | uapi.IOMMU_HWPT_FAULT_ID_VALID
    | uapi.IOMMU_HWPT_ALLOC_PASID
)
NESTED_FLAGS = uapi.IOMMU_HWPT_FAULT_ID_VALID | uapi.IOMMU_HWPT_ALLOC_PASID
PERMISSIONS = uapi.IOMMU_PGFAULT_PERM_READ | uapi.IOMMU_PGFAULT_PERM_WRITE | uapi.IOMMU_PGFAULT_PERM_EXEC


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


class HwptKvm(HwPagetable):
    """struct iommufd_hw_pagetable of a VM's own table (RFC p13 to p15): no IOAS, and no fault queue of the user's.

    Page requests go to KVM. It has the VM's descriptor for as long as it lives.
    """

    type = ObjectType.HWPT_KVM
    OPS = "iommufd"  # all HWPTs tell KVM the same table of functions, and KVM takes each of those once

    def __init__(self, tdp: TdpFile, mm: Mm) -> None:
        """mm: of whoever made it. Takes a reference of the file."""
        super().__init__()
        self.tdp = tdp
        self.mm = mm
        tdp.get()

    @property
    def paging(self) -> None:
        return None

    def iopf_handler(self, group: IopfGroup) -> None:
        """Ask KVM for the pages, then answer: the first that fails decides (iommufd_hw_pagetable_iopf_handler)."""
        code = IOMMU_PAGE_RESP_SUCCESS if group.handle.domain is self.domain else IOMMU_PAGE_RESP_INVALID
        for fault in group.faults if code == IOMMU_PAGE_RESP_SUCCESS else ():
            try:
                self.tdp.fault(self.mm, fault.addr >> PAGE_SHIFT, fault.perm & PERMISSIONS)
            except IommufdError:
                code = IOMMU_PAGE_RESP_FAILURE
        group.respond(code)

    # ---- as an importer of KVM's ----

    def invalidate(self, start: int, size: int) -> None:
        """KVM has changed its table."""
        self._kvm_domain.cache_invalidate(start, size)

    def cached(self) -> Iterable[Cached]:
        return self._kvm_domain.cached()

    def cached_tables(self) -> Iterable[int]:
        return self._kvm_domain.cached_tables()

    @property
    def _kvm_domain(self) -> KvmDomain:
        assert isinstance(self.domain, KvmDomain)
        return self.domain

    def destroy(self) -> None:
        """The domain first, then the importer, then the file."""
        self._free()
        self.tdp.unregister_importer(self.OPS, self)
        self.tdp.put()
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
        hwpt.domain.hwpt_id = hwpt.id
        if idev.enforce_cache_coherency:
            hwpt.enforce_cache_coherency = hwpt.domain.enforce_cache_coherency()
            if not hwpt.enforce_cache_coherency:
                raise EINVAL("the device's IOMMU says it can enforce cache coherency, and the domain cannot")
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
    if cmd.data_type == IOMMU_HWPT_DATA_KVM:
        _kvm_alloc(ucmd, cmd, idev)
        return
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
        hwpt.domain.hwpt_id = hwpt.id
    except IommufdError:
        objects.abort(hwpt)
        raise
    return hwpt


def _kvm_alloc(ucmd: Ucmd, cmd: uapi.HwptAlloc, idev: IommufdDevice) -> None:
    """iommufd_hw_pagetable_kvm_alloc() (RFC p13): EINVAL, EFAULT, EOPNOTSUPP, EBADF, ENOMEM, EBUSY, the driver's.

    pt_id and a fault queue mean nothing here; of the flags only the driver looks at what it minds.
    """
    caller, iommu = ucmd.caller, idev.dev.iommu
    if cmd.data_len != HwptKvmData.SIZEOF or not cmd.data_uptr:
        raise EINVAL(f"data of {cmd.data_len} bytes at {cmd.data_uptr:#x}, {HwptKvmData.SIZEOF} are needed")
    data = HwptKvmData.unpack(caller.copy_from_user(cmd.data_uptr, cmd.data_len))
    if not isinstance(iommu, KvmOps):
        raise EOPNOTSUPP("this IOMMU cannot walk a VM's table")
    tdp = caller.fget(_int(data.fd))
    if not isinstance(tdp, TdpFile) or tdp.vm.machine is not ucmd.ictx.machine:
        raise EOPNOTSUPP(f"fd {_int(data.fd)} is no VM's table on this machine")
    metadata = tdp.get_metadata()
    if metadata is None:
        raise EFAULT("KVM has nothing to say about its table")
    hwpt = HwptKvm(tdp, caller.mm)
    try:
        ucmd.alloc(hwpt)
    except IommufdError:
        tdp.put()
        raise
    caller.gate(Gate.DOMAIN)
    hwpt.domain = iommu.domain_alloc_kvm(idev.dev, cmd.flags, metadata, ucmd.ictx.machine.memory)
    hwpt.domain.hwpt_id = hwpt.id
    hwpt.domain.iopf_handler = hwpt.iopf_handler
    tdp.register_importer(caller, HwptKvm.OPS, hwpt)
    cmd.out_hwpt_id = hwpt.id
    ucmd.respond(cmd)


def _int(number: int) -> int:
    """A number as C's int has it."""
    low = number & 0xFFFF_FFFF
    return low - (1 << 32) if low >> 31 else low


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
