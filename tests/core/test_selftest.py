"""The selftest command: which checks come first, and what a wrong answer is (selftest.c)."""

import errno

import pytest

import iommufd_uapi.iommufd_test as test_uapi
from iommufd_uapi.layout import Layout
from iommufdd.user import PAGE_SIZE, ULONG_MAX

from .harness import APERTURE, DATA, NEST_PARENT, NOWHERE, OPS, Client
from .model import Bench
from .snapshot import difference, state

MIB16 = 16 << 20


@pytest.mark.parametrize(
    ("expect", "id", "op"),
    [
        (errno.EINVAL, 99, test_uapi.AddReserved(0, 0)),
        (errno.EOVERFLOW, 99, test_uapi.AddReserved(ULONG_MAX, 2)),
        (errno.ENOENT, 99, test_uapi.AddReserved(0, 1)),
        (errno.ENOENT, 99, test_uapi.CheckMap(1, 1, 1)),
        (errno.EINVAL, 4, test_uapi.CheckMap(1, 0, 0)),
        (errno.EINVAL, 4, test_uapi.CheckMap(0, 0x800, ULONG_MAX - 0x7FF)),
        (errno.EFAULT, 4, test_uapi.CheckMap(APERTURE, 0x800, NOWHERE)),
        (0, 4, test_uapi.CheckMap(APERTURE, 0, NOWHERE + 0x800)),
        (errno.EINVAL, 0, test_uapi.CheckRefs(1, 0)),
        (errno.EINVAL, 0, test_uapi.CheckRefs(PAGE_SIZE, ULONG_MAX - PAGE_SIZE + 1)),
        (errno.EFAULT, 0, test_uapi.CheckRefs(PAGE_SIZE, NOWHERE)),
        (errno.EOPNOTSUPP, 99, test_uapi.CreateAccess(flags=2)),
        (errno.ENOENT, 99, test_uapi.CreateAccess(flags=1)),
        (errno.ENOMEM, 99, test_uapi.AccessPages(flags=99, length=MIB16 + 1)),
        (errno.EOPNOTSUPP, 99, test_uapi.AccessPages(flags=2, length=MIB16)),
        (errno.ENOMEM, 99, test_uapi.AccessRw(flags=99, length=MIB16 + 1)),
        (errno.EOPNOTSUPP, 99, test_uapi.AccessRw(flags=2, length=MIB16)),
        (errno.EINVAL, 0, test_uapi.MemoryLimit(11)),
        (errno.EINVAL, 99, test_uapi.Dirty(length=PAGE_SIZE, page_size=0, uptr=DATA)),
        (errno.EINVAL, 99, test_uapi.Dirty(length=0, page_size=1, uptr=DATA)),
        (errno.EINVAL, 99, test_uapi.Dirty(length=3, page_size=2, uptr=DATA)),
        (errno.EINVAL, 99, test_uapi.Dirty(iova=1, length=2, page_size=2, uptr=DATA)),
        (errno.EINVAL, 99, test_uapi.Dirty(length=2, page_size=2, uptr=0)),
        (errno.EOVERFLOW, 99, test_uapi.Dirty(length=MIB16 * 8 + 1, page_size=1, uptr=DATA)),
        (errno.ENOENT, 99, test_uapi.Dirty(length=2, page_size=2, uptr=DATA)),
        (errno.EINVAL, 4, test_uapi.Dirty(length=2, page_size=2, uptr=DATA)),
        (errno.ENOENT, 4, test_uapi.CheckIotlb(0, 0)),
        (errno.EINVAL, 3, test_uapi.CheckDevCache(4, 0)),
        (errno.EINVAL, 3, test_uapi.CheckDevCache(0, 1)),
        (errno.ENOENT, 0, test_uapi.TriggerIopf(dev_id=2)),
        (errno.ENOENT, 0, test_uapi.TriggerVevent(4)),
        (errno.EINVAL, 2, test_uapi.PasidCheck(0, 0)),
        (errno.EINVAL, 2, test_uapi.PasidCheck(0, 1)),
        (errno.ENOENT, 2, test_uapi.PasidCheck(0, 99)),
        (errno.EINVAL, 2, test_uapi.PasidCheck(1, 4)),
        (errno.ENOENT, 3, test_uapi.PasidDetach(1)),
        (errno.EINVAL, 0, test_uapi.DmabufGet(0)),
        (errno.EINVAL, 0, test_uapi.DmabufGet(512 * PAGE_SIZE + 1)),
        (errno.EBADF, 0, test_uapi.DmabufRevoke(99)),
        (errno.EINVAL, 1, test_uapi.MockDomainFlags(dev_flags=2)),
        (errno.EINVAL, 3, test_uapi.MockDomain()),
    ],
)
def test_what_is_refused(expect: int, id: int, op: Layout) -> None:
    """On an IOAS 1, with a mock device 2, its DEVICE 3 and its HWPT 4."""
    c = Client()
    c.mock_domain(c.ioas_alloc())
    before = state(c.world)
    c.test(op, expect, id=id)
    assert not difference(before, state(c.world))


