"""LPAE walks: tables by a writer that shares nothing with the walker, a naive reference, random tables."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iommufd_uapi.smmuv3 import Cd, Ste
from iommufdd.iommu import lpae
from iommufdd.iommu.walk import During, Leaf, TranslationFault, Why

from . import lpae_reference as naive
from .lpae_tables import SHIFT, START, TG0, TG1, ArmTable, leaf_bits, table_bits
from .mutants_lpae import MUTANTS, battery, mutated

R, W, X, P = 1, 2, 4, 8
POOL = 0x10_0000
SIZES = {4: {1: 1 << 30, 2: 2 << 20, 3: 4 << 10}, 16: {2: 32 << 20, 3: 16 << 10}, 64: {2: 512 << 20, 3: 64 << 10}}
EVERY_SIZE = [(granule, level, size) for granule, sizes in SIZES.items() for level, size in sizes.items()]


class Sparse:
    """Memory of 64 bit words, zero where nobody has written."""

    def __init__(self) -> None:
        self.words: dict[int, int] = {}

    def read(self, addr: int, length: int) -> bytes:
        assert (length, addr % 8) == (8, 0)
        return self.words.get(addr, 0).to_bytes(8, "little")

    def write(self, addr: int, data: bytes) -> None:
        if any(data):
            self.words[addr] = int.from_bytes(data, "little")
        else:
            for at in [at for at in self.words if addr <= at < addr + len(data)]:
                del self.words[at]


class Bench:
    """A table, the rules to walk it by, and the walks."""

    def __init__(self, granule: int = 4, size: int = 48, *, first: int | None = None, **rules: Any) -> None:
        self.ram = Sparse()
        self.table = ArmTable(self.ram, POOL, granule, size, first)
        half = naive.Half(granule, size, first=first, **rules)
        self.rules: lpae.Rules = half.rules(lpae)
        self.steps: list[tuple[int, int, int, int]] = []

    def walk(self, ia: int, access: int = R, *, stores: bool = False) -> Leaf:
        self.steps = []
        start = lpae.root(self.table.root, self.rules)
        return lpae.walk(self.table.get, self._store if stores else None, start, self.rules, ia, access, self.steps)

    def _store(self, address: int, old: int, new: int) -> None:
        assert self.table.get(address) == old
        self.table.set(address, new)

    def fault(self, ia: int, access: int = R, *, stores: bool = False) -> tuple[Why, int]:
        """Why, and ARM's number of the level."""
        with pytest.raises(TranslationFault) as caught:
            self.walk(ia, access, stores=stores)
        assert (caught.value.addr, caught.value.during) == (ia, During.ACCESS)
        return caught.value.why, lpae.arm_level(caught.value.level)


@given(st.randoms(use_true_random=False))
@settings(max_examples=600, deadline=None)
def test_random_tables_against_the_reference(rng: random.Random) -> None:
    naive.check(lpae, naive.solved(naive.random_case(rng)))


def test_every_right_against_the_reference() -> None:
    """All rights of a page and its tables, in every mode, for every access."""
    flags = itertools.product((False, True), repeat=4)
    for leaf_rights, tables, (hd, wxn, pan, had) in itertools.product(range(32), range(16), flags):
        entry = sum(1 << at for place, at in enumerate((6, 7, 51, 53, 54)) if leaf_rights >> place & 1) | 1 << 10 | 3
        above = tables << 59 | 3
        half = naive.Half(ha=True, hd=hd, wxn=wxn, pan=pan, had=had)
        rules = half.rules(lpae)
        rights = naive.stage1_rights(half, entry, [above])
        clean = naive.clean_page(half, entry)
        start = lpae.below(lpae.Start(0, 2, 0), above, rules)
        assert start.hierarchy == (0 if had else tables << 59)
        for access in (0, 7, 9, 10, 12, 15) if leaf_rights % 3 else range(16):
            try:
                leaf = lpae.walk({0: entry}.__getitem__, None, start, rules, 0, access, [])
            except TranslationFault:
                assert not naive.passes(rights, access)
            else:
                assert naive.passes(rights, access)
                wanted = [a for a in range(16) if naive.passes(rights, a) and not (clean and a & W)]
                assert leaf.allowed == sum(1 << a for a in wanted)


