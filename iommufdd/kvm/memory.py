"""Host-physical memory of a machine: where page tables are bytes, and where clients' files are seen.

A file is seen in chunks of 1 GiB, so that what is contiguous in a file is contiguous here. A chunk exists while a
table maps some of it; then it holds the file. Addresses that are free again are given out again, lowest first.
"""

from __future__ import annotations

import heapq
import struct
from typing import TYPE_CHECKING, Protocol

from iommufdd.iommu.ops import PhysicalRun
from iommufdd.user import PAGE_SIZE

if TYPE_CHECKING:
    from iommufdd.user import PageFile

TABLES = 1 << 32  # address of the first table; below is nobody's
FILES = 1 << 38  # of the first chunk of a file
CHUNK_SHIFT = 30
CHUNK = 1 << CHUNK_SHIFT
_entry = struct.Struct("<Q")


class Watcher(Protocol):
    """Who wants to know when memory may be used for something else."""

    def table_free(self, hpa: int) -> None:
        """The page of a table, about to be given back."""
        ...

    def page_free(self, file: PageFile, pos: int, size: int) -> None:
        """Bytes of a file that no table maps there any more, about to be given back."""
        ...


class Chunk:
    """1 GiB of a file."""

    __slots__ = ("file", "index", "pos", "users")

    def __init__(self, index: int, file: PageFile, pos: int) -> None:
        self.index = index
        self.file = file
        self.pos = pos
        self.users = 0  # leaf entries


class HostMemory:
    """Physical memory of one machine."""

    def __init__(self) -> None:
        self.watchers: list[Watcher] = []
        self._tables: dict[int, bytearray] = {}  # by number of the page from TABLES on
        self._free_tables: list[int] = []
        self._chunks: dict[int, Chunk] = {}
        self._by_file: dict[tuple[PageFile, int], Chunk] = {}
        self._free_chunks: list[int] = []

    # ---- pages of tables ----

    def alloc_table(self, fill: int) -> int:
        """The address of a page with every entry `fill`."""
        page = heapq.heappop(self._free_tables) if self._free_tables else len(self._tables)
        self._tables[page] = bytearray(_entry.pack(fill) * 512)
        return TABLES + page * PAGE_SIZE

    def free_table(self, hpa: int) -> None:
        """Give a page back: the next table may be there."""
        for watcher in self.watchers:
            watcher.table_free(hpa)
        page = hpa - TABLES >> 12
        del self._tables[page]
        heapq.heappush(self._free_tables, page)

    def entries(self, hpa: int) -> tuple[int, ...]:
        """The 512 entries of a table."""
        return struct.unpack("<512Q", self._tables[hpa - TABLES >> 12])

    # ---- files ----

    def hold(self, file: PageFile, pos: int) -> int:
        """Where bytes of a file are seen, for one leaf entry more."""
        key = file, pos >> CHUNK_SHIFT
        chunk = self._by_file.get(key)
        if chunk is None:
            index = heapq.heappop(self._free_chunks) if self._free_chunks else len(self._chunks)
            chunk = self._chunks[index] = self._by_file[key] = Chunk(index, file, key[1] << CHUNK_SHIFT)
            file.get()
        chunk.users += 1
        return FILES + chunk.index * CHUNK + pos % CHUNK

    def release(self, hpa: int, size: int) -> None:
        """A leaf entry is gone, from every cache too: the page may be used for something else."""
        chunk = self._chunks[hpa - FILES >> CHUNK_SHIFT]
        for watcher in self.watchers:
            watcher.page_free(chunk.file, chunk.pos + hpa % CHUNK, size)
        self.drop(hpa)

    def drop(self, hpa: int) -> None:
        """One entry less; if it was not the only one of this page, nothing else has changed."""
        chunk = self._chunks[hpa - FILES >> CHUNK_SHIFT]
        chunk.users -= 1
        if not chunk.users:
            del self._chunks[chunk.index], self._by_file[chunk.file, chunk.pos >> CHUNK_SHIFT]
            heapq.heappush(self._free_chunks, chunk.index)
            chunk.file.put()

    # ---- what hardware does ----

    def load(self, hpa: int) -> int | None:
        """The 64 bit entry at an address; None where there is no memory."""
        table = self._tables.get(hpa - TABLES >> 12)
        if table is not None:
            value: int = _entry.unpack_from(table, hpa & 0xFF8)[0]
            return value
        run = self.run(hpa)
        if run is None:
            return None
        data = run.file.pread(run.pos + hpa - run.first, 8)
        return int.from_bytes(data, "little") if len(data) == 8 else None

    def store(self, hpa: int, entry: int) -> None:
        """Write a 64 bit entry of a table."""
        _entry.pack_into(self._tables[hpa - TABLES >> 12], hpa & 0xFF8, entry)

    def run(self, hpa: int) -> PhysicalRun | None:
        """Consecutive bytes of one file around an address; None where none is seen."""
        chunk = self._chunks.get(hpa - FILES >> CHUNK_SHIFT)
        if chunk is None:
            return None
        first = FILES + chunk.index * CHUNK
        return PhysicalRun(first, first + CHUNK - 1, chunk.file, chunk.pos)

    @property
    def in_use(self) -> tuple[int, int]:
        """(pages of tables, chunks of files)"""
        return len(self._tables), len(self._chunks)
