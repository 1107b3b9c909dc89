"""Copy rules: copy_struct_from_user() for commands, and the structs of drivers behind pointers (linux/iommu.h)."""

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

import iommufd_uapi.iommufd as uapi
import iommufd_uapi.iommufd_test as test_uapi
from iommufdd.errors import E2BIG, EFAULT, EINVAL
from iommufdd.user import PAGE_SIZE
from iommufdd.user_data import UserData, UserDataArray, copy_struct_from_user

from .harness import ARGUMENT, DATA, NEST_PARENT, NOWHERE, Client

TYPE = test_uapi.IOMMU_VIOMMU_TYPE_SELFTEST


@given(size=st.integers(1, 64), tail=st.integers(0, 3 * PAGE_SIZE), dirty=st.none() | st.integers(0, 3 * PAGE_SIZE))
def test_longer_must_be_zero_and_shorter_is_zero_extended(size: int, tail: int, dirty: int | None) -> None:
    c = Client()
    data = bytearray(b"\x5a" * size + bytes(tail))
    if dirty is not None:
        data[dirty % len(data)] = 1
    c.process.put(bytes(data))
    if any(data[size:]):
        with pytest.raises(E2BIG):
            copy_struct_from_user(c.caller, DATA, len(data), size)
    else:
        assert copy_struct_from_user(c.caller, DATA, len(data), size) == data[:size]
    assert copy_struct_from_user(c.caller, DATA, size, size + tail) == bytes(data[:size]) + bytes(tail)


@pytest.mark.parametrize("dirty", [False, True])
def test_a_byte_that_is_not_zero_comes_before_one_that_is_not_there(dirty: bool) -> None:
    """check_zeroed_user() meets them in the order of addresses."""
    c = Client()
    addr = c.process.buffer(1)
    end = addr + PAGE_SIZE
    c.mm.write(end - 8, b"\1" * 8 if dirty else bytes(8))
    with pytest.raises(E2BIG if dirty else EFAULT):
        copy_struct_from_user(c.caller, end - 16, 64, 8)


def test_a_size_of_gigabytes_reads_only_to_the_first_byte_that_is_not_zero() -> None:
    c = Client()
    c.process.put(uapi.IoasAlloc(size=2**32 - 1).pack() + b"\0\1", ARGUMENT)
    assert c.rc(uapi.IoasAlloc.CMD, ARGUMENT) == -errno.E2BIG


@pytest.mark.parametrize("size", [0, 7, 11])
def test_shorter_than_the_command_ever_was(size: int) -> None:
    c = Client()
    c.ioctl(uapi.IoasAlloc(size=size), errno.EINVAL)


def test_the_reply_is_cut_to_what_the_caller_has() -> None:
    """HW_INFO of the first version of the struct: 32 of 40 bytes."""
    c = Client()
    mock = c.mock_domain(c.ioas_alloc())
    cmd = uapi.HwInfo(size=32, dev_id=mock.idev, out_capabilities=0x5A5A)
    c.process.put(b"\x5a" * 64, ARGUMENT)
    c.ioctl(cmd)
    assert cmd.out_capabilities == 0x5A5A
    assert cmd.data_type == test_uapi.IOMMU_HW_INFO_TYPE_SELFTEST


# ---- one struct of a driver ----


def user_data(c: Client, length: int, kind: int = TYPE) -> UserData:
    c.process.put(test_uapi.ViommuSelftest(1, 2, 3, 4).pack() + bytes(8))
    return UserData(c.caller, kind, DATA, length)


@pytest.mark.parametrize(("length", "expected"), [(8, (1, 2, 0, 0)), (16, (1, 2, 3, 0)), (24, (1, 2, 3, 4))])
def test_a_struct_down_to_its_first_version(length: int, expected: tuple[int, ...]) -> None:
    data = user_data(Client(), length).copy_struct(test_uapi.ViommuSelftest, TYPE, "out_data")
    assert (data.in_data, data.out_data, data.out_mmap_offset, data.out_mmap_length) == expected


