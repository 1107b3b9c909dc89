"""Files of the selftest: an access that user space drives, and a dma-buf (selftest.c)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .access import Access
from .errors import EBADFD, ENOENT
from .objects import Holder
from .pages import Dmabuf
from .user import ULONG_MAX, Caller, File

if TYPE_CHECKING:
    from .context import Context
    from .ioas import Ioas


class SelftestAccess(File, Holder):
    """struct selftest_access: its file holds the access, and keeps the context alive."""

    def __init__(self, ictx: Context, caller: Caller, *, pins: bool) -> None:
        Holder.__init__(self)
        self.refs = 1
        self.ictx = ictx
        self.pins = pins
        self.items: dict[int, tuple[int, int]] = {}  # id: (iova, length)
        self.next_id = 0
        self.access = ictx.objects.alloc(Access(pins=pins, unmap=self.unmap), caller.gate)
        self.hold(self.access)
        ictx.objects.finalize(self.access)
        ictx.get()

    @staticmethod
    def from_fd(caller: Caller, fd: int) -> SelftestAccess:
        """iommufd_access_get(): EBADFD, for a closed fd too."""
        file = caller.files.fget(fd if fd < 1 << 31 else fd - (1 << 32))
        if not isinstance(file, SelftestAccess):
            raise EBADFD(f"fd {fd} is no access")
        return file

    def release(self) -> None:
        self.unmap(0, ULONG_MAX)
        self.let_go(self.access)
        self.ictx.objects.destroy_user(self.access)
        self.ictx.put()

    def unmap(self, iova: int, length: int) -> None:
        """iommufd_test_access_unmap(): drop every item that touches the range."""
        last = iova + length - 1
        for item, (start, size) in list(self.items.items()):
            if iova <= start + size - 1 and last >= start:
                self.unpin_item(item)

    def unpin_item(self, item: int) -> None:
        """ENOENT unless these pages are pinned."""
        if item not in self.items:
            raise ENOENT(f"the access has no pages {item}")
        iova, length = self.items.pop(item)
        self.access.unpin_pages(iova, length)

    def replace(self, caller: Caller, ioas: Ioas | None, ioas_id: int) -> None:
        """iommufd_access_replace(): ENOENT, EADDRINUSE."""
        if self.access.ioas is None or ioas is None:
            raise ENOENT(f"there is no IOAS {ioas_id}, or the access has none")
        self.access.change_ioas(caller, ioas)

    def __str__(self) -> str:
        return f"the open file of {self.access}"


class TestDmabuf(Dmabuf):
    """struct iommufd_test_dma_buf: zeros, up to 2 MiB."""

    __test__ = False  # pytest: not a test

    def pread(self, pos: int, length: int) -> bytes:
        return bytes(max(min(length, self.size() - pos), 0))

    def pwrite(self, pos: int, data: bytes) -> int:
        return len(data)
