"""Memory that is mapped, and what of it is pinned (pages.c: struct iopt_pages).

Pinning is bookkeeping: the identity of a page, (PageFile, index), is looked up when the first domain or access needs
it and kept until the last one lets go. Who maps, unmaps or exits in between does not matter, as with a real pin.
"""

from __future__ import annotations

import enum
import weakref
from bisect import bisect_right
from operator import itemgetter
from typing import TYPE_CHECKING, Protocol

from .errors import EFAULT, EINVAL, ENODEV, ENOMEM, EPERM, IommufdError
from .spans import UseCounts
from .user import PAGE_MASK, PAGE_SHIFT, PAGE_SIZE, Caller, File, Gate, Mm, PageFile, PageRun, Task, User

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


_index = itemgetter(0)


class Account(enum.Enum):
    """enum iopt_pages_account_mode: who is charged for pinned pages."""

    NONE = 0
    USER = 1
    MM = 2


_NONE, _USER, _MM = Account  # a member of an Enum class takes ten times as long to find


def charge(account: Account, npages: int, task: Task, user: User, mm: Mm) -> None:
    """iopt_pages_update_pinned(): npages more (or less) on whoever pays; ENOMEM, EINVAL."""
    if account is _USER:
        _check_limit(npages, user.locked_vm, task, f"uid {user.uid}")
        user.locked_vm += npages
    elif account is _MM:
        if npages <= 0 and not mm.alive:  # quirk: for nothing to give back too (update_mm_locked_vm)
            raise EINVAL("the process that pays for these pages is gone")
        _check_limit(npages, mm.locked_vm, task, f"process {task.name or '?'}")
        mm.locked_vm += npages
    mm.pinned_vm += npages


def _check_limit(npages: int, held: int, task: Task, who: str) -> None:
    if npages <= 0:
        return
    limit = task.memlock_pages()
    if held + npages > limit:
        raise ENOMEM(f"pinning {npages} pages passes RLIMIT_MEMLOCK of {limit} pages: {who} holds {held} already")


