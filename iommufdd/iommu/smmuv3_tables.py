"""SMMUv3's stream table and CD tables of the kernel: the bytes that attach and replace store to (IHI0070 5.2, 5.4)."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Protocol

from iommufd_uapi.smmuv3 import S1Fmt

from .smmuv3_ste import ABORT_STE, ENTRY_SIZE, WORDS, ZERO, Words

if TYPE_CHECKING:
    from collections.abc import Callable

L2_CDS = 1024  # CTXDESC_L2_ENTRIES: CDs of a leaf


class Table(Protocol):
    """Entries of 64 bytes by StreamID or SubstreamID."""

    def read(self, index: int) -> Words:
        """The words of an entry."""
        ...

    def publish(self, index: int, words: Words) -> None:
        """A whole entry in one store."""
        ...

    def store(self, index: int, word: int, value: int) -> None:
        """One 64 bit word."""
        ...


class StreamTable:
    """The STEs of all streams that have a device; they abort until told otherwise (arm_smmu_init_initial_stes)."""

    def __init__(self, stored: Callable[[int], None]) -> None:
        """stored(sid) is called after every store: the hardware may walk between any two."""
        self._entries: dict[int, bytearray] = {}
        self._stored = stored

    def add(self, sid: int) -> None:
        """arm_smmu_init_sid_strtab()"""
        self._entries.setdefault(sid, bytearray(WORDS.pack(*ABORT_STE)))

    def __contains__(self, sid: int) -> bool:
        return sid in self._entries

    def read(self, index: int) -> Words:
        return WORDS.unpack(self._entries[index])

    def publish(self, index: int, words: Words) -> None:
        WORDS.pack_into(self._entries[index], 0, *words)
        self._stored(index)

    def store(self, index: int, word: int, value: int) -> None:
        struct.pack_into("<Q", self._entries[index], word * 8, value)
        self._stored(index)


class CdTable:
    """The CD table of one device, linear or of two levels, whose leaves are made when first needed and then stay."""

    def __init__(self, address: int, s1cdmax: int, *, two_level: bool, stored: Callable[[int], None]) -> None:
        """address: where STEs find it. s1cdmax: log2 of its CDs. stored(ssid) is called after every store."""
        self.address = address
        self.s1cdmax = s1cdmax
        self.s1fmt = S1Fmt.L2_64K if two_level and 1 << s1cdmax > L2_CDS else S1Fmt.LINEAR
        self._leaves: dict[int, bytearray] = {}
        self._stored = stored
        if self.s1fmt is S1Fmt.LINEAR:
            self.add(0)

    def add(self, ssid: int) -> None:
        """arm_smmu_alloc_cd_ptr(): the leaf that holds a CD."""
        size = min(1 << self.s1cdmax, L2_CDS)
        self._leaves.setdefault(ssid // L2_CDS, bytearray(size * ENTRY_SIZE))

    def has_leaf(self, ssid: int) -> bool:
        """Its L1CD is valid."""
        return ssid // L2_CDS in self._leaves

    def read(self, index: int) -> Words:
        leaf = self._leaves.get(index // L2_CDS)
        return ZERO if leaf is None else WORDS.unpack_from(leaf, index % L2_CDS * ENTRY_SIZE)

    def publish(self, index: int, words: Words) -> None:
        WORDS.pack_into(self._leaves[index // L2_CDS], index % L2_CDS * ENTRY_SIZE, *words)
        self._stored(index)

    def store(self, index: int, word: int, value: int) -> None:
        struct.pack_into("<Q", self._leaves[index // L2_CDS], index % L2_CDS * ENTRY_SIZE + word * 8, value)
        self._stored(index)
