"""The selftest command: mock devices, accesses and checks behind ioctl 0xa0 (selftest.c, iommufd_test.h).

Each operation has a structure of its own inside struct iommu_test_cmd; a handler gets it unpacked and answers by
naming the fields that change, so the caller's other bytes come back as they were.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, TypeVar

import iommufd_uapi.iommufd_test as uapi
from iommufd_uapi.iommufd import IOMMU_PGFAULT_FLAGS_LAST_PAGE, IOMMU_PGFAULT_FLAGS_PASID_VALID

from .access_file import SelftestAccess, TestDmabuf
from .attach import attach, detach, replace
from .device import IommufdDevice, bind, unbind
from .errors import EBADE, EBADF, EFAULT, EINVAL, EIO, ENOMEM, EOPNOTSUPP, EOVERFLOW, IommufdError
from .hw_pagetable import HwPagetable, HwptNested, HwptPaging
from .ioas import Ioas, syz_iova
from .iommu.group import Fault
from .iommu.ops import IOMMU_NO_PASID, Device
from .iommu.selftest_ops import SelftestDevice, SelftestDirty, SelftestNested
from .objects import IommufdObject, ObjectType
from .pages import Dmabuf
from .user import PAGE_MASK, PAGE_SHIFT, PAGE_SIZE, ULONG_MAX, Caller, Gate, PageRun

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from iommufd_uapi.layout import Layout

    from .context import Context
    from .ucmd import Ucmd

T = TypeVar("T", bound="Layout")
SZ_16M = 16 << 20
UNION = uapi.TestCmd.offsetof("u")


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


def _answer(ucmd: Ucmd, layout: type[Layout], **fields: int) -> None:
    """Copy the whole command back with some fields of its union changed."""
    data = bytearray(ucmd.data)
    for name, value in fields.items():
        at = UNION + layout.offsetof(name)
        size = layout.sizeof(name)
        data[at : at + size] = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
    ucmd.caller.copy_to_user(ucmd.uptr, bytes(data[: ucmd.user_size]))


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
    _answer(ucmd, layout, out_hwpt_id=hwpt_id, out_stdev_id=sobj.id, out_idev_id=sobj.idev.id)


def _mock_domain_replace(ucmd: Ucmd, cmd: uapi.TestCmd, op: uapi.MockDomainReplace) -> None:
    pt_id = replace(ucmd.caller, _idev(ucmd, cmd), IOMMU_NO_PASID, op.pt_id)
    _answer(ucmd, uapi.MockDomainReplace, pt_id=pt_id)


def _idev(ucmd: Ucmd, cmd: uapi.TestCmd) -> IommufdDevice:
    sobj = ucmd.get(cmd.id, SelftestObj)
    assert sobj.idev is not None
    return sobj.idev


def _pasid_attach(ucmd: Ucmd, cmd: uapi.TestCmd, op: uapi.PasidAttach) -> None:
    idev = _idev(ucmd, cmd)
    pt_id = attach(ucmd.caller, idev, op.pasid, op.pt_id)
    try:
        _answer(ucmd, uapi.PasidAttach, pt_id=pt_id)
    except EFAULT:
        detach(idev, op.pasid)
        raise


def _pasid_replace(ucmd: Ucmd, cmd: uapi.TestCmd, op: uapi.PasidReplace) -> None:
    _answer(ucmd, uapi.PasidReplace, pt_id=replace(ucmd.caller, _idev(ucmd, cmd), op.pasid, op.pt_id))


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


# ---- checks of identity and pins ----


def _paging(ucmd: Ucmd, hwpt_id: int) -> HwptPaging:
    """get_md_pagetable(): ENOENT, EINVAL."""
    hwpt = ucmd.get(hwpt_id, HwptPaging)
    if hwpt.domain.owner is not ucmd.ictx.machine.mock:
        raise EINVAL(f"{hwpt} is not the mock's")
    return hwpt


def _check_map(ucmd: Ucmd, cmd: uapi.TestCmd, op: uapi.CheckMap) -> None:
    """Whether the pages behind IOVA are those behind an address of the caller: EINVAL, EFAULT."""
    hwpt = _paging(ucmd, cmd.id)
    page_size = hwpt.domain.pgsize_bitmap & -hwpt.domain.pgsize_bitmap
    if (op.iova | op.length | op.uptr) % page_size or op.uptr + op.length > ULONG_MAX:
        raise EINVAL(f"not aligned to {page_size:#x}")
    offset = op.uptr % PAGE_SIZE
    npages = (op.length + offset + PAGE_SIZE - 1) >> PAGE_SHIFT
    runs = ucmd.caller.get_user_pages(op.uptr, npages)
    good = min((sum(run.npages for run in runs) << PAGE_SHIFT) - offset, op.length)
    ours = _bytes_of(runs, offset, good)
    theirs = _domain_bytes(hwpt, op.iova, good)
    _compare(ours, theirs)
    if good < op.length:
        raise EFAULT(f"no page behind address {op.uptr + max(good, 0):#x}")


def _bytes_of(runs: Iterable[PageRun], offset: int, length: int) -> Iterator[tuple[object, int, int]]:
    """(file, byte, bytes) for `length` bytes of runs."""
    for run in runs:
        size = min((run.npages << PAGE_SHIFT) - offset, length)
        if size <= 0:
            return
        yield run.file, (run.page << PAGE_SHIFT) + offset, size
        length -= size
        offset = 0


def _domain_bytes(hwpt: HwptPaging, iova: int, length: int) -> Iterator[tuple[object, int, int]]:
    """(file, byte, bytes) of what the domain maps; file None where it maps nothing."""
    iopt = hwpt.ioas.iopt
    while length > 0:
        area = iopt.areas.first(iova, iova + length - 1)
        if area is None or area.iova > iova or not area.filled:
            yield None, 0, length
            return
        size = min(area.last - iova + 1, length)
        first, last = area.index(iova), area.index(iova + size - 1)
        yield from _bytes_of(area.pages.runs(first, last), area.byte(iova) % PAGE_SIZE, size)
        iova += size
        length -= size


def _compare(ours: Iterator[tuple[object, int, int]], theirs: Iterator[tuple[object, int, int]]) -> None:
    """EINVAL at the first byte where two stretches differ."""
    file, at, size = None, 0, 0
    for our_file, our_at, our_size in ours:
        while our_size:
            if not size:
                file, at, size = next(theirs, (None, 0, our_size))
            if file is not our_file or at != our_at:
                raise EINVAL("the domain maps another page there")
            part = min(size, our_size)
            our_at, our_size, at, size = our_at + part, our_size - part, at + part, size - part


def _check_refs(ucmd: Ucmd, cmd: uapi.TestCmd, op: uapi.CheckRefs) -> None:
    """Whether every page of a range is pinned exactly `refs` times: EINVAL, EFAULT, EIO."""
    if (op.length | op.uptr) % PAGE_SIZE or op.uptr + op.length > ULONG_MAX:
        raise EINVAL("not page aligned")
    npages = op.length >> PAGE_SHIFT
    runs = ucmd.caller.get_user_pages(op.uptr, npages)
    for run in runs:
        for first, last, count in run.file.pins.counts(run.page, run.page + run.npages - 1):
            if count != op.refs and not run.file.compound:
                raise EIO(f"pages {first}..{last} of the file are pinned {count} times, not {op.refs}")
    if sum(run.npages for run in runs) < npages:
        raise EFAULT(f"not all of {op.uptr:#x}+{op.length:#x} is mapped")


# ---- accesses ----


def _create_access(ucmd: Ucmd, cmd: uapi.TestCmd, op: uapi.CreateAccess) -> None:
    """A file whose holder reads and pins through the IOAS: EOPNOTSUPP, ENOMEM, ENOENT, EADDRINUSE."""
    if op.flags & ~uapi.MOCK_FLAGS_ACCESS_CREATE_NEEDS_PIN_PAGES:
        raise EOPNOTSUPP(f"flags {op.flags:#x} are not known")
    caller = ucmd.caller
    try:
        fd = caller.get_unused_fd()
    except IommufdError as error:
        raise ENOMEM(error.reason) from None  # quirk: whatever the descriptor table said
    pins = bool(op.flags & uapi.MOCK_FLAGS_ACCESS_CREATE_NEEDS_PIN_PAGES)
    staccess: SelftestAccess | None = None
    try:
        staccess = SelftestAccess(ucmd.ictx, caller, pins=pins)
        staccess.access.change_ioas(caller, ucmd.get(cmd.id, Ioas))
        _answer(ucmd, uapi.CreateAccess, out_access_fd=fd)
    except IommufdError:
        caller.files.put_unused_fd(fd)
        if staccess is not None:
            staccess.put()
        raise
    caller.files.fd_install(fd, staccess)


def _access(ucmd: Ucmd, cmd: uapi.TestCmd) -> SelftestAccess:
    """iommufd_access_get(): EBADFD for anything else."""
    return SelftestAccess.from_fd(ucmd.caller, cmd.id)


def _access_replace_ioas(ucmd: Ucmd, cmd: uapi.TestCmd, op: uapi.AccessReplaceIoas) -> None:
    staccess = _access(ucmd, cmd)
    ictx = staccess.ictx
    ucmd.caller.gate(Gate.LOOKUP)
    ioas = ictx.objects.get(op.ioas_id)
    staccess.replace(ucmd.caller, ioas if isinstance(ioas, Ioas) else None, op.ioas_id)


def _access_pages(ucmd: Ucmd, cmd: uapi.TestCmd, op: uapi.AccessPages) -> None:
    """Pin pages and compare them with the caller's: ENOMEM, EOPNOTSUPP, EBADFD, EBADE, and what pinning raises."""
    if op.length > SZ_16M:
        raise ENOMEM("more than 16 MiB")
    if op.flags & ~(uapi.MOCK_FLAGS_ACCESS_WRITE | uapi.MOCK_FLAGS_ACCESS_SYZ):
        raise EOPNOTSUPP(f"flags {op.flags:#x} are not known")
    staccess = _access(ucmd, cmd)
    if not staccess.pins:
        raise EOPNOTSUPP("the access was not made to pin pages")
    iova = _syz(staccess, op.iova) if op.flags & uapi.MOCK_FLAGS_ACCESS_SYZ else op.iova
    ucmd.caller.gate(Gate.MEMORY)
    write = bool(op.flags & uapi.MOCK_FLAGS_ACCESS_WRITE)
    runs = staccess.access.pin_pages(ucmd.caller, iova, op.length, write=write)
    try:
        if op.uptr:
            _check_pages(ucmd.caller, op.uptr - iova % PAGE_SIZE, runs)
        ucmd.caller.gate(Gate.MEMORY)
        item = staccess.next_id
        staccess.next_id += 1
        _answer(ucmd, uapi.AccessPages, out_access_pages_id=item)
    except IommufdError:
        staccess.access.unpin_pages(iova, op.length)
        raise
    staccess.items[item] = (iova, op.length)


