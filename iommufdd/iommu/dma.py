"""DMA as a stepping object: one step moves one stretch through one translation, fails, or waits for a page.

Each step is atomic: it sees one translation, the old or the new one of a replace, and uses it to its end.
"""

from __future__ import annotations

import enum
import math
from collections import deque
from typing import TYPE_CHECKING, Protocol

from iommufdd.errors import IommufdError

from .walk import READ, WRITE, TranslationFault

if TYPE_CHECKING:
    from collections.abc import Callable

    from .endpoint import Endpoint
    from .tlb import TlbEntry

    Bytes = bytes | bytearray | memoryview

STRETCH = 1 << 20  # bytes that one step moves at most
RETRIES = 64  # page requests answered with SUCCESS that may fault again without progress


class Op(enum.Enum):
    """What the device does with memory."""

    READ = "read"
    WRITE = "write"
    FILL = "fill"
    COMPARE = "compare"


class State(enum.Enum):
    """Where a DMA stands."""

    RUNNING = "running"
    PARKED = "parked"  # a page request is not answered yet
    DONE = "done"
    FAILED = "failed"


RUNNING, PARKED, DONE, FAILED = State  # a member of an Enum class takes ten times as long to find
_READ, _WRITE, _FILL, _COMPARE = Op


class Dma:
    """One transfer of `length` bytes at `iova`; `data` is what is read, written or compared with.

    A fill repeats data. `done` counts bytes moved. On failure `error` says why, in words, and `fault` is the
    translation fault if it was one. A comparison that fails leaves the offset of the first difference in `done`.
    """

    __slots__ = ("access", "data", "dev", "done", "ended", "error", "fault", "group", "iova", "length", "op", "pasid",
                 "retries", "state", "timeout")  # fmt: skip

    def __init__(
        self, dev: Endpoint, op: Op, iova: int, length: int, *, data: Bytes = b"", pasid: int | None = None,
        priv: int = 0, timeout: float | None = None, ended: Callable[[Dma], None] | None = None,
    ) -> None:  # fmt: skip
        """pasid: None for a request without PASID. priv: PRIV for a privileged request. ended: called once.

        timeout: seconds that the device waits for a page, math.inf for ever, None as long as is usual.
        """
        self.dev = dev
        self.op = op
        self.iova = iova
        self.length = length
        self.pasid = pasid
        self.access = (WRITE if op is _WRITE or op is _FILL else READ) | priv
        self.data: Bytes = bytearray(length) if op is _READ else data
        self.done = 0
        self.state = RUNNING
        self.error = ""
        self.fault: TranslationFault | None = None
        self.group = -1  # the page request group it waits for
        self.retries = 0
        self.timeout = timeout
        self.ended = ended

    def step(self) -> State:
        """One stretch; the state after it."""
        iova = self.iova + self.done
        left = self.length - self.done
        try:
            entry = self.dev.translate(self.pasid, iova, self.access)
            whole = left <= STRETCH and iova + left - 1 <= entry.last
            count = left if whole else min(left, entry.last - iova + 1, STRETCH)
            for monitor in self.dev.iommu.monitors:
                monitor.moving(self.dev, self.pasid, iova, count, self.access, entry)
        except TranslationFault as fault:
            return self._refused(fault.bare())
        self.retries = 0
        try:
            if not self._move(entry, iova - entry.first + entry.pos, count):
                return self.state
        except IommufdError:  # private memory of a process that has ended
            self._gone(0)
            return self.state
        self.done += count
        return self.end(DONE) if self.done == self.length else RUNNING

    def run(self) -> State:
        """Step until it ends or waits."""
        while self.state is RUNNING:
            self.step()
        return self.state

    def fail(self, error: str) -> State:
        """Give up: the device sees an abort."""
        self.error = error
        return self.end(FAILED)

    def cancel(self, why: str) -> None:
        """Give up unless it is over; the answer to a page request that still comes is ignored."""
        if self.state is RUNNING or self.state is PARKED:
            self.fail(why)

    def resume(self) -> None:
        """The page request was answered with SUCCESS: try again."""
        parked = self.state is PARKED
        self.state = RUNNING
        self.fault = None
        self.group = -1
        self.retries += 1
        if parked:
            self.dev.queue.submit(self)

    def end(self, state: State) -> State:
        """It is over: tell whoever waits."""
        self.state = state
        self.dev.finished(self)
        if self.ended is not None:
            self.ended(self)
        return state

    def _refused(self, fault: TranslationFault) -> State:
        self.fault = fault
        if self.retries >= RETRIES:
            return self.fail(f"answered with SUCCESS {RETRIES} times, and still {fault}")
        if self.dev.request_page(self, fault):
            if self.group >= 0 and self.state is RUNNING:
                self.state = PARKED  # else it was answered at once
            return self.state
        return self.state if self.state is FAILED else self.fail(str(fault))

    # ---- bytes ----

    def _move(self, entry: TlbEntry, pos: int, count: int) -> bool:
        view, done, op = entry.view, self.done, self.op
        if op is _READ:
            return self._read(entry, pos, count)
        if op is _COMPARE:
            return self._compare(entry, pos, count)
        data = self.data if op is _WRITE else self._pattern(count)
        if op is _WRITE and count != len(data):
            data = memoryview(data)[done : done + count]
        if view is not None:
            view[pos : pos + count] = data
            return True
        stored = entry.file.pwrite(pos, bytes(data))
        return stored == count or self._gone(stored)

    def _read(self, entry: TlbEntry, pos: int, count: int) -> bool:
        data, done = self.data, self.done
        assert isinstance(data, bytearray)
        if entry.view is not None:
            data[done : done + count] = entry.view[pos : pos + count]
            return True
        got = entry.file.pread(pos, count)
        data[done : done + len(got)] = got
        return len(got) == count or self._gone(len(got))

    def _compare(self, entry: TlbEntry, pos: int, count: int) -> bool:
        got = bytes(entry.view[pos : pos + count]) if entry.view is not None else entry.file.pread(pos, count)
        want = self.data[self.done : self.done + count]
        if got == want:
            return True
        at = _common(got, want)
        self.done += at
        self.fail(f"differs at iova {self.iova + self.done:#x}")
        return False

    def _pattern(self, count: int) -> bytes:
        """data, repeated, in phase with the start of the transfer."""
        pattern = bytes(self.data)
        phase = self.done % len(pattern)
        return ((pattern[phase:] + pattern[:phase]) * (count // len(pattern) + 1))[:count]

    def _gone(self, count: int) -> bool:
        self.done += count
        self.fail(f"the memory behind iova {self.iova + self.done:#x} is gone")
        return False


def _common(one: Bytes, other: Bytes) -> int:
    """How many bytes are the same at the start of both; by halves, for a MiB byte by byte takes too long."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


class Pumping(Protocol):
    """Who pumps a queue, and has a clock."""

    def work(self, queue: DmaQueue) -> None:
        """There is something to do again."""
        ...

    def parked(self, dma: Dma) -> float:
        """It waits for a page, until when: whoever has a clock calls Endpoint.time_out() then."""
        ...


class DmaQueue:
    """The transfers of a machine, in turn: those that can go on, and those that wait for a page."""

    def __init__(self) -> None:
        self.running: deque[Dma] = deque()
        self.parked: dict[Dma, float] = {}  # and until when, by the clock of who pumps
        self.pumping: Pumping | None = None
        self.turn: Dma | None = None  # whose it was last: after a bug, who must be told

    def submit(self, dma: Dma) -> None:
        """Run it when the queue is pumped; a transfer of no bytes is over at once."""
        if dma.length == 0:
            dma.end(DONE)
            return
        self.parked.pop(dma, None)
        self.running.append(dma)
        if self.pumping is not None and len(self.running) == 1:
            self.pumping.work(self)

    def pump(self, steps: int, count: int) -> bool:
        """At most `steps` steps, one per transfer in turn, and none after `count` bytes; True while more is to do."""
        running = self.running
        while running and steps > 0 and count > 0:
            dma = running.popleft()
            before = dma.done
            steps -= 1
            self.turn = dma
            state = dma.step() if dma.state is RUNNING else dma.state
            count -= dma.done - before
            if state is RUNNING:
                running.append(dma)
            elif state is PARKED:
                self._park(dma)
        return bool(running)

    def ended(self, dma: Dma) -> None:
        """It is over, wherever it was; from the running ones it goes when its turn comes."""
        self.parked.pop(dma, None)

    def _park(self, dma: Dma) -> None:
        self.parked[dma] = math.inf if self.pumping is None else self.pumping.parked(dma)
