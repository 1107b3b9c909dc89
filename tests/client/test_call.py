"""One request: structs, pointers and descriptors into bytes, and answers back into memory."""

import os

import pytest

from iommufd_client import call as calls
from iommufd_client.call import STRUCT_ADDR, Descriptors
from iommufd_client.memory import Buffers
from iommufd_uapi import iommufd as uapi
from iommufd_uapi import iommufd_test as mock
from iommufd_uapi import vfio, wire
from tests.client import reference

PAGE = 4096


class Pages:
    """Memory of a process: pages at addresses, some not writable."""

    def __init__(self, pages: dict[int, bytes], read_only: frozenset[int] = frozenset()) -> None:
        self.pages = {at: bytearray(data.ljust(PAGE, b"\0")) for at, data in pages.items()}
        self.read_only = read_only

    def _span(self, addr: int, length: int, without: frozenset[int]) -> int:
        end = addr
        while end < addr + length and end - end % PAGE in self.pages and end - end % PAGE not in without:
            end = min(end - end % PAGE + PAGE, addr + length)
        return end - addr

    def read(self, addr: int, length: int) -> bytes:
        length = self._span(addr, length, frozenset())
        if not length:
            return b""
        first = addr - addr % PAGE
        whole = b"".join(self.pages[at] for at in range(first, addr + length, PAGE))
        return bytes(whole[addr - first : addr - first + length])

    def writable(self, addr: int, length: int) -> int:
        return self._span(addr, length, self.read_only)

    def write(self, addr: int, data: bytes) -> int:
        length = self.writable(addr, len(data))
        for at in range(length):
            page = addr + at - (addr + at) % PAGE
            self.pages[page][addr + at - page] = data[at]
        return length


def sent(call: calls.Call, base: int = 0, flags: int = 0) -> reference.Request:
    (request,) = reference.parse(call.encode(base, flags), fds=64)
    return request


def test_the_bytes_of_a_small_ioctl() -> None:
    packet = calls.ioctl(uapi.IOMMU_IOAS_ALLOC, uapi.IoasAlloc()).encode(0, 0)
    assert packet == bytes.fromhex(
        "38000000 00 00 0100 813b0000 00000000"  # length 56, IOCTL, one segment, 0x3b81, argument in segment 0
        "0000000000 80ffff 0c00000000000000 0c00000000000000 01000000 00000000"  # 12 bytes either way, 1 sent
        "0c00000000000000"
    )


def test_reason_is_a_flag() -> None:
    assert sent(calls.ioctl(uapi.IOMMU_IOAS_ALLOC, uapi.IoasAlloc()), flags=1).reason


@pytest.mark.parametrize("as_bytes", [False, True])
def test_a_pointer_becomes_a_segment(as_bytes: bool) -> None:
    buffers = Buffers()
    cmd = uapi.HwptAlloc(data_type=1, data_len=16, data_uptr=buffers.add(b"ABCDEFGH" + bytes(8)))
    request = sent(calls.ioctl(cmd.CMD, bytearray(cmd.pack()) if as_bytes else cmd, buffers))
    struct, data = request.segments
    assert (struct.addr, struct.readable, struct.writable, struct.data) == (STRUCT_ADDR, 48, 48, cmd.pack())
    assert (data.addr, data.readable, data.writable) == (cmd.data_uptr, 16, 0)
    assert data.data == b"ABCDEFGH" + bytes(8)


def test_an_output_pointer_is_only_writable() -> None:
    buffers = Buffers()
    cmd = uapi.HwInfo(data_len=40, data_uptr=buffers.add(bytearray(b"x" * 24)))
    data = sent(calls.ioctl(cmd.CMD, cmd, buffers)).segments[1]
    assert (data.readable, data.writable) == (0, 24)


def test_a_pointer_to_nowhere_has_no_segment() -> None:
    cmd = uapi.HwptAlloc(data_type=1, data_len=16, data_uptr=0x1000)
    assert len(sent(calls.ioctl(cmd.CMD, cmd, Buffers())).segments) == 1


def test_an_address_that_is_only_kept_is_not_read() -> None:
    cmd = uapi.IoasMap(user_va=0x1000, length=1 << 40)
    assert len(sent(calls.ioctl(cmd.CMD, cmd, Buffers())).segments) == 1


@pytest.mark.parametrize(
    ("flags", "readable", "writable"), [(mock.MOCK_ACCESS_RW_WRITE, 8, 0), (0, 0, 8)], ids=["write", "read"]
)
def test_a_flag_decides_the_direction(flags: int, readable: int, writable: int) -> None:
    buffers = Buffers()
    arg = mock.AccessRw(length=8, uptr=buffers.add(bytearray(8)), flags=flags)
    cmd = mock.TestCmd(op=mock.IOMMU_TEST_OP_ACCESS_RW, id=0, u=arg.pack())
    call = calls.ioctl(cmd.CMD, cmd, buffers)
    assert (call.segments[1].readable, call.segments[1].writable) == (readable, writable)


# ---- structs at addresses ----


