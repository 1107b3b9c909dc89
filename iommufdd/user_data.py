"""Driver data behind a pointer of the caller: the copy rules of include/linux/iommu.h and lib/usercopy.c."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, TypeVar

from .errors import E2BIG, EFAULT, EINVAL
from .user import PAGE_SIZE, Caller

if TYPE_CHECKING:
    from iommufd_uapi.layout import Layout

L = TypeVar("L", bound="Layout")


class UserData(NamedTuple):
    """struct iommu_user_data: one driver structure behind a pointer of the caller."""

    caller: Caller
    data_type: int
    uptr: int
    len: int

    def copy_struct(self, layout: type[L], data_type: int, last: str) -> L:
        """iommu_copy_struct_from_user(): shorter than the struct is zero-extended down to the end of `last`.

        EINVAL another type or length (longer too: there is no E2BIG here), EFAULT.
        """
        if self.data_type != data_type:
            raise EINVAL(f"data type is {self.data_type:#x}, this driver takes {data_type:#x}")
        return layout.unpack(_copy_exact(self.caller, self.uptr, self.len, layout, last))

    def copy_struct_to_user(self, data: Layout, data_type: int, last: str) -> None:
        """iommu_copy_struct_to_user(): same rules on the way back."""
        if self.data_type != data_type:
            raise EINVAL(f"data type is {self.data_type:#x}, this driver takes {data_type:#x}")
        if self.len < _min_size(type(data), last):
            raise EINVAL(f"data of {self.len} bytes is too short")
        self.caller.copy_to_user(self.uptr, data.pack()[: self.len])


class UserDataArray:
    """struct iommu_user_data_array: entry_num driver structures of entry_len bytes; a driver reports progress here."""

    __slots__ = ("caller", "data_type", "entry_len", "entry_num", "uptr")

    def __init__(self, caller: Caller, data_type: int, uptr: int, entry_len: int, entry_num: int) -> None:
        self.caller = caller
        self.data_type = data_type
        self.uptr = uptr
        self.entry_len = entry_len
        self.entry_num = entry_num

    def copy_entry(self, layout: type[L], data_type: int, index: int, last: str) -> L:
        """iommu_copy_struct_from_user_array(): one entry; EINVAL, EFAULT."""
        if self.data_type != data_type:
            raise EINVAL(f"data type is {self.data_type:#x}, this driver takes {data_type:#x}")
        uptr = self.uptr + self.entry_len * index
        return layout.unpack(_copy_exact(self.caller, uptr, self.entry_len, layout, last))

    def copy_all(self, layout: type[L], data_type: int) -> list[L]:
        """iommu_copy_struct_from_full_user_array(): all entries before any work; EINVAL, E2BIG, EFAULT."""
        if self.data_type != data_type:
            raise EINVAL(f"data type is {self.data_type:#x}, this driver takes {data_type:#x}")
        if not self.entry_num:
            raise EINVAL("the array is empty")
        size = layout.SIZEOF
        if self.entry_len == size:
            data = self.caller.copy_from_user(self.uptr, size * self.entry_num)
            return [layout.unpack(data, at) for at in range(0, len(data), size)]
        return [
            layout.unpack(copy_struct_from_user(self.caller, self.uptr + at * self.entry_len, self.entry_len, size))
            for at in range(self.entry_num)
        ]


def copy_struct_from_user(caller: Caller, uptr: int, user_size: int, size: int) -> bytes:
    """lib/usercopy.c:copy_struct_from_user(): shorter is zero-extended, longer must be zero; E2BIG, EFAULT."""
    if user_size <= size:
        return caller.copy_from_user(uptr, user_size).ljust(size, b"\0")
    at, end = uptr + size, uptr + user_size
    while at < end:
        want = min(end - at, 16 * PAGE_SIZE)
        tail = caller.memory.read(at, want)
        if tail.count(0) != len(tail):
            raise E2BIG(f"the struct is {user_size} bytes, this version knows {size}, and the rest is not zero")
        if len(tail) < want:
            raise EFAULT(f"memory at {at + len(tail):#x} cannot be read")
        at += want
    return caller.copy_from_user(uptr, size)


def _min_size(layout: type[Layout], last: str) -> int:
    return layout.offsetof(last) + layout.sizeof(last)


def _copy_exact(caller: Caller, uptr: int, length: int, layout: type[Layout], last: str) -> bytes:
    """The length rule of iommu_copy_struct_from_user(): from the first published size to the present one."""
    least = _min_size(layout, last)
    if not least <= length <= layout.SIZEOF:
        raise EINVAL(f"data of {length} bytes, {layout.C_NAME} has {least} to {layout.SIZEOF}")
    return caller.copy_from_user(uptr, length).ljust(layout.SIZEOF, b"\0")
