"""A naive walker of LPAE tables, step by step as DDI0487 D8 words it, and the comparison of lpae.py with it.

It shares no constant with iommufdd: a mistake would have to be made twice. Tables are random: every address holds an
entry made of the address and a seed, so a walker that looks in the wrong place finds something else.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any, NamedTuple

from .lpae_tables import SHIFT, WIDTH, start_level

if TYPE_CHECKING:
    from collections.abc import Callable

R, W, X, P = 1, 2, 4, 8
LOG2 = {4: 12, 16: 14, 64: 16}
BLOCK = {4: (1, 2), 16: (2,), 64: (2,)}
JOINED = {  # what the contiguous hint makes of a leaf, in bytes, by granule and level
    (4, 1): 16 << 30, (4, 2): 32 << 20, (4, 3): 64 << 10,
    (16, 2): 1 << 30, (16, 3): 2 << 20,
    (64, 2): 16 << 30, (64, 3): 2 << 20,
}  # fmt: skip


class Half(NamedTuple):
    """One half of a context, in the manual's words."""

    granule: int = 4  # KiB
    size: int = 48  # input address bits
    output: int = 48  # output address bits
    upper: bool = False
    epd: bool = False
    tbi: bool = False
    lpa: bool = False
    ha: bool = False
    hd: bool = False
    haft: bool = False
    affd: bool = False
    had: bool = False
    wxn: bool = False
    pan: bool = False
    stage: int = 1
    first: int | None = None  # stage 2: the start level
    xnx: bool = False

    def rules(self, lpae: Any) -> Any:
        """The same for the walker under test."""
        return lpae.Rules(
            granule=LOG2[self.granule], tsz=64 - self.size, output=self.output, upper=self.upper, disabled=self.epd,
            tbi=self.tbi, pa52=self.lpa, ha=self.ha, hd=self.hd, haft=self.haft, affd=self.affd, had=self.had,
            wxn=self.wxn, pan=self.pan, stage=self.stage, start_level=0 if self.first is None else 4 - self.first,
            xnx=self.xnx,
        )  # fmt: skip


class Answer(NamedTuple):
    """What a walk gives: a fault's name and ARM level, or a mapping; and what it did."""

    fault: str = ""
    level: int = 0
    first: int = 0
    out: int = 0
    size: int = 0
    allowed: int = 0
    steps: tuple[tuple[int, int, int], ...] = ()  # ARM level, address, entry
    stores: tuple[tuple[int, int, int], ...] = ()  # address, old, new


def field(value: int, high: int, low: int) -> int:
    return value >> low & (1 << high - low + 1) - 1


def bit(value: int, at: int) -> bool:
    return bool(value >> at & 1)


def reference(half: Half, ttb: int, memory: Callable[[int], int], ia: int, access: int, *, stores: bool) -> Answer:
    """The walk; stores: whether hardware may update entries in this one."""
    walk = _Walk(half, memory, stores)
    try:
        first, out, size, allowed = walk.run(ttb, ia, access)
    except _Fault as fault:
        return Answer(fault.args[0], walk.level, steps=tuple(walk.steps), stores=tuple(walk.stores))
    return Answer("", walk.level, first, out, size, allowed, tuple(walk.steps), tuple(walk.stores))


class _Fault(Exception):
    pass


