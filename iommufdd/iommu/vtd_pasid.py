"""VT-d's scalable-mode PASID table: the bytes that attach and replace store to (VT-d spec 9.5, 9.6; intel/pasid.c)."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ENTRY_SIZE = 64
LEAF_ENTRIES = 64  # of a leaf table; a directory entry names one
WORDS = struct.Struct("<8Q")
ABSENT = (0,) * 8

FIRST, SECOND, NESTED, PASS_THROUGH = 1, 2, 3, 4  # PGTT
POINTER = 0xFFFF_FFFF_FFFF_F000
_BEYOND = 0xFFF << 52  # of a pointer: no host address is so wide
# Reserved bits per word (spec 9.6). Software-ignored bits are left out.
_RESERVED_0 = 1 << 5 | 1 << 10 | _BEYOND
_RESERVED_1 = 0x7F << 16 | 3 << 25
_RESERVED_2 = 3 << 5 | _BEYOND


class PasidEntry(NamedTuple):
    """A scalable-mode PASID-table entry."""

    present: bool = False  # P
    fpd: bool = False  # FPD: faults are not recorded
    aw: int = 0  # AW: 1, 2, 3 for 3, 4, 5 levels of second stage
    pgtt: int = 0  # PGTT
    ssade: bool = False  # SSADE: second-stage accessed and dirty bits
    ssptptr: int = 0  # SSPTPTR
    did: int = 0  # DID
    pwsnp: bool = False  # PWSNP: page walks snoop
    pgsnp: bool = False  # PGSNP: accesses are forced to snoop
    sre: bool = False  # SRE: supervisor requests
    ere: bool = False  # ERE: execute requests
    fspm: int = 0  # FSPM: 0 for 4 levels of first stage, 1 for 5
    wpe: bool = False  # WPE: write protection holds for supervisors
    eafe: bool = False  # EAFE: extended accessed flag
    fsptptr: int = 0  # FSPTPTR

    @classmethod
    def unpack(cls, words: tuple[int, ...]) -> PasidEntry:
        """From its eight 64 bit words."""
        w0, w1, w2 = words[:3]
        return cls(
            present=bool(w0 & 1), fpd=bool(w0 & 2), aw=w0 >> 2 & 7, pgtt=w0 >> 6 & 7, ssade=bool(w0 >> 9 & 1),
            ssptptr=w0 & POINTER, did=w1 & 0xFFFF, pwsnp=bool(w1 >> 23 & 1), pgsnp=bool(w1 >> 24 & 1),
            sre=bool(w2 & 1), ere=bool(w2 >> 1 & 1), fspm=w2 >> 2 & 3, wpe=bool(w2 >> 4 & 1),
            eafe=bool(w2 >> 7 & 1), fsptptr=w2 & POINTER,
        )  # fmt: skip

    def pack(self) -> tuple[int, ...]:
        """Its eight 64 bit words."""
        w0 = self.present | self.fpd << 1 | self.aw << 2 | self.pgtt << 6 | self.ssade << 9 | self.ssptptr
        w1 = self.did | self.pwsnp << 23 | self.pgsnp << 24
        w2 = self.sre | self.ere << 1 | self.fspm << 2 | self.wpe << 4 | self.eafe << 7 | self.fsptptr
        return (w0, w1, w2, 0, 0, 0, 0, 0)


def reserved(words: tuple[int, ...]) -> bool:
    """A reserved bit is set (fault 0x5A)."""
    return bool(words[0] & _RESERVED_0 or words[1] & _RESERVED_1 or words[2] & _RESERVED_2)


class PasidTable:
    """The PASID directory of one device with its leaf tables, which are made when first needed and then stay."""

    def __init__(self, stored: Callable[[int], None]) -> None:
        """stored(pasid) is called after every store: the hardware may walk between any two."""
        self._leaves: dict[int, bytearray] = {}
        self._stored = stored

    def has_leaf(self, pasid: int) -> bool:
        """The directory entry of pasid is present."""
        return pasid // LEAF_ENTRIES in self._leaves

    def read(self, pasid: int) -> tuple[int, ...]:
        """The words of an entry; all zero without a leaf table."""
        leaf = self._leaves.get(pasid // LEAF_ENTRIES)
        return ABSENT if leaf is None else WORDS.unpack_from(leaf, pasid % LEAF_ENTRIES * ENTRY_SIZE)

    def publish(self, pasid: int, words: tuple[int, ...]) -> None:
        """A whole entry in one store."""
        WORDS.pack_into(self._leaf(pasid), pasid % LEAF_ENTRIES * ENTRY_SIZE, *words)
        self._stored(pasid)

    def store(self, pasid: int, word: int, value: int) -> None:
        """One 64 bit word."""
        struct.pack_into("<Q", self._leaf(pasid), pasid % LEAF_ENTRIES * ENTRY_SIZE + word * 8, value)
        self._stored(pasid)

    def present(self) -> Iterator[int]:
        """The PASIDs whose entry is present."""
        for index, leaf in sorted(self._leaves.items()):
            for at in range(LEAF_ENTRIES):
                if leaf[at * ENTRY_SIZE] & 1:
                    yield index * LEAF_ENTRIES + at

    def _leaf(self, pasid: int) -> bytearray:
        return self._leaves.setdefault(pasid // LEAF_ENTRIES, bytearray(LEAF_ENTRIES * ENTRY_SIZE))
