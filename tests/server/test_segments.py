"""Memory of a request: held to a model that looks at every byte on its own."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from iommufdd.server.memory import Scratch
from iommufdd.server.segments import Record, Segment, SegmentMemory, compact

SCRATCH_SIZE = 48


class FakeScratch(Scratch):
    """A scratch file that is none."""

    def __init__(self) -> None:
        self.data = bytearray(range(SCRATCH_SIZE))

    def read(self, offset: int, length: int) -> bytes:
        return bytes(self.data[offset : offset + length])

    def write(self, offset: int, data: bytes) -> int:
        length = max(0, min(len(data), SCRATCH_SIZE - offset))
        self.data[offset : offset + length] = data[:length]
        return length


Images = list[dict[int, int]]


def images(segments: tuple[Segment, ...]) -> Images:
    """The bytes of each inline segment, by offset."""
    return [
        dict(enumerate(data.ljust(readable, b"\0"))) if isinstance(data, bytes) else {}
        for _, readable, _, data in segments
    ]


class Model:
    """The client's view: each byte of each segment by itself."""

    def __init__(self, segments: tuple[Segment, ...], scratch: bytearray) -> None:
        self.segments = segments
        self.scratch = bytearray(scratch)
        self.bytes = images(segments)

    def place(self, addr: int, write: bool) -> tuple[int, int] | None:
        for index, (start, readable, writable, _) in enumerate(self.segments):
            if start <= addr < start + (writable if write else readable):
                return index, addr - start
        return None

    def read(self, addr: int, length: int) -> bytes:
        found = bytearray()
        for at in range(addr, addr + length):
            if (place := self.place(at, write=False)) is None:
                break
            index, offset = place
            where = self.segments[index][3]
            if isinstance(where, int):
                if where + offset >= SCRATCH_SIZE:
                    break
                found.append(self.scratch[where + offset])
            else:
                found.append(self.bytes[index].get(offset, 0))
        return bytes(found)

    def write(self, addr: int, data: bytes) -> int:
        for done, byte in enumerate(data):
            if (place := self.place(addr + done, write=True)) is None:
                return done
            index, offset = place
            where = self.segments[index][3]
            if isinstance(where, int):
                if where + offset >= SCRATCH_SIZE:
                    return done
                self.scratch[where + offset] = byte
            else:
                self.bytes[index][offset] = byte
        return len(data)


lengths = st.integers(0, 24)
inline = st.tuples(st.integers(0, 40), lengths, lengths, st.binary(max_size=24)).map(
    lambda each: (each[0], each[1], each[2], each[3][: each[1]])
)
in_scratch = st.tuples(st.integers(0, 40), lengths, lengths, st.integers(0, SCRATCH_SIZE + 8))
steps = st.lists(
    st.one_of(
        st.tuples(st.just("read"), st.integers(0, 70), st.integers(0, 40)),
        st.tuples(st.just("write"), st.integers(0, 70), st.binary(max_size=40)),
    ),
    max_size=12,
)


@settings(max_examples=500, deadline=None)
@given(st.lists(st.one_of(inline, in_scratch), min_size=1, max_size=5).map(tuple), steps)
def test_against_the_model(segments: tuple[Segment, ...], todo: list[tuple[str, int, Any]]) -> None:
    memory = SegmentMemory()
    memory.scratch = scratch = FakeScratch()
    records = memory.load(segments)
    model = Model(segments, scratch.data)
    for what, addr, argument in todo:
        if what == "read":
            assert memory.read(addr, argument) == model.read(addr, argument)
        else:
            assert memory.write(addr, argument) == model.write(addr, argument)
    assert scratch.data == model.scratch
    assert applied(segments, records) == model.bytes
    assert applied(segments, compact(segments, records)) == model.bytes


def applied(segments: tuple[Segment, ...], records: list[Record]) -> Images:
    """What a client has after it stored the records."""
    after = images(segments)
    for index, at, data in records:
        if isinstance(data, bytes):
            assert at + len(data) <= segments[index][2]
            after[index].update({at + i: byte for i, byte in enumerate(data)})
    return after


@given(st.lists(st.tuples(st.integers(0, 90), st.binary(min_size=1, max_size=10)), min_size=2, max_size=60))
def test_compact_fits(writes: list[tuple[int, bytes]]) -> None:
    """However many writes, a segment that came whole takes one record."""
    memory = SegmentMemory()
    records = memory.load(((0, 100, 100, bytes(100)),))
    for at, data in writes:
        memory.write(at, data)
    ((_, start, run),) = compact(memory.segments, records)
    assert isinstance(run, bytes)
    assert start + len(run) <= 100


def test_without_scratch_file_nothing_is_there() -> None:
    memory = SegmentMemory()
    memory.load(((0, 16, 16, 0),))
    assert memory.read(0, 8) == b""
    assert memory.write(0, b"x") == 0


def test_long_runs_in_the_scratch_file_are_one_record() -> None:
    memory = SegmentMemory()
    memory.scratch = FakeScratch()
    records = memory.load(((100, 0, 40, 4),))
    for at in range(0, 40, 4):
        assert memory.write(100 + at, b"abcd") == 4
    assert records == [(0, 0, 40)]
