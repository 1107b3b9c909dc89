"""PASIDs: slots of a group, programmed in every member that has PASIDs (iommu.c)."""

import errno

import pytest

import iommufd_uapi.iommufd_test as test_uapi
from iommufdd.device import IommufdDevice
from iommufdd.errors import EBUSY, EINVAL, ENOMEM, EOPNOTSUPP
from iommufdd.iommu.ops import Domain

from .harness import PASID, PASID_DEVICE, Client
from .invariants import check
from .model import Bench, model
from .snapshot import difference, state
from .test_attach import REGION, reserved


def with_hwpts(bench: Bench, idev: IommufdDevice, count: int) -> list[int]:
    """HWPTs for PASIDs, in one IOAS."""
    ioas = bench.c.ioas_alloc()
    return [bench.c.hwpt(idev.id, ioas, PASID) for _ in range(count)]


def test_every_member_gets_the_pasid_at_once() -> None:
    bench = Bench()
    first, second, third = bench.bound(3)
    hwpt, other = with_hwpts(bench, first, 2)
    bench.attach(first, hwpt, 5)
    assert model(second).now == {5: bench.iommu.domains[0]}
    log = list(model(second).log)
    bench.attach(second, hwpt, 5)  # joins
    assert model(second).log == log
    with pytest.raises(EINVAL):
        bench.attach(third, other, 5)
    with pytest.raises(EBUSY):
        bench.attach(first, hwpt, 5)
    bench.detach(first, 5)
    assert 5 in model(first).now
    bench.detach(second, 5)
    assert not model(first).now
    check(bench.c.world)


def test_members_without_pasids_are_passed_over() -> None:
    """quirk: so an attach can succeed that no hardware has heard of."""
    bench = Bench()
    first = bench.device(max_pasids=0)
    second = bench.device(first, max_pasids=0)
    idev = bench.bind(first)
    bench.bind(second)
    (hwpt,) = with_hwpts(bench, idev, 1)
    bench.attach(idev, hwpt, 5)
    assert not first.log
    assert not second.log
    bench.detach(idev, 5)
    assert not first.log
    check(bench.c.world)


def test_a_pasid_beyond_any_member_is_refused_by_attach() -> None:
    bench = Bench()
    first, second = bench.bound(2)
    model(second).max_pasids = 16
    (hwpt,) = with_hwpts(bench, first, 1)
    with pytest.raises(EINVAL):
        bench.attach(first, hwpt, 16)
    bench.attach(first, hwpt, 15)


def test_replace_does_not_look_at_the_number_of_pasids() -> None:
    bench = Bench()
    (idev,) = bench.bound(1)
    hwpt, other = with_hwpts(bench, idev, 2)
    bench.attach(idev, hwpt, 15)
    model(idev).max_pasids = 8
    bench.replace(idev, other, 15)
    assert model(idev).now == {15: bench.iommu.domains[1]}


def test_a_refusal_at_attach_takes_the_pasid_from_the_others() -> None:
    bench = Bench()
    first, second = bench.bound(2)
    (hwpt,) = with_hwpts(bench, first, 1)
    model(second).refuses[bench.iommu.domains[0]] = ENOMEM
    before = state(bench.c.world)
    with pytest.raises(ENOMEM):
        bench.attach(first, hwpt, 5)
    assert not difference(before, state(bench.c.world))
    assert model(first).log == [(5, bench.iommu.domains[0]), (5, bench.iommu.blocked_domain)]


def test_a_refusal_at_replace_puts_the_old_domain_back() -> None:
    bench = Bench()
    first, second = bench.bound(2)
    hwpt, other = with_hwpts(bench, first, 2)
    bench.attach(first, hwpt, 5)
    model(second).refuses[bench.iommu.domains[1]] = EBUSY
    before = state(bench.c.world)
    with pytest.raises(EBUSY):
        bench.replace(first, other, 5)
    assert not difference(before, state(bench.c.world))
    assert model(first).log[-1] == (5, bench.iommu.domains[0])


def test_a_member_that_takes_neither_loses_the_pasid() -> None:
    """__iommu_set_group_pasid() warns and removes it; the refusal that began it is the answer."""
    bench = Bench()
    first, second = bench.bound(2)
    hwpt, other = with_hwpts(bench, first, 2)
    bench.attach(first, hwpt, 5)
    model(first).refuses[bench.iommu.domains[0]] = ENOMEM
    model(second).refuses[bench.iommu.domains[1]] = EBUSY
    with pytest.raises(EBUSY):
        bench.replace(first, other, 5)
    assert not model(first).now
    assert model(second).now == {5: bench.iommu.domains[0]}


def test_reserved_regions_are_for_requests_without_pasid() -> None:
    bench = Bench()
    (idev,) = bench.bound(1)
    model(idev).regions = [REGION]
    ioas = bench.c.ioas_alloc()
    bench.attach(idev, bench.c.hwpt(idev.id, ioas, PASID), 5)
    assert not reserved(bench, ioas)
    other = bench.c.ioas_alloc()
    bench.replace(idev, bench.c.hwpt(idev.id, other, PASID), 5)
    assert not reserved(bench, other)


def test_the_group_is_all_pasid_or_not_at_all() -> None:
    bench = Bench()
    first, second = bench.bound(2)
    (hwpt,) = with_hwpts(bench, first, 1)
    plain = bench.c.hwpt(first.id, bench.c.ioas_alloc())
    with pytest.raises(EINVAL):
        bench.attach(first, plain, 5)
    bench.attach(first, plain)
    with pytest.raises(EINVAL):
        bench.attach(second, hwpt, 5)  # the group's own domain is not for PASIDs
    bench.replace(first, hwpt)
    bench.attach(second, hwpt, 5)
    with pytest.raises(EINVAL):
        bench.replace(first, plain)
    bench.detach(first)
    with pytest.raises(EINVAL):
        bench.attach(first, plain)
    bench.detach(second, 5)
    bench.attach(first, plain)
    check(bench.c.world)


def test_hardware_that_cannot_attach_pasids(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()
    (idev,) = bench.bound(1)
    (hwpt,) = with_hwpts(bench, idev, 1)
    bench.iommu.blocked_domain = Domain(bench.iommu)  # without set_dev_pasid()
    with pytest.raises(EOPNOTSUPP):
        bench.attach(idev, hwpt, 1 << 20)  # tested before the number


def test_an_automatic_hwpt_is_not_for_pasids() -> None:
    """So the search makes a new one, which is not either."""
    bench = Bench()
    (idev,) = bench.bound(1)
    ioas = bench.c.ioas_alloc()
    before = state(bench.c.world)
    with pytest.raises(EINVAL):
        bench.attach(idev, ioas, 5)
    assert not difference(before, state(bench.c.world))


def test_the_mock_fails_the_second_set_of_pasid_1024_once() -> None:
    c = Client()
    ioas = c.ioas_alloc()
    mock = c.mock_domain(ioas, PASID_DEVICE)
    first, second = (c.hwpt(mock.idev, ioas, PASID) for _ in range(2))
    c.replace(mock.stdev, first)
    pasid = test_uapi.IOMMU_TEST_PASID_RESERVED
    c.pasid_attach(mock.stdev, pasid, first)
    c.pasid_replace(mock.stdev, pasid, second, errno.ENOMEM)
    c.test(test_uapi.PasidCheck(pasid, first), id=mock.stdev)
    c.pasid_replace(mock.stdev, pasid, second)
    c.test(test_uapi.PasidCheck(pasid, second), id=mock.stdev)
