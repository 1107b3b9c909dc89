"""The ARM LPAE table format (VMSAv8-64: DDI0487 D8; io-pgtable-arm.c), as SMMUv3 walks it: stages 1 and 2.

Levels are counted as everywhere here, in `Start`, `Step` and `TranslationFault`: 1 maps the smallest pages. ARM counts
from the other end; `arm_level()` converts for people. SMMUv3 reports no levels, and these for each `Why`:

    NOT_PRESENT, RESERVED, ADDRESS_SIZE    F_TRANSLATION
    OUTPUT_SIZE                            F_ADDR_SIZE
    ACCESS_FLAG                            F_ACCESS
    USER, READ, WRITE, EXECUTE             F_PERMISSION

EXEC is an instruction fetch: it needs no right to read unless READ is set too. Security states, memory attributes and
nG are not looked at. Not walked, and not to be offered in ID registers: 52 bit addresses in 4 and 16 KiB tables (DS),
small tables (STT), E0PD, EPAN, permission indirection, big-endian tables.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from iommufd_uapi.smmuv3 import Tg0, Tg1, output_bits

from .walk import EXEC, PRIV, READ, WRITE, WRITES, Fetch, Leaf, RawStep, TranslationFault, Update, Why

if TYPE_CHECKING:
    from iommufd_uapi.smmuv3 import Cd, Ste

AP1 = 1 << 6  # stage 1: unprivileged access
AP2 = 1 << 7  # stage 1: read-only
S2R = 1 << 6  # stage 2: readable
S2W = 1 << 7  # stage 2: writable
AF = 1 << 10
DBM = 1 << 51  # with HD: read-only means clean
CONTIGUOUS = 1 << 52
PXN = 1 << 53
XN = 1 << 54
PXN_TABLE = 1 << 59
XN_TABLE = 1 << 60
AP_TABLE_PRIV = 1 << 61  # no unprivileged access below
AP_TABLE_RO = 1 << 62  # no writes below
RIGHTS = AP1 | AP2 | DBM | PXN | XN  # of a leaf
HIERARCHY = PXN_TABLE | XN_TABLE | AP_TABLE_PRIV | AP_TABLE_RO  # of tables

FLAGS = ((1, "V"), (2, "T"), (1 << 5, "NS"), (AP1, "AP1"), (AP2, "AP2"), (AF, "AF"), (1 << 11, "nG"), (DBM, "DBM"),
         (CONTIGUOUS, "C"), (PXN, "PXN"), (XN, "XN"), (PXN_TABLE, "PXNTable"), (XN_TABLE, "XNTable"),
         (AP_TABLE_PRIV, "APTable0"), (AP_TABLE_RO, "APTable1"), (1 << 63, "NSTable"))  # fmt: skip

BLOCKS = {12: {2, 3}, 14: {2}, 16: {2}}  # levels at which a block may stand, by granule; 4 TiB ones need pa52
CONTIGUITY = {12: {1: 4, 2: 4, 3: 4}, 14: {1: 7, 2: 5}, 16: {1: 5, 2: 5}}  # log2 of the entries that the hint joins
_TG0: dict[int, int] = {Tg0.K4: 12, Tg0.K16: 14, Tg0.K64: 16}
_TG1: dict[int, int] = {Tg1.K4: 12, Tg1.K16: 14, Tg1.K64: 16}
_HD, _WXN, _PAN, _STAGE2, _XNX = 1, 2, 4, 8, 16  # what rights depend on, besides the entry
_new = tuple.__new__  # makes a NamedTuple in half the time


def arm_level(level: int) -> int:
    """ARM's number of a level: 3 maps the smallest pages."""
    return 4 - level


