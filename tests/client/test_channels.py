"""Several channels: threads, forked processes, address spaces, interrupted calls, and a daemon that goes away."""

from __future__ import annotations

import errno
import gc
import os
import signal
import threading
from typing import TYPE_CHECKING

import pytest

from iommufd_client import Buffers, Iommufd, IommufdOSError
from iommufd_client.testing import Daemon
from iommufd_uapi import iommufd as uapi
from iommufd_uapi import iommufd_test as mock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

RAM = 0x100_0000


def in_child(work: Callable[[], int]) -> int:
    """Run it in a forked process; its result as exit status (99 if it raises)."""
    pid = os.fork()
    if not pid:
        status = 99
        try:
            status = work()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_channel_shows_the_same_context(iommufd: Iommufd) -> None:
    ioas = iommufd.ioas_alloc()
    with iommufd.channel() as other:
        assert other.mm == iommufd.mm
        other.destroy(ioas)
        assert os.fstat(other.identity.fileno()).st_ino == os.fstat(iommufd.identity.fileno()).st_ino
    with pytest.raises(IommufdOSError, match="No such"):
        iommufd.destroy(ioas)


def test_memory_belongs_to_the_address_space(iommufd: Iommufd) -> None:
    ioas = iommufd.ioas_alloc()
    iommufd.mock_domain(ioas)
    with iommufd.guest_memory(4096) as ram, iommufd.channel() as same, iommufd.channel(new_mm=True) as other:
        assert other.mm != iommufd.mm
        same.ioas_map(ioas, ram, iova=RAM)
        with pytest.raises(IommufdOSError) as caught:
            other.ioas_map(ioas, ram, iova=RAM + 4096)
        assert caught.value.errno == errno.EFAULT


def test_a_context_lives_as_long_as_a_channel(iommufdd_daemon: Daemon) -> None:
    first = iommufdd_daemon.open()
    ioas = first.ioas_alloc()
    second = first.channel()
    first.close()
    second.destroy(ioas)
    second.close()


def test_threads_take_turns_on_one_channel(iommufd: Iommufd) -> None:
    ids: list[int] = []

    def work() -> None:
        ids.extend(iommufd.ioas_alloc() for _ in range(200))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(ids) == list(range(1, 801))


