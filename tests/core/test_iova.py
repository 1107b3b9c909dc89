"""Where automatic mappings go, beside the kernel's loop written down literally (io_pagetable.c:iopt_alloc_iova)."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from iommufdd.errors import EADDRINUSE, IommufdError
from iommufdd.io_pagetable import IoPagetable
from iommufdd.iova import Area, Piece
from iommufdd.pages import UserPages
from iommufdd.spans import Span, SpanSet
from iommufdd.user import PAGE_SIZE, ULONG_MAX

from . import naive
from .harness import APERTURE, Client

KIB = 1024
MIB = 1 << 20
DENSE = 128 * KIB  # where a crowded table has its areas
dense = st.integers(0, 96).map(lambda n: DENSE + n * 256)
edge = st.sampled_from([0, 1, PAGE_SIZE, ULONG_MAX - PAGE_SIZE, ULONG_MAX - 2 * MIB, ULONG_MAX])
where = dense | dense | dense | st.integers(0, 9).map(lambda n: n * MIB) | edge | st.integers(0, ULONG_MAX)
tiny = st.sampled_from([1, 2, 255, 256, 512, KIB, 2 * KIB - 1, 2 * KIB])
size = tiny | st.sampled_from([PAGE_SIZE, 3 * PAGE_SIZE, 64 * KIB, MIB, 3 * MIB, 1 << 40, 2**63 - 2])
addr = st.sampled_from([0, 1, 0x100, 0x200, 0x400, 0x600, 0x800, 0xA00, 0xC00, 0xFFF])
addr |= st.sampled_from([PAGE_SIZE, 0x1800, 0x5400, MIB, 2 * MIB, 8 * MIB, 2**47])


class AutomaticIova(RuleBasedStateMachine):
    """One table that changes, by rules that know nothing of each other.

    What the table remembers of earlier searches must never show.
    """

    def __init__(self) -> None:
        super().__init__()
        self.client = Client()
        self.iopt = IoPagetable()
        self.pages = UserPages(self.client.caller, 0, PAGE_SIZE, writable=True)
        self.kinds: list[tuple[int, int]] = []  # of allocations

    @initialize(crowded=st.booleans())
    def crowd(self, crowded: bool) -> None:
        """Everything below is taken."""
        if crowded:
            self.insert(PAGE_SIZE, DENSE - PAGE_SIZE)

    def insert(self, iova: int, length: int) -> None:
        last = min(iova + length - 1, ULONG_MAX)
        if self.iopt.areas.first(iova, last) is None and self.iopt.reserved.first(iova, last) is None:
            piece = Piece(self.pages.get(), 0, last - iova + 1)
            self.iopt.areas.insert(Area(iova, piece, readable=True, writable=True))

    @rule(iova=where, length=size)
    def map(self, iova: int, length: int) -> None:
        self.insert(iova, length)

    @rule(n=st.integers(0, 31), length=tiny)
    def nibble(self, n: int, length: int) -> None:
        """Take the first bytes behind an area."""
        areas = list(self.iopt.areas)
        if areas and areas[n % len(areas)].last < ULONG_MAX:
            self.insert(areas[n % len(areas)].last + 1, length)

    @rule(n=st.integers(0, 31))
    def unmap(self, n: int) -> None:
        areas = list(self.iopt.areas)
        if areas:
            area = areas[n % len(areas)]
            assert self.iopt.unmap(area.iova, area.last) == (area.length, None)

    @rule(start=where, length=size)
    def reserve(self, start: int, length: int) -> None:
        try:
            self.iopt.reserve(self.client.caller, start, min(start + length - 1, ULONG_MAX), self)
        except EADDRINUSE:
            pass

    @rule()
    def unreserve(self) -> None:
        self.iopt.remove_reserved(self)

    @rule(starts=st.lists(where, max_size=3), length=size)
    def allow(self, starts: list[int], length: int) -> None:
        spans = [Span(start, min(start + length, ULONG_MAX)) for start in starts]
        try:
            self.iopt.set_allowed(SpanSet(spans))
        except EADDRINUSE:
            pass

    @rule(alignment=st.sampled_from([1, 1, 0x800, PAGE_SIZE]))
    def align(self, alignment: int) -> None:
        self.iopt.iova_alignment = alignment

    @rule(at=addr, length=size, take=st.booleans())
    def allocate(self, at: int, length: int, take: bool) -> None:
        expected = naive.alloc_iova(self.iopt, at, length)
        try:
            found = self.iopt.alloc_iova(at, length)
        except IommufdError as error:
            found = -error.errno
        assert found == expected
        self.kinds.append((at, length))
        if take and found >= 0:
            self.insert(found, length)

    @rule(n=st.integers(0, 3), take=st.booleans())
    def allocate_again(self, n: int, take: bool) -> None:
        """What was asked for before."""
        if n < len(self.kinds):
            self.allocate(*self.kinds[-1 - n], take=take)


TestAutomaticIova = AutomaticIova.TestCase
TestAutomaticIova.settings = settings(max_examples=150, stateful_step_count=25)


@settings(max_examples=200)
@given(
    holes=st.lists(st.tuples(st.integers(1, 16), st.integers(1, 10)), min_size=1, max_size=4),
    at=st.sampled_from([0x800, 0xA00, 0xC00, 0x600, 0x100, 0]),
    length=st.sampled_from([1, 2, 0x100]),
    bites=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9)), min_size=1, max_size=4),
    free=st.integers(0, 9),
)
def test_holes_that_change_between_two_searches(
    holes: list[tuple[int, int]], at: int, length: int, bites: list[tuple[int, int]], free: int
) -> None:
    """Each loses bytes at its front, in units of 256, and in the end an area between them goes."""
    table = AutomaticIova()
    table.insert(PAGE_SIZE, DENSE - PAGE_SIZE)
    edge, fronts = DENSE, []
    for gap, room in holes:
        table.insert(edge, gap * 256)
        fronts.append(edge + gap * 256)
        edge += (gap + room) * 256
    table.allocate(at, length, take=False)
    for n, bite in bites:
        table.insert(fronts[n % len(fronts)], bite * 256)
        fronts[n % len(fronts)] += bite * 256
        table.allocate(at, length, take=False)
    table.unmap(free)
    table.allocate(at, length, take=False)


@pytest.mark.parametrize(
    ("at", "length", "iova"),
    [
        (0, PAGE_SIZE, PAGE_SIZE),  # never 0
        (0, 3 * PAGE_SIZE, 4 * PAGE_SIZE),  # a size rounded up to a power of two
        (0x12345000, MIB, PAGE_SIZE),  # as far as the address is aligned
        (0x10000000, MIB, MIB),
        (0, 1 << 40, 2 * MIB),  # quirk: a huge page at most
        (0x10000800, PAGE_SIZE, 0x1800),  # the offset in the page is kept
    ],
)
def test_the_first_fit(at: int, length: int, iova: int) -> None:
    assert IoPagetable().alloc_iova(at, length) == iova


def test_what_becomes_free_is_found_again() -> None:
    c = Client()
    ioas = c.ioas_alloc()
    mock = c.mock_domain(ioas)
    buffer = c.process.buffer(1)
    first, second, third = (c.map(ioas, buffer, PAGE_SIZE) for _ in range(3))
    assert (first, second, third) == (APERTURE, APERTURE + PAGE_SIZE, APERTURE + 2 * PAGE_SIZE)
    c.unmap(ioas, second, PAGE_SIZE)
    assert c.map(ioas, buffer, PAGE_SIZE) == second
    assert c.map(ioas, buffer, PAGE_SIZE) == third + PAGE_SIZE
    c.destroy(mock.stdev)  # and with it what lies below the aperture
    assert c.map(ioas, buffer, PAGE_SIZE) == PAGE_SIZE
    c.allow(ioas, (0x200000, 0x2FFFFF))
    assert c.map(ioas, buffer, PAGE_SIZE) == 0x200000
    c.allow(ioas)
    assert c.map(ioas, buffer, PAGE_SIZE) == 2 * PAGE_SIZE


def test_fixed_mappings_do_not_obey_what_is_allowed() -> None:
    c = Client()
    ioas = c.ioas_alloc()
    c.allow(ioas, (0x100000, 0x1FFFFF))
    buffer = c.process.buffer(4)
    c.map(ioas, buffer, PAGE_SIZE, 0x5000)
    assert c.map(ioas, buffer, PAGE_SIZE) == 0x100000
    assert c.map(ioas, buffer, PAGE_SIZE) == 0x101000


def test_copy_aligns_as_the_first_copied_byte_was() -> None:
    c = Client()
    src, dst = c.ioas_alloc(), c.ioas_alloc()
    memory = c.process.map(c.world.memfd(1024))  # a huge page and a bit, not aligned to one
    base = -memory % (2 * MIB)
    c.map(src, memory, 1024 * PAGE_SIZE, 0)
    assert c.copy(dst, src, base, 2 * MIB) == 2 * MIB
    assert c.copy(dst, src, base + PAGE_SIZE, PAGE_SIZE) == PAGE_SIZE


def test_less_room_can_be_room_earlier() -> None:
    """quirk: the offset in the page is OR-ed in, so a hole that begins one byte later can fit where it did not."""
    c = Client()
    ioas = c.ioas_alloc()
    buffer = c.process.buffer(1)
    c.map(ioas, buffer, 0x207FF, 0x1000)
    c.map(ioas, buffer, 2, 0x21A00)
    assert c.map(ioas, buffer + 0x800, 1) == 0x21A02  # 0x217FF | 0x800 is beyond the hole
    c.map(ioas, buffer, 1, 0x217FF)
    assert c.map(ioas, buffer + 0x800, 1) == 0x21800
