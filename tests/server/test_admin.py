"""The admin plane: what it tells, what it changes, and callers who do not know the words."""

from __future__ import annotations

import errno
import os
import socket
from typing import TypeVar

import pytest

from iommufd_uapi import admin, iommufd, iommufd_test, wire
from iommufdd.server.admin import respond
from tests.server.conftest import Daemon, Local, Start
from tests.server.peer import ioctl, memfd, selftest

R = TypeVar("R", bound=admin.Reply)

PAGE = 4096


def ask(local: Local, request: admin.Request, expected: type[R]) -> R:
    """Through the lines of the socket, without the socket."""
    reply = admin.decode_reply(admin.encode(at_once(local, admin.encode(request))))
    assert isinstance(reply, expected)
    return reply


def at_once(local: Local, line: bytes) -> admin.Reply:
    """The reply to a request that waits for nothing: without Trio."""
    try:
        respond(local.server, -1, line).send(None)
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return]
    raise AssertionError("it waits")


def classes_of(counts: admin.Counts) -> dict[str, int]:
    """Without the replies that are at hand in this process."""
    return {name: count for name, count in counts.classes.items() if not name.startswith("iommufd_uapi.admin")}


def test_stats_count_what_is_there(local: Local) -> None:
    nothing = ask(local, admin.Stats(classes=True), admin.Counts)
    before = classes_of(nothing)
    peer = local.connect()
    ioas = peer.ioas()
    fd = memfd(4 * PAGE)
    peer.register(fd, 0, 4 * PAGE)
    mapping = iommufd.IoasMap(flags=7, ioas_id=ioas, user_va=0, length=4 * PAGE)  # at IOVA 0
    assert peer.one(ioctl(mapping)).result == 0
    access = peer.access(ioas)
    union = iommufd_test.AccessPages(iova=0, length=2 * PAGE)
    assert peer.one(ioctl(selftest(iommufd_test.IOMMU_TEST_OP_ACCESS_PAGES, 0, union)), [access]).result == 0
    stats = ask(local, admin.Stats(classes=True), admin.Counts)
    assert (stats.instances, stats.contexts, stats.channels, stats.address_spaces) == (1, 1, 1, 1)
    assert stats.objects_by_type == {"IOAS": 1, "ACCESS": 1}
    assert (stats.areas, stats.regions, stats.files, stats.page_files) == (1, 1, 1, 1)
    assert stats.pinned_pages == 2
    assert stats.classes["iommufdd.server.instance.ServedContext"] == 1
    os.close(fd)
    os.close(access)
    peer.close()
    after = ask(local, admin.Stats(classes=True), admin.Counts)
    assert classes_of(after) == before
    assert (after.charged_fds, after.open_fds) == (nothing.charged_fds, nothing.open_fds)


def test_a_close_is_seen_before_the_answer(local: Local) -> None:
    peer = local.connect()
    peer.sock.close()
    assert ask(local, admin.Stats(), admin.Counts).channels == 0
    assert ask(local, admin.Show(), admin.Tree).instances == []


def test_show(local: Local) -> None:
    peer = local.connect(machine=b"lab")
    second = local.connect(kind=1, fds=[peer.identity])
    ioas = peer.ioas()
    access = peer.access(ioas)
    (instance,) = ask(local, admin.Show(), admin.Tree).instances
    assert instance.name == "lab"
    assert [user.uid for user in instance.users] == [os.geteuid()]
    (context,) = instance.contexts
    assert context.inode == os.fstat(peer.identity).st_ino
    assert {channel.mm for channel in context.channels} == {peer.mm, second.mm}
    assert context.channels[0].pid == os.getpid()
    by_type = {obj.type: obj for obj in context.objects}
    assert by_type["IOAS"].users == len(by_type["IOAS"].holders) == 1
    assert by_type["ACCESS"].holds == [ioas]
    assert len(context.files) == 1
    os.close(access)


