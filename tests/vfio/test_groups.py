"""Several devices of one group: one owner, one page table for all, one set of PASIDs."""

import errno

from iommufdd.errors import EIO
from tests.core.harness import PASID, Client
from tests.core.invariants import check
from tests.core.snapshot import difference, state
from tests.vfio.cdev import Lab


class Pair(Lab):
    """vfio0 and vfio1 in one group, vfio2 in another."""

    def __init__(self) -> None:
        super().__init__()
        self.vfio1 = self.device("vfio1", self.vfio0)
        self.vfio2 = self.device("vfio2")
        self.other = Client(self.c.process)  # a second context of the same process


def test_a_group_belongs_to_one_context() -> None:
    pair = Pair()
    first, second, third = pair.bound(), pair.open("vfio1"), pair.open("vfio2")
    before = state(pair.world)
    second.bind(pair.other.fd, errno.EPERM)
    assert not difference(before, state(pair.world))
    third.bind(pair.other.fd)
    assert second.bind() == 2
    assert pair.vfio0.group.owner_count == 2
    first.close()
    again = pair.open()
    again.bind(pair.other.fd, errno.EPERM)
    second.close()
    again.bind(pair.other.fd)
    check(pair.world)


def test_the_second_device_joins_what_the_first_has() -> None:
    pair = Pair()
    c = pair.c
    first, second = pair.bound(), pair.bound("vfio1")
    ioas = c.ioas_alloc()
    hwpt, other = c.hwpt(1, ioas), c.hwpt(1, ioas)
    first.attach(hwpt)
    assert list(pair.vfio0.now.values()) == list(pair.vfio1.now.values())  # the whole group moves at once
    second.attach(other, expect=errno.EINVAL)
    pair.vfio1.log.clear()
    assert second.attach(hwpt) == hwpt
    assert not pair.vfio1.log
    check(pair.world)
    second.attach(other)  # a replace takes the first along
    assert first.attach(other) == other
    c.destroy(hwpt)
    first.detach()
    assert pair.vfio0.now == pair.vfio1.now != {}
    second.detach()
    assert not pair.vfio0.now
    assert not pair.vfio1.now
    check(pair.world)


def test_pasids_belong_to_the_group() -> None:
    pair = Pair()
    c = pair.c
    first, second = pair.bound(), pair.bound("vfio1")
    ioas = c.ioas_alloc()
    hwpt, other = c.hwpt(1, ioas, PASID), c.hwpt(1, ioas, PASID)
    first.attach(hwpt, pasid=4)
    assert set(pair.vfio0.now) == set(pair.vfio1.now) == {4}
    second.attach(other, pasid=4, expect=errno.EINVAL)
    second.attach(hwpt, pasid=4)
    second.attach(other, pasid=8)
    check(pair.world)
    first.close()
    assert set(pair.vfio0.now) == set(pair.vfio1.now) == {4, 8}
    second.close()
    assert not pair.vfio0.now
    assert not pair.vfio1.now
    check(pair.world)


def test_one_member_that_refuses_keeps_all_where_they_are() -> None:
    pair = Pair()
    c = pair.c
    first, second = pair.bound(), pair.bound("vfio1")
    ioas = c.ioas_alloc()
    first.attach(ioas)
    second.attach(ioas)
    new = c.hwpt(1, ioas)
    pair.vfio1.refuses[pair.iommu.domains[-1]] = EIO
    before = state(pair.world)
    first.attach(new, expect=errno.EIO)
    assert not difference(before, state(pair.world))


def test_a_reset_is_of_one_function() -> None:
    pair = Pair()
    pair.bound("vfio1")
    assert (pair.vfio0.resets, pair.vfio1.resets) == (0, 1)


def test_devices_apart_have_page_tables_apart() -> None:
    pair = Pair()
    first, third = pair.bound(), pair.bound("vfio2")
    ioas = pair.c.ioas_alloc()
    assert first.attach(ioas) == third.attach(ioas)  # they can share one
    first.detach()
    assert pair.vfio2.now
    check(pair.world)
