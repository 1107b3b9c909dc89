"""Who watches the hardware: trace, the sanitizer. A model tells all of its monitors, and pays nothing for none."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from .dma import Dma
    from .endpoint import Endpoint
    from .group import IopfGroup
    from .ops import Domain
    from .replace import Switch
    from .tlb import TlbEntry
    from .walk import TranslationFault


DEVICE_TLB = "device TLB"  # as Invalidation.cache has it
NOBODY = "none by a user: the driver flushes what it changes"


class Invalidation:
    """One command to a cache: what it covers and what it dropped."""

    def __init__(
        self, cache: str, granularity: str, tag: object, first: int = 0, last: int = 2**64 - 1, *, leaf: bool = False,
        user: bool = False, command: str = "",
    ) -> None:  # fmt: skip
        """cache: "IOTLB", "device TLB", "PASID cache", "CD cache". user: the client asked for it, not the driver.

        command: its name in the specification, where the hardware has commands of that kind.
        """
        self.cache = cache
        self.granularity = granularity  # "page", "PASID", "domain", "all"
        self.tag = tag
        self.first = first
        self.last = last
        self.leaf = leaf  # only leaf entries: tables that are kept stay
        self.user = user
        self.command = command
        self.dropped: list[TlbEntry] = []
        self.tables = 0  # entries of the paging-structure cache dropped

    def bare(self) -> Invalidation:
        """A copy to be kept: without the entries dropped, which keep the memory that they led to."""
        copy = Invalidation(self.cache, self.granularity, self.tag, self.first, self.last, leaf=self.leaf,
                            user=self.user, command=self.command)  # fmt: skip
        copy.tables = self.tables
        return copy

    def __str__(self) -> str:
        where = f" {self.first:#x}..{self.last:#x}" if self.granularity == "page" else ""
        command = f" ({self.command})" if self.command else ""
        leaf = " leaf" if self.leaf else ""
        return f"{self.cache} invalidation{command}, {self.granularity} {self.tag}{where}{leaf}"


class Due(NamedTuple):
    """An invalidation that is still missing before a translation is what memory says."""

    cache: str  # as Invalidation has it
    text: str  # as its sender writes it
    reach: frozenset[object]  # tags of the invalidations that will do
    leaf: bool = False  # one of leaf entries will do
    user: bool = True  # the client has to send it, not the driver


class Monitor:
    """Listens to one IOMMU and its devices; every method may be left out."""

    def used(self, dev: Endpoint, pasid: int | None, iova: int, access: int, entry: TlbEntry) -> None:
        """A DMA goes through a translation, cached or just made."""

    def moving(self, dev: Endpoint, pasid: int | None, iova: int, count: int, access: int, entry: TlbEntry) -> None:
        """A DMA is about to move `count` bytes from iova on through the translation that was told as used."""

    def fault(self, dev: Endpoint, pasid: int | None, iova: int, access: int, fault: TranslationFault) -> None:
        """A translation was refused and the hardware has recorded it."""

    def invalidated(self, what: Invalidation) -> None:
        """A cache was told to drop something."""

    def flushed(self, text: str) -> None:
        """A user's invalidation is done, "HWPT_INVALIDATE {addr 0x5000, npages 1} on hwpt 5".

        The commands that came of it were told as invalidated before.
        """

    def requested(self, dev: Endpoint, pasid: int | None, group: int, iova: int, access: int) -> None:
        """A device has asked for a page (PRI)."""

    def answered(self, dev: Endpoint, group: IopfGroup, code: int) -> None:
        """A page request has its response."""

    def switched(self, switch: Switch) -> None:
        """A (device, PASID) has got another domain."""

    def misread(self, domain: Domain, gpa: int, level: int, entry: int, why: str) -> None:
        """An entry of a VM's own table means another thing to the VM's CPU."""

    def finished(self, dma: Dma) -> None:
        """A DMA has ended, well or not."""

    def freed(self, domain: Domain) -> None:
        """A domain is gone, and with it the window in which a flush could still have come."""