def test_threads_share_the_scratch_file_of_a_channel(iommufd: Iommufd) -> None:
    ioas = iommufd.ioas_alloc()
    wrong: list[int] = []
    with iommufd.guest_memory(8 << 20) as ram, iommufd.create_access(ioas) as dma:
        iommufd.ioas_map(ioas, ram, iova=RAM)

        def work(number: int) -> None:
            offset, length = number << 21, 70_000 + 300_000 * number
            for turn in range(20):
                data = bytes([number, turn]) * (length // 2)
                iommufd.access_write(dma, RAM + offset, data)
                if iommufd.access_read(dma, RAM + offset, length) != data:
                    wrong.append(number)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_a_batch_waits_with_its_place_in_the_scratch_file(iommufd: Iommufd) -> None:
    ioas = iommufd.ioas_alloc()
    with iommufd.guest_memory(8 << 20) as ram, iommufd.create_access(ioas) as dma:
        iommufd.ioas_map(ioas, ram, iova=RAM)
        buffers, data = Buffers(), b"a" * 100_000
        arg = mock.AccessRw(iova=RAM, length=len(data), uptr=buffers.add(data), flags=mock.MOCK_ACCESS_RW_WRITE)
        batch = iommufd.batch()
        batch.ioctl(mock.TestCmd(op=mock.IOMMU_TEST_OP_ACCESS_RW, id=dma.fileno(), u=arg.pack()), memory=buffers)
        iommufd.access_write(dma, RAM + (1 << 20), b"b" * 3_000_000)
        assert batch.send() == [0]
        assert ram.read(0, 100_000) == data
        assert ram.read(1 << 20, 3_000_000) == b"b" * 3_000_000


def test_a_thread_with_a_channel_of_its_own(iommufd: Iommufd) -> None:
    ioas = iommufd.ioas_alloc()
    found: list[uapi.IoasAlloc] = []

    def work() -> None:
        with iommufd.channel() as own:
            own.destroy(ioas)
            found.append(uapi.IoasAlloc())
            own.ioctl(found[0])

    thread = threading.Thread(target=work)
    thread.start()
    iommufd.option(uapi.IOMMU_OPTION_RLIMIT_MODE)
    thread.join()
    iommufd.destroy(found[0].out_ioas_id)


# ---- fork ----


def test_a_child_does_not_use_its_parent_s_channel(iommufd: Iommufd) -> None:
    def child() -> int:
        try:
            iommufd.ioas_alloc()
        except OSError as error:
            return error.errno or 0
        return 0

    assert in_child(child) == errno.EBADF
    assert iommufd.ioas_alloc() == 1


def test_a_child_closes_what_it_inherited(iommufd: Iommufd) -> None:
    def child() -> int:
        number = iommufd.identity.fileno()
        iommufd.close()
        try:
            os.fstat(number)
        except OSError:
            return 0
        return 1

    assert in_child(child) == 0
    assert iommufd.ioas_alloc() == 1


def test_a_child_takes_a_channel(iommufd: Iommufd) -> None:
    ioas = iommufd.ioas_alloc()

    def child() -> int:
        with iommufd.channel(new_mm=True) as own:
            own.destroy(ioas)
            return own.ioas_alloc() + 10 * (own.mm != iommufd.mm)

    assert in_child(child) == ioas + 10
    iommufd.destroy(ioas)


def test_a_child_maps_memory_of_its_own(iommufd: Iommufd) -> None:
    ioas = iommufd.ioas_alloc()
    iommufd.mock_domain(ioas)

    def child() -> int:
        with iommufd.channel(new_mm=True) as own, own.guest_memory(8192) as ram:
            ram.write(4090, b"of the child")
            own.ioas_map(ioas, ram, iova=RAM)
        return 0

    assert in_child(child) == 0
    with iommufd.create_access(ioas) as dma:
        assert iommufd.access_read(dma, RAM + 4090, 12) == b"of the child"


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_channel_in_use_by_a_thread_at_a_fork(iommufd: Iommufd) -> None:
    stop = threading.Event()

    def work() -> None:
        with iommufd.channel() as own:
            while not stop.is_set():
                own.option(uapi.IOMMU_OPTION_RLIMIT_MODE)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for _ in range(10):
            assert in_child(lambda: iommufd.channel().option(uapi.IOMMU_OPTION_RLIMIT_MODE)) == 0
    finally:
        stop.set()
        thread.join()


# ---- interrupted calls ----


class Interrupted(Exception):
    pass


@pytest.fixture
def frozen() -> Iterator[tuple[Daemon, Iommufd]]:
    """A daemon that can be stopped, and a channel to it."""
    with Daemon() as daemon, daemon.open() as iommufd:
        yield daemon, iommufd


@pytest.mark.parametrize("kind", ["plain", "bytes", "pointers", "batch", "descriptors"])
def test_an_interrupted_call_does_not_confuse_the_next(frozen: tuple[Daemon, Iommufd], kind: str) -> None:
    daemon, iommufd = frozen
    calls: dict[str, Callable[[], object]] = {
        "plain": lambda: iommufd.ioctl(uapi.IoasAlloc()),
        "bytes": lambda: iommufd.ioctl(uapi.IOMMU_IOAS_ALLOC, bytearray(uapi.IoasAlloc().pack())),
        "pointers": lambda: iommufd.ioas_iova_ranges(77),
        "batch": lambda: iommufd.batch([uapi.IoasAlloc(), uapi.IoasAlloc()]).send(),
        "descriptors": lambda: iommufd.fault_queue_alloc(),
    }

    def interrupt(signum: int, frame: object) -> None:
        raise Interrupted

    previous = signal.signal(signal.SIGALRM, interrupt)
    os.kill(daemon.pid, signal.SIGSTOP)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(Interrupted):
            calls[kind]()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
        os.kill(daemon.pid, signal.SIGCONT)
    made = {"plain": 1, "bytes": 1, "pointers": 0, "batch": 2, "descriptors": 1}[kind]
    assert iommufd.ioas_alloc() == made + 1  # the call was made all the same
    assert iommufd.option(uapi.IOMMU_OPTION_RLIMIT_MODE) == 0


# ---- a daemon that goes away ----


def test_the_daemon_dies(frozen: tuple[Daemon, Iommufd]) -> None:
    daemon, iommufd = frozen
    memory = iommufd.guest_memory(4096)
    _, queue = iommufd.fault_queue_alloc()
    os.kill(daemon.pid, signal.SIGKILL)
    for _ in range(2):
        with pytest.raises(ConnectionError):
            iommufd.ioas_alloc()
    with pytest.raises(ConnectionError):
        queue.read(40)
    queue.close()
    memory.close()
    iommufd.close()


def test_a_dropped_client_warns() -> None:
    with Daemon() as daemon:
        iommufd = daemon.open()
        with pytest.warns(ResourceWarning, match="unclosed"):
            del iommufd
        gc.collect()


def test_many_channels(iommufd: Iommufd) -> None:
    channels = [iommufd.channel() for _ in range(50)]
    assert [channel.ioas_alloc() for channel in channels] == list(range(1, 51))
    for channel in channels:
        channel.close()
