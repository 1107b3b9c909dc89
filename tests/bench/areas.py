"""An IOAS with many areas of 4 KiB, and batches of MAP and UNMAP on it.

Areas lie in every other slot of 4 KiB; what a round maps goes into the gaps, or ascending behind the last one, and
is unmapped again in the same round.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from iommufd_uapi import iommufd as uapi

from .core import USER_VA

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from iommufd_uapi.layout import Ioctl

    Timed = Callable[[Sequence[Ioctl]], float]  # seconds for one of many ioctls

PAGE = 4096
IOVA = 1 << 24  # where the aperture of the mock's domain begins
MAP_AUTO = uapi.IOMMU_IOAS_MAP_READABLE | uapi.IOMMU_IOAS_MAP_WRITEABLE
MAP_FIXED = MAP_AUTO | uapi.IOMMU_IOAS_MAP_FIXED_IOVA
CHUNK = 10_000
FILLED = 20_000  # a fill of fewer areas is repeated up to so many


class Areas:
    """`count` areas in an IOAS of whoever makes the ioctls."""

    def __init__(self, timed: Timed, ioas_id: int, count: int, each_round: int) -> None:
        self.ioas_id = ioas_id
        self.count = count
        self._timed = timed
        self._each_round = each_round
        self._random = random.Random(count)
        self._mapped: list[int] = []  # slots of this round

    def iova(self, slot: int) -> int:
        return IOVA + slot * PAGE

    def fill(self, *, shuffled: bool) -> float:
        """Map all areas; seconds for one."""
        slots = list(range(0, 2 * self.count, 2))
        if shuffled:
            self._random.shuffle(slots)
        times = max(FILLED // self.count, 1)
        total = self._map_all(slots)
        for _ in range(times - 1):
            self._timed([uapi.IoasUnmap(ioas_id=self.ioas_id, length=2**64 - 1)])
            total += self._map_all(slots)
        return total / times / self.count

    def _map_all(self, slots: list[int]) -> float:
        chunks = (slots[at : at + CHUNK] for at in range(0, len(slots), CHUNK))
        return sum(self._map(chunk) * len(chunk) for chunk in chunks)

    def map_random(self) -> float:
        self._mapped = [2 * at + 1 for at in self._random.sample(range(self.count), self._each_round)]
        return self._map(self._mapped)

    def map_ascending(self) -> float:
        self._mapped = list(range(2 * self.count, 2 * (self.count + self._each_round), 2))
        return self._map(self._mapped)

    def unmap_random(self) -> float:
        self._random.shuffle(self._mapped)
        return self.unmap()

    def unmap(self) -> float:
        """In the order in which they were mapped."""
        structs = [uapi.IoasUnmap(ioas_id=self.ioas_id, iova=self.iova(slot), length=PAGE) for slot in self._mapped]
        return self._timed(structs)

    def _map(self, slots: Sequence[int]) -> float:
        return self._timed(
            [
                uapi.IoasMap(
                    flags=MAP_FIXED,
                    ioas_id=self.ioas_id,
                    user_va=USER_VA + slot * PAGE,
                    length=PAGE,
                    iova=self.iova(slot),
                )
                for slot in slots
            ]
        )

    def some_areas(self, count: int) -> list[int]:
        """IOVAs of areas that are always there."""
        return [self.iova(2 * at) for at in self._random.sample(range(self.count), min(count, self.count))]
