"""The hello of a keeper (docs/PROTOCOL.md section 7): a seccomp listener is handed over."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

from iommufd_uapi.wire import (
    MAX_CALLER,
    SUPERVISE_EXPLAIN,
    SUPERVISE_KVM,
    SUPERVISE_PROC,
    SUPERVISE_REACH,
    SUPERVISE_SANITIZE,
    SUPERVISE_SANITIZE_FAIL,
    SUPERVISE_SUMMARY,
    SUPERVISE_TRACE,
    HelloReply,
)
from iommufdd.errors import EBADF, EINVAL, IommufdError
from iommufdd.server.credentials import OWN, Virtual, parse_virtual

from .notify import Supervisor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from iommufd_uapi.wire import Hello
    from iommufdd.server.channel import Channel

FLAGS = (
    SUPERVISE_EXPLAIN | SUPERVISE_SUMMARY | SUPERVISE_PROC | SUPERVISE_REACH | SUPERVISE_TRACE | SUPERVISE_SANITIZE
    | SUPERVISE_SANITIZE_FAIL | SUPERVISE_KVM
)  # fmt: skip
LEAST_BASE = 3


def supervise(channel: Channel, hello: Hello, machine: str, text: bytes, fds: Sequence[int]) -> bytes:
    """Start to answer the processes of a listener; the reply. EBADF, EINVAL, EMFILE."""
    traced = bool(hello.flags & SUPERVISE_TRACE)
    others = fds[: len(fds) - traced]
    if not 2 <= len(others) <= 3:
        raise EBADF("a keeper sends a seccomp listener and a page for the notification in work")
    if hello.flags & ~FLAGS or hello.reserved or hello.reserved2 or any(hello.device):
        raise EINVAL("a field that must be zero is not")
    if not LEAST_BASE <= hello.mm < 1 << 31:
        raise EINVAL(f"the base of descriptor numbers is {hello.mm}")
    server = channel.server
    virtual = virtual_of(text) or server.virtual
    follower = socket_of(fds[-1]) if traced else None
    listener = os.dup(fds[0])
    try:
        instance = server.instances.join(machine)
        supervisor = Supervisor(server, instance, channel.peer, listener, fds[1], int(hello.mm), virtual)
    except IommufdError:
        os.close(listener)
        if follower is not None:
            follower.close()
        raise
    supervisor.attach(channel, hello.flags)
    if follower is not None:
        supervisor.tell(follower)
    if len(others) == 3:
        supervisor.debug_folder = os.dup(fds[2])
    return HelloReply(kind=hello.kind, mm=hello.mm).pack()


def socket_of(fd: int) -> socket.socket:
    """A copy of a stream socket on which events are to leave; EINVAL."""
    copy = os.dup(fd)
    try:
        sock = socket.socket(fileno=copy)
    except OSError:
        os.close(copy)
        raise EINVAL("the descriptor for the trace is no socket") from None
    if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_STREAM:
        sock.close()
        raise EINVAL("the descriptor for the trace is no stream socket")
    return sock


def virtual_of(text: bytes) -> Virtual | None:
    """The credentials that all callers are said to have, as --caller of the daemon. EINVAL."""
    if len(text) > MAX_CALLER:
        raise EINVAL("the text about the caller is too long")
    try:
        virtual = parse_virtual(text.decode())
    except ValueError as error:
        raise EINVAL(f"credentials of the caller: {error}") from None
    return None if virtual == OWN else virtual
