"""Every acquisition of every ioctl fails once: the answer is its errno, and nothing has changed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from iommufd_uapi import vfio
from iommufdd.user import Gate
from tests.core.harness import ARGUMENT, PASID
from tests.core.invariants import check, check_empty
from tests.core.snapshot import difference, state
from tests.vfio.cdev import PASID_FLAG, Cdev, Lab

if TYPE_CHECKING:
    from collections.abc import Callable

    from iommufd_uapi.layout import VfioIoctl

Prepared = tuple[Cdev, "VfioIoctl"]
COPY_IN, COPY_OUT, LOOKUP, MEMORY = Gate.COPY_IN, Gate.COPY_OUT, Gate.LOOKUP, Gate.MEMORY
RID = {LOOKUP, COPY_IN, COPY_OUT, Gate.ATTACH, Gate.RESERVE}


def bind(lab: Lab) -> Prepared:
    return lab.open(), vfio.VfioDeviceBindIommufd(iommufd=lab.c.fd)


def attach(lab: Lab) -> Prepared:
    cdev = lab.bound()
    return cdev, vfio.VfioDeviceAttachIommufdPt(pt_id=lab.c.hwpt(1, lab.c.ioas_alloc()))


def attach_ioas(lab: Lab) -> Prepared:
    cdev, ioas = lab.bound(), lab.c.ioas_alloc()
    lab.c.map(ioas, lab.c.process.buffer(2), 0x2000, 0x10000)
    return cdev, vfio.VfioDeviceAttachIommufdPt(pt_id=ioas)


def replace(lab: Lab) -> Prepared:
    cdev = lab.bound()
    cdev.attach(lab.c.ioas_alloc())
    return cdev, vfio.VfioDeviceAttachIommufdPt(pt_id=lab.c.hwpt(1, lab.c.ioas_alloc()))


def attach_pasid(lab: Lab) -> Prepared:
    cdev = lab.bound()
    hwpt = lab.c.hwpt(1, lab.c.ioas_alloc(), PASID)
    return cdev, vfio.VfioDeviceAttachIommufdPt(flags=PASID_FLAG, pt_id=hwpt, pasid=3)


def replace_pasid(lab: Lab) -> Prepared:
    cdev, cmd = attach_pasid(lab)
    cdev.attach(lab.c.hwpt(1, 2, PASID), pasid=3)
    return cdev, cmd


def detach(lab: Lab) -> Prepared:
    cdev, _ = replace(lab)
    return cdev, vfio.VfioDeviceDetachIommufdPt()


def detach_pasid(lab: Lab) -> Prepared:
    cdev, _ = replace_pasid(lab)
    return cdev, vfio.VfioDeviceDetachIommufdPt(flags=PASID_FLAG, pasid=3)


def get_info(lab: Lab) -> Prepared:
    return lab.bound(), vfio.VfioDeviceInfo()


GATES: dict[Callable[[Lab], Prepared], set[Gate]] = {
    bind: {COPY_IN, COPY_OUT, MEMORY, Gate.OBJECT},
    attach: RID | {MEMORY},
    attach_ioas: RID | {MEMORY, Gate.OBJECT, Gate.DOMAIN, Gate.PIN, Gate.CHARGE},
    replace: RID,
    attach_pasid: {LOOKUP, COPY_IN, COPY_OUT, MEMORY, Gate.ATTACH},
    replace_pasid: {LOOKUP, COPY_IN, COPY_OUT, Gate.ATTACH},
    detach: {COPY_IN},
    detach_pasid: {COPY_IN},
    get_info: {COPY_IN, COPY_OUT},
}
# vfio_df_ioctl_attach_pt(): what is undone is an attachment of the device itself, whatever was done.
CHANGED = {(replace, COPY_OUT), (attach_pasid, COPY_OUT), (replace_pasid, COPY_OUT)}


def passes(prepare: Callable[[Lab], Prepared]) -> list[Gate]:
    """Every gate on the way of a call that succeeds."""
    lab = Lab()
    cdev, cmd = prepare(lab)
    at = lab.c.process.put(cmd.pack(), ARGUMENT)
    lab.c.gate.passed = []
    assert cdev.file.ioctl(lab.c.caller, cmd.CMD, at) == 0
    return lab.c.gate.passed


def test_a_pasid_is_noted_down_once() -> None:
    """ida_alloc_range(), before what attaching takes."""
    assert passes(attach_pasid).count(MEMORY) == passes(attach).count(MEMORY) + 1
    assert passes(replace_pasid).count(MEMORY) == passes(replace).count(MEMORY) == 0


def run(prepare: Callable[[Lab], Prepared], nth: int) -> tuple[int, Gate | None, list[str]]:
    lab = Lab()
    cdev, cmd = prepare(lab)
    at = lab.c.process.put(cmd.pack(), ARGUMENT)
    before = state(lab.world)
    lab.c.gate.arm(nth)
    rc = cdev.file.ioctl(lab.c.caller, cmd.CMD, at)
    lab.c.gate.nth = 0
    changes = difference(before, state(lab.world))
    check(lab.world)
    lab.c.process.exit()
    check_empty(lab.world)
    return rc, lab.c.gate.fired, changes


@pytest.mark.parametrize("prepare", GATES, ids=lambda function: function.__name__)
def test_an_ioctl_that_fails_changes_nothing(prepare: Callable[[Lab], Prepared]) -> None:
    fired: set[Gate] = set()
    nth = 1
    while True:
        rc, gate, changes = run(prepare, nth)
        if gate is None:
            break
        fired.add(gate)
        assert -rc == gate.error.errno, (nth, gate)
        assert bool(changes) == ((prepare, gate) in CHANGED), (nth, gate, changes)
        nth += 1
    assert rc == 0
    assert fired == GATES[prepare]
