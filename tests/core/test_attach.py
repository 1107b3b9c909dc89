"""Attach and detach: one slot for a group, one part in it for each device (device.c, the middle)."""

import errno

import pytest

from iommufdd.errors import EADDRINUSE, EBUSY, EINVAL, ENOENT, ENOMEM
from iommufdd.ioas import Ioas
from iommufdd.iommu.mock import MockDevice
from iommufdd.iommu.ops import ResvRegion
from iommufdd.user import PAGE_SIZE

from .harness import APERTURE, NEST_PARENT, NOWHERE, PASID, PASID_DEVICE, Client
from .invariants import check
from .model import Bench, ModelIommu, model
from .snapshot import difference, state

REGION = ResvRegion(0x10000, 0x1FFFF, "reserved")


def ioas_of(bench: Bench, ioas_id: int) -> Ioas:
    ioas = bench.c.ictx.objects.get(ioas_id)
    assert isinstance(ioas, Ioas)
    return ioas


def reserved(bench: Bench, ioas_id: int) -> list[tuple[int, int, object]]:
    return [(span.start, span.last, span.owner) for span in ioas_of(bench, ioas_id).iopt.reserved]


def test_the_first_device_switches_the_group_and_the_others_only_join() -> None:
    bench = Bench()
    first, second, third = bench.bound(3)
    ioas = bench.c.ioas_alloc()
    hwpt = bench.attach(first, ioas)
    domain = first.dev.group.domain
    assert [model(idev).now[0] for idev in (first, second, third)] == [domain] * 3
    logs = [list(model(idev).log) for idev in (first, second, third)]
    assert bench.attach(second, hwpt) == hwpt
    assert [model(idev).log for idev in (first, second, third)] == logs
    obj = bench.c.ictx.objects.get(hwpt)
    assert obj is not None
    assert obj.users == 2  # one for each device that asked
    check(bench.c.world)


def test_a_slot_has_one_hwpt_and_each_device_once() -> None:
    bench = Bench()
    first, second = bench.bound(2)
    ioas = bench.c.ioas_alloc()
    bench.attach(first, ioas)
    other = bench.c.hwpt(first.id, ioas)
    before = state(bench.c.world)
    with pytest.raises(EBUSY):
        bench.attach(first, other)  # tested before the HWPT is compared
    with pytest.raises(EINVAL):
        bench.attach(second, other)
    assert not difference(before, state(bench.c.world))


@pytest.mark.parametrize(("kind", "error"), [("device", EINVAL), ("nothing", ENOENT)])
def test_what_cannot_be_attached(kind: str, error: type[Exception]) -> None:
    bench = Bench()
    (idev,) = bench.bound(1)
    with pytest.raises(error):
        bench.attach(idev, idev.id if kind == "device" else 99)


def test_each_device_brings_its_own_reserved_regions() -> None:
    bench = Bench()
    first, second = bench.bound(2)
    model(first).regions = [REGION, REGION._replace(start=0, last=0xFF, kind="direct-relaxable")]
    model(second).regions = [REGION._replace(start=0x18000, last=0x2FFFF)]  # regions may overlap
    ioas = bench.c.ioas_alloc()
    hwpt = bench.attach(first, ioas)
    assert reserved(bench, ioas) == [(0x10000, 0x1FFFF, first.dev)]
    bench.attach(second, hwpt)
    assert reserved(bench, ioas) == [(0x10000, 0x1FFFF, first.dev), (0x18000, 0x2FFFF, second.dev)]
    bench.detach(first)
    assert reserved(bench, ioas) == [(0x18000, 0x2FFFF, second.dev)]
    assert 0 in second.dev.group.handles
    bench.detach(second)
    assert not reserved(bench, ioas)
    assert second.dev.group.domain is bench.iommu.blocked_domain
    assert bench.c.ictx.objects.get(hwpt) is None  # automatic
    check(bench.c.world)


def test_a_joining_device_whose_regions_clash_stays_out() -> None:
    bench = Bench()
    first, second = bench.bound(2)
    model(second).regions = [REGION, REGION._replace(start=0x40000, last=0x4FFFF)]
    ioas = bench.c.ioas_alloc()
    hwpt = bench.attach(first, ioas)
    bench.c.map(ioas, bench.c.process.buffer(1), PAGE_SIZE, 0x40000)
    before = state(bench.c.world)
    with pytest.raises(EADDRINUSE):
        bench.attach(second, hwpt)
    assert not difference(before, state(bench.c.world))  # its first region has left again


@pytest.mark.parametrize("kinds", [("msi", "sw-msi"), ("sw-msi", "sw-msi")])
def test_a_device_has_one_msi_window(kinds: tuple[str, str]) -> None:
    bench = Bench()
    (idev,) = bench.bound(1)
    model(idev).regions = [ResvRegion(n << 20, (n << 20) + 0xFFFF, kind) for n, kind in enumerate(kinds, 1)]
    ioas = bench.c.ioas_alloc()
    with pytest.raises(EINVAL):
        bench.attach(idev, ioas)
    assert not reserved(bench, ioas)
    model(idev).regions = [REGION._replace(kind="msi"), REGION._replace(kind="msi")]
    bench.attach(idev, ioas)


