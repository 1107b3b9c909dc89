"""Accesses: several on one IOAS, over several areas, in processes that are not the one that mapped (device.c)."""

import errno

import pytest

import iommufd_uapi.iommufd_test as test_uapi
from iommufdd.access import Access
from iommufdd.errors import EBUSY, EINVAL, ENOENT
from iommufdd.ioas import Ioas
from iommufdd.user import PAGE_SIZE, ULONG_MAX, PageRun

from .harness import READ, WRITE, Client
from .invariants import check
from .snapshot import difference, state, use_counts


def mapped(c: Client, *pieces: tuple[int, int]) -> int:
    """An IOAS with areas (iova, bytes) one behind the other in one memfd."""
    ioas = c.ioas_alloc()
    file = c.world.memfd(16)
    addr = c.process.map(file)
    for iova, length in pieces:
        c.map(ioas, addr, length, iova)
        addr += length
    return ioas


def access_of(c: Client, ioas_id: int, *, pins: bool = True) -> Access:
    """An access of a driver in the kernel, which here never lets go by itself."""
    access = c.ictx.objects.alloc(Access(pins=pins, unmap=lambda iova, length: None), c.gate)
    c.ictx.objects.finalize(access)
    ioas = c.ictx.objects.get(ioas_id)
    assert isinstance(ioas, Ioas)
    access.change_ioas(c.caller, ioas)
    return access


def test_pages_of_several_areas_come_in_the_order_of_iova() -> None:
    c = Client()
    ioas = mapped(c, (0x4000, 0x2000), (0x6000, 0x1000), (0x7000, 0x3000))
    file = c.world.memfds[0]
    access = access_of(c, ioas)
    runs = access.pin_pages(c.caller, 0x5000, 0x3000, write=True)
    assert runs == [PageRun(file, 1, 1), PageRun(file, 2, 1), PageRun(file, 3, 1)]
    assert use_counts(file.pins) == [(1, 3, 1)]
    access.unpin_pages(0x5000, 0x3000)
    assert not file.pins


@pytest.mark.parametrize(("iova", "length", "expect"), [(0x4000, 0x9000, ENOENT), (0x3000, 0x1000, ENOENT)])
def test_a_hole_undoes_what_was_pinned_before_it(iova: int, length: int, expect: type[Exception]) -> None:
    c = Client()
    access = access_of(c, mapped(c, (0x4000, 0x2000), (0x8000, 0x4000)))
    with pytest.raises(expect):
        access.pin_pages(c.caller, iova, length, write=False)
    assert not c.world.memfds[0].pins


def test_only_the_last_page_may_be_cut() -> None:
    c = Client()
    ioas = c.ioas_alloc()
    addr = c.process.buffer(4)
    c.map(ioas, addr, 0x1800, 0x4000)
    c.map(ioas, addr + 0x1800, 0x800, 0x5800)
    obj = c.ictx.objects.get(ioas)
    assert isinstance(obj, Ioas)
    access = Access(pins=False, unmap=None)  # aligned to bytes: the IOAS takes it
    access.change_ioas(c.caller, obj)
    for iova, length in ((0x4800, 0x100), (0x4000, 0x1900)):
        with pytest.raises(EINVAL):
            access.pin_pages(c.caller, iova, length, write=False)
    access.pin_pages(c.caller, 0x4000, 0x1800, write=False)
    access.unpin_pages(0x4000, 0x1800)


def test_rights_are_those_of_each_area() -> None:
    c = Client()
    ioas = c.ioas_alloc()
    addr = c.process.buffer(4)
    c.map(ioas, addr, PAGE_SIZE, 0x4000)
    c.map(ioas, addr, PAGE_SIZE, 0x5000, READ)
    c.map(ioas, addr, PAGE_SIZE, 0x6000, WRITE)
    fd = c.access(ioas)
    before = state(c.world)
    for iova, write in ((0x5000, True), (0x6000, False)):
        c.pin(fd, 0x4000, iova - 0x3000, write=write, expect=errno.EPERM)
    c.access_write(fd, 0x4000, bytes(2 * PAGE_SIZE), expect=errno.EPERM)
    assert not difference(before, state(c.world))
    c.pin(fd, 0x4000, 2 * PAGE_SIZE)
    check(c.world)


def test_what_comes_before_the_offending_area_has_been_copied() -> None:
    c = Client()
    ioas = mapped(c, (0x4000, 0x1000))
    fd = c.access(ioas)
    c.access_write(fd, 0x4FFE, b"abcd", expect=errno.ENOENT)
    assert c.access_read(fd, 0x4FFE, 2) == b"ab"


@pytest.mark.parametrize("slow", [False, True])
def test_a_copy_goes_over_several_areas(slow: bool) -> None:
    c = Client()
    fd = c.access(mapped(c, (0x4000, 0x1000), (0x5000, 0x1000), (0x6000, 0x2000)))
    data = bytes(n % 251 for n in range(0x2800))
    c.access_write(fd, 0x4800, data, slow=slow)
    assert c.world.memfds[0].pread(0x800, 0x2800) == data
    assert c.access_read(fd, 0x4800, 0x2800, slow=slow) == data


def test_unmap_tells_every_access_of_the_ioas() -> None:
    c = Client()
    ioas, other = mapped(c, (0x4000, 0x2000)), mapped(c, (0x4000, 0x2000))
    one, two, elsewhere = c.access(ioas), c.access(ioas), c.access(other)
    items = [c.pin(fd, 0x4000, 0x1000) for fd in (one, two, elsewhere)]
    c.unmap(ioas, 0x4000, 0x2000)
    c.unpin(one, items[0], errno.ENOENT)
    c.unpin(two, items[1], errno.ENOENT)
    c.unpin(elsewhere, items[2])
    check(c.world)


