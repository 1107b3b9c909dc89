"""Dirty bits of table entries against the kernel's walk over items written down (generic_pt/iommu_pt.h)."""

from hypothesis import given
from hypothesis import strategies as st

from iommufdd.iommu.dirty import DirtyBits
from iommufdd.iommu.mock import MockIommu, MockPaging
from iommufdd.iommu.ops import Extent
from iommufdd.user import PAGE_SIZE, PageRun

GRANULE = 2048
SPACE = 4 << 20


class Table:
    """A translation with these entries, (first IOVA, bytes)."""

    def __init__(self, entries: list[tuple[int, int]]) -> None:
        self.entries = entries

    def entry(self, iova: int, pgsizes: int) -> tuple[int, int] | None:
        return next((entry for entry in self.entries if entry[0] <= iova < entry[0] + entry[1]), None)

    def translate(self, iova: int) -> tuple[PageRun, int, bool, bool] | None:
        raise NotImplementedError

    def extent(self, iova: int) -> Extent | None:
        raise NotImplementedError


@st.composite
def tables(draw: st.DrawFn) -> list[tuple[int, int]]:
    """Entries of sizes between 2 KiB and 1 MiB, aligned to their size, some with holes between."""
    at, entries = 0, []
    for size, hole in draw(st.lists(st.tuples(st.sampled_from([0, 1, 1, 3, 8, 9]), st.integers(0, 3)), max_size=6)):
        length = GRANULE << size
        first = -(-at // length) * length + hole * length
        entries.append((first, length))
        at = first + length
    return entries


steps = st.lists(
    st.tuples(st.sampled_from(["write", "write", "read", "peek", "forget"]), st.integers(0, 40), st.integers(0, 40)),
    max_size=20,
)


def places(entries: list[tuple[int, int]]) -> list[int]:
    """Where something begins or ends, and one granule beside it."""
    edges = {edge for first, size in entries for edge in (first, first + size // 2, first + size)}
    return sorted({0, *edges, *(max(edge - GRANULE, 0) for edge in edges), *(edge + GRANULE for edge in edges)})


def domain_with(entries: list[tuple[int, int]]) -> tuple[MockPaging, DirtyBits]:
    domain = MockPaging(MockIommu(), huge=False, dirty=True)
    domain.translation = Table(entries)
    assert domain.dirty_bits is not None
    return domain, domain.dirty_bits


def recorded(first: int, size: int, iova: int, last: int) -> tuple[int, int] | None:
    """record_dirty() of one dirty entry within [iova, last]: (IOVA, bytes)."""
    item = GRANULE
    while item * 512 <= size:
        item *= 512
    start = max(first, iova)
    if item == size:
        return start, item
    index = (start - first) // item
    end_index = (size // item - 1) | index  # log2_set_mod_max(): the last item, where one behind it is meant
    end_index = min(end_index, (min(last, first + size - 1) - first) // item + 1)
    return (start, (end_index - index) * item) if end_index > index else None


@given(entries=tables(), steps=steps)
def test_against_the_walk(entries: list[tuple[int, int]], steps: list[tuple[str, int, int]]) -> None:
    _, bits = domain_with(entries)
    dirty: set[tuple[int, int]] = set()
    where = places(entries)
    for what, one, other in steps:
        iova, last = sorted((where[one % len(where)], where[other % len(where)]))
        last += GRANULE - 1
        hit = [entry for entry in entries if entry[0] <= last and entry[0] + entry[1] > iova]
        if what == "write":
            bits.set_dirty(iova)
            dirty.update(entry for entry in entries if entry[0] <= iova < entry[0] + entry[1])
        elif what == "forget":
            bits.forget(iova, last)
            dirty -= set(hit)
        else:
            found = list(bits.read_and_clear_dirty(iova, last, clear=what == "read"))
            expected = [recorded(*entry, iova, last) for entry in hit if entry in dirty]
            assert found == [stretch for stretch in expected if stretch is not None]
            if what == "read":
                dirty -= set(hit)  # whole entries, cut or not


def test_a_write_where_nothing_is_mapped_is_lost() -> None:
    domain, bits = domain_with([(0, PAGE_SIZE)])
    bits.set_dirty(PAGE_SIZE)
    domain.translation = None
    bits.set_dirty(0)
    assert not list(bits.read_and_clear_dirty(0, SPACE, clear=True))


def test_a_page_of_two_items_is_one_bit_of_a_page() -> None:
    """quirk: the second item is forgotten, which shows to who asks for 2 KiB."""
    _, bits = domain_with([(0, PAGE_SIZE)])
    bits.set_dirty(GRANULE)
    assert list(bits.read_and_clear_dirty(0, PAGE_SIZE - 1, clear=False)) == [(0, GRANULE)]
    assert not list(bits.read_and_clear_dirty(GRANULE, PAGE_SIZE - 1, clear=True))
    assert not list(bits.read_and_clear_dirty(0, PAGE_SIZE - 1, clear=True))


def test_unmapping_is_told_to_the_domain() -> None:
    domain, bits = domain_with([(0, PAGE_SIZE), (PAGE_SIZE, PAGE_SIZE)])
    for iova in (0, PAGE_SIZE):
        bits.set_dirty(iova)
    domain.unmapped(0, PAGE_SIZE - 1)
    assert [iova for iova, _ in bits.read_and_clear_dirty(0, SPACE, clear=True)] == [PAGE_SIZE]
