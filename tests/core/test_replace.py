"""Replace: from one attachment to another, or not at all (iommufd_device_do_replace())."""

import errno

import pytest

from iommufdd.device import IommufdDevice
from iommufdd.errors import EADDRINUSE, EBUSY, EINVAL, ENOMEM
from iommufdd.iommu.ops import ResvRegion
from iommufdd.user import PAGE_SIZE

from .harness import APERTURE, NOWHERE, Client
from .invariants import check
from .model import Bench, model
from .snapshot import difference, state
from .test_attach import REGION, reserved


def attached(bench: Bench, count: int = 2) -> tuple[list[IommufdDevice], int, int]:
    """Devices of one group, each with a region, attached to a HWPT of an IOAS."""
    idevs = bench.bound(count)
    for n, idev in enumerate(idevs):
        model(idev).regions = [ResvRegion(0x10000 * (n + 1), 0x10000 * (n + 1) + 0xFFF, "reserved")]
    ioas = bench.c.ioas_alloc()
    hwpt = bench.c.hwpt(idevs[0].id, ioas)
    for idev in idevs:
        bench.attach(idev, hwpt)
    return idevs, ioas, hwpt


def test_replace_moves_every_device_of_the_group() -> None:
    bench = Bench()
    (first, second), ioas, old = attached(bench)
    other = bench.c.ioas_alloc()
    new = bench.c.hwpt(first.id, other)
    bench.replace(second, new)
    old_obj, new_obj = bench.c.ictx.objects.get(old), bench.c.ictx.objects.get(new)
    assert old_obj is not None
    assert new_obj is not None
    assert (old_obj.users, new_obj.users) == (0, 2)
    assert not reserved(bench, ioas)
    assert {span[2] for span in reserved(bench, other)} == {first.dev, second.dev}
    assert model(first).now[0] is model(second).now[0] is bench.iommu.domains[1]
    bench.c.destroy(old)
    check(bench.c.world)


def test_an_automatic_hwpt_goes_when_the_group_leaves_it() -> None:
    bench = Bench()
    first, second = bench.bound(2)
    ioas, other = bench.c.ioas_alloc(), bench.c.ioas_alloc()
    auto = bench.attach(first, ioas)
    bench.attach(second, auto)
    new = bench.replace(first, other)
    assert bench.c.ictx.objects.get(auto) is None
    assert bench.replace(second, other) == new  # nothing to do: the group is there
    check(bench.c.world)


def test_replace_by_the_same_hwpt_touches_nothing() -> None:
    bench = Bench()
    (first, _), _, hwpt = attached(bench)
    before, log = state(bench.c.world), list(model(first).log)
    assert bench.replace(first, hwpt) == hwpt
    assert not difference(before, state(bench.c.world))
    assert model(first).log == log


def test_only_a_device_that_is_attached_can_replace() -> None:
    bench = Bench()
    first, second = bench.bound(2)
    ioas = bench.c.ioas_alloc()
    with pytest.raises(EINVAL):
        bench.replace(first, bench.c.hwpt(first.id, ioas))
    hwpt = bench.attach(first, ioas)
    with pytest.raises(EINVAL):
        bench.replace(second, hwpt)  # even to what the group has


def test_regions_of_every_member_must_fit_the_new_ioas() -> None:
    bench = Bench()
    (first, second), _, _ = attached(bench)
    other = bench.c.ioas_alloc()
    new = bench.c.hwpt(first.id, other)
    bench.c.map(other, bench.c.process.buffer(1), PAGE_SIZE, model(second).regions[0].start)
    before = state(bench.c.world)
    with pytest.raises(EADDRINUSE):
        bench.replace(first, new)
    assert not difference(before, state(bench.c.world))


def test_a_refusal_leaves_the_group_in_the_old_domain() -> None:
    bench = Bench()
    (first, second, third), _, _ = attached(bench, 3)
    new = bench.c.hwpt(first.id, bench.c.ioas_alloc())
    model(second).refuses[bench.iommu.domains[1]] = ENOMEM
    before = state(bench.c.world)
    with pytest.raises(ENOMEM):
        bench.replace(third, new)
    assert not difference(before, state(bench.c.world))
    old, tried = bench.iommu.domains
    assert model(first).log[-2:] == [(0, tried), (0, old)]
    assert (0, tried) not in model(third).log
    check(bench.c.world)


