"""The memory of one request: the segments that came with it, as the core's UserMemory.

Most requests have one inline segment, the struct; it is read twice (size, struct) and written once. That path is
kept short here; everything else goes through `_find`: the rule of docs/PROTOCOL.md section 3, byte by byte.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from .memory import Scratch

#: addr, readable, writable, then the inline bytes, or the offset in the scratch file
Segment: TypeAlias = tuple[int, int, int, bytes | int]
#: segment, offset in it, and the bytes written there, or how many when they lie in the scratch file
Record: TypeAlias = tuple[int, int, bytes | int]

NO_BYTES = b""
NOWHERE = 1 << 64  # every address lies before it


class SegmentMemory:
    """UserMemory of one request; reused for the next by `load()`."""

    __slots__ = ("addr", "data", "images", "records", "scratch", "segments", "writable")

    def __init__(self) -> None:
        self.scratch: Scratch | None = None
        self.images: dict[int, bytearray] = {}  # inline segments with their writes, once somebody reads them
        self.records: list[Record] = []
        self.writable = 0
        self.load(())

    def load(self, segments: tuple[Segment, ...]) -> list[Record]:
        """Start a request; the list its writes will be recorded in."""
        self.segments = segments
        self.addr, self.data = NOWHERE, NO_BYTES
        if segments:
            addr, _, writable, data = segments[0]
            if isinstance(data, bytes):
                self.addr, self.writable, self.data = addr, writable, data
        if self.images:
            self.images = {}
        self.records = []
        return self.records

    def read(self, addr: int, length: int) -> bytes:
        """The readable prefix of [addr, addr + length)."""
        at = addr - self.addr
        data = self.data
        if at >= 0 and at + length <= len(data) and not self.records:
            return data[at : at + length]
        return self._read(addr, length)

    def write(self, addr: int, data: bytes) -> int:
        """Record the longest writable prefix; its length."""
        at = addr - self.addr
        if at >= 0 and at + len(data) <= self.writable and not self.images:
            self.records.append((0, at, data))
            return len(data)
        return self._write(addr, data)

    def seen(self, addr: int, length: int) -> bytes:
        """For who looks on: what lies there after the call, in memory that it could only write too."""
        for index, (start, readable, writable, data) in enumerate(self.segments):
            at, end = addr - start, min(addr + length - start, max(readable, writable))
            if not 0 <= at < end:
                continue
            if isinstance(data, int):
                return bytes(self.scratch.read(data + at, end - at)) if self.scratch is not None else NO_BYTES
            image = bytearray(data[:end].ljust(end, b"\0"))
            for where, offset, new in self.records:
                if where == index and isinstance(new, bytes) and offset < end:
                    image[offset : offset + len(new)] = new[: end - offset]
            return bytes(image[at:])
        return NO_BYTES

    # ---- the general case ----

    def _find(self, addr: int, length: int, *, write: bool) -> tuple[int, int, int] | None:
        """The first segment that covers addr: its index, the offset in it, and how far it goes."""
        end = addr + length
        for index, (start, readable, writable, _) in enumerate(self.segments):
            limit = start + (writable if write else readable)
            if start <= addr < limit:
                return index, addr - start, min(end, limit) - addr
            if addr < start < end and start < limit:
                end = start  # from there on the earlier segment counts
        return None

    def _read(self, addr: int, length: int) -> bytes:
        found = bytearray()
        while len(found) < length:
            place = self._find(addr + len(found), length - len(found), write=False)
            if place is None:
                break
            part = self._load(*place)
            found += part
            if len(part) < place[2]:
                break  # past the end of the scratch file
        return bytes(found)

    def _write(self, addr: int, data: bytes) -> int:
        done = 0
        while done < len(data):
            place = self._find(addr + done, len(data) - done, write=True)
            if place is None:
                break
            index, at, length = place
            stored = self._store(index, at, data[done : done + length])
            done += stored
            if stored < length:
                break
        return done

    def _load(self, index: int, at: int, length: int) -> bytes | bytearray:
        data = self.segments[index][3]
        if isinstance(data, int):
            return self.scratch.read(data + at, length) if self.scratch is not None else NO_BYTES
        if self.records:
            return self._image(index)[at : at + length]
        return data[at : at + length].ljust(length, b"\0")

    def _store(self, index: int, at: int, data: bytes) -> int:
        where = self.segments[index][3]
        if isinstance(where, int):
            stored = self.scratch.write(where + at, data) if self.scratch is not None else 0
            if stored:
                self._record(index, at, stored)
            return stored
        self._record(index, at, data)
        if (image := self.images.get(index)) is not None:
            image[at : at + len(data)] = data[: max(len(image) - at, 0)]
        return len(data)

    def _record(self, index: int, at: int, data: bytes | int) -> None:
        """Note a write; in the scratch file, one that goes on where the last one stopped joins it."""
        if self.records and isinstance(data, int):
            last_index, last_at, length = self.records[-1]
            if last_index == index and isinstance(length, int) and last_at + length == at:
                self.records[-1] = (index, last_at, length + data)
                return
        self.records.append((index, at, data))

    def _image(self, index: int) -> bytearray:
        """The readable bytes of an inline segment with all writes so far."""
        image = self.images.get(index)
        if image is None:
            _, readable, _, data = self.segments[index]
            assert isinstance(data, bytes)
            image = bytearray(data.ljust(readable, b"\0"))
            for where, at, new in self.records:
                if where == index and isinstance(new, bytes):
                    image[at : at + len(new)] = new[: max(readable - at, 0)]
            self.images[index] = image
        return image


def compact(segments: tuple[Segment, ...], records: list[Record]) -> list[Record]:
    """The same final bytes in few records: runs that touch or overlap become one, segment by segment.

    A call that writes many small pieces (a bitmap, a long array) would otherwise not fit its reply packet.
    A gap between two runs is filled from what the client sent, where it sent it.
    """
    by_segment: dict[int, list[tuple[int, bytes]]] = {}
    found: list[Record] = []
    for index, at, data in records:
        if isinstance(data, bytes):
            by_segment.setdefault(index, []).append((at, data))
        else:
            found.append((index, at, data))
    for index, writes in by_segment.items():
        _, readable, writable, sent = segments[index]
        assert isinstance(sent, bytes)
        image = bytearray(sent[:writable].ljust(writable, b"\0"))
        for at, data in writes:
            image[at : at + len(data)] = data
        found += [(index, lo, bytes(image[lo:hi])) for lo, hi in _runs(writes, readable)]
    return found


def _runs(writes: list[tuple[int, bytes]], known: int) -> list[tuple[int, int]]:
    """Where the writes lie, joined; gaps below `known` are no gaps."""
    runs: list[tuple[int, int]] = []
    for lo, hi in sorted((at, at + len(data)) for at, data in writes):
        if runs and lo <= max(runs[-1][1], known):
            runs[-1] = (runs[-1][0], max(runs[-1][1], hi))
        else:
            runs.append((lo, hi))
    return runs
