"""IOAS_CHANGE_PROCESS: who pays before and after, and what is left when it fails (ioas.c, lower half)."""

import errno

import pytest

import iommufd_uapi.iommufd as uapi
import iommufd_uapi.iommufd_test as test_uapi
from iommufdd.user import PAGE_SIZE

from .harness import APERTURE, OPS, Client
from .invariants import check
from .snapshot import difference, state

SIZE = 4 * PAGE_SIZE


class Handover:
    """A process that mapped four pages of a file, and one that is to take them over."""

    def __init__(self, *, by_process: bool = False, privileged: bool = False, domain: bool = True) -> None:
        self.old = old = Client()
        if by_process:
            old.option(uapi.IOMMU_OPTION_RLIMIT_MODE, 1)
        self.new = Client(old.process.fork(), ictx=old.ictx)
        for client in (old, self.new):
            client.caller.task.cap_ipc_lock = privileged
        self.ioas = old.ioas_alloc()
        if domain:
            old.mock_domain(self.ioas)
        self.fd = old.process.install(old.world.memfd())
        old.map_file(self.ioas, self.fd, 0, SIZE, APERTURE)

    def new_user(self) -> None:
        self.new.caller.task.user = self.new.world.machine.user(7)

    def change(self, expect: int = 0) -> None:
        self.new.ioctl(uapi.IoasChangeProcess(), expect)

    def charges(self) -> tuple[int, ...]:
        """pinned_vm, locked_vm and the user's of the old, then of the new one."""
        sides = (self.old, self.new)
        return tuple(n for c in sides for n in (c.mm.pinned_vm, c.mm.locked_vm, c.caller.task.user.locked_vm))


def test_by_user() -> None:
    pair = Handover()
    pair.new_user()
    assert pair.charges() == (4, 0, 4, 0, 0, 0)
    pair.change()
    assert pair.charges() == (0, 0, 0, 4, 0, 4)
    check(pair.old.world)
    pair.old.process.exit()
    pair.new.unmap(pair.ioas, APERTURE, SIZE)
    assert pair.charges() == (0,) * 6


def test_by_process() -> None:
    pair = Handover(by_process=True)
    assert pair.charges() == (4, 4, 0, 0, 0, 0)
    pair.change()
    assert pair.charges() == (0, 0, 0, 4, 4, 0)
    check(pair.old.world)


def test_what_nobody_pays_for_is_not_moved() -> None:
    """quirk: pinned_vm stays with the old process and is taken from the new one."""
    pair = Handover(privileged=True)
    pair.change()
    assert pair.charges() == (4, 0, 0, 0, 0, 0)
    pair.new.unmap(pair.ioas, APERTURE, SIZE)
    assert pair.charges() == (4, 0, 0, -4, 0, 0)


def test_the_same_user_pays_twice_for_a_moment() -> None:
    """charge_current() comes before the uncharge."""
    pair = Handover()
    pair.new.caller.task.memlock = 7 * PAGE_SIZE
    before = state(pair.old.world)
    pair.change(errno.ENOMEM)
    assert not difference(before, state(pair.old.world))
    pair.new.caller.task.memlock = 8 * PAGE_SIZE
    pair.change()
    assert pair.charges() == (0, 0, 4, 4, 0, 4)


def test_to_oneself_nothing_moves() -> None:
    pair = Handover()
    pair.change()
    before = state(pair.old.world)
    pair.new.caller.task.memlock = 0
    pair.change()
    assert not difference(before, state(pair.old.world))


def test_pages_seen_by_several_areas_are_moved_once() -> None:
    pair = Handover()
    c = pair.old
    pair.new_user()
    other = c.ioas_alloc()
    c.mock_domain(other)
    c.copy(other, pair.ioas, APERTURE, SIZE, APERTURE)
    c.map_file(other, pair.fd, 0, SIZE, APERTURE + SIZE)  # the same file, other pages structure
    pair.change()
    assert pair.charges() == (0, 0, 0, 8, 0, 8)
    check(c.world)


