"""The dirty bitmap in the caller's memory, against bits set one by one (iova_bitmap.c); and who may ask for it."""

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

import iommufd_uapi.iommufd as uapi
import iommufd_uapi.iommufd_test as test_uapi
from iommufdd.iova_bitmap import IovaBitmap
from iommufdd.mm import Region
from iommufdd.user import PAGE_SIZE, ULONG_MAX

from .harness import APERTURE, DATA, DIRTY, NOWHERE, OPS, Client
from .snapshot import difference, state

NO_CLEAR = uapi.IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR


@st.composite
def bitmaps(draw: st.DrawFn) -> tuple[int, int, int, list[tuple[int, int]]]:
    """(iova, pages, page size, ascending stretches in bits)"""
    page_size = draw(st.sampled_from([1 << 11, 1 << 12, 1 << 21, 3 << 12, 1, 5]))
    bit = page_size & -page_size
    npages = draw(st.sampled_from([1, 7, 8, 9, 64, 1000, 40000, 3 * 8 * PAGE_SIZE + 5]))
    iova = draw(st.integers(0, 1 << 20)) * bit
    edges = sorted(draw(st.sets(st.integers(0, npages - 1), max_size=8)))
    return iova, npages, page_size, list(zip(edges[::2], edges[1::2], strict=False))


