"""HWPTs: what is undone when a late step fails, whose parents they may have, and invalidation (hw_pagetable.c)."""

import errno

import pytest

import iommufd_uapi.iommufd as uapi
import iommufd_uapi.iommufd_test as test_uapi
from iommufdd.hw_pagetable import HwptPaging
from iommufdd.iommu.mock import MockNested
from iommufdd.user import PAGE_SIZE

from .harness import (
    APERTURE,
    DATA,
    DIRTY,
    FAULT,
    NEST_PARENT,
    NO_DIRTY_DEVICE,
    NOWHERE,
    PASID,
    Client,
    Mock,
)
from .invariants import check
from .model import Bench
from .snapshot import difference, state

INVALIDATE = test_uapi.IOMMU_HWPT_INVALIDATE_DATA_SELFTEST


def mock(c: Client, flags: int = 0) -> tuple[int, Mock]:
    ioas = c.ioas_alloc()
    return ioas, c.mock_domain(ioas, flags)


def test_a_fault_queue_that_is_none_undoes_the_whole_domain() -> None:
    """It is looked up when pages are pinned and shown already."""
    c = Client()
    ioas = c.ioas_alloc()
    c.map(ioas, c.process.buffer(2), 2 * PAGE_SIZE, APERTURE)
    _, made = mock(c)
    before = state(c.world)
    for fault in (99, made.hwpt):
        c.hwpt(made.idev, ioas, FAULT, fault=fault, expect=errno.ENOENT)
    assert not difference(before, state(c.world))


def test_a_fault_queue_lives_as_long_as_its_hwpts() -> None:
    c = Client()
    ioas, made = mock(c)
    fault, fd = c.fault_queue()
    hwpts = [c.hwpt(made.idev, ioas, FAULT, fault=fault) for _ in range(2)]
    c.fds.close(fd)
    for hwpt in hwpts:
        c.destroy(fault, errno.EBUSY)
        c.destroy(hwpt)
    c.destroy(fault)


def test_flags_that_do_not_go_together() -> None:
    c = Client()
    ioas, made = mock(c, NO_DIRTY_DEVICE)
    fault, _ = c.fault_queue()
    before = state(c.world)
    c.hwpt(made.idev, ioas, FAULT | NEST_PARENT, fault=fault, expect=errno.EOPNOTSUPP)
    c.hwpt(made.idev, ioas, DIRTY, expect=errno.EOPNOTSUPP)
    c.hwpt(made.idev, ioas, 1 << 4, expect=errno.EOPNOTSUPP)
    assert not difference(before, state(c.world))


def test_a_domain_that_tracks_does_not_fit_a_device_that_cannot() -> None:
    c = Client()
    ioas, able = mock(c)
    _, unable = mock(c, NO_DIRTY_DEVICE)
    hwpt = c.hwpt(able.idev, ioas, DIRTY)
    before = state(c.world)
    c.replace(unable.stdev, hwpt, errno.EINVAL)
    assert not difference(before, state(c.world))
    c.replace(able.stdev, hwpt)


# ---- nesting ----


def test_what_can_be_a_parent() -> None:
    c = Client()
    ioas, made = mock(c)
    plain = c.hwpt(made.idev, ioas)
    parent = c.hwpt(made.idev, ioas, NEST_PARENT)
    nested = c.nested(made.idev, parent)
    fault, _ = c.fault_queue()
    before = state(c.world)
    for pt in (plain, made.hwpt, nested, fault, made.idev, made.stdev, 99):
        c.nested(made.idev, pt, expect=errno.EINVAL)
    c.nested(made.idev, parent, DIRTY, expect=errno.EOPNOTSUPP)
    c.hwpt(made.idev, parent, expect=errno.EOPNOTSUPP)  # without data
    assert not difference(before, state(c.world))
    c.destroy(parent, errno.EBUSY)
    c.destroy(nested)
    c.destroy(parent)


def test_a_parent_of_another_iommu() -> None:
    bench = Bench()
    c = bench.c
    ioas, made = mock(c)
    dev = bench.device()
    idev = bench.bind(dev)
    theirs = c.hwpt(idev.id, c.ioas_alloc(), NEST_PARENT)
    c.nested(made.idev, theirs, expect=errno.EINVAL)
    c.nested(idev.id, c.hwpt(made.idev, ioas, NEST_PARENT), expect=errno.EOPNOTSUPP)  # this one does not nest
    viommu = c.viommu(made.idev, theirs)  # quirk: a vIOMMU's parent may be anybody's
    c.nested(idev.id, viommu, expect=errno.EINVAL)
    check(c.world)