@pytest.mark.parametrize(("granule", "level", "size"), EVERY_SIZE)
@pytest.mark.parametrize("upper", [False, True])
def test_every_page_size(granule: int, level: int, size: int, upper: bool) -> None:
    bench = Bench(granule, upper=upper)
    va = (0x1234_5678_9ABC & -size) | (0xFFFF << 48 if upper else 0)
    pa = 0x3_0000_0000 & -size
    slot = bench.table.map(va, pa, level=level)
    inside = va + size // 2 + 5
    leaf = bench.walk(inside, R | W)
    assert leaf[:3] == (va, pa, size)
    assert bench.steps[-1] == (1, 4 - level, slot, bench.table.get(slot))
    assert [lpae.arm_level(step[1]) for step in bench.steps] == list(range(bench.table.first, level + 1))
    assert bench.fault(va - 1 if va % (1 << 39) else va + size)[0] is Why.NOT_PRESENT
    bench.table.unmap(va, level)
    assert bench.fault(va) == (Why.NOT_PRESENT, level)


@pytest.mark.parametrize(("granule", "level", "joined"), [(*key, size) for key, size in naive.JOINED.items()])
def test_the_contiguous_hint(granule: int, level: int, joined: int) -> None:
    bench = Bench(granule)
    size = SIZES[granule].get(level, 0)
    va, pa = 5 * joined, 7 * joined
    bench.table.map(va + size, pa + size, "uc", level=level)
    assert bench.walk(va + size + 1)[:3] == (va, pa, joined)
    exact = Bench(granule, joined.bit_length() - 1) if joined > 1 << 24 else bench
    exact.table.map(size, size, "uc", level=level)
    assert exact.walk(size)[:3] == (0, 0, joined)
    small = Bench(granule, max(joined.bit_length() - 2, 25))
    if joined > 1 << small.table.size > size:  # the hint would join more than there is
        small.table.map(size, size, "uc", level=level)
        assert small.walk(size)[:3] == (size, size, size)


@pytest.mark.parametrize("granule", [4, 16, 64])
def test_every_input_size(granule: int) -> None:
    for bits in range(25, 49):
        for upper in (False, True):
            bench = Bench(granule, bits, upper=upper)
            ones = (1 << 64) - (1 << bits) if upper else 0
            va = ones | (1 << bits) - (granule << 10)
            bench.table.map(va, 0x40_0000)
            assert bench.walk(va).out == 0x40_0000
            first = bench.table.first
            assert len(bench.steps) == 4 - first
            assert min(level for level, least in START[granule].items() if bits >= least) == first
            for at in range(bits, 64):
                assert bench.fault(va ^ 1 << at) == (Why.ADDRESS_SIZE, first)


def test_addresses_of_52_bits() -> None:
    bench = Bench(64, 52, output=52, lpa=True)
    va, pa = 0xF_EDCB_A987_0000, 0xA_1234_5678_0000
    bench.table.map(va, pa)
    assert bench.walk(va + 0xFFFF)[:3] == (va, pa, 0x1_0000)
    bench.table.map(0, 0x5_0000_0000_0000 & -(4 << 40), level=1)
    assert bench.walk(1)[:3] == (0, 0x5_0000_0000_0000 & -(4 << 40), 4 << 40)
    old = Bench(64)  # a smaller SMMU knows neither: bits 15:12 are nobody's, 4 TiB blocks are reserved
    old.table.map(0x10_0000, pa)
    assert old.walk(0x10_0000).out == pa % (1 << 48)
    old.table.set(old.table.slot(8 << 40, 1), 1 | 1 << 10)
    assert old.fault(8 << 40)[0] is Why.RESERVED
    narrow = Bench(64, output=48, lpa=True)
    narrow.table.map(0x10_0000, pa)
    assert narrow.fault(0x10_0000) == (Why.OUTPUT_SIZE, 3)