def _check_pages(caller: Caller, uptr: int, runs: list[PageRun]) -> None:
    """iommufd_test_check_pages(): EBADE at the first page that is another one, EFAULT where there is none."""
    npages = sum(run.npages for run in runs)
    theirs = caller.get_user_pages(uptr, npages)
    good = sum(run.npages for run in theirs)
    try:
        _compare(_bytes_of(theirs, 0, good << PAGE_SHIFT), _bytes_of(runs, 0, good << PAGE_SHIFT))
    except EINVAL:
        raise EBADE("the access pinned other pages") from None
    if good < npages:
        raise EFAULT(f"no page behind address {(uptr & PAGE_MASK) + (good << PAGE_SHIFT):#x}")


def _destroy_access_pages(ucmd: Ucmd, cmd: uapi.TestCmd, op: uapi.DestroyAccessPages) -> None:
    _access(ucmd, cmd).unpin_item(op.access_pages_id)


def _access_rw(ucmd: Ucmd, cmd: uapi.TestCmd, op: uapi.AccessRw) -> None:
    """Copy between IOVA and the caller: ENOMEM, EOPNOTSUPP, EBADFD, EFAULT, and what Access.rw() raises."""
    if op.length > SZ_16M:
        raise ENOMEM("more than 16 MiB")
    if op.flags & ~(uapi.MOCK_ACCESS_RW_WRITE | uapi.MOCK_ACCESS_RW_SLOW_PATH | uapi.MOCK_FLAGS_ACCESS_SYZ):
        raise EOPNOTSUPP(f"flags {op.flags:#x} are not known")
    staccess = _access(ucmd, cmd)
    caller = ucmd.caller
    caller.gate(Gate.MEMORY)
    write = bool(op.flags & uapi.MOCK_ACCESS_RW_WRITE)
    data = bytearray(caller.copy_from_user(op.uptr, op.length)) if write else bytearray(op.length)
    iova = _syz(staccess, op.iova) if op.flags & uapi.MOCK_FLAGS_ACCESS_SYZ else op.iova
    slow = bool(op.flags & uapi.MOCK_ACCESS_RW_SLOW_PATH)
    staccess.access.rw(caller, iova, data, write=write, slow=slow)
    if not write:
        caller.copy_to_user(op.uptr, bytes(data))


