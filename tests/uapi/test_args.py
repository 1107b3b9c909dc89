"""The memory and the fds of a call, from its number and the bytes of its struct."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iommufd_uapi import iommufd, iommufd_test, vfio
from iommufd_uapi.args import fds, pointers, returns_fd
from iommufd_uapi.layout import Direction, Ioctl, Layout, VfioIoctl

IN, OUT, INOUT, ADDRESS = Direction.IN, Direction.OUT, Direction.INOUT, Direction.ADDRESS

IOCTLS: tuple[type[Ioctl | VfioIoctl], ...] = (
    *iommufd.IOCTLS,
    iommufd_test.TestCmd,
    *vfio.DEVICE_IOCTLS,
    *vfio.CONTAINER_IOCTLS,
)
any_cmd = st.sampled_from([cls.CMD for cls in IOCTLS]) | st.integers(0, 1 << 32)


@given(cmd=any_cmd, data=st.binary(max_size=200), device=st.booleans())
def test_any_bytes_are_answered(cmd: int, data: bytes, device: bool) -> None:
    for offset, address, nbytes, direction in pointers(cmd, data, device):
        assert offset >= 8
        assert 0 <= address < 1 << 64
        assert nbytes >= 0
        assert direction in Direction
    for offset, direction in fds(cmd, data, device):
        assert offset >= 8
        assert direction in (IN, OUT)
    assert returns_fd(cmd, data, device) in (True, False)


@given(cmd=any_cmd, op=st.integers(0, 30), data=st.binary(max_size=160))
def test_a_short_struct_is_one_with_zeros(cmd: int, op: int, data: bytes) -> None:
    """As copy_struct_from_user() does. The tail's fds are those that are there."""
    data = struct.pack("<II", len(data) + 8, op) + data
    whole = data + bytes(200)
    assert pointers(cmd, data) == pointers(cmd, whole)
    assert returns_fd(cmd, data) == returns_fd(cmd, whole)
    if cmd != vfio.VFIO_DEVICE_SET_IRQS:
        assert fds(cmd, data) == fds(cmd, whole)


def test_what_lies_beyond_size_is_zero() -> None:
    full = iommufd.HwptAlloc(data_len=24, data_uptr=0x7000)
    assert pointers(iommufd.IOMMU_HWPT_ALLOC, full.pack()) == [(32, 0x7000, 24, IN)]
    full.size = 24  # the first version of the struct
    assert pointers(iommufd.IOMMU_HWPT_ALLOC, full.pack()) == [(32, 0, 0, IN)]


def test_plain_ioctls_have_nothing() -> None:
    data = iommufd.IoasAlloc().pack()
    assert pointers(iommufd.IOMMU_IOAS_ALLOC, data) == ()
    assert fds(iommufd.IOMMU_IOAS_ALLOC, data) == ()
    assert not returns_fd(iommufd.IOMMU_IOAS_ALLOC, data)
    assert pointers(0x1234, data) == ()
    assert fds(0x1234, data) == ()
    assert not returns_fd(0x1234, data)


