"""VT-d's second-stage table format (VT-d spec 9.8, generic_pt/fmt/vtdss.h), 3, 4 or 5 levels.

There is no present bit: an entry is present if it can be read or written. What a CPU's EPT keeps in the same places,
KVM's own marks included, is read here as the IOMMU reads it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from .walk import EXEC, READ, WRITE, WRITES, Leaf, RawStep, TranslationFault, Why, allowed

if TYPE_CHECKING:
    from .walk import Fetch, Update

R = 1 << 0
W = 1 << 1
PS = 1 << 7
A = 1 << 8
D = 1 << 9
SNP = 1 << 11
TM = 1 << 62
ADDRESS = 0x000F_FFFF_FFFF_F000

FLAGS = ((R, "R"), (W, "W"), (1 << 2, "X"), (1 << 6, "IPAT"), (PS, "PS"), (A, "A"), (D, "D"), (SNP, "SNP"),
         (TM, "TM"))  # fmt: skip


def names(entry: int) -> str:
    """The bits that are set, by name."""
    return " ".join(name for bit, name in FLAGS if entry & bit)


class Rules(NamedTuple):
    """What of the format the hardware and the PASID entry allow."""

    levels: int = 4
    pages_2m: bool = True  # CAP.SLLPS bit 0
    pages_1g: bool = True  # CAP.SLLPS bit 1
    haw: int = 52  # host address width: address bits above it are reserved
    snoop: bool = True  # ECAP.SC: else SNP is reserved
    transient: bool = True  # ECAP.DT: else TM is reserved
    access_dirty: bool = False  # PASID entry's SSADE: set A in all entries used, D in a leaf that is written


class Start(NamedTuple):
    """Where a walk begins: at the root, or at a table that a paging-structure cache has kept."""

    table: int
    level: int
    rights: int  # R and W, of all entries above


def root(table: int, rules: Rules) -> Start:
    """The start of a full walk."""
    return Start(table & ADDRESS, rules.levels, R | W)


def walk(
    fetch: Fetch, update: Update | None, start: Start, rules: Rules, ipa: int, access: int, steps: list[RawStep]
) -> Leaf:
    """Translate ipa. Appends every entry used to `steps`, the one that stopped it included.

    Order of tests in one entry: present, read, write, reserved bits (as in QEMU's intel_iommu.c).
    """
    table, level, rights = start
    if ipa >> 9 * rules.levels + 12:
        raise TranslationFault(Why.ADDRESS_SIZE, stage=2, level=rules.levels, addr=ipa)
    while True:
        address = table | ipa >> 9 * level & 0xFF8
        entry = fetch(address)
        steps.append((2, level, address, entry))
        rights &= entry
        leaf = level == 1 or bool(entry & PS)
        bad = _test(level, entry, rights, leaf, access, rules)
        if bad is not None:
            raise TranslationFault(bad, stage=2, level=level, addr=ipa)
        if rules.access_dirty and update is not None:
            new = entry | (A | D if leaf and access & WRITE else A)
            if new != entry:
                update(address, entry, new)
        if leaf:
            break
        table = entry & ADDRESS
        level -= 1
    size = 8 << 9 * level
    result = allowed(readable=bool(rights & R), writable=bool(rights & W))
    if rules.access_dirty and not (entry & D or (update is not None and access & WRITE)):
        result &= ~WRITES  # a later write must come back to set D
    return Leaf(ipa & -size, entry & ADDRESS & -size, size, result)


def admits(start: Start, access: int) -> bool:
    """A walk from here may reach a leaf: the rights gathered above do not refuse the access by themselves."""
    return _refused(start.rights, access) is None


def _test(level: int, entry: int, rights: int, leaf: bool, access: int, rules: Rules) -> Why | None:
    if not entry & (R | W):
        return Why.NOT_PRESENT
    return _refused(rights, access) or (Why.RESERVED if entry & _reserved(level, leaf, rules) else None)


def _refused(rights: int, access: int) -> Why | None:
    if access & (READ | EXEC) and not rights & R:
        return Why.READ
    return Why.WRITE if access & WRITE and not rights & W else None


def _reserved(level: int, leaf: bool, rules: Rules) -> int:
    """The bits that must be 0 in an entry."""
    bits = ADDRESS & -(1 << rules.haw)
    if not leaf:
        return bits | SNP | TM
    if not rules.snoop:
        bits |= SNP
    if not rules.transient:
        bits |= TM
    if level > 1:
        bits |= (8 << 9 * level) - 1 & ADDRESS
        if not (rules.pages_2m if level == 2 else level == 3 and rules.pages_1g):
            bits |= PS
    return bits
