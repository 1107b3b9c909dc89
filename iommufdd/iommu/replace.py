"""Switching the domain of a (device, PASID): the stores, and what a walk sees between them.

Default: the new structure is published in one store. Mode `vendor` replays the driver's own order of stores and walks
after each: hitless, or a window and the store that opens it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from .endpoint import Endpoint
    from .ops import Domain


class Store(NamedTuple):
    """One store to a structure of the hardware, or an invalidation among them, and what a walk gives after it."""

    what: str
    sees: str  # "old", "new", or the fault


class Switch:
    """One attach, replace or detach as the hardware saw it."""

    def __init__(self, dev: Endpoint, pasid: int, old: Domain | None, new: Domain | None) -> None:
        self.dev = dev
        self.pasid = pasid
        self.old = old
        self.new = new
        self.stores: list[Store] = []

    @property
    def opens(self) -> Store | None:
        """The first store after which a walk sees neither the old nor the new domain."""
        return next((store for store in self.stores if store.sees not in ("old", "new")), None)

    @property
    def verdict(self) -> str:
        """hitless, or window."""
        return "hitless" if self.opens is None else "window"

    def __str__(self) -> str:
        opens = self.opens
        where = f": {opens.what} opens it ({opens.sees})" if opens is not None else ""
        return f"{self.dev.name} pasid {self.pasid}: {self.verdict}{where}"
