"""What each (device, PASID) is attached to: attach, replace, detach (device.c, the middle).

A slot belongs to (group, PASID): the first device of a group switches the hardware, later ones only join.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from .errors import EBUSY, EINVAL, ENOENT, IommufdError
from .hw_pagetable import HwPagetable, HwptPaging, paging_alloc
from .ioas import Ioas
from .iommu.group import AttachHandle
from .iommu.ops import IOMMU_NO_PASID
from .objects import Holder
from .user import Caller, Gate

if TYPE_CHECKING:
    from .device import IommufdDevice, IommufdGroup


class Attach:
    """struct iommufd_attach: the HWPT of one (group, PASID), and the devices that asked for it."""

    def __init__(self, hwpt: HwPagetable) -> None:
        self.hwpt = hwpt
        self.devices: dict[int, Attachment] = {}


class Attachment(Holder):
    """One device's part in an Attach: it holds the HWPT and keeps the device from going."""

    def __init__(self, idev: IommufdDevice, pasid: int) -> None:
        super().__init__()
        self.idev = idev
        self.pasid = pasid

    def __str__(self) -> str:
        return f"the attachment of {self.idev}" + (f" pasid {self.pasid}" if self.pasid else "")


class AttachFn(Protocol):
    """iommufd_device_do_attach or iommufd_device_do_replace: the HWPT left behind, if any."""

    def __call__(self, caller: Caller, idev: IommufdDevice, pasid: int, hwpt: HwPagetable) -> HwPagetable | None: ...


def attach(caller: Caller, idev: IommufdDevice, pasid: int, pt_id: int) -> int:
    """Connect a (device, PASID) to a HWPT or an IOAS; the HWPT's id (iommufd_device_attach).

    ENOENT, EINVAL, EBUSY, EADDRINUSE, ENOMEM, EFAULT, the driver's.
    """
    return _change_pt(caller, idev, pasid, pt_id, _do_attach)


def replace(caller: Caller, idev: IommufdDevice, pasid: int, pt_id: int) -> int:
    """Connect to another one without blocking in between; nothing changes on failure (iommufd_device_replace)."""
    return _change_pt(caller, idev, pasid, pt_id, _do_replace)


def detach(idev: IommufdDevice, pasid: int) -> None:
    """Back to blocked DMA; nothing when it is not attached (iommufd_device_detach)."""
    igroup = idev.igroup
    attach_ = igroup.pasid_attach.get(pasid)
    if attach_ is None or idev.id not in attach_.devices:
        return
    hwpt = attach_.hwpt
    part = attach_.devices.pop(idev.id)
    if not attach_.devices:
        _detach_hw(idev, pasid, hwpt)
        del igroup.pasid_attach[pasid]
    paging = hwpt.paging
    if paging is not None and pasid == IOMMU_NO_PASID:
        paging.ioas.iopt.remove_reserved(idev.dev)
    part.let_go_all()
    hwpt.put()


def _change_pt(caller: Caller, idev: IommufdDevice, pasid: int, pt_id: int, do_attach: AttachFn) -> int:
    """iommufd_device_change_pt()"""
    caller.gate(Gate.LOOKUP)
    pt = idev.ictx.objects.get(pt_id)
    if pt is None:
        raise ENOENT(f"there is no object {pt_id}")
    if isinstance(pt, HwPagetable):
        left = do_attach(caller, idev, pasid, pt)
    elif isinstance(pt, Ioas):
        left, pt_id = _auto_get_domain(caller, idev, pasid, pt, do_attach)
    else:
        raise EINVAL(f"object {pt_id} is a {pt.type.name.lower()}: neither a HWPT nor an IOAS")
    if left is not None:
        left.put()
    return pt_id


def _auto_get_domain(
    caller: Caller, idev: IommufdDevice, pasid: int, ioas: Ioas, do_attach: AttachFn
) -> tuple[HwPagetable | None, int]:
    """An automatic HWPT of the IOAS that fits the device, or a new one (iommufd_device_auto_get_domain)."""
    for hwpt in list(ioas.hwpt_list):
        if not hwpt.auto_domain:
            continue
        try:
            return do_attach(caller, idev, pasid, hwpt), hwpt.id
        except EINVAL:
            continue  # this domain and this device do not fit
    immediate = do_attach is _do_attach
    # With attach the device comes first and the pages after it, with replace the other way round.
    before_fill = (lambda hwpt: _do_attach(caller, idev, pasid, hwpt)) if immediate else None
    undo = (lambda: detach(idev, pasid)) if immediate else None
    hwpt = paging_alloc(caller, ioas, idev, 0, None, before_fill=before_fill, undo=undo)
    left = None
    try:
        if not immediate:
            left = do_attach(caller, idev, pasid, hwpt)
    except IommufdError:
        idev.ictx.objects.abort(hwpt)
        raise
    hwpt.auto_domain = True
    idev.ictx.objects.finalize(hwpt)
    return left, hwpt.id


