"""The fast codec against construct, for every layout, on random bytes."""

import struct
from types import ModuleType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iommufd_uapi import iommufd, iommufd_test, vfio
from iommufd_uapi.layout import Ioctl, Layout, VfioIoctl


def layouts(module: ModuleType) -> list[type[Layout]]:
    found = [cls for cls in vars(module).values() if isinstance(cls, type) and issubclass(cls, Layout)]
    return [cls for cls in found if cls.__module__ == module.__name__ and cls.MEMBERS]


ALL = [cls for module in (iommufd, iommufd_test, vfio) for cls in layouts(module)]

every_layout = pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)


def as_construct_sees_it(value: object) -> object:
    """A field's value as construct would hold it."""
    if isinstance(value, Layout):
        return {name: getattr(value, name) for name in value.__struct_fields__}
    return list(value) if isinstance(value, tuple) else value


def without_io(value: object) -> object:
    """A construct value without its `_io`."""
    return {k: v for k, v in value.items() if k != "_io"} if isinstance(value, dict) else value


@every_layout
@settings(max_examples=40)
@given(data=st.data())
def test_unpack_agrees_with_construct(cls: type[Layout], data: st.DataObject) -> None:
    raw = data.draw(st.binary(min_size=cls.SIZEOF, max_size=cls.SIZEOF + 8))
    ours, container = cls.unpack(raw), cls.describe(raw)
    for name in cls.__struct_fields__:
        theirs = without_io(container[name])
        assert as_construct_sees_it(getattr(ours, name)) == (
            list(theirs) if isinstance(theirs, list) else theirs
        )
    assert ours.pack() == cls.CONSTRUCT.build(container)


@every_layout
@settings(max_examples=40)
@given(data=st.data())
def test_pack_gives_back_the_bytes_with_zero_padding(cls: type[Layout], data: st.DataObject) -> None:
    raw = data.draw(st.binary(min_size=cls.SIZEOF, max_size=cls.SIZEOF))
    expected = bytearray(cls.SIZEOF)
    for member in cls.MEMBERS.values():
        place = slice(member.offset, member.offset + member.size)
        expected[place] = raw[place]
    packed = cls.unpack(raw).pack()
    assert packed == expected
    assert cls.unpack(packed) == cls.unpack(raw)


@every_layout
@settings(max_examples=40)
@given(data=st.data())
def test_update_is_unpack_in_place(cls: type[Layout], data: st.DataObject) -> None:
    raw = data.draw(st.binary(min_size=cls.SIZEOF, max_size=cls.SIZEOF))
    obj = cls()
    obj.update(bytearray(raw))
    assert obj == cls.unpack(memoryview(raw))


@every_layout
def test_every_default_is_zero_but_the_size(cls: type[Layout]) -> None:
    expected = bytearray(cls.SIZEOF)
    if issubclass(cls, Ioctl | VfioIoctl):
        struct.pack_into("<I", expected, 0, cls.SIZEOF)
    assert cls().pack() == expected


@every_layout
def test_offset_and_short_input(cls: type[Layout]) -> None:
    obj = cls()
    assert cls.unpack(b"xyz" + obj.pack(), 3) == obj
    with pytest.raises(struct.error):
        cls.unpack(obj.pack()[:-1])
    with pytest.raises(struct.error):
        obj.update(obj.pack()[:-1])


@every_layout
def test_size_is_one_number(cls: type[Layout]) -> None:
    assert cls.SIZEOF == cls.CONSTRUCT.sizeof() == struct.calcsize("<" + cls.FORMAT)
    assert cls.SIZEOF % cls.ALIGNOF == 0
    assert all(member.offset % member.align == 0 for member in cls.MEMBERS.values())


def test_defaults_are_not_shared() -> None:
    one, other = vfio.VfioRegionInfoCapType(), vfio.VfioRegionInfoCapType()
    one.header.id = 7
    assert other.header.id == 0


def test_size_default() -> None:
    assert iommufd.IoasAlloc().size == 12
    assert iommufd_test.TestCmd().size == 72
    assert vfio.VfioDeviceBindIommufd().argsz == 24
    assert iommufd.HwptAlloc(size=24).pack()[:4] == b"\x18\0\0\0"


def test_a_value_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(struct.error):
        iommufd.IoasAlloc(flags=1 << 32).pack()
    assert iommufd.IoasMapFile(fd=-1).pack()[12:16] == b"\xff" * 4


def test_bytes_are_padded() -> None:
    assert iommufd_test.TestCmd(u=b"abc").pack()[16:64] == b"abc" + bytes(45)


def test_undecorated_layout_says_so() -> None:
    class Bare(Layout):
        pass

    with pytest.raises(NotImplementedError, match="Bare"):
        Bare.unpack(b"")
    with pytest.raises(NotImplementedError, match="Bare"):
        Bare().pack()


def test_ioctl_numbers() -> None:
    cls = iommufd.IoasMap
    assert (cls.NR, cls.CMD, cls.MACRO, cls.C_NAME) == (0x85, 0x3B85, "IOMMU_IOAS_MAP", "iommu_ioas_map")
    assert iommufd.HwInfo.MACRO == "IOMMU_GET_HW_INFO"
    assert iommufd_test.TestCmd.CMD == 0x3BA0
    assert vfio.VfioDeviceBindIommufd.CMD == 0x3B00 | 118