class _Walk:
    def __init__(self, half: Half, memory: Callable[[int], int], may_store: bool) -> None:
        self.half = half
        self.memory = memory
        self.may_store = may_store
        self.level = start_level(half.granule, half.size) if half.first is None else half.first
        self.steps: list[tuple[int, int, int]] = []
        self.stores: list[tuple[int, int, int]] = []

    def run(self, ttb: int, ia: int, access: int) -> tuple[int, int, int, int]:
        half = self.half
        self.check_input(ia)
        shifts = SHIFT[half.granule]
        start = self.level
        length = 8 << max(half.size - shifts[start], 0)
        if half.output == 52:
            length = max(length, 64)
        table = field(ttb, 51, 0) // length * length
        tables = []
        while True:
            low = shifts[self.level]
            high = half.size - 1 if self.level == start else low + WIDTH[half.granule] - 1
            address = table + 8 * (field(ia, high, low) if high >= low else 0)
            entry = self.memory(address)
            self.steps.append((self.level, address, entry))
            if not bit(entry, 0):
                raise _Fault("NOT_PRESENT")
            if self.level == 3 or not bit(entry, 1):
                break
            tables.append(entry)
            table = self.output_of(entry, LOG2[half.granule])
            if half.haft and half.ha and not bit(entry, 10):
                self.store(address, entry, entry + 2**10)
            self.level += 1
        return self.leaf(address, entry, tables, ia, access)

    def check_input(self, ia: int) -> None:
        half = self.half
        if half.epd:
            raise _Fault("NOT_PRESENT")
        last = 55 if half.tbi else 63
        for at in range(half.size, last + 1):
            if bit(ia, at) != half.upper:
                raise _Fault("ADDRESS_SIZE")

    def output_of(self, entry: int, low: int) -> int:
        address = field(entry, 47, low) << low
        if self.half.granule == 64 and self.half.lpa:
            address += field(entry, 15, 12) << 48
        if address >> self.half.output:
            raise _Fault("OUTPUT_SIZE")
        return address

    def leaf(self, address: int, entry: int, tables: list[int], ia: int, access: int) -> tuple[int, int, int, int]:
        half = self.half
        if self.level == 3:
            if not bit(entry, 1):
                raise _Fault("RESERVED")
        elif self.level not in BLOCK[half.granule] and not (half.granule == 64 and self.level == 1 and half.lpa):
            raise _Fault("RESERVED")
        low = SHIFT[half.granule][self.level]
        out = self.output_of(entry, low)
        if not bit(entry, 10) and not half.ha and not half.affd:
            raise _Fault("ACCESS_FLAG")
        rights = stage2_rights(half, entry) if half.stage == 2 else stage1_rights(half, entry, tables)
        check_rights(half, rights, access)
        clean = self.mark(address, entry, access, rights)
        size = 1 << low
        joined = JOINED.get((half.granule, self.level), 0)
        if bit(entry, 52) and joined and joined <= 1 << half.size:
            size = joined
        allowed = sum(2**one for one in range(16) if passes(rights, one) and not (one & W and clean))
        return ia // size * size, out // size * size, size, allowed

    def mark(self, address: int, entry: int, access: int, rights: dict[int, str]) -> bool:
        """AF and dirty state; True if writes have to come again to make the page dirty."""
        new = entry
        if self.half.ha and not bit(entry, 10):
            new += 2**10
        dirtied = clean_page(self.half, entry)
        if dirtied and access & W and self.may_store:
            new += 2**7 if self.half.stage == 2 else -(2**7)
            dirtied = False
        if new != entry:
            self.store(address, entry, new)
        return dirtied and "w" in rights[0] + rights[P]

    def store(self, address: int, old: int, new: int) -> None:
        if self.may_store:
            self.stores.append((address, old, new))


def clean_page(half: Half, entry: int) -> bool:
    """DBM and read-only, with hardware that knows what that means."""
    return half.ha and half.hd and bit(entry, 51) and bit(entry, 7) == (half.stage == 1)


def stage1_rights(half: Half, entry: int, tables: list[int]) -> dict[int, str]:
    """The rights of unprivileged (0) and privileged (P) accesses."""
    read_only = bit(entry, 7) and not clean_page(half, entry)
    user = {(False, False): "", (False, True): "rw", (True, False): "", (True, True): "r"}[read_only, bit(entry, 6)]
    privileged = "r" if read_only else "rw"
    uxn, pxn = bit(entry, 54), bit(entry, 53)
    for table in tables if not half.had else []:
        if bit(table, 61):
            user = ""
        if bit(table, 62):
            user, privileged = user.replace("w", ""), privileged.replace("w", "")
        uxn = uxn or bit(table, 60)
        pxn = pxn or bit(table, 59)
    if "w" in user:
        pxn = True
    if half.wxn:
        uxn, pxn = uxn or "w" in user, pxn or "w" in privileged
    if half.pan and user:
        privileged = ""
    return {0: user if uxn else user + "x", P: privileged if pxn else privileged + "x"}


