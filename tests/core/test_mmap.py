"""Offsets of registers to map: first fit, for one context or for several together."""

from __future__ import annotations

from iommufdd.mmap import Offsets


def test_the_first_room_that_is_large_enough_is_given() -> None:
    offsets = Offsets()
    assert [offsets.alloc(0x2000), offsets.alloc(0x1000), offsets.alloc(0x1000)] == [0x1000, 0x3000, 0x4000]
    offsets.free(0x1000)
    assert offsets.length(0x3000) == 0x1000
    assert [offsets.alloc(0x3000), offsets.alloc(0x1000), offsets.alloc(0x1000)] == [0x5000, 0x1000, 0x2000]
