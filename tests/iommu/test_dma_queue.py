"""The transfers of a machine: whose turn it is, who hears of it, and what becomes of those given up."""

from __future__ import annotations

import pytest

import iommufd_uapi.iommufd as uapi
from iommufdd.device import IommufdDevice
from iommufdd.errors import EFAULT
from iommufdd.iommu.dma import STRETCH, Dma, DmaQueue, Op, State
from iommufdd.iommu.vtd_regs import Reason
from iommufdd.machine_file import Machines
from iommufdd.wiring import new_machine
from tests.core.harness import FAULT, RW
from tests.core.world import Memfd

from .lab import GuestRam, Lab, endpoint
from .tables import X86Table

PAGE = 4096


class Heard:
    """Who pumps."""

    def __init__(self, queue: DmaQueue) -> None:
        self.works = 0
        self.waiting: list[Dma] = []
        queue.pumping = self

    def work(self, queue: DmaQueue) -> None:
        self.works += 1

    def parked(self, dma: Dma) -> float:
        self.waiting.append(dma)
        return 10.0 + len(self.waiting)


def faulting(lab: Lab) -> tuple[IommufdDevice, int]:
    """A device on an empty table with page requests; the descriptor of the fault queue."""
    idev = lab.device(pri=True)
    fault_id, fd = lab.c.fault_queue()
    ioas, ram = lab.ram()
    lab.attach(idev, lab.nested(idev, lab.parent(idev, ioas), 0x1000, flags=FAULT, fault=fault_id))
    ram.write(0x1000, bytes(PAGE))
    return idev, fd


def request(lab: Lab, fd: int) -> uapi.HwptPgfault:
    return uapi.HwptPgfault.unpack(lab.c.read(fd, 40))


def answer(lab: Lab, fd: int, cookie: int, code: int) -> None:
    lab.c.write(fd, uapi.HwptPageResponse(cookie=cookie, code=code).pack())


def test_transfers_take_turns() -> None:
    lab = Lab()
    idev = lab.device()
    ioas, _ = lab.ram()
    lab.attach(idev, ioas)
    queue = endpoint(idev).queue
    heard = Heard(queue)
    long = [lab.dma(idev, Op.READ, 0, 3 * STRETCH) for _ in range(2)]
    for dma in long:
        queue.submit(dma)
    assert heard.works == 1  # the second came to a queue that is pumped anyway
    assert queue.pump(2, 1 << 40)
    assert [dma.done for dma in long] == [STRETCH, STRETCH]
    assert queue.pump(100, 1)  # no step after so many bytes
    assert [dma.done for dma in long] == [2 * STRETCH, STRETCH]
    assert not queue.pump(100, 1 << 40)
    assert [dma.state for dma in long] == [State.DONE, State.DONE]
    queue.submit(lab.dma(idev, Op.READ, 0, 8))
    assert heard.works == 2


def test_a_transfer_of_no_bytes_is_over_at_once() -> None:
    lab = Lab()
    idev = lab.device()
    dma = endpoint(idev).dma(lab.dma(idev, Op.READ, 0, 0))
    assert dma.state is State.DONE
    assert not endpoint(idev).queue.running


def test_who_pumps_hears_of_those_that_wait() -> None:
    lab = Lab()
    idev, fd = faulting(lab)
    queue = endpoint(idev).queue
    heard = Heard(queue)
    dma = endpoint(idev).dma(lab.dma(idev, Op.READ, 0x5000, 8))
    assert not queue.pump(10, PAGE)
    assert heard.waiting == [dma]
    assert queue.parked == {dma: 11.0}
    answer(lab, fd, request(lab, fd).cookie, uapi.IOMMUFD_PAGE_RESP_SUCCESS)
    assert (dma.state, dma.fault, list(queue.parked), list(queue.running)) == (State.RUNNING, None, [], [dma])
    assert heard.works == 2
    assert not queue.pump(10, PAGE)  # nobody has mapped the page
    assert heard.waiting == [dma, dma]