def at_end(data: bytes, more: dict[int, bytes] | None = None) -> tuple[Pages, int]:
    """Memory whose last bytes before a hole are these."""
    return Pages({0x10000: data.rjust(PAGE, b"\0"), **(more or {})}), 0x10000 + PAGE - len(data)


def test_a_struct_at_an_address() -> None:
    memory, addr = at_end(uapi.Destroy(id=7).pack())
    request = sent(calls.ioctl(uapi.IOMMU_DESTROY, addr, memory))
    (segment,) = request.segments
    assert (segment.addr, segment.readable, segment.writable, segment.data[4]) == (addr, 8, 8, 7)


@pytest.mark.parametrize("addr", [0, 1, 0xFFFF_8000_0000_0000, 2**64 - 1])
def test_a_bad_address_travels_as_it_is(addr: int) -> None:
    (segment,) = sent(calls.ioctl(uapi.IOMMU_DESTROY, addr, Pages({}))).segments
    assert (segment.addr, segment.readable, segment.writable) == (addr, 0, 0)


def test_a_number_instead_of_a_pointer() -> None:
    (segment,) = sent(calls.ioctl(vfio.VFIO_CHECK_EXTENSION, vfio.VFIO_TYPE1v2_IOMMU, Pages({}))).segments
    assert segment.addr == vfio.VFIO_TYPE1v2_IOMMU


def test_a_struct_that_is_cut_by_a_hole() -> None:
    memory, addr = at_end(b"\x0c\0\0\0\0\0\0\0")
    (segment,) = sent(calls.ioctl(uapi.IOMMU_IOAS_ALLOC, addr, memory)).segments
    assert (segment.readable, segment.writable) == (8, 8)


def test_a_read_only_struct() -> None:
    memory = Pages({0x10000: uapi.IoasAlloc().pack()}, read_only=frozenset({0x10000}))
    (segment,) = sent(calls.ioctl(uapi.IOMMU_IOAS_ALLOC, 0x10000, memory)).segments
    assert (segment.readable, segment.writable) == (12, 0)


def test_a_short_tail_is_shown_as_it_is() -> None:
    memory, addr = at_end(b"\x0d\0\0\0" + bytes(8) + b"\xff")
    (segment,) = sent(calls.ioctl(uapi.IOMMU_IOAS_ALLOC, addr, memory)).segments
    assert (segment.readable, segment.data[0], segment.data[12]) == (13, 13, 0xFF)


def test_vfio_reads_its_fixed_part_whatever_argsz_says() -> None:
    memory = Pages({0x10000: bytes(24)})
    (segment,) = sent(calls.ioctl(vfio.VFIO_IOMMU_UNMAP_DMA, 0x10000, memory)).segments
    assert segment.readable == vfio.VfioIommuType1DmaUnmap.MIN_SIZE


class Long:
    """A struct at 0x10000 whose first word is `size`, zero but for `patches`, in `mapped` bytes of memory."""

    def __init__(self, size: int, mapped: int, patches: dict[int, int]) -> None:
        self.bytes = dict(enumerate(size.to_bytes(4, "little"))) | patches
        self.mapped = mapped

    def read(self, addr: int, length: int) -> bytes:
        start = addr - 0x10000
        length = max(min(length, self.mapped - start), 0)
        data = bytearray(length)
        for at, value in self.bytes.items():
            if start <= at < start + length:
                data[at - start] = value
        return bytes(data)

    def writable(self, addr: int, length: int) -> int:
        return length

    def write(self, addr: int, data: bytes) -> int:
        for at, value in enumerate(data):
            self.bytes[addr - 0x10000 + at] = value
        return len(data)


@pytest.mark.parametrize("size", [4097, 1 << 20, (1 << 20) + 1, 0x300_0001])
def test_a_huge_struct_of_zeros_is_the_small_one(size: int) -> None:
    memory = Long(size, size, {8: 5})
    call = calls.ioctl(uapi.IOMMU_IOAS_ALLOC, 0x10000, memory)
    (segment,) = sent(call).segments
    assert (segment.readable, segment.data) == (12, b"\x0c\0\0\0\0\0\0\0\5\0\0\0")
    call.store(0, 0, b"\x0c\0\0\0\0\0\0\0\1\0\0\0", Descriptors(()))
    assert memory.read(0x10000, 12) == size.to_bytes(4, "little") + bytes(4) + b"\1\0\0\0"


@pytest.mark.parametrize("dirt", [12, 4095, 4096, (1 << 20) + 5, (3 << 20) - 1])
def test_a_huge_struct_with_a_byte_that_is_not_zero(dirt: int) -> None:
    call = calls.ioctl(uapi.IOMMU_IOAS_ALLOC, 0x10000, Long(3 << 20, 3 << 20, {dirt: 0x80}))
    (segment,) = sent(call).segments
    size = int.from_bytes(segment.data[:4], "little")
    assert size == segment.readable > 12  # no fault ...
    assert any(segment.data[12:size])  # ... but E2BIG


