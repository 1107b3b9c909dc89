"""The hello of a mount, and what is refused."""

from __future__ import annotations

import array
import errno
import fcntl
import os
import socket
from typing import TYPE_CHECKING, Any

import pytest

from iommufd_client.keeper import HELLO_REPLY
from iommufd_uapi import wire

if TYPE_CHECKING:
    from iommufd_client.testing import Daemon

    from .conftest import Mount


@pytest.fixture
def fuse(mount: Mount) -> int:
    """A /dev/fuse that nothing is mounted with."""
    return os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)


@pytest.fixture
def page() -> int:
    page = os.memfd_create("page", os.MFD_ALLOW_SEALING)
    os.ftruncate(page, 4096)
    fcntl.fcntl(page, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    return page


def ask(daemon: Daemon, fds: list[int], *, text: bytes = b"", **fields: Any) -> int:
    """The errno of the reply."""
    hello = wire.Hello(kind=wire.Kind.MOUNT, **fields).pack()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.settimeout(10)
        sock.connect(daemon.socket_path)
        sock.sendmsg([hello + text], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])
        return int(HELLO_REPLY.unpack_from(sock.recv(4096))[3])


def test_what_is_no_mount_is_refused(daemon: Daemon, fuse: int, page: int) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    assert ask(daemon, [null]) == errno.EINVAL
    assert ask(daemon, [fuse, null]) == errno.EBADF
    assert ask(daemon, [fuse, page, null, null]) == errno.EBADF
    assert ask(daemon, [fuse], reserved=1) == errno.EINVAL
    assert ask(daemon, [fuse], flags=4) == errno.EINVAL
    assert ask(daemon, [fuse], text=b"uid=me") == errno.EINVAL


def test_nothing_of_a_refused_listener_stays(daemon: Daemon, fuse: int, page: int) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    with daemon.admin() as admin:
        ask(daemon, [fuse, null, page])
        before = admin.stats()
        for fds in ([fuse, null, page], [fuse, page, null], [fuse, page, page]) * 5:
            assert ask(daemon, fds) == errno.EINVAL
        after = admin.stats()
    assert (after.open_fds, after.charged_fds) == (before.open_fds, before.charged_fds)
    assert not daemon.log.count("event=bug")
