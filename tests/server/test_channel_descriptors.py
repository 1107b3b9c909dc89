"""Descriptors over a channel in this process, both ways, and the reads and writes of what they stand for."""

from __future__ import annotations

import errno
import os
import select

from iommufd_uapi import iommufd, iommufd_test, wire
from tests.server.conftest import Local
from tests.server.peer import STRUCT_ADDR, Peer, Segment, body, close_all, ioctl, memfd, request, selftest

PAGE = 4096
MAP_FLAGS = 7  # FIXED_IOVA, WRITEABLE, READABLE


def access_pages(index: int, iova: int = 0, length: int = PAGE, uptr: int = 0) -> bytes:
    union = iommufd_test.AccessPages(flags=1, iova=iova, length=length, uptr=uptr)
    return ioctl(selftest(iommufd_test.IOMMU_TEST_OP_ACCESS_PAGES, index, union))


def access_rw(index: int, length: int, *, write: bool, buffer: Segment) -> bytes:
    union = iommufd_test.AccessRw(iova=0, length=length, uptr=buffer.addr, flags=1 if write else 0)
    return ioctl(selftest(iommufd_test.IOMMU_TEST_OP_ACCESS_RW, index, union), buffer)


def fault_queue(peer: Peer) -> tuple[int, int]:
    """A fault queue: its object and its descriptor."""
    reply = peer.one(ioctl(iommufd.FaultAlloc()))
    assert reply.result == 0
    (fd,) = peer.fds
    return reply.u32(iommufd.FaultAlloc.offsetof("out_fault_id")), fd


def test_batch_with_two_descriptors_and_a_bad_one(local: Local) -> None:
    peer = local.connect()
    ioas = peer.ioas()
    one, two = memfd(PAGE), memfd(2 * PAGE)

    def map_file(index: int, iova: int, length: int) -> bytes:
        return ioctl(iommufd.IoasMapFile(flags=MAP_FLAGS, ioas_id=ioas, fd=index, length=length, iova=iova))

    replies = peer.call(
        map_file(0, 0, PAGE), map_file(1, 0x10000, 2 * PAGE), map_file(-1, 0x20000, PAGE), fds=[one, two]
    )
    assert [reply.result for reply in replies] == [0, 0, -errno.EBADF]
    assert len(local.server.page_files) == 2
    close_all([one, two])
    assert peer.destroy(ioas) == 0
    assert len(local.server.page_files) == 0


def test_index_that_was_not_sent_is_a_broken_packet(local: Local) -> None:
    peer = local.connect()
    ioas = peer.ioas()
    peer.send(ioctl(iommufd.IoasMapFile(flags=MAP_FLAGS, ioas_id=ioas, fd=1, length=PAGE)), [0])
    assert peer.hung_up()


def test_index_in_the_scratch_file_is_looked_at_when_used(local: Local) -> None:
    peer = local.connect()
    ioas = peer.ioas()
    scratch = peer.scratch(PAGE)
    struct = iommufd.IoasMapFile(flags=MAP_FLAGS, ioas_id=ioas, fd=5, length=PAGE).pack()
    os.pwrite(scratch, struct, 0)
    os.close(scratch)
    peer.send(request(0, 0x3B8F, [Segment(STRUCT_ADDR, readable=len(struct), writable=len(struct), scratch=0)]))
    assert peer.hung_up()


def test_more_descriptors_than_allowed(local: Local) -> None:
    peer = local.connect()
    peer.send(ioctl(iommufd.IoasAlloc()), [0] * 65)
    assert peer.hung_up()


def test_all_descriptors_of_a_packet_may_be_used(local: Local) -> None:
    peer = local.connect()
    assert peer.one(ioctl(iommufd.IoasAlloc()), [0] * 64).result == 0


def test_pages_through_an_access(local: Local) -> None:
    """Register memory, map it, pin it, read and write it; the bytes are those of the client's file."""
    peer = local.connect()
    ioas = peer.ioas()
    fd = memfd(2 * PAGE)
    addr = 0x5000_0000
    assert peer.register(fd, addr, 2 * PAGE) == 0
    struct = iommufd.IoasMap(flags=MAP_FLAGS, ioas_id=ioas, user_va=addr, length=2 * PAGE)
    assert peer.one(ioctl(struct)).result == 0
    access = peer.access(ioas)
    assert peer.one(access_pages(0, uptr=addr), [access]).result == 0
    os.pwrite(fd, b"written by the client", 100)
    buffer = Segment(0x9000, writable=PAGE)
    reply = peer.one(access_rw(0, PAGE, write=False, buffer=buffer), [access])
    assert reply.result == 0
    assert bytes(reply.writes[0][2])[100:121] == b"written by the client"
    buffer = Segment(0x9000, b"written by the device".ljust(PAGE, b"!"))
    assert peer.one(access_rw(0, PAGE, write=True, buffer=buffer), [access]).result == 0
    assert os.pread(fd, 21, 0) == b"written by the device"
    close_all([access, fd])


