"""The hello of a keeper, and what is refused."""

from __future__ import annotations

import array
import errno
import fcntl
import os
import socket
import struct
from typing import TYPE_CHECKING, Any

import pytest

from iommufd_client import run as client
from iommufd_client.keeper import HELLO_REPLY
from iommufd_uapi import wire

if TYPE_CHECKING:
    from iommufd_client.testing import Daemon


def test_the_structs_of_the_keeper_are_those_of_the_wire() -> None:
    assert client.HELLO.size == wire.Hello.SIZEOF
    assert HELLO_REPLY.size == wire.HelloReply.SIZEOF
    assert (client.MAGIC, client.VERSION, client.SUPERVISE) == (wire.MAGIC, wire.VERSION, wire.Kind.SUPERVISE)
    flags = (
        wire.SUPERVISE_EXPLAIN,
        wire.SUPERVISE_SUMMARY,
        wire.SUPERVISE_PROC,
        wire.SUPERVISE_REACH,
        wire.SUPERVISE_TRACE,
    )
    assert flags == (client.EXPLAIN, client.SUMMARY, client.PROC, client.REACH, client.TRACE)


def ask(daemon: Daemon, fds: list[int], *, base: int = 900, text: bytes = b"", **fields: Any) -> int:
    """The errno of the reply."""
    hello = wire.Hello(kind=wire.Kind.SUPERVISE, mm=base, **fields).pack()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.settimeout(10)
        sock.connect(daemon.socket_path)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        sock.sendmsg([hello + text], rights)
        reply = sock.recv(4096)
        return int(HELLO_REPLY.unpack_from(reply)[3]) if reply else -1


@pytest.fixture
def files(tmp_path_factory: pytest.TempPathFactory) -> list[int]:
    page = os.memfd_create("page", os.MFD_ALLOW_SEALING)
    os.ftruncate(page, 4096)
    fcntl.fcntl(page, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    return [os.open(os.devnull, os.O_RDONLY), page]


def test_what_is_no_listener_is_refused(daemon: Daemon, files: list[int]) -> None:
    assert ask(daemon, files) == errno.EINVAL
    assert ask(daemon, []) == errno.EBADF
    assert ask(daemon, files[:1]) == errno.EBADF
    assert ask(daemon, files * 2) == errno.EBADF


def test_a_trace_goes_to_a_stream_socket(daemon: Daemon, files: list[int]) -> None:
    assert ask(daemon, files, flags=wire.SUPERVISE_TRACE) == errno.EBADF
    assert ask(daemon, [*files, files[0]], flags=wire.SUPERVISE_TRACE) == errno.EINVAL
    for kind in (socket.SOCK_SEQPACKET, socket.SOCK_STREAM):  # the second is right; the listener is still none
        ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
        with ours, theirs:
            assert ask(daemon, [*files, theirs.fileno()], flags=wire.SUPERVISE_TRACE) == errno.EINVAL
            theirs.close()
            assert ours.recv(1) == b"", "the daemon has kept nothing of a refused hello"


def test_fields_that_mean_nothing_are_refused(daemon: Daemon, files: list[int]) -> None:
    assert ask(daemon, files, base=2) == errno.EINVAL
    assert ask(daemon, files, base=1 << 31) == errno.EINVAL
    assert ask(daemon, files, flags=8) == errno.EINVAL
    assert ask(daemon, files, reserved=1) == errno.EINVAL
    assert ask(daemon, files, text=b"uid=me") == errno.EINVAL
    assert ask(daemon, files, text=b"\xff" * 10) == errno.EINVAL
    assert ask(daemon, files, text=b"x" * 257) == errno.EINVAL


def test_text_after_another_hello_breaks_the_protocol(daemon: Daemon) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.settimeout(10)
        sock.connect(daemon.socket_path)
        sock.send(wire.Hello().pack() + b"text")
        assert sock.recv(4096) == b""


def test_nothing_of_a_refused_hello_stays(daemon: Daemon, files: list[int]) -> None:
    with daemon.admin() as admin:
        ask(daemon, files)
        before = admin.stats()
        for _ in range(20):
            ask(daemon, files)
            ask(daemon, files, text=struct.pack("8x"))
        after = admin.stats()
    assert (after.open_fds, after.charged_fds) == (before.open_fds, before.charged_fds)
