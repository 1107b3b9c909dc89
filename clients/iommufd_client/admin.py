"""Room client: the admin socket of a daemon, JSON lines (iommufd_uapi.admin)."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Self, TypeVar

from iommufd_uapi import admin

from .call import IommufdOSError
from .channel import ProtocolError
from .connection import default_socket_path

if TYPE_CHECKING:
    from collections.abc import Sequence

R = TypeVar("R", bound=admin.Reply)


class Admin:
    """A connection to the admin socket: what is open; and, for tests, other credentials and injected faults."""

    def __init__(self, socket_path: str | None = None, *, timeout: float = 10.0) -> None:
        """`socket_path` is the admin socket itself, by default the daemon's with `.admin`. OSError."""
        self.socket_path = socket_path or default_socket_path() + ".admin"
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._sock.settimeout(timeout)
        self._received = bytearray()
        try:
            self._sock.connect(self.socket_path)
        except OSError as error:
            self._sock.close()
            error.filename = self.socket_path
            raise

    def ask(self, request: admin.Request) -> bytes:
        """One request; the line that answers it."""
        self._sock.sendall(admin.encode(request))
        while b"\n" not in self._received:
            data = self._sock.recv(1 << 16)
            if not data:
                raise ConnectionResetError("the daemon closed the admin socket")
            self._received += data
        line, _, rest = self._received.partition(b"\n")
        self._received = rest
        return bytes(line)

    def _request(self, request: admin.Request, expected: type[R]) -> R:
        reply = admin.decode_reply(self.ask(request))
        if isinstance(reply, admin.Error):
            raise IommufdOSError(reply.errno, reply.reason)
        if not isinstance(reply, expected):
            raise ProtocolError(f"a {type(reply).__name__} instead of a {expected.__name__}")
        return reply

    def show(self) -> admin.Tree:
        """What is open."""
        return self._request(admin.Show(), admin.Tree)

    def stats(self, *, classes: bool = False) -> admin.Counts:
        """Counts of all that is open."""
        return self._request(admin.Stats(classes=classes), admin.Counts)

    def credentials(
        self,
        mm: int,
        *,
        uid: int | None = None,
        caps: Sequence[str] | None = None,
        memlock: int | None = None,
    ) -> int:
        """Change who the caller is, for all channels of an address space; how many. EPERM."""
        request = admin.Credentials(mm, uid, None if caps is None else list(caps), memlock)
        return self._request(request, admin.Done).channels

    def fault(self, mm: int, nth: int | None = None) -> list[admin.Gate]:
        """Let the nth acquisition from now fail (0: none), or ask what has failed."""
        return self._request(admin.Fault(mm, nth), admin.Gates).gates

    def sanitize(self, machine: str | None = None, *, settle: bool = False) -> list[admin.Findings]:
        """What the sanitizer has found, for each machine; settle: what was not flushed until now never was. ENOENT."""
        return self._request(admin.Sanitize(machine, settle), admin.Sanitized).machines

    def close(self) -> None:
        self._sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