def test_a_nested_hwpt_of_a_viommu_holds_the_viommu() -> None:
    c = Client()
    ioas, made = mock(c)
    parent = c.hwpt(made.idev, ioas, NEST_PARENT)
    viommu = c.viommu(made.idev, parent)
    c.vdevice(viommu, made.idev, 7)
    nested = c.nested(made.idev, viommu, PASID)
    c.replace(made.stdev, nested)
    for busy in (parent, viommu, nested, ioas):
        c.destroy(busy, errno.EBUSY)
    obj = c.ictx.objects.get(nested)
    assert obj is not None
    assert [str(held) for held in obj.held] == [f"viommu {viommu}"]
    check(c.world)


def test_a_nested_hwpt_of_a_viommu_needs_a_vdevice_to_attach() -> None:
    c = Client()
    ioas, made = mock(c)
    viommu = c.viommu(made.idev, c.hwpt(made.idev, ioas, NEST_PARENT))
    nested = c.nested(made.idev, viommu)
    before = state(c.world)
    c.replace(made.stdev, nested, errno.ENOENT)
    c.mock_domain(nested, expect=errno.ENOENT)
    assert not difference(before, state(c.world))
    vdevice = c.vdevice(viommu, made.idev, 0)
    c.replace(made.stdev, nested)
    c.destroy(vdevice)  # attached or not
    check(c.world)


# ---- content ----


def test_every_hwpt_of_an_ioas_shows_the_same() -> None:
    c = Client()
    ioas, made = mock(c)
    addr = c.process.buffer(4)
    c.map(ioas, addr, 2 * PAGE_SIZE, APERTURE)
    hwpts = [made.hwpt, c.hwpt(made.idev, ioas), c.hwpt(made.idev, ioas, DIRTY)]
    c.map(ioas, addr + 2 * PAGE_SIZE, 2 * PAGE_SIZE, APERTURE + 2 * PAGE_SIZE)
    for hwpt in hwpts:
        c.test(test_uapi.CheckMap(APERTURE, 4 * PAGE_SIZE, addr), id=hwpt)
    c.destroy(hwpts[1])
    c.unmap(ioas, APERTURE, 2 * PAGE_SIZE)
    c.test(test_uapi.CheckMap(APERTURE, PAGE_SIZE, addr), errno.EINVAL, id=hwpts[2])
    c.test(test_uapi.CheckRefs(2 * PAGE_SIZE, addr + 2 * PAGE_SIZE, 1))
    check(c.world)


@pytest.mark.parametrize("kind", [test_uapi.MOCK_IOMMUPT_DEFAULT, test_uapi.MOCK_IOMMUPT_HUGE, 2])
def test_data_chooses_the_page_table(kind: int) -> None:
    c = Client()
    ioas, made = mock(c)
    data = test_uapi.HwptSelftest(0, kind).pack()
    cmd = uapi.HwptAlloc(dev_id=made.idev, pt_id=c.ioas_alloc(), data_len=8, data_uptr=c.process.put(data))
    cmd.data_type = test_uapi.IOMMU_HWPT_DATA_SELFTEST
    c.ioctl(cmd, errno.EOPNOTSUPP if kind == 2 else 0)
    if kind != 2:
        hwpt = c.ictx.objects.get(cmd.out_hwpt_id)
        assert isinstance(hwpt, HwptPaging)
        huge = kind == test_uapi.MOCK_IOMMUPT_HUGE
        last = 2**38 - 1 if huge else test_uapi.MOCK_APERTURE_LAST
        start = 0 if huge else test_uapi.MOCK_APERTURE_START
        assert (hwpt.domain.aperture_start, hwpt.domain.aperture_end) == (start, last)
    assert c.ranges(ioas) == [(test_uapi.MOCK_APERTURE_START, test_uapi.MOCK_APERTURE_LAST)]


# ---- invalidation ----


def invalidate(c: Client, hwpt: int, *entries: bytes, expect: int = 0, **fields: int) -> int:
    """The number of entries done."""
    cmd = uapi.HwptInvalidate(hwpt_id=hwpt, data_uptr=c.process.put(b"".join(entries)), data_type=INVALIDATE)
    cmd.entry_len, cmd.entry_num = len(entries[0]) if entries else 0, len(entries)
    for name, value in fields.items():
        setattr(cmd, name, value)
    return c.ioctl(cmd, expect).entry_num


def iotlb(c: Client, hwpt: int) -> list[int]:
    domain = getattr(c.ictx.objects.get(hwpt), "domain", None)
    assert isinstance(domain, MockNested)
    return domain.iotlb


