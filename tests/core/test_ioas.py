"""IOAS ioctls: what is told with an error, options, and what outlives what (ioas.c)."""

import errno

import pytest

import iommufd_uapi.iommufd as uapi
import iommufd_uapi.iommufd_test as test_uapi
from iommufdd.mm import Region
from iommufdd.user import PAGE_SIZE, ULONG_MAX

from .harness import APERTURE, DATA, FIXED, NEST_PARENT, NOWHERE, OPS, READ, RW, Client
from .invariants import check
from .snapshot import difference, state

RLIMIT, HUGE = uapi.IOMMU_OPTION_RLIMIT_MODE, uapi.IOMMU_OPTION_HUGE_PAGES


def test_too_little_room_still_tells_how_much_is_needed() -> None:
    c = Client()
    ioas = c.ioas_alloc()
    c.reserve(ioas, 0x1000, 0x1000)
    c.reserve(ioas, 0x4000, 0x1000)
    c.process.put(b"\xee" * 64)
    cmd = uapi.IoasIovaRanges(ioas_id=ioas, num_iovas=2, allowed_iovas=DATA)
    c.ioctl(cmd, errno.EMSGSIZE)
    assert (cmd.num_iovas, cmd.out_iova_alignment) == (3, 1)
    assert c.mm.read(DATA, 64) == uapi.IovaRange(0, 0xFFF).pack() + uapi.IovaRange(0x2000, 0x3FFF).pack() + b"\xee" * 32
    c.ioctl(uapi.IoasIovaRanges(ioas_id=ioas, num_iovas=2, allowed_iovas=NOWHERE), errno.EFAULT)
    c.ioctl(uapi.IoasIovaRanges(ioas_id=ioas, allowed_iovas=NOWHERE), errno.EMSGSIZE)
    assert c.ranges(ioas)[-1] == (0x5000, ULONG_MAX)


def test_all_reserved_is_no_range() -> None:
    c = Client()
    ioas = c.ioas_alloc()
    c.reserve(ioas, 0, ULONG_MAX)
    assert c.ranges(ioas) == [(ULONG_MAX, ULONG_MAX)]
    c.reserve(ioas, ULONG_MAX, 1)
    assert c.ranges(ioas) == []
    c.map(ioas, c.process.buffer(1), PAGE_SIZE, expect=errno.ENOSPC)


def test_the_list_of_allowed_ranges_is_copied_entry_by_entry() -> None:
    """So a bad entry comes before memory that is not there."""
    c = Client()
    ioas = c.ioas_alloc()
    addr = c.process.buffer(1)
    c.mm.write(addr + PAGE_SIZE - 16, uapi.IovaRange(5, 5).pack())
    cmd = uapi.IoasAllowIovas(ioas_id=ioas, num_iovas=2, allowed_iovas=addr + PAGE_SIZE - 16)
    c.ioctl(cmd, errno.EINVAL)
    c.mm.write(addr + PAGE_SIZE - 16, uapi.IovaRange(5, 6).pack())
    before = state(c.world)
    c.ioctl(cmd, errno.EFAULT)
    assert not difference(before, state(c.world))


def test_huge_counts_do_not_read_forever() -> None:
    c = Client()
    ioas = c.ioas_alloc()
    spans = b"".join(uapi.IovaRange(2 * n, 2 * n + 1).pack() for n in range(2048))
    c.process.put(spans)
    c.ioctl(uapi.IoasAllowIovas(ioas_id=ioas, num_iovas=2**32 - 1, allowed_iovas=DATA), errno.EINVAL)


