"""Emulated hardware, in process: IOTLB hits, walks, invalidations, and DMA beside a copy of the same bytes."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from iommufd_uapi import iommufd as uapi
from iommufdd.iommu import lpae
from iommufdd.iommu.dma import Dma, Op, State
from iommufdd.iommu.endpoint import Endpoint
from iommufdd.iommu.vtd_hw import VtdHardware
from iommufdd.iommu.walk import READ, RawStep
from iommufdd.iommu.x86_64 import Rules, root, walk
from iommufdd.user import PAGE_SIZE
from tests.iommu.lab import Lab, endpoint
from tests.iommu.lpae_tables import ArmTable

from .measure import PER_SECOND, US, Aim, Bench, Case, Plan

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PAGES = 512
IOVA = 0x7F00_0000_0000
MAX = 1 << 20


class Bed:
    """A device whose DMA goes through a guest's table of small pages, and one through an IOAS."""

    def __init__(self) -> None:
        self.lab = Lab()
        self.nested = self.lab.device()
        self.hwpt, self.ram, self.table = self.lab.guest(self.nested)
        for page in range(PAGES):
            self.table.map(IOVA + page * PAGE_SIZE, 0x20_0000 + page * PAGE_SIZE, "rwuad")
        self.lab.attach(self.nested, self.hwpt)
        self.plain = self.lab.device()
        ioas, _ = self.lab.ram()
        self.lab.attach(self.plain, ioas)


class ArmBed:
    """LPAE tables of small pages in memory that needs no second stage."""

    def __init__(self, granule: int) -> None:
        self.words = memoryview(bytearray(MAX)).cast("Q")
        table = ArmTable(self, 0, granule)
        for page in range(PAGES):
            table.map(IOVA + page * (granule << 10), 0x20_0000 + page * (granule << 10))
        self.rules = lpae.Rules(granule=(granule << 10).bit_length() - 1)
        self.start = lpae.root(table.root, self.rules)

    def read(self, addr: int, length: int) -> bytes:
        return self.words[addr >> 3 : addr + length >> 3].tobytes()

    def write(self, addr: int, data: bytes) -> None:
        self.words[addr >> 3 : addr + len(data) >> 3] = memoryview(data).cast("Q")


def _per(count: int, work: Callable[[], object]) -> float:
    start = time.thread_time()
    work()
    return (time.thread_time() - start) / count