def stage2_rights(half: Half, entry: int) -> dict[int, str]:
    """S2AP and XN."""
    data = ("r" if bit(entry, 6) else "") + ("w" if bit(entry, 7) or clean_page(half, entry) else "")
    xn = field(entry, 54, 53) if half.xnx else field(entry, 54, 54) * 2
    return {0: data + ("x" if xn in (0, 1) else ""), P: data + ("x" if xn in (0, 3) else "")}


def passes(rights: dict[int, str], access: int) -> bool:
    mine = rights[access & P]
    return all(letter in mine for wanted, letter in ((R, "r"), (W, "w"), (X, "x")) if access & wanted)


def check_rights(half: Half, rights: dict[int, str], access: int) -> None:
    if passes(rights, access):
        return
    mine = rights[access & P]
    if half.stage == 1 and not access & P and access & (R | W) and "r" not in mine:
        raise _Fault("USER")
    if access & R and "r" not in mine:
        raise _Fault("READ")
    if access & W and "w" not in mine:
        raise _Fault("WRITE")
    raise _Fault("EXECUTE")


# ---- random tables -------------------------------------------------------------------------------

_LIKELY = {2: 0.5, 4: 0.5, 5: 0.3, 6: 0.75, 7: 0.35, 8: 0.5, 9: 0.5, 10: 0.8, 11: 0.5, 50: 0.2, 51: 0.4, 52: 0.25,
           53: 0.2, 54: 0.2, 55: 0.5, 58: 0.3, 59: 0.08, 60: 0.08, 61: 0.08, 62: 0.08, 63: 0.2}  # fmt: skip
_CALM = {6: 0.95, 10: 0.97, 52: 0.02, 53: 0.1, 54: 0.1, 59: 0.01, 60: 0.01, 61: 0.01, 62: 0.01}


