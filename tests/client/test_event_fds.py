"""Event descriptors in a native client: select, poll, epoll, O_NONBLOCK, dup, fork and another program, as on Linux."""

from __future__ import annotations

import errno
import fcntl
import os
import select
import socket
import subprocess
from typing import TYPE_CHECKING, NamedTuple

import pytest

from iommufd_client import Iommufd, IommufdOSError
from iommufd_uapi import iommufd as uapi
from iommufd_uapi import iommufd_test as mock

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from iommufd_client.files import File
    from iommufd_client.testing import Daemon

IN, OUT = select.POLLIN, select.POLLOUT
RESPONSE = uapi.HwptPageResponse


class Rig(NamedTuple):
    """A mock device whose page requests go to `queue`, and whose vIOMMU's events go to `veventq`."""

    iommufd: Iommufd
    dev_id: int
    stdev_id: int
    fault_id: int
    queue: File
    veventq_id: int
    veventq: File

    def fault(self, grpid: int = 0) -> None:
        self.iommufd.test(mock.TriggerIopf(dev_id=self.dev_id, grpid=grpid, perm=1, addr=0x1000))

    def vevent(self) -> None:
        self.iommufd.test(mock.TriggerVevent(dev_id=self.dev_id))


@pytest.fixture
def rig(iommufd: Iommufd) -> Iterator[Rig]:
    ioas = iommufd.ioas_alloc()
    dev = iommufd.mock_domain(ioas)
    parent = iommufd.hwpt_alloc(dev.out_idev_id, ioas, flags=uapi.IOMMU_HWPT_ALLOC_NEST_PARENT)
    viommu = iommufd.viommu_alloc(dev.out_idev_id, parent, mock.IOMMU_VIOMMU_TYPE_SELFTEST)
    iommufd.vdevice_alloc(viommu, dev.out_idev_id, 0x99)
    fault_id, queue = iommufd.fault_queue_alloc()
    veventq_id, veventq = iommufd.veventq_alloc(viommu, mock.IOMMU_VEVENTQ_TYPE_SELFTEST, 2)
    nested = iommufd.hwpt_alloc(
        dev.out_idev_id, viommu, data=mock.HwptSelftest(mock.IOMMU_TEST_IOTLB_DEFAULT), fault_id=fault_id
    )
    iommufd.test(mock.MockDomainReplace(pt_id=nested), dev.out_stdev_id)
    with queue, veventq:
        yield Rig(iommufd, dev.out_idev_id, dev.out_stdev_id, fault_id, queue, veventq_id, veventq)


def poll(fd: int) -> int:
    poller = select.poll()
    poller.register(fd, IN | OUT)
    return sum(mask for _, mask in poller.poll(0))


def test_poll_select_epoll_show_what_the_queue_holds(rig: Rig) -> None:
    queue, veventq = rig.queue.fileno(), rig.veventq.fileno()
    epoll = select.epoll()
    epoll.register(queue, select.EPOLLIN)
    epoll.register(veventq, select.EPOLLIN)
    assert (poll(queue), poll(veventq), epoll.poll(0)) == (OUT, 0, [])

    rig.fault()
    assert (poll(queue), poll(veventq)) == (IN | OUT, 0)
    assert epoll.poll(0) == [(queue, select.EPOLLIN)]
    rig.vevent()
    assert poll(veventq) == IN
    assert select.select([queue, veventq], [], [], 0)[0] == [queue, veventq]

    record = uapi.HwptPgfault.unpack(rig.queue.read(uapi.HwptPgfault.SIZEOF))
    assert len(rig.veventq.read(64)) == 12
    assert (poll(queue), poll(veventq), epoll.poll(0)) == (OUT, 0, [])
    assert rig.queue.write(RESPONSE(record.cookie, uapi.IOMMUFD_PAGE_RESP_SUCCESS).pack()) == RESPONSE.SIZEOF
    epoll.close()


def test_a_lost_marker_alone_is_readable(rig: Rig) -> None:
    for _ in range(3):
        rig.vevent()
    assert len(rig.veventq.read(24)) == 24  # the two that fit its depth
    assert poll(rig.veventq.fileno()) == IN
    header = uapi.IommufdVeventHeader.unpack(rig.veventq.read(8))
    assert header == uapi.IommufdVeventHeader(uapi.IOMMU_VEVENTQ_FLAG_LOST_EVENTS, 2)
    assert poll(rig.veventq.fileno()) == 0


def test_reads_never_wait_whatever_o_nonblock_says(rig: Rig) -> None:
    for nonblock in (0, os.O_NONBLOCK):
        flags = fcntl.fcntl(rig.queue.fileno(), fcntl.F_GETFL)
        fcntl.fcntl(rig.queue.fileno(), fcntl.F_SETFL, flags & ~os.O_NONBLOCK | nonblock)
        assert rig.queue.read(40) == b""
        assert rig.veventq.read(40) == b""
        for count, number in ((39, errno.ESPIPE), (41, errno.ESPIPE)):
            with pytest.raises(IommufdOSError) as caught:
                rig.queue.read(count)
            assert caught.value.errno == number
        with pytest.raises(IommufdOSError) as caught:
            rig.veventq.read(7)
        assert caught.value.errno == errno.EINVAL


