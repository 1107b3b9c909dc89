"""Room client: the scratch file of a channel, for memory too large for a packet (the protocol's SCRATCH)."""

from __future__ import annotations

import errno
import mmap
import os

from iommufd_uapi import wire

from .files import sealed_memfd

FIRST = 1 << 20  # bytes of a new file
KEPT = 16 << 20  # a larger one is not kept for the next packet


class ScratchFile:
    """A shared memfd that grows as needed and never shrinks; made when it is first used."""

    __slots__ = ("_map", "_used", "fileno", "unannounced")

    def __init__(self) -> None:
        self.fileno = -1
        self.unannounced = False
        self._map: mmap.mmap | None = None
        self._used = 0

    def place(self, data: bytes, length: int) -> int:
        """The offset of length bytes that start with data. OSError: ENOMEM past 1 GiB."""
        offset = self._used
        end = offset + (length + 4095 & ~4095)
        if end > wire.MAX_SCRATCH:
            raise OSError(errno.ENOMEM, "memory for one packet exceeds the scratch file")
        area = self._map
        if area is None or end > len(area):
            area = self._grow(end)
        area[offset : offset + len(data)] = data
        self._used = end
        return offset

    def read(self, offset: int, length: int) -> bytes:
        """What lies there now."""
        return b"" if self._map is None else self._map[offset : offset + length]

    def _grow(self, end: int) -> mmap.mmap:
        if self.fileno < 0:
            self.fileno = sealed_memfd("iommufd scratch", 0, grow=True)
        size = max(FIRST, 1 << (end - 1).bit_length())
        os.ftruncate(self.fileno, size)
        if self._map is not None:
            self._map.close()
        self._map = mmap.mmap(self.fileno, size)
        self.unannounced = True
        return self._map

    def rewind(self) -> None:
        """All replies are read: the room is free again."""
        self._used = 0
        if self._map is not None and len(self._map) > KEPT:
            self.close()

    def close(self) -> None:
        if self._map is not None:
            self._map.close()
            self._map = None
        if self.fileno >= 0:
            os.close(self.fileno)
            self.fileno = -1

    def __del__(self) -> None:
        self.close()