@pytest.mark.parametrize(
    ("obj", "expected"),
    [
        (iommufd.IoasMap(user_va=0x1000, length=5), [(16, 0x1000, 5, ADDRESS)]),
        (iommufd.IoasIovaRanges(num_iovas=2, allowed_iovas=0x10), [(16, 0x10, 32, OUT)]),
        (iommufd.HwInfo(data_len=7, data_uptr=0x10), [(16, 0x10, 7, OUT)]),
        (iommufd.ViommuAlloc(data_len=7, data_uptr=0x10), [(32, 0x10, 7, INOUT)]),
        (iommufd.HwptInvalidate(data_uptr=1, entry_len=16, entry_num=3), [(8, 1, 48, IN)]),
        (iommufd.HwptGetDirtyBitmap(length=4096, page_size=4096, data=9), [(40, 9, 1, INOUT)]),
        (vfio.VfioDeviceBindIommufd(flags=1, token_uuid_ptr=0x10), [(16, 0x10, 16, IN)]),
        (vfio.VfioIommuType1DmaMap(vaddr=0x1000, size=0x2000), [(8, 0x1000, 0x2000, ADDRESS)]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_pointers(obj: Ioctl | VfioIoctl, expected: list[tuple[int, int, int, Direction]]) -> None:
    assert pointers(obj.CMD, obj.pack()) == expected
    assert pointers(obj.CMD, memoryview(obj.pack())) == expected


def test_pointers_of_test_cmd() -> None:
    def of(op: int, union: Layout) -> list[tuple[int, int, int, Direction]]:
        data = iommufd_test.TestCmd(op=op, u=union.pack()).pack()
        return list(pointers(iommufd_test.IOMMU_TEST_CMD, data))

    rw = iommufd_test.IOMMU_TEST_OP_ACCESS_RW
    assert of(rw, iommufd_test.AccessRw(uptr=0x1000, length=9)) == [(32, 0x1000, 9, OUT)]
    assert of(rw, iommufd_test.AccessRw(uptr=0x1000, length=9, flags=1)) == [(32, 0x1000, 9, IN)]
    dirty = iommufd_test.Dirty(uptr=0x1000, length=4096 * 64, page_size=4096)
    assert of(iommufd_test.IOMMU_TEST_OP_DIRTY, dirty) == [(48, 0x1000, 8, IN)]
    pages = iommufd_test.AccessPages(uptr=0x1000, length=4096)
    assert of(iommufd_test.IOMMU_TEST_OP_ACCESS_PAGES, pages) == [(40, 0x1000, 4096, ADDRESS)]
    assert of(99, pages) == []


@pytest.mark.parametrize(
    ("op", "expected"),
    [(op, [(8, IN)]) for op in (6, 7, 8, 11)]
    + [(5, [(16, OUT)]), (23, [(16, IN)])]
    + [(op, []) for op in range(30) if op not in (5, 6, 7, 8, 11, 23)],
)
def test_fds_of_test_cmd(op: int, expected: list[tuple[int, Direction]]) -> None:
    data = iommufd_test.TestCmd(op=op, id=7).pack()
    assert list(fds(iommufd_test.IOMMU_TEST_CMD, data)) == expected
    assert returns_fd(iommufd_test.IOMMU_TEST_CMD, data) == (op == 22)


def test_fds() -> None:
    assert fds(iommufd.IOMMU_IOAS_MAP_FILE, iommufd.IoasMapFile(fd=3).pack()) == ((12, IN),)
    assert fds(iommufd.IOMMU_FAULT_QUEUE_ALLOC, iommufd.FaultAlloc().pack()) == ((12, OUT),)
    assert fds(iommufd.IOMMU_VEVENTQ_ALLOC, iommufd.VeventqAlloc().pack()) == ((24, OUT),)
    assert fds(vfio.VFIO_DEVICE_BIND_IOMMUFD, vfio.VfioDeviceBindIommufd().pack()) == ((8, IN),)


def test_fds_of_set_irqs() -> None:
    def of(flags: int, count: int, tail: bytes, argsz: int | None = None) -> list[tuple[int, Direction]]:
        fixed = vfio.VfioIrqSet(argsz=argsz or 20 + len(tail), flags=flags, count=count).pack()
        return list(fds(vfio.VFIO_DEVICE_SET_IRQS, fixed + tail))

    eventfd = vfio.VFIO_IRQ_SET_DATA_EVENTFD | vfio.VFIO_IRQ_SET_ACTION_TRIGGER
    assert of(eventfd, 2, struct.pack("<ii", 5, -1)) == [(20, IN), (24, IN)]
    assert of(eventfd, 0xFFFFFFFF, struct.pack("<ii", 5, -1)) == [(20, IN), (24, IN)]
    assert of(eventfd, 2, struct.pack("<ii", 5, -1), argsz=24) == [(20, IN)]
    assert of(vfio.VFIO_IRQ_SET_DATA_BOOL, 4, b"\1\1\1\1") == []


def test_device_and_container_share_numbers() -> None:
    assert vfio.VFIO_DEVICE_FEATURE == vfio.VFIO_IOMMU_DIRTY_PAGES
    get, probe = vfio.VFIO_DEVICE_FEATURE_GET, vfio.VFIO_DEVICE_FEATURE_PROBE
    dma_buf = vfio.VfioDeviceFeature(flags=get | vfio.VFIO_DEVICE_FEATURE_DMA_BUF)
    assert returns_fd(vfio.VFIO_DEVICE_FEATURE, dma_buf.pack())
    dma_buf.flags |= probe
    assert not returns_fd(vfio.VFIO_DEVICE_FEATURE, dma_buf.pack())
    mapping = vfio.VfioIommuType1DmaMap(vaddr=1, size=2).pack()
    assert pointers(vfio.VFIO_IOMMU_MAP_DMA, mapping)
    assert pointers(vfio.VFIO_IOMMU_MAP_DMA, mapping, device=True) == ()
