"""What VT-d must answer, as simply as it can be said: no cache, every entry read from memory every time.

Written from the specification's tables (SEMANTICS 7.1 to 7.3); it shares no code and no constant with iommufdd.
Accesses are letters: r read, w write, x execute, p privileged.
"""

from __future__ import annotations

from typing import NamedTuple

from .tables import PASID_FIELDS

INTERRUPTS = range(0xFEE00000, 0xFEF00000)
RESERVED = [5, 10, *range(52, 64), *range(80, 87), 89, 90, 133, 134, *range(180, 192)]  # of a PASID-table entry
FIRST, SECOND, NESTED = 1, 2, 3


class Mapping(NamedTuple):
    """A stretch of the second stage: its address, bytes, where they lie in memory, and r and w."""

    start: int
    length: int
    pos: int
    rights: str


class Fault(Exception):
    """A fault reason."""

    def __init__(self, reason: int) -> None:
        super().__init__(hex(reason))
        self.reason = reason


class Unit(NamedTuple):
    """What the remapping hardware can do, and the second stage that it knows."""

    root: int  # address of the second stage's table
    width: int  # of the second stage, in bits
    haw: int = 52
    levels: tuple[int, ...] = (4, 5)
    pages_1g: bool = True


class Reference:
    """One PASID-table entry over memory. A translation stores A, D and EA to `memory`, and `dirty` pages."""

    def __init__(self, unit: Unit, memory: bytearray, maps: list[Mapping], entry: int) -> None:
        self.unit = unit
        self.memory = memory
        self.maps = maps
        self.entry = entry
        self.dirty: set[int] = set()
        self.stores = True  # False: nothing is stored, only `wants` is set
        self.wants = False  # a bit would have to be set

    def field(self, name: str) -> int:
        first, bits = PASID_FIELDS[name]
        value = self.entry >> first & (1 << bits) - 1
        return value << 12 if name in ("sspt", "fspt") else value

    def translate(self, iova: int, access: str, *, pasid: bool = True) -> int:
        """The byte of memory behind iova. Fault."""
        self.check_entry()
        if "x" in access and not self.field("ere"):
            raise Fault(0x5C)
        if "p" in access and not self.field("sre"):
            raise Fault(0x5D)
        if not pasid and iova in INTERRUPTS:
            raise Fault(0x87)
        if self.field("pgtt") == SECOND:
            return self.second(iova, access, beyond=0x84, refused=0x79)
        return self.second(self.first(iova, access), access, beyond=0x74, refused=0x79)

    def probe(self, iova: int, access: str, *, pasid: bool = True) -> int | None:
        """As translate(), storing nothing; None when that would fault, or need a bit to be set."""
        self.stores, self.wants = False, False
        try:
            found = self.translate(iova, access, pasid=pasid)
        except Fault:
            return None
        finally:
            self.stores = True
        return None if self.wants else found

    def check_entry(self) -> None:
        if not self.field("p"):
            raise Fault(0x59)
        if any(self.entry >> bit & 1 for bit in RESERVED):
            raise Fault(0x5A)
        pgtt = self.field("pgtt")
        if pgtt == 4:
            raise Fault(0x83)
        if pgtt not in (FIRST, SECOND, NESTED):
            raise Fault(0x5B)
        if pgtt in (SECOND, NESTED) and self.field("aw") not in [levels - 2 for levels in self.unit.levels]:
            raise Fault(0x5B)
        if pgtt in (FIRST, NESTED) and self.field("fspm") not in ((0, 1) if 5 in self.unit.levels else (0,)):
            raise Fault(0x5B)
        if pgtt == FIRST:
            raise Fault(0x73)  # the kernel has no first stage here
        if self.field("sspt") != self.unit.root:
            raise Fault(0x7B)

    def second(self, address: int, access: str, *, beyond: int, refused: int) -> int:
        """Through the second stage."""
        if address >> self.unit.width:
            raise Fault(beyond)
        found = [m for m in self.maps if m.start <= address < m.start + m.length]
        if not found:
            raise Fault(refused)
        if ("r" in access or "x" in access) and "r" not in found[0].rights:
            raise Fault(refused)
        if "w" in access and "w" not in found[0].rights:
            raise Fault(refused)
        if self.field("ssade") and "w" in access:
            if not self.field("pwsnp"):
                raise Fault(0x7C)
            if address >> 12 not in self.dirty:
                self.wants = True
            if self.stores:
                self.dirty.add(address >> 12)
        return found[0].pos + address - found[0].start

    def first(self, iova: int, access: str) -> int:
        """Through the guest's first stage: a guest physical address."""
        top = 4 + self.field("fspm")
        bits = 12 + 9 * top
        sign = iova >> bits - 1 & 1
        if iova >> bits != ((1 << 64 - bits) - 1 if sign else 0):
            raise Fault(0x80)
        table = self.field("fspt")
        writable = user = executable = True
        for level in range(top, 0, -1):
            below = 12 + 9 * (level - 1)
            address = table + 8 * (iova >> below & 511)
            at = self.second(address, "r", beyond=0x74, refused=0x75 if level == top else 0x76)
            raw = self.memory[at : at + 8]
            if len(raw) < 8:
                raise Fault(0x73 if level == top else 0x70)
            entry = int.from_bytes(raw, "little")
            if not entry >> 0 & 1:
                raise Fault(0x71)
            writable = writable and bool(entry >> 1 & 1)
            user = user and bool(entry >> 2 & 1)
            executable = executable and not entry >> 63 & 1
            self.check_rights(access, writable=writable, user=user, executable=executable)
            leaf = level == 1 or bool(entry >> 7 & 1)
            self.check_reserved(entry, level, leaf=leaf)
            self.mark(address, at, entry, dirty=leaf and "w" in access)
            pointer = entry >> 12 & (1 << 40) - 1
            if leaf:
                return (pointer << 12) >> below << below | iova & (1 << below) - 1
            table = pointer << 12
        raise AssertionError

    def check_rights(self, access: str, *, writable: bool, user: bool, executable: bool) -> None:
        if "p" not in access and not user:
            raise Fault(0x81)
        if "w" in access and not writable and ("p" not in access or self.field("wpe")):
            raise Fault(0x85)
        if "x" in access and not executable:
            raise Fault(0x82)

    def check_reserved(self, entry: int, level: int, *, leaf: bool) -> None:
        for bit in range(self.unit.haw, 52):
            if entry >> bit & 1:
                raise Fault(0x72)
        if leaf and level > 1:
            if level > 3 or (level == 3 and not self.unit.pages_1g):
                raise Fault(0x72)
            for bit in range(13, 21 if level == 2 else 30):
                if entry >> bit & 1:
                    raise Fault(0x72)

    def mark(self, address: int, at: int, entry: int, *, dirty: bool) -> None:
        """Store the bits that the walk sets."""
        new = entry | 1 << 5
        if dirty:
            new |= 1 << 6
        if self.field("eafe"):
            new |= 1 << 10
        if new == entry:
            return
        if not self.field("pwsnp"):
            raise Fault(0x90)
        self.wants = True
        self.second(address, "rw", beyond=0x74, refused=0x77)
        if self.stores:
            self.memory[at : at + 8] = new.to_bytes(8, "little")
