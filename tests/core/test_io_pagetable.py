"""What may lie where in an IOAS, what unmapping and cutting leave, and what a domain has (io_pagetable.c)."""

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

import iommufd_uapi.iommufd as uapi
import iommufd_uapi.iommufd_test as test_uapi
from iommufdd.errors import EBUSY, EEXIST, EINVAL
from iommufdd.io_pagetable import IoPagetable
from iommufdd.ioas import Ioas
from iommufdd.iommu.mock import MockPaging
from iommufdd.iova import Piece
from iommufdd.pages import UserPages
from iommufdd.user import PAGE_SIZE, ULONG_MAX

from .harness import APERTURE, READ, RW, WRITE, Client
from .invariants import check
from .model import Bench, ModelDomain, ModelIommu
from .snapshot import difference, state

# ---- reserved, allowed, alignment ----


def test_what_clashes_with_what() -> None:
    """Areas and allowed ranges clash with reservations; reservations not with each other, nor areas with allowed."""
    c = Client()
    ioas = c.ioas_alloc()
    c.reserve(ioas, 0x10000, 0x1000)
    c.reserve(ioas, 0x10000, 0x2000)
    buffer = c.process.buffer(1)
    c.map(ioas, buffer, PAGE_SIZE, 0x11000, expect=errno.EINVAL)
    c.allow(ioas, (0x0, 0x10000), expect=errno.EADDRINUSE)
    c.allow(ioas, (0x0, 0xFFFF))
    c.map(ioas, buffer, PAGE_SIZE, 0x1000)
    c.reserve(ioas, 0x20000, 0x1000)
    c.reserve(ioas, 0x1000, 1, expect=errno.EADDRINUSE)
    c.allow(ioas)
    c.reserve(ioas, 0x1FFF, 1, expect=errno.EADDRINUSE)
    c.map(ioas, buffer, PAGE_SIZE, 0x1000, expect=errno.EEXIST)
    check(c.world)


def test_a_list_that_is_refused_leaves_the_old_one() -> None:
    c = Client()
    ioas = c.ioas_alloc()
    c.reserve(ioas, 0x10000, 0x1000)
    c.allow(ioas, (0x20000, 0x2FFFF))
    before = state(c.world)
    c.allow(ioas, (0x0, 0xFFF), (0x10FFF, 0x11FFF), expect=errno.EADDRINUSE)
    c.allow(ioas, (0x0, 0xFFF), (0xFFF, 0x1FFF), expect=errno.EINVAL)
    c.allow(ioas, (0x5, 0x5), expect=errno.EINVAL)
    assert not difference(before, state(c.world))


def test_a_domain_narrows_the_ioas_to_its_aperture_while_it_lives() -> None:
    c = Client()
    ioas, other = c.ioas_alloc(), c.ioas_alloc()
    mock = c.mock_domain(other)
    c.map(ioas, c.process.buffer(1), PAGE_SIZE, 0x1000)
    c.hwpt(mock.idev, ioas, expect=errno.EADDRINUSE)
    c.unmap(ioas, 0x1000, PAGE_SIZE)
    c.allow(ioas, (0x0, 0xFFF))
    c.hwpt(mock.idev, ioas, expect=errno.EADDRINUSE)
    c.allow(ioas)
    hwpt = c.hwpt(mock.idev, ioas)
    assert c.ranges(ioas) == [(test_uapi.MOCK_APERTURE_START, test_uapi.MOCK_APERTURE_LAST)]
    c.destroy(hwpt)
    assert c.ranges(ioas) == [(0, ULONG_MAX)]


def test_the_alignment_is_the_greatest_anybody_needs() -> None:
    c = Client()
    ioas = c.ioas_alloc()
    mock = c.mock_domain(c.ioas_alloc())

    def alignment() -> int:
        obj = c.ictx.objects.get(ioas)
        assert isinstance(obj, Ioas)
        return obj.iopt.iova_alignment

    assert alignment() == 1
    hwpt = c.hwpt(mock.idev, ioas)
    assert alignment() == 0x800
    pinning = c.access(ioas)
    c.access(ioas, pins=False)
    assert alignment() == PAGE_SIZE
    c.fds.close(pinning)
    assert alignment() == 0x800
    c.option(uapi.IOMMU_OPTION_HUGE_PAGES, 0, obj=ioas)
    assert alignment() == PAGE_SIZE
    c.option(uapi.IOMMU_OPTION_HUGE_PAGES, 1, obj=ioas)
    c.destroy(hwpt)
    assert alignment() == 1