@given(bitmaps(), st.sampled_from([0, 1, 5, PAGE_SIZE - 1]), st.sets(st.integers(0, 3)))
def test_bits_are_ored_into_what_is_there(
    bitmap: tuple[int, int, int, list[tuple[int, int]]], at: int, gone: set[int]
) -> None:
    """Where a page of the bitmap cannot be written its bits are dropped, and the others are set."""
    iova, npages, page_size, stretches = bitmap
    bit = page_size & -page_size
    c = Client()
    base = c.process.buffer(5)
    old = bytes((n * 37) & 0xFF for n in range(4 * PAGE_SIZE))
    c.mm.write(base, old)
    for page in gone:
        c.mm.protect(base + page * PAGE_SIZE, base + (page + 1) * PAGE_SIZE, readable=True, writable=False)
    target = IovaBitmap(c.caller, iova, iova + npages * bit - 1, page_size, base + at)
    expected = bytearray(old)
    for first, last in stretches:
        target.set(iova + first * bit, (last - first + 1) * bit)
        for n in range(first, last + 1):
            if (at + n // 8) // PAGE_SIZE not in gone:
                expected[at + n // 8] |= 1 << n % 8
    target.flush()
    assert c.mm.read(base, 4 * PAGE_SIZE) == expected


def test_a_stretch_that_reaches_over_the_end_stops_there() -> None:
    """At the end of the last byte. Linux does not: iova_bitmap_set() sets bits to the end of the page."""
    c = Client()
    c.process.put(bytes(8))
    target = IovaBitmap(c.caller, 0, 9 * PAGE_SIZE - 1, PAGE_SIZE, DATA)
    target.set(7 * PAGE_SIZE, 100 * PAGE_SIZE)
    target.flush()
    assert c.mm.read(DATA, 8) == b"\x80\xff" + bytes(6)


# ---- by ioctl ----


class Tracked:
    """A HWPT that tracks, over eight pages."""

    def __init__(self, *, large_pages: bool = True) -> None:
        self.c = c = Client()
        ioas = c.ioas_alloc()
        if not large_pages:
            c.option(uapi.IOMMU_OPTION_HUGE_PAGES, 0, obj=ioas)
        mock = c.mock_domain(ioas)
        self.idev, self.ioas = mock.idev, ioas
        c.map(ioas, c.process.buffer(8), 8 * PAGE_SIZE, APERTURE)
        self.hwpt = c.hwpt(mock.idev, ioas, DIRTY)
        self.track(on=True)

    def track(self, *, on: bool) -> None:
        self.c.ioctl(uapi.HwptSetDirtyTracking(flags=on, hwpt_id=self.hwpt))

    def write(self, *pages: int, page_size: int = PAGE_SIZE) -> None:
        """Devices write to these pages."""
        uptr = self.c.process.put(sum(1 << page for page in pages).to_bytes(8, "little"))
        length = 8 * PAGE_SIZE
        op = test_uapi.Dirty(iova=APERTURE, length=length, page_size=page_size, uptr=uptr)
        assert self.c.test(op, id=self.hwpt).out_nr_dirty == len(pages)

    def dirty(self, iova: int = APERTURE, length: int = 8 * PAGE_SIZE, flags: int = 0) -> set[int]:
        """The bits set."""
        self.c.process.put(bytes(64))
        cmd = uapi.HwptGetDirtyBitmap(hwpt_id=self.hwpt, flags=flags, iova=iova, length=length, page_size=PAGE_SIZE)
        cmd.data = DATA
        self.c.ioctl(cmd)
        bits = int.from_bytes(self.c.mm.read(DATA, 64), "little")
        return {n for n in range(512) if bits >> n & 1}


def test_reading_clears_unless_asked_not_to() -> None:
    tracked = Tracked()
    tracked.write(1, 4, 7)
    assert tracked.dirty(flags=NO_CLEAR) == {1, 4, 7}
    assert tracked.dirty(APERTURE + 4 * PAGE_SIZE, PAGE_SIZE) == {0}
    assert tracked.dirty() == {1, 7}
    assert tracked.dirty() == set()


def test_each_hwpt_has_its_own_bits() -> None:
    tracked = Tracked()
    tracked.write(1)
    other = tracked.c.hwpt(tracked.idev, tracked.ioas, DIRTY)
    first, tracked.hwpt = tracked.hwpt, other
    assert tracked.dirty() == set()
    tracked.hwpt = first
    assert tracked.dirty() == {1}


def test_switching_on_clears_and_off_does_not() -> None:
    tracked = Tracked()
    tracked.write(1)
    tracked.track(on=False)
    assert tracked.dirty(flags=NO_CLEAR) == {1}  # quirk: reading needs no tracking
    op = test_uapi.Dirty(iova=APERTURE, length=PAGE_SIZE, page_size=PAGE_SIZE, uptr=DATA)
    tracked.c.test(op, errno.EINVAL, id=tracked.hwpt)
    tracked.track(on=True)
    assert tracked.dirty() == set()


def test_what_is_unmapped_is_not_dirty_when_it_is_mapped_again() -> None:
    tracked = Tracked()
    c = tracked.c
    tracked.write(1, 2)
    c.unmap(tracked.ioas, APERTURE, 8 * PAGE_SIZE)
    c.map(tracked.ioas, c.process.buffer(8), 8 * PAGE_SIZE, APERTURE)
    assert tracked.dirty() == set()


def test_a_hole_ends_the_walk_and_nobody_is_told() -> None:
    tracked = Tracked()
    c = tracked.c
    c.map(tracked.ioas, c.process.buffer(2), 2 * PAGE_SIZE, APERTURE + 10 * PAGE_SIZE)
    uptr = c.process.put(b"\xff\xff")
    op = test_uapi.Dirty(iova=APERTURE, length=12 * PAGE_SIZE, page_size=PAGE_SIZE, uptr=uptr)
    c.test(op, id=tracked.hwpt)
    assert tracked.dirty(length=12 * PAGE_SIZE) == set(range(8))
    assert tracked.dirty(APERTURE + 10 * PAGE_SIZE, 2 * PAGE_SIZE) == {0, 1}


@pytest.mark.parametrize("large_pages", [False, True])
def test_a_write_to_a_huge_page_makes_its_entry_dirty(large_pages: bool) -> None:
    """quirk: of an entry made of two items of 1 MiB the second is forgotten."""
    tracked = Tracked(large_pages=large_pages)
    c = tracked.c
    iova, addr = APERTURE + (2 << 20), 1 << 30  # a huge page lies at a multiple of its size
    file = c.world.memfd(512, compound=True)
    c.mm.map(Region(addr, addr + file.size(), file, 0, readable=True, writable=True))
    c.map(tracked.ioas, addr, 2 << 20, iova)
    uptr = c.process.put(b"\x08")
    c.test(test_uapi.Dirty(iova=iova, length=8 * PAGE_SIZE, page_size=PAGE_SIZE, uptr=uptr), id=tracked.hwpt)
    assert tracked.dirty(iova, 2 << 20) == (set(range(256)) if large_pages else {3})


def test_a_bitmap_that_cannot_be_written_loses_the_bits() -> None:
    tracked = Tracked()
    tracked.write(1)
    cmd = uapi.HwptGetDirtyBitmap(hwpt_id=tracked.hwpt, iova=APERTURE, length=8 * PAGE_SIZE, page_size=PAGE_SIZE)
    cmd.data = NOWHERE
    tracked.c.ioctl(cmd)
    assert tracked.dirty() == set()


@pytest.mark.parametrize(
    ("expect", "fields"),
    [
        (errno.EOPNOTSUPP, {"flags": 2, "hwpt_id": 99}),
        (errno.EOPNOTSUPP, {"reserved": 1, "hwpt_id": 99}),
        (errno.ENOENT, {"hwpt_id": 99, "length": 0}),
        (errno.EOVERFLOW, {"length": 0}),
        (errno.EOVERFLOW, {"iova": ULONG_MAX, "length": 2}),
        (errno.EINVAL, {"iova": APERTURE + 1}),
        (errno.EINVAL, {"length": PAGE_SIZE + 1}),
        (errno.EINVAL, {"page_size": 0}),
        (errno.EINVAL, {"page_size": 2 * PAGE_SIZE, "length": PAGE_SIZE}),
        (0, {"page_size": 3}),  # quirk: only its lowest bit counts
        (0, {"iova": 0, "length": 0}),  # quirk: everything
    ],
)
def test_what_can_be_asked_for(expect: int, fields: dict[str, int]) -> None:
    tracked = Tracked()
    cmd = uapi.HwptGetDirtyBitmap(hwpt_id=tracked.hwpt, iova=APERTURE, length=8 * PAGE_SIZE, page_size=PAGE_SIZE)
    cmd.data = DATA
    for name, value in fields.items():
        setattr(cmd, name, value)
    before = state(tracked.c.world)
    tracked.c.ioctl(cmd, expect)
    assert not difference(before, state(tracked.c.world))


def test_a_hwpt_without_the_flag_does_not_track() -> None:
    tracked = Tracked()
    c = tracked.c
    plain = c.hwpt(tracked.idev, tracked.ioas)
    c.ioctl(uapi.HwptSetDirtyTracking(flags=1, hwpt_id=plain), errno.EOPNOTSUPP)
    c.ioctl(uapi.HwptSetDirtyTracking(flags=2, hwpt_id=99), errno.EOPNOTSUPP)
    c.ioctl(uapi.HwptSetDirtyTracking(hwpt_id=tracked.ioas), errno.ENOENT)
    cmd = uapi.HwptGetDirtyBitmap(hwpt_id=plain, iova=APERTURE, length=PAGE_SIZE, page_size=PAGE_SIZE, data=DATA)
    c.ioctl(cmd, errno.EOPNOTSUPP)
    cmd.page_size = 0
    c.ioctl(cmd, errno.EINVAL)


def test_a_dmabuf_is_one_piece_and_revoking_it_takes_its_dirty_bits() -> None:
    tracked = Tracked()
    c = tracked.c
    get = test_uapi.DmabufGet(16 * PAGE_SIZE)
    fd = c.result(test_uapi.TestCmd(op=OPS[test_uapi.DmabufGet], u=get.pack()))
    c.map_file(tracked.ioas, fd, 0, 16 * PAGE_SIZE, APERTURE + 16 * PAGE_SIZE)
    bit = c.process.put(b"\x01")

    def write() -> None:
        op = test_uapi.Dirty(iova=APERTURE + 16 * PAGE_SIZE, length=PAGE_SIZE, page_size=PAGE_SIZE, uptr=bit)
        c.test(op, id=tracked.hwpt)

    write()
    assert tracked.dirty(APERTURE + 16 * PAGE_SIZE, 16 * PAGE_SIZE) == set(range(16))
    c.process.put(b"\x01")
    write()
    c.test(test_uapi.DmabufRevoke(fd, True))
    assert tracked.dirty(APERTURE + 16 * PAGE_SIZE, 16 * PAGE_SIZE) == set()
