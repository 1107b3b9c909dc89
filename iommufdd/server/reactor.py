"""One Trio task that owns an epoll instance with every channel, listener and pipe of the daemon.

Waiting in Trio for each channel costs more than the work it waits for; so the channels are plain objects, called
when their descriptor is ready, and Trio sees a single descriptor. Other tasks (signals, the admin socket) get
their turn at least every few milliseconds.

What makes close() exact: a batch of epoll events holds everything that has happened until then. Hang-ups in it
are handled before requests, and each channel handles one packet a batch; so whoever has seen its close() return,
and then sends a request, finds the close done.
"""

from __future__ import annotations

import os
import select
import time
from typing import TYPE_CHECKING, Protocol

import trio

from . import log

if TYPE_CHECKING:
    from collections.abc import Callable

    from .files import Pipes

HUNG_UP = select.EPOLLHUP | select.EPOLLERR | select.EPOLLRDHUP
CHECKPOINT_INTERVAL = 0.002  # seconds between turns of other tasks, while requests keep coming


class Source(Protocol):
    """Something with a descriptor in the reactor."""

    def ready(self, mask: int) -> None:
        """epoll says so; never waits."""
        ...


class Bell:
    """Wakes the reactor while it waits through Trio."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def ring(self) -> None:
        os.eventfd_write(self.fd, 1)

    def ready(self, mask: int) -> None:
        os.eventfd_read(self.fd)


class Reactor:
    """The loop.

    `linger`: seconds to sleep in epoll after some work, before waiting through Trio, which wakes up slower; other
    tasks wait meanwhile, so a millisecond is enough. `spin`: seconds to poll without sleeping, before that.
    """

    def __init__(self, pipes: Pipes, linger: float, spin: float) -> None:
        self.linger = linger
        self.spin = spin
        self.turns = 0  # batches handled
        self._epoll = select.epoll()
        self._sources: dict[int, Source] = {}
        self._pipes = pipes
        self._closers: set[int] = set()
        self._work: Callable[[], bool] | None = None
        self._bell = Bell()
        self.register(self._bell.fd, self._bell, select.EPOLLIN)
        self.register(pipes.closers.fileno(), pipes, select.EPOLLIN, first=True)

    def register(self, fd: int, source: Source, events: int, *, first: bool = False) -> None:
        """`first`: it tells of descriptors that were closed, so it comes before all others of its batch."""
        self._epoll.register(fd, events)
        self._sources[fd] = source
        if first:
            self._closers.add(fd)

    def modify(self, fd: int, events: int) -> None:
        self._epoll.modify(fd, events)

    def unregister(self, fd: int) -> None:
        del self._sources[fd]
        self._closers.discard(fd)
        self._epoll.unregister(fd)

    def work_on(self, work: Callable[[], bool]) -> None:
        """Call `work` between batches until it says False; each call is as long as others may have to wait."""
        if self._work is None:
            self._work = work
            self._bell.ring()

    @property
    def working(self) -> bool:
        """There is something to do between batches."""
        return self._work is not None

    def work(self) -> bool:
        """One call; False if there was nothing to do."""
        if self._work is None:
            return False
        if not self._work():
            self._work = None
        return True

    async def run(self) -> None:
        """Serve until cancelled."""
        checkpoint_at = time.monotonic() + CHECKPOINT_INTERVAL
        while True:
            if self._work is not None:
                checkpoint_at = await self._serve_and_work(checkpoint_at)
                continue
            events = self._poll()
            if not events:
                await trio.lowlevel.wait_readable(self._epoll.fileno())
                self.step()
                checkpoint_at = time.monotonic() + CHECKPOINT_INTERVAL
                continue
            self._dispatch(events)
            if time.monotonic() > checkpoint_at:
                await trio.lowlevel.checkpoint()
                checkpoint_at = time.monotonic() + CHECKPOINT_INTERVAL

    async def _serve_and_work(self, checkpoint_at: float) -> float:
        """A batch without waiting for it, then a piece of work; when other tasks get their next turn."""
        self.step()
        self.work()
        if self._work is None:
            # Whoever waits for the work is another task, and may have more: no lingering.
            await trio.lowlevel.wait_readable(self._epoll.fileno())
            self.step()
        elif time.monotonic() < checkpoint_at:
            return checkpoint_at
        else:
            await trio.lowlevel.checkpoint()
        return time.monotonic() + CHECKPOINT_INTERVAL

    def step(self) -> bool:
        """Handle what is ready now; False if nothing was."""
        events = self._epoll.poll(0, len(self._sources))
        self._dispatch(events)
        return bool(events)

    def hang_ups(self) -> None:
        """Handle what has been closed until now, and no requests: before others look at what is open."""
        while True:
            before = len(self._sources)
            events = [each for each in self._epoll.poll(0, before) if self._rank(each) < 2]
            self._dispatch(events)
            if not events or len(self._sources) == before:
                return

    def close(self) -> None:
        self._epoll.close()
        os.close(self._bell.fd)

    def _poll(self) -> list[tuple[int, int]]:
        """What is ready, or becomes ready very soon."""
        if self.spin:
            until = time.monotonic() + self.spin
            while time.monotonic() < until:
                if events := self._epoll.poll(0, len(self._sources)):
                    return events
        return self._epoll.poll(self.linger, len(self._sources))

    def _dispatch(self, events: list[tuple[int, int]]) -> None:
        self.turns += 1
        if len(events) > 1:
            events.sort(key=self._rank)  # stable: among equals, the order in which they became ready
        sources = self._sources
        for fd, mask in events:
            source = sources.get(fd)
            if source is None:  # closed by an earlier event of this batch
                continue
            try:
                source.ready(mask)
            except Exception as error:
                self._give_up(fd, error)

    def _give_up(self, fd: int, error: Exception) -> None:
        """A source has a bug: the others must not suffer."""
        log.bug(error, fd=fd)
        if fd in self._sources and fd not in self._closers:
            self.unregister(fd)

    def _rank(self, event: tuple[int, int]) -> int:
        fd, mask = event
        return 0 if fd in self._closers else 1 if mask & HUNG_UP else 2