@pytest.mark.parametrize(("iova", "length", "offset"), [(0x800, 0x1000, 0), (0, 0x800, 0), (0, 0x1000, 0x800)])
def test_an_area_that_is_too_fine_keeps_a_greater_alignment_out(iova: int, length: int, offset: int) -> None:
    c = Client()
    ioas = c.ioas_alloc()
    c.map(ioas, c.process.buffer(2) + offset, length, iova)
    before = state(c.world)
    c.access(ioas, expect=errno.EADDRINUSE)
    c.option(uapi.IOMMU_OPTION_HUGE_PAGES, 0, obj=ioas, expect=errno.EADDRINUSE)
    assert not difference(before, state(c.world))
    c.access(ioas, pins=False)


def test_a_domain_of_larger_pages_than_the_cpu_has() -> None:
    bench = Bench()
    (idev,) = bench.bound(1)
    ioas = bench.c.ioas_alloc()
    bench.iommu.pgsize_bitmap = 2 * PAGE_SIZE
    before = state(bench.c.world)
    bench.c.hwpt(idev.id, ioas, expect=errno.EINVAL)
    assert not difference(before, state(bench.c.world))


# ---- mapping and unmapping ----


def test_a_copy_that_fails_in_its_second_area_maps_neither() -> None:
    c = Client()
    src, dst = c.ioas_alloc(), c.ioas_alloc()
    c.mock_domain(dst)
    c.map(src, c.process.buffer(1), PAGE_SIZE, APERTURE)
    c.map(src, 0xDEAD000, PAGE_SIZE, APERTURE + PAGE_SIZE)
    before = state(c.world)
    c.copy(dst, src, APERTURE, 2 * PAGE_SIZE, APERTURE, expect=errno.EFAULT)
    assert not difference(before, state(c.world))
    c.copy(dst, src, APERTURE, PAGE_SIZE, APERTURE)
    c.map(src, c.process.buffer(1), PAGE_SIZE, APERTURE + 2 * PAGE_SIZE, READ)
    c.copy(dst, src, APERTURE + 2 * PAGE_SIZE, PAGE_SIZE, APERTURE + PAGE_SIZE, WRITE, errno.EPERM)
    c.copy(dst, src, APERTURE + 2 * PAGE_SIZE, PAGE_SIZE, APERTURE + PAGE_SIZE, READ)
    check(c.world)


def test_copy_within_one_ioas() -> None:
    c = Client()
    ioas = c.ioas_alloc()
    c.map(ioas, c.process.buffer(4), 4 * PAGE_SIZE, 0)
    c.copy(ioas, ioas, PAGE_SIZE, 2 * PAGE_SIZE, 0x100000)
    c.access_write(c.access(ioas), 0x100000, b"there")
    assert c.access_read(c.access(ioas), PAGE_SIZE, 5) == b"there"
    check(c.world)


def test_unmap_stops_at_what_it_may_not_remove() -> None:
    c = Client()
    ioas = c.ioas_alloc()
    for n in range(4):
        c.map(ioas, c.process.buffer(2), 2 * PAGE_SIZE, 0x10000 * n)
    assert c.unmap(ioas, 0x20000, 0x2000) == 0x2000
    assert c.unmap(ioas, 0, 0x31000, expect=errno.ENOENT) == 0x31000  # not written back
    obj = c.ictx.objects.get(ioas)
    assert isinstance(obj, Ioas)
    assert [area.iova for area in obj.iopt.areas] == [0x30000]
    c.unmap(ioas, 0x1000, 0x1000, expect=errno.ENOENT)
    c.unmap(ioas, 0, ULONG_MAX)
    assert c.unmap(ioas, 0, ULONG_MAX) == 0
    check(c.world)


def test_an_access_that_does_not_let_go_is_asked_a_hundred_times() -> None:
    c = Client()
    ioas = c.ioas_alloc()
    c.map(ioas, c.process.buffer(1), PAGE_SIZE, 0)
    obj = c.ictx.objects.get(ioas)
    assert isinstance(obj, Ioas)
    fd = c.access(ioas)
    item = c.pin(fd, 0, PAGE_SIZE)
    access = obj.iopt.accesses[0]
    assert access is not None
    asked: list[tuple[int, int]] = []
    release, access.unmap = access.unmap, lambda iova, length: asked.append((iova, length))
    c.unmap(ioas, 0, ULONG_MAX, expect=errno.EDEADLOCK)
    assert asked == [(0, PAGE_SIZE)] * 101
    c.pin(fd, 0, PAGE_SIZE, expect=errno.EINVAL)  # no new pins while it is to go
    c.access_read(fd, 0, 4, expect=errno.EINVAL)
    access.unmap = release
    c.unmap(ioas, 0, PAGE_SIZE)
    c.unpin(fd, item, errno.ENOENT)
    check(c.world)


# ---- cutting ----


def table(c: Client, *, filled: bool = False) -> IoPagetable:
    """Four pages at 0x10000, in a table without large pages."""
    iopt = IoPagetable()
    iopt.do_disable_large_pages()
    if filled:
        iopt.add_domain(c.caller, ModelDomain(ModelIommu()))
    pages = UserPages(c.caller, c.process.buffer(4), 4 * PAGE_SIZE, writable=True)
    iopt.map_pages(c.caller, [Piece(pages, 0, 4 * PAGE_SIZE)], 4 * PAGE_SIZE, 0x10000, readable=True, writable=True)
    return iopt