def test_credentials(local: Local) -> None:
    local.server.virtual_caller = True
    peer = local.connect()
    request = admin.Credentials(peer.mm, uid=4711, caps=["CAP_IPC_LOCK"], memlock=8192)
    assert ask(local, request, admin.Done).channels == 1
    (instance,) = ask(local, admin.Show(), admin.Tree).instances
    (channel,) = instance.contexts[0].channels
    assert (channel.uid, channel.caps, channel.memlock) == (4711, ["CAP_IPC_LOCK"], 8192)
    assert ask(local, admin.Credentials(peer.mm), admin.Done).channels == 1
    assert ask(local, admin.Credentials(1), admin.Done).channels == 0
    assert ask(local, admin.Credentials(peer.mm, caps=["CAP_CHOWN"]), admin.Error).errno == errno.EINVAL


@pytest.mark.parametrize(("uid", "memlock"), [(-1, None), (1 << 32, None), (None, -1), (None, 1 << 64)])
def test_credentials_that_nobody_has(local: Local, uid: int | None, memlock: int | None) -> None:
    local.server.virtual_caller = True
    peer = local.connect()
    assert ask(local, admin.Credentials(peer.mm, uid, memlock=memlock), admin.Error).errno == errno.EINVAL


def test_credentials_are_refused_by_default(local: Local) -> None:
    peer = local.connect()
    assert ask(local, admin.Credentials(peer.mm, uid=1), admin.Error).errno == errno.EPERM


def test_fault(local: Local) -> None:
    peer = local.connect()
    assert ask(local, admin.Fault(peer.mm), admin.Gates).gates == [admin.Gate(0, None)]
    assert ask(local, admin.Fault(peer.mm, 1), admin.Gates).gates == [admin.Gate(1, None)]
    reply = peer.one(ioctl(iommufd.IoasAlloc(), flags=wire.Flag.REASON))
    assert reply.result == -errno.EFAULT
    (gate,) = ask(local, admin.Fault(peer.mm), admin.Gates).gates
    assert (gate.left, gate.fired) == (0, "COPY_IN")
    assert peer.ioas() == 1
    assert ask(local, admin.Fault(1), admin.Gates).gates == []


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"{",
        b"null",
        b'"x"',
        b"[]",
        b"{}",
        b'{"request": "reboot"}',
        b'{"request": "fault"}',
        b"\xff\xfe",
        b'{"request": "fault", "mm": -1, "nth": "x"}',
        b'{"request": "stats", "more": 1}',
        b'{"request": ' * 50_000,
        b'{"request": "fault", "mm": 1, "nth": -7}',
        b'{"request": "fault", "mm": 1, "nth": 4294967296}',
    ],
)
def test_no_request(local: Local, line: bytes) -> None:
    reply = at_once(local, line)
    assert isinstance(reply, admin.Error)
    assert reply.errno == errno.EINVAL


def test_over_the_socket(daemon: Daemon) -> None:
    with daemon.admin() as first, daemon.admin() as second:
        assert first.stats().channels == 0
        peer = daemon.connect()
        assert second.stats().channels == 1
        first.sock.sendall(b'{"request": "stats"}\n{"request": "show"}\nnonsense\n')
        kinds = [type(admin.decode_reply(first.file.readline())) for _ in range(3)]
        assert kinds == [admin.Counts, admin.Tree, admin.Error]
        assert peer.ioas() == 1


def test_a_line_without_end(daemon: Daemon) -> None:
    with daemon.admin() as client:
        try:
            for _ in range(64):
                client.sock.sendall(b"x" * admin.MAX_LINE)
        except (BrokenPipeError, ConnectionResetError):
            pass
        else:
            client.sock.settimeout(30)
            assert client.sock.recv(1) == b""
    assert daemon.connect().ioas() == 1


def test_more_clients_than_there_are_places(daemon: Daemon) -> None:
    clients = [daemon.admin() for _ in range(40)]
    served = 0
    for client in clients:
        try:
            client.file.write(admin.encode(admin.Stats()))
            client.file.flush()
            served += bool(client.file.readline())
        except (BrokenPipeError, ConnectionResetError):
            pass
        except ValueError:
            pass
    assert served == 16
    for client in clients:
        client.sock.shutdown(socket.SHUT_RDWR)
        client.sock.close()


def test_none(start: Start) -> None:
    daemon = start("--admin-socket", "")
    assert not os.path.exists(daemon.path + ".admin")
    assert daemon.connect().ioas() == 1
