"""Pinning as bookkeeping: who pays, what stays pinned, what a file keeps (pages.c)."""

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

import iommufd_uapi.iommufd as uapi
import iommufd_uapi.iommufd_test as test_uapi
from iommufdd.errors import EFAULT, EINVAL, ENOMEM, EPERM
from iommufdd.pages import Account, FilePages, Pages, UserPages, copy_runs
from iommufdd.spans import UseCounts
from iommufdd.user import PAGE_SIZE, PageRun

from .harness import APERTURE, READ, WRITE, Client, Memfd
from .invariants import check
from .snapshot import difference, state, use_counts


def user_pages(c: Client, npages: int = 8, *, writable: bool = True) -> tuple[Pages, Memfd]:
    file = c.world.memfd(npages)
    return UserPages(c.caller, c.process.map(file), npages * PAGE_SIZE, writable=writable), file


@given(st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7), st.booleans()), max_size=12))
def test_pages_are_pinned_while_anybody_uses_them(steps: list[tuple[int, int, bool]]) -> None:
    """Once each, however many use them; identities survive holes and neighbours that come and go."""
    c = Client()
    pages, file = user_pages(c)
    model = UseCounts()
    held: list[tuple[int, int]] = []
    for one, other, fill in steps:
        if fill or not held:
            held.append((min(one, other), max(one, other)))
            pages.fill(c.caller, *held[-1])
            model.add(*held[-1])
        else:
            where = held.pop(one % len(held))
            pages.unfill(*where)
            model.remove(*where)
        used = {at for lo, hi, _ in use_counts(model) for at in range(lo, hi + 1)}
        assert use_counts(pages.use) == use_counts(model)
        assert {at for lo, hi, _ in use_counts(file.pins) for at in range(lo, hi + 1)} == used
        assert all(count == 1 for _, _, count in use_counts(file.pins))
        assert pages.npinned == pages.last_npinned == c.mm.pinned_vm == len(used)
        for at in range(8):
            run = pages.page(at)
            assert (run == PageRun(file, at, 1)) if at in used else run is None
    for where in held:
        pages.unfill(*where)
    assert not file.pins
    assert file.refs == 2


def test_what_is_pinned_stays_whatever_becomes_of_the_mapping() -> None:
    c = Client()
    ioas = c.ioas_alloc()
    mock = c.mock_domain(ioas)
    file = c.world.memfd(4)
    addr = c.process.map(file)
    c.map(ioas, addr, 4 * PAGE_SIZE, APERTURE)
    other = c.world.memfd(4)
    c.mm.unmap(addr, addr + 4 * PAGE_SIZE)
    c.test(test_uapi.CheckMap(APERTURE, 4 * PAGE_SIZE, c.process.map(file)), id=mock.hwpt)
    c.test(test_uapi.CheckMap(APERTURE, 4 * PAGE_SIZE, c.process.map(other)), errno.EINVAL, id=mock.hwpt)
    file.truncate(0)
    check(c.world)
    c.unmap(ioas, APERTURE, 4 * PAGE_SIZE)
    check(c.world)


def test_a_second_domain_sees_what_the_first_has_pinned() -> None:
    c = Client()
    ioas = c.ioas_alloc()
    first = c.mock_domain(ioas)
    file, other = c.world.memfd(1), c.world.memfd(1)
    addr = c.process.map(file)
    c.map(ioas, addr, PAGE_SIZE, APERTURE)
    c.mm.unmap(addr, addr + PAGE_SIZE)
    hwpt = c.hwpt(first.idev, ioas)
    where = c.process.map(file)
    c.test(test_uapi.CheckMap(APERTURE, PAGE_SIZE, where), id=hwpt)
    c.test(test_uapi.CheckRefs(PAGE_SIZE, where, 1))
    c.test(test_uapi.CheckRefs(PAGE_SIZE, c.process.map(other), 0))


def test_pages_are_looked_up_when_the_first_domain_needs_them() -> None:
    c = Client()
    ioas = c.ioas_alloc()
    addr = c.process.buffer(2)
    c.map(ioas, addr, 2 * PAGE_SIZE, APERTURE)
    c.mm.unmap(addr + PAGE_SIZE, addr + 2 * PAGE_SIZE)
    before = state(c.world)
    c.mock_domain(ioas, expect=errno.EFAULT)
    assert not difference(before, state(c.world))
    c.mm.map(next(iter(c.mm.regions()))._replace(start=addr + PAGE_SIZE, end=addr + 2 * PAGE_SIZE))
    c.mock_domain(ioas)
    check(c.world)


