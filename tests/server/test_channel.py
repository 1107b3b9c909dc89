"""A channel in this process: packets of real calls, registered memory, order, and peers who do not behave."""

from __future__ import annotations

import errno
import os
import socket

import pytest

from iommufd_uapi import iommufd, iommufd_test, wire
from iommufdd.server.nofile import SPARE
from tests.server.conftest import Local
from tests.server.peer import STRUCT_ADDR, Segment, body, close_all, ioctl, memfd, request, selftest

PAGE = 4096
MAP_FLAGS = 7  # FIXED_IOVA, WRITEABLE, READABLE


# ---- calls -------------------------------------------------------------------------------------------------


def test_errors_do_not_stop_a_batch(local: Local) -> None:
    peer = local.connect()
    destroy = ioctl(iommufd.Destroy(id=99))
    alloc = ioctl(iommufd.IoasAlloc())
    replies = peer.call(alloc, destroy, ioctl(b"\0" * 8, cmd=0x1234), alloc)
    assert [reply.result for reply in replies] == [0, -errno.ENOENT, -errno.ENOTTY, 0]
    assert [reply.u32(8) for reply in replies if not reply.result] == [1, 2]


def test_reason_only_where_asked_for_and_only_with_an_error(local: Local) -> None:
    peer = local.connect()
    bad, good = iommufd.Destroy(id=99), iommufd.IoasAlloc()
    replies = peer.call(ioctl(bad, flags=1), ioctl(bad), ioctl(good, flags=1), ioctl(bad, flags=1))
    assert [bool(reply.reason) for reply in replies] == [True, False, False, True]
    assert "99" in replies[0].reason


def test_unreadable_and_unwritable_pointers(local: Local) -> None:
    peer = local.connect()
    data = iommufd.IoasAlloc().pack()
    cases = [
        request(0, 0x3B81, arg=wire.NONE),  # names no segment
        request(0, 0x3B81, [Segment(STRUCT_ADDR)]),  # nothing readable
        request(0, 0x3B81, [Segment(STRUCT_ADDR, data[:3])]),  # not even the size
        request(0, 0x3B81, [Segment(STRUCT_ADDR, data[:8])]),  # not all of it
        request(0, 0x3B81, [Segment(STRUCT_ADDR, data)]),  # not writable
    ]
    assert [reply.result for reply in peer.call(*cases)] == [-errno.EFAULT] * 5
    (reply,) = peer.call(request(0, 0x3B81, [Segment(STRUCT_ADDR, data, writable=10)]))
    assert reply.result == -errno.EFAULT
    assert len(reply.struct()) == 10  # the writable prefix is written all the same
    assert peer.ioas() == 1  # nothing was left behind


def test_trailing_zeros_need_not_be_sent(local: Local) -> None:
    peer = local.connect()
    size = iommufd.IoasAlloc.SIZEOF
    short = iommufd.IoasAlloc().pack()[:4]
    assert peer.one(request(0, 0x3B81, [Segment(STRUCT_ADDR, short, size, size)])).result == 0


def test_array_larger_than_a_packet_in_the_scratch_file(local: Local) -> None:
    peer = local.connect()
    ioas, count = peer.ioas(), 20_000
    scratch = peer.scratch(16 * count)
    for at in range(count):  # IOVA allowed: every second page
        os.pwrite(scratch, iommufd.IovaRange(start=at * 2 * PAGE, last=at * 2 * PAGE + PAGE - 1).pack(), 16 * at)
    pointer = 0x1000
    allow = iommufd.IoasAllowIovas(ioas_id=ioas, num_iovas=count, allowed_iovas=pointer)
    segment = Segment(pointer, readable=16 * count, scratch=0)
    assert peer.one(ioctl(allow, segment)).result == 0
    # The whole space but for reserved ranges: one range, written to the scratch file.
    ranges = iommufd.IoasIovaRanges(ioas_id=ioas, num_iovas=count, allowed_iovas=pointer)
    reply = peer.one(ioctl(ranges, Segment(pointer, writable=16 * count, scratch=160)))
    assert reply.result == 0
    found = reply.u32(iommufd.IoasIovaRanges.offsetof("num_iovas"))
    assert (1, 0, 16 * found) in reply.writes
    assert iommufd.IovaRange.unpack(os.pread(scratch, 16, 160)) == iommufd.IovaRange(0, 2**64 - 1)
    os.close(scratch)


