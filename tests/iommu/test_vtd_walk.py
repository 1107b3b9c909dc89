"""VT-d's walks: case by case, and random tables against the reference."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iommufdd.iommu.walk import TranslationFault

from .board import LETTERS, PASID, Board, compare
from .walk_checks import CHECKS, LOW, go, guest


@pytest.mark.parametrize("name", CHECKS)
def test_walk(name: str) -> None:
    CHECKS[name]()


@settings(max_examples=400)
@given(
    rng=st.randoms(use_true_random=True),
    mode=st.sampled_from(["greedy", "faithful", "off"]),
    ats=st.booleans(),
    pages_1g=st.booleans(),
)
def test_random_tables_against_the_reference(rng: random.Random, mode: str, ats: bool, pages_1g: bool) -> None:
    compare(Board(mode=mode, ats=ats, pages_1g=pages_1g), rng)


def test_random_tables_meet_every_reason() -> None:
    """The random tables are worth something: they succeed, and stop for every reason that a table can give."""
    met = {code for seed in range(300) for code in compare(Board(), random.Random(seed))}
    assert met >= {0, 0x5C, 0x5D, 0x71, 0x72, 0x74, 0x75, 0x76, 0x77, 0x79, 0x80, 0x81, 0x82, 0x84, 0x85, 0x90}


@settings(max_examples=150)
@given(
    flips=st.lists(st.integers(0, 511).filter(lambda bit: not 64 <= bit < 80), max_size=3),
    pgtt=st.sampled_from([2, 3]),
    access=st.sampled_from(["r", "w", "rx", "rp"]),
)
def test_pasid_entries_against_the_reference(flips: list[int], pgtt: int, access: str) -> None:
    board = Board()
    table = guest(board)
    table.map(LOW, 0x5000)
    entry = board.fields(fspt=table.root, pgtt=pgtt, sre=1)
    for bit in flips:
        entry ^= 1 << bit
    board.publish(entry)
    board.check(LOW if pgtt == 3 else 0x5000, access)
    board.check_bits()


def test_a_fresh_walk_leaves_no_trace() -> None:
    board = Board()
    table = guest(board)
    table.map(LOW, 0x5000)
    go(board)
    before = bytes(board.file.data)
    iommu = board.lab.iommu
    for access in ("r", "w"):
        iommu.walk_fresh(board.dev, PASID, LOW, LETTERS[access])
    with pytest.raises(TranslationFault):
        iommu.walk_fresh(board.dev, PASID, LOW + 0x1000, LETTERS["w"])
    assert bytes(board.file.data) == before
    assert not len(iommu.iotlb)
    assert not iommu.contexts.entries
    assert not any(space.tables for space in iommu.iotlb.spaces.values())
    assert not iommu.faults


def test_the_entries_used_are_told() -> None:
    board = Board()
    table = guest(board, 5)
    leaf = table.map(LOW, 0x5000, "ru")
    go(board)
    for _ in range(2):  # from the root, then through kept tables
        entry = board.lab.iommu.translate(board.dev, PASID, LOW, LETTERS["r"])
        assert [(step.stage, step.level) for step in entry.steps] == [(1, level) for level in (5, 4, 3, 2, 1)]
        assert [step.address for step in entry.steps] == [table.slot(LOW, level) for level in (5, 4, 3, 2, 1)]
        board.lab.iommu.drop_pasid(board.did, PASID, LOW, LOW | 0xFFF, leaf=True)
    with pytest.raises(TranslationFault) as stopped:
        board.lab.iommu.translate(board.dev, PASID, LOW, LETTERS["w"])
    assert stopped.value.steps[-1].address == leaf
    assert stopped.value.name


def test_faults_are_recorded_unless_fpd_is_set() -> None:
    board = Board()
    iommu = board.lab.iommu
    for fpd in (0, 1):
        guest(board, fpd=fpd)
        go(board)
        board.check(LOW, "r")
        assert len(iommu.faults) == 1
        assert iommu.faults[0].reason == 0x71
    board.publish(board.fields(p=0, fpd=1))
    assert board.check(LOW, "r") == 0x59
    assert len(iommu.faults) == 1


def test_a_fault_is_named_for_the_entry_in_use() -> None:
    """The PASID cache still has the nested entry when memory no longer does."""
    board = Board()
    table = guest(board)
    table.map(LOW, 1 << 48)
    go(board)
    assert board.check(LOW, "r") == 0x74
    board.lab.iommu.table(board.dev).publish(PASID, (0,) * 8)
    assert board.outcome(LOW, LETTERS["r"], PASID) == (-1, 0x74)