def test_memory_without_the_right_cannot_be_pinned() -> None:
    c = Client()
    ioas = c.ioas_alloc()
    c.mock_domain(ioas)
    addr = c.process.map(c.world.memfd(1), writable=False)
    c.map(ioas, addr, PAGE_SIZE, APERTURE, READ | WRITE, errno.EFAULT)
    c.map(ioas, addr, PAGE_SIZE, APERTURE, WRITE, errno.EFAULT)
    c.map(ioas, addr, PAGE_SIZE, APERTURE, READ)
    c.mm.protect(addr, addr + PAGE_SIZE, readable=False, writable=True)
    c.map(ioas, addr, PAGE_SIZE, APERTURE + PAGE_SIZE, READ, errno.EFAULT)


# ---- files ----


def test_a_file_is_pinned_as_far_as_it_goes() -> None:
    c = Client()
    ioas = c.ioas_alloc()
    c.mock_domain(ioas)
    file = c.world.memfd(4)
    file.truncate(2 * PAGE_SIZE + 1)
    fd = c.process.install(file)
    c.map_file(ioas, fd, 0, 4 * PAGE_SIZE, APERTURE, expect=errno.EINVAL)
    c.map_file(ioas, fd, 0, 3 * PAGE_SIZE, APERTURE, expect=errno.EINVAL)  # memfd_pin_folios() looks at the last byte
    c.map_file(ioas, fd, 0, 2 * PAGE_SIZE, APERTURE)
    check(c.world)


def test_a_mapping_keeps_its_file_open() -> None:
    c = Client()
    ioas = c.ioas_alloc()
    file = c.world.memfd(4)
    fd = c.process.install(file)
    c.map_file(ioas, fd, PAGE_SIZE, PAGE_SIZE, 0)
    c.fds.close(fd)
    assert file.refs == 2
    c.access_write(c.access(ioas), 0, b"hello")
    assert file.pread(PAGE_SIZE, 5) == b"hello"
    c.unmap(ioas, 0, PAGE_SIZE)
    assert file.refs == 1


def test_a_file_that_is_no_memfd_is_taken_until_it_must_be_pinned() -> None:
    c = Client()
    ioas = c.ioas_alloc()
    c.map_file(ioas, c.fault_queue()[1], 0, PAGE_SIZE, APERTURE)
    c.mock_domain(ioas, expect=errno.EINVAL)
    c.access_read(c.access(ioas), APERTURE, 4, expect=errno.EINVAL)


def test_lengths_that_cannot_be_rounded() -> None:
    c = Client()
    for length in (0, 2**64 - PAGE_SIZE):
        with pytest.raises(EINVAL):
            UserPages(c.caller, 0, length, writable=True)
    assert UserPages(c.caller, 0, 2**64 - 1 - PAGE_SIZE, writable=True).npages == 2**52 - 1
    assert UserPages(c.caller, 0x1FFF, 2, writable=True).npages == 2


# ---- accesses ----


def test_accesses_to_the_same_range_share_a_pin() -> None:
    c = Client()
    pages, file = user_pages(c)
    pages.add_access(c.caller, 1, 3, write=False)
    pages.add_access(c.caller, 1, 3, write=True)
    pages.add_access(c.caller, 2, 5, write=False)
    assert use_counts(pages.use) == [(1, 1, 1), (2, 3, 2), (4, 5, 1)]
    assert use_counts(file.pins) == [(1, 5, 1)]
    pages.remove_access(1, 3)
    assert use_counts(file.pins) == [(1, 5, 1)]
    pages.remove_access(1, 3)
    pages.remove_access(2, 5)
    assert not file.pins


def test_read_only_pages_are_not_written() -> None:
    c = Client()
    pages, _ = user_pages(c, writable=False)
    with pytest.raises(EPERM):
        pages.add_access(c.caller, 0, 0, write=True)
    with pytest.raises(EPERM):
        pages.rw(c.caller, 0, bytearray(1), write=True, slow=False)