@pytest.mark.parametrize("granule", [4, 16, 64])
def test_every_fault_at_every_level(granule: int) -> None:
    for level in SHIFT[granule]:
        bench = Bench(granule, output=40)
        if level < bench.table.first:
            continue
        va = 0x1234_5678_0000
        slot = bench.table.slot(va, level)
        for entry in (0, 2, 0xFFFF_FFFF_FFFF_FFFE):
            bench.table.set(slot, entry)
            assert bench.fault(va) == (Why.NOT_PRESENT, level)
        block = level in naive.BLOCK[granule]
        bench.table.set(slot, 1 | leaf_bits("u"))
        if block:
            assert bench.walk(va).out == 0
        else:
            assert bench.fault(va) == (Why.RESERVED, level)
        bench.table.set(slot, (1 << 40) | leaf_bits("u") | (1 if block else 3))
        assert bench.fault(va) == (Why.OUTPUT_SIZE, level)
        if block or level == 3:
            for rights, access, why in (
                ("uo", R, Why.ACCESS_FLAG),
                ("", R, Why.USER),
                ("", W, Why.USER),
                ("ur", W, Why.WRITE),
                ("r", W | P, Why.WRITE),
                ("ux", X, Why.EXECUTE),
                ("p", X | P, Why.EXECUTE),
                ("u", X | P, Why.EXECUTE),
            ):
                bench.table.map(va, 0, rights, level=level)
                assert bench.fault(va, access) == (why, level), rights


@pytest.mark.parametrize(
    ("tables", "access", "why"),
    [
        ("r", W, Why.WRITE),
        ("r", W | P, Why.WRITE),
        ("k", R, Why.USER),
        ("x", X, Why.EXECUTE),
        ("p", X | P, Why.EXECUTE),
    ],
)
def test_tables_take_rights_away(tables: str, access: int, why: Why) -> None:
    bench = Bench()
    bench.table.map(0x1000, 0, "u" if not access & X else "ur", tables=tables)
    assert bench.fault(0x1000, access) == (why, 3)
    bench.rules = naive.Half(had=True).rules(lpae)
    bench.walk(0x1000, access)


def test_the_halves_are_told_apart_by_their_top_bits() -> None:
    lower, upper = Bench(), Bench(upper=True, tbi=True)
    assert lower.fault(1 << 63) == (Why.ADDRESS_SIZE, 0)
    assert upper.fault(0) == (Why.ADDRESS_SIZE, 0)
    upper.table.map(0xFFFF_0000_0000_1000, 0x5000)
    assert upper.walk(0x12FF_0000_0000_1000)[:3] == (0x12FF_0000_0000_1000, 0x5000, 4096)
    assert upper.fault(0x127F_0000_0000_1000) == (Why.ADDRESS_SIZE, 0)
    lower.rules = naive.Half(epd=True).rules(lpae)
    assert lower.fault(0x1000)[0] is Why.NOT_PRESENT
    assert not lower.steps


def test_hardware_sets_the_access_flag() -> None:
    bench = Bench(ha=True)
    slot = bench.table.map(0x1000, 0x5000, "uo")
    bench.walk(0x1000)
    assert not bench.table.get(slot) >> 10 & 1  # a fresh walk has no side effects
    bench.walk(0x1000, stores=True)
    assert bench.table.get(slot) == 0x5000 | leaf_bits("u") | 3
    bench.table.map(0x1000, 0x5000, "uor")
    assert bench.fault(0x1000, W, stores=True) == (Why.WRITE, 3)
    assert not bench.table.get(slot) >> 10 & 1
    bench.rules = naive.Half(affd=True).rules(lpae)
    bench.walk(0x1000, stores=True)
    assert not bench.table.get(slot) >> 10 & 1


def test_hardware_sets_the_access_flag_of_tables() -> None:
    bench = Bench(ha=True, haft=True)
    bench.table.map(0x1000, 0x5000)
    above = bench.table.slot(0x1000, 2)
    bench.walk(0x1000)
    assert not bench.table.get(above) >> 10 & 1
    bench.walk(0x1000, stores=True)
    assert bench.table.get(above) >> 10 & 1


def test_a_write_makes_a_clean_page_dirty() -> None:
    bench = Bench(ha=True, hd=True)
    slot = bench.table.map(0x1000, 0x5000, "urd")
    assert not bench.walk(0x1000, stores=True).allowed >> W & 1
    assert not bench.walk(0x1000, W).allowed >> W & 1
    assert bench.table.get(slot) >> 7 & 1
    assert bench.walk(0x1000, W, stores=True).allowed >> W & 1
    assert not bench.table.get(slot) >> 7 & 1
    assert bench.walk(0x1000).allowed >> W & 1
    bench.table.map(0x20_0000, 0x5000, "urd", tables="r")  # a table that forbids writes prevails
    assert bench.fault(0x20_0000, W, stores=True) == (Why.WRITE, 3)
    for rules in ({"ha": True}, {"hd": True}):  # hardware that may not, and half a permission
        bench.rules = naive.Half(**rules).rules(lpae)
        bench.table.map(0x1000, 0x5000, "urd")
        assert bench.fault(0x1000, W, stores=True) == (Why.WRITE, 3)


def test_pan_and_wxn() -> None:
    bench = Bench(pan=True)
    bench.table.map(0x1000, 0, "u")
    bench.table.map(0x2000, 0, "")
    assert bench.fault(0x1000, R | P) == (Why.READ, 3)
    assert bench.fault(0x1000, W | P) == (Why.WRITE, 3)
    bench.walk(0x2000, R | W | X | P)
    bench.rules = naive.Half(wxn=True).rules(lpae)
    assert bench.fault(0x1000, X) == (Why.EXECUTE, 3)
    assert bench.fault(0x2000, X | P) == (Why.EXECUTE, 3)


@pytest.mark.parametrize(("granule", "size", "first"), [(4, 40, 1), (4, 42, 1), (16, 40, 2), (16, 48, 1), (64, 42, 2)])
def test_stage_2_with_tables_in_a_row(granule: int, size: int, first: int) -> None:
    bench = Bench(granule, size, first=first, stage=2)
    ipa = (1 << size) - (granule << 10)
    bench.table.set(bench.table.slot(ipa), 0x40_0000 | 3 | 1 << 10 | 1 << 6)
    assert bench.walk(ipa).out == 0x40_0000
    assert bench.steps[0][:2] == (2, 4 - first)
    assert bench.fault(ipa, W) == (Why.WRITE, 3)
    assert bench.fault(1 << size) == (Why.ADDRESS_SIZE, first)
    assert bench.fault(0)[0] is Why.NOT_PRESENT


def test_stage_2_marks_pages_dirty() -> None:
    bench = Bench(stage=2, ha=True, hd=True)
    slot = bench.table.slot(0x1000)
    bench.table.set(slot, 0x5000 | 3 | 1 << 6 | 1 << 51)
    assert not bench.walk(0x1000).allowed >> W & 1
    assert bench.walk(0x1000, W, stores=True).allowed >> W & 1
    assert bench.table.get(slot) == 0x5000 | 3 | 3 << 6 | 1 << 10 | 1 << 51


def test_a_fetch_that_fails_is_seen_where_it_fails() -> None:
    bench = Bench()
    bench.table.map(0x1000, 0)
    limit = bench.table.slot(0x1000, 2)
    fetched: list[int] = []

    def fetch(address: int) -> int:
        fetched.append(len(bench.steps))
        if address == limit:
            raise TranslationFault(Why.NOT_PRESENT, stage=2, level=1, addr=address, during=During.WALK)
        return bench.table.get(address)

    with pytest.raises(TranslationFault) as caught:
        lpae.walk(fetch, None, lpae.root(bench.table.root, bench.rules), bench.rules, 0x1000, R, bench.steps)
    assert (caught.value.stage, caught.value.addr) == (2, limit)
    assert fetched[-1] == len(bench.steps) == 2


# ---- from CD and STE -----------------------------------------------------------------------------


@pytest.mark.parametrize("granule", [4, 16, 64])
def test_rules_of_a_context_descriptor(granule: int) -> None:
    w0 = 25 | TG0[granule] << 6 | 20 << 16 | TG1[granule] << 22 | 1 << 31 | 2 << 32 | 1 << 38 | 1 << 41 | 1 << 43
    cd = Cd.of((w0, 0x1234_5000 | 2, 0x6789_A000))
    lower, upper = lpae.stage1(cd, 48)
    assert [rules.granule for rules in (lower, upper)] == [naive.LOG2[granule]] * 2
    assert (lower.bits, upper.bits, lower.upper, upper.upper) == (39, 44, False, True)
    assert (lower.output, lower.tbi, upper.tbi, lower.had, upper.had) == (40, True, False, True, False)
    assert (lower.ha, lower.hd, lower.pa52, lower.wxn, lower.pan, lower.affd, lower.haft) == (True, *[False] * 6)
    assert lpae.stage1(Cd.of((w0 | 6 << 32,)), 44)[0].output == 44
    flags = Cd.of((w0 | 1 << 35 | 1 << 36 | 1 << 40 | 1 << 42 | 1 << 39, 8, 2))
    lower, upper = lpae.stage1(flags, 52)
    assert (upper.hd, upper.pa52, upper.wxn, upper.pan, upper.affd, upper.haft) == (True,) * 6
    assert (lower.had, upper.had, upper.tbi) == (False, True, True)
    half = lpae.stage1(Cd.of((w0 | 1 << 30,)), 48)
    assert [rules.disabled for rules in half] == [False, True]
    assert lpae.stage1(Cd.of((w0 | 1 << 14,)), 48)[0].disabled


def test_what_a_context_descriptor_may_not_say() -> None:
    good = 16 | 1 << 30 | 5 << 32
    assert not lpae.bad_stage1(Cd.of((good,)), 48)
    for t0sz in range(64):
        assert lpae.bad_stage1(Cd.of((good & ~63 | t0sz,)), 48) == (not 16 <= t0sz <= 39)
        assert lpae.bad_stage1(Cd.of((good & ~63 | t0sz | 1 << 6,)), 48, va52=True) == (not 12 <= t0sz <= 39)
        assert lpae.bad_stage1(Cd.of((good & ~63 | t0sz,)), 48, va52=True) == (not 16 <= t0sz <= 39)
        assert not lpae.bad_stage1(Cd.of((good & ~63 | t0sz | 1 << 14,)), 48)  # EPD0: nobody looks
    assert lpae.bad_stage1(Cd.of((good | 3 << 6,)), 48)
    assert lpae.bad_stage1(Cd.of((good | 2 << 6,)), 48, granules=(12, 16))
    assert lpae.bad_stage1(Cd.of((good & ~(1 << 30) | 16 << 16,)), 48)  # TG1 0 is reserved
    assert not lpae.bad_stage1(Cd.of((good & ~(1 << 30) | 16 << 16 | 2 << 22,)), 48)
    assert lpae.bad_stage1(Cd.of((good & ~(7 << 32), 1 << 32)), 48)
    assert not lpae.bad_stage1(Cd.of((good & ~(7 << 32), 0xFFFF_FFF0)), 48)
    assert lpae.bad_stage1(Cd.of((good, 1 << 44)), 44)
    assert lpae.bad_stage1(Cd.of((good | 1 << 33, 1 << 48)), 52)  # 4 KiB tables end at 48 bits
    assert not lpae.bad_stage1(Cd.of((good & ~(7 << 32) | 6 << 32 | 1 << 6, 1 << 48)), 52)


@pytest.mark.parametrize(
    ("tg", "sl0", "granule", "level"),
    [(0, 0, 4, 2), (0, 1, 4, 1), (0, 2, 4, 0), (2, 1, 16, 2), (2, 2, 16, 1), (1, 2, 64, 1)],
)
def test_rules_of_a_second_stage(tg: int, sl0: int, granule: int, level: int) -> None:
    w2 = 24 | sl0 << 6 | tg << 14 | 2 << 16 | 1 << 21 | 1 << 23 | 1 << 24
    rules = lpae.stage2(Ste.of((0, 0, w2 << 32)), 48)
    assert (rules.granule, lpae.arm_level(rules.levels), rules.bits) == (naive.LOG2[granule], level, 40)
    assert (rules.stage, rules.output, rules.ha, rules.hd, rules.affd, rules.xnx) == (2, 40, True, True, True, False)
    plain = lpae.stage2(Ste.of((0, 0, (24 | sl0 << 6 | tg << 14 | 6 << 16) << 32)), 52, xnx=True)
    assert (plain.output, plain.pa52, plain.ha, plain.hd) == (52, True, False, False)
    assert (plain.affd, plain.xnx) == (False, True)


def test_attributes_have_their_names() -> None:
    names = {name: 1 << at for at, name in ((6, "AP1"), (7, "AP2"), (10, "AF"), (51, "DBM"), (52, "C"), (54, "XN"))}
    assert {name: mask for mask, name in lpae.FLAGS if name in names} == names
    assert table_bits("pxkr") == lpae.HIERARCHY


# ---- the tests' own test -------------------------------------------------------------------------


def test_the_battery_passes() -> None:
    battery(lpae)


def test_mutants_are_killed() -> None:
    survivors = []
    for number, (old, new) in enumerate(MUTANTS):
        module = mutated(old, new)
        try:
            battery(module)
        except Exception:  # whatever it died of
            continue
        survivors.append((number, old, new))
    assert len(survivors) * 20 <= len(MUTANTS), survivors