@pytest.mark.parametrize("filled", [False, True])
def test_a_cut_makes_two_areas_of_the_same_pages(filled: bool) -> None:
    c = Client()
    iopt = table(c, filled=filled)
    iopt.cut(c.caller, [0x11FFF])
    left, right = iopt.areas
    assert (left.iova, left.last, right.iova, right.last) == (0x10000, 0x11FFF, 0x12000, 0x13FFF)
    assert (left.indices(), right.indices()) == ((0, 1), (2, 3))
    assert left.pages is right.pages
    assert left.pages.refs == 2
    assert left.filled == right.filled == filled
    iopt.unmap(0x10000, 0x11FFF)
    assert right.pages.npinned == (2 if filled else 0)
    iopt.unmap(0, ULONG_MAX)
    assert not c.world.memfds[0].pins


def test_cuts_that_are_not_made() -> None:
    c = Client()
    iopt = table(c)
    iopt.cut(c.caller, [0x10000, 0x13FFF, 0x5000, 0x20000])  # quirk: behind the first byte neither
    assert len(iopt.areas) == 1
    with pytest.raises(EINVAL):
        iopt.cut(c.caller, [0x11FFF, 0x127FF])
    assert len(iopt.areas) == 2  # the first stays
    area = next(iter(iopt.areas))
    area.num_accesses = 1
    with pytest.raises(EINVAL):
        iopt.cut(c.caller, [0x10FFF])
    area.num_accesses = 0
    iopt.disable_large_pages = False
    area.filled = True
    with pytest.raises(EINVAL):
        iopt.cut(c.caller, [0x10FFF])
    area.prevent_access = True
    with pytest.raises(EBUSY):
        iopt.cut(c.caller, [0x10FFF])


def test_memory_must_be_as_aligned_as_iova() -> None:
    c = Client()
    ioas = c.ioas_alloc()
    c.mock_domain(ioas)
    addr = c.process.buffer(2)
    c.map(ioas, addr + 0x400, 0x800, APERTURE, expect=errno.EINVAL)
    c.map(ioas, addr + 0x400, 0x800, expect=errno.EINVAL)
    c.map(ioas, addr + 0x800, 0x800, APERTURE)
    c.copy(ioas, ioas, APERTURE + 0x400, 0x400, APERTURE + 0x1000, expect=errno.EINVAL)


def test_large_pages_cannot_be_given_up_once_they_may_be_in_use() -> None:
    c = Client()
    ioas = c.ioas_alloc()
    c.mock_domain(ioas)
    c.map(ioas, c.process.buffer(1), PAGE_SIZE, APERTURE)
    c.option(uapi.IOMMU_OPTION_HUGE_PAGES, 0, obj=ioas, expect=errno.EINVAL)
    c.unmap(ioas, APERTURE, PAGE_SIZE)
    c.option(uapi.IOMMU_OPTION_HUGE_PAGES, 0, obj=ioas)
    c.map(ioas, c.process.buffer(1), PAGE_SIZE, APERTURE)
    c.option(uapi.IOMMU_OPTION_HUGE_PAGES, 0, obj=ioas)  # already so
    assert c.option(uapi.IOMMU_OPTION_HUGE_PAGES, obj=ioas) == 0


# ---- what a domain has ----


@given(flags=st.sampled_from([READ, WRITE, RW]), at=st.integers(0, 3 * PAGE_SIZE - 1))
def test_translate(flags: int, at: int) -> None:
    c = Client()
    ioas = c.ioas_alloc()
    mock = c.mock_domain(ioas)
    file = c.world.memfd(4)
    c.map(ioas, c.process.map(file) + 0x800, 3 * PAGE_SIZE, APERTURE, flags)
    obj = c.ictx.objects.get(mock.hwpt)
    domain = getattr(obj, "domain", None)
    assert isinstance(domain, MockPaging)
    assert domain.translation is not None
    found = domain.translation.translate(APERTURE + at)
    assert found is not None
    run, offset, readable, writable = found
    assert (run.file, run.page * PAGE_SIZE + offset) == (file, at + 0x800)
    assert (readable, writable) == (bool(flags & READ), bool(flags & WRITE))
    assert domain.translation.translate(APERTURE + 3 * PAGE_SIZE) is None
    assert domain.translation.translate(APERTURE - 1) is None


def test_check_iova() -> None:
    iopt = table(Client())
    for iova, length, error in ((0x800, PAGE_SIZE, EINVAL), (0x13000, PAGE_SIZE, EEXIST)):
        with pytest.raises(error):
            iopt.check_iova(iova, length)
    iopt.check_iova(0x14000, PAGE_SIZE)
