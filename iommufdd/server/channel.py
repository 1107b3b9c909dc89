"""One connection: packets in, packets out, in turns (docs/PROTOCOL.md). An object in the reactor."""

from __future__ import annotations

import array
import os
import select
import socket
import struct
from logging import DEBUG, ERROR, INFO, WARNING
from typing import TYPE_CHECKING

from iommufd_uapi.wire import MAX_FDS, NONE, PADDING, REPLY_RECORD
from iommufdd.errors import IommufdError, ProtocolError
from iommufdd.user import Caller, FaultGate

from . import log
from .files import Descriptors
from .hello import Refusal, greet
from .instance import OpenContext
from .memory import Scratch
from .operations import OPERATIONS
from .packet import TAIL, parse, reply
from .reactor import HUNG_UP
from .segments import SegmentMemory

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .credentials import Peer
    from .files import Loan, Pipe
    from .fuse.session import Session
    from .instance import AddressSpace
    from .packet import Request
    from .seccomp.notify import Supervisor
    from .segments import Segment
    from .serve import Server
    from .vms import AnyOpened

PACKETS_AFTER_HANG_UP = 32  # a turn, of those still in the queue
PACKETS_ALONE = 16  # a turn of the only channel; others wait that many milliseconds at most
SAY_TIMEOUT = struct.pack("@ll", 0, 200_000)  # struct timeval
ANCILLARY = socket.CMSG_SPACE(MAX_FDS * array.array("i").itemsize)
CUT_OFF = socket.MSG_CTRUNC | socket.MSG_TRUNC
WAIT = 0x4000_0000  # MSG_CMSG_CLOEXEC of include/linux/socket.h; no constant of Python's
DONT_WAIT = WAIT | socket.MSG_DONTWAIT
_reply_record = REPLY_RECORD.pack
NO_FDS: list[int] = []
NO_PIPES: list[Pipe | Loan] = []
FROM_CLIENT = select.EPOLLIN | select.EPOLLRDHUP


