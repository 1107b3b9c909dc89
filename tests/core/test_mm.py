"""RegisteredMm against a dictionary of pages."""

from typing import NamedTuple

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from iommufdd.mm import Region, RegisteredMm
from iommufdd.user import PAGE_SIZE

from .harness import Memfd

BASE = 0x10000
NPAGES = 12
FILE_PAGES = 6

page = st.integers(0, NPAGES - 1)
count = st.integers(1, 6)
flag = st.booleans()


class Mapped(NamedTuple):
    file: Memfd
    page: int
    readable: bool
    writable: bool


class AddressSpace(RuleBasedStateMachine):
    """mmap, munmap, mprotect and truncation; what is read, written and resolved, byte by byte and page by page."""

    def __init__(self) -> None:
        super().__init__()
        self.mm = RegisteredMm()
        self.pages: dict[int, Mapped] = {}
        self.files = [Memfd(FILE_PAGES), Memfd(FILE_PAGES)]
        for n, file in enumerate(self.files):
            file.pwrite(0, bytes((n + at // 512) % 256 for at in range(file.size())))

    @rule(at=page, n=count, which=flag, index=st.integers(0, 3), readable=flag, writable=flag)
    def map(self, at: int, n: int, which: bool, index: int, readable: bool, writable: bool) -> None:
        file = self.files[which]
        start = BASE + at * PAGE_SIZE
        self.mm.map(Region(start, start + n * PAGE_SIZE, file, index * PAGE_SIZE, readable, writable))
        for k in range(n):
            self.pages[at + k] = Mapped(file, index + k, readable, writable)

    @rule(at=page, n=count)
    def unmap(self, at: int, n: int) -> None:
        self.mm.unmap(BASE + at * PAGE_SIZE, BASE + (at + n) * PAGE_SIZE)
        for k in range(at, at + n):
            self.pages.pop(k, None)

    @rule(at=page, n=count, readable=flag, writable=flag)
    def protect(self, at: int, n: int, readable: bool, writable: bool) -> None:
        whole = self.mm.protect(
            BASE + at * PAGE_SIZE, BASE + (at + n) * PAGE_SIZE, readable=readable, writable=writable
        )
        assert whole == all(k in self.pages for k in range(at, at + n))
        for k in range(at, at + n):
            if k in self.pages:
                self.pages[k] = self.pages[k]._replace(readable=readable, writable=writable)

    @rule(which=flag, size=st.integers(0, FILE_PAGES * PAGE_SIZE))
    def truncate(self, which: bool, size: int) -> None:
        self.files[which].truncate(size)

    def byte(self, at: int) -> int | None:
        """The byte at an offset of the space, None where it cannot be read."""
        mapped = self.pages.get(at // PAGE_SIZE)
        if mapped is None or not mapped.readable:
            return None
        data = mapped.file.pread(mapped.page * PAGE_SIZE + at % PAGE_SIZE, 1)
        return data[0] if data else None

    @rule(at=st.integers(0, NPAGES * PAGE_SIZE), length=st.sampled_from([1, 100, PAGE_SIZE, 3 * PAGE_SIZE]))
    def read(self, at: int, length: int) -> None:
        data = self.mm.read(BASE + at, length)
        step = 97  # not every byte: the edges and some between
        for k in {0, len(data) - 1, *range(0, len(data), step)} if data else ():
            assert data[k] == self.byte(at + k)
        if len(data) < length:
            assert self.byte(at + len(data)) is None

    @rule(at=st.integers(0, NPAGES * PAGE_SIZE), length=st.sampled_from([1, PAGE_SIZE, 2 * PAGE_SIZE]))
    def write(self, at: int, length: int) -> None:
        done = self.mm.write(BASE + at, b"\xee" * length)
        for k in (at, at + done - 1) if done else ():
            mapped = self.pages[k // PAGE_SIZE]
            assert mapped.writable
            assert mapped.file.pread(mapped.page * PAGE_SIZE + k % PAGE_SIZE, 1) == b"\xee"
        if done < length:
            mapped_or_none = self.pages.get((at + done) // PAGE_SIZE)
            assert (
                mapped_or_none is None
                or not mapped_or_none.writable
                or mapped_or_none.page * PAGE_SIZE + (at + done) % PAGE_SIZE >= mapped_or_none.file.size()
            )

    @rule(at=page, n=count, write=flag)
    def resolve(self, at: int, n: int, write: bool) -> None:
        found = [
            (run.file, run.page + k)
            for run in self.mm.resolve(BASE + at * PAGE_SIZE + 5, n, write=write)
            for k in range(run.npages)
        ]
        expected: list[tuple[object, int]] = []
        for k in range(at, at + n):
            mapped = self.pages.get(k)
            if mapped is None or not (mapped.writable if write else mapped.readable):
                break
            if mapped.page * PAGE_SIZE >= mapped.file.size():  # a page begins within the file, or there is none
                break
            expected.append((mapped.file, mapped.page))
        assert found == expected

    @invariant()
    def regions_hold_their_files(self) -> None:
        regions = list(self.mm.regions())
        for file in self.files:
            assert file.refs == 1 + sum(region.file is file for region in regions)
        addrs = [addr for region in regions for addr in range(region.start, region.end, PAGE_SIZE)]
        assert addrs == [BASE + k * PAGE_SIZE for k in sorted(self.pages)]
        for region in regions:
            assert self.mm.find(region.start) == self.mm.find(region.end - 1) == region

    def teardown(self) -> None:
        self.mm.exit()
        assert not self.mm.alive
        assert all(file.refs == 1 for file in self.files)


TestAddressSpace = AddressSpace.TestCase
