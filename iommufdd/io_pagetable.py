"""IOVA to pages: mapping, unmapping, domains and accesses (io_pagetable.c).

A paging domain holds no table of its own: it translates through the areas here, which is what the kernel would have
written into it. Everything that can fail acquires through the caller's fault gate and leaves no trace.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .dmabuf import DmabufPages
from .errors import (
    EADDRINUSE,
    EBUSY,
    EDEADLOCK,
    EINVAL,
    ENOENT,
    ENOMEM,
    ENXIO,
    EOPNOTSUPP,
    EOVERFLOW,
    EPERM,
    IommufdError,
)
from .iommu.ops import Extent
from .iova import HPAGE_SIZE, Area, IovaSpace, Piece
from .user import PAGE_SHIFT, PAGE_SIZE, ULONG_MAX, Caller, Gate, PageRun

if TYPE_CHECKING:
    from .access import Access
    from .iommu.ops import Domain


class IoPagetable(IovaSpace):
    """struct io_pagetable: the IOVA space of one IOAS."""

    def __init__(self) -> None:
        super().__init__()
        self.domains: list[Domain] = []
        self.accesses: list[Access | None] = []  # by access_list id; freed ids are None
        self.disable_large_pages = False
        self._last_extent: Extent | None = None  # the one found last, while no area goes

    # ---- mapping ----

    def map_pages(
        self, caller: Caller, pieces: list[Piece], length: int, iova: int | None, *, readable: bool, writable: bool
    ) -> int:
        """Map pieces one after the other at iova, or where there is room; the IOVA chosen (iopt_map_pages).

        Takes over the references of the pieces, also on failure.
        """
        areas: list[Area] = []
        try:
            iova = self._insert_areas(caller, areas, pieces, length, iova, readable=readable, writable=writable)
            if self.domains:
                for area in areas:
                    _fill(caller, area)
                    self._check_entries(area)
        except IommufdError:
            self._last_extent = None
            for area in areas:
                _unfill(area)
                self.areas.remove(area)
            for piece in pieces:
                piece.pages.put()
            raise
        return iova

    def _insert_areas(
        self, caller: Caller, areas: list[Area], pieces: list[Piece], length: int, iova: int | None,
        *, readable: bool, writable: bool,
    ) -> int:  # fmt: skip
        """iopt_alloc_area_pages(): areas collects what has been inserted."""
        if caller.gate.watching:
            for _ in pieces:
                caller.gate(Gate.MEMORY)
        if length & (self.iova_alignment - 1) or not length:
            raise EINVAL(f"length {length:#x} is not a multiple of {self.iova_alignment:#x}")
        if iova is None:
            iova = self.alloc_iova(pieces[0].start_byte + pieces[0].pages.start, length)
        else:
            self.check_iova(iova, length)
        at = iova
        for piece in pieces:
            if writable and not piece.pages.writable:
                raise EPERM("these pages were mapped without IOMMU_IOAS_MAP_WRITEABLE")
            if piece.start_byte % PAGE_SIZE & (self.iova_alignment - 1):
                raise EINVAL(f"the memory's offset in its page is not a multiple of {self.iova_alignment:#x}")
            area = Area(at, piece, readable=readable, writable=writable)
            self.areas.insert(area)
            if isinstance(piece.pages, DmabufPages):
                piece.pages.shown_in.add(self)
            areas.append(area)
            at += piece.length
        return iova

    def get_pages(self, caller: Caller, iova: int, length: int) -> list[Piece]:
        """The pages behind [iova, iova + length), each with a reference (iopt_get_pages). EINVAL, EOVERFLOW, ENOENT."""
        if not length:
            raise EINVAL("length is 0")
        last = iova + length - 1
        if last > ULONG_MAX:
            raise EOVERFLOW("iova + length wraps")
        pieces: list[Piece] = []
        try:
            for area, lo, hi in self.contig(iova, last):
                caller.gate(Gate.MEMORY)
                pieces.append(Piece(area.pages.get(), area.byte(lo), hi - lo + 1))
        except IommufdError:
            for piece in pieces:
                piece.pages.put()
            raise
        return pieces

    # ---- unmapping ----

    def unmap(self, start: int, last: int) -> tuple[int, IommufdError | None]:
        """Remove the areas within [start, last]; (bytes removed, what stopped it) (iopt_unmap_iova_range).

        EBUSY, ENOENT (an area reaches over the edge), EDEADLOCK. Areas before the offending one are gone by then.
        """
        unmapped = 0
        tries = 0
        while (area := self.areas.first(start, last)) is not None:
            if (error := _unmap_refusal(area, start, last)) is not None:
                return unmapped, error
            if area.iova != start:
                tries = 0
            if area.num_accesses:
                start = area.iova
                area.prevent_access = True
                self._notify_unmap(area)
                tries += 1
                if tries > 100:
                    return unmapped, EDEADLOCK(f"an access does not let go of iova {area.iova:#x}..{area.last:#x}")
                continue
            self._remove_area(area)
            unmapped += area.length
            if area.last >= last:
                break
            start = area.last + 1
        return unmapped, None

    def _remove_area(self, area: Area) -> None:
        self._last_extent = None
        self.areas.remove(area)
        self.reopened(area.iova)
        if area.filled:
            for domain in self.domains:
                domain.unmapped(area.iova, area.last)
            area.pages.unfill(*area.indices())
        area.pages.put()

    def pages_revoked(self, pages: DmabufPages) -> None:
        """Flush them from the domains that had them."""
        for area in self.areas:
            if area.pages is pages and area.filled:
                for domain in self.domains:
                    domain.unmapped(area.iova, area.last)

    def _notify_unmap(self, area: Area) -> None:
        """iommufd_access_notify_unmap()"""
        for access in list(self.accesses):
            if access is not None and access.unmap is not None:
                access.unmap(area.iova, area.length)

    def cut(self, caller: Caller, iovas: list[int]) -> None:
        """Split areas behind each iova, for VFIO's sake (iopt_cut_iova)."""
        for iova in iovas:
            area = self.areas.first(iova, iova)
            if area is not None:
                self._split(caller, area, iova)

    def _split(self, caller: Caller, area: Area, iova: int) -> None:
        """iopt_area_split(): EBUSY, EOPNOTSUPP, EINVAL, ENOMEM."""
        if iova in (area.iova, area.last):
            return  # quirk: a cut behind the first byte is not made either
        if area.prevent_access:
            raise EBUSY("the area is being unmapped")
        if isinstance(area.pages, DmabufPages):
            raise EOPNOTSUPP("a dma-buf mapping cannot be split")
        mask = self.iova_alignment - 1
        if (iova + 1) & mask or area.byte(iova + 1) & mask:
            raise EINVAL(f"a cut behind {iova:#x} is not aligned to {self.iova_alignment:#x}")
        caller.gate(Gate.MEMORY)
        caller.gate(Gate.MEMORY)
        if area.num_accesses:
            raise EINVAL("an access has pinned pages of the area")
        if area.filled and not self.disable_large_pages:
            raise EINVAL("a domain may have mapped the area with large pages")
        old_first, old_last = area.indices()
        left = Area(area.iova, Piece(area.pages, area.start_byte, iova - area.iova + 1),
                    readable=area.readable, writable=area.writable)  # fmt: skip
        right = Area(iova + 1, Piece(area.pages.get(), area.byte(iova + 1), area.last - iova),
                     readable=area.readable, writable=area.writable)  # fmt: skip
        self._last_extent = None
        self.areas.remove(area)
        for part in (left, right):
            part.filled = area.filled
            self.areas.insert(part)
        if area.filled and area.pages.use is not None:
            area.pages.use.add(*left.indices())
            area.pages.use.add(*right.indices())
            area.pages.use.remove(old_first, old_last)

    # ---- domains ----

    def add_domain(self, caller: Caller, domain: Domain) -> None:
        """Show every area in domain (iopt_table_add_domain). EINVAL, EADDRINUSE, ENOMEM, and pinning's errors."""
        alignment = max(domain.pgsize_bitmap & -domain.pgsize_bitmap, self.iova_alignment)
        if alignment > PAGE_SIZE:
            raise EINVAL(f"the domain's smallest page is {alignment:#x}")
        if alignment != self.iova_alignment:
            self._check_alignment(alignment)
        try:
            if domain.aperture_start != 0:
                self.reserve(caller, 0, domain.aperture_start - 1, domain)
            if domain.aperture_end != ULONG_MAX:
                self.reserve(caller, domain.aperture_end + 1, ULONG_MAX, domain)
            caller.gate(Gate.MEMORY)
            fresh = not self.domains
            if fresh:
                self._fill_all(caller)
            if domain.refuses_read_only and not all(area.writable for area in self.areas):
                if fresh:
                    self._unfill_all()
                raise EINVAL("a nesting parent has no read-only entries (VT-d erratum 772415): an area is read-only")
        except IommufdError:
            self.remove_reserved(domain)
            raise
        self.iova_alignment = alignment
        self.domains.append(domain)
        domain.translation = self

    def remove_domain(self, domain: Domain) -> None:
        """iopt_table_remove_domain()"""
        self.domains.remove(domain)
        domain.translation = None
        if not self.domains:
            self._unfill_all()
        self.remove_reserved(domain)
        self._calculate_alignment()

    def _fill_all(self, caller: Caller) -> None:
        """iopt_fill_domain(), for the first domain; the others find the pages pinned."""
        try:
            for area in self.areas:
                _fill(caller, area)
        except IommufdError:
            self._unfill_all()
            raise

    def _unfill_all(self) -> None:
        self._last_extent = None
        for area in self.areas:
            _unfill(area)

    def _check_entries(self, area: Area) -> None:
        """What the table of a domain refuses: EINVAL, ENXIO (pt_iommu_map_range).

        quirk: only all areas together were checked for alignment, the table refuses a part.
        """
        if not area.writable and any(domain.refuses_read_only for domain in self.domains):
            raise EINVAL("a nesting parent has no read-only entries (VT-d erratum 772415): map with WRITEABLE")
        least = max(domain.pgsize_bitmap & -domain.pgsize_bitmap for domain in self.domains)
        if (area.iova | area.last + 1) & (least - 1) and not area.pages.revoked:
            raise ENXIO(f"no table entry can map iova {area.iova:#x}..{area.last:#x}")

    def translate(self, iova: int) -> tuple[PageRun, int, bool, bool] | None:
        """What a domain has at iova: (page, byte in it, readable, writable)."""
        area = self.areas.first(iova, iova)
        if area is None or not area.filled:
            return None
        byte = area.byte(iova)
        page = area.pages.page(byte >> PAGE_SHIFT)
        return None if page is None else (page, byte % PAGE_SIZE, area.readable, area.writable)

    def extent(self, iova: int) -> Extent | None:
        """The stretch around iova that is contiguous in memory, as wide as the area and the pinned run allow."""
        last = self._last_extent
        if last is not None and last.first <= iova <= last.last:
            return last
        area = self.areas.first(iova, iova)
        if area is None or not area.filled:
            return None
        found = area.pages.run_at(area.byte(iova) >> PAGE_SHIFT)
        if found is None:
            return None
        index, run = found
        base = area.iova - area.start_byte  # the IOVA of byte 0 of the pages; may be negative
        first = max(area.iova, base + (index << PAGE_SHIFT))
        last_iova = min(area.last, base + (index + run.npages << PAGE_SHIFT) - 1)
        pos = (run.page - index << PAGE_SHIFT) + first - base
        extent = Extent(first, last_iova, run.file, pos, area.readable, area.writable)
        if not isinstance(area.pages, DmabufPages):  # which can be revoked
            self._last_extent = extent
        return extent

    def entry(self, iova: int, pgsizes: int) -> tuple[int, int] | None:
        """The table entry around iova: (first IOVA, bytes).

        Memory is taken to be scattered in pages, as the kernel's mostly is, but for huge pages. An entry is the
        largest of pgsizes that such memory and its phase to IOVA allow.
        """
        area = self.areas.first(iova, iova)
        if area is None or not area.filled:
            return None
        run = area.pages.page(area.byte(iova) >> PAGE_SHIFT)
        if run is None:
            return None
        huge = run.file.compound and not self.disable_large_pages
        phase = area.iova - (area.pages.start + area.start_byte)
        sizes = pgsizes & (2 * (HPAGE_SIZE if huge else PAGE_SIZE) - 1)
        while sizes:
            size = 1 << sizes.bit_length() - 1
            first = iova & -size
            if not phase % size and area.iova <= first and first + size - 1 <= area.last:
                return first, size
            sizes ^= size
        return None

    # ---- alignment ----

    def _check_alignment(self, alignment: int) -> None:
        """iopt_check_iova_alignment(): EADDRINUSE when an area does not conform."""
        mask = alignment - 1
        for area in self.areas:
            if (area.iova | area.length | area.start_byte % PAGE_SIZE) & mask:
                raise EADDRINUSE(f"the area {area.iova:#x}..{area.last:#x} is not aligned to {alignment:#x}")

    def _calculate_alignment(self) -> None:
        """iopt_calculate_iova_alignment(): EADDRINUSE, only when it grows."""
        alignment = PAGE_SIZE if self.disable_large_pages else 1
        for domain in self.domains:
            alignment = max(alignment, domain.pgsize_bitmap & -domain.pgsize_bitmap)
        for access in self.accesses:
            if access is not None:
                alignment = max(alignment, access.iova_alignment)
        if alignment > self.iova_alignment:
            self._check_alignment(alignment)
        self.iova_alignment = alignment

    def enable_large_pages(self) -> None:
        """iopt_enable_large_pages()"""
        self.disable_large_pages = False
        self._calculate_alignment()

    def do_disable_large_pages(self) -> None:
        """iopt_disable_large_pages(): EINVAL when domains have pages already, EADDRINUSE."""
        if self.disable_large_pages:
            return
        if self.domains and len(self.areas):
            raise EINVAL("domains already have pages mapped in them")
        self.disable_large_pages = True
        try:
            self._calculate_alignment()
        except EADDRINUSE:
            self.disable_large_pages = False
            raise

    # ---- accesses ----

    def add_access(self, caller: Caller, access: Access) -> None:
        """iopt_add_access(): ENOMEM, EADDRINUSE."""
        caller.gate(Gate.MEMORY)
        if None in self.accesses:
            slot = self.accesses.index(None)
        elif len(self.accesses) < 2**16:
            slot = len(self.accesses)
            self.accesses.append(None)
        else:
            raise ENOMEM("the IOAS has 65,536 accesses")
        self.accesses[slot] = access
        try:
            self._calculate_alignment()
        except EADDRINUSE:
            self.accesses[slot] = None
            raise

    def remove_access(self, access: Access) -> None:
        """iopt_remove_access()"""
        self.accesses[self.accesses.index(access)] = None
        self._calculate_alignment()


def _fill(caller: Caller, area: Area) -> None:
    """Pin an area's pages, for domains to show them (iopt_area_fill_domain)."""
    area.pages.fill(caller, *area.indices())
    area.filled = True
    if not area.readable and not area.writable:
        _unfill(area)
        raise EINVAL("a domain maps nothing that is neither readable nor writable")  # VFIO_IOMMU_MAP_DMA allows it


def _unfill(area: Area) -> None:
    if area.filled:
        area.filled = False
        area.pages.unfill(*area.indices())


def _unmap_refusal(area: Area, start: int, last: int) -> IommufdError | None:
    if area.num_locks:
        return EBUSY(f"iova {area.iova:#x}..{area.last:#x} is locked by a hardware queue")
    if area.iova < start or area.last > last:
        return ENOENT(f"the range cuts the area {area.iova:#x}..{area.last:#x}")
    return None
