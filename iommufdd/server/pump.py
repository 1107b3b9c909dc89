"""DMA of all machines, between the batches of the reactor; and page requests that nobody answers in time.

A turn is one queue's share: so many steps or bytes, whichever is first. Between any two turns all clients that have
something to say are served, so what one device moves delays others by one turn at most.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import trio

from . import log

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from iommufdd.iommu.dma import Dma, DmaQueue

    from .reactor import Reactor

STEPS = 16  # a turn
BYTES = 1 << 20  # a turn; the step that passes it is done to its end
PATIENCE = 10.0  # seconds a device waits for a page, unless said otherwise


class Pump:
    """Who pumps the queues of all machines (iommufdd.iommu.dma.Pumping)."""

    def __init__(self, reactor: Reactor, queues: Callable[[], Iterable[DmaQueue]], patience: float = PATIENCE) -> None:
        """queues: all in which something can be parked. patience: math.inf for ever."""
        self.patience = patience
        self.turns = 0
        self._reactor = reactor
        self._queues = queues
        self._busy: dict[DmaQueue, None] = {}
        self._soonest = math.inf  # the deadline that expire() sleeps for
        self._earlier = trio.Event()  # there is an earlier one

    def work(self, queue: DmaQueue) -> None:
        self._busy[queue] = None
        self._reactor.work_on(self.turn)

    def turn(self) -> bool:
        """One queue's share; False when no queue has more to do."""
        self.turns += 1
        queue = next(iter(self._busy))
        del self._busy[queue]
        try:
            more = queue.pump(STEPS, BYTES)
        except Exception as error:
            log.bug(error)
            if queue.turn is not None:
                queue.turn.cancel("a bug in the daemon; its log has the traceback")
            more = bool(queue.running)
        queue.turn = None
        if more:
            self._busy[queue] = None  # behind the others
        return bool(self._busy)

    # ---- page requests ----

    def parked(self, dma: Dma) -> float:
        deadline = trio.current_time() + (self.patience if dma.timeout is None else dma.timeout)
        if deadline < self._soonest:
            self._earlier.set()
        return deadline

    async def expire(self) -> None:
        """Let devices give up, each at its time, until cancelled."""
        while True:
            self._earlier = trio.Event()
            self._soonest = min((at for queue in self._queues() for at in queue.parked.values()), default=math.inf)
            with trio.move_on_at(self._soonest):
                await self._earlier.wait()
            self._give_up(trio.current_time())

    def _give_up(self, now: float) -> None:
        """Not in expire() itself: what its frame names lives until the next deadline, a closed machine too."""
        for queue in list(self._queues()):
            for dma in [dma for dma, at in queue.parked.items() if at <= now]:
                dma.dev.time_out(dma)
