"""Room client: the scratch file of a channel, for memory too large for a packet (the protocol's SCRATCH)."""

from __future__ import annotations

import errno
import mmap
import os
from _thread import allocate_lock

from iommufd_uapi import wire

from .files import sealed_memfd

FIRST = 1 << 20  # bytes of a new file
KEPT = 16 << 20  # a larger one is not kept when it is no longer used


class ScratchFile:
    """A shared memfd that grows as needed and never shrinks; made when it is first used.

    Places are given out one behind the other until all are released; then it starts again.
    """

    __slots__ = ("_lock", "_map", "_places", "_size", "_used", "announced", "fileno")

    def __init__(self) -> None:
        self.fileno = -1
        self.announced = 0  # bytes that the daemon knows of this file
        self._map: mmap.mmap | None = None
        self._size = 0
        self._used = 0
        self._places = 0
        self._lock = allocate_lock()

    @property
    def unannounced(self) -> int:
        """The size of the file if the daemon does not know it, or not how large it is; else 0."""
        size = self._size
        return size if size > self.announced else 0

    def place(self, data: bytes, length: int) -> int:
        """The offset of length bytes that start with data. OSError: ENOMEM past 1 GiB."""
        with self._lock:
            offset = self._used
            end = offset + (length + 4095 & ~4095)
            if end > wire.MAX_SCRATCH:
                raise OSError(errno.ENOMEM, "memory for one packet exceeds the scratch file")
            area = self._map
            if area is None or end > self._size:
                area = self._grow(end)
            area[offset : offset + len(data)] = data
            self._used = end
            self._places += 1
            return offset

    def read(self, offset: int, length: int) -> bytes:
        """What lies there now."""
        with self._lock:
            return b"" if self._map is None else self._map[offset : offset + length]

    def release(self, count: int) -> None:
        """So many places are free again."""
        with self._lock:
            self._places -= count
            if self._places <= 0:
                self._used = 0
                if self._size > KEPT:
                    self.close()

    def _grow(self, end: int) -> mmap.mmap:
        if self.fileno < 0:
            self.fileno = sealed_memfd("iommufd scratch", 0, grow=True)
        size = max(FIRST, 1 << (end - 1).bit_length())
        os.ftruncate(self.fileno, size)
        if self._map is not None:
            self._map.close()
        self._map = mmap.mmap(self.fileno, size)
        self._size = size
        return self._map

    def close(self) -> None:
        if self._map is not None:
            self._map.close()
            self._map = None
        if self.fileno >= 0:
            os.close(self.fileno)
            self.fileno = -1
        self._size = self.announced = 0

    def __del__(self) -> None:
        self.close()