class Pages:
    """struct iopt_pages: npages pages behind an address or in a file, shared by all areas that show them.

    `refs` counts areas and lists in flight. `start` is the page-aligned address (or position in the file) of page 0.
    """

    __slots__ = (
        "access_users",
        "account",
        "last_npinned",
        "mm",
        "npages",
        "npinned",
        "pinned",
        "refs",
        "start",
        "task",
        "use",
        "user",
        "writable",
    )  # fmt: skip

    revoked = False  # only a dma-buf's can be

    def __init__(self, caller: Caller, start: int, length: int, *, writable: bool) -> None:
        """iopt_alloc_pages(). EINVAL for a length that is 0 or cannot be rounded to pages."""
        if not 0 < length <= 2**64 - 1 - PAGE_SIZE:
            raise EINVAL(f"a length of {length:#x} cannot be mapped")
        if caller.gate.watching:
            caller.gate(Gate.MEMORY)
        self.refs = 1
        self.mm: Mm = caller.mm
        self.task: Task = caller.task
        self.user = caller.task.user
        self.account = _NONE if caller.task.cap_ipc_lock else _USER
        self.start = start & PAGE_MASK
        self.npages = (length + (start & ~PAGE_MASK) + PAGE_SIZE - 1) >> PAGE_SHIFT
        self.writable = writable
        self.npinned = 0
        self.last_npinned = 0  # as last charged
        self.use: UseCounts | None = None  # users of each page: domains and accesses; made when first needed
        self.pinned: list[tuple[int, PageRun]] | None = None  # by index
        self.access_users: dict[tuple[int, int], int] | None = None  # access_itree: users of each exact range

    def get(self) -> Pages:
        self.refs += 1
        return self

    def put(self) -> None:
        self.refs -= 1
        if not self.refs:
            self.release()

    def release(self) -> None:
        """iopt_release_pages()."""

    # ---- pinning ----

    def resolve(self, caller: Caller, first: int, count: int, *, write: bool) -> list[PageRun]:
        """The pages now behind [first, first + count); errors as pinning gives them."""
        raise NotImplementedError

    def fill(self, caller: Caller, first: int, last: int) -> None:
        """One domain (or access) more on [first, last]: pin and charge what nobody had; all or nothing.

        Errors: EFAULT, EINVAL, ENOMEM. Source: iopt_area_fill_domain(), iopt_pages_fill_xarray().
        """
        if self.use is None or self.pinned is None:
            self.use, self.pinned = UseCounts(), []
        fresh = self.use.add(first, last)
        done: list[tuple[int, int]] = []
        try:
            for lo, hi in fresh:
                self._pin(caller, lo, hi)
                done.append((lo, hi))
            if self.npinned > self.last_npinned:
                caller.gate(Gate.CHARGE)
                self.update_pinned(self.npinned - self.last_npinned)
        except IommufdError:
            self.use.remove(first, last)
            for lo, hi in done:
                self._unpin(lo, hi)
            raise

    def unfill(self, first: int, last: int) -> None:
        """One domain (or access) less: unpin what nobody has any more."""
        assert self.use is not None
        for lo, hi in self.use.remove(first, last):
            self._unpin(lo, hi)
        if self.npinned < self.last_npinned:
            try:
                self.update_pinned(self.npinned - self.last_npinned)
            except EINVAL:
                pass  # quirk: the charge of a dead mm stays (pages.c:update_unpinned() drops the error)

    def runs(self, first: int, last: int) -> Iterator[PageRun]:
        """The identities of pages that are pinned, in order."""
        assert self.pinned is not None
        at = bisect_right(self.pinned, first, key=_index) - 1
        while first <= last:
            index, run = self.pinned[at]
            skip = first - index
            count = min(run.npages - skip, last - first + 1)
            yield PageRun(run.file, run.page + skip, count)
            first += count
            at += 1

    def run_at(self, index: int) -> tuple[int, PageRun] | None:
        """(index of its first page, the run of pages that holds index); None when it is not pinned."""
        if not self.pinned:
            return None
        at = bisect_right(self.pinned, index, key=_index) - 1
        if at < 0:
            return None
        found = self.pinned[at]
        return found if index - found[0] < found[1].npages else None

    def page(self, index: int) -> PageRun | None:
        """The identity of one page, None when it is not pinned."""
        found = self.run_at(index)
        return None if found is None else PageRun(found[1].file, found[1].page + index - found[0], 1)

    def _pin(self, caller: Caller, first: int, last: int) -> None:
        caller.gate(Gate.PIN)
        assert self.pinned is not None
        fresh: list[tuple[int, PageRun]] = []
        at = first
        for run in self.resolve(caller, first, last - first + 1, write=self.writable):
            run.file.get()
            pinners = run.file.pinners
            pinners[self] = pinners.get(self, 0) + 1
            fresh.append((at, run))
            at += run.npages
        where = bisect_right(self.pinned, first, key=_index)
        self.pinned[where:where] = fresh
        self.npinned += last - first + 1

    def pinned_runs(self) -> Iterable[PageRun]:
        """The pages pinned, in order."""
        return [run for _, run in self.pinned or ()]

    def _unpin(self, first: int, last: int) -> None:
        pinned = self.pinned
        assert pinned is not None
        lo = max(bisect_right(pinned, first, key=_index) - 1, 0)
        hi = bisect_right(pinned, last, key=_index)
        left: list[tuple[int, PageRun]] = []
        for index, run in pinned[lo:hi]:
            end = index + run.npages
            if end <= first:
                left.append((index, run))
                continue
            pinners = run.file.pinners
            for at, stop in ((index, first), (last + 1, end)):
                if at < stop:
                    left.append((at, PageRun(run.file, run.page + at - index, stop - at)))
                    run.file.get()
                    pinners[self] += 1
            pinners[self] -= 1
            if not pinners[self]:
                del pinners[self]
            run.file.put()
        pinned[lo:hi] = left
        self.npinned -= last - first + 1

    # ---- accounting (iopt_pages_update_pinned) ----

    def update_pinned(self, npages: int) -> None:
        """Charge npages, or give them back when negative.

        ENOMEM over RLIMIT_MEMLOCK; EINVAL when it is to be given back to an mm that is gone.
        """
        charge(self.account, npages, self.task, self.user, self.mm)
        self.last_npinned = self.npinned

    # ---- accesses (access_itree) ----

    def add_access(self, caller: Caller, first: int, last: int, *, write: bool) -> None:
        """iopt_area_add_access(): EPERM, and what fill() raises."""
        if write and not self.writable:
            raise EPERM("these pages were mapped without IOMMU_IOAS_MAP_WRITEABLE")
        if self.access_users is None:
            self.access_users = {}
        users = self.access_users.get((first, last), 0)
        if not users:
            caller.gate(Gate.MEMORY)
            self.fill(caller, first, last)
        self.access_users[first, last] = users + 1

    def remove_access(self, first: int, last: int) -> None:
        """iopt_area_remove_access()."""
        assert self.access_users is not None
        self.access_users[first, last] -= 1
        if not self.access_users[first, last]:
            del self.access_users[first, last]
            self.unfill(first, last)

    # ---- reading and writing as the CPU does (iopt_pages_rw_access) ----

    def rw(self, caller: Caller, start_byte: int, data: bytearray, *, write: bool, slow: bool) -> None:
        """Copy data to or from byte start_byte on. EPERM, EFAULT, and what pinning raises."""
        if write and not self.writable:
            raise EPERM("these pages were mapped without IOMMU_IOAS_MAP_WRITEABLE")
        self._rw_slow(caller, start_byte, data, write=write)

    def _rw_slow(self, caller: Caller, start_byte: int, data: bytearray, *, write: bool) -> None:
        """iopt_pages_rw_slow(): what a domain would see."""
        first, last = start_byte >> PAGE_SHIFT, (start_byte + len(data) - 1) >> PAGE_SHIFT
        runs: list[PageRun] = []
        for lo, hi, used in self._stretches(first, last):
            if used:
                runs += self.runs(lo, hi)
            else:
                caller.gate(Gate.PIN)
                runs += self.resolve(caller, lo, hi - lo + 1, write=self.writable)
        copy_runs(runs, start_byte & ~PAGE_MASK, data, write=write)

    def _stretches(self, first: int, last: int) -> Iterator[tuple[int, int, bool]]:
        at = first
        for lo, hi in self.use.unused(first, last) if self.use is not None else [(first, last)]:
            if at < lo:
                yield at, lo - 1, True
            yield lo, hi, False
            at = hi + 1
        if at <= last:
            yield at, last, True


