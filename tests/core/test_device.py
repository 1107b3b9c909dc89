"""Binding: who owns a group, what goes with a device, and what hardware tells about itself (device.c)."""

import errno

import pytest

import iommufd_uapi.iommufd as uapi
import iommufd_uapi.iommufd_test as test_uapi
from iommufdd.errors import EBUSY, EINVAL, EPERM
from iommufdd.iommu.ops import Cap
from iommufdd.user import Gate

from .harness import DATA, NEST_PARENT, NO_DIRTY_DEVICE, PASID_DEVICE, Client
from .invariants import check
from .model import Bench
from .snapshot import difference, state


def test_a_group_has_one_owner() -> None:
    bench = Bench()
    other = Bench(Client(bench.c.process), bench.iommu)
    first = bench.device()
    second = bench.device(first)
    idev = bench.bind(first)
    before = state(bench.c.world)
    with pytest.raises(EPERM):
        other.bind(second)
    assert not difference(before, state(bench.c.world))
    again = bench.bind(second)
    assert first.group.owner_count == 2
    assert idev.igroup is again.igroup
    bench.unbind(idev)
    with pytest.raises(EPERM):
        other.bind(first)
    bench.unbind(again)
    other.bind(first)
    check(bench.c.world)


def test_a_group_in_use_cannot_be_had() -> None:
    """By a driver that never asked iommufd."""
    bench = Bench()
    dev = bench.device()
    domain = bench.iommu.domain_alloc_paging(dev, 0, None)
    dev.group.domain = domain
    before = state(bench.c.world)
    with pytest.raises(EBUSY):
        bench.bind(dev)
    assert not difference(before, state(bench.c.world))
    dev.group.domain = dev.group.blocking
    bench.bind(dev)


def test_dma_that_is_not_coherent_is_refused_first() -> None:
    bench = Bench()
    other = Bench(Client(bench.c.process), bench.iommu)
    first = bench.device()
    second = bench.device(first)
    second.caps.discard(Cap.CACHE_COHERENCY)
    bench.bind(first)
    with pytest.raises(EINVAL):
        other.bind(second)


@pytest.mark.parametrize("gate", [Gate.MEMORY, Gate.OBJECT])
def test_a_bind_that_fails_gives_the_group_back(gate: Gate) -> None:
    bench = Bench()
    dev = bench.device()
    before = state(bench.c.world)
    bench.c.gate.arm(1 + (gate is Gate.OBJECT))
    with pytest.raises(gate.error):
        bench.bind(dev)
    assert bench.c.gate.fired is gate
    assert not difference(before, state(bench.c.world))
    assert dev.group.owner is None


def test_enforced_coherency_is_read_once() -> None:
    bench = Bench()
    dev = bench.device()
    dev.caps.add(Cap.ENFORCE_CACHE_COHERENCY)
    idev = bench.bind(dev)
    dev.caps.clear()
    assert idev.enforce_cache_coherency


def test_a_device_is_its_drivers_until_unbound() -> None:
    bench = Bench()
    (idev,) = bench.bound(1)
    bench.c.destroy(idev.id, errno.EBUSY)
    bench.unbind(idev)
    bench.c.destroy(idev.id, errno.ENOENT)
    check(bench.c.world)


def test_a_device_that_goes_leaves_a_tombstone_of_its_vdevice() -> None:
    c = Client()
    ioas = c.ioas_alloc()
    mock = c.mock_domain(ioas)
    viommu = c.viommu(mock.idev, c.hwpt(mock.idev, ioas, NEST_PARENT))
    vdevice = c.vdevice(viommu, mock.idev, 7)
    assert c.vdevice(viommu, mock.idev, 8, errno.EEXIST) == 0
    c.destroy(mock.stdev)
    c.destroy(vdevice, errno.ENOENT)
    again = c.mock_domain(ioas)
    assert vdevice not in again
    assert mock.idev in again  # the others are free
    new = c.vdevice(viommu, again.idev, 7)  # and so is the virt_id
    assert new != vdevice
    c.destroy(new)
    c.destroy(viommu)
    assert [c.ioas_alloc() for _ in range(4)].count(vdevice) == 0
    check(c.world)
    c.close()
    assert not len(c.ictx.objects)


def test_a_vdevice_that_goes_first_leaves_nothing() -> None:
    c = Client()
    ioas = c.ioas_alloc()
    mock = c.mock_domain(ioas)
    viommu = c.viommu(mock.idev, c.hwpt(mock.idev, ioas, NEST_PARENT))
    vdevice = c.vdevice(viommu, mock.idev, 7)
    c.destroy(vdevice)
    assert c.vdevice(viommu, mock.idev, 7) == vdevice
    c.destroy(viommu, errno.EBUSY)


# ---- GET_HW_INFO ----


def test_hardware_that_does_not_describe_itself() -> None:
    bench = Bench()
    dev = bench.device(max_pasids=1 << 7)
    idev = bench.bind(dev)
    c = bench.c
    c.process.put(b"\xff" * 16)
    cmd = c.ioctl(uapi.HwInfo(dev_id=idev.id, data_len=8, data_uptr=DATA, data_type=99))
    assert (cmd.data_type, cmd.data_len, cmd.out_max_pasid_log2) == (uapi.IOMMU_HW_INFO_TYPE_NONE, 0, 7)
    assert c.mm.read(DATA, 16) == bytes(8) + b"\xff" * 8
    assert cmd.out_capabilities == uapi.IOMMU_HW_CAP_PCI_ATS_NOT_SUPPORTED
    dev.caps |= {Cap.DIRTY_TRACKING, Cap.PCI_ATS_SUPPORTED}
    dev.max_pasids = 0
    cmd = c.ioctl(uapi.HwInfo(dev_id=idev.id))
    assert cmd.out_capabilities == uapi.IOMMU_HW_CAP_DIRTY_TRACKING
    assert cmd.out_max_pasid_log2 == 0


def test_what_the_mock_says() -> None:
    c = Client()
    mock = c.mock_domain(c.ioas_alloc(), PASID_DEVICE | NO_DIRTY_DEVICE)
    cmd = c.ioctl(uapi.HwInfo(dev_id=mock.idev, data_len=6, data_uptr=DATA))
    assert (cmd.data_len, cmd.out_max_pasid_log2) == (8, test_uapi.MOCK_PASID_WIDTH)
    assert cmd.out_capabilities == uapi.IOMMU_HW_CAP_PCI_ATS_NOT_SUPPORTED
    assert c.mm.read(DATA, 6) == test_uapi.TestHwInfo(0, test_uapi.IOMMU_HW_INFO_SELFTEST_REGVAL).pack()[:6]
    c.process.put(b"\xee" * 16)
    c.ioctl(uapi.HwInfo(dev_id=mock.idev, data_len=11, data_uptr=DATA))
    info = test_uapi.TestHwInfo(0, test_uapi.IOMMU_HW_INFO_SELFTEST_REGVAL).pack()
    assert c.mm.read(DATA, 16) == info + bytes(3) + b"\xee" * 5
    flags = uapi.IOMMU_HW_INFO_FLAG_INPUT_TYPE
    c.ioctl(uapi.HwInfo(flags=flags, dev_id=mock.idev, data_type=uapi.IOMMU_HW_INFO_TYPE_AMD), errno.EOPNOTSUPP)
    c.ioctl(uapi.HwInfo(flags=flags, dev_id=mock.idev, data_type=test_uapi.IOMMU_HW_INFO_TYPE_SELFTEST))
