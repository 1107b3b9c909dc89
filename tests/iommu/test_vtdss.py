"""VT-d's second-stage walker against a reader that is as simple as can be, and the format's rules one by one."""

from __future__ import annotations

from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iommufdd.iommu import vtdss
from iommufdd.iommu.walk import EXEC, PRIV, READ, WRITE, TranslationFault, Why

R, W, X, PS, A, D, SNP, TM = 1, 2, 4, 1 << 7, 1 << 8, 1 << 9, 1 << 11, 1 << 62
TABLES = [0x10000 + 0x1000 * n for n in range(6)]


class Memory:
    """Table pages by address, entries by index; what is not there is 0."""

    def __init__(self) -> None:
        self.words: dict[int, int] = {}
        self.written: list[tuple[int, int]] = []

    def fetch(self, address: int) -> int:
        return self.words.get(address, 0)

    def update(self, address: int, old: int, new: int) -> None:
        assert self.words[address] == old
        self.words[address] = new
        self.written.append((address, new))


class Answer(NamedTuple):
    """What the naive reader finds: a place, or why not and at which level."""

    out: int = 0
    size: int = 0
    why: str = ""
    level: int = 0


def naive(memory: Memory, root: int, rules: vtdss.Rules, ipa: int, access: int) -> Answer:
    """The text of the format, entry by entry, with divisions instead of shifts."""
    if ipa >= 512**rules.levels * 4096:
        return Answer(why="address_size", level=rules.levels)
    table = root
    readable = writable = True
    for level in range(rules.levels, 0, -1):
        size = 4096 * 512 ** (level - 1)
        entry = memory.words.get(table + 8 * (ipa // size % 512), 0)
        bits = [entry >> n & 1 for n in range(64)]
        readable, writable = readable and bool(bits[0]), writable and bool(bits[1])
        if not bits[0] and not bits[1]:
            return Answer(why="not_present", level=level)
        if access & (READ | EXEC) and not readable:
            return Answer(why="read", level=level)
        if access & WRITE and not writable:
            return Answer(why="write", level=level)
        leaf = level == 1 or bool(bits[7])
        if reserved(bits, level, leaf, rules):
            return Answer(why="reserved", level=level)
        address = sum(bit << n for n, bit in enumerate(bits) if 12 <= n <= 51)
        if leaf:
            return Answer(out=address + ipa % size, size=size)
        table = address
    raise AssertionError("a leaf of level 1 is a leaf")


def reserved(bits: list[int], level: int, leaf: bool, rules: vtdss.Rules) -> bool:
    if any(bits[rules.haw : 52]):
        return True
    if not leaf:
        return bool(bits[11] or bits[62])
    if (bits[11] and not rules.snoop) or (bits[62] and not rules.transient):
        return True
    if level == 1:
        return False
    if level > 3 or (level == 2 and not rules.pages_2m) or (level == 3 and not rules.pages_1g):
        return True
    return any(bits[12 : 12 + 9 * (level - 1)])


rules_of = st.builds(
    vtdss.Rules, levels=st.sampled_from((3, 4, 5)), pages_2m=st.booleans(), pages_1g=st.booleans(),
    haw=st.sampled_from((20, 39, 52)), snoop=st.booleans(), transient=st.booleans(),
    access_dirty=st.just(False),
)  # fmt: skip
flags_of = st.sets(st.sampled_from((0, 0, 1, 1, 2, 6, 7, 8, 9, 10, 11, 45, 52, 59, 62, 63)))
entries_of = st.builds(
    lambda flags, likely, table: sum({1 << bit for bit in flags}) | likely | table,
    flags_of, st.sampled_from((3, 3, 3, 3, 1, 2, 0)), st.sampled_from((*TABLES, 0x40000000, 0x200000)),
)  # fmt: skip


@st.composite
def worlds(draw: st.DrawFn) -> tuple[Memory, vtdss.Rules, int]:
    """Tables that lead to one another along the way of one address, and a few steps off it."""
    rules = draw(rules_of)
    ipa = draw(st.one_of(st.integers(0, (1 << 9 * rules.levels + 12) - 1), st.integers(0, 1 << 40)))
    memory = Memory()
    for table in TABLES:
        for level in range(1, rules.levels + 1):
            memory.words[table + 8 * (ipa >> 9 * level + 3 & 511)] = draw(entries_of)
    return memory, rules, ipa


@given(worlds(), st.sampled_from((READ, WRITE, READ | WRITE, READ | PRIV, READ | EXEC, 0)))
def test_as_the_naive_reader(world: tuple[Memory, vtdss.Rules, int], access: int) -> None:
    memory, rules, ipa = world
    want = naive(memory, TABLES[0], rules, ipa, access)
    try:
        leaf = vtdss.walk(memory.fetch, None, vtdss.root(TABLES[0], rules), rules, ipa, access, [])
    except TranslationFault as fault:
        assert (fault.why.name.lower(), fault.level, fault.stage) == (want.why, want.level, 2)  # noqa: PT017
        return
    assert (leaf.out + ipa - leaf.first, leaf.size) == want[:2]
    for other in (READ, WRITE, READ | WRITE, READ | EXEC):
        allowed = not naive(memory, TABLES[0], rules, ipa, other).why
        assert bool(leaf.allowed >> other & 1) == allowed


@given(worlds(), st.sampled_from((READ, WRITE)))
def test_accessed_and_dirty(world: tuple[Memory, vtdss.Rules, int], access: int) -> None:
    """With SSADE every entry used has A, and the leaf of a write D; a clean leaf does not allow writes unasked."""
    memory, rules, ipa = world
    rules = rules._replace(access_dirty=True)
    want = naive(memory, TABLES[0], rules, ipa, access)
    steps: list[tuple[int, int, int, int]] = []
    try:
        leaf = vtdss.walk(memory.fetch, memory.update, vtdss.root(TABLES[0], rules), rules, ipa, access, steps)
    except TranslationFault as fault:
        assert fault.why.name.lower() == want.why  # noqa: PT017
        assert {address for address, _ in memory.written} <= {address for _, _, address, _ in steps[:-1]}
        return
    assert all(memory.words[address] & A for _, _, address, _ in steps)
    _, _, last, before = steps[-1]
    after = memory.words[last]
    assert bool(after & D) == (bool(before & D) or access == WRITE)
    assert bool(leaf.allowed >> WRITE & 1) == bool(after & D and not naive(memory, TABLES[0], rules, ipa, WRITE).why)
    assert all(new & ~(A | D) == {a: e for _, _, a, e in steps}[at] & ~(A | D) for at, new in memory.written)


def mapped(*entries: int, levels: int = 4, **rules: bool | int) -> tuple[Memory, vtdss.Rules]:
    """One way from the root down: entry n, of the level below the one before, in table n."""
    memory = Memory()
    for table, entry in zip(TABLES, entries, strict=False):
        memory.words[table] = entry
    return memory, vtdss.Rules(levels=levels, **rules)  # type: ignore[arg-type]


def refused(memory: Memory, rules: vtdss.Rules, access: int = READ, ipa: int = 0) -> tuple[Why, int]:
    with pytest.raises(TranslationFault) as caught:
        vtdss.walk(memory.fetch, None, vtdss.root(TABLES[0], rules), rules, ipa, access, [])
    return caught.value.why, caught.value.level


DOWN = tuple(table | R | W for table in TABLES[1:])


def test_the_rules_one_by_one() -> None:
    page = 0x123000
    assert refused(*mapped(*DOWN[:3], page | X)) == (Why.NOT_PRESENT, 1)
    assert refused(*mapped(*DOWN[:3], page | W)) == (Why.READ, 1)
    assert refused(*mapped(*DOWN[:3], page | R), access=WRITE) == (Why.WRITE, 1)
    assert refused(*mapped(DOWN[0] & ~W, *DOWN[1:3], page | R | W), access=WRITE) == (Why.WRITE, 4)
    assert refused(*mapped(*DOWN[:3], page | R | SNP, snoop=False)) == (Why.RESERVED, 1)
    assert refused(*mapped(*DOWN[:3], page | R | TM, transient=False)) == (Why.RESERVED, 1)
    assert refused(*mapped(DOWN[0] | SNP, *DOWN[1:3], page | R)) == (Why.RESERVED, 4)
    assert refused(*mapped(DOWN[0], DOWN[1], 0x200000 | R | PS, pages_2m=False)) == (Why.RESERVED, 2)
    assert refused(*mapped(DOWN[0], 0x40000000 | R | PS, pages_1g=False)) == (Why.RESERVED, 3)
    assert refused(*mapped(DOWN[0], DOWN[1], 0x201000 | R | PS)) == (Why.RESERVED, 2)
    assert refused(*mapped(0x200000 | R | PS)) == (Why.RESERVED, 4)
    assert refused(*mapped(*DOWN[:3], 1 << 39 | R, haw=39)) == (Why.RESERVED, 1)
    assert refused(*mapped(*DOWN[:3], page | R), ipa=1 << 48) == (Why.ADDRESS_SIZE, 4)
    memory, rules = mapped(*DOWN[:3], page | R | SNP | TM | X | 6 << 3 | 1 << 63)
    assert vtdss.walk(memory.fetch, None, vtdss.root(TABLES[0], rules), rules, 0x10, READ, []).out == page


@pytest.mark.parametrize("levels", [3, 4, 5])
def test_a_walk_from_a_kept_table(levels: int) -> None:
    """Rights gathered above count, and a table that cannot admit the access is told so."""
    memory, rules = mapped(*DOWN[: levels - 1], 0x5000 | R | W, levels=levels)
    start = vtdss.Start(TABLES[1], levels - 1, R)
    assert not vtdss.admits(start, WRITE)
    assert vtdss.admits(start, READ)
    leaf = vtdss.walk(memory.fetch, None, start, rules, 0x10, READ, [])
    assert (leaf.out, leaf.allowed >> WRITE & 1) == (0x5000, 0)