@pytest.mark.parametrize(
    ("bad", "expect"),
    [((2, 0), errno.EOPNOTSUPP), ((0, 4), errno.EINVAL)],
)
def test_entries_before_a_bad_one_are_done_and_counted(bad: tuple[int, int], expect: int) -> None:
    c = Client()
    ioas, made = mock(c)
    nested = c.nested(made.idev, c.hwpt(made.idev, ioas, NEST_PARENT), iotlb=7)
    entries = [test_uapi.HwptInvalidateSelftest(0, n).pack() for n in (1, 3)]
    entries += [test_uapi.HwptInvalidateSelftest(*bad).pack(), entries[0]]
    assert invalidate(c, nested, *entries, expect=expect) == 2
    assert iotlb(c, nested) == [7, 0, 7, 0]
    assert invalidate(c, nested, test_uapi.HwptInvalidateSelftest(1, 2).pack()) == 1
    assert iotlb(c, nested) == [0] * 4


def test_a_viommu_copies_all_before_it_does_any() -> None:
    c = Client()
    ioas, made = mock(c)
    viommu = c.viommu(made.idev, c.hwpt(made.idev, ioas, NEST_PARENT))
    c.vdevice(viommu, made.idev, 7)
    good = test_uapi.ViommuInvalidateSelftest(0, 7, 1).pack()
    addr = c.process.buffer(1)
    c.mm.write(addr + PAGE_SIZE - 12, good)
    before = state(c.world)
    cmd = uapi.HwptInvalidate(
        hwpt_id=viommu, data_uptr=addr + PAGE_SIZE - 12, data_type=INVALIDATE, entry_len=12, entry_num=2
    )
    c.ioctl(cmd, errno.EFAULT)
    assert cmd.entry_num == 0
    assert not difference(before, state(c.world))
    assert invalidate(c, viommu, good, test_uapi.ViommuInvalidateSelftest(0, 8, 1).pack(), expect=errno.EINVAL) == 1
    c.test(test_uapi.CheckDevCache(1, 0), id=made.idev)


@pytest.mark.parametrize(
    ("flags", "entry", "expect"), [(2, 0, errno.EOPNOTSUPP), (0, 4, errno.EINVAL), (1, 4, errno.EINVAL)]
)
def test_a_viommu_counts_what_it_did(flags: int, entry: int, expect: int) -> None:
    c = Client()
    ioas, made = mock(c)
    viommu = c.viommu(made.idev, c.hwpt(made.idev, ioas, NEST_PARENT))
    c.vdevice(viommu, made.idev, 7)
    good = [test_uapi.ViommuInvalidateSelftest(0, 7, n).pack() for n in (0, 3)]
    bad = test_uapi.ViommuInvalidateSelftest(flags, 7, entry).pack()
    assert invalidate(c, viommu, *good, bad, good[0], expect=expect) == 2
    for n, value in enumerate((0, test_uapi.IOMMU_TEST_DEV_CACHE_DEFAULT, test_uapi.IOMMU_TEST_DEV_CACHE_DEFAULT, 0)):
        c.test(test_uapi.CheckDevCache(n, value), id=made.idev)


def test_the_core_checks_before_any_driver() -> None:
    c = Client()
    ioas, made = mock(c)
    parent = c.hwpt(made.idev, ioas, NEST_PARENT)
    nested = c.nested(made.idev, parent)
    entry = test_uapi.HwptInvalidateSelftest().pack()
    before = state(c.world)
    for expect, hwpt, fields in (
        (errno.EOPNOTSUPP, 99, {"reserved": 1, "data_uptr": 0}),
        (errno.EINVAL, 99, {"data_uptr": 0}),
        (errno.EINVAL, 99, {"entry_len": 0}),
        (errno.EINVAL, 99, {"entry_len": PAGE_SIZE + 1}),
        (errno.EINVAL, 99, {"entry_num": (1 << 19) + 1}),
        (errno.ENOENT, 99, {}),
        (errno.EINVAL, parent, {}),
        (errno.EINVAL, nested, {"data_type": INVALIDATE + 1}),
        (errno.EFAULT, nested, {"data_uptr": NOWHERE}),
    ):
        assert invalidate(c, hwpt, entry, expect=expect, **fields) == 0
    assert not difference(before, state(c.world))
    assert invalidate(c, nested, entry_len=99) == 0  # an empty array tells whether the type is known
    assert invalidate(c, nested, data_type=INVALIDATE + 1, expect=errno.EINVAL) == 0


def test_a_reply_that_cannot_be_written_takes_the_place_of_the_error() -> None:
    c = Client()
    cmd = uapi.HwptInvalidate(hwpt_id=99, data_uptr=DATA)
    addr = c.process.buffer(1)
    c.mm.write(addr, cmd.pack())
    c.mm.protect(addr, addr + PAGE_SIZE, readable=True, writable=False)
    assert c.rc(uapi.HwptInvalidate.CMD, addr) == -errno.EFAULT
