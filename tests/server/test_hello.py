"""The first packet: what is accepted, what is answered with an errno, what is not answered at all."""

import errno
import os
import socket
from pathlib import Path

import pytest

from iommufd_uapi import wire
from iommufdd.machine_file import Machines
from iommufdd.server.hello import Refusal
from tests.server.conftest import Local, LocalPeer
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


def kind_of(local: Local, peer: LocalPeer) -> str:
    """The description's name of the machine a peer is on."""
    inode = os.fstat(peer.identity).st_ino
    (context,) = (context for key, context in local.server.instances.contexts.items() if key[1] == inode)
    return context.instance.machine.description.name


@pytest.mark.parametrize(("name", "kind"), [(b"", "mock"), (b"@vtd", "vtd"), (b"ci@vtd", "vtd"), (b"ci@mock", "mock")])
def test_a_machine_of_a_kind(local: Local, name: bytes, kind: str) -> None:
    assert kind_of(local, local.connect(machine=name)) == kind


def test_shared_machines_have_one_kind(local: Local) -> None:
    first, second, third = (local.connect(machine=name) for name in (b"ci@vtd", b"ci", b"ci@vtd"))
    assert [kind_of(local, peer) for peer in (first, second, third)] == ["vtd"] * 3
    assert len(list(local.server.instances)) == 1
    assert why(local, b"ci@mock") == (errno.EEXIST, "'ci' is there, as 'vtd'")
    for peer in (first, second, third):
        peer.close()
    assert kind_of(local, local.connect(machine=b"ci@mock")) == "mock"


def test_private_machines_of_a_kind_are_private(local: Local) -> None:
    local.connect(machine=b"@vtd")
    local.connect(machine=b"@vtd")
    assert len(list(local.server.instances)) == 2


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        (b"@vtx", (errno.ENOENT, "there is no machine 'vtx'; there are mock, smmuv3, tegra241, vtd")),
        (b"ci@vtd@", (errno.ENOENT, "there is no machine 'vtd@'; there are mock, smmuv3, tegra241, vtd")),
        (b"ci@", (errno.EINVAL, "'ci@' names no machine behind the @")),
        (b"@", (errno.EINVAL, "'@' names no machine behind the @")),
        (b"vtd", (errno.EINVAL, "'vtd' is a machine: '@vtd' is a private one, 'NAME@vtd' a shared one")),
    ],
)
def test_names_of_machines_that_are_none(local: Local, name: bytes, answer: tuple[int, str]) -> None:
    assert why(local, name) == answer
    local.connect(machine=b"ci")
    assert why(local, name) == answer
    assert not {"", "vtx", "vtd"} & set(local.server.instances.named)


def why(local: Local, machine: bytes) -> tuple[int, str]:
    """errno and reason of the refusal."""
    peer = local.connect(greet=False)
    peer.send(hello(machine=machine))
    data, _ = peer.receive()
    return wire.HelloReply.unpack(data).error, data[wire.HelloReply.SIZEOF :].decode()


def test_a_long_reason_is_cut_at_a_character() -> None:
    answer = Refusal(wire.Hello(), errno.ENOENT, "x" + "é" * 200).answer
    assert answer[wire.HelloReply.SIZEOF :].decode() == "x" + "é" * 119


def test_the_daemons_own_machines(tmp_path: Path) -> None:
    """The first one chosen is what a client gets that asks for none."""
    path = tmp_path / "lab.toml"
    path.write_text('name = "lab"\n')
    local = Local(machines=Machines([str(path), "vtd"]))
    try:
        kinds = [kind_of(local, local.connect(machine=name)) for name in (b"", b"ci", b"@vtd", b"@mock", b"x@lab")]
        assert kinds == ["lab", "lab", "vtd", "mock", "lab"]
        there = "there are lab, mock, smmuv3, tegra241, vtd"
        assert why(local, b"@x") == (errno.ENOENT, f"there is no machine 'x'; {there}")
    finally:
        local.close()


def test_who_keeps_a_machine_keeps_its_name(local: Local) -> None:
    """A program under supervision shares its machine from the hello on, not from its first open() on."""
    instances, keeper = local.server.instances, object()
    instance = instances.join("ci@vtd")
    instance.keep(keeper)
    assert instances.join("ci") is instance
    peer = local.connect(machine=b"ci")
    assert kind_of(local, peer) == "vtd"
    instance.let_go(keeper)
    assert instances.join("ci") is instance
    peer.close()
    assert instances.join("ci") is not instance
    assert not instances.named


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
