"""How many bytes stand behind each pointer."""

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iommufd_uapi import iommufd, iommufd_test, vfio
from iommufd_uapi.layout import (
    BitmapBytes,
    Const,
    Direction,
    Field,
    IovaBitmapBytes,
    Layout,
    Masked,
    Minus,
    Rule,
    Times,
    When,
)

U64_MAX = (1 << 64) - 1
UNIONS = [op.union for op in iommufd_test.TEST_OPS.values()]
WITH_POINTERS = [
    cls
    for cls in (*iommufd.IOCTLS, *UNIONS, *vfio.DEVICE_IOCTLS, *vfio.CONTAINER_IOCTLS)
    if cls.POINTERS or cls.TAIL
]

any_int = st.integers() | st.integers(0, U64_MAX) | st.sampled_from([0, 1, -1, U64_MAX, 1 << 64, 1 << 200])


def only(cls: type[Layout]) -> Any:
    (pointer,) = cls.POINTERS
    return pointer


@pytest.mark.parametrize("cls", WITH_POINTERS, ids=lambda cls: cls.__name__)
@given(data=st.data())
def test_rules_are_total(cls: type[Layout], data: st.DataObject) -> None:
    obj = cls(*(data.draw(any_int) for _ in cls.__struct_fields__))
    rules = [pointer.rule for pointer in cls.POINTERS] + ([cls.TAIL.rule, cls.TAIL.fds] if cls.TAIL else [])
    for rule in rules:
        assert rule.bytes(obj) >= 0
        assert type(rule.bytes(obj)) is int
    for pointer in cls.POINTERS:
        assert pointer.bytes(obj) == pointer.rule.bytes(obj)
        assert pointer.direction_of(obj) in Direction


@pytest.mark.parametrize("cls", WITH_POINTERS, ids=lambda cls: cls.__name__)
def test_rules_read_like_c(cls: type[Layout]) -> None:
    for pointer in cls.POINTERS:
        text = str(pointer.rule)
        names = {word for word in text.replace("(", " ").replace(")", " ").split() if word.isidentifier()}
        assert names - {"max", "__ffs", "DIV_ROUND_UP"} <= set(cls.__struct_fields__)


@pytest.mark.parametrize(
    ("cls", "fields", "nbytes", "direction"),
    [
        (iommufd.IoasAllowIovas, {"num_iovas": 3}, 48, Direction.IN),
        (iommufd.IoasIovaRanges, {"num_iovas": 0xFFFFFFFF}, 0xFFFFFFFF0, Direction.OUT),
        (iommufd.IoasMap, {"length": U64_MAX}, U64_MAX, Direction.ADDRESS),
        (iommufd.HwptAlloc, {"data_len": 24}, 24, Direction.IN),
        (iommufd.HwInfo, {"data_len": 40}, 40, Direction.OUT),
        (iommufd.ViommuAlloc, {"data_len": 24}, 24, Direction.INOUT),
        (iommufd.HwptInvalidate, {"entry_len": 24, "entry_num": 2}, 48, Direction.IN),
        (iommufd.HwptInvalidate, {"entry_len": 4096, "entry_num": 1 << 19}, 1 << 31, Direction.IN),
        (iommufd.HwptInvalidate, {"entry_len": 4097, "entry_num": 1}, 0, Direction.IN),
        (iommufd.HwptInvalidate, {"entry_len": 1, "entry_num": (1 << 19) + 1}, 0, Direction.IN),
        (iommufd_test.CheckMap, {"length": 4096}, 4096, Direction.ADDRESS),
        (iommufd_test.CheckRefs, {"length": 4096}, 4096, Direction.ADDRESS),
        (iommufd_test.AccessPages, {"length": 16 << 20}, 16 << 20, Direction.ADDRESS),
        (iommufd_test.AccessPages, {"length": (16 << 20) + 1}, 0, Direction.ADDRESS),
        (iommufd_test.Dirty, {"length": 4096 * 9, "page_size": 4096}, 2, Direction.IN),
        (iommufd_test.Dirty, {"length": 128 << 20, "page_size": 1}, 16 << 20, Direction.IN),
        (iommufd_test.Dirty, {"length": (128 << 20) + 1, "page_size": 1}, 0, Direction.IN),
        (vfio.VfioIommuType1DmaMap, {"size": 5}, 5, Direction.ADDRESS),
        (vfio.VfioDeviceBindIommufd, {"flags": 1}, 16, Direction.IN),
        (vfio.VfioDeviceBindIommufd, {"flags": 0}, 0, Direction.ADDRESS),
    ],
)
def test_bytes_and_direction(
    cls: type[Layout], fields: dict[str, int], nbytes: int, direction: Direction
) -> None:
    obj = cls(**fields)
    assert only(cls).bytes(obj) == nbytes
    assert only(cls).direction_of(obj) is direction