def test_last_close_comes_before_the_next_call(local: Local) -> None:
    peer = local.connect()
    ioas = peer.ioas()
    access = peer.access(ioas)
    copy = os.dup(access)
    assert peer.destroy(ioas) == -errno.EBUSY
    os.close(access)
    assert peer.destroy(ioas) == -errno.EBUSY
    os.close(copy)
    assert peer.destroy(ioas) == 0


def test_close_while_the_descriptor_is_on_its_way(local: Local) -> None:
    """A descriptor sent along counts until its packet is done."""
    peer = local.connect()
    ioas = peer.ioas()
    access = peer.access(ioas)
    peer.send(access_pages(0), [access])
    os.close(access)
    peer.send(ioctl(iommufd.Destroy(id=ioas)))
    peer.receive()
    data, _ = peer.receive()
    assert wire.REPLY.unpack_from(data)[1] == 0


def test_hang_up_of_one_comes_before_the_calls_of_another(local: Local) -> None:
    first = local.connect()
    second = local.connect(kind=1, fds=[first.identity])
    _, fd = fault_queue(second)
    first.ioas()
    second.sock.close()  # seen together with the request below
    os.close(fd)
    assert first.ioas() == 3
    assert len(local.server.channels) == 1


def test_context_outlives_its_channels_in_a_file(local: Local) -> None:
    peer = local.connect()
    access = peer.access(peer.ioas())
    identity = os.dup(peer.identity)
    peer.close()
    assert len(local.server.instances.contexts) == 1
    again = local.connect(kind=1, fds=[identity])
    assert again.one(access_pages(0), [access]).result == -errno.ENOENT  # nothing is mapped, all is alive
    again.close()
    os.close(identity)
    os.close(access)
    local.pump()
    assert not local.server.instances.contexts


def test_undelivered_descriptors_are_closed(local: Local) -> None:
    peer = local.connect()
    peer.send(ioctl(iommufd.FaultAlloc()))
    peer.close()
    assert not local.server.pipes.by_key
    assert not local.server.instances.contexts


def test_reading_and_writing_files(local: Local) -> None:
    peer = local.connect()
    _, fd = fault_queue(peer)

    def read(count: int) -> int:
        return peer.one(request(wire.Op.READ, 0, [Segment(0, writable=count)], arg=count), [fd]).result

    assert read(0) == 0
    assert read(iommufd.HwptPgfault.SIZEOF) == 0  # empty, and never waits
    assert read(7) == -errno.ESPIPE
    assert peer.one(request(wire.Op.WRITE, 0, [Segment(0, bytes(3))], arg=3), [fd]).result == -errno.ESPIPE
    assert peer.one(request(wire.Op.READ, wire.NONE, [Segment(0)])).result == -errno.EBADF
    assert peer.one(request(wire.Op.READ, 0, [Segment(0, writable=8)]), [peer.identity]).result == -errno.EINVAL
    assert not select.select([fd], [], [], 0)[0]
    os.close(fd)


def test_a_foreign_pipe_is_no_file_of_ours(local: Local) -> None:
    peer = local.connect()
    ours = os.pipe()
    assert peer.one(request(wire.Op.READ, 0, [Segment(0, writable=8)]), [ours[0]]).result == -errno.EINVAL
    close_all(list(ours))


def test_mapping_what_is_not_there(local: Local) -> None:
    peer = local.connect()
    shared, private = body(wire.Op.MMAP, length=PAGE, prot=3, flags=1), body(wire.Op.MMAP, length=PAGE, prot=3, flags=2)
    assert [reply.result for reply in peer.call(shared, private)] == [-errno.ENXIO, -errno.EINVAL]
    assert peer.fds == []


def test_ring_of_files(local: Local) -> None:
    """A context's own file mapped in its own IOAS must not keep it alive for ever."""
    peer = local.connect()
    ioas = peer.ioas()
    access = peer.access(ioas)
    struct = iommufd.IoasMapFile(flags=MAP_FLAGS, ioas_id=ioas, fd=0, length=PAGE, iova=0x10000)
    for fd in (access, peer.identity):
        peer.one(ioctl(struct), [fd])
        struct.iova += PAGE
    os.close(access)
    peer.close()
    left = list(local.server.instances.contexts.values())
    for context in left:  # so that the fixture finds nothing
        os.close(context.identity)
        context.instance.instances.forget(context)
    assert not left
