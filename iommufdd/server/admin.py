"""The admin plane: JSON lines on its own socket (iommufd_uapi.admin), in Trio tasks beside the reactor."""

from __future__ import annotations

import errno
import math
import os
import socket
from typing import TYPE_CHECKING, TypeAlias

import msgspec
import trio

from iommufd_uapi import admin
from iommufd_uapi.events import KINDS, Filter
from iommufdd.errors import EINVAL, IommufdError

from . import log
from .census import counts, tree
from .credentials import parse_caps, peer_of, set_capabilities
from .endpoints import transfer, walk

if TYPE_CHECKING:
    from .channel import Channel
    from .serve import Server

Immediate: TypeAlias = (
    admin.Show | admin.Stats | admin.Credentials | admin.Fault | admin.Walk | admin.Trace | admin.Sanitize
)
MAX_CLIENTS = 16
RECEIVE = 1 << 17  # bytes at a time
PATIENCE = 60.0  # seconds for one request to come, and for its reply to be read


async def serve_admin(server: Server, sock: socket.socket) -> None:
    """Accept on a listening socket until cancelled."""
    sock.setblocking(False)
    listener = trio.SocketListener(trio.socket.from_stdlib_socket(sock))
    limit = trio.CapacityLimiter(MAX_CLIENTS)

    async def serve_client(stream: trio.SocketStream) -> None:
        try:
            limit.acquire_on_behalf_of_nowait(stream)
        except trio.WouldBlock:
            await stream.aclose()
            return
        try:
            with trio.move_on_after(PATIENCE) as scope:
                await _converse(server, stream, scope)
        except trio.BrokenResourceError:
            pass
        finally:
            limit.release_on_behalf_of(stream)
            await trio.aclose_forcefully(stream)

    await trio.serve_listeners(serve_client, [listener])


async def _converse(server: Server, stream: trio.SocketStream, scope: trio.CancelScope) -> None:
    buffered = bytearray()
    seen = 0  # bytes without a newline
    while True:
        end = buffered.find(b"\n", seen)
        if end >= 0:
            line = bytes(buffered[:end])
            del buffered[: end + 1]
            seen = 0
            scope.deadline = math.inf  # a DMA waits as long as it likes
            reply = await respond(server, stream.socket.fileno(), line)
            if isinstance(reply, admin.Tracing):
                refused = _follow(server, stream.socket.fileno(), line, reply)
                if refused is None:
                    return
                reply = refused
            scope.deadline = trio.current_time() + PATIENCE
            await stream.send_all(admin.encode(reply))
            scope.deadline = trio.current_time() + PATIENCE
        elif len(buffered) > admin.MAX_LINE or not (more := await stream.receive_some(RECEIVE)):
            return
        else:
            seen = len(buffered)
            buffered += more


async def respond(server: Server, fd: int, line: bytes) -> admin.Reply:
    """The reply to one request; whatever was closed until now is closed first. fd: of whoever asks."""
    server.reactor.hang_ups()
    try:
        request = admin.decode_request(line)
        return await transfer(server, fd, request) if isinstance(request, admin.Dma) else _answer(server, fd, request)
    except (msgspec.DecodeError, UnicodeDecodeError, ValueError) as error:
        return admin.Error(errno.EINVAL, str(error))
    except RecursionError:
        return admin.Error(errno.EINVAL, "nested too deep")
    except IommufdError as error:
        return admin.Error(error.errno, error.reason)
    except OSError as error:
        return _without_resources(error)
    except Exception as error:
        log.bug(error)
        return admin.Error(errno.EIO, "a bug in the daemon; its log has the traceback")


def _answer(server: Server, fd: int, request: Immediate) -> admin.Reply:
    match request:
        case admin.Show():
            return tree(server)
        case admin.Stats():
            return counts(server, classes=request.classes)
        case admin.Credentials():
            return _credentials(server, request)
        case admin.Fault():
            return _fault(server, request)
        case admin.Walk():
            return walk(server, request)
        case admin.Trace():
            return _trace(server, fd, request)
        case admin.Sanitize():
            from .sanitize import findings

            return findings(server, request)


def _channels(server: Server, mm: int) -> list[Channel]:
    space = server.spaces.by_token.get(mm)
    return [] if space is None else list(space.channels)


def _credentials(server: Server, request: admin.Credentials) -> admin.Reply:
    if not server.virtual_caller:
        return admin.Error(errno.EPERM, "the daemon was started without --virtual-caller")
    for name, value, end in (("uid", request.uid, 1 << 32), ("memlock", request.memlock, 1 << 64)):
        if value is not None and not 0 <= value < end:
            raise EINVAL(f"{name} {value} is not within 0 to {end - 1}")
    caps = None if request.caps is None else parse_caps("+".join(request.caps))
    channels = _channels(server, request.mm)
    for channel in channels:
        task = channel.caller.task
        if request.uid is not None:
            task.user = channel.opened.instance.machine.user(request.uid)
        if caps is not None:
            set_capabilities(task, caps)
        if request.memlock is not None:
            task.memlock = request.memlock
    return admin.Done(len(channels))


def _fault(server: Server, request: admin.Fault) -> admin.Reply:
    if request.nth is not None and not 0 <= request.nth < 1 << 32:
        raise EINVAL(f"the n of fail-nth is {request.nth}, not within 32 bits")
    gates = [channel.caller.gate for channel in _channels(server, request.mm)]
    if request.nth is not None:
        for gate in gates:
            gate.arm(request.nth)
    return admin.Gates([admin.Gate(gate.nth, gate.fired.name if gate.fired else None) for gate in gates])


def _trace(server: Server, fd: int, request: admin.Trace) -> admin.Reply:
    from .trace import now

    if unknown := sorted(set(request.only) - KINDS.keys()):
        raise EINVAL(f"{unknown[0]!r} is not one of {', '.join(KINDS)}")
    server.trace.check(_uid(fd))
    return admin.Tracing(now())


def _follow(server: Server, fd: int, line: bytes, reply: admin.Tracing) -> admin.Error | None:
    """From here on the connection is the reactor's: no task has to wait for a reader that does not read."""
    from .trace import Reader

    request = admin.decode_request(line)
    assert isinstance(request, admin.Trace)
    chosen = Filter(frozenset(request.pids), request.machine, frozenset(request.only), request.failed)
    try:
        sock = socket.socket(fileno=os.dup(fd))
        try:
            Reader(server.trace, server.reactor, sock, lambda event, _: chosen(event), admin.encode, uid=_uid(fd),
                   first=admin.encode(reply))  # fmt: skip
        except BaseException:
            sock.close()
            raise
    except IommufdError as error:
        return admin.Error(error.errno, error.reason)
    except OSError as error:
        return _without_resources(error)
    return None


def _without_resources(error: OSError) -> admin.Error:
    """The kernel refuses the daemon something: a descriptor, a watch. Anything else is a bug."""
    if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.ENOMEM):
        log.bug(error)
    return admin.Error(error.errno or errno.EIO, f"the daemon cannot: {error.strerror}")


def _uid(fd: int) -> int:
    """Who asks."""
    with socket.socket(fileno=os.dup(fd)) as sock:
        return peer_of(sock).uid
