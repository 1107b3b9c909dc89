"""Room client: the admin socket of a daemon, JSON lines (iommufd_uapi.admin)."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Literal, Self, TypeVar

from iommufd_uapi import admin
from iommufd_uapi.events import USUAL

from .call import IommufdOSError
from .channel import ProtocolError
from .connection import default_socket_path

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from iommufd_uapi.events import AnyEvent

    from .endpoint import Endpoint, Opened

R = TypeVar("R", bound=admin.Reply)


class Admin:
    """A connection to the admin socket: what is open, what devices do; and, for tests, credentials and faults."""

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
        seen = 0
        while self._received.find(b"\n", seen) < 0:
            seen = len(self._received)
            data = self._sock.recv(1 << 20)
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

    def endpoint(self, device: str, instance: str | Opened = "") -> Endpoint:
        """A device by name, of a machine that is named or that an open /dev/iommu is on."""
        from .endpoint import Endpoint

        return Endpoint(self, device, instance)

    def dma(self, request: admin.Dma) -> admin.Moved:
        """One DMA of at most 1 MiB to its end, however long that takes: see Endpoint."""
        before = self._sock.gettimeout()
        self._sock.settimeout(None)
        try:
            return self._request(request, admin.Moved)
        finally:
            self._sock.settimeout(before)

    def walk(
        self,
        device: str,
        iova: int,
        *,
        instance: str = "",
        pasid: int | None = None,
        op: Literal["read", "write"] = "read",
        privileged: bool = False,
    ) -> admin.Walked:
        """How a request of a device would be translated. ENOENT, EINVAL."""
        return self._request(admin.Walk(device, iova, instance, pasid, op, privileged), admin.Walked)

    def trace(
        self,
        *,
        pids: Sequence[int] = (),
        machine: str | None = None,
        only: Iterable[str] = USUAL,
        failed: bool = False,
    ) -> tuple[int, Iterator[AnyEvent]]:
        """Follow what happens: the time now, and events until the daemon ends. EINVAL, EMFILE.

        The connection serves for nothing else from then on; close it to stop.
        """
        request = admin.Trace(list(pids), machine, sorted(only), failed)
        return self._request(request, admin.Tracing).time, self._events()

    def _events(self) -> Iterator[AnyEvent]:
        self._sock.settimeout(None)
        while True:
            *lines, rest = self._received.split(b"\n")
            self._received = rest
            for line in lines:
                yield admin.decode_event(bytes(line))
            data = self._sock.recv(1 << 16)
            if not data:
                return
            self._received += data

    def sanitize(self, machine: str | None = None, *, settle: bool = False) -> list[admin.Findings]:
        """What the sanitizer has found, for each machine; settle: what was not flushed until now never was. ENOENT."""
        return self._request(admin.Sanitize(machine, settle), admin.Sanitized).machines

    def close(self) -> None:
        self._sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def connect(socket_path: str | None, admin_socket: str | None) -> Admin:
    """The admin socket at its own path, or of the daemon at `socket_path`; OSError says which and what to do."""
    path = admin_socket or (socket_path or default_socket_path()) + ".admin"
    try:
        return Admin(path)
    except OSError as error:
        raise OSError(f"no daemon answers at {path}: {error.strerror}; iommufdctl doctor knows more") from None
