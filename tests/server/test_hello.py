"""The first packet: what is accepted, what is answered with an errno, what is not answered at all."""

import errno
import os
import socket

import pytest

from iommufd_uapi import wire
from tests.server.conftest import Local
from tests.server.peer import hello, ioctl, memfd


def refused(local: Local, packet: bytes, fds: list[int] | None = None) -> wire.HelloReply:
    peer = local.connect(greet=False)
    peer.send(packet, fds)
    data, got = peer.receive()
    reply = wire.HelloReply.unpack(data)
    assert reply.error
    assert not got
    assert peer.hung_up()
    return reply


def test_reply(local: Local) -> None:
    peer = local.connect(greet=False)
    reply = peer.greet()
    assert (reply.magic, reply.version, reply.kind, reply.error) == (wire.MAGIC, 1, 0, 0)
    assert (reply.max_packet, reply.max_fds) == (131072, 64)
    assert reply.mm
    assert os.fstat(peer.identity).st_size == 0
    with pytest.raises(PermissionError):  # sealed: nobody keeps data in it
        os.write(peer.identity, b"x")


def test_wrong_version_is_told_the_right_one(local: Local) -> None:
    for version in (0, 2, 65535):
        reply = refused(local, hello(version=version))
        assert (reply.error, reply.version) == (errno.EPROTONOSUPPORT, 1)


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"kind": 99}, errno.EINVAL),
        ({"flags": 2}, errno.EINVAL),
        ({"kind": 1, "flags": 1}, errno.EINVAL),
        ({"reserved": 1}, errno.EINVAL),
        ({"reserved2": 1}, errno.EINVAL),
        ({"machine": b"\xff\xfe"}, errno.EINVAL),
        ({"machine": b"a\0b"}, errno.EINVAL),
        ({"device": b"vfio0"}, errno.EINVAL),
        ({"kind": 1}, errno.EBADF),
        ({"kind": 2, "device": b"vfio0"}, errno.ENOENT),
        ({"mm": 12345}, errno.ENOENT),
    ],
)
def test_errors(local: Local, fields: dict[str, object], error: int) -> None:
    assert refused(local, hello(**fields)).error == error


def test_descriptors_that_mean_nothing(local: Local) -> None:
    fd = memfd(4096)
    assert refused(local, hello(), [fd]).error == errno.EINVAL
    assert refused(local, hello(kind=1), [fd, fd]).error == errno.EINVAL
    assert refused(local, hello(kind=1), [fd]).error == errno.EBADFD
    first = local.connect()
    assert refused(local, hello(kind=1, machine=b"x"), [first.identity]).error == errno.EINVAL
    os.close(fd)


@pytest.mark.parametrize(
    "packet",
    [b"x", hello()[:-1], hello() + b"\0", hello(magic=0x12345678), b"\0" * 96],
    ids=["one byte", "short", "long", "magic", "zeros"],
)
def test_no_hello_is_not_answered(local: Local, packet: bytes) -> None:
    peer = local.connect(greet=False)
    peer.send(packet)
    assert peer.hung_up()


def test_hang_up_before_the_hello(local: Local) -> None:
    local.connect(greet=False).close()
    assert not local.server.channels


def test_further_channel_serves_the_same_context(local: Local) -> None:
    first = local.connect()
    second = local.connect(kind=1, fds=[first.identity], mm=first.mm)
    stranger = local.connect(kind=1, fds=[first.identity])
    assert second.mm == first.mm != stranger.mm
    ioas = first.ioas()
    assert second.destroy(ioas) == 0
    assert stranger.destroy(ioas) == -errno.ENOENT
    first.close()
    assert len(local.server.instances.contexts) == 1
    second.ioas()
    second.close()
    stranger.close()
    assert not local.server.instances.contexts
    assert not local.server.spaces.by_token


def test_identity_of_a_closed_context(local: Local) -> None:
    first = local.connect()
    kept = os.dup(first.identity)
    first.close()
    assert refused(local, hello(kind=1), [kept]).error == errno.EBADFD
    os.close(kept)


def test_machines(local: Local) -> None:
    """A private machine for each hello without a name; the same one for the same name while it is in use."""
    private, other, shared, again = (local.connect(machine=name).identity for name in (b"", b"", b"lab", b"lab"))
    contexts = local.server.instances.contexts
    by_inode = {key[1]: context.instance for key, context in contexts.items()}
    one, two, three, four = (by_inode[os.fstat(fd).st_ino] for fd in (private, other, shared, again))
    assert one is not two
    assert three is four
    assert three not in (one, two)
    assert three.machine.name == "lab"


def test_requests_before_the_hello(local: Local) -> None:
    peer = local.connect(greet=False)
    peer.send(ioctl(b"\x08\0\0\0\0\0\0\0", cmd=0x3B80))
    assert peer.hung_up()


@pytest.mark.skipif(os.getuid() != 0, reason="needs a second uid")
def test_address_space_of_another_uid(local: Local) -> None:
    first = local.connect()
    address = f"\0iommufdd-test-{os.getpid()}"
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listening.bind(address)
    listening.listen()
    local.server.listen(listening)
    ours = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    os.seteuid(65534)
    try:
        ours.connect(address)
    finally:
        os.seteuid(0)
    local.pump()
    ours.send(hello(mm=first.mm))
    local.pump()
    assert wire.HelloReply.unpack(ours.recv(4096)).error == errno.EPERM
    ours.close()
