"""Spans, counts and areas against lists and dictionaries that do the same slowly."""

from collections import Counter
from typing import NamedTuple

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from iommufdd.spans import AreaTree, Span, SpanSet, UseCounts

SPACE = 40
point = st.integers(0, SPACE)
span = st.tuples(point, point).map(lambda ends: (min(ends), max(ends)))


def stretches(points: list[int]) -> list[tuple[int, int]]:
    """Sorted points as (first, last) of each stretch without a gap."""
    found: list[tuple[int, int]] = []
    for at in points:
        if found and found[-1][1] == at - 1:
            found[-1] = found[-1][0], at
        else:
            found.append((at, at))
    return found


class Counts(RuleBasedStateMachine):
    """UseCounts beside a Counter: adds overlap as they like, what is removed was added before."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = UseCounts()
        self.model: Counter[int] = Counter()
        self.added: list[tuple[int, int]] = []

    @rule(where=span)
    def add(self, where: tuple[int, int]) -> None:
        covered = range(where[0], where[1] + 1)
        fresh = [at for at in covered if not self.model[at]]
        assert self.counts.add(*where) == stretches(fresh)
        self.model.update(covered)
        self.added.append(where)

    @rule(n=point)
    def remove(self, n: int) -> None:
        if not self.added:
            return
        where = self.added.pop(n % len(self.added))
        covered = range(where[0], where[1] + 1)
        self.model.subtract(covered)
        assert self.counts.remove(*where) == stretches([at for at in covered if not self.model[at]])

    @rule(where=span)
    def ask(self, where: tuple[int, int]) -> None:
        covered = range(where[0], where[1] + 1)
        assert self.counts.unused(*where) == stretches([at for at in covered if not self.model[at]])
        told = [(at, count) for lo, hi, count in self.counts.counts(*where) for at in range(lo, hi + 1)]
        assert told == [(at, self.model[at]) for at in covered]

    @invariant()
    def empty_when_nobody_is_left(self) -> None:
        assert bool(self.counts) == bool(self.added)


TestCounts = Counts.TestCase


@given(spans=st.lists(span, max_size=6), where=span)
def test_span_set(spans: list[tuple[int, int]], where: tuple[int, int]) -> None:
    start, last = where
    found = SpanSet(Span(*ends) for ends in spans[:3])
    for ends in spans[3:]:
        found.add(Span(*ends))
    used = {at for lo, hi in spans for at in range(lo, hi + 1)}
    inside = range(start, last + 1)
    assert list(found.merged(start, last)) == stretches([at for at in inside if at in used])
    assert list(found.holes(start, last)) == stretches([at for at in inside if at not in used])
    whole = [stretch for stretch in stretches(sorted(used)) if stretch[0] <= last and stretch[1] >= start]
    assert found.first(start, last) == (whole[0] if whole else None)
    assert bool(found) == bool(spans)


def test_spans_of_one_owner_are_dropped_together() -> None:
    mine, yours = object(), object()
    found = SpanSet([Span(0, 9, mine), Span(5, 20, yours), Span(30, 39, mine)])
    found.drop_owner(mine)
    assert list(found) == [Span(5, 20, yours)]
    assert found.first(0, 4) is None


class Piece(NamedTuple):
    iova: int
    last: int


@given(spans=st.lists(span, max_size=10), drop=st.sets(st.integers(0, 9)), where=span)
def test_area_tree(spans: list[tuple[int, int]], drop: set[int], where: tuple[int, int]) -> None:
    tree: AreaTree[Piece] = AreaTree()
    kept: list[Piece] = []
    for lo, hi in spans:
        if all(hi < piece.iova or lo > piece.last for piece in kept):
            kept.append(Piece(lo, hi))
            tree.insert(kept[-1])
    for piece in [piece for n, piece in enumerate(kept) if n in drop]:
        tree.remove(piece)
        kept.remove(piece)
    kept.sort()
    assert list(tree) == kept
    assert len(tree) == len(kept)
    touching = [piece for piece in kept if piece.iova <= where[1] and piece.last >= where[0]]
    assert tree.first(*where) == (touching[0] if touching else None)
    assert [tree.next(piece) for piece in kept] == [*kept[1:], None][: len(kept)]
