"""Dirty pages of 1 TiB of IOVA, in process: one mapping, a domain that tracks, a bitmap of 32 MiB."""

from __future__ import annotations

import random
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from iommufd_uapi import iommufd as uapi
from iommufd_uapi import iommufd_test as test_uapi
from iommufdd.hw_pagetable import HwptPaging
from iommufdd.iommu.selftest_ops import SelftestDirty

from .core import BUFFER_ADDR, USER_VA, Core
from .measure import MS, Bench, Case, Plan

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from iommufd_uapi.layout import Ioctl

PAGE = 4096
LENGTH = 1 << 40
DIRTY = 100_000
OP_PAGES = 1 << 20  # of the bitmap that IOMMU_TEST_OP_DIRTY gets at a time
OP_DIRTY = 1_000
FLOOR = "copy a bitmap of this size"


class Tracked:
    """A domain that tracks dirty pages, and those that get dirty."""

    def __init__(self, plan: Plan) -> None:
        self.core = Core()
        self.length = plan.count(LENGTH)
        self.length -= self.length % (OP_PAGES * PAGE)
        pages = self.length // PAGE
        self.iovas = [page * PAGE for page in random.Random(1).sample(range(pages), plan.count(DIRTY))]
        ioas_id = self.core.ioas_alloc()
        self.hwpt_id = self._huge_hwpt(ioas_id)
        rights = uapi.IOMMU_IOAS_MAP_READABLE | uapi.IOMMU_IOAS_MAP_WRITEABLE | uapi.IOMMU_IOAS_MAP_FIXED_IOVA
        self.core.ioctl(uapi.IoasMap(flags=rights, ioas_id=ioas_id, user_va=USER_VA, length=self.length))
        enable = uapi.IOMMU_HWPT_DIRTY_TRACKING_ENABLE
        self.core.timed([uapi.HwptSetDirtyTracking(flags=enable, hwpt_id=self.hwpt_id)])
        hwpt = self.core.context.objects.get(self.hwpt_id)
        assert isinstance(hwpt, HwptPaging)
        assert isinstance(hwpt.domain.dirty_ops, SelftestDirty)
        self.set_dirty: Callable[[int], None] = hwpt.domain.dirty_ops.set_dirty
        self.clean: bytes = bytes(pages // 8)

    def _huge_hwpt(self, ioas_id: int) -> int:
        """With pages of 4 KiB and up, and room for 2^56 bytes. Its device is attached to another IOAS."""
        core = self.core
        device = core.mock_domain(core.ioas_alloc()).out_idev_id
        config = test_uapi.HwptSelftest(pagetable_type=test_uapi.MOCK_IOMMUPT_HUGE).pack()
        core.memory.buffer = bytearray(config)
        alloc = uapi.HwptAlloc(
            flags=uapi.IOMMU_HWPT_ALLOC_DIRTY_TRACKING,
            dev_id=device,
            pt_id=ioas_id,
            data_type=test_uapi.IOMMU_HWPT_DATA_SELFTEST,
            data_len=len(config),
            data_uptr=BUFFER_ADDR,
        )
        return core.ioctl(alloc).out_hwpt_id

    def mark(self) -> float:
        """A write to each page, as a device makes it."""
        start = time.thread_time()
        for iova in self.iovas:
            self.set_dirty(iova)
        return time.thread_time() - start

    def scan(self, flags: int, expected: int) -> float:
        """IOMMU_HWPT_GET_DIRTY_BITMAP of all."""
        self.core.memory.buffer = bytearray(self.clean)
        struct = uapi.HwptGetDirtyBitmap(
            hwpt_id=self.hwpt_id, flags=flags, length=self.length, page_size=PAGE, data=BUFFER_ADDR
        )
        seconds = self.core.timed([struct])
        found = int.from_bytes(self.core.memory.buffer, "little").bit_count()
        if found != expected:
            raise AssertionError(f"{found} pages are dirty, not {expected}")
        return seconds

    def mark_by_op(self) -> float:
        """IOMMU_TEST_OP_DIRTY."""
        bits = random.Random(2).sample(range(OP_PAGES), OP_DIRTY)
        self.core.memory.buffer = bytearray(sum(1 << bit for bit in bits).to_bytes(OP_PAGES // 8, "little"))
        op = test_uapi.Dirty(length=OP_PAGES * PAGE, page_size=PAGE, uptr=BUFFER_ADDR)
        struct: Ioctl = test_uapi.TestCmd(op=test_uapi.IOMMU_TEST_OP_DIRTY, id=self.hwpt_id, u=op.pack())
        return self.core.timed([struct])

    def copy(self) -> float:
        start = time.thread_time()
        bytearray(self.clean)
        return time.thread_time() - start


@contextmanager
def cases(plan: Plan) -> Iterator[list[Case]]:
    tracked = Tracked(plan)
    number = len(tracked.iovas)
    keep, clear = uapi.IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR, 0
    floor = Case(FLOOR, "", tracked.copy)

    def scan(flags: int, expected: int) -> Callable[[], float]:
        return lambda: tracked.scan(flags, expected)

    yield [
        floor,
        Case(f"a write to each of {number:,} pages", "", tracked.mark, base=floor),
        Case("GET_DIRTY_BITMAP, NO_CLEAR", "", scan(keep, number), base=floor),
        Case("GET_DIRTY_BITMAP, clearing", "", scan(clear, number), base=floor),
        Case("GET_DIRTY_BITMAP, nothing dirty", "", scan(clear, 0), base=floor),
        Case(f"TEST_OP_DIRTY, {OP_DIRTY:,} of {OP_PAGES:,} pages", "", tracked.mark_by_op, base=floor),
        Case("GET_DIRTY_BITMAP, clearing these", "", scan(clear, OP_DIRTY), base=floor),
    ]


BENCH = Bench(
    "dirty",
    "dirty pages of 1 TiB of IOVA, all of it in one bitmap of 32 MiB, in process",
    MS,
    f"how many times '{FLOOR}'",
    cases,
)
