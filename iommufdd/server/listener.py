"""Listening sockets: made here, inherited, or handed over by systemd, and what systemd wants to hear."""

from __future__ import annotations

import os
import select
import socket
import stat
from logging import WARNING
from typing import TYPE_CHECKING

from iommufd_uapi.wire import MAX_PACKET, HelloReply
from iommufdd.errors import EMFILE, IommufdError

from . import log
from .channel import Channel
from .credentials import peer_of

if TYPE_CHECKING:
    from .serve import Server

BACKLOG = 128
ACCEPTS = 16  # a turn
SEND_BUFFER = 2 * MAX_PACKET  # the kernel counts its own overhead too
LISTEN_FDS_START = 3


class StartError(Exception):
    """The daemon cannot start; one line for people."""


class Listener:
    """A listening socket in the reactor."""

    def __init__(self, server: Server, sock: socket.socket) -> None:
        self.server = server
        self.sock = sock
        self._spare: int | None = _spare()
        sock.setblocking(False)
        server.reactor.register(sock.fileno(), self, select.EPOLLIN)

    def ready(self, mask: int) -> None:
        for _ in range(ACCEPTS):
            try:
                connection, _ = self.sock.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if not self._refuse_without_descriptor():
                    if self.server.ratelimit("accept"):
                        log.event(WARNING, "accept-failed", why=error.strerror)
                    return
                continue
            adopt(self.server, connection)

    def _refuse_without_descriptor(self) -> bool:
        """Every descriptor is taken: accept with the spare one and hang up, or the peer would wait for ever."""
        if self._spare is not None:
            os.close(self._spare)
        try:
            connection, _ = self.sock.accept()
            refuse(connection, EMFILE("the daemon has no descriptor left"))
        except OSError:
            return False
        finally:
            self._spare = _spare()
        return True

    def close(self) -> None:
        self.server.reactor.unregister(self.sock.fileno())
        self.sock.close()
        if self._spare is not None:
            os.close(self._spare)


class SocketFile:
    """The path of a socket made here, to be removed at the end."""

    def __init__(self, path: str) -> None:
        self.path = os.path.abspath(path)
        self._inode = _inode(self.path)

    def unlink(self) -> None:
        if self._inode is not None and _inode(self.path) == self._inode:  # else somebody else's by now
            os.unlink(self.path)


def adopt(server: Server, connection: socket.socket) -> None:
    """Make a connection a channel, or refuse it."""
    connection.setblocking(False)
    try:
        peer = peer_of(connection)
        server.nofile.charge(peer.uid)
    except IommufdError as error:
        refuse(connection, error)
        if server.ratelimit("refused"):
            log.event(WARNING, "refused", why=error.reason)
        return
    except OSError:  # it has gone already
        connection.close()
        return
    try:
        if connection.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) < SEND_BUFFER:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        Channel(server, connection, peer)
    except OSError as error:  # fs.epoll.max_user_watches
        server.nofile.uncharge(peer.uid)
        connection.close()
        if server.ratelimit("refused"):
            log.event(WARNING, "refused", why=error.strerror)


def refuse(connection: socket.socket, error: IommufdError) -> None:
    """Answer the hello that has or has not come yet, and hang up."""
    try:
        connection.send(HelloReply(error=error.errno).pack(), socket.MSG_DONTWAIT)
    except OSError:
        pass
    connection.close()


# ---- where listening sockets come from ---------------------------------------------------------------------


def listen_at(path: str, mode: int, kind: int = socket.SOCK_SEQPACKET) -> socket.socket:
    """Bind and listen at a path. A socket file that nobody listens at any more is replaced. StartError."""
    sock = socket.socket(socket.AF_UNIX, kind | socket.SOCK_CLOEXEC)
    try:
        _clear(path, kind)
        # No moment with more rights than asked for: the mode of a socket file is what umask leaves of 0777.
        before = os.umask(0o777 & ~mode)
        try:
            sock.bind(path)
        finally:
            os.umask(before)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise StartError(f"cannot listen at {path}: {error.strerror or error}") from None
    except StartError:
        sock.close()
        raise
    return sock


def _clear(path: str, kind: int) -> None:
    """Remove a dead socket file; StartError for a live one, or for a file that is no socket."""
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            raise StartError(f"cannot listen at {path}: it exists and is no socket")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, kind) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except OSError as error:
            if error.errno != 91:  # EPROTOTYPE: somebody listens there for another kind of connection
                raise
    raise StartError(f"cannot listen at {path}: another process does")


def inherited(fd: int) -> socket.socket:
    """A Unix SEQPACKET socket that was open when we started, listening or connected. StartError."""
    try:
        os.set_inheritable(fd, False)
        sock = socket.socket(fileno=fd)
    except OSError as error:
        raise StartError(f"fd {fd}: {error.strerror}") from None
    if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_SEQPACKET:
        sock.detach()
        raise StartError(f"fd {fd} is no Unix socket of type SEQPACKET")
    return sock


def is_listening(sock: socket.socket) -> bool:
    """Whether listen(2) was called on it. OSError."""
    return bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def activated() -> list[tuple[int, str]]:
    """What systemd passed on (sd_listen_fds_with_names): numbers and names; the environment is cleared."""
    pid, count, names = (os.environ.pop(name, "") for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"))
    if pid != str(os.getpid()) or not count.isdecimal():
        return []
    named = names.split(":") + [""] * int(count)
    return [(LISTEN_FDS_START + at, named[at]) for at in range(int(count))]


def notify(state: str) -> None:
    """Tell the service manager (sd_notify); nothing without NOTIFY_SOCKET."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        try:
            sock.sendto(state.encode(), "\0" + address[1:] if address[0] == "@" else address)
        except OSError as error:
            log.event(WARNING, "notify-failed", why=error.strerror)


def _spare() -> int | None:
    """A descriptor to be given up when there is no other."""
    try:
        return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None


def _inode(path: str) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino
