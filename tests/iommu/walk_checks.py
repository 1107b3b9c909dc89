"""What a walk must do, case by case. Plain functions, so that tests and mutants can both run them."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TypeAlias

from iommufdd.iommu.dma import Op, State

from .board import HOLE, POOL, READ_ONLY, WIDTH, WRITE_ONLY, Board, compare
from .tables import X86Table, flags

Check: TypeAlias = Callable[[], None]
CHECKS: dict[str, Check] = {}

# One IOVA whose index differs at each level, in the lower and the upper half.
LOW = 0x0000_0123_4567_8000
HIGH5 = 0xFFFE_0123_4567_8000
HIGH4 = 0xFFFF_8123_4567_8000


def check(function: Check) -> Check:
    CHECKS[function.__name__] = function
    return function


def guest(board: Board, levels: int = 4, **fields: int) -> X86Table:
    """An empty first stage, and a PASID-table entry that names it."""
    board.file.data[:] = bytes(len(board.file.data))
    table = X86Table(board, POOL, levels)
    board.publish(board.fields(fspt=table.root, fspm=levels - 4, **{"sre": 1, "ere": 1, **fields}))
    return table


def go(board: Board) -> None:
    """The table is written: the reference takes its memory."""
    board.publish(board.reference.entry)


@check
def every_level_and_page_size() -> None:
    board = Board()
    for levels, iovas in ((4, (LOW, HIGH4)), (5, (LOW, 0x00AB_0123_4567_8000, HIGH5))):
        for level, offset in ((1, 0x123), (2, 0x8123), (3, 0x315123)):
            for iova in iovas:
                page = iova >> 12 + 9 * (level - 1) << 12 + 9 * (level - 1)
                table = guest(board, levels)
                table.map(page, 0x5000 if level == 1 else 0, level=level)
                go(board)
                for access in ("r", "w", "rw", "rx", "rp", "wp"):
                    assert board.check(page + offset, access) == 0
                assert board.check(page - 1, "r") == (0x71 if page << 16 else 0x80)
                board.check_bits()


@check
def an_index_is_nine_bits_of_each_level() -> None:
    board = Board()
    for levels in (4, 5):
        for level in range(1, levels + 1):
            for index in (1, 2, 255, 256, 511):
                table = guest(board, levels)
                iova = index << 12 + 9 * (level - 1)
                if iova >> 11 + 9 * levels:
                    iova |= (1 << 64) - (1 << 12 + 9 * levels)
                table.map(iova, 0x7000)
                go(board)
                assert board.check(iova, "r") == 0
                assert board.check(iova ^ 1 << 12 + 9 * (level - 1), "r") == 0x71


@check
def every_right_at_every_level() -> None:
    """Write, user and execute at one level at a time, against every kind of request."""
    board = Board()
    for levels, preset in ((4, "ad"), (5, "")):
        for level in range(1, levels + 1):
            for without in ("w", "u", "wu", "X"):
                for wpe in (0, 1):
                    table = guest(board, levels, wpe=wpe)
                    table.map(LOW, 0x5000, "rwu" + preset)
                    addr = table.slot(LOW, level)
                    entry = table.get(addr) & ~flags("r" + without.strip("X")) | 1
                    table.set(addr, entry | (flags("rx") if without == "X" else 0))
                    go(board)
                    for access in ("r", "w", "rw", "rx", "rp", "wp", "rwp", "rxp", "r", "w"):
                        board.check(LOW, access)
                    board.check_bits()


@check
def supervisors_write_to_large_read_only_pages() -> None:
    """But for WPE; users never do."""
    board = Board()
    for wpe in (0, 1):
        for rights in ("ru", "rua", "ruad", "r"):
            table = guest(board, wpe=wpe)
            base = LOW >> 21 << 21
            table.map(base, 0, rights, level=2)
            go(board)
            assert board.check(base + 0x5000, "wp") == (0x85 if wpe else 0)
            assert board.check(base + 0x5000, "w") == (0x85 if "u" in rights else 0x81)
            board.check_bits()


@check
def a_fresh_walk_has_nine_bits_of_index_too() -> None:
    """And promises no more than its entries do."""
    board = Board()
    table = guest(board)
    base = LOW >> 21 << 21
    for index in (0, 255, 256, 511):
        table.map(base + (index << 12), 0x5000 + index // 256 * 0x1000, "rwua")
    go(board)
    for index in (0, 255, 256, 511):
        assert board.check(base + (index << 12), "r") == 0
        board.check_promises(base + (index << 12), "r")
    for level in (4, 3, 2, 1):
        for without in ("w", "u", "X"):
            table = guest(board, sre=1, ere=1)
            table.map(base, 0x5000, "rwuad")
            addr = table.slot(base, level)
            entry = table.get(addr)
            table.set(addr, entry | flags("rx") if without == "X" else entry & ~flags(without))
            go(board)
            for access in ("r", "rp"):
                if not board.check(base, access):
                    board.check_promises(base, access)


@check
def every_bit_of_an_entry_flipped() -> None:
    board = Board()
    for levels, level in ((4, 1), (4, 2), (4, 3), (4, 4), (5, 5)):
        for leaf in {level == 1, 1 < level <= 3}:
            table = guest(board, levels)
            table.map(LOW >> 30 << 30 if leaf and level > 1 else LOW, 0 if level > 1 and leaf else 0x5000,
                      level=level if leaf else 1)  # fmt: skip
            addr = table.slot(LOW, level)
            for bit in range(64):
                table.set(addr, table.get(addr) ^ 1 << bit)
                go(board)
                for access in ("r", "w", "rx", "rp"):
                    board.check(LOW, access)
                board.file.data[:] = board.reference.memory
                table.set(addr, table.get(addr) ^ 1 << bit)


@check
def large_pages_that_are_refused() -> None:
    for pages_1g in (True, False):
        board = Board(pages_1g=pages_1g)
        for level, low in ((2, 21), (3, 30)):
            for bit in (0, *range(12, 31)):
                table = guest(board)
                table.map(LOW >> 30 << 30, 1 << bit if bit else 0, level=level)
                go(board)
                refused = 12 < bit < low or (level == 3 and not pages_1g)
                assert (board.check(LOW >> 30 << 30 | 0x3456, "r") == 0x72) == refused
        for levels, level in ((4, 4), (5, 4), (5, 5)):
            table = guest(board, levels)
            table.set(table.slot(LOW, level), flags("rwu") | 1 << 7)
            go(board)
            assert board.check(LOW, "r") == 0x72


@check
def canonical_addresses() -> None:
    board = Board()
    for levels, top in ((4, 47), (5, 56)):
        guest(board, levels)
        go(board)
        for bit in range(top, 64):
            assert board.check(1 << bit, "r") == 0x80
            assert board.check((1 << 64) - (1 << top) ^ (1 << bit if bit > top else 0), "r") in (0x71, 0x80)
        assert board.check((1 << top) - 1, "r") == 0x71
        assert board.check((1 << 64) - (1 << top), "r") == 0x71
        assert board.check((1 << 64) - (1 << top) - 1, "r") == 0x80


@check
def accessed_and_dirty_bits() -> None:
    board = Board()
    for eafe in (0, 1):
        for level in (1, 2, 3):
            for access in ("r", "w", "rp", "wp", "rx"):
                for preset in ("", "a", "ad", "ade"):
                    table = guest(board, eafe=eafe)
                    addr = table.map(0, 0, "rwu" + preset, level=level)
                    go(board)
                    assert board.check(0x123, access) == 0
                    assert bool(table.get(addr) & flags("rd") & ~1) == ("w" in access or "d" in preset)
                    assert board.check(0x123, "r") == 0
                    board.check_bits()
                    assert board.check(0x123, "w") == 0
                    board.check_bits()


@check
def bits_are_not_set_when_the_walk_stops() -> None:
    board = Board()
    for rights, access, reason in (("ru", "w", 0x85), ("rw", "r", 0x81), ("rwux", "rx", 0x82)):
        table = guest(board)
        addr = table.map(LOW, 0x5000, rights)
        go(board)
        assert board.check(LOW, access) == reason
        assert not table.get(addr) & flags("rad") & ~1
        board.check_bits()


@check
def tables_in_memory_with_fewer_rights() -> None:
    """Bits already set: a read-only table will do. To set them it must be writable."""
    board = Board()
    for area, preset, reason in (
        (READ_ONLY, "ad", 0), (READ_ONLY, "", 0x77), (READ_ONLY, "a", 0), (WRITE_ONLY, "ad", 0x76), (HOLE, "", 0x76),
        (1 << 48, "", 0x74), (1 << 50, "", 0x72),
    ):  # fmt: skip
        table = guest(board)
        table.set(table.slot(LOW, 2), area | flags("rwua"))
        if area < HOLE:
            board.write(area + 8 * (LOW >> 12 & 511), (0x5000 | flags("rwu" + preset)).to_bytes(8, "little"))
        go(board)
        assert board.check(LOW, "r") == reason
        assert board.check(LOW, "w") == (0x77 if preset == "a" else reason)
        board.check_bits()


@check
def what_the_second_stage_refuses() -> None:
    board = Board()
    for gpa, access, reason in (
        (0x200000, "r", 0), (0x200000, "w", 0x79), (0x300000, "w", 0), (0x300000, "r", 0x79), (0x300000, "rw", 0x79),
        (HOLE, "r", 0x79), (0x320000, "r", 0x79), ((1 << WIDTH) - 4096, "r", 0x79), (1 << WIDTH, "r", 0x74),
        (0x200000, "rx", 0),
    ):  # fmt: skip
        table = guest(board)
        table.map(LOW, gpa)
        go(board)
        assert board.check(LOW, access) == reason
        assert board.check(LOW, access) == reason
        board.publish(board.fields(pgtt=2, ere=1))
        assert board.check(gpa, access) == (0x84 if reason == 0x74 else reason)


@check
def a_large_page_over_a_patchwork() -> None:
    """One 1 GiB page over all stretches of the second stage: each access gets its own."""
    for mode in ("greedy", "off", "faithful"):
        board = Board(mode=mode)
        table = guest(board)
        table.map(0x4000_0000, 0, level=3)
        go(board)
        for gpa in range(0, 0x340000, 0xF800):
            for access in ("r", "w", "rw"):
                board.check(0x4000_0000 + gpa + 0x10, access)
        for start, _, _, _ in board.reference.maps:
            for gpa in (start, start + 0xFFF, max(start - 1, 0)):
                board.check(0x4000_0000 + gpa, "r")
        board.check_bits()


@check
def the_dirty_pages_of_a_second_stage() -> None:
    board = Board()
    for pgtt in (2, 3):
        table = guest(board, ssade=1, pgtt=pgtt)
        for page in range(8):
            table.map(page << 12, page << 12)
        go(board)
        board.reference.dirty = {iova >> 12 for iova, _ in board.domain.dirty_bits.read_and_clear_dirty(
            0, (1 << WIDTH) - 1, clear=False)} if board.domain.dirty_bits else set()  # fmt: skip
        for page, access in enumerate(("r", "w", "rw", "rx", "r", "w", "r")):
            assert board.check(page << 12 | 0x10, access) == 0
        assert board.check(0x10, "w") == 0
        board.check_bits()


@check
def interrupts_are_refused_without_a_pasid_only() -> None:
    for mode in ("greedy", "off"):
        board = Board(mode=mode)
        table = guest(board)
        table.map(0xC0000000, 0, level=3)
        go(board)
        for iova in (0xFEDFFFFF, 0xFEE00000, 0xFEEFFFFF, 0xFEF00000, 0xFEE00001, 0xFEDFF000, 0xFEF00FFF, 0xFEEFF000):
            for pasid in (3, None, 0, None):
                assert board.check(iova, "r", pasid) == (0x87 if pasid is None and 0xFEE <= iova >> 20 < 0xFEF else 0)
        board.publish(board.fields(pgtt=2))
        assert board.check(0xFEE00000, "r", None) == 0x87
        assert board.check(0xFEE00000, "r", 3) == 0x79


@check
def of_several_reasons_the_first() -> None:
    """Present, user, write, execute, reserved bits; then the bits to be set, then the second stage."""
    board = Board()
    for mistakes in range(64):
        table = guest(board, wpe=1)
        entry = 0x200000 if mistakes & 32 else 0x5000
        for at, letter in enumerate("rwux"):
            if bool(mistakes >> at & 1) == (letter == "x"):
                entry |= flags(letter) if letter != "r" else 0
        entry |= 0 if mistakes & 1 else flags("r")
        entry |= 1 << 51 if mistakes & 16 else 0
        table.set(table.slot(LOW, 1), entry)
        go(board)
        for access in ("r", "w", "rx", "rp", "wp", "rxp", "rw"):
            board.check(LOW, access)
        board.check_bits()


@check
def requests_that_need_consent() -> None:
    board = Board()
    for sre in (0, 1):
        for ere in (0, 1):
            table = guest(board, sre=sre, ere=ere)
            table.map(LOW, 0x5000)
            go(board)
            for access in ("r", "rx", "rp", "rxp", "w", "wp", "rx", "rp"):
                want = 0x5C if "x" in access and not ere else 0x5D if "p" in access and not sre else 0
                assert board.check(LOW, access) == want


@check
def every_bit_of_a_pasid_entry_flipped() -> None:
    board = Board()
    table = guest(board)
    table.map(LOW, 0x5000)
    for pgtt, iova in ((2, 0x5000), (3, LOW)):
        good = board.fields(fspt=table.root, pgtt=pgtt)
        for bit in range(512):
            if 64 <= bit < 80:
                continue  # the domain id is only a tag
            board.publish(good ^ 1 << bit)
            for access in ("r", "rp"):
                board.check(iova, access)


@check
def the_same_through_every_cache() -> None:
    """Random tables, seeded."""
    for seed in range(24):
        rng = random.Random(seed)
        compare(Board(mode=("greedy", "off", "faithful")[seed % 3], ats=seed % 2 == 1, pages_1g=seed % 5 > 0), rng)


@check
def a_transfer_crosses_pages() -> None:
    board = Board()
    table = guest(board)
    for page, gpa in enumerate((0x5000, 0x3000, 0x9000)):
        table.map(LOW + (page << 12), gpa)
        board.write(gpa, bytes([page + 1]) * 4096)
    go(board)
    dma = board.dma(Op.READ, LOW + 0x800, 0x2000)
    assert dma.state is State.DONE
    assert dma.data == b"\1" * 0x800 + b"\2" * 0x1000 + b"\3" * 0x800
    dma = board.dma(Op.WRITE, LOW + 0x1FF0, 0x2000)
    assert (dma.state, dma.done, dma.fault and dma.fault.code) == (State.FAILED, 0x1010, 0x71)
    assert board.read(0x3FF0, 16) == b"\xa5" * 16
    assert board.read(0x9000, 0x1000) == b"\xa5" * 0x1000


@check
def a_fault_at_the_level_that_refuses() -> None:
    """A kept table does not hide that an entry above it refuses: not present below is a later test."""
    board = Board()
    table = guest(board)
    table.map(LOW, 0x5000, make="ru")
    go(board)
    assert board.check(LOW, "r") == 0
    assert board.check(LOW + 0x1000, "r") == 0x71
    assert board.check(LOW + 0x1000, "w") == 0x85
    board.check_bits()
