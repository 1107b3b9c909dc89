"""The x86-64 table format: VT-d's first stage (VT-d spec 9.7, generic_pt/fmt/x86_64.h), 4 or 5 levels.

AMD's v2 tables have the same entries, without EA and with supervisor writes always checked.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from .walk import (
    EXEC,
    EXECS,
    PRIV,
    PRIVS,
    USERS,
    WRITE,
    WRITES,
    Fetch,
    Leaf,
    RawStep,
    TranslationFault,
    Update,
    Why,
)

P = 1 << 0
RW = 1 << 1
US = 1 << 2
A = 1 << 5
D = 1 << 6
PS = 1 << 7
EA = 1 << 10
XD = 1 << 63
_new = tuple.__new__  # makes a NamedTuple in half the time
RIGHTS = RW | US | XD
_SHARED = RW | US  # rights that all entries must give
_LEAF = XD | D  # what of a page decides the accesses that need no further walk
HARDWARE_BITS = A | D | EA  # set by walks
ADDRESS = 0x000F_FFFF_FFFF_F000

FLAGS = ((P, "P"), (RW, "RW"), (US, "US"), (1 << 3, "PWT"), (1 << 4, "PCD"), (A, "A"), (D, "D"), (PS, "PS"),
         (EA, "EA"), (XD, "XD"))  # fmt: skip


def names(entry: int) -> str:
    """The bits that are set, by their names: "P RW US"."""
    return " ".join(name for bit, name in FLAGS if entry & bit)


@dataclass(slots=True, eq=False)
class Rules:
    """What of the format the hardware and the PASID entry allow; the rest is worked out once."""

    levels: int = 4
    pages_2m: bool = True
    pages_1g: bool = True
    haw: int = 52  # host address width: address bits above it are reserved
    write_protect: bool = False  # PASID entry's WPE: supervisor writes need RW too
    extended_access: bool = False  # PASID entry's EAFE: set EA in all entries used

    quick: tuple[tuple[int, int, int], ...] = field(init=False)  # _needed(), by access
    known: dict[int, int] = field(init=False)  # _allowed(), by what it depends on

    def __post_init__(self) -> None:
        self.quick = tuple(_needed(access, self.write_protect, self.haw) for access in range(16))
        self.known = {}


class Start(NamedTuple):
    """Where a walk begins: at the root, or at a table that a paging-structure cache has kept."""

    table: int
    level: int
    rights: int  # RW, US and XD gathered above: RW and US as AND, XD as "not any"


def root(table: int, rules: Rules) -> Start:
    """The start of a full walk."""
    return Start(table & ADDRESS, rules.levels, RIGHTS)


def canonical(iova: int, levels: int) -> bool:
    """Bits above the highest one translated equal it."""
    top = iova >> 9 * levels + 11
    return top == 0 or top == (1 << 64 - (9 * levels + 11)) - 1


def walk(
    fetch: Fetch, update: Update | None, start: Start, rules: Rules, iova: int, access: int, steps: list[RawStep]
) -> Leaf:
    """Translate iova. Appends every entry used to `steps`, the one that stopped it included.

    Order of tests in one entry: present, user, write, execute, reserved bits (as in QEMU's intel_iommu.c).
    """
    table, level, rights = start
    if level == 4 and update is None and not iova >> 47 and rules.levels == 4:
        try:
            found = _four_levels(fetch, table, rules, iova, access, steps)
        except TranslationFault:
            found = None  # once more, step by step: the steps tell the fault's level
        if found is not None:
            return found
    if not canonical(iova, rules.levels):
        raise TranslationFault(Why.CANONICAL, stage=1, level=rules.levels, addr=iova)
    _, mask, needed = rules.quick[access]
    while True:
        address = table | iova >> 9 * level & 0xFF8
        entry = fetch(address)
        steps.append((1, level, address, entry))
        rights &= entry ^ XD
        leaf = level == 1 or entry & PS
        if entry & mask != needed or (leaf and level > 1):
            _check(level, entry, rights, iova, access, rules)
        if update is not None:
            _mark(update, address, entry, access if leaf else 0, rules)
        if leaf:
            break
        table = entry & ADDRESS
        level -= 1
    size = 8 << 9 * level
    dirty = D if update is not None and access & WRITE else entry & D
    return Leaf(iova & -size, entry & ADDRESS & -size, size, _allowed(rights & RIGHTS ^ XD | dirty, rules))


def _four_levels(
    fetch: Fetch, table: int, rules: Rules, iova: int, access: int, steps: list[RawStep]
) -> Leaf | None:
    """The commonest walk unrolled, which is faster by half: from the root to a 4 KiB page, nothing in the way."""
    table_mask, mask, needed = rules.quick[access]
    a4 = table | iova >> 36 & 0xFF8
    e4 = fetch(a4)
    a3 = e4 & ADDRESS | iova >> 27 & 0xFF8
    if e4 & table_mask != needed:
        return None
    e3 = fetch(a3)
    a2 = e3 & ADDRESS | iova >> 18 & 0xFF8
    if e3 & table_mask != needed:
        return None
    e2 = fetch(a2)
    a1 = e2 & ADDRESS | iova >> 9 & 0xFF8
    if e2 & table_mask != needed:
        return None
    e1 = fetch(a1)
    if e1 & mask != needed:
        return None
    steps += (1, 4, a4, e4), (1, 3, a3, e3), (1, 2, a2, e2), (1, 1, a1, e1)
    known = _SHARED & e4 & e3 & e2 & e1 | e1 & _LEAF
    allowed = rules.known.get(known)
    if allowed is None:
        allowed = _allowed(known, rules)
    return _new(Leaf, (iova & -4096, e1 & ADDRESS, 4096, allowed))


def _needed(access: int, write_protect: bool, haw: int) -> tuple[int, int, int]:
    """The quick test of an entry that lets the access pass: (bits that matter in a table, in a page, their value).

    In a table PS and XD matter too: with them a walk goes step by step.
    """
    needed = P if access & PRIV else P | US
    if access & WRITE and (write_protect or not access & PRIV):
        needed |= RW
    mask = needed | ADDRESS & -(1 << haw)
    if access & EXEC:
        mask |= XD
    return mask | PS | XD, mask, needed


def _check(level: int, entry: int, rights: int, iova: int, access: int, rules: Rules) -> None:
    """The tests one by one, in their order. TranslationFault."""
    bad = _test(entry, rights, access, rules)
    if bad is None:
        large = level > 1 and bool(entry & PS)
        if entry & ADDRESS & -(1 << rules.haw) or (large and _bad_size(level, entry, rules)):
            bad = Why.RESERVED
    if bad is not None:
        raise TranslationFault(bad, stage=1, level=level, addr=iova)


def admits(start: Start, rules: Rules, access: int) -> bool:
    """A walk from here may reach a leaf: the rights gathered above do not refuse the access by themselves."""
    return _test(P, start.rights, access, rules) is None


def _test(entry: int, rights: int, access: int, rules: Rules) -> Why | None:
    if not entry & P:
        return Why.NOT_PRESENT
    if not access & PRIV and not rights & US:
        return Why.USER
    if access & WRITE and not rights & RW and (rules.write_protect or not access & PRIV):
        return Why.WRITE
    if access & EXEC and not rights & XD:
        return Why.EXECUTE
    return None


def _bad_size(level: int, entry: int, rules: Rules) -> bool:
    """PS where there is no such page, or address bits below the page's size (bit 12 is PAT)."""
    supported = rules.pages_2m if level == 2 else level == 3 and rules.pages_1g
    return not supported or bool(entry & ((1 << 9 * level + 3) - 1) & ADDRESS & ~(1 << 12))


def _mark(update: Update, address: int, entry: int, leaf_access: int, rules: Rules) -> None:
    """Set A, and D in a leaf that is written, and EA."""
    new = entry | A
    if leaf_access & WRITE:
        new |= D
    if rules.extended_access:
        new |= EA
    if new != entry:
        update(address, entry, new)


def _allowed(rights: int, rules: Rules) -> int:
    """The accesses that need no further walk; a write through a leaf without D does, to set it."""
    result = rules.known.get(rights)
    if result is None:
        users = USERS if rights & US else 0
        privs = PRIVS
        if not rights & RW:
            users &= ~WRITES
            if rules.write_protect:
                privs &= ~WRITES
        result = users | privs
        if rights & XD:
            result &= ~EXECS
        if not rights & D:
            result &= ~WRITES
        rules.known[rights] = result
    return result