class UserPages(Pages):
    """Pages behind an address of an mm (IOPT_ADDRESS_USER)."""

    __slots__ = ()

    def resolve(self, caller: Caller, first: int, count: int, *, write: bool) -> list[PageRun]:
        addr = self.start + (first << PAGE_SHIFT)
        if not self.mm.alive:
            raise EFAULT("the process that mapped this memory is gone")
        runs = self.mm.resolve(addr, count, write=write)
        got = sum(run.npages for run in runs)
        if got != count:
            right = "writable" if write else "readable"
            raise EFAULT(f"no {right} page behind address {addr + (got << PAGE_SHIFT):#x}")
        return runs

    def rw(self, caller: Caller, start_byte: int, data: bytearray, *, write: bool, slow: bool) -> None:
        if write and not self.writable:
            raise EPERM("these pages were mapped without IOMMU_IOAS_MAP_WRITEABLE")
        if caller.mm is self.mm and not slow:
            self._rw_current(start_byte, data, write=write)
        elif self.mm.alive and (start_byte + len(data) - 1) >> PAGE_SHIFT == start_byte >> PAGE_SHIFT:
            self._rw_page(caller, start_byte, data, write=write)
        else:
            self._rw_slow(caller, start_byte, data, write=write)

    def _rw_current(self, start_byte: int, data: bytearray, *, write: bool) -> None:
        """The caller's own mm: copy_to_user() on what is mapped there now, pinned or not."""
        addr = self.start + start_byte
        if write:
            done = self.mm.write(addr, bytes(data))
        else:
            got = self.mm.read(addr, len(data))
            done = len(got)
            data[:done] = got
        if done != len(data):
            raise EFAULT(f"memory at {addr + done:#x} is not accessible")

    def _rw_page(self, caller: Caller, start_byte: int, data: bytearray, *, write: bool) -> None:
        """iopt_pages_rw_page(): one page of another mm, looked up now."""
        caller.gate(Gate.PIN)
        runs = self.resolve(caller, start_byte >> PAGE_SHIFT, 1, write=write)
        copy_runs(runs, start_byte & ~PAGE_MASK, data, write=write)


class FilePages(Pages):
    """Pages of a file (IOPT_ADDRESS_FILE); any file is taken, and only pinning finds out what it is."""

    __slots__ = ("file",)

    def __init__(self, caller: Caller, file: File, start: int, length: int, *, writable: bool) -> None:
        super().__init__(caller, start, length, writable=writable)
        self.file = file
        if isinstance(file, PageFile):
            file.get()  # others never show pages; a kernel holds them too, and an iommufd in its own IOAS for ever

    def release(self) -> None:
        if isinstance(self.file, PageFile):
            self.file.put()

    def resolve(self, caller: Caller, first: int, count: int, *, write: bool) -> list[PageRun]:
        if not isinstance(self.file, PageFile) or not self.file.pinnable:
            raise EINVAL("this file has no pages that can be pinned: not a memfd")
        page = (self.start >> PAGE_SHIFT) + first
        if (page + count) << PAGE_SHIFT > self.file.size():
            raise EINVAL(f"the file ends before page {page + count}")
        return [PageRun(self.file, page, count)]


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


def copy_runs(runs: list[PageRun], offset: int, data: bytearray, *, write: bool) -> None:
    """Copy data to or from pages, starting at byte `offset` of the first; what a file has lost reads as zero."""
    done = 0
    for run in runs:
        pos = (run.page << PAGE_SHIFT) + offset
        length = min((run.npages << PAGE_SHIFT) - offset, len(data) - done)
        if write:
            run.file.pwrite(pos, bytes(data[done : done + length]))
        else:
            data[done : done + length] = run.file.pread(pos, length).ljust(length, b"\0")
        done += length
        offset = 0