def test_cancelled_while_it_runs() -> None:
    lab = Lab()
    idev = lab.device()
    ioas, _ = lab.ram()
    lab.attach(idev, ioas)
    queue = endpoint(idev).queue
    ended: list[Dma] = []
    dma = Dma(endpoint(idev), Op.READ, 0, 2 * STRETCH, ended=ended.append)
    queue.submit(dma)
    queue.pump(1, PAGE)
    dma.cancel("enough")
    dma.cancel("twice is once")
    assert (dma.state, dma.done, dma.error) == (State.FAILED, STRETCH, "enough")
    assert not queue.pump(10, 1 << 40)
    assert (dma.done, ended) == (STRETCH, [dma])
    assert endpoint(idev).counters.failed == 1


@pytest.mark.parametrize("how", ["cancel", "time out"])
def test_a_late_answer_is_not_the_next_ones(how: str) -> None:
    lab = Lab()
    idev, fd = faulting(lab)
    dev = endpoint(idev)
    first = dev.dma(lab.dma(idev, Op.READ, 0x5000, 8))
    dev.queue.pump(10, PAGE)
    if how == "cancel":
        first.cancel("enough")
    else:
        dev.time_out(first)
        dev.time_out(first)
    assert (first.state, list(dev.queue.parked)) == (State.FAILED, [])
    dev._next_group = first.group  # as after 512 more
    second = dev.dma(lab.dma(idev, Op.READ, 0x6000, 8))
    dev.queue.pump(10, PAGE)
    assert second.group == first.group
    old, new = request(lab, fd), request(lab, fd)
    assert (old.addr, new.addr, old.grpid) == (0x5000, 0x6000, new.grpid)
    answer(lab, fd, old.cookie, uapi.IOMMUFD_PAGE_RESP_INVALID)
    assert second.state is State.PARKED
    answer(lab, fd, new.cookie, uapi.IOMMUFD_PAGE_RESP_INVALID)
    assert second.error == "the page request was answered INVALID"
    assert (dev.counters.invalid, dev.counters.timeouts) == (1, int(how == "time out"))


def test_after_a_bug_the_queue_knows_whose_turn_it_was() -> None:
    lab = Lab()
    idev = lab.device()
    ioas, _ = lab.ram()
    lab.attach(idev, ioas)
    queue = endpoint(idev).queue
    broken, good = lab.dma(idev, Op.FILL, 0, 8, data=b"x"), lab.dma(idev, Op.READ, 0, 8)
    broken.data = bytearray()  # a pattern of nothing cannot be repeated
    queue.submit(broken)
    queue.submit(good)
    with pytest.raises(ZeroDivisionError):
        queue.pump(10, PAGE)
    assert queue.turn is broken
    assert not queue.pump(10, PAGE)
    assert good.state is State.DONE


def test_devices_of_a_machine_share_its_queue() -> None:
    machine, other = (new_machine("", Machines().describe("vtd")) for _ in range(2))
    assert {id(dev.queue) for dev in machine.devices.values()} == {id(machine.dma)}  # type: ignore[attr-defined]
    assert machine.dma is not other.dma


class Gone(Memfd):
    """Private memory of a process that may end."""

    ended = False

    def view(self, end: int) -> memoryview | None:
        return None

    def pread(self, pos: int, length: int) -> bytes:
        if self.ended:
            raise EFAULT("gone")
        return super().pread(pos, length)

    def pwrite(self, pos: int, data: bytes) -> int:
        if self.ended:
            raise EFAULT("gone")
        return super().pwrite(pos, data)


def test_memory_that_went_with_its_process() -> None:
    lab = Lab()
    idev = lab.device()
    ioas = lab.c.ioas_alloc()
    file = Gone(16)
    lab.c.map(ioas, lab.c.process.map(file), 16 * PAGE, 0, RW)
    table = X86Table(GuestRam(file), 0x1000)
    table.map(0x7000, 0x8000)
    table.map(0x9000, 0xA000)
    lab.attach(idev, lab.nested(idev, lab.parent(idev, ioas), table.root))
    lab.write(idev, 0x7000, b"there")
    file.ended = True
    for op in (Op.READ, Op.WRITE):
        dma = lab.dma(idev, op, 0x7000, 8)
        assert dma.run() is State.FAILED
        assert dma.error == "the memory behind iova 0x7000 is gone"
    assert lab.fault(idev, 0x9000) == Reason.FS_ACCESS  # the table is gone too