def test_unmap_of_what_nobody_has_pinned_tells_nobody() -> None:
    c = Client()
    ioas = mapped(c, (0x4000, 0x2000), (0x6000, 0x2000))
    fd = c.access(ioas)
    item = c.pin(fd, 0x4000, 0x1000)
    c.unmap(ioas, 0x6000, 0x2000)
    c.unpin(fd, item)


def test_moving_to_another_ioas_lets_everything_go() -> None:
    c = Client()
    ioas, other = mapped(c, (0x4000, 0x2000)), mapped(c, (0x4000, 0x2000))
    fd = c.access(ioas)
    item = c.pin(fd, 0x4000, 0x1000)
    c.test(test_uapi.AccessReplaceIoas(other), id=fd)
    c.unpin(fd, item, errno.ENOENT)
    assert not c.world.memfds[0].pins
    c.destroy(ioas)
    c.pin(fd, 0x4000, 0x1000)
    c.destroy(other, errno.EBUSY)
    check(c.world)


def test_moving_to_the_same_ioas_lets_nothing_go() -> None:
    c = Client()
    ioas = mapped(c, (0x4000, 0x2000))
    fd = c.access(ioas)
    item = c.pin(fd, 0x4000, 0x1000)
    c.test(test_uapi.AccessReplaceIoas(ioas), id=fd)
    c.unpin(fd, item)


def test_an_ioas_that_is_too_fine_refuses_and_the_old_one_stays() -> None:
    c = Client()
    ioas, fine = mapped(c, (0x4000, 0x2000)), mapped(c, (0x4000, 0x800))
    fd = c.access(ioas)
    c.pin(fd, 0x4000, 0x1000)
    before = state(c.world)
    c.test(test_uapi.AccessReplaceIoas(fine), errno.EADDRINUSE, id=fd)
    assert not difference(before, state(c.world))


def test_places_of_accesses_that_went_are_used_again() -> None:
    c = Client()
    ioas = c.ioas_alloc()
    one, two = c.access(ioas), c.access(ioas)
    c.fds.close(one)
    three = c.access(ioas)
    obj = c.ictx.objects.get(ioas)
    assert isinstance(obj, Ioas)
    assert [access is not None for access in obj.iopt.accesses] == [True, True]
    for fd in (two, three):
        c.fds.close(fd)
    check(c.world)


def test_an_access_file_works_on_the_context_it_was_made_in() -> None:
    c = Client()
    other = Client(c.process)
    ioas, elsewhere = mapped(c, (0x4000, 0x2000)), other.ioas_alloc()
    assert ioas == elsewhere
    fd = c.access(ioas)
    other.pin(fd, 0x4000, 0x1000)
    other.test(test_uapi.AccessReplaceIoas(elsewhere), id=fd)  # an id of the access's own context
    c.close()
    other.pin(fd, 0x4000, 0x1000)
    assert len(c.ictx.objects) == 2
    check(c.world)


@pytest.mark.parametrize("kind", ["closed", "context", "memfd", "queue"])
def test_any_other_descriptor_is_no_access(kind: str) -> None:
    c = Client()
    fd = {
        "closed": 99,
        "context": c.fd,
        "memfd": c.process.install(c.world.memfd()),
        "queue": c.fault_queue()[1],
    }[kind]
    c.pin(fd, 0, PAGE_SIZE, expect=errno.EBADFD)
    c.test(test_uapi.AccessReplaceIoas(1), errno.EBADFD, id=fd)
    c.unpin(fd, 0, errno.EBADFD)
    c.access_read(fd, 0, 1, expect=errno.EBADFD)


def test_other_pages_than_the_callers_are_not_kept() -> None:
    c = Client()
    ioas = mapped(c, (0x4000, 0x2000))
    fd = c.access(ioas)
    op = test_uapi.AccessPages(iova=0x4000, length=0x1000, uptr=c.process.buffer(1))
    before = state(c.world)
    c.test(op, errno.EBADE, id=fd)
    assert not difference(before, state(c.world))


def test_the_end_of_an_access_in_use() -> None:
    c = Client()
    ioas = mapped(c, (0x4000, 0x2000))
    fd = c.access(ioas)
    c.pin(fd, 0x4000, 0x1000)
    access = next(obj for obj in c.ictx.objects if isinstance(obj, Access))
    with pytest.raises(EBUSY):
        c.ictx.objects.remove(access.id)
    c.fds.close(fd)
    assert not c.world.memfds[0].pins
    assert c.ictx.objects.get(access.id) is None
    c.destroy(ioas)


def test_arithmetic_that_wraps() -> None:
    c = Client()
    fd = c.access(mapped(c, (0x4000, 0x2000)))
    c.pin(fd, ULONG_MAX - PAGE_SIZE + 1, 2 * PAGE_SIZE, expect=errno.EOVERFLOW)
    c.pin(fd, ULONG_MAX - PAGE_SIZE + 1, PAGE_SIZE, expect=errno.ENOENT)  # the last page there is
    c.pin(fd, 0x4000, 0, expect=errno.EINVAL)
    c.access_read(fd, ULONG_MAX, 2, expect=errno.EOVERFLOW)
    c.access_read(fd, 0x4000, 0, expect=errno.EINVAL)
    c.pin(fd, 0x4000, (16 << 20) + 1, expect=errno.ENOMEM)
