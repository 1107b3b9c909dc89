"""Room client: the ioctls of /dev/iommu with Python's arguments, as steps that no socket is part of.

Each function yields (struct, memory of its pointers), is sent the result or thrown the IommufdOSError of that
ioctl, and returns what the caller wants of the struct. Both clients, blocking and Trio, run the same steps.
"""

from __future__ import annotations

import errno
from collections.abc import Generator, Iterable, Sequence
from typing import NamedTuple, Protocol, TypeVar

from iommufd_uapi import iommufd as uapi
from iommufd_uapi import iommufd_test as uapi_test
from iommufd_uapi import kvm
from iommufd_uapi.layout import Ioctl, Layout, VfioIoctl

from .call import IommufdOSError
from .files import HasFileno, fd_number
from .memory import NO_MEMORY, Buffers, Memory

T = TypeVar("T")
Step = tuple[Ioctl | VfioIoctl, Memory]
Steps = Generator[Step, int, T]

U64_MAX = (1 << 64) - 1

# The data_type that goes with a struct, for callers that do not say.
DATA_TYPES: dict[type[Layout], int] = {
    uapi.HwptVtdS1: uapi.IOMMU_HWPT_DATA_VTD_S1,
    kvm.HwptKvm: kvm.IOMMU_HWPT_DATA_KVM,
    uapi.HwptArmSmmuv3: uapi.IOMMU_HWPT_DATA_ARM_SMMUV3,
    uapi.HwptAmdGuest: uapi.IOMMU_HWPT_DATA_AMD_GUEST,
    uapi_test.HwptSelftest: uapi_test.IOMMU_HWPT_DATA_SELFTEST,
    uapi.HwptVtdS1Invalidate: uapi.IOMMU_HWPT_INVALIDATE_DATA_VTD_S1,
    uapi.ViommuArmSmmuv3Invalidate: uapi.IOMMU_VIOMMU_INVALIDATE_DATA_ARM_SMMUV3,
    uapi_test.HwptInvalidateSelftest: uapi_test.IOMMU_HWPT_INVALIDATE_DATA_SELFTEST,
    uapi_test.ViommuInvalidateSelftest: uapi_test.IOMMU_VIOMMU_INVALIDATE_DATA_SELFTEST,
}
HW_INFOS: dict[int, type[Layout]] = {
    uapi.IOMMU_HW_INFO_TYPE_INTEL_VTD: uapi.HwInfoVtd,
    uapi.IOMMU_HW_INFO_TYPE_ARM_SMMUV3: uapi.HwInfoArmSmmuv3,
    uapi.IOMMU_HW_INFO_TYPE_TEGRA241_CMDQV: uapi.HwInfoTegra241Cmdqv,
    uapi.IOMMU_HW_INFO_TYPE_AMD: uapi.HwInfoAmd,
    uapi_test.IOMMU_HW_INFO_TYPE_SELFTEST: uapi_test.TestHwInfo,
}


class HasAddress(Protocol):
    """Memory that can be mapped: a GuestMemory, or a part of one."""

    address: int

    def __len__(self) -> int: ...


class IovaRanges(NamedTuple):
    """What an IOAS may map: the usable ranges as (first, last), and the alignment of IOVAs."""

    ranges: list[tuple[int, int]]
    alignment: int


class DeviceInfo(NamedTuple):
    """What the IOMMU of a device is and can."""

    data_type: int
    data: bytes  #: of that type
    info: Layout | None  #: the same as a struct; None for an unknown type
    capabilities: int
    max_pasid_log2: int


def _bytes(data: Layout | bytes | bytearray) -> bytearray:
    return bytearray(data.pack() if isinstance(data, Layout) else data)


def _data_type(data_type: int | None, data: object) -> int:
    """The caller's, or the one that goes with the struct."""
    return DATA_TYPES.get(type(data), 0) if data_type is None else data_type  # type: ignore[arg-type]


def _map_flags(iova: int | None, *, readable: bool, writable: bool) -> int:
    return (
        (uapi.IOMMU_IOAS_MAP_FIXED_IOVA if iova is not None else 0)
        | (uapi.IOMMU_IOAS_MAP_WRITEABLE if writable else 0)
        | (uapi.IOMMU_IOAS_MAP_READABLE if readable else 0)
    )


