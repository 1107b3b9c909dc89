"""Dma-bufs and their mapped pages, which an exporter can revoke at any time (pages.c: IOPT_ADDRESS_DMABUF)."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Protocol

from .errors import EINVAL, ENODEV, EPERM
from .pages import Account, Pages
from .user import PAGE_SHIFT, Caller, PageFile, PageRun

if TYPE_CHECKING:
    from collections.abc import Iterator


class Mapper(Protocol):
    """An IOVA space that shows pages."""

    def pages_revoked(self, pages: DmabufPages) -> None: ...


class DmabufPages(Pages):
    """Pages of a dma-buf (IOPT_ADDRESS_DMABUF): never accounted, never read by the CPU, gone when revoked."""

    __slots__ = ("dmabuf", "revoked", "shown_in")

    def __init__(self, caller: Caller, dmabuf: Dmabuf, start: int, length: int, *, writable: bool) -> None:
        """iopt_alloc_dmabuf_pages(): EINVAL beyond the end, ENODEV revoked."""
        if dmabuf.size() <= start + length - 1:
            raise EINVAL(f"the dma-buf has {dmabuf.size():#x} bytes, the range ends at {start + length:#x}")
        super().__init__(caller, start, length, writable=writable)
        if dmabuf.revoked:
            raise ENODEV("the dma-buf is revoked")
        self.account = Account.NONE
        self.revoked = False
        self.shown_in: weakref.WeakSet[Mapper] = weakref.WeakSet()
        self.dmabuf = dmabuf
        dmabuf.get()
        dmabuf.importers.append(self)

    def release(self) -> None:
        self.dmabuf.importers.remove(self)
        self.dmabuf.put()

    def resolve(self, caller: Caller, first: int, count: int, *, write: bool) -> list[PageRun]:
        return [PageRun(self.dmabuf, (self.start >> PAGE_SHIFT) + first, count)]

    def fill(self, caller: Caller, first: int, last: int) -> None:
        """Nothing to pin: phys is known from the import."""

    def unfill(self, first: int, last: int) -> None:
        """Nothing to unpin."""

    def run_at(self, index: int) -> tuple[int, PageRun] | None:
        return None if self.revoked else (0, PageRun(self.dmabuf, self.start >> PAGE_SHIFT, self.npages))

    def runs(self, first: int, last: int) -> Iterator[PageRun]:
        if not self.revoked:
            yield PageRun(self.dmabuf, (self.start >> PAGE_SHIFT) + first, last - first + 1)

    def add_access(self, caller: Caller, first: int, last: int, *, write: bool) -> None:
        if write and not self.writable:
            raise EPERM("these pages were mapped without IOMMU_IOAS_MAP_WRITEABLE")
        raise EINVAL("a dma-buf cannot be accessed by the CPU")

    def rw(self, caller: Caller, start_byte: int, data: bytearray, *, write: bool, slow: bool) -> None:
        if write and not self.writable:
            raise EPERM("these pages were mapped without IOMMU_IOAS_MAP_WRITEABLE")
        raise EINVAL("a dma-buf cannot be accessed by the CPU")

    def revoke(self) -> None:
        """iopt_revoke_notify(): the pages leave every domain, for good, and what these have cached of them too."""
        if not self.revoked:
            self.revoked = True
            for mapper in list(self.shown_in):
                mapper.pages_revoked(self)


class Dmabuf(PageFile):
    """struct dma_buf with an exporter that can revoke it."""

    revoked = False

    def __init__(self, size: int) -> None:
        self._size = size
        self.importers: list[DmabufPages] = []

    def size(self) -> int:
        return self._size

    def set_revoked(self, revoked: bool) -> None:
        """dma_buf_invalidate_mappings(), whichever way the exporter switched."""
        self.revoked = revoked
        for pages in self.importers:
            pages.revoke()