@pytest.mark.parametrize("hole", [4096, 4097, 1 << 20, (2 << 20) + 17])
def test_a_huge_struct_with_a_fault_in_it(hole: int) -> None:
    call = calls.ioctl(uapi.IOMMU_IOAS_ALLOC, 0x10000, Long(0xFFFF_FFFF, hole, {hole + 1: 1}))
    (segment,) = sent(call).segments
    assert int.from_bytes(segment.data[:4], "little") > segment.readable
    assert not any(segment.data[12:])


# ---- descriptors ----


def test_a_descriptor_becomes_an_index_and_comes_back() -> None:
    fd = os.memfd_create("x")
    try:
        cmd = uapi.IoasMapFile(fd=fd, length=PAGE)
        call = calls.ioctl(cmd.CMD, cmd, Buffers())
        assert call.fds() == [fd]
        struct = uapi.IoasMapFile.unpack(sent(call, base=3).segments[0].data)
        assert struct.fd == 3
        struct.iova = 0x5000
        call.store(0, 0, struct.pack(), Descriptors(()))
        assert call.result(0, Descriptors(())) == 0
    finally:
        os.close(fd)
    assert (cmd.fd, cmd.iova) == (fd, 0x5000)


NOT_OPEN = [(-1, wire.NONE), (-2, wire.NONE), (4000, wire.CLOSED), (2**31 - 1, wire.CLOSED)]


@pytest.mark.parametrize(("fd", "index"), NOT_OPEN)
def test_a_descriptor_that_is_not_open(fd: int, index: int) -> None:
    cmd = uapi.IoasMapFile(fd=fd)
    call = calls.ioctl(cmd.CMD, cmd, Buffers())
    assert call.fds() == []
    assert sent(call).segments[0].data[12:16] == index.to_bytes(4, "little")
    call.store(0, 0, sent(call).segments[0].data, Descriptors(()))
    call.result(-9, Descriptors(()))
    assert cmd.fd == fd


def test_several_descriptors_of_one_request() -> None:
    ends = os.pipe()
    try:
        numbers = [ends[0], -1, ends[1]]
        head = vfio.VfioIrqSet(32, vfio.VFIO_IRQ_SET_DATA_EVENTFD, 2, 0, 3).pack()
        arg = bytearray(head + b"".join(fd.to_bytes(4, "little", signed=True) for fd in numbers))
        call = calls.ioctl(vfio.VFIO_DEVICE_SET_IRQS, arg, Buffers(), device=True)
        assert call.fds() == list(ends)
        tail = sent(call, base=1).segments[0].data[20:]
        assert tail == b"\1\0\0\0" + b"\xff" * 4 + b"\2\0\0\0"
    finally:
        os.close(ends[0])
        os.close(ends[1])


def test_a_new_descriptor_gets_its_number_here() -> None:
    ends = os.pipe()
    cmd = uapi.FaultAlloc()
    call = calls.ioctl(cmd.CMD, cmd, Buffers())
    came = Descriptors(ends)
    call.store(0, 0, uapi.FaultAlloc(out_fault_id=9, out_fault_fd=1).pack(), came)
    call.result(0, came)
    came.close()  # what nobody took
    assert (cmd.out_fault_id, cmd.out_fault_fd) == (9, ends[1])
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(ends[0])
    os.close(ends[1])


def test_a_result_that_is_a_descriptor() -> None:
    end, other = os.pipe()
    cmd = mock.TestCmd(op=mock.IOMMU_TEST_OP_DMABUF_GET, u=mock.DmabufGet(length=PAGE).pack())
    call = calls.ioctl(cmd.CMD, cmd, Buffers())
    came = Descriptors([end])
    came.count = 1
    assert call.result(0, came) == end
    came.close()
    os.close(end)
    os.close(other)


# ---- other operations ----


def test_register() -> None:
    request = sent(calls.register(0, 0x7000, 0x2000, 0x1000, 3, private=True), base=2)
    assert (request.op, request.cmd) == (reference.REGISTER, 2)
    assert request.segments[0].data == bytes.fromhex(
        "0070000000000000 0020000000000000 0010000000000000 03000000 01000000"
    )


def test_mmap_has_its_offset_where_register_has_it() -> None:
    request = sent(calls.mmap(0x2000, 0x1000, 3, 1))
    assert (request.op, wire.RegisterBody.unpack(request.segments[0].data)) == (
        reference.MMAP,
        wire.RegisterBody(0, 0x2000, 0x1000, 3, 1),
    )


def test_read_says_how_much_was_asked_for_and_how_much_can_be_written() -> None:
    request = sent(calls.read(0, 0x10000 + PAGE - 8, 40, Pages({0x10000: b""})))
    assert (request.op, request.arg, request.segments[0].writable) == (reference.READ, 40, 8)


def test_write_sends_what_can_be_read() -> None:
    memory, addr = at_end(b"abcd\0\0\0\0")
    request = sent(calls.write(0, addr, 16, memory))
    assert (request.op, request.arg, request.segments[0].data) == (reference.WRITE, 16, b"abcd\0\0\0\0")


def test_a_closed_descriptor_is_not_sent() -> None:
    call = calls.read(0x7FFF_FFFF, 0, 0, Pages({}))
    assert call.fds() == []
    assert sent(call).cmd == 0xFFFF_FFFF