def test_scratch_file_rules(local: Local) -> None:
    peer = local.connect()
    assert peer.one(request(wire.Op.SCRATCH, wire.NONE)).result == -errno.EBADF
    unsealed, empty = memfd(PAGE, seals=0), memfd(0)
    readonly = os.open(f"/proc/self/fd/{unsealed}", os.O_RDONLY)
    large = memfd(wire.MAX_SCRATCH + PAGE)
    pipe = os.pipe()
    fds = [unsealed, empty, readonly, large, *pipe]
    for fd in fds:
        assert peer.one(request(wire.Op.SCRATCH, 0), [fd]).result == -errno.EINVAL
    close_all(fds)
    # Beyond the end of the file there is no memory.
    os.close(peer.scratch(PAGE))
    data = Segment(0, readable=16, writable=16, scratch=PAGE - 8)
    assert peer.one(request(0, 0x3B81, [data])).result in (-errno.EFAULT, -errno.EINVAL)
    os.close(peer.scratch(2 * PAGE))  # replaces the first
    assert local.server.nofile.total == 3


# ---- registered memory -------------------------------------------------------------------------------------


def test_register_rules(local: Local) -> None:
    peer = local.connect()
    fd = memfd(4 * PAGE)
    readonly = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    path_only = os.open(f"/proc/self/fd/{fd}", os.O_PATH)
    null = os.open(os.devnull, os.O_RDWR)
    one = PAGE
    assert peer.register(fd, 0, one) == 0
    assert peer.register(fd, 0, 0) == -errno.EINVAL
    assert peer.register(fd, 1, one) == -errno.EINVAL
    assert peer.register(fd, 0, one + 1) == -errno.EINVAL
    assert peer.register(fd, 0, one, offset=7) == -errno.EINVAL
    assert peer.register(fd, 0, one, offset=2**63) == -errno.EINVAL
    assert peer.register(fd, 0, one, prot=4) == -errno.EINVAL
    assert peer.register(fd, 0, one, flags=2) == -errno.EINVAL
    assert peer.register(fd, 2**64 - PAGE, one) == 0
    assert peer.register(fd, 2**64 - PAGE, 2 * one) == -errno.EINVAL
    assert peer.register(readonly, 0, one) == -errno.EPERM
    assert peer.register(readonly, 0, one, prot=1) == 0
    assert peer.register(path_only, 0, one) == -errno.EBADF
    assert peer.register(null, 0, one) == -errno.ENODEV
    assert peer.one(body(wire.Op.REGISTER, wire.NONE, length=one)).result == -errno.EBADF
    assert peer.one(body(wire.Op.UNREGISTER, addr=1, length=one)).result == -errno.EINVAL
    assert peer.one(body(wire.Op.PROTECT, addr=0, length=2 * one, prot=1)).result == -errno.ENOMEM
    assert peer.one(body(wire.Op.PROTECT, addr=0, length=one, prot=0)).result == 0
    assert peer.one(body(wire.Op.UNREGISTER, addr=0, length=2**64 - PAGE)).result == 0
    assert peer.one(body(wire.Op.UNREGISTER, addr=2**64 - PAGE, length=PAGE)).result == 0
    assert len(local.server.page_files) == 0
    close_all([fd, readonly, path_only, null])


def test_identity_of_pages(local: Local) -> None:
    """Two mappings of a file show the same pages, a private one has its own (IOMMU_TEST_OP_MD_CHECK_MAP)."""
    peer = local.connect()
    ioas = peer.ioas()
    domain = iommufd_test.MockDomain()
    assert peer.one(ioctl(selftest(iommufd_test.IOMMU_TEST_OP_MOCK_DOMAIN, ioas, domain))).result == 0
    replies = peer.call(ioctl(selftest(iommufd_test.IOMMU_TEST_OP_MOCK_DOMAIN, ioas, domain)))
    hwpt = replies[0].u32(iommufd_test.TestCmd.offsetof("u") + 4)
    fd = memfd(PAGE)
    assert peer.register(fd, 0x10000, PAGE) == 0
    assert peer.register(fd, 0x20000, PAGE) == 0
    assert peer.register(fd, 0x30000, PAGE, flags=wire.REGISTER_PRIVATE) == 0
    iova = 1 << 24  # MOCK_APERTURE_START
    struct = iommufd.IoasMap(flags=MAP_FLAGS, ioas_id=ioas, user_va=0x10000, length=PAGE, iova=iova)
    assert peer.one(ioctl(struct)).result == 0

    def check(uptr: int) -> int:
        union = iommufd_test.CheckMap(iova=iova, length=PAGE, uptr=uptr)
        return peer.one(ioctl(selftest(iommufd_test.IOMMU_TEST_OP_MD_CHECK_MAP, hwpt, union))).result

    assert [check(0x10000), check(0x20000), check(0x30000), check(0x40000)] == [
        0,
        0,
        -errno.EINVAL,
        -errno.EFAULT,
    ]
    os.close(fd)


