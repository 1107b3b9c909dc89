"""What the sanitizer costs a DMA: a walk past the caches for each translation used, in process."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from iommufdd.iommu.dma import Dma, Op, State
from iommufdd.sanitizer import Sanitizer
from tests.iommu.lab import POOL, Lab, endpoint
from tests.iommu.tables import X86Table

from .measure import US, Bench, Case, Plan

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

IOVA = 0x7F12_3400_0000
PAGES = 512
DMAS = 20_000


class Nested:
    """A device behind a guest's table of small pages, all of them in the IOTLB; watched or not."""

    def __init__(self, plan: Plan, *, watched: bool) -> None:
        lab = Lab()
        self.sanitizer = Sanitizer()
        if watched:
            self.sanitizer.watch(lab.iommu)
        idev = lab.device()
        ioas, ram = lab.ram()
        table = X86Table(ram, POOL)
        lab.attach(idev, lab.nested(idev, lab.parent(idev, ioas), table.root))
        for page in range(PAGES):
            table.map(IOVA + page * 4096, page % 256 * 4096)
        self.dev = endpoint(idev)
        self.number = plan.count(DMAS)
        self.move(4096)

    def move(self, length: int) -> float:
        """Reads of so many bytes, a page after the other; seconds for one."""
        dmas = [Dma(self.dev, Op.READ, IOVA + at % PAGES * 4096, length) for at in range(self.number)]
        start = time.thread_time()
        for dma in dmas:
            dma.run()
        seconds = time.thread_time() - start
        if any(dma.state is not State.DONE for dma in dmas) or self.sanitizer.counts.never:
            raise AssertionError("a DMA failed")
        return seconds / self.number


@contextmanager
def cases(plan: Plan) -> Iterator[list[Case]]:
    off, on = Nested(plan, watched=False), Nested(plan, watched=True)

    def move(nested: Nested, length: int) -> Callable[[], float]:
        return lambda: nested.move(length)

    found = []
    for length in (64, 4096):
        base = Case(f"DMA read of {length:,} bytes, IOTLB hit", "off", move(off, length))
        found += [base, Case(base.row, "report", move(on, length), base=base)]
    yield found


BENCH = Bench(
    "sanitizer",
    "a DMA through a nested table of 4 levels with the sanitizer off and on, in process",
    US,
    "how many times as long as with the sanitizer off",
    cases,
)
