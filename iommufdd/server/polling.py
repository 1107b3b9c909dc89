"""Doorbells of guests: registers that they write without a trap, looked at while there are any.

A guest that has rung lately is looked at every millisecond, others every ten. Nothing is polled when no queue exists.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from . import log

if TYPE_CHECKING:
    from iommufdd.doorbells import Doorbells
    from iommufdd.iommu.ops import Doorbell

BUSY = 0.001  # seconds between two looks
IDLE = 0.010  # the same, when nobody has rung for
QUIET = 0.050  # seconds
COMMANDS = 64  # a turn: about as long as others may have to wait


class Poller:
    """Who looks at the doorbells of all machines (iommufdd.doorbells.Polling)."""

    def __init__(self) -> None:
        self.watched: dict[Doorbells, None] = {}
        self.looks = 0
        self._wake = trio.Event()  # there is something to look at

    def watch(self, doorbells: Doorbells) -> None:
        self.watched[doorbells] = None
        self._wake.set()

    def forget(self, doorbells: Doorbells) -> None:
        self.watched.pop(doorbells, None)

    async def run(self) -> None:
        """Until cancelled."""
        quiet_at = trio.current_time() + QUIET
        while True:
            if not self.watched:
                self._wake = trio.Event()
                await self._wake.wait()
                quiet_at = trio.current_time() + QUIET
            most = await self._round()
            now = trio.current_time()
            if most:
                quiet_at = now + QUIET
            if most < COMMANDS:
                await trio.sleep(BUSY if now < quiet_at else IDLE)
            else:
                await trio.lowlevel.checkpoint()

    async def _round(self) -> int:
        """A turn of each; the most that one of them had to do."""
        most = done = 0
        for doorbells in list(self.watched):
            for doorbell in doorbells:
                if done >= COMMANDS:
                    await trio.lowlevel.checkpoint()
                    done = 0
                count = self.look(doorbells, doorbell)
                most, done = max(most, count), done + count
        return most

    def look(self, doorbells: Doorbells, doorbell: Doorbell) -> int:
        """One turn of one doorbell, if it is still there."""
        if doorbell not in doorbells.watched:
            return 0
        self.looks += 1
        try:
            return doorbell.poll(COMMANDS)
        except Exception as error:
            log.bug(error)  # it costs this queue, and no other
            doorbells.remove(doorbell)
            return 0