# ---- IOAS --------------------------------------------------------------------------------------------------


def destroy(id: int) -> Steps[None]:
    """IOMMU_DESTROY. ENOENT; EBUSY while another object holds it."""
    yield uapi.Destroy(id=id), NO_MEMORY


def ioas_alloc() -> Steps[int]:
    """IOMMU_IOAS_ALLOC: the id of a new, empty address space."""
    cmd = uapi.IoasAlloc()
    yield cmd, NO_MEMORY
    return cmd.out_ioas_id


def ioas_map(
    ioas_id: int,
    memory: HasAddress | int,
    length: int | None = None,
    iova: int | None = None,
    *,
    readable: bool = True,
    writable: bool = True,
) -> Steps[int]:
    """IOMMU_IOAS_MAP of memory (or an address): its IOVA, which the kernel chooses if none is given.

    EEXIST, ENOSPC, EINVAL; EFAULT if a page is missing that a domain needs.
    """
    if isinstance(memory, int):
        if length is None:
            raise TypeError("an address needs a length")
        address = memory
    else:
        address, length = memory.address, len(memory) if length is None else length
    flags = _map_flags(iova, readable=readable, writable=writable)
    cmd = uapi.IoasMap(flags=flags, ioas_id=ioas_id, user_va=address, length=length, iova=iova or 0)
    yield cmd, NO_MEMORY
    return cmd.iova


def ioas_map_file(
    ioas_id: int,
    fd: HasFileno | int,
    start: int,
    length: int,
    iova: int | None = None,
    *,
    readable: bool = True,
    writable: bool = True,
) -> Steps[int]:
    """IOMMU_IOAS_MAP_FILE: map [start, start + length) of a memfd; its IOVA."""
    flags = _map_flags(iova, readable=readable, writable=writable)
    number = fd_number(fd)
    cmd = uapi.IoasMapFile(flags=flags, ioas_id=ioas_id, fd=number, start=start, length=length, iova=iova or 0)
    yield cmd, NO_MEMORY
    return cmd.iova


def ioas_copy(
    dst_ioas_id: int,
    src_ioas_id: int,
    src_iova: int,
    length: int,
    iova: int | None = None,
    *,
    readable: bool = True,
    writable: bool = True,
) -> Steps[int]:
    """IOMMU_IOAS_COPY: share a mapping with another IOAS, without pinning again; its IOVA there."""
    flags = _map_flags(iova, readable=readable, writable=writable)
    cmd = uapi.IoasCopy(
        flags=flags,
        dst_ioas_id=dst_ioas_id,
        src_ioas_id=src_ioas_id,
        length=length,
        dst_iova=iova or 0,
        src_iova=src_iova,
    )
    yield cmd, NO_MEMORY
    return cmd.dst_iova


def ioas_unmap(ioas_id: int, iova: int = 0, length: int = U64_MAX) -> Steps[int]:
    """IOMMU_IOAS_UNMAP of whole mappings, by default all: how many bytes. ENOENT, EBUSY."""
    cmd = uapi.IoasUnmap(ioas_id=ioas_id, iova=iova, length=length)
    yield cmd, NO_MEMORY
    return cmd.length


def ioas_iova_ranges(ioas_id: int) -> Steps[IovaRanges]:
    """IOMMU_IOAS_IOVA_RANGES, asked again with more room as long as the answer does not fit."""
    count = 8
    while True:
        buffers, room = Buffers(), bytearray(16 * count)
        cmd = uapi.IoasIovaRanges(ioas_id=ioas_id, num_iovas=count, allowed_iovas=buffers.add(room))
        try:
            yield cmd, buffers
        except IommufdOSError as error:
            if error.errno != errno.EMSGSIZE:
                raise
            count = cmd.num_iovas
        else:
            found = [uapi.IovaRange.unpack(room, 16 * i) for i in range(cmd.num_iovas)]
            return IovaRanges([(span.start, span.last) for span in found], cmd.out_iova_alignment)


