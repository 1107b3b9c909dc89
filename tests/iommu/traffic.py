"""Replace under traffic, for every model: each stretch of a DMA sees the old domain or the new one, and none fails."""

from __future__ import annotations

import random
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

from iommufdd.iommu.dma import Dma, Op, State
from iommufdd.user import PAGE_SIZE

if TYPE_CHECKING:
    from iommufdd.device import IommufdDevice

    from .lab import Lab

IOVA = 0x40_0000
PAGES = 8
SEEDS = range(10)
REPLACES = 1_000  # of each seed: 10,000 of each model
MODES = "faithful", "greedy", "off"  # of the caches


class Target(NamedTuple):
    """Something to attach to: every page of [IOVA, IOVA + PAGES) begins with its own number."""

    pt: int
    mark: int


class Traffic:
    """Bursts that straddle replaces: before each store, between any two and after, a burst takes some steps."""

    def __init__(self, lab: Lab, idev: IommufdDevice, seed: int, pasid: int | None) -> None:
        self.lab = lab
        self.idev = idev
        self.pasid = pasid
        self.random = random.Random(seed)
        self.burst: Dma | None = None
        self.allowed: set[int] = set()  # marks that a page may show now
        self.seen: Counter[str] = Counter()

    def some(self) -> None:
        """A few steps of the burst under way."""
        for _ in range(self.random.randrange(3)):
            if self.burst is None:
                self.burst = self.lab.dma(self.idev, Op.READ, IOVA, PAGES * PAGE_SIZE, pasid=self.pasid)
            before = self.burst.done
            state = self.burst.step()
            assert state is not State.FAILED, self.burst.error
            for at in range(-(-before // PAGE_SIZE) * PAGE_SIZE, self.burst.done, PAGE_SIZE):
                assert self.burst.data[at] in self.allowed
                self.seen["page"] += 1
            if state is State.DONE:
                self.burst = None


def pasid_of(seed: int) -> int | None:
    """Every fourth seed is about a PASID."""
    return 5 if seed % 4 == 3 else None


def straddle(lab: Lab, idev: IommufdDevice, places: list[Target], seed: int, replaces: int) -> None:
    """Replace so often, with bursts in between."""
    pasid = pasid_of(seed)
    traffic = Traffic(lab, idev, seed, pasid)
    now = places[0]
    traffic.allowed = {now.mark}
    if pasid is not None:
        lab.attach(idev, places[0].pt)
    lab.attach(idev, now.pt, pasid or 0)
    lab.iommu.stored = lambda dev, number: traffic.some()
    for _ in range(replaces):
        new = traffic.random.choice(places)
        traffic.some()
        traffic.allowed = {now.mark, new.mark}
        lab.replace(idev, new.pt, pasid or 0)
        now = new
        traffic.allowed = {now.mark}  # once replace has returned nothing shows the old one
        traffic.some()
    assert traffic.seen["page"] > replaces


def replace_sees_old_or_new(lab: Lab) -> None:
    """One replace of an IOAS by another, with a read at every store."""
    idev = lab.device()
    ioas_a, ram_a = lab.ram()
    ioas_b, ram_b = lab.ram()
    ram_a.write(0x3000, b"A")
    ram_b.write(0x3000, b"B")
    lab.attach(idev, ioas_a)
    assert lab.read(idev, 0x3000, 1) == b"A"
    seen: list[bytes] = []
    lab.iommu.stored = lambda dev, pasid: seen.append(lab.read(idev, 0x3000, 1))
    lab.replace(idev, ioas_b)
    assert lab.read(idev, 0x3000, 1) == b"B"
    assert seen
    assert set(seen) <= {b"A", b"B"}