@pytest.mark.parametrize(
    ("expect", "fields"),
    [
        (errno.EOPNOTSUPP, {"flags": 8, "length": ULONG_MAX, "ioas_id": 99}),
        (errno.EOPNOTSUPP, {"reserved": 1, "flags": 0}),
        (errno.EOVERFLOW, {"length": ULONG_MAX, "flags": 0}),
        (errno.EOVERFLOW, {"iova": ULONG_MAX, "flags": 0}),
        (errno.EINVAL, {"flags": 0, "ioas_id": 99}),
        (errno.ENOENT, {"ioas_id": 99, "user_va": ULONG_MAX}),
        (errno.EOVERFLOW, {"user_va": ULONG_MAX, "length": 0x1000}),
        (errno.EINVAL, {"length": 0}),
        (errno.EINVAL, {"length": ULONG_MAX - 0xFFF, "user_va": 0}),
        (errno.EOVERFLOW, {"flags": RW, "length": 1 << 63, "user_va": 0}),
        (errno.EOVERFLOW, {"iova": ULONG_MAX - 1}),
        (0, {"iova": 0, "length": 1}),
    ],
)
def test_the_order_of_checks_of_map(expect: int, fields: dict[str, int]) -> None:
    c = Client()
    cmd = uapi.IoasMap(flags=RW | FIXED, ioas_id=c.ioas_alloc(), user_va=0x1000, length=PAGE_SIZE)
    for name, value in fields.items():
        setattr(cmd, name, value)
    before = state(c.world)
    c.ioctl(cmd, expect)
    assert bool(difference(before, state(c.world))) == (not expect)


def test_a_source_of_copy_is_looked_at_before_the_destination() -> None:
    c = Client()
    src = c.ioas_alloc()
    c.map(src, c.process.buffer(2), 2 * PAGE_SIZE, 0x10000)
    before = state(c.world)
    c.copy(99, src, 0x20000, PAGE_SIZE, expect=errno.ENOENT)
    c.copy(99, src, 0x10000, 0, expect=errno.EINVAL)
    c.copy(99, src, 0x10000, PAGE_SIZE, expect=errno.ENOENT)  # the pieces are given back
    c.copy(src, 99, 0x10000, PAGE_SIZE, expect=errno.ENOENT)
    c.copy(src, src, 0x10000, 3 * PAGE_SIZE, expect=errno.ENOENT)
    c.copy(src, src, ULONG_MAX - 1, PAGE_SIZE, expect=errno.EOVERFLOW)
    assert not difference(before, state(c.world))


@pytest.mark.parametrize(
    ("iova", "length", "expect"),
    [
        (ULONG_MAX, 1, errno.EOVERFLOW),
        (0, ULONG_MAX - 1, 0),
        (1, ULONG_MAX, errno.EOVERFLOW),
        (0, 0, errno.EINVAL),
        (3, ULONG_MAX - 1, errno.EOVERFLOW),
        (0, ULONG_MAX, 0),
    ],
)
def test_the_ranges_of_unmap(iova: int, length: int, expect: int) -> None:
    """(0, all ones) is everything; any other all ones is too much."""
    c = Client()
    ioas = c.ioas_alloc()
    c.map(ioas, c.process.buffer(1), PAGE_SIZE, 0x10000)
    c.unmap(ioas, iova, length, expect)
    c.unmap(ioas, 0x10000, PAGE_SIZE, errno.ENOENT if not expect else 0)


def test_the_syzkaller_flag_names_an_area_by_its_number() -> None:
    """{u32 nth, u32 offset}; 0 when there are fewer. Only in a kernel built for its selftest."""
    c = Client()
    src, dst = c.ioas_alloc(), c.ioas_alloc()
    for n in range(2):
        c.map(src, c.process.buffer(1), PAGE_SIZE, 0x10000 * (n + 1))
    syz = test_uapi.MOCK_FLAGS_ACCESS_SYZ
    c.copy(dst, src, 1 | 0x800 << 32, 0x800, 0, RW | syz)
    c.copy(dst, src, 2, 0x800, 0x1000, RW | syz, errno.ENOENT)  # IOVA 0
    c.copy(dst, 99, 0, 0x800, 0x1000, RW | syz, errno.ENOENT)
    fd = c.access(src)
    c.access_write(c.access(dst, pins=False), 0, b"second")
    op = test_uapi.AccessRw(iova=1 | 0x800 << 32, length=6, uptr=DATA, flags=syz)
    c.test(op, id=fd)
    assert c.mm.read(DATA, 6) == b"second"
    c.test(test_uapi.AccessPages(flags=syz, iova=1, length=PAGE_SIZE), id=fd)
    check(c.world)


