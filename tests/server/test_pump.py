"""The pump: nobody is starved by DMA, no machine by another; pages that do not come are given up on in time."""

from __future__ import annotations

import math
import os
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

import iommufd_uapi.iommufd as uapi
from iommufdd.errors import EINVAL
from iommufdd.iommu.dma import STRETCH, Dma, DmaQueue, Op, State
from iommufdd.server.listener import adopt
from iommufdd.server.pump import BYTES, PATIENCE, STEPS, Pump
from iommufdd.server.serve import Server
from iommufdd.wiring import new_machine
from tests.iommu.lab import Lab, endpoint
from tests.iommu.test_dma_queue import answer, faulting, request
from tests.server.peer import Peer, hello, ioctl

PAGE = 4096


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server(new_machine, nofile=1024)
    yield made
    made.close()


def busy(server: Server, length: int, *, scattered: bool = False) -> tuple[Lab, Dma]:
    """A device that moves `length` bytes, pumped by the server; scattered: page by page."""
    lab = Lab()
    idev = lab.device()
    if scattered:
        hwpt, _, table = lab.guest(idev)
        for at in range(0, min(length, 512 * PAGE), PAGE):
            table.map(at, 0x200000 - at)  # backwards: no two pages are one stretch
        lab.attach(idev, hwpt)
    else:
        ioas, _ = lab.ram(length // PAGE)
        lab.attach(idev, ioas)
    queue = endpoint(idev).queue
    queue.pumping = server.pump
    return lab, endpoint(idev).dma(lab.dma(idev, Op.READ, 0, length))


async def ends(dma: Dma) -> None:
    over = trio.Event()
    dma.ended = lambda _: over.set()
    if dma.state is State.RUNNING:
        with trio.fail_after(60):
            await over.wait()


class Impatient:
    """A client whose requests come while DMA is being done: after every 50th step of all devices together."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, peer: Peer) -> None:
        self.steps = 0
        self.asked: list[int] = []  # steps made when a request was sent
        self.served: list[int] = []  # and when its ioctl was called
        self._peer = peer
        step = Dma.step

        def counted(dma: Dma) -> State:
            self.steps += 1
            if self.steps % 50 == 0:
                self.ask()
            return step(dma)

        monkeypatch.setattr(Dma, "step", counted)

    def ask(self) -> None:
        if len(self.asked) == len(self.served):
            if self.served:
                self._peer.receive()
            self.asked.append(self.steps)
            self._peer.send(ioctl(uapi.Destroy(id=77)))

    def watch(self, monkeypatch: pytest.MonkeyPatch, server: Server) -> None:
        (channel,) = server.channels
        ioctl_: Callable[..., int] = channel.opened.file.ioctl

        def noted(*args: object) -> int:
            self.served.append(self.steps)
            return ioctl_(*args)

        monkeypatch.setattr(channel.opened.file, "ioctl", noted)


def connect(server: Server) -> tuple[Peer, socket.socket]:
    """A client that has said hello."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    adopt(server, theirs)
    ours.settimeout(30)
    peer = Peer(ours, greet=False)
    peer.send(hello())
    return peer, ours


@pytest.mark.parametrize("scattered", [False, True])
async def test_a_client_waits_for_one_turn_at_most(
    server: Server, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch, scattered: bool
) -> None:
    """However much DMA there is, on however many machines: at most STEPS steps lie between a request and its ioctl."""
    peer, sock = connect(server)
    client = Impatient(monkeypatch, peer)
    nursery.start_soon(server.reactor.run)
    await trio.lowlevel.wait_readable(sock)
    peer.welcome()
    client.watch(monkeypatch, server)
    transfers = [busy(server, 256 * PAGE if scattered else 64 * STRETCH, scattered=scattered) for _ in range(8)]
    for _, dma in transfers:
        await ends(dma)
    assert all(dma.state is State.DONE for _, dma in transfers)
    assert not server.reactor.working
    assert client.steps == 8 * (256 if scattered else 64)
    assert len(client.served) >= 9
    assert max(at - asked for asked, at in zip(client.asked, client.served, strict=False)) <= STEPS
    nursery.cancel_scope.cancel()
    peer.close()


def test_machines_take_turns(server: Server) -> None:
    transfers = [busy(server, 8 * STRETCH) for _ in range(3)]
    for _ in range(6):
        assert server.reactor.work()
    assert [dma.done for _, dma in transfers] == [2 * BYTES] * 3
    while server.reactor.work():
        pass
    assert [dma.state for _, dma in transfers] == [State.DONE] * 3
    assert server.pump.turns == 24
    assert not server.reactor.work()


def test_a_bug_is_logged_and_the_next_transfer_goes_on(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    lab, good = busy(server, 8 * PAGE)
    broken = Dma(good.dev, Op.FILL, 0, 8, data=b"")
    good.dev.dma(broken)
    while server.reactor.work():
        pass
    assert (good.state, broken.state) == (State.DONE, State.FAILED)
    assert broken.error.startswith("a bug")
    assert [record.message for record in caplog.records] == ["bug"]
    del lab


async def test_an_idle_reactor_wakes_up_for_dma(server: Server, nursery: trio.Nursery) -> None:
    nursery.start_soon(server.reactor.run)
    await trio.sleep(0.05)  # it waits through Trio now
    _, dma = busy(server, 8 * STRETCH)
    await ends(dma)
    assert dma.state is State.DONE
    nursery.cancel_scope.cancel()


def test_the_bell_is_no_leak() -> None:
    before = os.listdir("/proc/self/fd")
    made = Server(new_machine, nofile=1024)
    busy(made, PAGE)
    made.close()
    assert os.listdir("/proc/self/fd") == before


# ---- page requests -----------------------------------------------------------------------------------------


class Waiting:
    """A device with page requests, its queue, and the pump that lets it give up."""

    def __init__(self, patience: float = PATIENCE) -> None:
        self.lab = Lab()
        self.idev, self.fd = faulting(self.lab)
        self.queue = endpoint(self.idev).queue
        self.server = Server(new_machine, nofile=1024)
        self.pump = Pump(self.server.reactor, self.queues, patience)
        self.queue.pumping = self.pump

    def queues(self) -> list[DmaQueue]:
        return [self.queue]

    def ask(self, iova: int = 0x5000, timeout: float | None = None) -> Dma:
        """A DMA that waits for a page."""
        dma = self.lab.dma(self.idev, Op.READ, iova, 8)
        dma.timeout = timeout
        self.queue.submit(dma)
        while self.server.reactor.work():
            pass
        assert dma.state is State.PARKED
        return dma


@asynccontextmanager
async def waiting_device(patience: float = PATIENCE) -> AsyncIterator[Waiting]:
    """Everything that gives up runs meanwhile."""
    waiting = Waiting(patience)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(waiting.pump.expire)
        await wait_all_tasks_blocked()
        yield waiting
        nursery.cancel_scope.cancel()
    waiting.server.close()


async def passes(clock: MockClock, seconds: float) -> None:
    await wait_all_tasks_blocked()
    clock.jump(seconds)
    await wait_all_tasks_blocked()


async def test_a_device_gives_up_after_ten_seconds(mock_clock: MockClock) -> None:
    async with waiting_device() as waiting:
        dma = waiting.ask()
        await passes(mock_clock, 9.9)
        later = waiting.ask(0x6000)
        assert dma.state is State.PARKED
        await passes(mock_clock, 0.2)
        assert (dma.state, later.state) == (State.FAILED, State.PARKED)
        assert dma.error == "the page request was not answered in time"
        assert dma.fault is not None
        await passes(mock_clock, 9.9)
        assert later.state is State.FAILED
        assert endpoint(waiting.idev).counters.timeouts == 2


async def test_each_transfer_may_say_how_long(mock_clock: MockClock) -> None:
    async with waiting_device(patience=100.0) as waiting:
        usual = waiting.ask(0x4000)
        short = waiting.ask(0x5000, 1.0)  # earlier than what expire() sleeps for
        never = waiting.ask(0x6000, math.inf)
        await passes(mock_clock, 1.1)
        assert [dma.state for dma in (usual, short, never)] == [State.PARKED, State.FAILED, State.PARKED]
        await passes(mock_clock, 1000.0)
        assert [dma.state for dma in (usual, never)] == [State.FAILED, State.PARKED]


async def test_an_answer_in_time_starts_the_clock_anew(mock_clock: MockClock) -> None:
    async with waiting_device() as waiting:
        dma = waiting.ask()
        await passes(mock_clock, 9.0)
        answer(waiting.lab, waiting.fd, request(waiting.lab, waiting.fd).cookie, uapi.IOMMUFD_PAGE_RESP_SUCCESS)
        while waiting.server.reactor.work():
            pass
        assert dma.state is State.PARKED  # the page is still not there: it asks again
        await passes(mock_clock, 9.0)
        assert dma.state is State.PARKED
        await passes(mock_clock, 1.1)
        assert dma.error == "the page request was not answered in time"


async def test_who_answers_after_that_is_told_nothing(mock_clock: MockClock) -> None:
    async with waiting_device() as waiting:
        dma = waiting.ask()
        record = request(waiting.lab, waiting.fd)
        await passes(mock_clock, 10.1)
        assert dma.state is State.FAILED
        answer(waiting.lab, waiting.fd, record.cookie, uapi.IOMMUFD_PAGE_RESP_SUCCESS)
        assert not waiting.server.reactor.work()
        with pytest.raises(EINVAL):  # answered, to the user
            answer(waiting.lab, waiting.fd, record.cookie, uapi.IOMMUFD_PAGE_RESP_SUCCESS)
