"""Registers that a guest writes without anybody being told: who looks at them, and when.

They are looked at on each ioctl of their context. In between, whoever has a clock does (Polling); the core has none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .iommu.ops import Doorbell
    from .machine import Machine


class Polling(Protocol):
    """Who looks at doorbells from time to time."""

    def watch(self, doorbells: Doorbells) -> None:
        """There is one to look at now."""
        ...

    def forget(self, doorbells: Doorbells) -> None:
        """There is none any more."""
        ...


class Doorbells:
    """Those of a context that guests can ring. `watched` is empty nearly always, and then they cost nothing."""

    __slots__ = ("_machine", "watched")

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self.watched: dict[Doorbell, None] = {}

    def __iter__(self) -> Iterator[Doorbell]:
        """Those of now; they may come and go meanwhile."""
        return iter(tuple(self.watched))

    def add(self, doorbell: Doorbell) -> None:
        self.watched[doorbell] = None
        if len(self.watched) == 1 and self._machine.polling is not None:
            self._machine.polling.watch(self)

    def remove(self, doorbell: Doorbell) -> None:
        """It need not be there."""
        if doorbell not in self.watched:
            return
        del self.watched[doorbell]
        if not self.watched and self._machine.polling is not None:
            self._machine.polling.forget(self)

    def poll(self) -> None:
        """Do all that has been asked for until now."""
        for doorbell in self:
            doorbell.poll()
