"""Devices over real sockets: DMA through both stages by admin call, walks, names of machines."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
import trio

from iommufd_client import DmaError, Endpoint, IommufdOSError
from iommufd_client.aio_admin import Endpoint as AioEndpoint
from iommufd_uapi import admin
from iommufdd.iommu.vtd_regs import Reason
from tests.server.conftest import eventually
from tests.server.hardware import RAM, Guest, Served

PAGE = 4096
IOVA = 0x7F12_3456_7000
T = TypeVar("T")


@pytest.fixture
def guest(served: Served) -> Iterator[Guest]:
    with Guest(served) as made:
        yield made


@pytest.fixture
def endpoint(served: Served, guest: Guest) -> Iterator[Endpoint]:
    with served.admin() as connection:
        yield connection.endpoint("vfio0", guest.iommufd)


# ---- reading and writing -----------------------------------------------------------------------------------


def test_dma_through_both_stages(guest: Guest, endpoint: Endpoint) -> None:
    guest.table.map(IOVA, 0x5000)
    guest.table.map(IOVA + PAGE, 0x9000)
    endpoint.write(IOVA + PAGE - 3, b"across")
    assert (guest.ram.read(0x5FFD, 3), guest.ram.read(0x9000, 3)) == (b"acr", b"oss")
    assert endpoint.read(IOVA + PAGE - 3, 6) == b"across"
    endpoint.compare(IOVA + PAGE - 3, b"across")
    endpoint.fill(IOVA, 10, b"abc")
    assert guest.ram.read(0x5000, 11) == b"abcabcabca\0"
    assert endpoint.read(IOVA, 0) == b""
    with pytest.raises(DmaError, match="differs at iova 0x7f1234567002") as caught:
        endpoint.compare(IOVA, b"abX")
    assert (caught.value.done, caught.value.fault) == (2, None)


def test_more_than_one_call(guest: Guest, endpoint: Endpoint) -> None:
    guest.table.map(0, 0, level=2, rights="rwu")
    guest.table.map(2 << 20, 2 << 20, level=2, rights="rwu")
    size = (2 << 20) + (3 << 18)  # the tables lie from 1 MiB on: fill above them
    endpoint.fill(2 << 20, size - (1 << 20), b"1234567")  # a pattern whose phase does not fit a MiB
    expected = (b"1234567" * (size // 7))[: size - (1 << 20)]
    assert guest.ram.read(2 << 20, len(expected)) == expected
    assert endpoint.read(2 << 20, len(expected)) == expected
    endpoint.compare(2 << 20, expected)
    different = bytearray(expected)
    different[-5] ^= 1
    with pytest.raises(DmaError) as caught:
        endpoint.compare(2 << 20, different)
    assert caught.value.done == len(expected) - 5


def test_a_fault_says_everything(guest: Guest, endpoint: Endpoint) -> None:
    guest.table.map(IOVA, 0x5000, rights="ru")
    assert endpoint.read(IOVA, 4) == bytes(4)
    with pytest.raises(DmaError) as caught:
        endpoint.write(IOVA, b"no")
    assert caught.value.reason == (
        "fault 0x85: no write permission in a first-stage entry, stage 1 level 1, iova 0x7f1234567000"
    )
    fault = caught.value.fault
    assert fault is not None
    assert (fault.code, fault.stage, fault.level, fault.address) == (Reason.FS_WRITE, 1, 1, IOVA)
    assert len(fault.steps) == 4
    assert fault.steps[0] == "stage 1 level 4 at 0x1007f0: 0x0000000000101007 P RW US -> table at 0x101000"
    assert fault.steps[3].endswith("P US A -> 4 KiB page at 0x5000")


def test_bytes_before_a_fault_count(guest: Guest, endpoint: Endpoint) -> None:
    guest.table.map(IOVA, 0x5000)
    guest.ram.write(0x5FFC, b"last")
    with pytest.raises(DmaError) as caught:
        endpoint.read(IOVA + PAGE - 4, 8)
    assert (caught.value.done, caught.value.data) == (4, b"last")
    assert caught.value.fault is not None
    assert caught.value.fault.address == IOVA + PAGE


def test_pasids(served: Served, guest: Guest, endpoint: Endpoint) -> None:
    served.attach(guest.driver, guest.hwpt, pasid=5)
    guest.table.map(IOVA, 0x5000)
    endpoint.write(IOVA, b"five", pasid=5)
    assert endpoint.read(IOVA, 4) == b"five"
    with pytest.raises(DmaError, match="fault 0x59: the PASID table entry is not present, iova"):
        endpoint.read(IOVA, 4, pasid=6)
    with pytest.raises(DmaError, match="fault 0x5d: SRE is clear"):
        endpoint.read(IOVA, 4, privileged=True)
    assert [(each.pasid, each.type, each.id) for each in served.state().attachments] == [
        (None, "HWPT_NESTED", guest.hwpt),
        (5, "HWPT_NESTED", guest.hwpt),
    ]


def test_a_kernels_own_table(served: Served, guest: Guest) -> None:
    served.attach(second := served.bind(guest.iommufd, "vfio1"), guest.ioas)
    with served.admin() as connection:
        endpoint = connection.endpoint("vfio1", guest.iommufd)
        endpoint.write(0x3000, b"straight")
        assert guest.ram.read(0x3000, 8) == b"straight"
        walked = endpoint.walk(0x3000)
        (_, stage) = walked.rows
        inode = os.fstat(guest.iommufd.identity.fileno()).st_ino
        assert stage.area == admin.Area(guest.ioas, inode, 0, RAM - 1, "memfd:guest", 0x3000, True, True)
        with pytest.raises(DmaError, match="stage 1 level 1, iova 0x400000"):
            endpoint.read(RAM, 1)
        assert endpoint.walk(RAM).rows[1].bits == "nothing is mapped"
    served.close(second)


# ---- walks -------------------------------------------------------------------------------------------------


def test_a_walk_changes_nothing(guest: Guest, endpoint: Endpoint) -> None:
    entry = guest.table.map(IOVA, 0x5000)
    before = guest.table.get(entry)
    walked = endpoint.walk(IOVA + 8, write=True)
    assert (walked.first, walked.last, walked.rights, walked.fault, walked.cached) == (
        IOVA, IOVA + PAGE - 1, "r-", None, [],
    )  # fmt: skip
    assert guest.table.get(entry) == before
    assert endpoint.walk(IOVA + 8).cached == []
    assert [row.what for row in walked.rows] == ["PASID entry 0"] + [
        what for level in (4, 3, 2, 1) for what in ("stage 2", f"stage 1 level {level}")
    ] + ["stage 2"]  # fmt: skip


def test_what_is_cached_and_differs_from_memory(guest: Guest, endpoint: Endpoint) -> None:
    guest.table.map(IOVA, 0x5000)
    endpoint.write(IOVA, b"x")
    assert [(row.what, row.differs) for row in endpoint.walk(IOVA).cached] == [
        ("PASID cache", ""),
        ("table of level 3", ""),
        ("table of level 2", ""),
        ("table of level 1", ""),
        ("IOTLB, DID 2 PASID 0", ""),
        ("device TLB", ""),
    ]
    guest.table.map(IOVA, 0x6000)
    stale = {row.what: row.differs for row in endpoint.walk(IOVA).cached if row.differs}
    assert stale == {
        "IOTLB, DID 2 PASID 0": "memory: memfd:guest + 0x6000",
        "device TLB": "memory: memfd:guest + 0x6000",
    }
    guest.table.unmap(IOVA)
    (text,) = {row.differs for row in endpoint.walk(IOVA).cached if row.differs}
    assert text == "memory: fault 0x71, a first-stage entry is not present"
    guest.table.set(guest.table.slot(IOVA, 2), guest.table.page() | 7)
    stale = {row.what: row.differs for row in endpoint.walk(IOVA).cached if row.differs}
    assert stale["table of level 1"].startswith("memory: 0x0000000000104007")
    guest.flush(IOVA)
    assert [row.what for row in endpoint.walk(IOVA).cached] == ["PASID cache"]


def test_a_pasid_cache_that_was_not_told(served: Served, guest: Guest, endpoint: Endpoint) -> None:
    guest.table.map(IOVA, 0x5000)
    endpoint.read(IOVA, 1)
    dev = guest.driver.idev.dev
    words = dev.iommu.table(dev).read(0)  # type: ignore[attr-defined]
    served.call(lambda: dev.iommu.table(dev).publish(0, (0,) * 8))  # type: ignore[attr-defined]
    walked = endpoint.walk(IOVA)
    assert walked.fault is not None
    assert walked.fault.code == Reason.PASID_NOT_PRESENT
    assert walked.cached[0].differs == "memory: not present"
    assert endpoint.read(IOVA, 1) == b"\0"  # what is cached still serves
    served.call(lambda: dev.iommu.table(dev).publish(0, words))  # type: ignore[attr-defined]


def test_a_device_that_was_never_attached(served: Served, guest: Guest) -> None:
    with served.admin() as connection:
        walked = connection.walk("vfio3", 0x1000)
    assert walked.fault is not None
    assert walked.fault.text == "fault 0x51: the PASID directory entry is not present, iova 0x1000"
    assert (len(walked.rows), walked.cached) == (1, [])


# ---- naming ------------------------------------------------------------------------------------------------


def refused(call: Callable[[], object]) -> tuple[int, str]:
    with pytest.raises(IommufdOSError) as caught:
        call()
    assert caught.value.errno is not None
    return caught.value.errno, caught.value.reason


def test_a_machine_named_after_the_context_of_another_gets_nothing(served: Served, guest: Guest) -> None:
    """What is meant for a context by its inode must not go to who calls his machine so."""
    inode = os.fstat(guest.iommufd.identity.fileno()).st_ino
    with Guest(served, machine=f"{inode}@vtd") as other, served.admin() as connection:
        for each in (guest, other):
            each.table.map(IOVA, 0x5000)
        with pytest.raises(IommufdOSError) as caught:
            connection.endpoint("vfio0", guest.iommufd).write(IOVA, b"secret")
        assert caught.value.errno == errno.EINVAL
        assert other.ram.read(0x5000, 6) == bytes(6)
        assert guest.ram.read(0x5000, 6) == bytes(6)
    with served.admin() as connection:
        connection.endpoint("vfio0", guest.iommufd).write(IOVA, b"secret")


def test_names(served: Served) -> None:
    with served.admin() as connection:
        assert refused(lambda: connection.walk("vfio0", 0)) == (errno.ENOENT, "nothing is open")
        with Guest(served, machine="lab@vtd") as lab:
            assert connection.walk("vfio0", 0).device == "vfio0"  # there is only one
            with Guest(served) as private:
                inode = str(os.fstat(private.iommufd.identity.fileno()).st_ino)
                code, reason = refused(lambda: connection.walk("vfio0", 0))
                assert code == errno.EINVAL
                assert reason.startswith("2 machines have a vfio0: name one of ")
                assert sorted(reason.rpartition("of ")[2].split(", ")) == sorted(["lab", inode])
                lab.table.map(IOVA, 0x5000)
                connection.endpoint("vfio0", "lab").write(IOVA, b"lab")
                assert lab.ram.read(0x5000, 3) == b"lab"
                for endpoint in (connection.endpoint("vfio0", private.iommufd), connection.endpoint("vfio0", inode)):
                    with pytest.raises(DmaError):
                        endpoint.write(IOVA, b"private")
            assert refused(lambda: connection.walk("vfio0", 0, instance="other")) == (
                errno.ENOENT,
                "nothing is open on a machine 'other'",
            )
            assert refused(lambda: connection.walk("vfio9", 0)) == (
                errno.ENOENT,
                "there is no device 'vfio9'; there are vfio0, vfio1, vfio2, vfio3",
            )
    with served.open("") as mock, served.admin() as connection:
        assert refused(lambda: connection.walk("vfio0", 0)) == (
            errno.ENOENT, "there is no device 'vfio0'; there are none",
        )  # fmt: skip
        del mock


def test_requests_that_make_no_sense(served: Served, guest: Guest) -> None:
    wrong = {
        "a length of 1048577 bytes": admin.Dma("vfio0", "read", 0, admin.MAX_DMA + 1),
        "a length of -1 bytes": admin.Dma("vfio0", "read", 0, -1),
        "iova 0xffffffffffffffff with 0x2 bytes": admin.Dma("vfio0", "read", 2**64 - 1, 2),
        "iova -0x1 with": admin.Dma("vfio0", "read", -1, 1),
        "3 bytes of data for a length of 2": admin.Dma("vfio0", "write", 0, 2, b"abc"),
        "0 bytes of data for a length of 2": admin.Dma("vfio0", "compare", 0, 2),
        "a fill needs a pattern": admin.Dma("vfio0", "fill", 0, 2),
        "PASID 1048576 is not within": admin.Dma("vfio0", "read", 0, 1, pasid=1 << 20),
        "PASID -1 is not": admin.Walk("vfio0", 0, pasid=-1),
        "a timeout of -1.0": admin.Dma("vfio0", "read", 0, 1, page_timeout=-1.0),
        "iova 0x10000000000000000": admin.Walk("vfio0", 2**64),
        "Invalid enum value 'peek'": admin.Dma("vfio0", "peek", 0, 1),  # type: ignore[arg-type]
    }
    for text, request in wrong.items():
        with served.ask(request) as sock, sock.makefile("rb") as lines:
            reply = admin.decode_reply(lines.readline())
        assert isinstance(reply, admin.Error), text
        assert (reply.errno, reply.reason[: len(text)]) == (errno.EINVAL, text)
    assert served.state().failed == 0


def test_the_last_byte_of_all(guest: Guest, endpoint: Endpoint) -> None:
    with pytest.raises(DmaError, match="iova 0xffffffffffffffff"):
        endpoint.read(2**64 - 1, 1)


# ---- over Trio ---------------------------------------------------------------------------------------------


async def test_over_trio(tmp_path: Path) -> None:
    served = Served(tmp_path)
    await trio.to_thread.run_sync(served.__enter__)
    try:
        guest = await trio.to_thread.run_sync(lambda: Guest(served, faults=True))
        guest.table.map(IOVA, 0x5000)
        endpoint = AioEndpoint("vfio0", guest.iommufd)
        await endpoint.write(IOVA, b"trio")
        assert await endpoint.read(IOVA, 4) == b"trio"
        await endpoint.fill(IOVA, 4, b"ab")
        await endpoint.compare(IOVA, b"abab")
        assert (await endpoint.walk(IOVA)).rights == "rw"
        with pytest.raises(IommufdOSError):
            await AioEndpoint("vfio9", guest.iommufd).read(0, 1)
        with trio.move_on_after(0.2) as scope:  # waits for a page until it is cancelled
            await endpoint.read(IOVA + PAGE, 4)
        assert scope.cancelled_caught
        await trio.to_thread.run_sync(eventually, lambda: served.state().waiting == 0)
        await trio.to_thread.run_sync(guest.close)
    finally:
        await trio.to_thread.run_sync(served.__exit__)
