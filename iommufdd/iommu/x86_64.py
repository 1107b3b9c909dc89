"""The x86-64 table format: VT-d's first stage (VT-d spec 9.7, generic_pt/fmt/x86_64.h), 4 or 5 levels.

AMD's v2 tables have the same entries, without EA and with supervisor writes always checked.
"""

from __future__ import annotations

from typing import NamedTuple

from .walk import (
    ALL,
    EXEC,
    EXECS,
    PRIV,
    PRIVS,
    USERS,
    WRITE,
    WRITES,
    Fetch,
    Leaf,
    Step,
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
ADDRESS = 0x000F_FFFF_FFFF_F000

FLAGS = ((P, "P"), (RW, "RW"), (US, "US"), (1 << 3, "PWT"), (1 << 4, "PCD"), (A, "A"), (D, "D"), (PS, "PS"),
         (EA, "EA"), (XD, "XD"))  # fmt: skip


def names(entry: int) -> str:
    """The bits that are set, by their names: "P RW US"."""
    return " ".join(name for bit, name in FLAGS if entry & bit)


class Rules(NamedTuple):
    """What of the format the hardware and the PASID entry allow."""

    levels: int = 4
    pages_2m: bool = True
    pages_1g: bool = True
    haw: int = 52  # host address width: address bits above it are reserved
    write_protect: bool = False  # PASID entry's WPE: supervisor writes need RW too
    extended_access: bool = False  # PASID entry's EAFE: set EA in all entries used


class Start(NamedTuple):
    """Where a walk begins: at the root, or at a table that a paging-structure cache has kept."""

    table: int
    level: int
    rights: int  # RW, US and XD gathered above: RW and US as AND, XD as "not any"


def root(table: int, rules: Rules) -> Start:
    """The start of a full walk."""
    return Start(table & ADDRESS, rules.levels, RW | US | XD)


def canonical(iova: int, levels: int) -> bool:
    """Bits above the highest one translated equal it."""
    top = iova >> 9 * levels + 11
    return top == 0 or top == (1 << 64 - (9 * levels + 11)) - 1


def walk(
    fetch: Fetch, update: Update | None, start: Start, rules: Rules, iova: int, access: int, steps: list[Step]
) -> Leaf:
    """Translate iova. Appends every entry used to `steps`, the one that stopped it included.

    Order of tests in one entry: present, user, write, execute, reserved bits (as in QEMU's intel_iommu.c).
    """
    table, level, rights = start
    if not canonical(iova, rules.levels):
        raise TranslationFault(Why.CANONICAL, stage=1, level=rules.levels, addr=iova)
    reserved = ADDRESS & -(1 << rules.haw)
    while True:
        shift = 9 * level + 3
        address = table + (iova >> shift & 0x1FF) * 8
        entry = fetch(address)
        steps.append(Step(1, level, address, entry))
        rights &= entry ^ XD
        leaf = level == 1 or bool(entry & PS)
        bad = _test(entry, rights, access, rules)
        if bad is None and (entry & reserved or (leaf and level > 1 and _bad_size(level, entry, rules))):
            bad = Why.RESERVED
        if bad is not None:
            raise TranslationFault(bad, stage=1, level=level, addr=iova)
        if update is not None:
            _mark(update, address, entry, access if leaf else 0, rules)
        if leaf:
            break
        table = entry & ADDRESS
        level -= 1
    size = 1 << shift
    dirty = bool(entry & D) or bool(update is not None and access & WRITE)
    return Leaf(iova & -size, entry & ADDRESS & -size, size, _allowed(rights, rules, dirty=dirty))


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


def _allowed(rights: int, rules: Rules, *, dirty: bool) -> int:
    """The accesses that need no further walk; a write through a clean leaf does, to set D."""
    users = USERS if rights & US else 0
    privs = PRIVS
    if not rights & RW:
        users &= ~WRITES
        if rules.write_protect:
            privs &= ~WRITES
    result = users | privs
    if not rights & XD:
        result &= ~EXECS
    return result & (ALL if dirty else ~WRITES)
