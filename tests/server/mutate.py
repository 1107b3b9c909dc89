"""A client that sends mutated packets until it is killed: `python -m tests.server.mutate SOCKET SEED COUNTER SLOT`.

COUNTER is a file of u64, one a slot; SLOT's grows with every packet that the daemon has answered or hung up on.
Exits with an error when an answer does not keep the protocol, or none comes.
"""

from __future__ import annotations

import itertools
import mmap
import os
import random
import struct
import sys

from iommufd_uapi import iommufd, iommufd_test, wire
from tests.server.peer import STRUCT_ADDR, Peer, Segment, body, close_all, hello, ioctl, memfd, request, selftest, split

PAGE = 4096
FLAGS = 7
INTERESTING = [0, 1, 2, 3, 7, 8, 15, 16, 17, 31, 63, 64, 65, 255, 256, 4095, 4096, 4097, 65535, 65536]
INTERESTING += [131072, 131073, 2**31 - 1, 2**31, 2**32 - 8, 2**32 - 1]


SETUP = [
    ioctl(iommufd.IoasAlloc()),
    ioctl(selftest(iommufd_test.IOMMU_TEST_OP_CREATE_ACCESS, 1, iommufd_test.CreateAccess(flags=1))),
    ioctl(iommufd.FaultAlloc()),
]


def templates() -> list[bytes]:
    """Valid packets of every kind. Descriptors: 0 a memfd, 1 an eventfd, 2 the identity, 3 an access, 4 a queue."""
    ioas = 1
    domain = selftest(iommufd_test.IOMMU_TEST_OP_MOCK_DOMAIN, ioas, iommufd_test.MockDomain())
    pages = iommufd_test.AccessPages(flags=1, iova=1 << 24, length=2 * PAGE, uptr=0x10000)
    rw = iommufd_test.AccessRw(iova=1 << 24, length=100, uptr=0x900, flags=1)
    ranges = iommufd.IoasIovaRanges(ioas_id=ioas, num_iovas=4, allowed_iovas=0x100)
    allow = iommufd.IoasAllowIovas(ioas_id=ioas, num_iovas=1, allowed_iovas=0x100)
    invalidate = iommufd.HwptInvalidate(hwpt_id=3, data_uptr=0x100, entry_len=8, entry_num=2)
    bitmap = iommufd.HwptGetDirtyBitmap(hwpt_id=3, length=64 * PAGE, page_size=PAGE, data=0x100, iova=1 << 24)
    calls = [
        ioctl(iommufd.IoasAlloc()),
        ioctl(iommufd.Destroy(id=2)),
        ioctl(iommufd.IoasMap(flags=FLAGS, ioas_id=ioas, user_va=0x10000, length=4 * PAGE, iova=1 << 24)),
        ioctl(iommufd.IoasMap(flags=6, ioas_id=ioas, user_va=0x10000, length=PAGE)),
        ioctl(iommufd.IoasUnmap(ioas_id=ioas, iova=1 << 24, length=4 * PAGE)),
        ioctl(iommufd.IoasMapFile(flags=FLAGS, ioas_id=ioas, fd=0, length=4 * PAGE, iova=1 << 25)),
        ioctl(iommufd.IoasCopy(flags=FLAGS, dst_ioas_id=2, src_ioas_id=1, length=PAGE, dst_iova=0, src_iova=1 << 24)),
        ioctl(ranges, Segment(0x100, writable=64)),
        ioctl(allow, Segment(0x100, iommufd.IovaRange(start=0, last=2**63).pack())),
        ioctl(iommufd.Option(option_id=0, op=1), flags=1),
        ioctl(iommufd.HwptAlloc(dev_id=2, pt_id=ioas)),
        ioctl(iommufd.HwInfo(dev_id=4, data_len=64, data_uptr=0x100), Segment(0x100, writable=64), flags=1),
        ioctl(invalidate, Segment(0x100, bytes(16))),
        ioctl(bitmap, Segment(0x100, bytes(8), writable=8)),
        ioctl(bitmap, Segment(0x100, readable=8, writable=8, scratch=64)),
        ioctl(iommufd.FaultAlloc()),
        ioctl(iommufd.VfioIoas(ioas_id=ioas, op=1)),
        ioctl(domain),
        ioctl(selftest(iommufd_test.IOMMU_TEST_OP_CREATE_ACCESS, ioas, iommufd_test.CreateAccess(flags=1))),
        ioctl(selftest(iommufd_test.IOMMU_TEST_OP_ACCESS_PAGES, 3, pages)),
        ioctl(selftest(iommufd_test.IOMMU_TEST_OP_ACCESS_RW, 3, rw), Segment(0x900, bytes(100))),
        ioctl(selftest(iommufd_test.IOMMU_TEST_OP_DMABUF_GET, 0, iommufd_test.DmabufGet(length=4 * PAGE))),
        request(0, iommufd.IoasAlloc.CMD, [Segment(STRUCT_ADDR, readable=12, writable=12, scratch=0)]),
        request(0, iommufd.IoasAlloc.CMD, arg=wire.NONE),
        request(wire.Op.READ, 4, [Segment(0x100, writable=128)], arg=128),
        request(wire.Op.WRITE, 4, [Segment(0x100, bytes(16))], arg=16),
        request(wire.Op.SCRATCH, 0),
        request(wire.Op.CLOSE),
        body(wire.Op.REGISTER, 0, addr=0x10000, length=16 * PAGE, prot=3),
        body(wire.Op.REGISTER, 0, addr=0x30000, length=PAGE, prot=1, flags=1),
        body(wire.Op.UNREGISTER, addr=0x12000, length=PAGE),
        body(wire.Op.PROTECT, addr=0x10000, length=2 * PAGE, prot=1),
        body(wire.Op.MMAP, length=PAGE, prot=3, flags=1),
    ]
    return [*calls, *(a + b for a, b in itertools.pairwise(calls) if a != request(wire.Op.CLOSE))]