def test_operations_that_are_not() -> None:
    c = Client()
    for op in (0, max(OPS.values()) + 1, 2**32 - 1):
        c.ioctl(test_uapi.TestCmd(op=op), errno.EOPNOTSUPP)


def test_fields_nobody_looks_at_come_back_as_they_were() -> None:
    c = Client()
    ioas = c.ioas_alloc()
    union = test_uapi.MockDomainFlags().pack().ljust(48, b"\xee")
    cmd = test_uapi.TestCmd(op=OPS[test_uapi.MockDomainFlags], id=ioas, reserved=7, u=union, last=9)
    c.ioctl(cmd)
    assert (cmd.reserved, cmd.last, cmd.u[16:]) == (7, 9, b"\xee" * 32)


def test_nothing_compared_is_equal() -> None:
    c = Client()
    ioas = c.ioas_alloc()
    mock = c.mock_domain(ioas)
    c.test(test_uapi.CheckMap(APERTURE, 0, 0), id=mock.hwpt)
    c.test(test_uapi.CheckRefs(0, 0, 5))


def test_where_a_comparison_stops() -> None:
    """At the first page that differs, before one that is not there."""
    c = Client()
    ioas = c.ioas_alloc()
    mock = c.mock_domain(ioas)
    addr = c.process.buffer(2)  # and a hole behind it
    c.map(ioas, addr, 2 * PAGE_SIZE, APERTURE)
    check = test_uapi.CheckMap(APERTURE, 3 * PAGE_SIZE, addr)
    c.test(check, errno.EFAULT, id=mock.hwpt)
    c.unmap(ioas, APERTURE, 2 * PAGE_SIZE)
    c.test(check, errno.EINVAL, id=mock.hwpt)
    c.test(test_uapi.CheckRefs(3 * PAGE_SIZE, addr, 0), errno.EFAULT)
    c.test(test_uapi.CheckRefs(3 * PAGE_SIZE, addr, 1), errno.EIO)


def test_an_access_compares_its_pages_with_the_callers() -> None:
    c = Client()
    ioas = c.ioas_alloc()
    addr = c.process.buffer(2)
    c.map(ioas, addr, 2 * PAGE_SIZE, APERTURE)
    fd = c.access(ioas)
    c.test(test_uapi.AccessPages(iova=APERTURE, length=2 * PAGE_SIZE, uptr=addr), id=fd)
    op = test_uapi.AccessPages(iova=APERTURE + PAGE_SIZE, length=PAGE_SIZE, uptr=addr)
    c.test(op, errno.EBADE, id=fd)
    op.uptr = NOWHERE
    c.test(op, errno.EFAULT, id=fd)


def test_an_access_that_does_not_pin() -> None:
    c = Client()
    fd = c.access(c.ioas_alloc(), pins=False)
    c.pin(fd, 0, PAGE_SIZE, expect=errno.EOPNOTSUPP)


def test_devices_and_domains_of_other_hardware() -> None:
    bench = Bench()
    c = bench.c
    (idev,) = bench.bound(1)
    ioas = c.ioas_alloc()
    hwpt = c.hwpt(idev.id, ioas, NEST_PARENT)
    c.test(test_uapi.CheckMap(0, 0, 0), errno.EINVAL, id=hwpt)
    c.test(test_uapi.CheckDevCache(0, 0), errno.EINVAL, id=idev.id)
    c.test(test_uapi.TriggerVevent(idev.id), errno.EINVAL)


def test_any_descriptor_is_asked_whether_it_is_a_dmabuf() -> None:
    c = Client()
    c.test(test_uapi.DmabufRevoke(c.fd, 1), errno.EINVAL)


def test_the_limit_of_a_batch_is_the_machines() -> None:
    c = Client()
    c.test(test_uapi.MemoryLimit(12))
    assert c.world.machine.temp_memory_limit == 12