def test_a_detach_takes_back_what_was_not_read(rig: Rig) -> None:
    rig.fault()
    assert poll(rig.queue.fileno()) == IN | OUT
    ioas = rig.iommufd.ioas_alloc()
    rig.iommufd.test(mock.MockDomainReplace(pt_id=ioas), rig.stdev_id)
    assert poll(rig.queue.fileno()) == OUT
    assert rig.queue.read(40) == b""


def test_the_last_copy_frees_the_queue_dup_and_socket_in_flight_too(rig: Rig, iommufdd_daemon: Daemon) -> None:
    def busy() -> bool:
        rc = rig.iommufd.batch([uapi.Destroy(id=rig.veventq_id)]).send()[0]
        return isinstance(rc, OSError) and rc.errno == errno.EBUSY

    copy = os.dup(rig.veventq.fileno())
    rig.vevent()
    assert poll(copy) == IN
    here, there = socket.socketpair()
    socket.send_fds(here, [b"fd"], [copy])
    os.close(copy)
    rig.veventq.close()
    assert busy(), "a copy is in flight"
    _, (arrived,), _, _ = socket.recv_fds(there, 2, 1)
    assert busy(), "a copy has arrived"
    os.close(arrived)
    here.close()
    there.close()
    assert not busy()


def test_a_forked_child_holds_the_queue_until_it_exits(rig: Rig) -> None:
    ready, done = os.pipe(), os.pipe()
    child = os.fork()
    if not child:
        os.write(ready[1], b"%d" % (poll(rig.veventq.fileno()) == IN))
        os.read(done[0], 1)
        os._exit(0)
    rig.vevent()
    rig.veventq.close()
    try:
        os.read(ready[0], 1)
        with pytest.raises(OSError, match="busy") as caught:
            rig.iommufd.destroy(rig.veventq_id)
        assert caught.value.errno == errno.EBUSY
    finally:
        os.write(done[1], b"x")
        os.waitpid(child, 0)
        for fd in (*ready, *done):
            os.close(fd)
    rig.iommufd.destroy(rig.veventq_id)


WATCHER = r"""
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/select.h>
#include <sys/wait.h>
#include <unistd.h>

static int ready(int fd)
{
	struct pollfd pfd = { .fd = fd, .events = POLLIN | POLLOUT };
	struct epoll_event event = { .events = EPOLLIN };
	int epoll = epoll_create1(0), edge;
	fd_set set;
	struct timeval now = { 0, 0 };

	FD_ZERO(&set);
	FD_SET(fd, &set);
	poll(&pfd, 1, 0);
	epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event);
	edge = epoll_wait(epoll, &event, 1, 0);
	close(epoll);
	printf("poll %x select %d epoll %d\n", pfd.revents, select(fd + 1, &set, NULL, NULL, &now), edge);
	fflush(stdout);
	return pfd.revents;
}

int main(int argc, char **argv)
{
	int fd = atoi(argv[1]), copy;
	char go;

	ready(fd);
	while (read(0, &go, 1) == 1) {
		fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) ^ O_NONBLOCK);
		copy = dup(fd);
		if (!fork()) {
			ready(copy);
			_exit(0);
		}
		wait(NULL);
		close(copy);
	}
	return argc != 2;
}
"""


def test_a_c_program_that_inherits_the_descriptor_sees_the_same(rig: Rig, tmp_path: Path) -> None:
    source, program = tmp_path / "watcher.c", tmp_path / "watcher"
    source.write_text(WATCHER)
    subprocess.run(["cc", "-Wall", "-Werror", "-o", program, source], check=True)
    fd = rig.queue.fileno()
    with subprocess.Popen(
        [program, str(fd)], pass_fds=[fd], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as watcher:
        assert watcher.stdin is not None
        assert watcher.stdout is not None
        assert watcher.stdout.readline() == "poll 4 select 0 epoll 0\n"

        def look() -> str:
            assert watcher.stdin is not None
            assert watcher.stdout is not None
            watcher.stdin.write("x")
            watcher.stdin.flush()
            return watcher.stdout.readline()

        assert look() == "poll 4 select 0 epoll 0\n"
        rig.fault()
        assert look() == "poll 5 select 1 epoll 1\n"
        rig.queue.read(40)
        assert look() == "poll 4 select 0 epoll 0\n"
        rig.queue.close()
        with pytest.raises(OSError, match="busy"):
            rig.iommufd.destroy(rig.fault_id)
        watcher.stdin.close()
        assert watcher.wait(10) == 0
