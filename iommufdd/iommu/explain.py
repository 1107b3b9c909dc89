"""A translation explained: every entry it uses, and what the caches have of it. Each model fills in its own words."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

from .walk import READ, WRITE, During

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .endpoint import Endpoint
    from .ops import Translation
    from .tlb import Space, TlbEntry
    from .walk import Step, TranslationFault


class Row(NamedTuple):
    """One entry that a walk uses, or one thing that a cache has."""

    what: str
    depth: int = 0  # how far to indent
    address: int | None = None  # of the entry
    words: tuple[int, ...] = ()  # the entry, raw
    bits: str = ""  # the entry, decoded
    leads: str = ""  # where it leads
    differs: str = ""  # of a cache: what memory says instead
    table: Translation | None = None  # a kernel's own table, which has no bytes: what it maps
    at: int = 0  # the address that is looked up in `table`


class Explanation(NamedTuple):
    """What a fresh walk does, and what a DMA would find cached."""

    rows: list[Row]
    entry: TlbEntry | None
    fault: TranslationFault | None
    cached: list[Row]


@runtime_checkable
class Explains(Protocol):
    """An IOMMU that can show its work; both have no side effects."""

    def explain(self, dev: Endpoint, pasid: int | None, iova: int, access: int) -> Explanation:
        """The translation of one address."""
        ...

    def step(self, step: Step) -> Row:
        """One entry that a walk has used."""
        ...


def words(row: Row) -> str:
    """A row with an entry in one line: "stage 1 level 4 at 0x100000: 0x0000000000101007 P RW US -> 0x101000"."""
    entry = " ".join(f"{word:#018x}" for word in row.words)
    parts = (f"{row.what} at {row.address:#x}:" if row.address is not None else f"{row.what}:", entry, row.bits,
             f"-> {row.leads}" if row.leads else "")  # fmt: skip
    return " ".join(part for part in parts if part)


def why(fault: TranslationFault, iova: int) -> str:
    """A fault in one line: "fault 0x71: a first-stage entry is not present, stage 1 level 2, iova 0x1000"."""
    text = f"fault {fault.code:#x}: {fault.name}"
    if fault.stage == 2 and fault.during is not During.ACCESS:
        text += f", stage 2 under stage 1 level {fault.level}"
    elif fault.stage:
        text += f", stage {fault.stage} level {fault.level}"
    text += f", iova {iova:#x}"
    if fault.stage == 2 and fault.addr != iova:
        text += f", guest address {fault.addr:#x}"
    return text


def rights(entry: TlbEntry) -> str:
    """What a user's request may do: "rw", "r-"."""
    return ("r" if entry.allowed >> READ & 1 else "-") + ("w" if entry.allowed >> WRITE & 1 else "-")


def where(entry: TlbEntry, iova: int) -> str:
    """Which memory a translation gives for iova."""
    return f"{entry.file} + {entry.pos + iova - entry.first:#x}"


def kernels(what: str, depth: int, table: Translation | None, at: int) -> Row:
    """A look into a table of the kernel's own, which has no bytes."""
    mapped = table is not None and table.extent(at) is not None
    return Row(what, depth, bits="" if mapped else "nothing is mapped", table=table, at=at)


def translations(
    what: str, space: Space, iova: int, access: int, entry: TlbEntry | None, fault: TranslationFault | None
) -> Iterator[Row]:
    """What a cache has for iova; entry, fault: what memory says."""
    for found in space.overlapping(iova, iova):
        differs = ""
        if not found.allowed >> access & 1:
            pass  # it is no answer to this access: a DMA walks
        elif entry is None:
            differs = f"memory: fault {fault.code:#x}, {fault.name}" if fault is not None else ""
        elif not found.same_as(entry):
            differs = f"memory: {where(entry, iova)}"
        bits = f"{found.first:#x}..{found.last:#x} {rights(found)}"
        yield Row(what, bits=bits, leads=where(found, iova), differs=differs)


def amount(size: int) -> str:
    """The size of a page: "4 KiB"."""
    for shift, unit in ((30, "GiB"), (20, "MiB")):
        if not size & (1 << shift) - 1:
            return f"{size >> shift} {unit}"
    return f"{size >> 10} KiB"
