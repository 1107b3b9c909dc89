"""A reader of EPTs that shares nothing with the MMU: bytes, as Intel's manual draws them (SDM vol. 3, 30.3.2)."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SIZES = {1: 4 << 10, 2: 2 << 20, 3: 1 << 30}


class Mapping(NamedTuple):
    """A leaf entry that says something."""

    gpa: int
    size: int
    hpa: int
    rights: str  # "rwx", a dash for each that is missing
    memory_type: int
    ignore_pat: bool
    software: frozenset[int]  # which of the bits are set that the CPU ignores

    @property
    def misconfigured(self) -> bool:
        """The CPU stops: it can be written and not read."""
        return self.rights[:2] == "-w"


def decode(page: Callable[[int], bytes], root: int, levels: int) -> dict[int, Mapping]:
    """All leaf entries by guest address. AssertionError for an entry that no CPU accepts, but for the one above."""
    return {found.gpa: found for found in _table(page, root, levels, 0)}


def _table(page: Callable[[int], bytes], address: int, level: int, base: int) -> Iterator[Mapping]:
    data = page(address)
    assert len(data) == 4096
    assert address % 4096 == 0
    for index in range(512):
        word = data[8 * index : 8 * index + 8]
        number = int.from_bytes(word, "little")
        gpa = base + index * 4096 * 512 ** (level - 1)
        if not word[0] & 7 and not number & (1 << 59):
            assert number == 1 << 63, f"an empty entry is {number:#x}"
            continue
        yield from _entry(page, number, level, gpa)


def _entry(page: Callable[[int], bytes], number: int, level: int, gpa: int) -> Iterator[Mapping]:
    address = number % 2**52 // 4096 * 4096
    leaf = level == 1 or number // 128 % 2 == 1
    rights = "".join(letter if number >> bit & 1 else "-" for bit, letter in enumerate("rwx"))
    if not leaf:
        assert rights == "rwx"
        assert number // 8 % 16 == 0, "bits 6:3 of an entry that leads to a table are reserved"
        yield from _table(page, address, level - 1, gpa)
        return
    assert level <= 3
    assert address % SIZES[level] == 0
    software = frozenset(bit for bit in (*range(8, 12), *range(52, 64)) if number >> bit & 1)
    yield Mapping(gpa, SIZES[level], address, rights, number // 8 % 8, bool(number // 64 % 2), software)
