"""The hello of a mount (docs/PROTOCOL.md section 8): a mounted /dev/fuse descriptor is handed over."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

from iommufd_uapi.wire import MOUNT_CONTAINER, MOUNT_OTHERS, SUPERVISE_EXPLAIN, SUPERVISE_SUMMARY, HelloReply
from iommufdd.errors import EBADF, EINVAL, IommufdError
from iommufdd.server.seccomp.hello import virtual_of
from iommufdd.server.seccomp.notify import origin_of

from .exact import Exact
from .session import Config, Session

if TYPE_CHECKING:
    from collections.abc import Sequence

    from iommufd_uapi.wire import Hello
    from iommufdd.server.channel import Channel

FLAGS = SUPERVISE_EXPLAIN | SUPERVISE_SUMMARY | MOUNT_OTHERS | MOUNT_CONTAINER
DEV_FUSE = os.makedev(10, 229)


def mount(channel: Channel, hello: Hello, machine: str, text: bytes, fds: Sequence[int]) -> bytes:
    """Start to serve a mount; the reply. EBADF, EINVAL, EMFILE."""
    if len(fds) not in (1, 3):
        raise EBADF("a mount sends one descriptor, or also a seccomp listener and a page for the notification in work")
    if hello.flags & ~FLAGS or hello.reserved or hello.reserved2 or any(hello.device):
        raise EINVAL("a field that must be zero is not")
    status = os.fstat(fds[0])
    if not stat.S_ISCHR(status.st_mode) or status.st_rdev != DEV_FUSE:
        raise EINVAL("the descriptor is not of /dev/fuse")
    server, peer = channel.server, channel.peer
    others = bool(hello.flags & MOUNT_OTHERS) or peer.uid != os.geteuid()
    config = Config(
        dev=hello.mm,
        container=bool(hello.flags & MOUNT_CONTAINER),
        private=not others and len(fds) == 1,
        cautious=others and os.geteuid() == 0,
        virtual=virtual_of(text) or server.virtual,
        origin=origin_of(peer),
    )
    session = Session(server, server.instances.join(machine), peer, os.dup(fds[0]), config)
    if len(fds) == 3:
        _listen(session, fds[1], fds[2])
    session.attach(channel, hello.flags)
    return HelloReply(kind=hello.kind, mm=hello.mm).pack()


def _listen(session: Session, listener: int, page: int) -> None:
    """EINVAL, EMFILE."""
    own = os.dup(listener)
    try:
        session.exact = Exact(session, own, page)
    except IommufdError:
        os.close(own)
        session.close("refused")
        raise