@dataclass(slots=True, eq=False)
class Rules:
    """How to walk one half of a context's addresses. What the bits of CD or STE say; the rest is worked out once."""

    granule: int = 12  # log2 of it: 12, 14, 16
    tsz: int = 16  # addresses have 64 - tsz bits
    output: int = 48  # bits of an output address: the smaller of IPS and OAS
    upper: bool = False  # TTB1's half
    disabled: bool = False  # EPD
    tbi: bool = False  # TBI: bits 63:56 are not looked at
    pa52: bool = False  # OAS is 52: 64 KiB entries have address bits 51:48, and blocks of 4 TiB
    ha: bool = False  # hardware sets AF
    hd: bool = False  # hardware marks pages dirty; nothing without ha
    haft: bool = False  # hardware sets AF in tables
    affd: bool = False  # without ha, a clear AF is no fault
    had: bool = False  # attributes of tables are ignored
    wxn: bool = False  # what can be written cannot be executed
    pan: bool = False  # privileged data accesses keep off unprivileged pages
    stage: int = 1
    start_level: int = 0  # stage 2: SL0; 0: as few as the input size needs
    xnx: bool = False  # stage 2: XN has two bits

    bits: int = field(init=False)
    levels: int = field(init=False)
    mode: int = field(init=False)
    address: int = field(init=False)  # bits of an entry that are an address
    beyond: int = field(init=False)  # bits of an address that are too many
    high: bool = field(init=False)  # bits 15:12 are 51:48
    hierarchy: int = field(init=False)  # bits of a table that count
    blocks: set[int] = field(init=False)
    compared: int = field(init=False)  # the address above `bits`, as far as it is looked at
    top: int = field(init=False)  # its right value
    known: dict[int, int] = field(init=False)  # accesses that need no further walk, by RIGHTS of a page
    quick: tuple[tuple[int, int, int], ...] = field(init=False)  # for _four_levels(), by access; () if not for it

    def __post_init__(self) -> None:
        self.bits = 64 - self.tsz
        stride = self.granule - 3
        self.levels = self.start_level or max(-((self.granule - self.bits) // stride), 1)
        self.mode = (self.hd and self.ha) * _HD | self.wxn * _WXN | self.pan * _PAN
        self.mode |= (self.stage == 2) * _STAGE2 | self.xnx * _XNX
        self.address = (1 << 48) - (1 << self.granule)
        self.beyond = (1 << 52) - (1 << self.output)
        self.high = self.pa52 and self.granule == 16
        self.hierarchy = 0 if self.had else HIERARCHY  # stage 2 never looks at them
        self.blocks = BLOCKS[self.granule] | ({3} if self.high else set())
        self.compared = (1 << max((56 if self.tbi else 64) - self.bits, 0)) - 1
        self.top = self.compared if self.upper else 0
        self.known = {}
        self.quick = ()
        if self.granule == 12 and self.bits == 48 and not (self.mode & ~_HD or self.haft or self.disabled):
            self.quick = tuple(_quick(access, self.beyond, self.hierarchy) for access in range(16))


class Start(NamedTuple):
    """Where a walk begins: at the root, or at a table that a paging-structure cache has kept."""

    table: int
    level: int
    hierarchy: int  # attributes of the tables above, gathered: any that is set holds


def root(table: int, rules: Rules) -> Start:
    """The start of a full walk. The table's address is cut to its alignment, as hardware does (IHI0070 5.4, TTB0)."""
    entries = rules.bits - rules.granule - (rules.granule - 3) * (rules.levels - 1)
    align = max(8 << max(entries, 0), 64 if rules.output == 52 else 8)
    return Start(table & (1 << 52) - align, rules.levels, 0)


def below(start: Start, entry: int, rules: Rules) -> Start:
    """Where a walk goes on after a table entry: what a paging-structure cache keeps."""
    return Start(_address(entry, rules), start.level - 1, start.hierarchy | entry & rules.hierarchy)


def stage1(cd: Cd, oas: int) -> tuple[Rules, Rules]:
    """The rules of TTB0's and TTB1's half, of a CD that is not bad_stage1(). Address bit 55 chooses. oas: bits."""
    output = min(output_bits(cd.ips), oas)

    def half(tg: int | None, tsz: int, epd: int, tbi: int, had: int, *, upper: bool) -> Rules:
        if epd or tg is None:
            return Rules(upper=upper, disabled=True)
        return Rules(granule=tg, tsz=tsz, output=output, upper=upper, tbi=bool(tbi), pa52=oas == 52, ha=bool(cd.ha),
                     hd=bool(cd.hd), haft=bool(cd.haft), affd=bool(cd.affd), had=bool(had), wxn=bool(cd.wxn),
                     pan=bool(cd.pan))  # fmt: skip

    return (
        half(_TG0.get(cd.tg0), cd.t0sz, cd.epd0, cd.tbi0, cd.had0, upper=False),
        half(_TG1.get(cd.tg1), cd.t1sz, cd.epd1, cd.tbi1, cd.had1, upper=True),
    )


def bad_stage1(cd: Cd, oas: int, *, granules: tuple[int, ...] = (12, 14, 16), va52: bool = False) -> bool:
    """TxSZ, TGx or TTBx of a half in use is ILLEGAL: C_BAD_CD (IHI0070 5.4). The rest of the CD is for the model."""
    for tg, tsz, epd, ttb in (
        (_TG0.get(cd.tg0), cd.t0sz, cd.epd0, cd.ttb0),
        (_TG1.get(cd.tg1), cd.t1sz, cd.epd1, cd.ttb1),
    ):
        least = 12 if va52 and tg == 16 else 16
        reach = min(output_bits(cd.ips), oas, 52 if tg == 16 else 48)
        if not epd and (tg not in granules or not least <= tsz <= 39 or ttb >> reach):
            return True
    return False


def stage2(ste: Ste, oas: int, *, xnx: bool = False) -> Rules:
    """The rules of an STE's second stage in bytes; its S2TG is not reserved."""
    granule = _TG0[ste.s2tg]
    level = ste.s2sl0 + (2 if granule == 12 else 1)  # SL0 counts from another level with 4 KiB
    return Rules(granule=granule, tsz=ste.s2t0sz, output=min(output_bits(ste.s2ps), oas), pa52=oas == 52,
                 ha=bool(ste.s2ha), hd=bool(ste.s2hd), affd=bool(ste.s2affd), stage=2, start_level=level,
                 xnx=xnx)  # fmt: skip


def walk(
    fetch: Fetch, update: Update | None, start: Start, rules: Rules, ia: int, access: int, steps: list[RawStep]
) -> Leaf:
    """Translate ia. Appends every entry used to `steps`, the one that stopped it included. TranslationFault.

    Order of tests: the address, then in each entry its kind, output size, access flag, rights (DDI0487 D8.15.3).
    With TBI the tag stays in Leaf.first. With the contiguous hint Leaf is all that the hint joins; whether the other
    entries agree is not looked at.
    """
    if rules.quick and start.level == 4 and ia >> rules.bits & rules.compared == rules.top:
        try:
            found = _four_levels(fetch, start, rules, ia, access, steps)
        except TranslationFault:
            found = None  # once more, step by step: the steps tell the fault's level
        if found is not None:
            return found
    _check_input(rules, ia)
    table, level, hierarchy = start
    granule = rules.granule
    va = ia & (1 << rules.bits) - 1
    index = -8  # the first table may be several in a row
    while True:
        if level < rules.levels:
            index = (1 << granule) - 8
        shift = granule + (granule - 3) * (level - 1)
        address = table | va >> shift - 3 & index
        entry = fetch(address)
        steps.append((rules.stage, level, address, entry))
        if entry & 3 != 3 or level == 1:
            break
        table = _address(entry, rules)
        if table & rules.beyond:
            raise TranslationFault(Why.OUTPUT_SIZE, stage=rules.stage, level=level, addr=ia)
        if rules.haft and rules.ha and update is not None and not entry & AF:
            update(address, entry, entry | AF)
        hierarchy |= entry
        level -= 1
    size = 1 << shift
    out = _address(entry, rules) & -size
    rights = entry & RIGHTS | hierarchy & rules.hierarchy
    granted, clean = _rights(rights, rules.mode)
    why = _check_leaf(rules, level, entry, out) or (None if granted >> access & 1 else _denied(granted, access, rules))
    if why is not None:
        raise TranslationFault(why, stage=rules.stage, level=level, addr=ia)
    if update is not None and _mark(update, address, entry, clean and access & WRITE, rules):
        clean = False
    if entry & CONTIGUOUS:
        size = _contiguous(rules, level, shift)
    return Leaf(ia & -size, out & -size, size, granted & ~WRITES if clean else granted)


def _four_levels(fetch: Fetch, start: Start, rules: Rules, ia: int, access: int, steps: list[RawStep]) -> Leaf | None:
    """The commonest walk unrolled: from the root to a 4 KiB page that lets the access pass and needs no update."""
    ok, mask, needed = rules.quick[access]
    a0 = start.table | ia >> 36 & 0xFF8
    e0 = fetch(a0)
    a1 = e0 & 0xFFFF_FFFF_F000 | ia >> 27 & 0xFF8
    if e0 & ok != 3:
        return None
    e1 = fetch(a1)
    a2 = e1 & 0xFFFF_FFFF_F000 | ia >> 18 & 0xFF8
    if e1 & ok != 3:
        return None
    e2 = fetch(a2)
    a3 = e2 & 0xFFFF_FFFF_F000 | ia >> 9 & 0xFF8
    if e2 & ok != 3:
        return None
    e3 = fetch(a3)
    if e3 & mask != needed:
        return None
    stage = rules.stage
    steps += (stage, 4, a0, e0), (stage, 3, a1, e1), (stage, 2, a2, e2), (stage, 1, a3, e3)
    allowed = rules.known.get(e3 & RIGHTS)
    if allowed is None:
        granted, clean = _rights(e3 & RIGHTS, rules.mode)
        allowed = rules.known[e3 & RIGHTS] = granted & ~WRITES if clean else granted
    return _new(Leaf, (ia & -4096, e3 & 0xFFFF_FFFF_F000, 4096, allowed))


@functools.cache
def _quick(access: int, beyond: int, hierarchy: int) -> tuple[int, int, int]:
    """(bits of a table that must be 3, bits of a page that matter, their value): all else is told slowly."""
    mask = 3 | AF | CONTIGUOUS | beyond & (1 << 48) - 1
    needed = 3 | AF
    if not access & PRIV and access & (READ | WRITE):
        mask |= AP1
        needed |= AP1
    if access & WRITE:
        mask |= AP2
    if access & EXEC:
        mask |= (PXN | AP1) if access & PRIV else XN
    return 3 | beyond & (1 << 48) - 1 | hierarchy, mask, needed


def _check_input(rules: Rules, ia: int) -> None:
    """The address belongs to this half, and the half is walked. TranslationFault."""
    if rules.disabled:
        raise TranslationFault(Why.NOT_PRESENT, stage=rules.stage, level=rules.levels, addr=ia)
    if ia >> rules.bits & rules.compared != rules.top:
        raise TranslationFault(Why.ADDRESS_SIZE, stage=rules.stage, level=rules.levels, addr=ia)


def _address(entry: int, rules: Rules) -> int:
    """The address in an entry."""
    address = entry & rules.address
    return address | (entry & 0xF000) << 36 if rules.high else address


def _check_leaf(rules: Rules, level: int, entry: int, out: int) -> Why | None:
    """What is wrong with a leaf, whoever asks."""
    if not entry & 1:
        return Why.NOT_PRESENT
    if level not in rules.blocks if level > 1 else not entry & 2:
        return Why.RESERVED
    if out & rules.beyond:
        return Why.OUTPUT_SIZE
    if not (entry & AF or rules.ha or rules.affd):
        return Why.ACCESS_FLAG
    return None


def _denied(granted: int, access: int, rules: Rules) -> Why:
    """Which right is missing."""
    privileged = access & PRIV
    readable = granted >> (READ | privileged) & 1
    if rules.stage == 1 and not privileged and access & (READ | WRITE) and not readable:
        return Why.USER
    if access & READ and not readable:
        return Why.READ
    if access & WRITE and not granted >> (WRITE | privileged) & 1:
        return Why.WRITE
    return Why.EXECUTE


def _mark(update: Update, address: int, entry: int, dirty: int, rules: Rules) -> bool:
    """Set AF, and what makes a page dirty. True if the page is dirty now."""
    new = entry | AF if rules.ha else entry
    if dirty:
        new = new | S2W if rules.stage == 2 else new & ~AP2
    if new != entry:
        update(address, entry, new)
    return bool(dirty)


def _contiguous(rules: Rules, level: int, shift: int) -> int:
    """The size that the hint makes of a leaf; no larger than the half."""
    joined = shift + CONTIGUITY[rules.granule].get(level, 0)
    return 1 << (joined if joined <= rules.bits else shift)


@functools.cache
def _rights(bits: int, mode: int) -> tuple[int, bool]:
    """(set of accesses allowed, a write must first make the page dirty), of RIGHTS and HIERARCHY bits."""
    if mode & _STAGE2:
        return _stage2_rights(bits, mode)
    clean = bool(mode & _HD and bits & DBM and bits & AP2)
    user = bool(bits & AP1) and not bits & AP_TABLE_PRIV
    write = (clean or not bits & AP2) and not bits & AP_TABLE_RO
    user_x = not bits & (XN | XN_TABLE)
    priv_x = not bits & (PXN | PXN_TABLE) and not (user and write)
    if mode & _WXN:
        user_x = user_x and not (user and write)
        priv_x = priv_x and not write
    data = not (mode & _PAN and user)
    granted = _set(user, user and write, user_x, 0) | _set(data, data and write, priv_x, PRIV)
    return granted, clean and write


def _stage2_rights(bits: int, mode: int) -> tuple[int, bool]:
    """As _rights(); XN is bit 54, or with XNX in bits 54:53: 0 all, 1 unprivileged, 2 none, 3 privileged."""
    clean = bool(mode & _HD and bits & DBM and not bits & S2W)
    read, write = bool(bits & S2R), bool(bits & S2W) or clean
    user_x = priv_x = not bits & XN
    if mode & _XNX and bits & PXN:
        user_x, priv_x = priv_x, not priv_x
    return _set(read, write, user_x, 0) | _set(read, write, priv_x, PRIV), clean


def _set(read: bool, write: bool, execute: bool, privileged: int) -> int:
    """The accesses of one privilege that these rights allow."""
    missing = (0 if read else READ) | (0 if write else WRITE) | (0 if execute else EXEC)
    return sum(1 << (access | privileged) for access in range(8) if not access & missing)
