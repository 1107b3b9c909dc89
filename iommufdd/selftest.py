"""The selftest command: mock devices, accesses and checks behind ioctl 0xa0 (selftest.c, iommufd_test.h).

Each operation has a structure of its own inside struct iommu_test_cmd; a handler gets it unpacked and answers by
naming the fields that change, so the caller's other bytes come back as they were.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import iommufd_uapi.iommufd_test as uapi
from iommufd_uapi.iommufd import IOMMU_PGFAULT_FLAGS_LAST_PAGE, IOMMU_PGFAULT_FLAGS_PASID_VALID

from . import selftest_access
from .attach import attach, detach, replace
from .device import IommufdDevice, bind, unbind
from .dmabuf import Dmabuf
from .errors import EBADF, EFAULT, EINVAL, EOPNOTSUPP, EOVERFLOW
from .hw_pagetable import HwPagetable, HwptNested
from .ioas import Ioas
from .iommu.group import Fault
from .iommu.ops import IOMMU_NO_PASID, Device
from .iommu.selftest_ops import SelftestDevice, SelftestDirty, SelftestNested
from .objects import IommufdObject, ObjectType
from .selftest_access import SZ_16M, answer
from .selftest_checks import check_map, check_refs, paging
from .user import PAGE_MASK, PAGE_SIZE, ULONG_MAX, Gate

if TYPE_CHECKING:
    from collections.abc import Callable

    from iommufd_uapi.layout import Layout

    from .context import Context
    from .ucmd import Ucmd

NOT_ZERO = re.compile(rb"[^\0]")
T = TypeVar("T", bound="Layout")


class SelftestObj(IommufdObject):
    """struct selftest_obj: a mock device that is bound and attached; destroying it undoes both."""

    type = ObjectType.SELFTEST

    def __init__(self, ictx: Context) -> None:
        super().__init__()
        self.ictx = ictx
        self.mock_dev: Device | None = None
        self.idev: IommufdDevice | None = None

    def destroy(self) -> None:
        if self.idev is not None:
            for pasid in list(self.idev.igroup.pasid_attach):
                detach(self.idev, pasid)  # the kernel leaves PASIDs attached, warns, and uses freed memory
            unbind(self.idev, self)
        if self.mock_dev is not None:
            self.ictx.machine.mock.forget_device(self.mock_dev)
        super().destroy()


# ---- mock devices ----


def _mock_domain(ucmd: Ucmd, cmd: uapi.TestCmd, op: uapi.MockDomain) -> None:
    """IOMMU_TEST_OP_MOCK_DOMAIN: ids in the order stdev, idev, automatic HWPT."""
    _new_mock(ucmd, cmd, uapi.MockDomain, 0)


def _mock_domain_flags(ucmd: Ucmd, cmd: uapi.TestCmd, op: uapi.MockDomainFlags) -> None:
    """IOMMU_TEST_OP_MOCK_DOMAIN_FLAGS: EINVAL for unknown flags."""
    _new_mock(ucmd, cmd, uapi.MockDomainFlags, op.dev_flags)


def _new_mock(ucmd: Ucmd, cmd: uapi.TestCmd, layout: type[Layout], flags: int) -> None:
    sobj = ucmd.alloc(SelftestObj(ucmd.ictx))
    ucmd.caller.gate(Gate.MEMORY)
    sobj.mock_dev = ucmd.ictx.machine.mock.new_device(flags)
    sobj.idev = bind(ucmd.ictx, ucmd.caller, sobj.mock_dev, sobj)
    hwpt_id = attach(ucmd.caller, sobj.idev, IOMMU_NO_PASID, cmd.id)
    answer(ucmd, layout, out_hwpt_id=hwpt_id, out_stdev_id=sobj.id, out_idev_id=sobj.idev.id)


def _mock_domain_replace(ucmd: Ucmd, cmd: uapi.TestCmd, op: uapi.MockDomainReplace) -> None:
    pt_id = replace(ucmd.caller, _idev(ucmd, cmd), IOMMU_NO_PASID, op.pt_id)
    answer(ucmd, uapi.MockDomainReplace, pt_id=pt_id)


def _idev(ucmd: Ucmd, cmd: uapi.TestCmd) -> IommufdDevice:
    sobj = ucmd.get(cmd.id, SelftestObj)
    assert sobj.idev is not None
    return sobj.idev


def _pasid_attach(ucmd: Ucmd, cmd: uapi.TestCmd, op: uapi.PasidAttach) -> None:
    idev = _idev(ucmd, cmd)
    pt_id = attach(ucmd.caller, idev, op.pasid, op.pt_id)
    try:
        answer(ucmd, uapi.PasidAttach, pt_id=pt_id)
    except EFAULT:
        detach(idev, op.pasid)
        raise


def _pasid_replace(ucmd: Ucmd, cmd: uapi.TestCmd, op: uapi.PasidReplace) -> None:
    answer(ucmd, uapi.PasidReplace, pt_id=replace(ucmd.caller, _idev(ucmd, cmd), op.pasid, op.pt_id))


def _pasid_detach(ucmd: Ucmd, cmd: uapi.TestCmd, op: uapi.PasidDetach) -> None:
    detach(_idev(ucmd, cmd), op.pasid)


def _pasid_check_hwpt(ucmd: Ucmd, cmd: uapi.TestCmd, op: uapi.PasidCheck) -> None:
    handle = _idev(ucmd, cmd).dev.group.handles.get(op.pasid)
    if not op.hwpt_id:
        if handle is not None:
            raise EINVAL(f"PASID {op.pasid} is attached")
        return
    hwpt = ucmd.get_any(op.hwpt_id)
    if not isinstance(hwpt, HwPagetable):
        raise EINVAL(f"object {op.hwpt_id} is no HWPT")
    if handle is None or handle.domain is not hwpt.domain:
        raise EINVAL(f"PASID {op.pasid} is not attached to {hwpt}")


def _add_reserved(ucmd: Ucmd, cmd: uapi.TestCmd, op: uapi.AddReserved) -> None:
    if not op.length:
        raise EINVAL("length is 0")
    if op.start + op.length - 1 > ULONG_MAX:
        raise EOVERFLOW("start + length wraps")
    ioas = ucmd.get(cmd.id, Ioas)
    ioas.iopt.reserve(ucmd.caller, op.start, op.start + op.length - 1, None)


# ---- dirty pages, caches, faults and events of the mock ----


def _dirty(ucmd: Ucmd, cmd: uapi.TestCmd, op: uapi.Dirty) -> None:
    """Mark what a bitmap names as written: EINVAL, EOVERFLOW, ENOENT, ENOMEM, EFAULT."""
    if not op.page_size or not op.length or op.iova % op.page_size or op.length % op.page_size or not op.uptr:
        raise EINVAL("a length, address or page size that is 0 or not aligned")
    nbits = op.length // op.page_size
    if nbits > SZ_16M * 8:
        raise EOVERFLOW("a bitmap of more than 16 MiB")
    dirty = paging(ucmd, cmd.id).domain.dirty_ops
    if not isinstance(dirty, SelftestDirty) or not dirty.tracking:
        raise EINVAL("dirty tracking is off")
    ucmd.caller.gate(Gate.MEMORY)
    bitmap = bytearray(ucmd.caller.copy_from_user(op.uptr, (nbits + 7) // 8))
    if nbits % 8:
        bitmap[-1] &= (1 << nbits % 8) - 1
    count = 0
    for found in NOT_ZERO.finditer(bitmap):
        at = found.start()
        for bit in range(8 * at, 8 * at + 8):
            if bitmap[at] >> bit % 8 & 1:
                dirty.set_dirty(op.iova + bit * op.page_size & ULONG_MAX)
                count += 1
    answer(ucmd, uapi.Dirty, out_nr_dirty=count)


def _check_iotlb(ucmd: Ucmd, cmd: uapi.TestCmd, op: uapi.CheckIotlb) -> None:
    domain = ucmd.get(cmd.id, HwptNested).domain
    if not isinstance(domain, SelftestNested):
        raise EINVAL("not a nested HWPT of the mock")
    if op.id >= len(domain.iotlb) or domain.iotlb[op.id] != op.iotlb:
        raise EINVAL(f"IOTLB entry {op.id} is not {op.iotlb:#x}")


def _mock_dev(ucmd: Ucmd, dev_id: int) -> SelftestDevice:
    dev = ucmd.get(dev_id, IommufdDevice).dev
    if not isinstance(dev, SelftestDevice):
        raise EINVAL(f"device {dev_id} is not a mock")
    return dev


def _check_dev_cache(ucmd: Ucmd, cmd: uapi.TestCmd, op: uapi.CheckDevCache) -> None:
    cache = _mock_dev(ucmd, cmd.id).cache
    if op.id >= len(cache) or cache[op.id] != op.cache:
        raise EINVAL(f"device cache entry {op.id} is not {op.cache:#x}")


def _trigger_iopf(ucmd: Ucmd, cmd: uapi.TestCmd, op: uapi.TriggerIopf) -> None:
    """A page request of one record. quirk: 0 whether anybody handles it or not."""
    dev = _mock_dev(ucmd, op.dev_id)
    flags = IOMMU_PGFAULT_FLAGS_LAST_PAGE
    if op.pasid != IOMMU_NO_PASID:
        flags |= IOMMU_PGFAULT_FLAGS_PASID_VALID
    fault = Fault(flags, op.pasid, op.grpid, op.perm, op.addr)
    try:
        dev.iopf.report(fault, pasid_valid=op.pasid != IOMMU_NO_PASID, last=True)
    except EINVAL:
        pass


def _trigger_vevent(ucmd: Ucmd, cmd: uapi.TestCmd, op: uapi.TriggerVevent) -> None:
    _mock_dev(ucmd, op.dev_id).trigger_vevent()


# ---- the rest ----


class TestDmabuf(Dmabuf):
    """struct iommufd_test_dma_buf: zeros, up to 2 MiB, in one piece (kzalloc)."""

    __test__ = False  # pytest: not a test
    compound = True

    def pread(self, pos: int, length: int) -> bytes:
        return bytes(max(min(length, self.size() - pos), 0))

    def pwrite(self, pos: int, data: bytes) -> int:
        return len(data)


def _set_temp_memory_limit(ucmd: Ucmd, cmd: uapi.TestCmd, op: uapi.MemoryLimit) -> None:
    if op.limit < 12:
        raise EINVAL("a batch needs 12 bytes")
    ucmd.ictx.machine.temp_memory_limit = op.limit


def _dmabuf_get(ucmd: Ucmd, cmd: uapi.TestCmd, op: uapi.DmabufGet) -> int:
    """A dma-buf as a new descriptor: EINVAL, ENOMEM, EMFILE."""
    length = op.length + PAGE_SIZE - 1 & PAGE_MASK & ULONG_MAX
    if not 0 < length <= PAGE_SIZE * 512:
        raise EINVAL(f"a dma-buf of {op.length:#x} bytes cannot be made")
    ucmd.caller.gate(Gate.MEMORY)
    fd = ucmd.caller.get_unused_fd()
    ucmd.caller.files.fd_install(fd, TestDmabuf(length))
    return fd


def _dmabuf_revoke(ucmd: Ucmd, cmd: uapi.TestCmd, op: uapi.DmabufRevoke) -> None:
    file = ucmd.caller.files.fget(op.dmabuf_fd)
    if file is None:
        raise EBADF(f"fd {op.dmabuf_fd} is not open")
    if not isinstance(file, Dmabuf):
        raise EINVAL(f"fd {op.dmabuf_fd} is no dma-buf")
    file.set_revoked(bool(op.revoked))


class Op(Generic[T]):
    """One row: the structure in the union, and what it does."""

    __slots__ = ("execute", "layout")

    def __init__(self, layout: type[T], execute: Callable[[Ucmd, uapi.TestCmd, T], int | None]) -> None:
        self.layout = layout
        self.execute = execute


OPS: dict[int, Op[Any]] = {
    uapi.IOMMU_TEST_OP_ADD_RESERVED: Op(uapi.AddReserved, _add_reserved),
    uapi.IOMMU_TEST_OP_MOCK_DOMAIN: Op(uapi.MockDomain, _mock_domain),
    uapi.IOMMU_TEST_OP_MD_CHECK_MAP: Op(uapi.CheckMap, check_map),
    uapi.IOMMU_TEST_OP_MD_CHECK_REFS: Op(uapi.CheckRefs, check_refs),
    uapi.IOMMU_TEST_OP_CREATE_ACCESS: Op(uapi.CreateAccess, selftest_access.create_access),
    uapi.IOMMU_TEST_OP_DESTROY_ACCESS_PAGES: Op(uapi.DestroyAccessPages, selftest_access.destroy_access_pages),
    uapi.IOMMU_TEST_OP_ACCESS_PAGES: Op(uapi.AccessPages, selftest_access.access_pages),
    uapi.IOMMU_TEST_OP_ACCESS_RW: Op(uapi.AccessRw, selftest_access.access_rw),
    uapi.IOMMU_TEST_OP_SET_TEMP_MEMORY_LIMIT: Op(uapi.MemoryLimit, _set_temp_memory_limit),
    uapi.IOMMU_TEST_OP_MOCK_DOMAIN_REPLACE: Op(uapi.MockDomainReplace, _mock_domain_replace),
    uapi.IOMMU_TEST_OP_ACCESS_REPLACE_IOAS: Op(uapi.AccessReplaceIoas, selftest_access.access_replace_ioas),
    uapi.IOMMU_TEST_OP_MOCK_DOMAIN_FLAGS: Op(uapi.MockDomainFlags, _mock_domain_flags),
    uapi.IOMMU_TEST_OP_DIRTY: Op(uapi.Dirty, _dirty),
    uapi.IOMMU_TEST_OP_MD_CHECK_IOTLB: Op(uapi.CheckIotlb, _check_iotlb),
    uapi.IOMMU_TEST_OP_TRIGGER_IOPF: Op(uapi.TriggerIopf, _trigger_iopf),
    uapi.IOMMU_TEST_OP_DEV_CHECK_CACHE: Op(uapi.CheckDevCache, _check_dev_cache),
    uapi.IOMMU_TEST_OP_TRIGGER_VEVENT: Op(uapi.TriggerVevent, _trigger_vevent),
    uapi.IOMMU_TEST_OP_PASID_ATTACH: Op(uapi.PasidAttach, _pasid_attach),
    uapi.IOMMU_TEST_OP_PASID_REPLACE: Op(uapi.PasidReplace, _pasid_replace),
    uapi.IOMMU_TEST_OP_PASID_DETACH: Op(uapi.PasidDetach, _pasid_detach),
    uapi.IOMMU_TEST_OP_PASID_CHECK_HWPT: Op(uapi.PasidCheck, _pasid_check_hwpt),
    uapi.IOMMU_TEST_OP_DMABUF_GET: Op(uapi.DmabufGet, _dmabuf_get),
    uapi.IOMMU_TEST_OP_DMABUF_REVOKE: Op(uapi.DmabufRevoke, _dmabuf_revoke),
}


def test(ucmd: Ucmd, cmd: uapi.TestCmd) -> int | None:
    """IOMMU_TEST_CMD: EOPNOTSUPP for an unknown operation (iommufd_test)."""
    op = OPS.get(cmd.op)
    if op is None:
        raise EOPNOTSUPP(f"test operation {cmd.op} is not known")
    return op.execute(ucmd, cmd, op.layout.unpack(cmd.u))


test.__test__ = False  # type: ignore[attr-defined]  # pytest: not a test
