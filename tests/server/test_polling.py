"""Doorbells over the socket: who looks, when, and that nobody is starved by it."""

from __future__ import annotations

import itertools
import os
import select
from typing import TYPE_CHECKING

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from iommufd_client.testing import Daemon
from iommufd_uapi import iommufd as uapi
from iommufd_uapi.smmuv3 import Cmd, Command
from iommufd_uapi.tegra241_cmdqv import VCMDQ_EN, Cerror, Lvcmdq, Register
from iommufdd.doorbells import Doorbells
from iommufdd.machine import Machine
from iommufdd.server.polling import BUSY, COMMANDS, IDLE, QUIET, Poller
from iommufdd.wiring import new_machine
from tests.server.conftest import eventually
from tests.server.peer import memfd

if TYPE_CHECKING:
    from collections.abc import Iterator

    from iommufd_client import GuestMemory, Iommufd
    from iommufd_client.files import File, Mapping

    from .conftest import Local

QUEUE, ENTRIES, ENTRY = 0x10_0000, 256, 16
VSID = 0x77


# ---- who looks, and when ----


class Bell:
    """A doorbell with so many commands waiting."""

    def __init__(self, waiting: int = 0) -> None:
        self.waiting = waiting
        self.looked: list[float] = []

    def poll(self, commands: int | None = None) -> int:
        self.looked.append(trio.current_time())
        done = self.waiting if commands is None else min(self.waiting, commands)
        self.waiting -= done
        return done


class Polled:
    """A poller, and a context's doorbells."""

    def __init__(self) -> None:
        self.poller = Poller()
        self.machine: Machine = new_machine("")
        self.machine.polling = self.poller
        self.doorbells = Doorbells(self.machine)

    def add(self, *bells: Bell) -> None:
        for bell in bells:
            self.doorbells.add(bell)


async def test_without_doorbells_nobody_wakes_up(mock_clock: MockClock, nursery: trio.Nursery) -> None:
    polled, bell = Polled(), Bell()
    nursery.start_soon(polled.poller.run)
    await wait_all_tasks_blocked()
    mock_clock.jump(1000)
    await wait_all_tasks_blocked()
    assert trio.lowlevel.current_statistics().seconds_to_next_deadline == float("inf")
    polled.add(bell)
    await wait_all_tasks_blocked()
    assert len(bell.looked) == 1
    polled.doorbells.remove(bell)
    mock_clock.jump(1)
    await wait_all_tasks_blocked()
    assert len(bell.looked) == polled.poller.looks == 1
    assert trio.lowlevel.current_statistics().seconds_to_next_deadline == float("inf")
    nursery.cancel_scope.cancel()


