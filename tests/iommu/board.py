"""A device behind a PASID-table entry written by hand, over a second stage of all rights, beside the reference.

What a driver never produces (a read-only second stage under a first one, reserved bits) is reached this way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from iommufdd.hw_pagetable import HwptPaging
from iommufdd.iommu.dma import Dma, Op, State
from iommufdd.iommu.vtd_domain import VtdPaging
from iommufdd.iommu.walk import EXEC, PRIV, READ, WRITE, TranslationFault
from tests.core.harness import DIRTY
from tests.core.harness import READ as MAP_READ
from tests.core.harness import WRITE as MAP_WRITE

from .lab import Lab, endpoint
from .reference import Fault, Mapping, Reference, Unit
from .tables import flags, pasid_entry, words

if TYPE_CHECKING:
    import random

LETTERS = {"r": READ, "w": WRITE, "x": EXEC, "p": PRIV}
SIZE = 0x10000  # of every stretch of the second stage
MAPS = [
    Mapping(0x000000, SIZE, 0x80000, "rw"),
    Mapping(0x100000, SIZE, 0x00000, "rw"),  # the tables
    Mapping(0x140000, SIZE, 0x10000, "r"),
    Mapping(0x180000, SIZE, 0x20000, "w"),
    Mapping(0x200000, SIZE, 0x30000, "r"),
    Mapping(0x300000, SIZE, 0x40000, "w"),
    Mapping(0x310000, SIZE, 0x50000, "rw"),
    Mapping(0x3EDF8000, SIZE, 0x60000, "rw"),  # where a 1 GiB page at 0xC0000000 puts the interrupts' first address
    Mapping(0x3EEF8000, SIZE, 0x70000, "rw"),  # and their last
]
PAGES = 0x90
POOL, READ_ONLY, WRITE_ONLY, HOLE = 0x100000, 0x140000, 0x180000, 0x1C0000
PASID = 3
WIDTH, HAW = 48, 50  # of the second stage; so bits 51:50 are reserved, and 49:48 lead beyond


class Board:
    """One device with PASIDs; `entry` is what PASID 0 and PASID 3 use."""

    def __init__(self, *, mode: str = "greedy", ats: bool = False, pages_1g: bool = True) -> None:
        self.lab = Lab(mode=mode, mgaw=WIDTH, haw=HAW, first_stage=False, execute=True, pages_1g=pages_1g)
        lab, c = self.lab, self.lab.c
        self.file = c.world.memfd(PAGES)
        self.ioas = c.ioas_alloc()
        for start, length, pos, rights in MAPS:
            addr = c.process.map(self.file, length >> 12, page=pos >> 12)
            prot = sum(bit for letter, bit in (("r", MAP_READ), ("w", MAP_WRITE)) if letter in rights)
            c.map(self.ioas, addr, length, start, prot)
        self.idev = lab.device(ats=ats, pasids=4)
        self.dev = endpoint(self.idev)
        self.hwpt = c.hwpt(self.idev.id, self.ioas, DIRTY)
        lab.attach(self.idev, self.hwpt)
        hwpt = c.ictx.objects.get(self.hwpt)
        assert isinstance(hwpt, HwptPaging)
        assert isinstance(hwpt.domain, VtdPaging)
        self.domain = hwpt.domain
        self.did = lab.iommu.did(self.domain)
        self.unit = Unit(self.domain.root, WIDTH, HAW, pages_1g=pages_1g)
        self.reference = Reference(self.unit, bytearray(), MAPS, 0)

    # ---- the guest's side ----

    def read(self, addr: int, length: int) -> bytes:
        at = self._pos(addr)
        return bytes(self.file.data[at : at + length])

    def write(self, addr: int, data: bytes) -> None:
        at = self._pos(addr)
        self.file.data[at : at + len(data)] = data

    def _pos(self, addr: int) -> int:
        found = next(m for m in MAPS if m.start <= addr < m.start + m.length)
        return found.pos + addr - found.start

    def fields(self, **fields: int) -> int:
        """A good nested PASID-table entry, but for these fields."""
        return pasid_entry(**{"aw": 3, "pgtt": 3, "sspt": self.domain.root, "did": self.did, "pwsnp": 1, **fields})

    def publish(self, entry: int) -> None:
        """Make it the entry, and the reference one of now."""
        for pasid in (0, PASID):
            self.lab.iommu.table(self.dev).publish(pasid, words(entry))
            self.lab.iommu.contexts.drop(lambda key, context: True)
        self.lab.iommu.iotlb.drop_spaces(lambda tag: True)
        for pasid_or_none in (None, PASID):
            self.dev.invalidate(pasid_or_none, 0, 2**64 - 1)
        self.reference = Reference(self.unit, bytearray(self.file.data), MAPS, entry)

    # ---- both ----

    def check(self, iova: int, access: str, pasid: int | None = PASID) -> int:
        """Translate on both sides; the reason, or 0."""
        bits = sum(LETTERS[letter] for letter in access)
        want = self.expected(iova, access, pasid)
        if want[1] not in (0x77, 0x90):  # a fresh walk sets no bit
            assert self.outcome(iova, bits, pasid, fresh=True) == want
        self.commit(iova, access, pasid)
        assert self.outcome(iova, bits, pasid) == want, f"{iova:#x} {access}"
        return want[1]

    def expected(self, iova: int, access: str, pasid: int | None) -> tuple[int, int]:
        """(byte of memory or -1, reason or 0); nothing is stored."""
        self.reference.stores = False
        try:
            return self.reference.translate(iova, access, pasid=pasid is not None), 0
        except Fault as fault:
            return -1, fault.reason
        finally:
            self.reference.stores = True

    def commit(self, iova: int, access: str, pasid: int | None) -> None:
        """Let the reference store its bits."""
        try:
            self.reference.translate(iova, access, pasid=pasid is not None)
        except Fault:
            pass

    def outcome(self, iova: int, bits: int, pasid: int | None, *, fresh: bool = False) -> tuple[int, int]:
        try:
            if fresh:
                entry = self.lab.iommu.walk_fresh(self.dev, pasid, iova, bits)
            else:
                entry = self.dev.translate(pasid, iova, bits)
        except TranslationFault as fault:
            return -1, fault.code
        assert entry.first <= iova <= entry.last
        assert entry.file is self.file
        if not fresh:
            self._check_reach(entry.first, entry.last, entry.pos, entry.allowed, pasid)
        return entry.pos + iova - entry.first, 0

    def check_promises(self, iova: int, access: str, pasid: int | None = PASID) -> None:
        """What a fresh walk promises, where a cached one has set its bits before."""
        entry = self.lab.iommu.walk_fresh(self.dev, pasid, iova, sum(LETTERS[letter] for letter in access))
        self._check_reach(entry.first, entry.last, entry.pos, entry.allowed, pasid)

    def _check_reach(self, first: int, last: int, pos: int, allowed: int, pasid: int | None) -> None:
        """What the entry promises for more accesses, at both of its ends, is what the reference would say."""
        for access in ("r", "w", "rw", "rx", "rp", "wp", "rwp", "rxp"):
            bits = sum(LETTERS[letter] for letter in access)
            if not allowed >> bits & 1:
                continue
            for at in (first, last):
                found = self.reference.probe(at, access, pasid=pasid is not None)
                assert found == pos + at - first, f"{at:#x} {access}"

    def dma(self, op: Op, iova: int, length: int, pasid: int | None = PASID, *, priv: bool = False) -> Dma:
        """A DMA, run to its end."""
        dma = Dma(self.dev, op, iova, length, data=b"\xa5" * length, pasid=pasid, priv=PRIV * priv)
        assert dma.run() in (State.DONE, State.FAILED)
        return dma

    def check_bits(self) -> None:
        """A, D and EA in memory, and the dirty pages, are those of the reference."""
        assert self.file.data == self.reference.memory
        assert self.domain.dirty_bits is not None
        found = self.domain.dirty_bits.read_and_clear_dirty(0, (1 << WIDTH) - 1, clear=False)
        assert {iova >> 12 for iova, _ in found} == self.reference.dirty


# ---- random tables ----

INDEXES = (0, 1, 511)
ACCESSES = ["r", "r", "w", "w", "rw", "rx", "rp", "wp", "rwp", "rxp"]
OFFSETS = (0, 8, 0xFFF)


def randomize(board: Board, rng: random.Random) -> list[tuple[int, str, int | None]]:
    """Random tables and a random entry; the accesses to make: (iova, access, PASID)."""
    levels = rng.choice((4, 4, 5))
    pages = {(level, k): _table_page(rng, 2 * level + k) for level in range(1, levels + 1) for k in (0, 1)}
    pages[levels, 0] = rng.choices((POOL, READ_ONLY, WRITE_ONLY, HOLE), (12, 2, 1, 1))[0]
    for (level, _), page in pages.items():
        if page == HOLE:
            continue
        for index in INDEXES:
            board.write(page + 8 * index, _entry(rng, level, pages).to_bytes(8, "little"))

    def one(chance: float) -> int:
        return int(rng.random() < chance)

    board.publish(board.fields(
        fspt=pages[levels, 0], fspm=levels - 4, sre=one(0.85), ere=one(0.85), wpe=one(0.5), eafe=one(0.5),
        pwsnp=one(0.95), ssade=one(0.3), pgtt=rng.choices((2, 3), (1, 9))[0],
    ))  # fmt: skip
    return [(_iova(rng, levels), rng.choice(ACCESSES), rng.choice((None, PASID))) for _ in range(10)]


def _table_page(rng: random.Random, number: int) -> int:
    """Where a table lies: mostly where it can be read and written."""
    area = rng.choices((POOL, READ_ONLY, WRITE_ONLY, HOLE), (40, 3, 1, 1))[0]
    return area + 0x1000 * number if area != HOLE else HOLE


def _entry(rng: random.Random, level: int, pages: dict[tuple[int, int], int]) -> int:
    style = rng.random()
    if style < 0.04:
        return 0
    if style < 0.07:
        return rng.getrandbits(64)
    if level == 1:
        target = rng.choice((0x0, 0x5000, 0x9000, 0x200000, 0x311000, 0x300000, HOLE, rng.getrandbits(52)))
        entry = target & ~0xFFF & (1 << 52) - 1
    elif style < (0.27 if level < 4 else 0.08):
        entry = rng.choice((0, 0, 1 << 21, 1 << 30)) | 1 << 7 | rng.choice((0, 0, 0, 1 << rng.randrange(12, 30)))
    else:
        entry = pages[level - 1, rng.randrange(2)]
    entry |= flags("r")
    for letter, chance in (("w", 0.85), ("u", 0.88), ("x", 0.1), ("a", 0.4), ("d", 0.3), ("e", 0.3)):
        entry |= flags(letter) if rng.random() < chance else 0
    return entry ^ (1 << rng.randrange(64) if rng.random() < 0.06 else 0)


def _iova(rng: random.Random, levels: int) -> int:
    iova = 0
    for level in range(levels):
        iova |= rng.choice(INDEXES) << 12 + 9 * level
    bits = 12 + 9 * levels
    if iova >> bits - 1:
        iova |= (1 << 64) - (1 << bits)
    if rng.random() < 0.05:
        iova ^= 1 << rng.randrange(40, 64)
    return iova | rng.choice(OFFSETS)


def compare(board: Board, rng: random.Random) -> list[int]:
    """Random tables, random accesses; the reasons met."""
    met = [board.check(*access) for access in randomize(board, rng)]
    board.check_bits()
    return met
