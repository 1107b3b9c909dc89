"""Interval structures over integers, ends included: what interval_tree.h gives the kernel.

`SpanSet` keeps few, possibly overlapping spans (reserved and allowed IOVA); `UseCounts` counts how often each page
index of a range is in use; `AreaTree` keeps many spans that never overlap.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from typing import TYPE_CHECKING, Generic, NamedTuple, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


class Span(NamedTuple):
    """[start, last] of somebody."""

    start: int
    last: int
    owner: object = None


class SpanSet:
    """Spans in order of their start; they may overlap. Built rarely, asked often."""

    def __init__(self, spans: Iterable[Span] = ()) -> None:
        self._spans: list[Span] = sorted(spans, key=_order)
        self._starts: list[int] = []  # of the merged stretches
        self._lasts: list[int] = []
        self._merge()

    def __bool__(self) -> bool:
        return bool(self._spans)

    def __iter__(self) -> Iterator[Span]:
        return iter(self._spans)

    def add(self, span: Span) -> None:
        insort(self._spans, span, key=_order)
        self._merge()

    def drop_owner(self, owner: object) -> None:
        self._spans = [span for span in self._spans if span.owner is not owner]
        self._merge()

    def _merge(self) -> None:
        """Overlapping and adjacent spans make one stretch."""
        self._starts, self._lasts = [], []
        for span in self._spans:
            if self._lasts and span.start <= self._lasts[-1] + 1:
                self._lasts[-1] = max(self._lasts[-1], span.last)
            else:
                self._starts.append(span.start)
                self._lasts.append(span.last)

    def first(self, start: int, last: int) -> tuple[int, int] | None:
        """The first used stretch that touches [start, last]."""
        at = bisect_left(self._lasts, start)
        if at == len(self._lasts) or self._starts[at] > last:
            return None
        return self._starts[at], self._lasts[at]

    def merged(self, start: int, last: int) -> Iterator[tuple[int, int]]:
        """Used stretches, cut to [start, last]; adjacent spans are one (interval_tree_for_each_span)."""
        for at in range(bisect_left(self._lasts, start), len(self._starts)):
            if self._starts[at] > last:
                return
            yield max(self._starts[at], start), min(self._lasts[at], last)

    def holes(self, start: int, last: int) -> Iterator[tuple[int, int]]:
        """The complement of merged() within [start, last]."""
        at = start
        for lo, hi in self.merged(start, last):
            if at < lo:
                yield at, lo - 1
            at = hi + 1
        if at <= last:
            yield at, last


def _order(span: Span) -> tuple[int, int]:
    return span.start, span.last


class UseCounts:
    """How many users each index has, as steps: the count from one edge up to the next; 0 outside."""

    __slots__ = ("_counts", "_edges")

    def __init__(self) -> None:
        self._edges: list[int] = []
        self._counts: list[int] = []

    def __bool__(self) -> bool:
        return bool(self._edges)

    def add(self, first: int, last: int) -> list[tuple[int, int]]:
        """One user more for [first, last]; the stretches that had none before."""
        if not self._edges:
            self._edges += (first, last + 1)
            self._counts += (1, 0)
            return [(first, last)]
        return self._change(first, last, 1, 0)

    def remove(self, first: int, last: int) -> list[tuple[int, int]]:
        """One user less; the stretches that have none now."""
        return self._change(first, last, -1, 1)

    def unused(self, first: int, last: int) -> list[tuple[int, int]]:
        """The stretches of [first, last] without any user."""
        found: list[tuple[int, int]] = []
        for lo, hi, count in self.counts(first, last):
            if not count:
                found.append((lo, hi))
        return found

    def steps(self) -> Iterator[tuple[int, int, int]]:
        """All stretches with users: (first, last, count)."""
        for at, count in enumerate(self._counts):
            if count:
                yield self._edges[at], self._edges[at + 1] - 1, count

    def counts(self, first: int, last: int) -> Iterator[tuple[int, int, int]]:
        """[first, last] in stretches of equal count: (from, to, count)."""
        edges = self._edges
        at = bisect_right(edges, first)
        while at < len(edges) and edges[at] <= last:
            yield first, edges[at] - 1, self._counts[at - 1] if at else 0
            first = edges[at]
            at += 1
        yield first, last, self._counts[at - 1] if at else 0

    def _change(self, first: int, last: int, by: int, watch: int) -> list[tuple[int, int]]:
        """Add `by` to every index; the stretches whose count was `watch` before."""
        start, end = self._cut(first), self._cut(last + 1)
        edges, counts = self._edges, self._counts
        found: list[tuple[int, int]] = []
        for at in range(start, end):
            if counts[at] == watch:
                if found and found[-1][1] == edges[at] - 1:
                    found[-1] = (found[-1][0], edges[at + 1] - 1)
                else:
                    found.append((edges[at], edges[at + 1] - 1))
            counts[at] += by
        self._join(end)
        self._join(start)
        return found

    def _cut(self, index: int) -> int:
        """Make `index` an edge; its place."""
        at = bisect_left(self._edges, index)
        if at == len(self._edges) or self._edges[at] != index:
            self._edges.insert(at, index)
            self._counts.insert(at, self._counts[at - 1] if at else 0)
        return at

    def _join(self, at: int) -> None:
        """Drop an edge that separates equal counts."""
        if self._counts[at] == (self._counts[at - 1] if at else 0):
            del self._edges[at], self._counts[at]


class HasSpan(Protocol):
    """What an AreaTree keeps."""

    @property
    def iova(self) -> int: ...

    @property
    def last(self) -> int: ...


A = TypeVar("A", bound=HasSpan)


CHUNK = 1024


class AreaTree(Generic[A]):
    """Spans that never overlap, by start: a list of short sorted lists of starts, and a dict."""

    __slots__ = ("_by_start", "_chunks", "_firsts")

    def __init__(self) -> None:
        self._by_start: dict[int, A] = {}
        self._chunks: list[list[int]] = []  # starts, ascending; none is empty
        self._firsts: list[int] = []  # of each chunk

    def __len__(self) -> int:
        return len(self._by_start)

    def __iter__(self) -> Iterator[A]:
        for chunk in self._chunks:
            yield from map(self._by_start.__getitem__, chunk)

    def insert(self, area: A) -> None:
        start = area.iova
        self._by_start[start] = area
        if not self._firsts:
            self._firsts.append(start)
            self._chunks.append([start])
            return
        at = max(bisect_right(self._firsts, start) - 1, 0)
        chunk = self._chunks[at]
        insort(chunk, start)
        self._firsts[at] = chunk[0]
        if len(chunk) > CHUNK:
            self._chunks.insert(at + 1, chunk[CHUNK // 2 :])
            self._firsts.insert(at + 1, chunk[CHUNK // 2])
            del chunk[CHUNK // 2 :]

    def remove(self, area: A) -> None:
        start = area.iova
        del self._by_start[start]
        at = bisect_right(self._firsts, start) - 1
        chunk = self._chunks[at]
        del chunk[bisect_left(chunk, start)]
        if chunk:
            self._firsts[at] = chunk[0]
        else:
            del self._chunks[at], self._firsts[at]

    def first(self, start: int, last: int) -> A | None:
        """The first area that touches [start, last] (interval_tree_iter_first)."""
        area = self._by_start.get(start)
        if area is not None:
            return area
        area = self.before(start)
        if area is not None and area.last >= start:
            return area
        found = self._after(start)
        return self._by_start[found] if found is not None and found <= last else None

    def before(self, iova: int) -> A | None:
        """The area that starts last before iova."""
        at = bisect_left(self._firsts, iova)
        if not at:
            return None
        chunk = self._chunks[at - 1]
        return self._by_start[chunk[bisect_left(chunk, iova) - 1]]

    def next(self, area: A) -> A | None:
        """The area behind this one."""
        found = self._after(area.iova)
        return None if found is None else self._by_start[found]

    def touching(self, start: int, last: int) -> Iterator[A]:
        """All areas that touch [start, last], ascending."""
        area = self.first(start, last)
        if area is None:
            return
        at = bisect_right(self._firsts, area.iova) - 1
        skip = bisect_left(self._chunks[at], area.iova)
        for chunk in self._chunks[at:]:
            stop = len(chunk) if chunk[-1] <= last else bisect_right(chunk, last)
            yield from map(self._by_start.__getitem__, chunk[skip:stop])
            if stop < len(chunk):
                return
            skip = 0

    def _after(self, start: int) -> int | None:
        at = bisect_right(self._firsts, start)
        if at:
            chunk = self._chunks[at - 1]
            index = bisect_right(chunk, start)
            if index < len(chunk):
                return chunk[index]
        return self._firsts[at] if at < len(self._firsts) else None