def test_a_copy_outlives_its_source() -> None:
    c = Client()
    src, dst = c.ioas_alloc(), c.ioas_alloc()
    addr = c.process.buffer(2)
    c.map(src, addr, 2 * PAGE_SIZE, 0x10000, READ)
    c.copy(dst, src, 0x10800, 0x1000, 0, READ)
    c.destroy(src)
    c.mm.write(addr + 0x800, b"still there")
    assert c.access_read(c.access(dst, pins=False), 0, 11) == b"still there"
    check(c.world)


# ---- files ----


def test_descriptors_that_cannot_be_mapped() -> None:
    c = Client()
    ioas = c.ioas_alloc()
    for fd, expect in ((-1, errno.EBADF), (99, errno.EBADF)):
        c.map_file(ioas, fd, 0, PAGE_SIZE, 0, expect=expect)
    c.map_file(ioas, 99, 0, 0, 0, expect=errno.EINVAL)
    c.map_file(ioas, 99, ULONG_MAX, 2, 0, expect=errno.EOVERFLOW)


class Dmabufs:
    """dma-bufs of the selftest."""

    def __init__(self) -> None:
        self.c = Client()

    def get(self, npages: int = 4) -> int:
        op = test_uapi.DmabufGet(npages * PAGE_SIZE)
        return self.c.result(test_uapi.TestCmd(op=OPS[test_uapi.DmabufGet], u=op.pack()))

    def revoke(self, fd: int, *, revoked: bool = True) -> None:
        self.c.test(test_uapi.DmabufRevoke(fd, revoked))


def test_a_revoked_dmabuf_leaves_every_domain_and_its_place_stays() -> None:
    bufs = Dmabufs()
    c = bufs.c
    fd = bufs.get()
    ioas = c.ioas_alloc()
    mock = c.mock_domain(ioas)
    iova = c.map_file(ioas, fd, PAGE_SIZE, 2 * PAGE_SIZE)
    other = c.process.buffer(1)
    c.test(test_uapi.CheckMap(iova, PAGE_SIZE, other), errno.EINVAL, id=mock.hwpt)
    bufs.revoke(fd)
    c.map_file(ioas, fd, 0, PAGE_SIZE, expect=errno.ENODEV)
    c.map(ioas, other, PAGE_SIZE, iova, expect=errno.EEXIST)
    c.hwpt(mock.idev, ioas)  # a new domain shows nothing there
    bufs.revoke(fd, revoked=False)
    c.map_file(ioas, fd, 0, PAGE_SIZE)  # what was mapped before stays away
    c.fds.close(fd)
    check(c.world)
    c.unmap(ioas, 0, ULONG_MAX)


def test_the_cpu_does_not_touch_a_dmabuf() -> None:
    bufs = Dmabufs()
    c = bufs.c
    ioas = c.ioas_alloc()
    c.map_file(ioas, bufs.get(), 0, PAGE_SIZE, 0, READ)
    fd = c.access(ioas)
    c.access_read(fd, 0, 4, expect=errno.EINVAL)
    c.access_write(fd, 0, b"1234", expect=errno.EPERM)
    c.pin(fd, 0, PAGE_SIZE, expect=errno.EINVAL)
    check(c.world)