class Memory:
    """64 bit entries everywhere, always the same at the same address. Those of odd seeds have little against a walk."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.read: dict[int, int] = {}

    def __call__(self, address: int) -> int:
        if address not in self.read:
            self.read[address] = self._entry(address)
        return self.read[address]

    def _entry(self, address: int) -> int:
        rng = random.Random(self.seed << 64 | address)
        calm = self.seed % 2
        entry = rng.choices((3, 1, 2, 0), (98, 2, 0, 0) if calm else (76, 18, 3, 3))[0]
        reach = rng.choices((32, 36, 42, 48), (97, 1, 1, 1) if calm else (60, 10, 20, 10))[0]
        entry |= rng.getrandbits(reach) & ~0xFFF
        if rng.random() < 0.7:
            entry &= ~0xF000  # bits 51:48 of 64 KiB entries
        likely = (_LIKELY | _CALM) if calm else _LIKELY
        return entry | sum(1 << at for at, often in likely.items() if rng.random() < often)


class Case(NamedTuple):
    """A walk."""

    half: Half
    seed: int
    ttb: int
    ia: int
    access: int
    stores: bool


def random_case(rng: random.Random) -> Case:
    """A case with every rule in it now and then."""
    half = random_half(rng)
    ia = rng.getrandbits(half.size)
    if half.upper:
        ia |= (1 << 64) - (1 << half.size)
    if half.tbi and rng.random() < 0.5:
        ia = ia % (1 << 56) | rng.getrandbits(8) << 56
    if rng.random() < 0.1:
        ia ^= 1 << rng.choice((half.size, 55, 56, 63, rng.randrange(half.size, 64)))
    return Case(half, rng.getrandbits(32), rng.getrandbits(52), ia, rng.randrange(16), rng.random() < 0.6)


_FLAGS = ("upper", "epd", "tbi", "hd", "haft", "affd", "had", "wxn", "pan")


def random_half(rng: random.Random) -> Half:
    def rarely(likely: float = 0.25) -> bool:
        return rng.random() < likely

    if rarely():  # what most guests have, and one thing more
        return Half(**{rng.choice(_FLAGS): True}, **({"ha": True} if rarely(0.5) else {"stage": 1}))
    granule = rng.choice((4, 16, 64))
    lpa = rarely(0.5)
    size = rng.choice((48, 48, rng.randint(25, 52 if granule == 64 else 48)))
    output = rng.choice((32, 36, 40, 42, 44, 48, 48, 48, *((52, 52, 52) if lpa else ())))
    if rarely(0.2):
        return Half(granule, size, output, lpa=lpa, ha=rarely(0.5), hd=rarely(0.5), affd=rarely(), stage=2,
                    first=_first(rng, granule, size), xnx=rarely(0.5))  # fmt: skip
    return Half(granule, size, output, upper=rarely(0.4), epd=rarely(0.03), tbi=rarely(), lpa=lpa, ha=rarely(0.5),
                hd=rarely(0.5), haft=rarely(), affd=rarely(), had=rarely(), wxn=rarely(0.15),
                pan=rarely(0.15))  # fmt: skip


def _first(rng: random.Random, granule: int, size: int) -> int:
    """A start level whose tables stand at most sixteen in a row."""
    usual = start_level(granule, size)
    later = usual + 1
    if later <= 3 and size - SHIFT[granule][later] - WIDTH[granule] <= 4 and rng.random() < 0.5:
        return later
    return usual


class Solved(NamedTuple):
    """A walk and the reference's answer."""

    case: Case
    memory: Memory
    expected: Answer


def solved(case: Case) -> Solved:
    """Ask the reference."""
    half, seed, ttb, ia, access, stores = case
    memory = Memory(seed)
    return Solved(case, memory, reference(half, ttb, memory, ia, access, stores=stores))


def check(lpae: Any, given: Solved) -> None:
    """The walker under test gives the reference's answer, from the root and from every table that a cache may keep."""
    case, memory, expected = given
    rules = case.half.rules(lpae)
    start = lpae.root(case.ttb, rules)
    found = answer(lpae, case, memory, rules, start)
    assert found == expected, (case, found, expected)
    if not expected.fault:
        for _, _, entry in expected.steps[:-1]:
            start = lpae.below(start, entry, rules)
            again = answer(lpae, case, memory, rules, start)
            assert (again.first, again.out, again.size, again.allowed) == expected[2:6], (case, start)


def answer(lpae: Any, case: Case, memory: Memory, rules: Any, start: Any) -> Answer:
    """What the walker under test says, in the reference's words."""
    steps: list[tuple[int, int, int, int]] = []
    stored: list[tuple[int, int, int]] = []

    def update(address: int, old: int, new: int) -> None:
        stored.append((address, old, new))

    try:
        leaf = lpae.walk(memory, update if case.stores else None, start, rules, case.ia, case.access, steps)
    except lpae.TranslationFault as stopped:
        fault = stopped
    else:
        level = lpae.arm_level(steps[-1][1])
        first, out, size, allowed = leaf
        return Answer("", level, first, out, size, allowed, _arm(lpae, steps, case), tuple(stored))
    assert (fault.stage, fault.addr) == (case.half.stage, case.ia)
    return Answer(fault.why.name, lpae.arm_level(fault.level), steps=_arm(lpae, steps, case), stores=tuple(stored))


def _arm(lpae: Any, steps: list[tuple[int, int, int, int]], case: Case) -> tuple[tuple[int, int, int], ...]:
    assert all(step[0] == case.half.stage for step in steps)
    return tuple((lpae.arm_level(level), address, entry) for _, level, address, entry in steps)
