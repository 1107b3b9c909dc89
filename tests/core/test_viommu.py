"""vIOMMU, vDEVICE and hardware queues: whose they are, what they keep, what they need (viommu.c)."""

import errno

import pytest

import iommufd_uapi.iommufd as uapi
import iommufd_uapi.iommufd_test as test_uapi
from iommufdd.access import Access
from iommufdd.user import PAGE_SIZE, ULONG_MAX

from .harness import APERTURE, DATA, NEST_PARENT, READ, WRITE, Client, Mock
from .invariants import check
from .model import Bench
from .snapshot import difference, state, use_counts


class Guest:
    """A vIOMMU over an IOAS, and the mock device it was made with."""

    def __init__(self, *, in_data: int | None = None) -> None:
        self.c = c = Client()
        self.ioas = c.ioas_alloc()
        self.mock: Mock = c.mock_domain(self.ioas)
        self.parent = c.hwpt(self.mock.idev, self.ioas, NEST_PARENT)
        self.viommu = c.viommu(self.mock.idev, self.parent, in_data=in_data)

    def memory(self, npages: int = 4, iova: int = APERTURE, flags: int = READ | WRITE) -> int:
        addr = self.c.process.buffer(npages)
        self.c.map(self.ioas, addr, npages * PAGE_SIZE, iova, flags)
        return addr


def test_the_parent_need_not_be_the_devices() -> None:
    guest = Guest()
    c = guest.c
    other = c.mock_domain(c.ioas_alloc())
    viommu = c.viommu(other.idev, guest.parent)
    c.destroy(guest.parent, errno.EBUSY)
    c.destroy(viommu)
    c.destroy(guest.viommu)
    c.destroy(guest.parent)


def test_which_devices_a_viommu_takes() -> None:
    guest = Guest()
    c = guest.c
    bench = Bench(c)
    (foreign,) = bench.bound(1)
    other = c.mock_domain(c.ioas_alloc())
    before = state(c.world)
    c.vdevice(guest.viommu, foreign.id, 1, errno.EINVAL)
    c.vdevice(guest.viommu, guest.parent, 1, errno.ENOENT)
    c.vdevice(guest.parent, other.idev, 1, errno.ENOENT)
    c.viommu(foreign.id, guest.parent, expect=errno.EOPNOTSUPP)
    c.viommu(other.idev, other.hwpt, expect=errno.EINVAL)
    c.viommu(other.idev, guest.ioas, expect=errno.ENOENT)
    assert not difference(before, state(c.world))


def test_a_device_is_one_vdevice_and_a_virt_id_one_device() -> None:
    guest = Guest()
    c = guest.c
    other = c.mock_domain(c.ioas_alloc())
    another = c.viommu(other.idev, guest.parent)
    vdevice = c.vdevice(guest.viommu, guest.mock.idev, 2**64 - 1)
    before = state(c.world)
    c.vdevice(another, guest.mock.idev, 5, errno.EEXIST)
    c.vdevice(guest.viommu, other.idev, 2**64 - 1, errno.EEXIST)
    assert not difference(before, state(c.world))
    c.vdevice(another, other.idev, 2**64 - 1)
    c.destroy(vdevice)
    c.vdevice(another, guest.mock.idev, 5)
    check(c.world)


def test_a_failed_viommu_takes_its_registers_back() -> None:
    guest = Guest(in_data=1)
    c = guest.c
    data = test_uapi.ViommuSelftest(in_data=2).pack()
    addr = c.process.buffer(1)
    c.mm.write(addr, data)
    c.mm.protect(addr, addr + PAGE_SIZE, readable=True, writable=False)
    before = state(c.world)
    cmd = uapi.ViommuAlloc(type=test_uapi.IOMMU_VIOMMU_TYPE_SELFTEST, dev_id=guest.mock.idev, hwpt_id=guest.parent)
    cmd.data_len, cmd.data_uptr = len(data), addr
    c.ioctl(cmd, errno.EFAULT)
    assert not difference(before, state(c.world))


# ---- hardware queues ----