@pytest.mark.parametrize(
    ("flags", "direction"), [(0, Direction.OUT), (1, Direction.IN), (4, Direction.OUT), (5, Direction.IN)]
)
def test_direction_of_access_rw(flags: int, direction: Direction) -> None:
    pointer = only(iommufd_test.AccessRw)
    obj = iommufd_test.AccessRw(length=10, flags=flags)
    assert pointer.direction_of(obj) is direction
    assert pointer.direction is Direction.INOUT
    assert isinstance(pointer.access, When)
    assert pointer.bytes(obj) == 10
    assert pointer.bytes(iommufd_test.AccessRw(length=(16 << 20) + 1, flags=flags)) == 0


def iova_bitmap_bytes(iova: int, length: int, page_size: int) -> int:
    """iova_bitmap_alloc() and the checks before it, bit by bit: the highest byte that a bit can fall into."""
    last = (length - 1) % (1 << 64)
    if page_size == 0 or iova + last > U64_MAX:
        return 0
    shift = next(bit for bit in range(64) if page_size >> bit & 1)
    return ((last >> shift) // 8) + 1


@given(
    iova=st.integers(0, U64_MAX),
    length=st.integers(0, U64_MAX) | st.integers(0, 1 << 20),
    page_size=st.integers(0, U64_MAX) | st.sampled_from([0, 1, 2, 3, 4096, 6144, 1 << 63]),
)
def test_dirty_bitmap(iova: int, length: int, page_size: int) -> None:
    obj = iommufd.HwptGetDirtyBitmap(iova=iova, length=length, page_size=page_size)
    assert only(iommufd.HwptGetDirtyBitmap).bytes(obj) == iova_bitmap_bytes(iova, length, page_size)


def test_dirty_bitmap_examples() -> None:
    def nbytes(iova: int, length: int, page_size: int) -> int:
        obj = iommufd.HwptGetDirtyBitmap(iova=iova, length=length, page_size=page_size)
        return int(only(iommufd.HwptGetDirtyBitmap).bytes(obj))

    assert nbytes(0, 8 * 4096, 4096) == 1
    assert nbytes(0, 9 * 4096, 4096) == 2
    assert nbytes(0, 6144 * 8, 6144) == 3  # 2048 counts, not 6144
    assert nbytes(1, 0, 4096) == 0  # wraps
    assert nbytes(0, 0, 1 << 63) == 1  # all of the address space in two bits


@given(length=st.integers(1, U64_MAX), page_size=st.integers(1, U64_MAX))
def test_bitmap_bytes(length: int, page_size: int) -> None:
    obj = iommufd_test.Dirty(length=length, page_size=page_size)
    pages = length // page_size + (length % page_size > 0)
    assert BitmapBytes("length", "page_size").bytes(obj) == pages // 8 + (pages % 8 > 0)


def test_words() -> None:
    length, limited = Field("length"), Field("length").upto(16)
    assert str(Times(Field("num_iovas"), Const(16))) == "num_iovas * 16"
    assert str(limited) == "length <= 16 ? length : 0"
    assert str(Times(limited, length)) == "(length <= 16 ? length : 0) * length"
    assert str(Minus(Field("argsz"), Const(24))) == "max(argsz - 24, 0)"
    assert str(BitmapBytes("length", "ps")) == "ps ? DIV_ROUND_UP(length / ps, 8) : 0"
    assert str(IovaBitmapBytes("iova", "length", "ps")) == "ps ? ((length - 1) >> __ffs(ps)) / 8 + 1 : 0"
    assert str(Masked("flags", 4, 4, length)) == "(flags & 0x4) == 0x4 ? length : 0"
    assert str(only(iommufd_test.AccessRw).rule).startswith("flags & 0x1 ? ")


def test_rules_compare_by_value() -> None:
    rules: list[Rule] = [Field("length"), Const(1), Times(Field("a"), Const(1)), Field("length").upto(3)]
    assert all((a == b) == (a is b) for a, b in itertools.product(rules, rules))
    assert Field("length") == Field("length")