def test_when_a_member_refuses_the_others_go_back_to_blocking() -> None:
    bench = Bench()
    first, second, third = bench.bound(3)
    model(first).regions = [REGION]
    ioas = bench.c.ioas_alloc()
    hwpt = bench.c.hwpt(first.id, ioas)
    model(second).refuses[bench.iommu.domains[0]] = EBUSY
    before = state(bench.c.world)
    with pytest.raises(EBUSY):
        bench.attach(first, hwpt)
    assert not difference(before, state(bench.c.world))
    assert [len(model(idev).log) for idev in (first, second, third)] == [2, 0, 0]


def test_regions_of_a_nested_hwpt_go_to_the_ioas_of_its_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    """find_hwpt_paging(); with mock devices, because the model does not nest."""
    monkeypatch.setattr(MockDevice, "resv_regions", lambda dev: [REGION])
    bench = Bench()
    c = bench.c
    ioas, other = c.ioas_alloc(), c.ioas_alloc()
    mock = c.mock_domain(ioas)
    nested = c.nested(mock.idev, c.hwpt(mock.idev, ioas, NEST_PARENT))
    c.replace(mock.stdev, other)
    assert (REGION.start, REGION.last) not in [span[:2] for span in reserved(bench, ioas)]
    c.replace(mock.stdev, nested)
    assert (REGION.start, REGION.last) in [span[:2] for span in reserved(bench, ioas)]
    assert (REGION.start, REGION.last) not in [span[:2] for span in reserved(bench, other)]


def test_detach_of_what_is_not_attached_does_nothing() -> None:
    bench = Bench()
    first, second = bench.bound(2)
    ioas = bench.c.ioas_alloc()
    bench.detach(first)
    bench.attach(first, ioas)
    before = state(bench.c.world)
    bench.detach(second)  # a member, but not one that has attached
    assert not difference(before, state(bench.c.world))
    check(bench.c.world)


# ---- automatic HWPTs ----


def test_automatic_hwpts_are_tried_in_order_until_one_fits() -> None:
    bench = Bench()
    ioas = bench.c.ioas_alloc()
    one, two, three = (bench.bound(1)[0] for _ in range(3))
    first = bench.attach(one, ioas)
    model(two).refuses[bench.iommu.domains[0]] = EINVAL
    second = bench.attach(two, ioas)
    assert first != second
    model(three).refuses[bench.iommu.domains[0]] = EINVAL
    assert bench.attach(three, ioas) == second
    bench.detach(one)
    bench.detach(two)
    assert bench.c.ictx.objects.get(first) is None
    assert bench.c.ictx.objects.get(second) is not None
    check(bench.c.world)


def test_the_search_stops_at_any_other_error() -> None:
    bench = Bench()
    ioas = bench.c.ioas_alloc()
    one, two = (bench.bound(1)[0] for _ in range(2))
    bench.attach(one, ioas)
    model(two).refuses[bench.iommu.domains[0]] = ENOMEM
    before = state(bench.c.world)
    with pytest.raises(ENOMEM):
        bench.attach(two, ioas)
    assert not difference(before, state(bench.c.world))


def test_the_search_passes_over_hwpts_that_are_the_users() -> None:
    bench = Bench()
    ioas = bench.c.ioas_alloc()
    (idev,) = bench.bound(1)
    mine = bench.c.hwpt(idev.id, ioas)
    assert bench.attach(idev, ioas) != mine


def test_domains_of_another_iommu_do_not_fit() -> None:
    bench = Bench()
    other = Bench(bench.c, ModelIommu())
    ioas = bench.c.ioas_alloc()
    (mine,), (theirs,) = bench.bound(1), other.bound(1)
    hwpt = bench.attach(mine, ioas)
    before = state(bench.c.world)
    with pytest.raises(EINVAL):
        other.attach(theirs, hwpt)
    assert not difference(before, state(bench.c.world))
    assert other.attach(theirs, ioas) != hwpt


def test_an_automatic_hwpt_that_no_member_takes_is_never_made() -> None:
    bench = Bench()
    ioas = bench.c.ioas_alloc()
    first, second = bench.bound(2)
    bench.iommu.refused_by = [(model(second), EBUSY)]
    before = state(bench.c.world)
    with pytest.raises(EBUSY):
        bench.attach(first, ioas)
    assert not difference(before, state(bench.c.world))


def test_attach_detaches_again_when_the_pages_cannot_be_pinned() -> None:
    bench = Bench()
    first, second = bench.bound(2)
    model(first).regions = [REGION]
    ioas = bench.c.ioas_alloc()
    bench.c.map(ioas, NOWHERE, PAGE_SIZE, APERTURE)
    before = state(bench.c.world)
    bench.c.fails(lambda: bench.attach(first, ioas), errno.EFAULT)
    assert not difference(before, state(bench.c.world))
    assert model(second).log[-1] == (0, bench.iommu.blocked_domain)


def test_destroying_a_mock_device_detaches_its_pasids() -> None:
    """The kernel forgets them (WARN_ON in iommufd_object_destroy_user()) and goes on with freed memory."""
    c = Client()
    ioas = c.ioas_alloc()
    mock = c.mock_domain(ioas, PASID_DEVICE)
    hwpt = c.hwpt(mock.idev, ioas, PASID)
    c.replace(mock.stdev, hwpt)
    c.pasid_attach(mock.stdev, 1, hwpt)
    c.pasid_attach(mock.stdev, 2, hwpt)
    c.destroy(mock.stdev)
    c.destroy(mock.idev, errno.ENOENT)
    c.destroy(hwpt)
    check(c.world)
    c.close()
