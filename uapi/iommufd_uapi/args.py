"""Room uapi (mirrors no header): what a carrier of an ioctl must carry besides the struct: memory and fds.

Client, server, interposer and trace ask here and nowhere else. Each function takes the ioctl's number and
the bytes of its struct, and gives an answer for anything: an unknown number has neither pointers nor fds, and
bytes that are missing, or lie beyond the size that the struct itself states, count as zero, as in the kernel.

Some VFIO numbers mean one thing on a container and another on a device. `device=True` looks at the device's
ioctls alone; without it an ioctl of a container is found too, but a device's comes first.
"""

from collections.abc import Iterable, Sequence
from typing import TypeAlias

import msgspec

from .iommufd import IOCTLS, HwptAlloc
from .iommufd_test import TEST_OPS, TestCmd
from .kvm import IOCTLS as KVM_IOCTLS
from .kvm import IOMMU_HWPT_DATA_KVM, KVM_CREATE_VCPU, KVM_CREATE_VM, HwptKvm, KvmIoctl
from .layout import BytesLike, Direction, Fd, FdIn, Ioctl, Layout, Masked, Pointer, Tail, VfioIoctl
from .vfio import CONTAINER_IOCTLS, DEVICE_IOCTLS

Memory: TypeAlias = tuple[int, int, int, Direction]  #: offset of the pointer, address, bytes, direction
FdPlace: TypeAlias = tuple[int, Direction]  #: offset of the fd, direction


class Arguments(msgspec.Struct, frozen=True):
    """What one ioctl, or one operation of IOMMU_TEST_CMD, refers to."""

    layout: type[Layout]
    start: int = 0  #: of the layout in the ioctl's struct
    pointers: tuple[Pointer, ...] = ()
    fds: tuple[FdPlace, ...] = ()
    tail: Tail | None = None  #: only if it can hold fds
    returns_fd: Masked | bool = False


def pointers(cmd: int, struct_bytes: BytesLike, device: bool = False) -> Sequence[Memory]:
    """The memory that the call refers to. A pointer that this call does not use has 0 bytes."""
    found = _arguments(cmd, struct_bytes, device)
    if found is None or not found.pointers:
        return ()
    obj = _unpack(found, struct_bytes)
    return [
        (pointer.offset, getattr(obj, pointer.name), pointer.rule.bytes(obj), pointer.direction_of(obj))
        for pointer in found.pointers
    ]


def fds(cmd: int, struct_bytes: BytesLike, device: bool = False) -> Sequence[FdPlace]:
    """Where fds are in the struct and its tail. The number there may be any: -1, or nothing that is open."""
    found = _arguments(cmd, struct_bytes, device)
    if found is None:
        return ()
    if found.tail is None:
        return found.fds
    obj = _unpack(found, struct_bytes)
    room = min(found.tail.rule.bytes(obj), max(len(struct_bytes) - found.layout.SIZEOF, 0))
    count = min(found.tail.fds.bytes(obj), room // 4)
    return [*found.fds, *((found.layout.SIZEOF + 4 * i, FdIn.direction) for i in range(count))]


def returns_fd(cmd: int, struct_bytes: BytesLike, device: bool = False) -> bool:
    """Whether the call's result, if not an error, is a new fd."""
    found = _arguments(cmd, struct_bytes, device)
    if found is None or isinstance(found.returns_fd, bool):
        return found is not None and bool(found.returns_fd)
    return found.returns_fd.bytes(_unpack(found, struct_bytes)) > 0


def pointed_fds(cmd: int, struct_bytes: BytesLike) -> Sequence[tuple[int, int]]:
    """Where fds are in memory that the struct points to: (offset of the pointer, offset behind it)."""
    if cmd != HwptAlloc.CMD:
        return ()
    struct = HwptAlloc.unpack(whole(struct_bytes, HwptAlloc.SIZEOF))
    if struct.data_type != IOMMU_HWPT_DATA_KVM or struct.data_len != HwptKvm.SIZEOF:
        return ()
    return [(HwptAlloc.offsetof("data_uptr"), fd.offset) for fd in HwptKvm.FDS]


# ---- tables --------------------------------------------------------------------------------------


def _places(found: Iterable[Fd]) -> tuple[FdPlace, ...]:
    return tuple((fd.offset, fd.direction) for fd in found)


def _iommufd(struct: type[Ioctl]) -> Arguments:
    return Arguments(struct, 0, struct.POINTERS, _places(struct.FDS))


def _vfio(struct: type[VfioIoctl]) -> Arguments:
    tail = struct.TAIL if struct.TAIL and str(struct.TAIL.fds) != "0" else None
    return Arguments(struct, 0, struct.POINTERS, _places(struct.FDS), tail, struct.RETURNS_FD or False)


_TEST = {
    number: Arguments(
        op.union, TestCmd.offsetof("u"), op.pointers(), _places(op.fds()), returns_fd=op.returns_fd
    )
    for number, op in TEST_OPS.items()
}
_DEVICE = {struct.CMD: _vfio(struct) for struct in DEVICE_IOCTLS}
_CONTAINER = {struct.CMD: _vfio(struct) for struct in CONTAINER_IOCTLS}
_KVM = {struct.CMD: Arguments(struct, 0, (), _places(struct.FDS)) for struct in KVM_IOCTLS}
_KVM[KVM_CREATE_VM] = _KVM[KVM_CREATE_VCPU] = Arguments(KvmIoctl, returns_fd=True)
_ANY = _CONTAINER | _DEVICE | _KVM | {struct.CMD: _iommufd(struct) for struct in IOCTLS}


def _arguments(cmd: int, data: BytesLike, device: bool) -> Arguments | None:
    if cmd != TestCmd.CMD:
        return (_DEVICE if device else _ANY).get(cmd)
    return _TEST.get(int.from_bytes(whole(data, TestCmd.SIZEOF)[4:8], "little"))


def _unpack(found: Arguments, data: BytesLike) -> Layout:
    return found.layout.unpack(whole(data, found.start + found.layout.SIZEOF), found.start)


def whole(data: BytesLike, size: int) -> BytesLike:
    """copy_struct_from_user(): at least `size` bytes; what the struct does not have is zero."""
    have = min(int.from_bytes(data[:4], "little"), len(data))
    return data if have >= size else bytes(data[:have]).ljust(size, b"\0")