class Translations:
    """What the walker and the caches do."""

    def __init__(self, plan: Plan) -> None:
        self.bed = Bed()
        self.rounds = plan.count(400)
        self.iovas = [IOVA + page * PAGE_SIZE for page in range(PAGES)]

    def hits(self) -> float:
        """Look-ups of the IOTLB that find what they look for."""
        for iova in self.iovas:
            self.dev.translate(None, iova, READ)
        space = next(space for space in self.iommu.iotlb.spaces.values() if len(space.hot) == PAGES)

        def work() -> None:
            lookup, iovas = space.lookup, self.iovas
            for _ in range(self.rounds):
                for iova in iovas:
                    lookup(iova)

        return _per(self.rounds * PAGES, work)

    def translations(self) -> float:
        """The same through the device and the PASID cache."""

        def work() -> None:
            translate, iovas = self.dev.translate, self.iovas
            for _ in range(self.rounds):
                for iova in iovas:
                    translate(None, iova, READ)

        return _per(self.rounds * PAGES, work)

    def walks(self) -> float:
        """Four levels in memory that needs no second stage."""
        view = memoryview(bytearray(self.bed.ram.read(0, 0x20_0000))).cast("Q")
        start, rules = root(self.bed.table.root, Rules()), Rules()
        rounds = max(self.rounds // 10, 1)

        def fetch(address: int) -> int:
            return view[address >> 3]

        def work() -> None:
            for _ in range(rounds):
                for iova in self.iovas:
                    steps: list[RawStep] = []
                    walk(fetch, None, start, rules, iova, READ, steps)

        return _per(rounds * PAGES, work)

    def arm_walks(self, granule: int) -> float:
        """LPAE walks from the root, cached: nothing has to be set."""
        bed = ArmBed(granule)
        words, start, rules = bed.words, bed.start, bed.rules
        rounds = max(self.rounds // 10, 1)

        def fetch(address: int) -> int:
            return words[address >> 3]

        def update(address: int, old: int, new: int) -> None:
            raise AssertionError("there is nothing to set")

        def work() -> None:
            for _ in range(rounds):
                for iova in range(IOVA, IOVA + PAGES * (granule << 10), granule << 10):
                    steps: list[RawStep] = []
                    lpae.walk(fetch, update, start, rules, iova, READ, steps)

        return _per(rounds * PAGES, work)

    def nested_walks(self) -> float:
        """Four levels, each through the second stage, and the page itself."""
        rounds = max(self.rounds // 40, 1)

        def work() -> None:
            for _ in range(rounds):
                for iova in self.iovas:
                    self.iommu.walk_fresh(self.dev, None, iova, READ)

        return _per(rounds * PAGES, work)

    def misses(self) -> float:
        """IOTLB misses: a walk from the last table kept, and the new entry."""
        rounds = max(self.rounds // 40, 1)

        def work() -> None:
            for _ in range(rounds):
                for space in self.iommu.iotlb.spaces.values():
                    space.drop(IOVA, IOVA + PAGES * PAGE_SIZE - 1)
                for iova in self.iovas:
                    self.dev.translate(None, iova, READ)

        return _per(rounds * PAGES, work)

    def invalidations(self) -> float:
        """HWPT_INVALIDATE with many entries of one page, each of which is cached."""
        lab = self.bed.lab
        entries = [uapi.HwptVtdS1Invalidate(addr=iova, npages=1, flags=1) for iova in self.iovas]
        data = b"".join(entry.pack() for entry in entries)
        addr = lab.c.process.buffer(len(data) // PAGE_SIZE + 1)
        lab.c.mm.write(addr, data)
        cmd = uapi.HwptInvalidate(hwpt_id=self.bed.hwpt, data_uptr=addr, entry_len=24, entry_num=PAGES)
        for iova in self.iovas:
            self.dev.translate(None, iova, READ)
        seconds = _per(PAGES, lambda: lab.c.ioctl(cmd))
        if cmd.entry_num != PAGES:
            raise AssertionError(f"{cmd.entry_num} entries done")
        return seconds

    @property
    def dev(self) -> Endpoint:
        return endpoint(self.bed.nested)

    @property
    def iommu(self) -> VtdHardware:
        return self.bed.lab.iommu


@contextmanager
def translation_cases(plan: Plan) -> Iterator[list[Case]]:
    t = Translations(plan)
    yield [
        Case("IOTLB hits", "", t.hits, aim=Aim(rate=5e6)),
        Case("translations that hit", "device and PASID cache too", t.translations),
        Case("4-level walks", "", t.walks, aim=Aim(rate=1e6)),
        Case("4-level LPAE walks", "", lambda: t.arm_walks(4), aim=Aim(rate=1e6)),
        Case("3-level LPAE walks", "", lambda: t.arm_walks(64)),
        Case("nested walks, 4 x 4", "", t.nested_walks, aim=Aim(rate=0.2e6)),
        Case("IOTLB misses", "last table kept", t.misses),
        Case("invalidation entries", "HWPT_INVALIDATE, one page each", t.invalidations),
    ]


TRANSLATE = Bench("translate", "translations, in process", PER_SECOND, "", translation_cases)


@contextmanager
def dma_cases(plan: Plan) -> Iterator[list[Case]]:
    bed = Bed()
    source, target = memoryview(bytearray(MAX)), bytearray(MAX)
    cases: list[Case] = []
    for size, fraction in ((4 << 10, 0.35), (64 << 10, 0.65), (1 << 20, 0.85)):
        count = plan.count(max((64 << 20) // size, 100))

        def copy(size: int = size, count: int = count) -> float:
            def work() -> None:
                for _ in range(count):
                    target[:size] = source[:size]

            return _per(count, work)

        def dma(idev: str, iova: int, size: int = size, count: int = count) -> float:
            dev = endpoint(getattr(bed, idev))
            data = bytes(size)

            def work() -> None:
                for _ in range(count):
                    if Dma(dev, Op.WRITE, iova, size, data=data).run() is not State.DONE:
                        raise AssertionError("a DMA failed")

            return _per(count, work)

        row = f"{size >> 10} KiB"
        base = Case(row, "memcpy", copy)
        cases += [
            base,
            Case(row, "DMA, IOAS", lambda d=dma: d("plain", 0x20_0000), base=base, aim=Aim(ratio=1 / fraction)),  # type: ignore[misc]
            Case(row, "DMA, nested, 4 KiB pages", lambda d=dma: d("nested", IOVA), base=base),  # type: ignore[misc]
        ]
    yield cases


DMA = Bench("dma", "DMA of a device, in process", US, "how many times memcpy of the same bytes", dma_cases)