def _do_attach(caller: Caller, idev: IommufdDevice, pasid: int, hwpt: HwPagetable) -> HwPagetable | None:
    """iommufd_hw_pagetable_attach()"""
    igroup = idev.igroup
    caller.gate(Gate.MEMORY)
    attach_ = igroup.pasid_attach.get(pasid)
    if attach_ is not None:
        if idev.id in attach_.devices:
            raise EBUSY(f"{idev} pasid {pasid} is attached already; replace it")
        if attach_.hwpt is not hwpt:
            raise EINVAL(f"the group of {idev} is attached to {attach_.hwpt}")
    paging = hwpt.paging if pasid == IOMMU_NO_PASID else None
    if paging is not None:
        paging.ioas.iopt.enforce_dev_resv_regions(caller, idev.dev)
    try:
        if attach_ is None:
            _attach_hw(caller, idev, pasid, hwpt)
    except IommufdError:
        if paging is not None:
            paging.ioas.iopt.remove_reserved(idev.dev)
        raise
    if attach_ is None:
        attach_ = igroup.pasid_attach[pasid] = Attach(hwpt)
    part = attach_.devices[idev.id] = Attachment(idev, pasid)
    part.hold(hwpt)
    part.hold(idev)
    return None


def _attach_hw(caller: Caller, idev: IommufdDevice, pasid: int, hwpt: HwPagetable) -> None:
    """iommufd_hwpt_attach_device(): once for the whole group."""
    _pasid_compat(idev.igroup, pasid, hwpt)
    caller.gate(Gate.ATTACH)
    handle = AttachHandle(hwpt.domain, idev)
    if pasid == IOMMU_NO_PASID:
        idev.dev.group.attach_handle(handle)
    else:
        idev.dev.group.attach_pasid(idev.dev, pasid, handle)


def _detach_hw(idev: IommufdDevice, pasid: int, hwpt: HwPagetable) -> None:
    """iommufd_hwpt_detach_device(): faults still pending are answered INVALID."""
    group = idev.dev.group
    handle = group.handles.get(pasid)
    if pasid == IOMMU_NO_PASID:
        group.detach_handle()
    else:
        group.detach_pasid(pasid)
    hwpt.auto_response_faults(handle)


def _pasid_compat(igroup: IommufdGroup, pasid: int, hwpt: HwPagetable) -> None:
    """iommufd_hwpt_pasid_compat(): EINVAL unless RID and PASIDs all use HWPTs made for PASIDs."""
    if pasid == IOMMU_NO_PASID:
        if not hwpt.pasid_compat and any(other != IOMMU_NO_PASID for other in igroup.pasid_attach):
            raise EINVAL("PASIDs are attached, and the HWPT lacks IOMMU_HWPT_ALLOC_PASID")
        return
    if not hwpt.pasid_compat:
        raise EINVAL("the HWPT lacks IOMMU_HWPT_ALLOC_PASID")
    rid = igroup.pasid_attach.get(IOMMU_NO_PASID)
    if rid is not None and not rid.hwpt.pasid_compat:
        raise EINVAL("the device's own HWPT lacks IOMMU_HWPT_ALLOC_PASID")


def _do_replace(caller: Caller, idev: IommufdDevice, pasid: int, hwpt: HwPagetable) -> HwPagetable | None:
    """iommufd_device_do_replace(): the old HWPT, for the caller to put."""
    igroup = idev.igroup
    attach_ = igroup.pasid_attach.get(pasid)
    if attach_ is None or idev.id not in attach_.devices:
        raise EINVAL(f"{idev} pasid {pasid} is not attached")
    old = attach_.hwpt
    if hwpt is old:
        return None
    paging = hwpt.paging if pasid == IOMMU_NO_PASID else None
    old_paging = old.paging if pasid == IOMMU_NO_PASID else None
    try:
        if paging is not None and (old_paging is None or paging.ioas is not old_paging.ioas):
            for part in attach_.devices.values():
                paging.ioas.iopt.enforce_dev_resv_regions(caller, part.idev.dev)
        _replace_hw(caller, idev, pasid, hwpt, old)
    except IommufdError:
        # quirk: also when the IOAS stays the same, so its reservations are lost (device.c:err_unresv)
        if paging is not None:
            _remove_reserved(attach_, paging)
        raise
    if old_paging is not None and (paging is None or paging.ioas is not old_paging.ioas):
        _remove_reserved(attach_, old_paging)
    attach_.hwpt = hwpt
    for part in attach_.devices.values():
        part.hold(hwpt)
        part.let_go(old)
    return old


def _remove_reserved(attach_: Attach, paging: HwptPaging) -> None:
    for part in attach_.devices.values():
        paging.ioas.iopt.remove_reserved(part.idev.dev)


def _replace_hw(caller: Caller, idev: IommufdDevice, pasid: int, hwpt: HwPagetable, old: HwPagetable) -> None:
    """iommufd_hwpt_replace_device()"""
    _pasid_compat(idev.igroup, pasid, hwpt)
    group = idev.dev.group
    old_handle = group.handles.get(pasid)
    caller.gate(Gate.ATTACH)
    handle = AttachHandle(hwpt.domain, idev)
    if pasid == IOMMU_NO_PASID:
        group.replace_handle(handle)
    else:
        group.replace_pasid(idev.dev, pasid, handle)
    old.auto_response_faults(old_handle)
