"""The reactor as a Trio task: it serves, lets other tasks run, and ends when it is cancelled."""

from __future__ import annotations

import errno
import select
import socket

import pytest
import trio

from iommufd_uapi import iommufd
from iommufdd.server.listener import adopt
from iommufdd.server.serve import Server
from iommufdd.wiring import new_machine
from tests.server.peer import Peer, ioctl


def connected(server: Server) -> socket.socket:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    adopt(server, theirs)
    ours.settimeout(30)
    return ours


def converse(sock: socket.socket) -> list[int]:
    """A client in a thread."""
    peer = Peer(sock)
    ids = [peer.ioas() for _ in range(50)]
    assert peer.destroy(999) == -errno.ENOENT
    peer.close()
    return ids


async def test_serving(nursery: trio.Nursery) -> None:
    server = Server(new_machine, nofile=1024)
    nursery.start_soon(server.reactor.run)
    results: dict[int, list[int]] = {}

    async def client(number: int) -> None:
        results[number] = await trio.to_thread.run_sync(converse, connected(server))

    async with trio.open_nursery() as clients:
        for number in range(4):
            clients.start_soon(client, number)
    assert all(ids == list(range(1, 51)) for ids in results.values())
    with trio.fail_after(30):
        await server.idle.wait()  # the last channel is closed
    nursery.cancel_scope.cancel()
    server.close()


async def test_spinning(nursery: trio.Nursery) -> None:
    server = Server(new_machine, nofile=1024, spin=0.0002)
    nursery.start_soon(server.reactor.run)
    assert len(await trio.to_thread.run_sync(converse, connected(server))) == 50
    nursery.cancel_scope.cancel()
    server.close()


async def test_other_tasks_run_while_requests_keep_coming(nursery: trio.Nursery) -> None:
    server = Server(new_machine, nofile=1024)
    sock = connected(server)
    peer = Peer(sock, greet=False)
    ticks = 0
    stop = False

    def flood() -> None:
        peer.greet()
        while not stop:
            peer.call(ioctl(iommufd.Destroy(id=1)))

    async def count() -> None:
        nonlocal ticks, stop
        for _ in range(20):
            await trio.sleep(0.001)
            ticks += 1
        stop = True

    nursery.start_soon(server.reactor.run)
    with trio.fail_after(30):
        async with trio.open_nursery() as both:
            both.start_soon(trio.to_thread.run_sync, flood)
            both.start_soon(count)
    assert ticks == 20
    peer.close()
    nursery.cancel_scope.cancel()
    server.close()


async def test_a_source_with_a_bug_costs_only_itself(nursery: trio.Nursery, caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        def ready(self, mask: int) -> None:
            raise RuntimeError("bug")

    server = Server(new_machine, nofile=1024)
    left, right = socket.socketpair()
    server.reactor.register(left.fileno(), Broken(), select.EPOLLIN)
    right.send(b"x")
    nursery.start_soon(server.reactor.run)
    assert len(await trio.to_thread.run_sync(converse, connected(server))) == 50
    assert [record.message for record in caplog.records] == ["bug"]
    nursery.cancel_scope.cancel()
    left.close()
    right.close()
    server.close()


async def test_cancelled_while_idle(nursery: trio.Nursery) -> None:
    server = Server(new_machine, nofile=1024)
    with trio.move_on_after(0.05):
        await server.reactor.run()
    server.close()
