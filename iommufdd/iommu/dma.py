"""DMA as a stepping object: one step moves one stretch through one translation, fails, or waits for a page.

Each step is atomic: it sees one translation, the old or the new one of a replace, and uses it to its end.
"""

from __future__ import annotations

import enum
from collections import deque
from typing import TYPE_CHECKING

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
                 "retries", "state")  # fmt: skip

    def __init__(
        self, dev: Endpoint, op: Op, iova: int, length: int, *, data: Bytes = b"", pasid: int | None = None,
        priv: int = 0, ended: Callable[[Dma], None] | None = None,
    ) -> None:  # fmt: skip
        """pasid: None for a request without PASID. priv: PRIV for a privileged request. ended: called once."""
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
        self.ended = ended

    def step(self) -> State:
        """One stretch; the state after it."""
        iova = self.iova + self.done
        try:
            entry = self.dev.translate(self.pasid, iova, self.access)
        except TranslationFault as fault:
            return self._refused(fault)
        left = self.length - self.done
        count = left if left <= STRETCH and iova + left - 1 <= entry.last else min(left, entry.last - iova + 1, STRETCH)
        self.retries = 0
        if not self._move(entry, iova - entry.first + entry.pos, count):
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

    def resume(self) -> None:
        """The page request was answered with SUCCESS: try again."""
        parked = self.state is PARKED
        self.state = RUNNING
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
        at = next((i for i, (a, b) in enumerate(zip(got, want, strict=False)) if a != b), len(got))
        self.done += at
        self.fail(f"differs at byte {self.done:#x} (iova {self.iova + self.done:#x})")
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


class DmaQueue:
    """The transfers of a machine that can go on, in turn; `work` is called when there is some again."""

    def __init__(self) -> None:
        self.running: deque[Dma] = deque()
        self.parked: dict[Dma, None] = {}
        self.work: Callable[[], None] | None = None

    def submit(self, dma: Dma) -> None:
        """Run it when the queue is pumped; a transfer of no bytes too."""
        if dma.length == 0:
            dma.end(DONE)
            return
        self.parked.pop(dma, None)
        self.running.append(dma)
        if self.work is not None:
            self.work()

    def pump(self, steps: int) -> bool:
        """At most `steps` steps, one per transfer in turn; True while more is to do."""
        running = self.running
        while running and steps:
            dma = running.popleft()
            steps -= 1
            state = dma.state if dma.state is not RUNNING else dma.step()
            if state is RUNNING:
                running.append(dma)
            elif state is PARKED:
                self.parked[dma] = None
        return bool(running)

    def ended(self, dma: Dma) -> None:
        """It has failed while it was parked."""
        self.parked.pop(dma, None)
