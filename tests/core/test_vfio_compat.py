"""VFIO type1 over the compatibility IOAS: cuts, capabilities and their room, who is charged (vfio_compat.c)."""

import errno

import pytest

import iommufd_uapi.iommufd as uapi
import iommufd_uapi.iommufd_test as test_uapi
from iommufd_uapi import vfio
from iommufdd.ioas import Ioas
from iommufdd.user import PAGE_SIZE, ULONG_MAX

from .harness import APERTURE, ARGUMENT, NOWHERE, OPS, Client
from .invariants import check
from .model import Bench
from .snapshot import difference, state

SET, CLEAR, GET = uapi.IOMMU_VFIO_IOAS_SET, uapi.IOMMU_VFIO_IOAS_CLEAR, uapi.IOMMU_VFIO_IOAS_GET
SIZE = 4 * PAGE_SIZE


def compat(c: Client, *, type1: bool = False, domain: bool = True) -> int:
    ioas = c.ioas_alloc()
    c.vfio_ioas(SET, ioas)
    c.vfio(vfio.VFIO_SET_IOMMU, vfio.VFIO_TYPE1_IOMMU if type1 else vfio.VFIO_TYPE1v2_IOMMU)
    if domain:
        c.mock_domain(ioas)
    return ioas


def areas(c: Client, ioas_id: int) -> list[tuple[int, int]]:
    """(page of APERTURE, pages)"""
    ioas = c.ictx.objects.get(ioas_id)
    assert isinstance(ioas, Ioas)
    return [((area.iova - APERTURE) // PAGE_SIZE, area.length // PAGE_SIZE) for area in ioas.iopt.areas]


@pytest.mark.parametrize(
    ("page", "npages", "left"),
    [
        (1, 1, [(0, 1), (2, 2)]),
        (0, 1, [(1, 3)]),
        (3, 1, [(0, 3)]),
        (0, 4, []),
        (1, 3, [(0, 1)]),
        (1, 9, [(0, 1)]),
    ],
)
def test_type1_unmaps_in_the_middle(page: int, npages: int, left: list[tuple[int, int]]) -> None:
    c = Client()
    ioas = compat(c, type1=True)
    c.map_dma(c.process.buffer(4), SIZE, APERTURE)
    removed = c.unmap_dma(APERTURE + page * PAGE_SIZE, npages * PAGE_SIZE)
    assert removed == SIZE - sum(n for _, n in left) * PAGE_SIZE
    assert areas(c, ioas) == left
    check(c.world)
    c.unmap(ioas, 0, ULONG_MAX)
    assert not c.world.memfds[0].pins


def test_type1v2_does_not() -> None:
    c = Client()
    ioas = compat(c)
    c.map_dma(c.process.buffer(4), SIZE, APERTURE)
    before = state(c.world)
    assert c.unmap_dma(APERTURE, PAGE_SIZE, expect=errno.ENOENT) == 0  # written back with the error
    assert not difference(before, state(c.world))
    assert c.unmap_dma(APERTURE, 2 * SIZE) == SIZE
    assert not areas(c, ioas)


def test_a_cut_that_is_refused_leaves_the_one_before_it() -> None:
    """The end is cut first; size is not written back."""
    c = Client()
    ioas = compat(c, type1=True)
    c.map_dma(c.process.buffer(4), SIZE, APERTURE)
    assert c.unmap_dma(APERTURE + 0x800, 0x1800, expect=errno.EINVAL) == 0x1800
    assert areas(c, ioas) == [(0, 2), (2, 2)]
    check(c.world)


def test_an_area_that_is_accessed_cannot_be_cut() -> None:
    c = Client()
    ioas = compat(c, type1=True)
    c.map_dma(c.process.buffer(4), SIZE, APERTURE)
    c.pin(c.access(ioas), APERTURE, PAGE_SIZE)
    before = state(c.world)
    c.unmap_dma(APERTURE + PAGE_SIZE, PAGE_SIZE, expect=errno.EINVAL)
    assert not difference(before, state(c.world))


def test_a_dmabuf_cannot_be_cut() -> None:
    c = Client()
    ioas = compat(c, type1=True)
    fd = c.result(test_uapi.TestCmd(op=OPS[test_uapi.DmabufGet], u=test_uapi.DmabufGet(SIZE).pack()))
    c.map_file(ioas, fd, 0, SIZE, APERTURE)
    c.unmap_dma(APERTURE + PAGE_SIZE, PAGE_SIZE, expect=errno.EOPNOTSUPP)
    assert c.unmap_dma(APERTURE, SIZE) == SIZE


def test_unmapping_nothing_and_everything() -> None:
    c = Client()
    compat(c)
    assert c.unmap_dma(APERTURE, PAGE_SIZE) == 0
    c.map_dma(c.process.buffer(4), SIZE, APERTURE)
    for iova, size in ((1, 0), (0, 1)):
        assert c.unmap_dma(iova, size, vfio.VFIO_DMA_UNMAP_FLAG_ALL, errno.EINVAL) == size
    assert c.unmap_dma(0, 0, vfio.VFIO_DMA_UNMAP_FLAG_ALL) == SIZE
    assert c.unmap_dma(0, 0, vfio.VFIO_DMA_UNMAP_FLAG_ALL) == 0
    assert c.unmap_dma(APERTURE, 0, expect=errno.EINVAL) == 0
    assert c.unmap_dma(ULONG_MAX, 2, expect=errno.EOVERFLOW) == 0
    assert c.unmap_dma(APERTURE, 0, vfio.VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP, errno.EINVAL) == 0


def test_a_mapping_nobody_may_use_is_for_later() -> None:
    """quirk: VFIO lets both rights be absent, and a domain does not."""
    c = Client()
    ioas = compat(c, domain=False)
    c.map_dma(c.process.buffer(1), PAGE_SIZE, APERTURE, flags=0)
    before = state(c.world)
    c.mock_domain(ioas, expect=errno.EINVAL)
    assert not difference(before, state(c.world))
    c.unmap_dma(APERTURE, PAGE_SIZE)
    c.mock_domain(ioas)
    c.map_dma(c.process.buffer(1), PAGE_SIZE, APERTURE, flags=0, expect=errno.EINVAL)
    check(c.world)


def test_a_mapping_that_cannot_be_pinned() -> None:
    c = Client()
    compat(c)
    before = state(c.world)
    c.map_dma(NOWHERE, PAGE_SIZE, APERTURE, expect=errno.EFAULT)
    c.map_dma(NOWHERE, PAGE_SIZE, 0, expect=errno.EINVAL)
    c.map_dma(NOWHERE, PAGE_SIZE, APERTURE, flags=4, expect=errno.EINVAL)
    assert not difference(before, state(c.world))


def test_opened_as_the_container_each_process_is_charged() -> None:
    c = Client(container=True)
    c.caller.task.cap_ipc_lock = False
    compat(c)
    c.map_dma(c.process.buffer(4), SIZE, APERTURE)
    assert (c.mm.locked_vm, c.caller.task.user.locked_vm) == (4, 0)
    check(c.world)


# ---- the compatibility IOAS ----


def test_it_is_forgotten_when_it_goes() -> None:
    c = Client()
    ioas, other = c.ioas_alloc(), c.ioas_alloc()
    c.vfio_ioas(SET, ioas)
    assert c.vfio_ioas(GET) == ioas
    c.destroy(other)
    assert c.vfio_ioas(GET) == ioas
    c.destroy(ioas)  # the pointer holds nothing
    c.vfio_ioas(GET, expect=errno.ENODEV)
    c.vfio_ioas(SET, 99, errno.ENOENT)
    c.vfio_ioas(CLEAR)
    c.vfio_ioas(3, expect=errno.EOPNOTSUPP)


@pytest.mark.parametrize(
    ("cmd", "arg"),
    [
        (vfio.VFIO_IOMMU_MAP_DMA, vfio.VfioIommuType1DmaMap(flags=3, size=PAGE_SIZE)),
        (vfio.VFIO_IOMMU_UNMAP_DMA, vfio.VfioIommuType1DmaUnmap(flags=2)),
        (vfio.VFIO_IOMMU_GET_INFO, vfio.VfioIommuType1Info()),
        (vfio.VFIO_SET_IOMMU, vfio.VFIO_TYPE1_IOMMU),
        (vfio.VFIO_CHECK_EXTENSION, vfio.VFIO_DMA_CC_IOMMU),
    ],
)
def test_without_one_there_is_no_device(cmd: int, arg: int) -> None:
    Client().vfio(cmd, arg, errno.ENODEV)


def test_type1_gives_large_pages_up() -> None:
    c = Client()
    ioas = compat(c)
    c.map_dma(c.process.buffer(4), SIZE, APERTURE)
    c.vfio(vfio.VFIO_SET_IOMMU, vfio.VFIO_TYPE1_IOMMU, errno.EINVAL)
    c.unmap_dma(APERTURE, SIZE)
    c.vfio(vfio.VFIO_SET_IOMMU, vfio.VFIO_TYPE1_IOMMU)
    assert c.option(uapi.IOMMU_OPTION_HUGE_PAGES, obj=ioas) == 0
    for other in (0, 2, vfio.VFIO_NOIOMMU_IOMMU):
        c.vfio(vfio.VFIO_SET_IOMMU, other, errno.EINVAL)


def test_extensions() -> None:
    c = Client()
    ioas = compat(c, domain=False)
    found = {n for n in range(20) if c.vfio(vfio.VFIO_CHECK_EXTENSION, n)}
    assert found == {vfio.VFIO_TYPE1_IOMMU, vfio.VFIO_TYPE1v2_IOMMU, vfio.VFIO_UNMAP_ALL, vfio.VFIO_DMA_CC_IOMMU}
    c.mock_domain(ioas)  # its HWPT does not enforce coherency
    assert c.vfio(vfio.VFIO_CHECK_EXTENSION, vfio.VFIO_DMA_CC_IOMMU) == 0


# ---- VFIO_IOMMU_GET_INFO ----

HEADER = vfio.VfioIommuType1Info.SIZEOF
AVAIL = vfio.VfioIommuType1InfoDmaAvail.SIZEOF + 4  # to a multiple of 8
RANGE = vfio.VfioIovaRange.SIZEOF


def info(c: Client, argsz: int) -> tuple[vfio.VfioIommuType1Info, bytes]:
    """What is written within argsz, and a byte behind."""
    room = max(argsz, HEADER)
    c.process.put(vfio.VfioIommuType1Info(argsz).pack().ljust(room, b"\xee") + b"\xee" * 64, ARGUMENT)
    assert c.rc(vfio.VFIO_IOMMU_GET_INFO, ARGUMENT) == 0
    data = c.mm.read(ARGUMENT, room + 64)
    assert data[max(argsz, HEADER) :] == b"\xee" * 64
    return vfio.VfioIommuType1Info.unpack(data), data[:room]


def test_capabilities_in_full() -> None:
    c = Client()
    compat(c)
    head, data = info(c, 200)
    assert head.flags == vfio.VFIO_IOMMU_INFO_PGSIZES | vfio.VFIO_IOMMU_INFO_CAPS
    assert head.cap_offset == HEADER
    avail = vfio.VfioIommuType1InfoDmaAvail.unpack(data, HEADER)
    assert (avail.header.id, avail.avail) == (vfio.VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL, 2**32 - 1)
    spans = vfio.VfioIommuType1InfoCapIovaRange.unpack(data, avail.header.next)
    assert (spans.header.id, spans.header.next) == (vfio.VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE, 0)
    assert spans.nr_iovas == 1
    one = vfio.VfioIovaRange.unpack(data, avail.header.next + spans.SIZEOF)
    assert (one.start, one.end) == (APERTURE, (1 << 31) - 1)
    assert head.argsz == avail.header.next + spans.SIZEOF + RANGE


@pytest.mark.parametrize("argsz", range(16, 80, 4))
def test_nothing_is_written_beyond_argsz(argsz: int) -> None:
    c = Client()
    compat(c)
    full, _ = info(c, 200)
    head, _ = info(c, argsz)
    if argsz >= HEADER:
        assert head.argsz == full.argsz
        assert bool(head.cap_offset) == (argsz >= full.argsz)


def test_page_sizes_are_what_all_domains_have() -> None:
    c = Client()
    ioas = compat(c, domain=False)
    assert info(c, 200)[0].iova_pgsizes == ULONG_MAX & -PAGE_SIZE
    c.mock_domain(ioas)
    sizes = info(c, 200)[0].iova_pgsizes
    assert sizes & (PAGE_SIZE - 1) == 0  # of smaller ones only the CPU's page is told
    assert sizes & PAGE_SIZE
    bench = Bench(c)
    (idev,) = bench.bound(1)
    c.hwpt(idev.id, ioas)
    assert info(c, 200)[0].iova_pgsizes == PAGE_SIZE


def test_argsz_that_is_too_small() -> None:
    c = Client()
    compat(c)
    c.vfio(vfio.VFIO_IOMMU_GET_INFO, vfio.VfioIommuType1Info(15), errno.EINVAL)
    c.vfio(vfio.VFIO_IOMMU_MAP_DMA, vfio.VfioIommuType1DmaMap(31), errno.EINVAL)
    c.vfio(vfio.VFIO_IOMMU_UNMAP_DMA, vfio.VfioIommuType1DmaUnmap(23), errno.EINVAL)
    c.vfio(vfio.VFIO_IOMMU_DIRTY_PAGES, vfio.VfioIommuType1DirtyBitmap(), errno.ENOTTY)
