"""Groups and page faults below iommufd: the order of checks, and when a device may fault (iommu.c, io-pgfault.c)."""

import pytest

from iommufdd.errors import EBUSY, EINVAL, EOPNOTSUPP
from iommufdd.iommu.group import AttachHandle, Fault, IopfGroup
from iommufdd.iommu.ops import Domain
from tests.core.model import ModelDevice, ModelDomain, ModelIommu


class Somebody:
    id = 1


def handle(domain: Domain) -> AttachHandle:
    return AttachHandle(domain, Somebody())


def pair() -> tuple[ModelIommu, ModelDevice, ModelDevice]:
    iommu = ModelIommu()
    first = ModelDevice(iommu, "first", None, 16)
    return iommu, first, ModelDevice(iommu, "second", first, 16)


def test_a_group_is_attached_once() -> None:
    iommu, first, second = pair()
    domain = ModelDomain(iommu)
    first.group.attach_handle(handle(domain))
    with pytest.raises(EBUSY):
        second.group.attach_handle(handle(ModelDomain(iommu)))
    first.group.detach_handle()
    with pytest.raises(EINVAL):
        first.group.attach_handle(handle(ModelDomain(ModelIommu())))
    assert not first.group.handles
    assert first.group.domain is iommu.blocked_domain
    assert not first.now
    assert not second.now


def test_replacing_by_the_same_domain_tells_no_driver() -> None:
    iommu, first, _ = pair()
    domain = ModelDomain(iommu)
    first.group.attach_handle(handle(domain))
    log = list(first.log)
    new = handle(domain)
    first.group.replace_handle(new)
    assert first.log == log
    assert first.group.handles[0] is new


def test_the_order_of_checks_of_a_pasid() -> None:
    iommu, first, second = pair()
    second.max_pasids = 8
    plain, domain, foreign = Domain(iommu), ModelDomain(iommu), ModelDomain(ModelIommu())
    group = first.group
    group.attach_pasid(first, 5, handle(domain))
    for pasid, wrong, error in (
        (5, plain, EOPNOTSUPP),
        (5, foreign, EINVAL),
        (0, domain, EINVAL),
        (8, domain, EINVAL),
        (5, domain, EBUSY),
    ):
        with pytest.raises(error):
            group.attach_pasid(first, pasid, handle(wrong))
    for pasid, wrong, error in ((5, plain, EOPNOTSUPP), (5, foreign, EINVAL), (0, domain, EINVAL), (6, domain, EINVAL)):
        with pytest.raises(error):
            group.replace_pasid(first, pasid, handle(wrong))
    log = list(first.log)
    new = handle(domain)
    group.replace_pasid(first, 5, new)
    assert group.handles[5] is new
    assert first.log == log
    group.detach_pasid(5)
    group.detach_pasid(5)
    assert not first.now
    assert not second.now


def faulting(iommu: ModelIommu, device: ModelDevice) -> list[IopfGroup]:
    """What the handler of the domain that the device is attached to gets."""
    got: list[IopfGroup] = []
    domain = ModelDomain(iommu)
    domain.iopf_handler = got.append
    device.group.attach_handle(handle(domain))
    return got


def test_faults_are_on_while_any_domain_with_a_handler_is_attached() -> None:
    iommu, device, _ = pair()
    got = faulting(iommu, device)
    domain = device.group.domain
    request = Fault(2, 0, 1, 0, 0)
    with pytest.raises(EINVAL):
        device.iopf.report(request, pasid_valid=False, last=True)
    device.iopf.enable(domain)
    device.iopf.enable(domain)
    device.iopf.disable(domain)
    device.iopf.disable(ModelDomain(iommu))  # without a handler: not counted
    device.iopf.report(request, pasid_valid=False, last=True)
    assert [group.faults for group in got] == [[request]]
    assert device.iopf.responses == [(request, 1)]
    got[0].respond(0)
    assert device.iopf.responses == [(request, 1), (request, 0)]
    device.iopf.disable(domain)
    with pytest.raises(EINVAL):
        device.iopf.report(request, pasid_valid=False, last=True)


def test_a_pasid_of_nobody_is_answered_invalid_without_a_users_table() -> None:
    iommu, device, _ = pair()
    got = faulting(iommu, device)
    device.iopf.enable(device.group.domain)
    with pytest.raises(EINVAL):
        device.iopf.report(Fault(3, 5, 1, 0, 0), pasid_valid=True, last=True)
    assert not got


def test_parts_are_gathered_by_group_number_alone() -> None:
    """Not by PASID, as the kernel does."""
    iommu, device, _ = pair()
    got = faulting(iommu, device)
    device.iopf.enable(device.group.domain)
    parts = [Fault(0, pasid, 7, 0, at) for at, pasid in enumerate((0, 5, 0))]
    for part in parts[:2]:
        device.iopf.report(part, pasid_valid=False, last=False)
    device.iopf.report(parts[2], pasid_valid=False, last=True)
    assert got[0].faults == parts