def _syz(staccess: SelftestAccess, coded: int) -> int:
    """iommufd_test_syz_conv_iova()"""
    ioas = staccess.access.ioas
    return 0 if ioas is None else syz_iova(ioas, coded)


# ---- dirty pages, caches, faults and events of the mock ----


def _dirty(ucmd: Ucmd, cmd: uapi.TestCmd, op: uapi.Dirty) -> None:
    """Mark what a bitmap names as written: EINVAL, EOVERFLOW, ENOENT, ENOMEM, EFAULT."""
    if not op.page_size or not op.length or op.iova % op.page_size or op.length % op.page_size or not op.uptr:
        raise EINVAL("a length, address or page size that is 0 or not aligned")
    nbits = op.length // op.page_size
    if nbits > SZ_16M * 8:
        raise EOVERFLOW("a bitmap of more than 16 MiB")
    dirty = _paging(ucmd, cmd.id).domain.dirty_ops
    if not isinstance(dirty, SelftestDirty) or not dirty.tracking:
        raise EINVAL("dirty tracking is off")
    ucmd.caller.gate(Gate.MEMORY)
    bits = int.from_bytes(ucmd.caller.copy_from_user(op.uptr, (nbits + 7) // 8), "little") & (1 << nbits) - 1
    count = bits.bit_count()
    while bits:
        low = bits & -bits
        dirty.set_dirty(op.iova + (low.bit_length() - 1) * op.page_size & ULONG_MAX)
        bits ^= low
    _answer(ucmd, uapi.Dirty, out_nr_dirty=count)


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
    uapi.IOMMU_TEST_OP_MD_CHECK_MAP: Op(uapi.CheckMap, _check_map),
    uapi.IOMMU_TEST_OP_MD_CHECK_REFS: Op(uapi.CheckRefs, _check_refs),
    uapi.IOMMU_TEST_OP_CREATE_ACCESS: Op(uapi.CreateAccess, _create_access),
    uapi.IOMMU_TEST_OP_DESTROY_ACCESS_PAGES: Op(uapi.DestroyAccessPages, _destroy_access_pages),
    uapi.IOMMU_TEST_OP_ACCESS_PAGES: Op(uapi.AccessPages, _access_pages),
    uapi.IOMMU_TEST_OP_ACCESS_RW: Op(uapi.AccessRw, _access_rw),
    uapi.IOMMU_TEST_OP_SET_TEMP_MEMORY_LIMIT: Op(uapi.MemoryLimit, _set_temp_memory_limit),
    uapi.IOMMU_TEST_OP_MOCK_DOMAIN_REPLACE: Op(uapi.MockDomainReplace, _mock_domain_replace),
    uapi.IOMMU_TEST_OP_ACCESS_REPLACE_IOAS: Op(uapi.AccessReplaceIoas, _access_replace_ioas),
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
