"""For every call one or more set-ups in which it succeeds, and passes as many gates as it can.

A scenario prepares a fresh client and returns the call; the name of the function is the name of the scenario.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import iommufd_uapi.iommufd as uapi
import iommufd_uapi.iommufd_test as test_uapi
from iommufdd.user import PAGE_SIZE, ULONG_MAX, File

from .harness import (
    APERTURE,
    ARGUMENT,
    DATA,
    DIRTY,
    FAULT,
    FIXED,
    NEST_PARENT,
    OPS,
    PASID,
    PASID_DEVICE,
    RW,
    Client,
    Mock,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from iommufd_uapi.layout import Ioctl, Layout, VfioIoctl

    Call = Callable[[], int]
    Scenario = Callable[[Client], Call]

SIZE = 4 * PAGE_SIZE
SCENARIOS: dict[str, Scenario] = {}


def scenario(function: Scenario) -> Scenario:
    SCENARIOS[function.__name__] = function
    return function


def ready(c: Client, arg: Ioctl | VfioIoctl) -> Call:
    c.process.put(arg.pack(), ARGUMENT)
    return lambda: c.rc(arg.CMD, ARGUMENT)


def ready_test(c: Client, op: Layout, id: int = 0) -> Call:
    return ready(c, test_uapi.TestCmd(op=OPS[type(op)], id=id, u=op.pack()))


def mapped(c: Client, *, domain: bool = True, npages: int = 4) -> tuple[int, int]:
    """An IOAS with memory at APERTURE, its address."""
    ioas = c.ioas_alloc()
    if domain:
        c.mock_domain(ioas)
    addr = c.process.buffer(npages)
    c.map(ioas, addr, npages * PAGE_SIZE, APERTURE)
    return ioas, addr


def unprivileged(c: Client) -> Client:
    """So that pinned pages are charged."""
    c.caller.task.cap_ipc_lock = False
    return c


def with_device(c: Client) -> tuple[int, Mock]:
    ioas = c.ioas_alloc()
    return ioas, c.mock_domain(ioas, PASID_DEVICE)


def with_viommu(c: Client, **options: int) -> tuple[int, Mock, int]:
    ioas, mock = with_device(c)
    return ioas, mock, c.viommu(mock.idev, c.hwpt(mock.idev, ioas, NEST_PARENT | PASID), **options)


# ---- main.c, ioas.c ----


@scenario
def destroy(c: Client) -> Call:
    return ready(c, uapi.Destroy(id=c.ioas_alloc()))


@scenario
def destroy_mock_device(c: Client) -> Call:
    return ready(c, uapi.Destroy(id=with_device(c)[1].stdev))


@scenario
def ioas_alloc(c: Client) -> Call:
    c.destroy([c.ioas_alloc(), c.ioas_alloc()][0])
    return ready(c, uapi.IoasAlloc())


@scenario
def ioas_allow_iovas(c: Client) -> Call:
    ioas = c.ioas_alloc()
    c.allow(ioas, (0x50000, 0x5FFFF))
    uptr = c.process.put(uapi.IovaRange(0, 0xFFF).pack() + uapi.IovaRange(0x2000, 0x2FFF).pack())
    return ready(c, uapi.IoasAllowIovas(ioas_id=ioas, num_iovas=2, allowed_iovas=uptr))


@scenario
def ioas_iova_ranges(c: Client) -> Call:
    ioas = c.ioas_alloc()
    c.reserve(ioas, 0x1000, 0x1000)
    return ready(c, uapi.IoasIovaRanges(ioas_id=ioas, num_iovas=4, allowed_iovas=DATA))


@scenario
def ioas_map(c: Client) -> Call:
    unprivileged(c)
    ioas, _ = mapped(c)
    addr = c.process.buffer()
    return ready(c, uapi.IoasMap(flags=RW, ioas_id=ioas, user_va=addr, length=SIZE))


@scenario
def ioas_map_without_a_domain(c: Client) -> Call:
    ioas, addr = mapped(c, domain=False)
    return ready(c, uapi.IoasMap(flags=RW | FIXED, ioas_id=ioas, user_va=addr, length=SIZE, iova=0))


@scenario
def ioas_map_file(c: Client) -> Call:
    unprivileged(c)
    ioas, _ = mapped(c)
    fd = c.process.install(c.world.memfd())
    return ready(c, uapi.IoasMapFile(flags=RW, ioas_id=ioas, fd=fd, start=PAGE_SIZE, length=SIZE))


@scenario
def ioas_map_dmabuf(c: Client) -> Call:
    ioas, _ = mapped(c)
    fd = c.result(test_uapi.TestCmd(op=OPS[test_uapi.DmabufGet], u=test_uapi.DmabufGet(SIZE).pack()))
    return ready(c, uapi.IoasMapFile(flags=RW, ioas_id=ioas, fd=fd, length=SIZE))


@scenario
def ioas_copy(c: Client) -> Call:
    unprivileged(c)
    src, addr = mapped(c, domain=False)
    c.map(src, addr, SIZE, APERTURE + SIZE)
    dst = c.ioas_alloc()
    c.mock_domain(dst)
    return ready(c, uapi.IoasCopy(flags=RW, dst_ioas_id=dst, src_ioas_id=src, length=2 * SIZE, src_iova=APERTURE))


@scenario
def ioas_unmap(c: Client) -> Call:
    ioas, addr = mapped(c)
    c.map(ioas, addr, SIZE, APERTURE + SIZE)
    c.pin(c.access(ioas), APERTURE, PAGE_SIZE)
    return ready(c, uapi.IoasUnmap(ioas_id=ioas, iova=APERTURE, length=2 * SIZE))


@scenario
def ioas_unmap_all(c: Client) -> Call:
    return ready(c, uapi.IoasUnmap(ioas_id=mapped(c)[0], length=ULONG_MAX))


@scenario
def option_rlimit_mode(c: Client) -> Call:
    return ready(c, uapi.Option(option_id=uapi.IOMMU_OPTION_RLIMIT_MODE, val64=1))


@scenario
def option_huge_pages(c: Client) -> Call:
    return ready(c, uapi.Option(option_id=uapi.IOMMU_OPTION_HUGE_PAGES, object_id=c.ioas_alloc()))


@scenario
def vfio_ioas_set(c: Client) -> Call:
    return ready(c, uapi.VfioIoas(ioas_id=c.ioas_alloc(), op=uapi.IOMMU_VFIO_IOAS_SET))


@scenario
def vfio_ioas_get(c: Client) -> Call:
    c.vfio_ioas(uapi.IOMMU_VFIO_IOAS_SET, c.ioas_alloc())
    return ready(c, uapi.VfioIoas(op=uapi.IOMMU_VFIO_IOAS_GET))


@scenario
def ioas_change_process(c: Client) -> Call:
    unprivileged(c)
    ioas = c.ioas_alloc()
    c.mock_domain(ioas)
    c.map_file(ioas, c.process.install(c.world.memfd()), 0, SIZE, APERTURE)
    child = Client(c.process.fork(), ictx=c.ictx)
    child.caller.gate = c.gate
    return ready(child, uapi.IoasChangeProcess())


# ---- device.c, hw_pagetable.c ----


@scenario
def get_hw_info(c: Client) -> Call:
    return ready(c, uapi.HwInfo(dev_id=with_device(c)[1].idev, data_len=64, data_uptr=DATA))


@scenario
def hwpt_alloc_paging(c: Client) -> Call:
    """The first domain of an IOAS with two areas."""
    unprivileged(c)
    _, mock = with_device(c)
    ioas, _ = mapped(c, domain=False)
    c.map(ioas, c.process.buffer(), SIZE, APERTURE + SIZE)
    fault, _ = c.fault_queue()
    data = test_uapi.HwptSelftest(0, test_uapi.MOCK_IOMMUPT_DEFAULT).pack()
    cmd = uapi.HwptAlloc(flags=DIRTY | PASID | FAULT, dev_id=mock.idev, pt_id=ioas, fault_id=fault)
    cmd.data_type, cmd.data_len = test_uapi.IOMMU_HWPT_DATA_SELFTEST, len(data)
    cmd.data_uptr = c.process.put(data)
    return ready(c, cmd)


@scenario
def hwpt_alloc_nested(c: Client) -> Call:
    ioas, mock = with_device(c)
    return _nested(c, mock, c.hwpt(mock.idev, ioas, NEST_PARENT))


@scenario
def hwpt_alloc_on_viommu(c: Client) -> Call:
    _, mock, viommu = with_viommu(c)
    return _nested(c, mock, viommu)


def _nested(c: Client, mock: Mock, pt: int) -> Call:
    fault, _ = c.fault_queue()
    data = test_uapi.HwptSelftest(0xBEEF).pack()
    cmd = uapi.HwptAlloc(flags=PASID | FAULT, dev_id=mock.idev, pt_id=pt, fault_id=fault)
    cmd.data_type, cmd.data_len = test_uapi.IOMMU_HWPT_DATA_SELFTEST, len(data)
    cmd.data_uptr = c.process.put(data)
    return ready(c, cmd)


@scenario
def hwpt_set_dirty_tracking(c: Client) -> Call:
    ioas, mock = with_device(c)
    return ready(c, uapi.HwptSetDirtyTracking(flags=1, hwpt_id=c.hwpt(mock.idev, ioas, DIRTY)))


@scenario
def hwpt_get_dirty_bitmap(c: Client) -> Call:
    hwpt = with_dirty_pages(c)
    cmd = uapi.HwptGetDirtyBitmap(hwpt_id=hwpt, iova=APERTURE, length=SIZE, page_size=PAGE_SIZE, data=DATA)
    return ready(c, cmd)


def with_dirty_pages(c: Client) -> int:
    ioas, mock = with_device(c)
    c.map(ioas, c.process.buffer(), SIZE, APERTURE)
    hwpt = c.hwpt(mock.idev, ioas, DIRTY)
    c.ioctl(uapi.HwptSetDirtyTracking(flags=1, hwpt_id=hwpt))
    uptr = c.process.put(b"\x05")
    c.test(test_uapi.Dirty(iova=APERTURE, length=SIZE, page_size=PAGE_SIZE, uptr=uptr), id=hwpt)
    return hwpt


@scenario
def hwpt_invalidate_nested(c: Client) -> Call:
    ioas, mock = with_device(c)
    hwpt = c.nested(mock.idev, c.hwpt(mock.idev, ioas, NEST_PARENT))
    data = test_uapi.HwptInvalidateSelftest(0, 1).pack() + test_uapi.HwptInvalidateSelftest(0, 2).pack()
    return _invalidate(c, hwpt, data)


@scenario
def hwpt_invalidate_viommu(c: Client) -> Call:
    _, mock, viommu = with_viommu(c)
    c.vdevice(viommu, mock.idev, 7)
    return _invalidate(c, viommu, 2 * test_uapi.ViommuInvalidateSelftest(0, 7, 1).pack())


def _invalidate(c: Client, hwpt: int, data: bytes) -> Call:
    kind = test_uapi.IOMMU_HWPT_INVALIDATE_DATA_SELFTEST
    cmd = uapi.HwptInvalidate(hwpt_id=hwpt, data_uptr=c.process.put(data), data_type=kind)
    cmd.entry_len, cmd.entry_num = len(data) // 2, 2
    return ready(c, cmd)


# ---- eventq.c, viommu.c ----


@scenario
def fault_queue_alloc(c: Client) -> Call:
    return ready(c, uapi.FaultAlloc())


@scenario
def viommu_alloc(c: Client) -> Call:
    ioas, mock = with_device(c)
    data = test_uapi.ViommuSelftest(in_data=7).pack()
    cmd = uapi.ViommuAlloc(type=test_uapi.IOMMU_VIOMMU_TYPE_SELFTEST, dev_id=mock.idev, data_len=len(data))
    cmd.hwpt_id, cmd.data_uptr = c.hwpt(mock.idev, ioas, NEST_PARENT), c.process.put(data)
    return ready(c, cmd)


@scenario
def vdevice_alloc(c: Client) -> Call:
    _, mock, viommu = with_viommu(c)
    return ready(c, uapi.VdeviceAlloc(viommu_id=viommu, dev_id=mock.idev, virt_id=7))


@scenario
def veventq_alloc(c: Client) -> Call:
    viommu = with_viommu(c)[2]
    kind = test_uapi.IOMMU_VEVENTQ_TYPE_SELFTEST
    return ready(c, uapi.VeventqAlloc(viommu_id=viommu, type=kind, veventq_depth=2))


@scenario
def hw_queue_alloc(c: Client) -> Call:
    """The second queue, over two areas that show consecutive pages."""
    ioas, _, viommu = with_viommu(c)
    unprivileged(c)
    file = c.world.memfd()
    for n in range(2):
        c.map(ioas, c.process.map(file, 2, page=2 * n), 2 * PAGE_SIZE, APERTURE + 2 * n * PAGE_SIZE)
    c.hw_queue(viommu, 0, APERTURE)
    kind = test_uapi.IOMMU_HW_QUEUE_TYPE_SELFTEST
    cmd = uapi.HwQueueAlloc(viommu_id=viommu, type=kind, index=1, nesting_parent_iova=APERTURE + 0x1080, length=0x2000)
    return ready(c, cmd)


def with_faults(c: Client) -> tuple[int, Mock]:
    """A fault queue's descriptor, and a device behind it that has asked for two pages."""
    ioas, mock = with_device(c)
    fault, fd = c.fault_queue()
    c.replace(mock.stdev, c.hwpt(mock.idev, ioas, FAULT | PASID, fault=fault))
    for group in range(2):
        c.test(test_uapi.TriggerIopf(dev_id=mock.idev, grpid=group, addr=PAGE_SIZE * group))
    return fd, mock


@scenario
def fault_read(c: Client) -> Call:
    fd, _ = with_faults(c)
    return lambda: c.file(fd, File).read(c.caller, DATA, 80)


@scenario
def fault_write(c: Client) -> Call:
    fd, _ = with_faults(c)
    c.read(fd, 80)
    c.process.put(b"".join(uapi.HwptPageResponse(cookie, 0).pack() for cookie in (2, 1)))
    return lambda: c.file(fd, File).write(c.caller, DATA, 16)


@scenario
def veventq_read(c: Client) -> Call:
    _, mock, viommu = with_viommu(c)
    c.vdevice(viommu, mock.idev, 7)
    c.replace(mock.stdev, c.nested(mock.idev, viommu))
    _, fd = c.veventq(viommu, 1)
    for _ in range(2):
        c.test(test_uapi.TriggerVevent(mock.idev))
    return lambda: c.file(fd, File).read(c.caller, DATA, 80)


@scenario
def mmap(c: Client) -> Call:
    with_viommu(c, in_data=7)
    return lambda: c.mmap(PAGE_SIZE, 2 * PAGE_SIZE).refs - 1
