"""Every acquisition of every call fails once: the answer is its errno, and nothing has changed (iommufd_fail_nth.c).

gates.py says which gates each scenario passes, and where the kernel itself does not put everything back.
"""

from typing import Any

import pytest

from iommufd_uapi import vfio
from iommufdd import selftest
from iommufdd.context import IOCTL_OPS
from iommufdd.errors import IommufdError
from iommufdd.user import Gate

from . import scenarios_selftest  # noqa: F401  # fills SCENARIOS
from .gates import CHANGED, GATES, SWALLOWED, TRANSLATED
from .harness import ARGUMENT, Client
from .invariants import check, check_empty
from .scenarios import SCENARIOS
from .snapshot import difference, state


def run(name: str, nth: int) -> tuple[int, Gate | None, list[str], list[Gate]]:
    """The scenario in a fresh world: its answer, the gate that failed, what changed, the gates passed."""
    c = Client()
    call = SCENARIOS[name](c)
    before = state(c.world)
    c.gate.arm(nth)
    c.gate.passed = []
    try:
        rc = call()
    except IommufdError as error:
        rc = -error.errno
    c.gate.nth = 0
    changes = difference(before, state(c.world))
    check(c.world)
    close_all(c)
    return rc, c.gate.fired, changes, c.gate.passed


def close_all(c: Client) -> None:
    for vma in list(c.world.vmas):
        c.munmap(vma)
    for process in c.world.processes:
        process.exit()
    check_empty(c.world)


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_call_that_fails_changes_nothing(name: str) -> None:
    fired: set[Gate] = set()
    nth = 1
    while True:
        rc, gate, changes, _ = run(name, nth)
        if gate is None:
            break
        fired.add(gate)
        where = f"{name}, acquisition {nth}, {gate.name}: {rc} {changes}"
        errnos = {error.errno for error in TRANSLATED.get((name, gate), {gate.error})}
        assert -rc in errnos or (rc >= 0 and (name, gate) in SWALLOWED), where
        assert not changes or (name, gate) in (CHANGED if rc < 0 else SWALLOWED), where
        nth += 1
    assert rc >= 0
    assert fired == GATES[name]


def test_the_table_lists_every_scenario() -> None:
    assert list(GATES) == list(SCENARIOS)


@pytest.mark.parametrize(("name", "gate"), CHANGED)
def test_what_the_table_excuses_does_change(name: str, gate: Gate) -> None:
    _, _, _, passed = run(name, 0)
    at = [nth for nth, one in enumerate(passed, 1) if one is gate]
    assert any(run(name, nth)[2] and run(name, nth)[0] < 0 for nth in at)


@pytest.mark.parametrize(("name", "gate"), SWALLOWED)
def test_what_the_table_says_is_swallowed_is(name: str, gate: Gate) -> None:
    _, _, _, passed = run(name, 0)
    at = [nth for nth, one in enumerate(passed, 1) if one is gate]
    assert any(run(name, nth)[0] >= 0 for nth in at)


class Listener:
    """The event port: which numbers, and which operations of the selftest, were answered with success."""

    def __init__(self) -> None:
        self.cmds: set[int] = set()
        self.ops: set[int] = set()

    def enter(self, ictx: object, caller: object, cmd: int, uptr: int) -> object:
        return None

    def ioctl(self, ictx: object, caller: Any, cmd: int, uptr: int, rc: int, entered: object) -> None:
        if rc >= 0:
            self.cmds.add(cmd)
            if cmd == IOCTL_OPS[-1].cmd:
                self.ops.add(int.from_bytes(caller.mm.read(ARGUMENT + 4, 4), "little"))

    def transfer(self, *args: object) -> None:
        pass

    def hardware(self, port: object, event: object) -> None:
        pass

    def object(self, ictx: object, verb: str, obj: object) -> None:
        pass


def test_every_call_has_a_scenario() -> None:
    listener = Listener()
    for make in SCENARIOS.values():
        c = Client()
        call = make(c)
        c.ictx.events.add(listener)
        assert call() >= 0
    vfio_cmds = {vfio.VFIO_GET_API_VERSION, vfio.VFIO_CHECK_EXTENSION, vfio.VFIO_SET_IOMMU}
    vfio_cmds |= {vfio.VFIO_IOMMU_GET_INFO, vfio.VFIO_IOMMU_MAP_DMA, vfio.VFIO_IOMMU_UNMAP_DMA}
    assert listener.cmds == {op.cmd for op in IOCTL_OPS} | vfio_cmds
    assert listener.ops == set(selftest.OPS)


def test_every_kind_of_gate_is_met() -> None:
    assert set().union(*GATES.values()) == set(Gate)