def mutated(rng: random.Random, packet: bytes, others: list[bytes]) -> bytes:
    """One or a few mutations."""
    data = bytearray(packet)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        if not data:
            break
        kind = rng.randrange(9)
        at = rng.randrange(len(data))
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at] = rng.randrange(256)
        elif kind == 2:
            del data[at:]
        elif kind == 3:
            data += rng.choice(others)
        elif kind == 4:
            other = rng.choice(others)
            data[at:] = other[rng.randrange(len(other)) :]
        elif kind in (5, 6):  # a field
            data[at & ~3 : (at & ~3) + 4] = struct.pack("<I", rng.choice(INTERESTING))
        elif kind == 7:  # a field of a header: length, op, flags, segments, cmd, arg; a segment's fields
            at = min(rng.randrange(0, 48, 2), len(data) - 1)
            data[at : at + 2] = struct.pack("<H", rng.choice(INTERESTING) & 0xFFFF)
        else:
            end = rng.randrange(at, min(len(data), at + 64) + 1)
            data[at:at] = data[at:end]
    return bytes(data[: wire.MAX_PACKET + 64])


class Mutator:
    """A connection after another, and what they have in their hands."""

    def __init__(self, path: str, seed: int) -> None:
        self.path = path
        self.rng = random.Random(seed)
        self.templates = templates()
        self.memfd, self.event = memfd(16 * PAGE), os.eventfd(0)
        self.kept: list[int] = []
        self.peer: Peer | None = None

    def connect(self) -> Peer:
        """A context with an IOAS, an access and a queue; now and then a mutated hello before."""
        if self.rng.randrange(8) == 0:
            stranger = Peer(self.path, greet=False)
            packet = mutated(self.rng, hello(), self.templates)
            stranger.send(packet, [self.memfd] * self.rng.randrange(3))
            close_all(stranger.receive()[1])
            stranger.close()
        peer = Peer(self.path, machine=self.rng.choice((b"", b"", b"shared")))
        assert [reply.result for reply in peer.call(*SETUP)] == [0, 0, 0]
        self.kept = peer.fds
        return peer

    def drop(self) -> None:
        assert self.peer is not None
        self.peer.close()
        self.peer = None
        close_all(self.kept)
        self.kept = []

    def step(self) -> None:
        """One mutated packet, and its answer: replies as the protocol has them, or the end of the channel."""
        rng = self.rng
        if self.peer is None:
            self.peer = self.connect()
        packet = mutated(rng, rng.choice(self.templates), self.templates)
        fds = [self.memfd, self.event, self.peer.identity, *self.kept][: rng.choice((0, 5, 5, 5, 1, 20))]
        if rng.randrange(50) == 0:
            fds = (fds * 70)[:70]
        try:
            self.peer.send(packet, fds)
            data, came = self.peer.receive()
        except BrokenPipeError:
            data, came = b"", []
        if data:
            assert sum(reply.fds for reply in split(data)) == len(came)
            self.kept, gone = [*self.kept, *came][:20], [*self.kept, *came][20:]
            close_all(gone)
        else:
            self.drop()


def main() -> None:
    path, seed, counter, slot = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    with open(counter, "r+b") as file, mmap.mmap(file.fileno(), 0) as shared:
        mutator = Mutator(path, seed)
        count = struct.unpack_from("<Q", shared, 8 * slot)[0]
        while True:
            mutator.step()
            count += 1
            struct.pack_into("<Q", shared, 8 * slot, count)


if __name__ == "__main__":
    main()