@pytest.mark.parametrize(("length", "kind"), [(7, TYPE), (25, TYPE), (24, TYPE + 1)])
def test_longer_is_refused_even_with_a_tail_of_zeros(length: int, kind: int) -> None:
    with pytest.raises(EINVAL):
        user_data(Client(), length, kind).copy_struct(test_uapi.ViommuSelftest, TYPE, "out_data")


def test_the_way_back_is_cut_to_the_callers_length() -> None:
    c = Client()
    answer = test_uapi.ViommuSelftest(9, 9, 9, 9)
    user_data(c, 12).copy_struct_to_user(answer, TYPE, "out_data")
    assert c.mm.read(DATA, 24) == answer.pack()[:12] + test_uapi.ViommuSelftest(1, 2, 3, 4).pack()[12:]
    with pytest.raises(EINVAL):
        user_data(c, 7).copy_struct_to_user(answer, TYPE, "out_data")
    with pytest.raises(EINVAL):
        user_data(c, 24, TYPE + 1).copy_struct_to_user(answer, TYPE, "out_data")


# ---- arrays ----


def array(c: Client, entry_len: int, entry_num: int, tail: bytes = b"", kind: int = TYPE) -> UserDataArray:
    entries = [test_uapi.ViommuInvalidateSelftest(n, n + 1, n + 2).pack() + tail for n in range(8)]
    c.process.put(b"".join(entry[:entry_len] for entry in entries))
    return UserDataArray(c.caller, kind, DATA, entry_len, entry_num)


def test_a_whole_array_may_have_shorter_and_longer_entries() -> None:
    c = Client()
    layout = test_uapi.ViommuInvalidateSelftest
    assert [entry.cache_id for entry in array(c, 12, 3).copy_all(layout, TYPE)] == [2, 3, 4]
    assert [entry.cache_id for entry in array(c, 8, 3).copy_all(layout, TYPE)] == [0, 0, 0]
    assert [entry.cache_id for entry in array(c, 16, 3, bytes(4)).copy_all(layout, TYPE)] == [2, 3, 4]
    with pytest.raises(E2BIG):
        array(c, 16, 3, b"\0\0\0\1").copy_all(layout, TYPE)
    for num, kind in ((0, TYPE), (1, TYPE + 1)):
        with pytest.raises(EINVAL):
            array(c, 12, num, kind=kind).copy_all(layout, TYPE)


def test_one_entry_follows_the_rule_of_one_struct() -> None:
    c = Client()
    layout = test_uapi.ViommuInvalidateSelftest
    assert array(c, 8, 3).copy_entry(layout, TYPE, 2, "vdev_id").vdev_id == 3
    for entry_len in (4, 16):
        with pytest.raises(EINVAL):
            array(c, entry_len, 3, bytes(4)).copy_entry(layout, TYPE, 0, "vdev_id")
    with pytest.raises(EINVAL):
        array(c, 8, 3).copy_entry(layout, TYPE + 1, 0, "vdev_id")


# ---- by ioctl: who uses which rule ----


def test_a_nested_hwpt_takes_four_to_eight_bytes() -> None:
    c = Client()
    ioas = c.ioas_alloc()
    mock = c.mock_domain(ioas)
    parent = c.hwpt(mock.idev, ioas, NEST_PARENT)
    cmd = uapi.HwptAlloc(dev_id=mock.idev, pt_id=parent, data_type=test_uapi.IOMMU_HWPT_DATA_SELFTEST)
    for length, uptr, expect in ((3, DATA, errno.EINVAL), (9, DATA, errno.EINVAL), (8, NOWHERE, errno.EFAULT)):
        cmd.data_len, cmd.data_uptr = length, uptr
        c.ioctl(cmd, expect)
    cmd.data_len, cmd.data_uptr = 4, c.process.put(b"\x07\0\0\0\xff\xff\xff\xff")
    c.ioctl(cmd)
    c.test(test_uapi.CheckIotlb(3, 7), id=cmd.out_hwpt_id)
