"""2 MiB huge pages: whether the tests would get theirs."""

from __future__ import annotations

import mmap
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from .say import CannotError

if TYPE_CHECKING:
    from collections.abc import Iterator

MAP_HUGETLB = 0x40000  # Python 3.11's mmap does not name it
SIZE = 2 << 20
NEEDED = 64 + 4  # the largest variant maps 128 MiB; 4 MiB of another test may not have been given back yet
KERNEL = Path("/proc/sys/vm/nr_hugepages")


def available(pages: int = NEEDED) -> bool:
    """Whether so many can be reserved now; tried, and given back at once."""
    if _default_size() != SIZE:
        return False
    try:
        with mmap.mmap(-1, pages * SIZE, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | MAP_HUGETLB):
            return True
    except OSError:
        return False


def _default_size() -> int:
    for line in Path("/proc/meminfo").read_text("ascii").splitlines():
        if line.startswith("Hugepagesize:"):
            return int(line.split()[1]) << 10
    return 0


@contextmanager
def reserved(pages: int = NEEDED) -> Iterator[None]:
    """Adds huge pages to the kernel's pool, unless enough are free, until the end of the block."""
    if available(pages):
        yield
        return
    try:
        before = _add(pages)
    except OSError as error:
        raise CannotError(f"cannot reserve huge pages: {KERNEL}: {error.strerror}; only root of the host can") from None
    try:
        if (got := _pool() - before) < pages:
            raise CannotError(f"of {pages} huge pages the kernel found memory for {got}")
        yield
    finally:
        _add(before - _pool() if _pool() < before + pages else -pages)


def _pool() -> int:
    return int(KERNEL.read_text("ascii"))


def _add(pages: int) -> int:
    """The size of the pool before."""
    before = _pool()
    KERNEL.write_text(str(before + pages))
    return before
