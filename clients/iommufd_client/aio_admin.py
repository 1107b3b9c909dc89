"""Room client: the devices of a daemon over Trio, each call its own connection to the admin socket.

    endpoint = Endpoint("vfio0", iommufd)
    data = await endpoint.read(0x1000, 64)

A call that is cancelled closes its connection, and with it the daemon cancels the DMA.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import trio

from iommufd_uapi import admin

from .call import IommufdOSError
from .channel import ProtocolError
from .connection import default_socket_path
from .endpoint import Result, instance_of, requests

if TYPE_CHECKING:
    from typing_extensions import Buffer, Unpack

    from .endpoint import How, Op, Opened

R = TypeVar("R", bound=admin.Reply)


class Endpoint:
    """One device; iommufd_client.endpoint.Endpoint says what the arguments mean. Tasks may share it."""

    def __init__(self, device: str, instance: str | Opened = "", socket_path: str | None = None) -> None:
        """`socket_path`: the admin socket, by default that of the open /dev/iommu, or the daemon's."""
        self.device = device
        self.instance = instance_of(instance)
        beside = getattr(instance, "socket_path", None) or default_socket_path()
        self.socket_path = socket_path or f"{beside}.admin"

    async def read(self, iova: int, length: int, **how: Unpack[How]) -> bytes:
        """What the device reads."""
        return await self._run("read", iova, length, b"", how)

    async def write(self, iova: int, data: Buffer, **how: Unpack[How]) -> None:
        """Let it write data."""
        data = bytes(data)
        await self._run("write", iova, len(data), data, how)

    async def fill(self, iova: int, length: int, pattern: Buffer = b"\0", **how: Unpack[How]) -> None:
        """Let it write the pattern again and again."""
        await self._run("fill", iova, length, bytes(pattern), how)

    async def compare(self, iova: int, data: Buffer, **how: Unpack[How]) -> None:
        """Let it read, and complain about the first byte that is not that of data."""
        data = bytes(data)
        await self._run("compare", iova, len(data), data, how)

    async def walk(self, iova: int, *, pasid: int | None = None, write: bool = False) -> admin.Walked:
        """How a request would be translated, and what is cached of it. Nothing happens."""
        request = admin.Walk(self.device, iova, self.instance, pasid, "write" if write else "read")
        async with await trio.open_unix_socket(self.socket_path) as stream:
            return await _ask(stream, request, admin.Walked)

    async def _run(self, op: Op, iova: int, length: int, data: bytes, how: How) -> bytes:
        result = Result(self.device)
        async with await trio.open_unix_socket(self.socket_path) as stream:
            for request in requests(self.device, self.instance, op, iova, length, data, how):
                result.add(await _ask(stream, request, admin.Moved))
        return b"".join(result.data)


async def _ask(stream: trio.SocketStream, request: admin.Request, expected: type[R]) -> R:
    await stream.send_all(admin.encode(request))
    received = bytearray()
    while not received.endswith(b"\n"):
        data = await stream.receive_some(1 << 20)
        if not data:
            raise ConnectionResetError("the daemon closed the admin socket")
        received += data
    reply = admin.decode_reply(bytes(received))
    if isinstance(reply, admin.Error):
        raise IommufdOSError(reply.errno, reply.reason)
    if not isinstance(reply, expected):
        raise ProtocolError(f"a {type(reply).__name__} instead of a {expected.__name__}")
    return reply