def test_a_refusal_within_one_ioas_loses_its_reservations() -> None:
    """quirk: err_unresv in iommufd_device_do_replace() removes what it has not added."""
    bench = Bench()
    (first, second), ioas, _ = attached(bench)
    new = bench.c.hwpt(first.id, ioas)
    model(second).refuses[bench.iommu.domains[1]] = EBUSY
    assert len(reserved(bench, ioas)) == 2
    with pytest.raises(EBUSY):
        bench.replace(first, new)
    assert not reserved(bench, ioas)
    model(second).refuses.clear()
    bench.replace(first, new)
    assert not reserved(bench, ioas)  # the same IOAS: nothing is added
    bench.detach(first)
    bench.attach(first, new)
    assert [span[2] for span in reserved(bench, ioas)] == [first.dev]
    check(bench.c.world)


def test_the_search_for_an_automatic_hwpt_loses_them_too() -> None:
    """The first candidate's EINVAL is not the answer, but its err_unresv has run."""
    bench = Bench()
    (first, second), ioas, _ = attached(bench)
    (third,) = bench.bound(1)
    auto = bench.attach(third, ioas)
    model(second).refuses[bench.iommu.domains[1]] = EINVAL
    assert bench.replace(first, ioas) != auto
    assert not [span for span in reserved(bench, ioas) if span[2] is not third.dev]
    check(bench.c.world)


def test_when_the_way_back_is_refused_too_the_first_refusal_is_the_answer() -> None:
    """__iommu_group_set_domain_internal() warns, and blocks the device that takes neither."""
    bench = Bench()
    (first, second, third), _, _ = attached(bench, 3)
    old, new = bench.iommu.domains[0], bench.c.hwpt(first.id, bench.c.ioas_alloc())
    model(first).refuses[old] = ENOMEM
    model(third).refuses[bench.iommu.domains[1]] = EBUSY
    with pytest.raises(EBUSY):
        bench.replace(first, new)
    assert model(first).now == {}
    assert [model(idev).now[0] for idev in (second, third)] == [old, old]
    assert first.dev.group.domain is old


def test_replace_by_an_ioas_shows_its_pages_before_it_switches() -> None:
    bench = Bench()
    (first, second), _, _ = attached(bench)
    other = bench.c.ioas_alloc()
    bench.c.map(other, bench.c.process.buffer(1), PAGE_SIZE, APERTURE)
    bench.iommu.refused_by = [(model(second), EBUSY)]
    before = state(bench.c.world)
    with pytest.raises(EBUSY):
        bench.replace(first, other)
    assert not difference(before, state(bench.c.world))  # the pages are let go again, and the HWPT's id


def test_replace_by_an_ioas_whose_pages_cannot_be_pinned_keeps_the_attachment() -> None:
    """iommufd_hwpt_paging_alloc() detaches at out_detach only what it attached: nothing, in a replace."""
    c = Client()
    ioas, other = c.ioas_alloc(), c.ioas_alloc()
    mock = c.mock_domain(ioas)
    c.map(other, NOWHERE, PAGE_SIZE, APERTURE)
    before = state(c.world)
    c.replace(mock.stdev, other, expect=errno.EFAULT)
    assert not difference(before, state(c.world))


def test_regions_may_lie_over_each_other_but_not_over_what_is_allowed() -> None:
    bench = Bench()
    (first, _), _, _ = attached(bench)
    other = bench.c.ioas_alloc()
    new = bench.c.hwpt(first.id, other)
    bench.c.allow(other, (REGION.start, REGION.last))
    with pytest.raises(EADDRINUSE):
        bench.replace(first, new)
    bench.c.allow(other)
    bench.c.reserve(other, REGION.start, 0x1000)
    bench.replace(first, new)
    check(bench.c.world)