class Channel:
    """A connection, and from the hello on a caller on a context or a device.

    A reply that cannot be sent at once is kept, and nothing more is read until it has left.
    """

    opened: AnyOpened
    space: AddressSpace
    files: Descriptors
    caller: Caller

    def __init__(self, server: Server, connection: socket.socket, peer: Peer) -> None:
        self.server = server
        self.sock = connection
        self.peer = peer
        self.fd = connection.fileno()
        self._recvmsg_into, self._send_data = connection.recvmsg_into, connection.send
        # Every call says MSG_DONTWAIT, but the receive of a channel that is alone: that one waits this long.
        connection.setblocking(True)
        linger = max(int(server.reactor.linger * 1e6), 1)  # 0 would be for ever
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", 0, linger))
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, SAY_TIMEOUT)
        self.open = True  # the connection
        self.joined = False  # what is opened
        self.closing = False  # once the reply that is on its way has left
        self.supervisor: Supervisor | Session | None = None  # when the peer is a keeper
        self.memory = SegmentMemory()
        self._heeds = True  # a keeper reads its lines
        self._pending: tuple[bytes, list[int], list[Pipe | Loan]] | None = None
        server.reactor.register(self.fd, self, FROM_CLIENT)
        server.channels.add(self)

    @property
    def waiting(self) -> bool:
        """A reply waits for the peer to read."""
        return self._pending is not None

    def ready(self, mask: int) -> None:
        if self._pending is not None:
            self._send(*self._pending)
        elif mask & HUNG_UP:
            # What the peer sent before it went still counts, and comes before its end.
            for _ in range(PACKETS_AFTER_HANG_UP):
                if not self._turn():
                    break
                self.server.pipes.ready(0)
        elif self._turn() and self.joined and self.server.alone and not self.server.reactor.spin:
            # Nobody else to look after, and epoll costs as much as a receive: wait here, for a while.
            for _ in range(PACKETS_ALONE):
                if not self._turn(WAIT) or not self.server.alone:
                    break

    # ---- joining what is open ----

    def join(self, opened: AnyOpened, space: AddressSpace) -> None:
        """The hello is accepted; the reference of the open file is ours."""
        server = self.server
        self.opened, self.space = opened, space
        space.channels.add(self)
        self.files = Descriptors(opened, self.peer.uid, server.pipes, server.page_files)
        task = server.task_of(self, opened.instance.machine)
        self.caller = Caller(task, space.mm, self.memory, self.files, FaultGate())
        self.joined = True

    def leave(self) -> None:
        """The open file, the address space and the scratch file are this channel's no more."""
        if self.supervisor is not None:
            self.supervisor.detach()
        if not self.joined:
            return
        self.joined = False
        self.use_scratch(None)
        try:
            self.opened.file.put()
        except Exception as error:
            log.bug(error, pid=self.peer.pid, uid=self.peer.uid)
        self.server.spaces.leave(self.space, self)

    def use_scratch(self, fd: int | None) -> None:
        """Take another scratch file, or none; it counts as one descriptor of the peer. EINVAL, EMFILE."""
        nofile, memory = self.server.nofile, self.memory
        fresh = None if fd is None else Scratch(fd)
        if memory.scratch is not None:
            memory.scratch.close()
            memory.scratch = None
            nofile.uncharge(self.peer.uid)
        if fresh is None:
            return
        try:
            nofile.charge(self.peer.uid)
        except IommufdError:
            fresh.close()
            raise
        memory.scratch = fresh

    def close(self, why: str = "", level: int = DEBUG) -> None:
        """Hang up and forget all that only this channel kept."""
        if not self.open:
            return
        self.open = False
        self.server.reactor.unregister(self.fd)
        self.server.channels.discard(self)
        self.sock.close()
        self.server.nofile.uncharge(self.peer.uid)
        if self._pending is not None:
            self._sent(self._pending[2])
            self._pending = None
        self.leave()
        log.event(level, "channel-closed", pid=self.peer.pid, uid=self.peer.uid, why=why or "hang-up")
        self.server.channel_closed()

    # ---- one packet ----

    def _turn(self, how: int = DONT_WAIT) -> bool:
        """Receive and answer one packet; False when there was none, or no more should be received."""
        try:
            size, ancillary, flags, _ = self._recvmsg_into(self.server.target, ANCILLARY, how)
        except BlockingIOError:
            return False
        except OSError as error:
            self.close(os.strerror(error.errno or 0))
            return False
        fds = _descriptors(ancillary) if ancillary else NO_FDS
        try:
            if size and self.joined and not flags & CUT_OFF:
                self._requests(size, fds)
            else:
                self._first(size, flags, fds)
        except ProtocolError as error:
            self._malformed(str(error))
        except Exception as error:
            log.bug(error, pid=self.peer.pid, uid=self.peer.uid)
            self.close("bug", ERROR)  # it costs this channel, and no other
        finally:
            if fds:
                close_all(fds)
        return self.open and self._pending is None

    def _first(self, size: int, flags: int, fds: list[int]) -> None:
        """Anything but a packet of requests: the hello, the end."""
        if flags & CUT_OFF:
            raise ProtocolError("the packet or its descriptors were cut off")
        if not size:
            self.close()
        elif self.supervisor is not None:
            self.supervisor.heard(bytes(self.server.view[:size]), fds)
        else:
            self._hello(bytes(self.server.view[:size]), fds)

    def _hello(self, packet: bytes, fds: list[int]) -> None:
        try:
            answer = greet(self, packet, fds)
        except Refusal as refusal:
            self._send(refusal.answer, NO_FDS, NO_PIPES)
            self.close(refusal.reason, INFO if self.server.ratelimit(self.peer.uid) else 0)
            return
        if self.supervisor is not None:
            self._send(answer, NO_FDS, NO_PIPES)
            return
        machine = self.opened.instance.machine.name
        log.event(DEBUG, "channel-opened", pid=self.peer.pid, uid=self.peer.uid, machine=machine)
        identity = [self.opened.identity] if isinstance(self.opened, OpenContext) else NO_FDS
        self._send(answer, identity, NO_PIPES)

    def _requests(self, size: int, fds: list[int]) -> None:
        requests = parse(self.server.view[: size + TAIL].tobytes(), size, len(fds))
        files = self.files
        files.received = fds
        try:
            data = b"".join(self._run(requests))
            if files.missing >= 0:
                raise ProtocolError(f"descriptor {files.missing} was not sent")
        except Exception:
            self._sent(files.take())
            raise
        finally:
            if fds:
                files.end()  # before the reply leaves: from then on the client's close() can be the last
        if files.outgoing:
            pipes = files.take()
            self._send(data, [pipe.read_fd for pipe in pipes], pipes)
        else:
            self._send(data, NO_FDS, NO_PIPES)

    def _run(self, requests: list[Request]) -> list[bytes]:
        """All requests of a packet, in order; the parts of the reply packet."""
        memory, caller, outgoing = self.memory, self.caller, self.files.outgoing
        ioctl = self.opened.file.ioctl
        parts: list[bytes] = []
        sent = 0
        for op, flags, cmd, arg, segments in requests:
            records = memory.load(segments)
            if op:
                result = self._operate(op, cmd, arg, segments)
            else:
                result = ioctl(caller, cmd, segments[arg][0] if arg != NONE else 0)
            reason = caller.error.reason if flags and result < 0 and caller.error is not None else ""
            if len(records) == 1 and not outgoing and not reason and isinstance(data := records[0][2], bytes):
                index, at, _ = records[0]
                length = len(data)
                parts += (
                    _reply_record(32 + (length + 7 & ~7), result, 1, 0, 0, index, at, length, 1),
                    data,
                    PADDING[length & 7],
                )
                continue
            before, sent = sent, len(outgoing)
            reply(parts, result, segments, records, reason, sent - before)
        caller.error = None  # it keeps the frames of the call alive
        return parts

    def _operate(self, op: int, cmd: int, arg: int, segments: tuple[Segment, ...]) -> int:
        caller = self.caller
        caller.error = None
        try:
            return OPERATIONS[op](self, cmd, arg, segments)
        except IommufdError as error:
            caller.error = error
            return -error.errno

    # ---- sending ----

    def _send(self, data: bytes, fds: list[int], pipes: list[Pipe | Loan]) -> None:
        """Send now, or keep it until the peer has read; then its descriptors are no longer ours."""
        try:
            if fds:
                rights = socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds)
                self.sock.sendmsg((data,), (rights,), socket.MSG_DONTWAIT)
            else:
                self._send_data(data, socket.MSG_DONTWAIT)
        except BlockingIOError:
            if self._pending is None:
                self.server.reactor.modify(self.fd, select.EPOLLOUT)
            self._pending = data, fds, pipes
            return
        except OSError as error:
            self._sent(pipes)
            self._pending = None
            self.close(os.strerror(error.errno or 0))
            return
        if pipes:
            self._sent(pipes)
        if self.closing:
            self.close()
        elif self._pending is not None:
            self._pending = None
            self.server.reactor.modify(self.fd, FROM_CLIENT)

    def say(self, text: str) -> None:
        """A line for a keeper, or several; dropped when it does not read."""
        self._tell(text.encode() + b"\n")

    def verdict(self, status: int) -> None:
        """The keeper's exit status, if nothing else went wrong."""
        self._tell(bytes([0, status]))

    def _tell(self, packet: bytes) -> None:
        try:
            self._send_data(packet, 0 if self._heeds else socket.MSG_DONTWAIT)
        except BlockingIOError:
            self._heeds = False  # it had SAY_TIMEOUT for it; others have waited
        except OSError:
            pass

    def ask(self, data: bytes) -> None:
        """A question to a keeper, which it reads when it can; if it has gone, this channel closes."""
        self._send(data, NO_FDS, NO_PIPES)

    def _sent(self, pipes: list[Pipe | Loan]) -> None:
        for pipe in pipes:
            self.server.pipes.sent(pipe)

    def _malformed(self, why: str) -> None:
        """The peer broke the protocol: hang up, with one line unless there were many."""
        level = WARNING if self.server.ratelimit(self.peer.uid) else 0
        self.close(why, level)


def _descriptors(ancillary: Sequence[tuple[int, int, bytes]]) -> list[int]:
    fds = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return fds.tolist()


def close_all(fds: list[int]) -> None:
    """Close descriptors and forget their numbers."""
    while fds:
        os.close(fds.pop())