def test_a_queue_locks_its_pages() -> None:
    guest = Guest()
    c = guest.c
    guest.memory()
    queue = c.hw_queue(guest.viommu, 0, APERTURE + 0x1080, 0x2000)
    assert use_counts(c.world.memfds[-1].pins) == [(0, 3, 1)]
    before = state(c.world)
    c.unmap(guest.ioas, APERTURE, 4 * PAGE_SIZE, errno.EBUSY)
    c.unmap(guest.ioas, 0, ULONG_MAX, errno.EBUSY)
    c.destroy(guest.viommu, errno.EBUSY)
    assert not difference(before, state(c.world))
    access = next(obj for obj in c.ictx.objects if isinstance(obj, Access))
    assert access.id == queue + 1
    c.destroy(access.id, errno.EBUSY)
    c.destroy(queue)
    assert c.ictx.objects.get(access.id) is None
    c.unmap(guest.ioas, APERTURE, 4 * PAGE_SIZE)
    check(c.world)


def test_an_unmapping_goes_as_far_as_the_locked_area() -> None:
    guest = Guest()
    c = guest.c
    guest.memory(1, APERTURE)
    guest.memory(1, APERTURE + 0x10000)
    guest.memory(1, APERTURE + 0x20000)
    c.hw_queue(guest.viommu, 0, APERTURE + 0x10000)
    c.unmap(guest.ioas, APERTURE, 0x30000, errno.EBUSY)
    c.unmap(guest.ioas, APERTURE, PAGE_SIZE, errno.ENOENT)
    c.unmap(guest.ioas, APERTURE + 0x20000, PAGE_SIZE)
    check(c.world)


def test_areas_that_show_consecutive_pages_are_one_queue() -> None:
    guest = Guest()
    c = guest.c
    file = c.world.memfd(8)
    places = [c.process.map(file, 1, page=page) for page in (4, 5, 7)]
    for n, addr in enumerate(places):
        c.map(guest.ioas, addr, PAGE_SIZE, APERTURE + n * PAGE_SIZE)
    before = state(c.world)
    c.hw_queue(guest.viommu, 0, APERTURE, 3 * PAGE_SIZE, errno.EFAULT)
    assert not difference(before, state(c.world))
    c.hw_queue(guest.viommu, 0, APERTURE + 1, 2 * PAGE_SIZE - 1)


@pytest.mark.parametrize(
    ("iova", "length", "expect"),
    [
        (APERTURE, 0, errno.EINVAL),
        (ULONG_MAX, 2, errno.EOVERFLOW),
        (0xFFF, ULONG_MAX - 0xFFF, errno.ERANGE),
        (APERTURE - 1, 2, errno.ENOENT),
        (APERTURE, 1 << 40, errno.ENOMEM),
        (APERTURE, (1 << 40) - PAGE_SIZE, errno.ENOENT),
        (APERTURE + 3 * PAGE_SIZE, PAGE_SIZE + 1, errno.ENOENT),
        (APERTURE + 0x10000, PAGE_SIZE, errno.EPERM),
    ],
)
def test_a_place_that_cannot_be_a_queue(iova: int, length: int, expect: int) -> None:
    guest = Guest()
    guest.memory()
    guest.memory(1, APERTURE + 0x10000, WRITE)
    before = state(guest.c.world)
    guest.c.hw_queue(guest.viommu, 0, iova, length, expect)
    assert not difference(before, state(guest.c.world))


def test_memory_that_cannot_be_pinned_any_more_is_pinned_already() -> None:
    guest = Guest()
    c = guest.c
    addr = guest.memory()
    c.mm.unmap(addr, addr + 4 * PAGE_SIZE)
    c.hw_queue(guest.viommu, 0, APERTURE, 4 * PAGE_SIZE)
    check(c.world)