def test_memory_of_the_caller_that_is_gone() -> None:
    c = Client()
    pages, _ = user_pages(c, 2)
    c.mm.unmap(pages.start + PAGE_SIZE, pages.start + 2 * PAGE_SIZE)
    for slow in (False, True):
        with pytest.raises(EFAULT):
            pages.rw(c.caller, PAGE_SIZE - 2, bytearray(4), write=False, slow=slow)
    file = FilePages(c.caller, c.world.memfd(1), 0, PAGE_SIZE, writable=False)
    with pytest.raises(EPERM):
        file.rw(c.caller, 0, bytearray(4), write=True, slow=False)
    file.put()


def test_the_caller_reads_what_is_mapped_now_and_the_slow_path_what_is_pinned() -> None:
    """quirk: iopt_pages_rw_access() of one's own mm ignores pins."""
    c = Client()
    pages, file = user_pages(c, 1)
    file.pwrite(0, b"pinned")
    pages.fill(c.caller, 0, 0)
    other = c.world.memfd(1)
    other.pwrite(0, b"mapped")
    region = c.mm.find(pages.start)
    assert region is not None
    c.mm.map(region._replace(file=other))
    for slow, expected in ((False, b"mapped"), (True, b"mapped")):  # one page: looked up again as well
        data = bytearray(6)
        pages.rw(c.caller, 0, data, write=False, slow=slow)
        assert data == expected
    pages.mm.alive = False
    data = bytearray(6)
    pages.rw(c.process.fork().caller, 0, data, write=False, slow=False)
    assert data == b"pinned"
    pages.unfill(0, 0)


def test_two_pages_of_another_process_come_from_where_they_are_pinned() -> None:
    c = Client()
    pages, file = user_pages(c, 2)
    file.pwrite(PAGE_SIZE - 3, b"pinned")
    pages.fill(c.caller, 0, 0)
    other = c.process.fork().caller
    c.mm.unmap(pages.start, pages.start + PAGE_SIZE)
    data = bytearray(6)
    pages.rw(other, PAGE_SIZE - 3, data, write=False, slow=False)  # the second page is looked up
    assert data == b"pinned"
    c.mm.unmap(pages.start, pages.start + 2 * PAGE_SIZE)
    with pytest.raises(EFAULT):
        pages.rw(other, PAGE_SIZE - 3, data, write=False, slow=False)
    pages.unfill(0, 0)


def test_what_a_file_has_lost_reads_as_zero() -> None:
    file = Memfd(1)
    file.pwrite(0, b"abc")
    file.truncate(2)
    data = bytearray(b"\xff" * 4)
    copy_runs([PageRun(file, 0, 1)], 0, data, write=False)
    assert data == b"ab\0\0"


# ---- accounting ----


def test_the_limit_is_of_the_user_by_default() -> None:
    c = Client()
    c.caller.task.cap_ipc_lock = False
    c.caller.task.memlock = 5 * PAGE_SIZE
    other = Client(c.world.process(privileged=False, memlock=5 * PAGE_SIZE))
    for client in (c, other):
        ioas = client.ioas_alloc()
        client.mock_domain(ioas)
        addr = client.process.buffer(4)
        before = state(c.world)
        client.map(ioas, addr, 4 * PAGE_SIZE, APERTURE, expect=0 if client is c else errno.ENOMEM)
        assert client is c or not difference(before, state(c.world))
    assert c.caller.task.user.locked_vm == 4
    assert (c.mm.pinned_vm, c.mm.locked_vm) == (4, 0)


def test_by_process_each_has_a_limit_of_its_own() -> None:
    world = Client().world
    for _ in range(2):
        process = world.process(memlock=5 * PAGE_SIZE)
        c = Client(process)
        c.option(uapi.IOMMU_OPTION_RLIMIT_MODE, 1)
        process.caller.task.cap_ipc_lock = False
        ioas = c.ioas_alloc()
        c.mock_domain(ioas)
        c.map(ioas, process.buffer(4), 4 * PAGE_SIZE, APERTURE)
        c.map(ioas, process.buffer(4), 2 * PAGE_SIZE, APERTURE + 4 * PAGE_SIZE, expect=errno.ENOMEM)
        assert (process.mm.pinned_vm, process.mm.locked_vm) == (4, 4)
        assert process.caller.task.user.locked_vm == 0
    check(world)