def test_the_end_of_a_dmabuf() -> None:
    bufs = Dmabufs()
    c = bufs.c
    fd, ioas = bufs.get(), c.ioas_alloc()
    before = state(c.world)
    c.map_file(ioas, fd, PAGE_SIZE, 4 * PAGE_SIZE, 0, expect=errno.EINVAL)
    assert not difference(before, state(c.world))
    c.map_file(ioas, fd, PAGE_SIZE, 3 * PAGE_SIZE, 0)
    check(c.world)


# ---- options ----


def test_the_mode_is_chosen_before_anything_is_made() -> None:
    c = Client()
    assert c.option(RLIMIT) == 0
    assert c.option(RLIMIT, 1) == 1
    ioas = c.ioas_alloc()
    c.option(RLIMIT, 0, expect=errno.EBUSY)
    c.option(RLIMIT, 5, expect=errno.EBUSY)
    c.destroy(ioas)
    c.option(RLIMIT, 5, expect=errno.EINVAL)
    c.caller.task.cap_sys_resource = False
    c.option(RLIMIT, 5, expect=errno.EPERM)
    assert c.option(RLIMIT) == 1
    c.option(RLIMIT, obj=1, expect=errno.EOPNOTSUPP)


def test_a_tombstone_counts_as_something_made() -> None:
    """xa_empty() sees its id."""
    c = Client()
    ioas = c.ioas_alloc()
    mock = c.mock_domain(ioas)
    parent = c.hwpt(mock.idev, ioas, NEST_PARENT)
    viommu = c.viommu(mock.idev, parent)
    c.vdevice(viommu, mock.idev, 1)
    c.destroy(mock.stdev)
    for obj in (viommu, parent, ioas):
        c.destroy(obj)
    assert not list(c.ictx.objects)
    c.option(RLIMIT, 1, expect=errno.EBUSY)


@pytest.mark.parametrize(
    ("expect", "fields"),
    [
        (errno.EOPNOTSUPP, {"option_id": 2, "object_id": 99}),
        (errno.EOPNOTSUPP, {"op": 2, "option_id": RLIMIT}),
        (errno.EOPNOTSUPP, {"op": 2, "option_id": HUGE, "object_id": 1}),
        (errno.ENOENT, {"op": 2, "option_id": HUGE, "object_id": 99}),
        (errno.EINVAL, {"val64": 2, "option_id": HUGE, "object_id": 1}),
        (errno.EOPNOTSUPP, {"reserved": 1}),
    ],
)
def test_options_that_are_not(expect: int, fields: dict[str, int]) -> None:
    c = Client()
    c.ioas_alloc()
    cmd = uapi.Option()
    for name, value in fields.items():
        setattr(cmd, name, value)
    c.ioctl(cmd, expect)


def test_only_the_value_of_an_option_is_written() -> None:
    c = Client()
    first, second = c.world.memfd(1), c.world.memfd(1)
    addr = c.process.map(first)
    end = addr + PAGE_SIZE
    c.mm.map(Region(end, end + PAGE_SIZE, second, 0, readable=True, writable=True))
    cmd = uapi.Option(option_id=RLIMIT, op=uapi.IOMMU_OPTION_OP_GET)
    c.mm.write(end - 16, cmd.pack())  # the value begins the second page
    c.mm.protect(addr, end, readable=True, writable=False)
    assert c.rc(uapi.Option.CMD, end - 16) == 0


def test_parts_that_no_table_entry_is_small_enough_for_are_not_copied_to_a_domain() -> None:
    """quirk: the alignment of all parts together is checked, then the table refuses one."""
    c = Client()
    src, dst = c.ioas_alloc(), c.ioas_alloc()
    c.mock_domain(dst)
    addr = c.process.buffer(1)
    c.map(src, addr, 0x400, APERTURE)
    c.map(src, addr, 0xC00, APERTURE + 0x400)
    before = state(c.world)
    c.copy(dst, src, APERTURE, PAGE_SIZE, APERTURE, expect=errno.ENXIO)
    assert not difference(before, state(c.world))
