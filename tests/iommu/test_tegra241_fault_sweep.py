"""Every acquisition behind a VINTF, a SID slot and an LVCMDQ fails once: its errno, and nothing has changed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

import iommufd_uapi.iommufd as uapi
from iommufd_uapi.smmuv3 import Cmd
from iommufdd.errors import EFAULT, ENOENT, ENOMEM
from iommufdd.user import Gate
from tests.core.invariants import check
from tests.core.snapshot import difference, state

from .cmdqv_lab import QUEUE, QUEUES, ROOM, TYPE, CmdqvGuest, CmdqvLab

if TYPE_CHECKING:
    from collections.abc import Callable

    from iommufd_uapi.layout import Ioctl

ALLOC = {Gate.COPY_IN, Gate.COPY_OUT, Gate.OBJECT, Gate.LOOKUP}
GATES: dict[str, set[Gate]] = {
    "viommu_alloc": ALLOC | {Gate.MMAP},
    "vdevice_alloc": ALLOC,
    "hw_queue_alloc": ALLOC | {Gate.MEMORY},
    "second_hw_queue_alloc": ALLOC | {Gate.MEMORY},
    "destroy_hw_queue": {Gate.COPY_IN},
}
ERRNO = {Gate.COPY_IN: EFAULT, Gate.COPY_OUT: EFAULT, Gate.LOOKUP: ENOENT}
SCENARIOS: dict[str, Callable[[CmdqvLab], Callable[[], int]]] = {}


def scenario(function: Callable[[CmdqvLab], Callable[[], int]]) -> Callable[[CmdqvLab], Callable[[], int]]:
    SCENARIOS[function.__name__] = function
    return function


def ready(lab: CmdqvLab, cmd: Ioctl) -> Callable[[], int]:
    addr = lab.c.process.put(cmd.pack(), at=0x7F00_0000)
    return lambda: lab.c.rc(cmd.CMD, addr)


@scenario
def viommu_alloc(lab: CmdqvLab) -> Callable[[], int]:
    idev = lab.device()
    parent = lab.parent(idev, lab.ram()[0])
    at = lab.c.process.put(bytes(16))
    return ready(lab, uapi.ViommuAlloc(type=TYPE, dev_id=idev.id, hwpt_id=parent, data_len=16, data_uptr=at))


@scenario
def vdevice_alloc(lab: CmdqvLab) -> Callable[[], int]:
    idev, other = lab.device(), lab.device()
    guest = CmdqvGuest(lab, idev)
    return ready(lab, uapi.VdeviceAlloc(viommu_id=guest.viommu, dev_id=other.id, virt_id=9))


@scenario
def hw_queue_alloc(lab: CmdqvLab) -> Callable[[], int]:
    guest = CmdqvGuest(lab, lab.device())
    return ready(
        lab, uapi.HwQueueAlloc(viommu_id=guest.viommu, type=QUEUE, nesting_parent_iova=QUEUES, length=0x2000)
    )


@scenario
def second_hw_queue_alloc(lab: CmdqvLab) -> Callable[[], int]:
    guest = CmdqvGuest(lab, lab.device())
    guest.queue()
    at = QUEUES + ROOM
    cmd = uapi.HwQueueAlloc(viommu_id=guest.viommu, type=QUEUE, index=1, nesting_parent_iova=at, length=0x1000)
    return ready(lab, cmd)


@scenario
def destroy_hw_queue(lab: CmdqvLab) -> Callable[[], int]:
    guest = CmdqvGuest(lab, lab.device())
    queue = guest.queue()
    queue.issue(Cmd.sync())
    return ready(lab, uapi.Destroy(id=queue.id))


def hardware(lab: CmdqvLab) -> dict[str, Any]:
    """What the CMDQV holds, as plain data."""
    cmdqv = lab.iommu.cmdqv
    assert cmdqv is not None
    return {
        "vintfs": [
            None if vintf is None else {
                "sids": list(vintf.sids),
                "lvcmdqs": [vcmdq is not None for vcmdq in vintf.lvcmdqs],
                "registers": bytes(vintf.registers[:0x100]) if vintf.page0 is not None else None,
            }
            for vintf in cmdqv.vintfs
        ],
        "doorbells": len(lab.c.ictx.doorbells.watched),
    }  # fmt: skip


def run(name: str, nth: int) -> tuple[int, Gate | None, list[str]]:
    lab = CmdqvLab()
    call = SCENARIOS[name](lab)
    before = {**state(lab.c.world), "hardware": hardware(lab)}
    lab.c.gate.arm(nth)
    lab.c.gate.passed = []
    rc = call()
    lab.c.gate.nth = 0
    changes = difference(before, {**state(lab.c.world), "hardware": hardware(lab)})
    check(lab.c.world)
    return rc, lab.c.gate.fired, changes


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_call_that_fails_changes_nothing(name: str) -> None:
    fired: set[Gate] = set()
    nth = 1
    while True:
        rc, gate, changes = run(name, nth)
        if gate is None:
            break
        fired.add(gate)
        assert -rc == ERRNO.get(gate, ENOMEM)("").errno, gate
        assert changes == [], (nth, gate)
        nth += 1
    assert rc >= 0
    assert changes  # it did something
    assert fired == GATES[name]