def test_the_capability_counts_when_the_memory_is_mapped() -> None:
    c = Client()
    c.caller.task.memlock = 0
    ioas = c.ioas_alloc()
    c.map(ioas, c.process.buffer(4), 4 * PAGE_SIZE, APERTURE)
    c.caller.task.cap_ipc_lock = False
    c.mock_domain(ioas)
    c.map(ioas, c.process.buffer(1), PAGE_SIZE, APERTURE + 4 * PAGE_SIZE, expect=errno.ENOMEM)


def test_the_limit_of_who_mapped_counts_whoever_calls() -> None:
    c = Client()
    c.caller.task.cap_ipc_lock = False
    c.caller.task.memlock = lambda: 2 * PAGE_SIZE
    ioas = c.ioas_alloc()
    c.map(ioas, c.process.buffer(4), 4 * PAGE_SIZE, APERTURE)
    rich = Client(c.process.fork(), ictx=c.ictx)
    rich.caller.task.memlock = 8 << 20
    rich.mock_domain(ioas, expect=errno.ENOMEM)
    c.caller.task.memlock = 4 * PAGE_SIZE
    rich.mock_domain(ioas)


def test_a_process_that_is_gone_keeps_its_charge() -> None:
    """quirk: update_unpinned() drops the error of a dead mm; uncounted are pages of users only."""
    c = Client()
    child = Client(c.process.fork(), ictx=c.ictx)
    c.option(uapi.IOMMU_OPTION_RLIMIT_MODE, 1)
    child.caller.task.cap_ipc_lock = False
    ioas = c.ioas_alloc()
    c.mock_domain(ioas)
    child.map_file(ioas, child.process.install(c.world.memfd(4)), 0, 4 * PAGE_SIZE, APERTURE)
    assert (child.mm.pinned_vm, child.mm.locked_vm) == (4, 4)
    child.process.exit()
    c.unmap(ioas, APERTURE, 4 * PAGE_SIZE)
    assert (child.mm.pinned_vm, child.mm.locked_vm) == (4, 4)
    assert not c.world.memfds[-1].pins


def test_pages_of_a_process_that_is_gone_cannot_be_pinned() -> None:
    c = Client()
    child = Client(c.process.fork(), ictx=c.ictx)
    ioas = c.ioas_alloc()
    child.map(ioas, child.process.buffer(1), PAGE_SIZE, APERTURE)
    child.process.exit()
    c.mock_domain(ioas, expect=errno.EFAULT)


def test_copies_share_pins_and_charge() -> None:
    c = Client()
    c.caller.task.cap_ipc_lock = False
    src, dst = c.ioas_alloc(), c.ioas_alloc()
    for ioas in (src, dst):
        c.mock_domain(ioas)
    c.map(src, c.process.buffer(4), 4 * PAGE_SIZE, APERTURE)
    c.copy(dst, src, APERTURE + PAGE_SIZE, 2 * PAGE_SIZE, APERTURE)
    assert c.caller.task.user.locked_vm == 4
    c.unmap(src, APERTURE, 4 * PAGE_SIZE)
    assert c.caller.task.user.locked_vm == 2
    assert use_counts(c.world.memfds[-1].pins) == [(1, 2, 1)]
    check(c.world)


def test_a_charge_that_fails_unpins() -> None:
    c = Client()
    pages, file = user_pages(c)
    pages.account = Account.USER
    c.caller.task.memlock = 2 * PAGE_SIZE
    pages.fill(c.caller, 0, 1)
    with pytest.raises(ENOMEM):
        pages.fill(c.caller, 0, 4)
    assert use_counts(file.pins) == [(0, 1, 1)]
    assert use_counts(pages.use) == [(0, 1, 1)]
    pages.unfill(0, 1)


def test_file_pages_are_counted_from_where_they_start() -> None:
    c = Client()
    file = c.world.memfd(8)
    pages = FilePages(c.caller, file, 3 * PAGE_SIZE + 5, 2 * PAGE_SIZE, writable=True)
    assert pages.npages == 3
    pages.fill(c.caller, 1, 2)
    assert use_counts(file.pins) == [(4, 5, 1)]
    pages.unfill(1, 2)
    pages.put()
    assert file.refs == 1