def test_address_space_is_shared_by_its_channels_and_ends_with_them(local: Local) -> None:
    peer = local.connect()
    second = local.connect(mm=peer.mm)  # the same process opens /dev/iommu once more
    fd = memfd(PAGE)
    assert peer.register(fd, 0, PAGE) == 0
    os.close(fd)
    peer.close()
    assert len(local.server.page_files) == 1
    assert second.one(body(wire.Op.PROTECT, addr=0, length=PAGE, prot=1)).result == 0
    second.close()
    assert len(local.server.page_files) == 0


# ---- peers who do not behave -------------------------------------------------------------------------------


@pytest.mark.parametrize("packet", [b"", b"\0", bytes(16), b"\xff" * 4096, ioctl(iommufd.IoasAlloc())[:-1]])
def test_malformed_packet_closes_this_channel_and_no_other(
    local: Local, packet: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    peer, other = local.connect(), local.connect()
    third = local.connect(kind=1, fds=[peer.identity])
    ioas = peer.ioas()
    peer.send(packet)
    assert peer.hung_up()
    assert third.destroy(ioas) == 0
    assert other.ioas() == 1
    assert len(caplog.records) == (1 if packet else 0)  # an empty packet looks like the end


def test_a_packet_above_the_limit(local: Local) -> None:
    peer = local.connect()
    peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    peer.send(bytes(wire.MAX_PACKET + 8))
    assert peer.hung_up()


def test_malformed_frames_are_logged_a_few_times_only(local: Local, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(100):
        peer = local.connect()
        peer.send(b"x")
        peer.close()
    assert len(caplog.records) == 10


def test_nothing_of_a_malformed_packet_is_done(local: Local) -> None:
    peer = local.connect()
    second = local.connect(kind=1, fds=[peer.identity])
    peer.send(ioctl(iommufd.IoasAlloc()) + bytes(16))
    assert second.ioas() == 1


def test_slow_reader_waits_and_loses_nothing(local: Local) -> None:
    """Replies that nobody reads: the daemon stops reading there, serves others, and goes on later."""
    peer, other = local.connect(), local.connect()
    big = ioctl(iommufd.IoasAlloc()) * 1000
    sent = 0
    while sent < 200:
        try:
            peer.sock.send(big)
            sent += 1
        except BlockingIOError:
            local.pump()
            (channel,) = [each for each in local.server.channels if each.joined and each.space.token == peer.mm]
            if channel.waiting:
                break
    assert channel.waiting
    before = local.server.reactor.turns
    local.pump()
    assert local.server.reactor.turns - before < 3  # it does not spin
    assert other.ioas() == 1
    ids = []
    for _ in range(sent):
        data, _ = peer.receive()
        ids.append(int.from_bytes(data[40:44], "little"))
    assert ids == [1 + 1000 * at for at in range(sent)]
    assert not channel.waiting


def test_slow_reader_dies(local: Local) -> None:
    peer = local.connect()
    for _ in range(60):
        try:
            peer.sock.send(ioctl(iommufd.FaultAlloc()) * 64)
        except BlockingIOError:
            break
        local.pump()
    peer.close()
    assert not local.server.pipes.by_key
    assert not local.server.channels


def test_peer_that_shuts_down_its_side_gets_its_answers(local: Local) -> None:
    peer = local.connect()
    packets = 5
    for _ in range(packets):
        peer.send(ioctl(iommufd.IoasAlloc()))
    peer.sock.shutdown(socket.SHUT_WR)
    for _ in range(packets):
        assert peer.receive()[0]
    assert peer.hung_up()


def test_close_operation(local: Local) -> None:
    peer = local.connect()
    second = local.connect(kind=1, fds=[peer.identity], mm=peer.mm)
    replies = peer.call(ioctl(iommufd.IoasAlloc()), request(wire.Op.CLOSE))
    assert [reply.result for reply in replies] == [0, 0]
    assert peer.hung_up()
    assert second.destroy(1) == 0
    peer.close()
    assert second.one(request(wire.Op.CLOSE)).result == 0
    assert not local.server.instances.contexts


def test_each_uid_has_its_share_of_descriptors() -> None:
    local = Local(nofile=SPARE + 40)
    peer = local.connect()
    fds, results = [], []
    for _ in range(30):
        results.append(peer.one(ioctl(iommufd.FaultAlloc())).result)
        fds += peer.fds
    assert results == sorted(results, reverse=True)
    assert set(results) == {0, -errno.EMFILE}
    assert 15 <= len(fds) <= 20
    peer.ioas()
    assert local.connect(greet=False).sock  # takes the last one
    assert local.connect(greet=False).welcome().error == errno.EMFILE
    close_all(fds)
    local.pump()
    assert local.connect().ioas() == 1
    local.close()
