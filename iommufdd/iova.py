"""Which IOVA is taken, reserved, allowed or free, and choosing some of it (io_pagetable.c, upper half)."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from .errors import EADDRINUSE, EEXIST, EINVAL, ENOENT, ENOSPC, EOVERFLOW, IommufdError
from .spans import AreaTree, Span, SpanSet
from .user import PAGE_SHIFT, PAGE_SIZE, ULONG_MAX, Caller, Gate

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .iommu.ops import Device
    from .pages import Pages

HPAGE_SIZE = 2 << 20
KINDS = 64  # of searches whose progress is remembered


class Area:
    """struct iopt_area: [iova, last] shows pages from byte start_byte on."""

    __slots__ = ("filled", "iova", "last", "num_accesses", "num_locks", "pages", "prevent_access", "readable",
                 "start_byte", "writable")  # fmt: skip

    def __init__(self, iova: int, piece: Piece, *, readable: bool, writable: bool) -> None:
        self.iova = iova
        self.last = iova + piece.length - 1
        self.pages = piece.pages
        self.start_byte = piece.start_byte
        self.readable = readable
        self.writable = writable
        self.filled = False  # shown by the domains (storage_domain)
        self.prevent_access = False
        self.num_accesses = 0
        self.num_locks = 0

    @property
    def length(self) -> int:
        return self.last - self.iova + 1

    def byte(self, iova: int) -> int:
        """The byte of pages behind iova (iopt_area_start_byte)."""
        return iova - self.iova + self.start_byte

    def index(self, iova: int) -> int:
        """The page of pages behind iova (iopt_area_iova_to_index)."""
        return (iova - self.iova + self.start_byte) >> PAGE_SHIFT

    def indices(self) -> tuple[int, int]:
        """First and last page shown."""
        return self.start_byte >> PAGE_SHIFT, (self.start_byte + self.last - self.iova) >> PAGE_SHIFT


class Piece(NamedTuple):
    """struct iopt_pages_list: a stretch of pages on its way into an area; it owns one reference of pages."""

    pages: Pages
    start_byte: int
    length: int


class IovaSpace:
    """The trees of a struct io_pagetable: areas, reservations, and what is allowed for automatic IOVA."""

    def __init__(self) -> None:
        self.areas: AreaTree[Area] = AreaTree()
        self.reserved = SpanSet()
        self.allowed = SpanSet()
        self.iova_alignment = 1
        self._searched: dict[tuple[int, int, int], int] = {}  # where the next first fit of a kind cannot lie before

    def alloc_iova(self, addr: int, length: int) -> int:
        """First fit for length bytes, aligned as addr is (iopt_alloc_iova). EOVERFLOW, EINVAL, ENOSPC."""
        if length == 0 or length >= ULONG_MAX // 2:
            raise EOVERFLOW(f"no room for {length:#x} bytes")
        alignment = 1 << (length - 1).bit_length()
        if addr:
            alignment = min(alignment, addr & -addr)
        alignment = min(alignment, HPAGE_SIZE)  # quirk: capped at a huge page
        if alignment < self.iova_alignment:
            raise EINVAL(f"address {addr:#x} is not aligned to {self.iova_alignment:#x}")
        kind = (alignment, addr % PAGE_SIZE, length)
        floor = self._searched.get(kind, 0)
        everything = PAGE_SIZE, ULONG_MAX - PAGE_SIZE
        for lo, hi in self.allowed.merged(*everything) if self.allowed else [everything]:
            start = _fit(lo, hi, kind)
            if start is None or hi < floor:
                continue
            for hole_lo, hole_hi in self._holes(max(start, floor), hi):
                iova = _fit(hole_lo, hole_hi, kind)
                if iova is not None:
                    if not addr % PAGE_SIZE:  # an offset is OR-ed in: a hole that loses bytes may fit after all
                        if len(self._searched) >= KINDS:
                            self._searched.clear()
                        self._searched[kind] = hole_lo + alignment - 1 & ~(alignment - 1)
                    return iova
        raise ENOSPC(f"no hole of {length:#x} bytes aligned to {alignment:#x}")

    def _holes(self, start: int, last: int) -> Iterator[tuple[int, int]]:
        """Stretches of [start, last] with neither area nor reservation, ascending."""
        at = start
        for area in self.areas.touching(start, last):
            if at < area.iova:
                yield from self.reserved.holes(at, area.iova - 1)
            at = area.last + 1
        yield from self.reserved.holes(at, last)

    def reopened(self, iova: int) -> None:
        """An area at iova is gone: the hole that now holds it can be the first fit of any kind again."""
        if not self._searched:
            return
        before = self.areas.before(iova)
        hole = before.last + 1 if before is not None else 0
        for kind, floor in self._searched.items():
            if floor > hole:
                self._searched[kind] = hole

    def check_iova(self, iova: int, length: int) -> None:
        """iopt_check_iova(): EINVAL misaligned or reserved, EOVERFLOW, EEXIST."""
        if iova & (self.iova_alignment - 1):
            raise EINVAL(f"iova {iova:#x} is not aligned to {self.iova_alignment:#x}")
        last = iova + length - 1
        if last > ULONG_MAX:
            raise EOVERFLOW("iova + length wraps")
        if (used := self.reserved.first(iova, last)) is not None:
            raise EINVAL(f"iova {iova:#x}..{last:#x} touches the reserved {used[0]:#x}..{used[1]:#x}")
        if (area := self.areas.first(iova, last)) is not None:
            raise EEXIST(f"iova {iova:#x}..{last:#x} is mapped already at {area.iova:#x}..{area.last:#x}")

    def contig(self, iova: int, last: int) -> Iterator[tuple[Area, int, int]]:
        """Areas that cover [iova, last] without a gap, with the part each covers; ENOENT at a gap."""
        area = self.areas.first(iova, iova)
        while True:
            if area is None or area.iova > iova:
                raise ENOENT(f"iova {iova:#x} is not mapped")
            yield area, iova, min(last, area.last)
            if last <= area.last:
                return
            iova = area.last + 1
            area = self.areas.first(iova, iova)

    # ---- reserved and allowed ----

    def set_allowed(self, allowed: SpanSet) -> None:
        """iopt_set_allow_iova(): EADDRINUSE when it touches a reservation."""
        for span in allowed:
            if (clash := self.reserved.first(span.start, span.last)) is not None:
                raise EADDRINUSE(f"{span.start:#x}..{span.last:#x} touches the reserved {clash[0]:#x}..{clash[1]:#x}")
        self.allowed = allowed
        self._searched.clear()

    def reserve(self, caller: Caller, start: int, last: int, owner: object) -> None:
        """iopt_reserve_iova(): EADDRINUSE, ENOMEM."""
        if (area := self.areas.first(start, last)) is not None:
            raise EADDRINUSE(f"{start:#x}..{last:#x} must be reserved but {area.iova:#x}..{area.last:#x} is mapped")
        if (span := self.allowed.first(start, last)) is not None:
            raise EADDRINUSE(f"{start:#x}..{last:#x} must be reserved but {span[0]:#x}..{span[1]:#x} is allowed")
        caller.gate(Gate.MEMORY)
        self.reserved.add(Span(start, last, owner))

    def remove_reserved(self, owner: object) -> None:
        """iopt_remove_reserved_iova()"""
        self.reserved.drop_owner(owner)
        self._searched.clear()

    def enforce_dev_resv_regions(self, caller: Caller, dev: Device) -> None:
        """iopt_table_enforce_dev_resv_regions(): EINVAL, EADDRINUSE."""
        caller.gate(Gate.RESERVE)
        msi = sw_msi = 0
        try:
            for region in dev.resv_regions():
                if region.kind == "direct-relaxable":
                    continue
                msi += region.kind == "msi"
                sw_msi += region.kind == "sw-msi"
                self.reserve(caller, region.start, region.last, dev)
            if (sw_msi and msi) or sw_msi > 1:
                raise EINVAL("the device has more than one MSI window")
        except IommufdError:
            self.remove_reserved(dev)
            raise


def _fit(lo: int, hi: int, kind: tuple[int, int, int]) -> int | None:
    """The first place in [lo, hi] for (alignment, offset in page, length) (__alloc_iova_check_range)."""
    alignment, page_offset, length = kind
    start = lo + alignment - 1
    if start > ULONG_MAX:
        return None
    start = start & ~(alignment - 1) | page_offset
    if start >= hi or hi - start < length - 1:
        return None
    return start