def test_the_driver_chains_its_queues() -> None:
    guest = Guest()
    c = guest.c
    guest.memory()
    before = state(c.world)
    c.hw_queue(guest.viommu, 1, APERTURE, expect=errno.EIO)
    c.hw_queue(guest.viommu, 2, APERTURE, expect=errno.EINVAL)
    assert not difference(before, state(c.world))
    first = c.hw_queue(guest.viommu, 0, APERTURE)
    c.hw_queue(guest.viommu, 0, APERTURE, expect=errno.EEXIST)
    second = c.hw_queue(guest.viommu, 1, APERTURE)
    c.destroy(first, errno.EBUSY)
    c.destroy(second)
    c.hw_queue(guest.viommu, 1, APERTURE, expect=errno.EEXIST)  # quirk: it was queue 0 that was freed
    c.destroy(first)
    check(c.world)


def test_queues_need_a_driver_that_has_them() -> None:
    guest = Guest()
    cmd = uapi.HwQueueAlloc(viommu_id=guest.viommu, type=7, length=1)
    guest.c.ioctl(cmd, errno.EOPNOTSUPP)
    guest.c.ioctl(uapi.HwQueueAlloc(viommu_id=guest.parent, type=7, length=1), errno.ENOENT)
    guest.c.ioctl(uapi.HwQueueAlloc(viommu_id=guest.viommu, length=1), errno.EOPNOTSUPP)


def test_close_with_everything_alive() -> None:
    guest = Guest(in_data=9)
    c = guest.c
    guest.memory()
    c.vdevice(guest.viommu, guest.mock.idev, 7)
    c.replace(guest.mock.stdev, c.nested(guest.mock.idev, guest.viommu))
    for index in range(2):
        c.hw_queue(guest.viommu, index, APERTURE)
    _, fd = c.veventq(guest.viommu)
    c.close()
    assert len(c.ictx.objects) == 12
    c.fds.close(fd)
    assert not len(c.ictx.objects)
    assert not c.world.memfds[-1].pins
    assert not c.ictx.mmaps._regions


# ---- registers to map ----


def test_registers_are_mapped_as_a_whole_and_shared() -> None:
    guest = Guest(in_data=0x1234)
    c = guest.c
    length = 2 * PAGE_SIZE
    vma = c.mmap(PAGE_SIZE, length - 1)  # mmap(2) rounds up
    assert vma.region.data[:4] == (0x1234).to_bytes(4, "little")
    for offset, size, prot, flags, expect in (
        (PAGE_SIZE, length, 3, 2, errno.EINVAL),
        (PAGE_SIZE, length, 7, 1, errno.EPERM),
        (0, length, 3, 1, errno.ENXIO),
        (2 * PAGE_SIZE, PAGE_SIZE, 3, 1, errno.ENXIO),
        (PAGE_SIZE, PAGE_SIZE, 3, 1, errno.ENXIO),
    ):
        c.fails(lambda o=offset, s=size, p=prot, f=flags: c.mmap(o, s, p, f), expect)  # type: ignore[misc]
    second = c.mmap(PAGE_SIZE, length)
    c.munmap(vma)
    c.destroy(guest.viommu, errno.EBUSY)
    c.munmap(second)
    c.destroy(guest.viommu)
    c.fails(lambda: c.mmap(PAGE_SIZE, length), errno.ENXIO)
    check(c.world)


def test_offsets_are_given_out_first_fit() -> None:
    guest = Guest(in_data=1)
    c = guest.c
    viommus = [guest.viommu, *(c.viommu(guest.mock.idev, guest.parent, in_data=n) for n in (2, 3))]
    assert list(c.ictx.mmaps._regions) == [0x1000, 0x3000, 0x5000]
    c.destroy(viommus[1])
    c.viommu(guest.mock.idev, guest.parent, in_data=4)
    assert test_uapi.ViommuSelftest.unpack(c.mm.read(DATA, 24)).out_mmap_offset == 0x3000
    assert sorted(c.ictx.mmaps._regions) == [0x1000, 0x3000, 0x5000]


def test_registers_of_another_context_are_not_there() -> None:
    guest = Guest(in_data=1)
    other = Client(guest.c.process)
    other.fails(lambda: other.mmap(PAGE_SIZE, 2 * PAGE_SIZE), errno.ENXIO)