async def test_often_after_a_ring_and_seldom_later(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    polled, bell = Polled(), Bell()
    polled.add(bell)
    nursery.start_soon(polled.poller.run)
    await trio.sleep(QUIET + 10 * IDLE)
    bell.waiting = 3
    rung = trio.current_time()
    await trio.sleep(QUIET / 2)
    nursery.cancel_scope.cancel()
    gaps = [after - before for before, after in itertools.pairwise(bell.looked)]
    before = [gap for gap, at in zip(gaps, bell.looked, strict=False) if at < rung - IDLE]
    after = [gap for gap, at in zip(gaps, bell.looked, strict=False) if at > rung + IDLE]
    assert before[0] == pytest.approx(BUSY)
    assert before[-1] == pytest.approx(IDLE)
    assert max(gaps) < IDLE * 1.01  # the bound on latency
    assert len(after) > 10
    assert all(gap == pytest.approx(BUSY) for gap in after)


async def test_turns(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    """Nobody has more than a turn before all others have had theirs, and other tasks run in between."""
    polled, bells = Polled(), [Bell(10 * COMMANDS), Bell(0), Bell(2 * COMMANDS)]
    polled.add(*bells)
    turns: list[tuple[int, ...]] = []

    async def other() -> None:
        while True:
            turns.append(tuple(bell.waiting for bell in bells))
            await trio.lowlevel.checkpoint()

    nursery.start_soon(polled.poller.run)
    nursery.start_soon(other)
    while any(bell.waiting for bell in bells):
        await trio.lowlevel.checkpoint()
    nursery.cancel_scope.cancel()
    done = [sum(before) - sum(after) for before, after in itertools.pairwise(turns)]
    assert max(done) <= 2 * COMMANDS  # two turns when Trio has swapped the order of its tasks in between
    looks = [len(bell.looked) for bell in bells]
    assert max(looks) - min(looks) <= 1  # it may end in the middle of a round
    assert len(set(bells[0].looked)) == 1  # without a pause


async def test_a_doorbell_with_a_bug_costs_itself(
    autojump_clock: MockClock, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(Bell):
        def poll(self, commands: int | None = None) -> int:
            raise RuntimeError("a bug")

    polled, good = Polled(), Bell()
    polled.add(Broken(), good)
    nursery.start_soon(polled.poller.run)
    await trio.sleep(QUIET)
    nursery.cancel_scope.cancel()
    assert len(good.looked) > 10
    assert list(polled.doorbells) == [good]
    assert [record.message for record in caplog.records] == ["bug"]


async def test_a_doorbell_may_go_while_others_are_looked_at(nursery: trio.Nursery) -> None:
    polled, second = Polled(), Bell(1)

    class First(Bell):
        def poll(self, commands: int | None = None) -> int:
            polled.doorbells.remove(second)
            return super().poll(commands)

    first = First(1)
    polled.add(first, second)
    nursery.start_soon(polled.poller.run)
    await trio.sleep(0.01)
    nursery.cancel_scope.cancel()
    assert (first.waiting, second.waiting, second.looked) == (0, 1, [])


def test_a_channel_is_not_waited_for_while_there_are_doorbells(local: Local) -> None:
    local.connect()
    server = local.server
    assert server.alone
    doorbells = Doorbells(next(iter(server.instances)).machine)
    bell = Bell()
    doorbells.add(bell)
    assert not server.alone
    doorbells.remove(bell)
    assert server.alone


# ---- a guest of a real daemon ----


class Vmm:
    """A VMM on the machine `tegra241` with a vDEVICE and a VCMDQ, which it drives as its guest would."""

    def __init__(self, iommufd: Iommufd, dev: int, ram: GuestMemory) -> None:
        self.iommufd, self.ram = iommufd, ram
        self.ioas = ioas = iommufd.ioas_alloc()
        iommufd.ioas_map(ioas, ram, iova=0)
        parent = iommufd.hwpt_alloc(dev, ioas, flags=uapi.IOMMU_HWPT_ALLOC_NEST_PARENT)
        data = uapi.ViommuTegra241Cmdqv()
        self.viommu = iommufd.viommu_alloc(dev, parent, uapi.IOMMU_VIOMMU_TYPE_TEGRA241_CMDQV, data)
        self.page0: Mapping = iommufd.mmap(data.out_vintf_mmap_length, data.out_vintf_mmap_offset)
        kind = uapi.IOMMU_VEVENTQ_TYPE_TEGRA241_CMDQV
        self.errors: File = iommufd.veventq_alloc(self.viommu, kind, 16)[1]
        iommufd.vdevice_alloc(self.viommu, dev, VSID)
        kind = uapi.IOMMU_HW_QUEUE_TYPE_TEGRA241_CMDQV
        self.queue = iommufd.hw_queue_alloc(self.viommu, kind, 0, QUEUE, ENTRIES * ENTRY)
        self.registers = Lvcmdq(self.page0.view, 0)
        self.prod = 0

    def put(self, *commands: Command) -> None:
        for command in commands:
            self.ram.write(QUEUE + ENTRY * (self.prod % ENTRIES), command.pack())
            self.prod = (self.prod + 1) % (2 * ENTRIES)
        self.registers.write(Register.PROD, self.prod)

    def consumed(self) -> bool:
        """No call is made: the daemon has to notice by itself."""
        return self.registers.read(Register.CONS) == self.prod


@pytest.fixture
def vmm() -> Iterator[Vmm]:
    with (
        Daemon("--machine", "tegra241") as daemon, daemon.open() as iommufd, iommufd.device("vfio0") as device,
        iommufd.guest_memory(2 << 20) as ram,
    ):  # fmt: skip
        made = Vmm(iommufd, device.bind(iommufd), ram)
        yield made
        made.page0.close()
        iommufd.destroy(made.queue)
        made.errors.close()


def test_a_guest_enables_its_queue_and_issues_commands_without_a_call(vmm: Vmm) -> None:
    vmm.registers.write(Register.CONFIG, VCMDQ_EN)
    eventually(lambda: vmm.registers.read(Register.STATUS) == VCMDQ_EN)
    for _ in range(5):
        vmm.put(*[Cmd.tlbi_nh_asid(5), Cmd.atc_inv(VSID), Cmd.sync()] * 40)
        eventually(vmm.consumed)
    assert vmm.registers.error == Cerror.NONE


def test_an_error_is_heard_by_poll(vmm: Vmm) -> None:
    vmm.registers.write(Register.CONFIG, VCMDQ_EN)
    vmm.put(Cmd.sync(), Cmd.cfgi_all())
    poll = select.poll()
    poll.register(vmm.errors, select.POLLIN)
    assert [event for _, event in poll.poll(30_000)] == [select.POLLIN]
    data = vmm.errors.read(64)
    assert data == uapi.IommufdVeventHeader(0, 0).pack() + bytes([1]) + bytes(15)
    assert poll.poll(0) == []
    assert (vmm.registers.error, vmm.registers.read(Register.CONS)) == (Cerror.ILL, 1 | 1 << 24)
    vmm.ram.write(QUEUE + ENTRY, Cmd.sync().pack())
    vmm.registers.acknowledge()
    eventually(vmm.consumed)




def test_a_queue_in_a_file_that_is_cut(vmm: Vmm) -> None:
    """It is not sealed, so the daemon does not map it, and finds it shorter when it reads."""
    fd = memfd(0x4000, seals=0)
    vmm.iommufd.ioas_map_file(vmm.ioas, fd, 0, 0x4000, iova=1 << 32)
    kind = uapi.IOMMU_HW_QUEUE_TYPE_TEGRA241_CMDQV
    queue = vmm.iommufd.hw_queue_alloc(vmm.viommu, kind, 1, 1 << 32, 0x2000)
    registers = Lvcmdq(vmm.page0.view, 1)
    registers.write(Register.CONFIG, VCMDQ_EN)
    os.pwrite(fd, Cmd.sync().pack() * 512, 0)
    registers.write(Register.PROD, 400)
    eventually(lambda: registers.read(Register.CONS) == 400)
    os.ftruncate(fd, 0x1A00)
    registers.write(Register.PROD, 450)
    eventually(lambda: registers.error == Cerror.ABT)
    assert registers.read(Register.CONS) & 0xFFFF == 0x1A0
    vmm.iommufd.destroy(queue)
    os.close(fd)