def ioas_allow_iovas(ioas_id: int, ranges: Iterable[tuple[int, int]]) -> Steps[None]:
    """IOMMU_IOAS_ALLOW_IOVAS: automatic IOVAs shall lie in these (first, last) only. EADDRINUSE, EINVAL."""
    buffers = Buffers()
    data = b"".join(uapi.IovaRange(start, last).pack() for start, last in ranges)
    yield (
        uapi.IoasAllowIovas(ioas_id=ioas_id, num_iovas=len(data) // 16, allowed_iovas=buffers.add(data)),
        buffers,
    )


def ioas_change_process() -> Steps[None]:
    """IOMMU_IOAS_CHANGE_PROCESS: the pinned memory counts as the calling process's from now on."""
    yield uapi.IoasChangeProcess(), NO_MEMORY


def option(option_id: int, value: int | None = None, *, object_id: int = 0) -> Steps[int]:
    """IOMMU_OPTION: set it to a value, or ask for it; the value. EOPNOTSUPP, EPERM."""
    op = uapi.IOMMU_OPTION_OP_GET if value is None else uapi.IOMMU_OPTION_OP_SET
    cmd = uapi.Option(option_id=option_id, op=op, object_id=object_id, val64=value or 0)
    yield cmd, NO_MEMORY
    return cmd.val64


def vfio_ioas_get() -> Steps[int]:
    """IOMMU_VFIO_IOAS_GET: the IOAS that VFIO's type 1 ioctls use. ENODEV."""
    cmd = uapi.VfioIoas(op=uapi.IOMMU_VFIO_IOAS_GET)
    yield cmd, NO_MEMORY
    return cmd.ioas_id


def vfio_ioas_set(ioas_id: int) -> Steps[None]:
    """IOMMU_VFIO_IOAS_SET."""
    yield uapi.VfioIoas(op=uapi.IOMMU_VFIO_IOAS_SET, ioas_id=ioas_id), NO_MEMORY


def vfio_ioas_clear() -> Steps[None]:
    """IOMMU_VFIO_IOAS_CLEAR."""
    yield uapi.VfioIoas(op=uapi.IOMMU_VFIO_IOAS_CLEAR), NO_MEMORY


# ---- devices and page tables -------------------------------------------------------------------------------


def get_hw_info(dev_id: int, data_type: int | None = None) -> Steps[DeviceInfo]:
    """IOMMU_GET_HW_INFO, of the device's own type or of the one asked for (EOPNOTSUPP)."""
    flags = 0 if data_type is None else uapi.IOMMU_HW_INFO_FLAG_INPUT_TYPE
    room = 64
    while True:
        buffers, data = Buffers(), bytearray(room)
        cmd = uapi.HwInfo(
            flags=flags, dev_id=dev_id, data_len=room, data_uptr=buffers.add(data), data_type=data_type or 0
        )
        yield cmd, buffers
        if cmd.data_len <= room:
            break
        room = cmd.data_len
    found = bytes(data[: cmd.data_len])
    layout = HW_INFOS.get(cmd.data_type)
    info = layout.unpack(found) if layout is not None and len(found) >= layout.SIZEOF else None
    return DeviceInfo(cmd.data_type, found, info, cmd.out_capabilities, cmd.out_max_pasid_log2)


def hwpt_alloc(
    dev_id: int,
    pt_id: int,
    *,
    flags: int = 0,
    data: Layout | bytes = b"",
    data_type: int | None = None,
    fault_id: int | None = None,
) -> Steps[int]:
    """IOMMU_HWPT_ALLOC on an IOAS, a parent HWPT or a vIOMMU; its id. A struct in `data` implies the type."""
    buffers, payload = Buffers(), _bytes(data)
    cmd = uapi.HwptAlloc(
        flags=flags if fault_id is None else flags | uapi.IOMMU_HWPT_FAULT_ID_VALID,
        dev_id=dev_id,
        pt_id=pt_id,
        data_type=_data_type(data_type, data),
        data_len=len(payload),
        data_uptr=buffers.add(payload),
        fault_id=fault_id or 0,
    )
    yield cmd, buffers
    return cmd.out_hwpt_id


def hwpt_set_dirty_tracking(hwpt_id: int, enable: bool) -> Steps[None]:
    """IOMMU_HWPT_SET_DIRTY_TRACKING."""
    flags = uapi.IOMMU_HWPT_DIRTY_TRACKING_ENABLE if enable else 0
    yield uapi.HwptSetDirtyTracking(flags=flags, hwpt_id=hwpt_id), NO_MEMORY


def hwpt_get_dirty_bitmap(
    hwpt_id: int,
    iova: int,
    length: int,
    page_size: int = 4096,
    bitmap: bytearray | None = None,
    *,
    clear: bool = True,
) -> Steps[bytearray]:
    """IOMMU_HWPT_GET_DIRTY_BITMAP: set the bits of dirty pages in the bitmap, or in a new one; the bitmap."""
    if bitmap is None:
        bitmap = bytearray(max(-(-length // page_size) + 7, 0) // 8)
    buffers = Buffers()
    cmd = uapi.HwptGetDirtyBitmap(
        hwpt_id=hwpt_id,
        flags=0 if clear else uapi.IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR,
        iova=iova,
        length=length,
        page_size=page_size,
        data=buffers.add(bitmap),
    )
    yield cmd, buffers
    return bitmap


def hwpt_invalidate(
    hwpt_id: int,
    entries: Sequence[Layout] | bytes,
    *,
    data_type: int | None = None,
    entry_len: int | None = None,
) -> Steps[int]:
    """IOMMU_HWPT_INVALIDATE of a nested HWPT or a vIOMMU: how many entries were done.

    Structs imply data_type and entry_len. After an error, `error.struct.entry_num` says how many were done.
    """
    if isinstance(entries, bytes):
        data, first = entries, None
    else:
        data, first = b"".join(entry.pack() for entry in entries), entries[0] if entries else None
    if entry_len is None:
        entry_len = first.SIZEOF if first is not None else len(data)
    buffers = Buffers()
    cmd = uapi.HwptInvalidate(
        hwpt_id=hwpt_id,
        data_uptr=buffers.add(data),
        data_type=_data_type(data_type, first),
        entry_len=entry_len,
        entry_num=len(data) // entry_len if entry_len else 0,
    )
    yield cmd, buffers
    return cmd.entry_num


# ---- vIOMMU and event queues -------------------------------------------------------------------------------


def fault_queue_alloc() -> Steps[tuple[int, int]]:
    """IOMMU_FAULT_QUEUE_ALLOC: (id, descriptor)."""
    cmd = uapi.FaultAlloc()
    yield cmd, NO_MEMORY
    return cmd.out_fault_id, cmd.out_fault_fd


def viommu_alloc(dev_id: int, hwpt_id: int, type: int, data: Layout | bytearray | None = None) -> Steps[int]:
    """IOMMU_VIOMMU_ALLOC on a nesting parent; its id. `data` is read and then updated."""
    buffers, payload = Buffers(), bytearray()
    if data is not None:
        payload = data if isinstance(data, bytearray) else bytearray(data.pack())
    cmd = uapi.ViommuAlloc(
        type=type, dev_id=dev_id, hwpt_id=hwpt_id, data_len=len(payload), data_uptr=buffers.add(payload)
    )
    yield cmd, buffers
    if isinstance(data, Layout):
        data.update(payload)
    return cmd.out_viommu_id


def vdevice_alloc(viommu_id: int, dev_id: int, virt_id: int) -> Steps[int]:
    """IOMMU_VDEVICE_ALLOC: the device's name within the vIOMMU (vSID, vRID); the vDEVICE's id. EEXIST."""
    cmd = uapi.VdeviceAlloc(viommu_id=viommu_id, dev_id=dev_id, virt_id=virt_id)
    yield cmd, NO_MEMORY
    return cmd.out_vdevice_id


def veventq_alloc(viommu_id: int, type: int, depth: int) -> Steps[tuple[int, int]]:
    """IOMMU_VEVENTQ_ALLOC: (id, descriptor). EEXIST."""
    cmd = uapi.VeventqAlloc(viommu_id=viommu_id, type=type, veventq_depth=depth)
    yield cmd, NO_MEMORY
    return cmd.out_veventq_id, cmd.out_veventq_fd


def hw_queue_alloc(viommu_id: int, type: int, index: int, nesting_parent_iova: int, length: int) -> Steps[int]:
    """IOMMU_HW_QUEUE_ALLOC: a queue in guest memory that the hardware reads itself; its id."""
    cmd = uapi.HwQueueAlloc(
        viommu_id=viommu_id, type=type, index=index, nesting_parent_iova=nesting_parent_iova, length=length
    )
    yield cmd, NO_MEMORY
    return cmd.out_hw_queue_id
