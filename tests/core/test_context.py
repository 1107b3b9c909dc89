"""The dispatcher: numbers, answers, and what it undoes (main.c, lower half)."""

import errno

import pytest

import iommufd_uapi.iommufd as uapi
from iommufd_uapi.layout import Ioctl
from iommufdd.context import IOCTL_OPS

from .harness import ARGUMENT, NOWHERE, Client
from .snapshot import difference, state


def test_the_table_is_in_the_order_of_numbers_and_complete() -> None:
    cmds = [op.cmd for op in IOCTL_OPS]
    assert cmds == [*range(0x3B80, 0x3B95), 0x3BA0]
    assert all(4 <= op.min_size <= op.size for op in IOCTL_OPS)


@pytest.mark.parametrize("cmd", [0x3B80 | 1 << 16, 0x3A80, 0x3B95, 0x3B9F])
def test_numbers_that_nearly_are_ioctls(cmd: int) -> None:
    c = Client()
    assert c.rc(cmd, ARGUMENT) == -errno.ENOTTY
    assert c.rc(cmd, NOWHERE) == -errno.EFAULT


@pytest.mark.parametrize("cmd", [0, 0x3B00, 0x3B7F, 0x3BA1, 0x5401])
def test_numbers_of_nobody_do_not_look_at_memory(cmd: int) -> None:
    assert Client().rc(cmd, NOWHERE) == -errno.ENOTTY


@pytest.mark.parametrize(
    "arg",
    [
        uapi.IoasAlloc(flags=1),
        uapi.IoasAllowIovas(ioas_id=99, reserved=1),
        uapi.IoasIovaRanges(ioas_id=99, reserved=1),
        uapi.VfioIoas(ioas_id=99, op=1, reserved=1),
        uapi.HwptAlloc(dev_id=99, reserved=1),
        uapi.HwInfo(dev_id=99, flags=2),
        uapi.HwInfo(dev_id=99, reserved=b"\0\0\1"),
        uapi.FaultAlloc(flags=1),
        uapi.ViommuAlloc(dev_id=99, type=1, flags=1),
        uapi.ViommuAlloc(dev_id=99, type=0),
        uapi.VeventqAlloc(viommu_id=99, type=1, veventq_depth=1, flags=1),
        uapi.VeventqAlloc(viommu_id=99, type=1, veventq_depth=1, reserved=1),
        uapi.VeventqAlloc(viommu_id=99, type=0, veventq_depth=1),
        uapi.HwQueueAlloc(viommu_id=99, type=1, length=1, flags=1),
    ],
    ids=str,
)
def test_what_is_not_known_comes_before_what_is_not_there(arg: Ioctl) -> None:
    c = Client()
    before = state(c.world)
    c.ioctl(arg, errno.EOPNOTSUPP)
    assert not difference(before, state(c.world))


@pytest.mark.parametrize(
    "arg",
    [
        uapi.HwptSetDirtyTracking(hwpt_id=99, reserved=1),
        uapi.ViommuAlloc(dev_id=99, type=1, reserved=1),
        uapi.HwptAlloc(dev_id=99, reserved2=1),
    ],
    ids=str,
)
def test_fields_that_nobody_looks_at(arg: Ioctl) -> None:
    """quirk: so a client can leave anything there."""
    Client().ioctl(arg, errno.ENOENT)


def test_reasons_are_those_of_the_last_call() -> None:
    c = Client()
    c.destroy(7, errno.ENOENT)
    assert c.caller.error is not None
    assert c.caller.error.reason == "there is no object 7"
    assert c.caller.error.name == "ENOENT"
    c.ioas_alloc()
    assert c.caller.error is None


def test_a_mistake_of_ours_undoes_the_birth_and_is_not_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    c = Client()
    c.process.put(uapi.IoasAlloc().pack(), ARGUMENT)

    def broken(addr: int, data: bytes) -> int:
        raise ZeroDivisionError

    monkeypatch.setattr(c.mm, "write", broken)
    before = state(c.world)
    with pytest.raises(ZeroDivisionError):
        c.rc(uapi.IoasAlloc.CMD, ARGUMENT)
    assert not difference(before, state(c.world))


def test_contexts_of_one_machine_have_their_own_ids() -> None:
    c = Client()
    other = Client(c.process)
    assert c.ioas_alloc() == other.ioas_alloc() == 1
    c.destroy(1)
    other.destroy(1)