def test_what_is_not_pinned_changes_hands_too() -> None:
    pair = Handover(domain=False)
    pair.new_user()
    pair.change()
    assert pair.charges() == (0,) * 6
    pair.old.process.exit()
    pair.new.mock_domain(pair.ioas)
    assert pair.charges() == (0, 0, 0, 4, 0, 4)


@pytest.mark.parametrize("kind", ["memory", "dmabuf"])
def test_one_area_that_is_no_file_stops_it(kind: str) -> None:
    pair = Handover()
    c = pair.old
    ioas = c.ioas_alloc()
    if kind == "memory":
        c.map(ioas, c.process.buffer(1), PAGE_SIZE, 0)
    else:
        fd = c.result(test_uapi.TestCmd(op=OPS[test_uapi.DmabufGet], u=test_uapi.DmabufGet(PAGE_SIZE).pack()))
        c.map_file(ioas, fd, 0, PAGE_SIZE, 0)
    before = state(c.world)
    pair.change(errno.EINVAL)
    assert not difference(before, state(c.world))


def test_a_limit_passed_in_one_way_of_counting_takes_back_the_other() -> None:
    """Pages counted by user and by process in one context: made by switching the mode between two contexts' files."""
    pair = Handover(by_process=True)
    c = pair.old
    ioas = next(obj for obj in c.ictx.objects if obj.id == pair.ioas)
    area = next(iter(ioas.iopt.areas))  # type: ignore[attr-defined]
    c.map_file(pair.ioas, pair.fd, 0, SIZE, APERTURE + SIZE)
    other = ioas.iopt.areas.next(area).pages  # type: ignore[attr-defined]
    other.account = type(other.account)(1)
    c.mm.locked_vm -= 4
    c.caller.task.user.locked_vm += 4
    check(c.world)
    before = state(c.world)
    pair.new_user()
    pair.new.mm.locked_vm = 5
    pair.new.caller.task.memlock = 8 * PAGE_SIZE
    pair.change(errno.ENOMEM)
    pair.new.mm.locked_vm = 0
    assert not difference(before, state(c.world))


# ---- the payer is gone ----


def test_a_payer_that_is_gone_cannot_be_repaid() -> None:
    """quirk: the new one has been charged, and is never given it back."""
    pair = Handover(by_process=True)
    pair.old.process.exit()
    pair.change(errno.EINVAL)
    assert pair.charges() == (4, 4, 0, 4, 4, 0)
    pair.change()  # now they are the new one's
    pair.new.unmap(pair.ioas, APERTURE, SIZE)
    assert pair.charges() == (4, 4, 0, 4, 4, 0)


def test_nor_for_nothing() -> None:
    """quirk: update_mm_locked_vm() asks for the mm before it looks at the number."""
    pair = Handover(by_process=True, domain=False)
    pair.old.process.exit()
    pair.change(errno.EINVAL)
    pair.change()
    pair.new.mock_domain(pair.ioas)
    assert pair.charges() == (0, 0, 0, 4, 4, 0)


def test_what_was_charged_last_is_what_the_new_one_pays() -> None:
    """quirk: unpinned pages that a dead process could not be repaid for are counted (last_npinned)."""
    pair = Handover(by_process=True)
    c = pair.new
    hwpt = next(obj.id for obj in c.ictx.objects if obj.type.name == "SELFTEST")
    pair.old.process.exit()
    c.destroy(hwpt)  # the last domain: unpinned, the charge stays
    assert pair.charges() == (4, 4, 0, 0, 0, 0)
    pair.change(errno.EINVAL)
    assert pair.charges() == (4, 4, 0, 4, 4, 0)


def test_users_do_not_die() -> None:
    pair = Handover()
    pair.new_user()
    pair.old.process.exit()
    pair.change()
    assert pair.charges() == (0, 0, 0, 4, 0, 4)


def test_reserved_is_looked_at_first() -> None:
    pair = Handover()
    pair.new.ioctl(uapi.IoasChangeProcess(reserved=1), errno.EOPNOTSUPP)
