"""The Trio client: the same calls, shared by tasks, cancelled in the middle."""

from __future__ import annotations

import errno
import os
import signal
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing

from iommufd_client import IommufdOSError
from iommufd_client.aio import Iommufd, open_iommufd
from iommufd_client.pytest_plugin import leakable
from iommufd_client.testing import Daemon
from iommufd_uapi import iommufd as uapi
from iommufd_uapi import iommufd_test as mock

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

RAM = 0x100_0000


@pytest.fixture
def socket_path(iommufdd_daemon: Daemon) -> Iterator[str]:
    before = leakable(iommufdd_daemon)
    yield iommufdd_daemon.socket_path
    assert leakable(iommufdd_daemon) == before


async def test_a_vmm(socket_path: str) -> None:
    async with open_iommufd(socket_path, explain=True) as iommufd:
        ioas = await iommufd.ioas_alloc()
        ids = await iommufd.mock_domain(ioas)
        async with iommufd.guest_memory(1 << 20) as ram:
            assert await iommufd.ioas_map(ioas, ram, iova=RAM) == RAM
            ram.write(0x1000, b"to the device")
            with await iommufd.create_access(ioas) as dma:
                assert await iommufd.access_read(dma, RAM + 0x1000, 13) == b"to the device"
                await iommufd.access_write(dma, RAM, bytes(200_000))
        assert (await iommufd.get_hw_info(ids.out_idev_id)).data_type == mock.IOMMU_HW_INFO_TYPE_SELFTEST
        assert (await iommufd.ioas_iova_ranges(ioas)).ranges == [(RAM, 0x7FFF_FFFF)]
        with pytest.raises(IommufdOSError) as caught:
            await iommufd.destroy(ioas)
        assert caught.value.errno == errno.EBUSY
        assert "in use by" in caught.value.reason


async def test_many_ranges(socket_path: str) -> None:
    async with open_iommufd(socket_path) as iommufd:
        ioas = await iommufd.ioas_alloc()
        for number in range(10):
            await iommufd.test(mock.AddReserved(start=0x10000 * number, length=0x1000), ioas)
        assert len((await iommufd.ioas_iova_ranges(ioas)).ranges) == 10


async def test_raw_ioctls_and_batches(socket_path: str) -> None:
    async with open_iommufd(socket_path) as iommufd:
        arg = bytearray(uapi.IoasAlloc().pack())
        await iommufd.ioctl(uapi.IOMMU_IOAS_ALLOC, arg)
        assert uapi.IoasAlloc.unpack(arg).out_ioas_id == 1
        structs = [uapi.IoasAlloc() for _ in range(600)]
        assert await iommufd.batch(structs).send() == [0] * 600
        assert structs[-1].out_ioas_id == 601


async def test_tasks_share_a_channel(socket_path: str) -> None:
    ids: list[int] = []
    async with open_iommufd(socket_path) as iommufd:

        async def work() -> None:
            for _ in range(20):
                ids.append(await iommufd.ioas_alloc())  # noqa: PERF401

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(work)
    assert sorted(ids) == list(range(1, 101))


async def test_further_channels(socket_path: str) -> None:
    async with open_iommufd(socket_path) as iommufd:
        ioas = await iommufd.ioas_alloc()
        other = await iommufd.channel(new_mm=True)
        assert other.mm != iommufd.mm
        await other.destroy(ioas)
        await other.aclose()
        await other.aclose()
        again = await Iommufd.from_identity(iommufd.identity, socket_path, mm=iommufd.mm)
        assert again.mm == iommufd.mm
        await again.aclose()


async def test_an_event_is_waited_for(socket_path: str) -> None:
    async with open_iommufd(socket_path) as iommufd, trio.open_nursery() as nursery:
        ioas = await iommufd.ioas_alloc()
        ids = await iommufd.mock_domain(ioas)
        parent = await iommufd.hwpt_alloc(ids.out_idev_id, ioas, flags=uapi.IOMMU_HWPT_ALLOC_NEST_PARENT)
        queue, file = await iommufd.fault_queue_alloc()
        data = mock.HwptSelftest(mock.IOMMU_TEST_IOTLB_DEFAULT)
        nested = await iommufd.hwpt_alloc(ids.out_idev_id, parent, data=data, fault_id=queue)
        await iommufd.test(mock.MockDomainReplace(pt_id=nested), ids.out_stdev_id)
        answered: list[int] = []
        done = trio.Event()

        async def answer() -> None:
            fault = uapi.HwptPgfault.unpack(await file.receive(40))
            answered.append(await file.write(uapi.HwptPageResponse(fault.cookie, 0).pack()))
            done.set()

        with file:
            nursery.start_soon(answer)
            await trio.testing.wait_all_tasks_blocked()
            assert not answered
            await iommufd.test(mock.TriggerIopf(dev_id=ids.out_idev_id, perm=1, addr=0x5000))
            with trio.fail_after(5):
                await done.wait()
        assert answered == [8]


async def test_a_file_is_closed_while_it_is_waited_for(socket_path: str) -> None:
    async with open_iommufd(socket_path) as iommufd, trio.open_nursery() as nursery:
        _, file = await iommufd.fault_queue_alloc()

        async def wait() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await file.receive(40)

        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        file.close()


async def test_a_cancelled_call_does_not_confuse_the_next() -> None:
    with Daemon() as daemon:
        async with open_iommufd(daemon.socket_path) as iommufd:
            os.kill(daemon.pid, signal.SIGSTOP)
            try:
                for call in (iommufd.ioas_alloc, iommufd.fault_queue_alloc):
                    with trio.move_on_after(0.05) as scope:
                        await call()
                    assert scope.cancelled_caught
            finally:
                os.kill(daemon.pid, signal.SIGCONT)
            # The first was on its way; the second waited for its reply and was never sent.
            assert await iommufd.ioas_alloc() == 2


async def test_the_end_of_a_cancelled_block(socket_path: str) -> None:
    with trio.move_on_after(1) as scope:
        async with open_iommufd(socket_path) as iommufd:
            await iommufd.ioas_alloc()
            scope.cancel()
            await trio.sleep_forever()
    assert iommufd.closed


async def test_no_daemon(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        await Iommufd.open(str(tmp_path / "nothing"))


async def test_a_refusal(socket_path: str) -> None:
    fd = os.memfd_create("no context")
    with pytest.raises(IommufdOSError) as caught:
        await Iommufd.from_identity(fd, socket_path)
    os.close(fd)
    assert caught.value.errno == errno.EBADFD


async def test_the_daemon_dies() -> None:
    with Daemon() as daemon:
        async with open_iommufd(daemon.socket_path) as iommufd:
            os.kill(daemon.pid, signal.SIGKILL)
            with pytest.raises(ConnectionError):
                await iommufd.ioas_alloc()


def test_both_clients_have_the_same_calls() -> None:
    from iommufd_client.iommufd import Iommufd as Blocking

    def calls(cls: type) -> set[str]:
        return {name for name in dir(cls) if not name.startswith("_")}

    assert calls(Blocking) - calls(Iommufd) == {"abandon", "close", "file", "read_into", "write_from"}
    assert calls(Iommufd) - calls(Blocking) == {"aclose", "open"}
