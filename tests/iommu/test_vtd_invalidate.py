"""IOMMU_HWPT_INVALIDATE on VT-d: errors in their order, and how many entries were done (SEMANTICS 2.6)."""

import errno

import pytest

import iommufd_uapi.iommufd as uapi
from iommufdd.device import IommufdDevice
from iommufdd.iommu.monitor import Invalidation, Monitor
from tests.core.harness import DATA, NOWHERE

from .lab import Lab

EVERYTHING = 2**64 - 1
LEAF = 1
ARRAY = DATA + 0x1000  # of the calling process; 24 bytes before the end of its memory is TAIL
TAIL = DATA - 0x1000 + 16 * 0x1000


class Listener(Monitor):
    def __init__(self) -> None:
        self.heard: list[int] = []

    def invalidated(self, what: Invalidation) -> None:
        self.heard.append(what.first)


class Caller:
    """A nested HWPT and a way to invalidate it with any argument."""

    def __init__(self) -> None:
        self.lab = Lab()
        self.idev: IommufdDevice = self.lab.device()
        self.hwpt, _, _ = self.lab.guest(self.idev)
        self.lab.attach(self.idev, self.hwpt)
        self.listener = Listener()
        self.lab.iommu.monitors.append(self.listener)

    def entries(self, *entries: tuple[int, int, int, int], at: int = ARRAY) -> int:
        """(addr, npages, flags, reserved) each; where they are."""
        data = b"".join(
            a.to_bytes(8, "little") + n.to_bytes(8, "little") + f.to_bytes(4, "little") + r.to_bytes(4, "little")
            for a, n, f, r in entries
        )
        assert self.lab.c.mm.write(at, data) == len(data)
        return at

    def call(self, expect: int, done: int, **keys: int) -> None:
        cmd = uapi.HwptInvalidate(
            **{"hwpt_id": self.hwpt, "data_uptr": ARRAY, "data_type": uapi.IOMMU_HWPT_INVALIDATE_DATA_VTD_S1,
               "entry_len": 24, "entry_num": 1, **keys}
        )  # fmt: skip
        self.lab.c.ioctl(cmd, expect)
        assert cmd.entry_num == done


GOOD = (0x1000, 1, 0, 0)


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        ((0x1000, 1, 2, 0), errno.EOPNOTSUPP),
        ((0x1000, 1, LEAF | 1 << 31, 0), errno.EOPNOTSUPP),
        ((0x1000, 1, 0, 1), errno.EOPNOTSUPP),
        ((0x1001, 1, 2, 0), errno.EOPNOTSUPP),  # flags before the address
        ((0x1001, 1, 0, 0), errno.EINVAL),
        ((0x1800, EVERYTHING, 0, 0), errno.EINVAL),
        ((0x1000, EVERYTHING, 0, 0), errno.EINVAL),
    ],
)
@pytest.mark.parametrize("before", [0, 1, 3])
def test_entries_before_the_bad_one_are_done(bad: tuple[int, int, int, int], error: int, before: int) -> None:
    caller = Caller()
    caller.entries(*[(0x1000 * at, 1, LEAF, 0) for at in range(before)], bad, GOOD)
    caller.call(error, before, entry_num=before + 2)
    assert caller.listener.heard == [0x1000 * at for at in range(before)]


def test_what_is_accepted() -> None:
    caller = Caller()
    entries = [(0, EVERYTHING, 0, 0), (0, EVERYTHING, LEAF, 0), (0, 0, 0, 0), (0x1000, 0, LEAF, 0),
               (2**64 - 4096, 1, 0, 0), (2**63, 1 << 60, 0, 0), GOOD]  # fmt: skip
    caller.entries(*entries)
    caller.call(0, len(entries), entry_num=len(entries))
    assert len(caller.listener.heard) == len(entries)
    assert caller.listener.heard[3:5] == [0, 2**64 - 4096]


def test_the_cores_checks_come_first() -> None:
    """reserved, the array, the id, the object: nothing is done."""
    caller = Caller()
    lab = caller.lab
    caller.entries(GOOD)
    caller.call(errno.EOPNOTSUPP, 0, reserved=1, data_uptr=0)
    for keys in ({"data_uptr": 0}, {"entry_len": 0}, {"entry_len": 4097}, {"entry_num": (1 << 19) + 1}):
        caller.call(errno.EINVAL, 0, hwpt_id=NOWHERE, **keys)
    caller.call(errno.ENOENT, 0, hwpt_id=NOWHERE)
    hwpt = lab.c.ictx.objects.get(caller.hwpt)
    (parent,) = (held.id for held in hwpt.held)  # type: ignore[union-attr]
    for other in (parent, caller.idev.id):
        caller.call(errno.EINVAL, 0, hwpt_id=other)
        caller.call(errno.EINVAL, 0, hwpt_id=other, entry_num=0)
    assert caller.listener.heard == []


def test_the_drivers_checks() -> None:
    caller = Caller()
    caller.entries(GOOD, GOOD)
    for data_type in (1, 2, 0xDEADBEEF):
        caller.call(errno.EINVAL, 0, data_type=data_type)
        caller.call(errno.EINVAL, 0, data_type=data_type, entry_num=0)
    for length in (16, 23, 25, 32):
        caller.call(errno.EINVAL, 0, entry_len=length)
        caller.call(0, 0, entry_len=length, entry_num=0)
    caller.call(0, 0, entry_num=0, data_uptr=0, entry_len=0)
    assert caller.listener.heard == []
    caller.call(0, 2, entry_num=2)


def test_memory_that_ends_in_the_array() -> None:
    caller = Caller()
    caller.entries(GOOD, (0x5000, 1, 0, 0), at=TAIL - 48)
    caller.call(errno.EFAULT, 2, data_uptr=TAIL - 48, entry_num=3)
    assert caller.listener.heard == [0x1000, 0x5000]
    caller.call(errno.EFAULT, 0, data_uptr=TAIL - 23)


def test_a_hwpt_nobody_is_attached_to_has_nothing_to_flush() -> None:
    caller = Caller()
    caller.lab.detach(caller.idev)
    caller.listener.heard.clear()
    caller.entries(GOOD, (0x1001, 1, 0, 0))
    caller.call(errno.EINVAL, 1, entry_num=2)  # the entries are read all the same
    assert caller.listener.heard == []
