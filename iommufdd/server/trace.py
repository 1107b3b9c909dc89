"""Who follows what happens: each event is decoded once, and kept for every reader until it has read.

Nothing here waits for a reader. One that is slow, or has stopped, loses events and is told how many; one that has
gone is forgotten. While nobody follows, this module is not even imported.
"""

from __future__ import annotations

import contextlib
import select
import socket
import time
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from iommufd_uapi import decode
from iommufd_uapi.events import Event, Filter, Ioctl, Lost, Object, Queue, line
from iommufdd.context import Context
from iommufdd.errors import EMFILE
from iommufdd.event_port import Events
from iommufdd.kvm.dev import KvmFile
from iommufdd.kvm.vm import Vm
from iommufdd.veventq import Veventq
from iommufdd.vfio.device_cdev import VfioDeviceFile

from . import log
from .devices import ServedDevice
from .instance import ServedContext
from .reactor import HUNG_UP
from .segments import SegmentMemory
from .vms import ServedKvm, ServedVm

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeAlias

    from iommufdd.eventq import Eventq
    from iommufdd.machine import Machine
    from iommufdd.objects import IommufdObject
    from iommufdd.user import Caller, File

    from .instance import Instances
    from .reactor import Reactor
    from .serve import Server

    Source: TypeAlias = Context | VfioDeviceFile | KvmFile | Events  # the last: hardware

RING = 4096  # events that a reader may be behind
CHUNK = 64  # events in one send
MAX_READERS = 8  # of one uid
LONGEST_READ = 1024  # bytes of a queue's records that are looked at
COMM_LIFE = 100_000  # us for which the name of a process is believed
MANY_COMMS = 256
IDLE = select.EPOLLRDHUP


def now() -> int:
    """Event.time."""
    return time.monotonic_ns() // 1000


class Entered(NamedTuple):
    """A call in work."""

    time: int
    view: View
    data: bytes
    fields: dict[str, str]
    outer: Caller | None  # whose call was in work when it began


class View:
    """What the decoder sees of a call: the objects as they are, and the caller's memory before or after it."""

    __slots__ = ("_caller", "_file", "after")

    def __init__(self, file: File, caller: Caller) -> None:
        self._file = file
        self._caller = caller
        self.after = False

    def kind(self, object_id: int) -> str:
        ictx = context_of(self._file)
        obj = ictx.objects.get(object_id) if ictx is not None else None
        return obj.type.name.lower() if obj is not None else ""

    def read(self, addr: int, length: int) -> bytes:
        """Nothing where the memory, or the process, is gone."""
        memory = self._caller.memory
        try:
            if self.after and isinstance(memory, SegmentMemory):
                return memory.seen(addr, length)
            return memory.read(addr, length)
        except Exception:  # the call itself will meet it, or has
            return b""


class Trace:
    """The listener of every machine, as long as there are readers."""

    def __init__(self, instances: Instances) -> None:
        self._instances = instances
        self.readers: list[Reader] = []
        self._current: Caller | None = None
        self._comms: dict[int, tuple[int, str]] = {}

    def add(self, reader: Reader) -> None:
        """EMFILE when its uid has too many, or its share of descriptors."""
        self.check(reader.uid)
        self._instances.nofile.charge(reader.uid)
        if not self.readers:
            self._instances.listen(self)
        self.readers.append(reader)

    def check(self, uid: int) -> None:
        """EMFILE when a uid has as many readers as it may have."""
        if sum(reader.uid == uid for reader in self.readers) >= MAX_READERS:
            raise EMFILE(f"{MAX_READERS} readers of uid {uid} follow the trace already")

    def remove(self, reader: Reader) -> None:
        self.readers.remove(reader)
        self._instances.nofile.uncharge(reader.uid)
        if not self.readers:
            self._instances.listen(None)

    # ---- the event port ----

    def enter(self, file: File, caller: Caller, cmd: int, uptr: int) -> Entered:
        outer, self._current = self._current, caller
        view, device = View(file, caller), isinstance(file, VfioDeviceFile)
        data, fields = b"", {}
        if cmd:
            try:
                size = decode.size_of(cmd, device=device)
                data = view.read(uptr, size) if size else b""
                fields = decode.arguments(cmd, uptr, data, view, device=device)
            except Exception as error:
                log.bug(error, cmd=hex(cmd))
        return Entered(now(), view, data, fields, outer)

    def ioctl(self, file: File, caller: Caller, cmd: int, uptr: int, rc: int, entered: object) -> None:
        assert isinstance(entered, Entered)
        assert isinstance(file, Context | VfioDeviceFile | KvmFile)
        until = now()
        view, data, device = entered.view, entered.data, isinstance(file, VfioDeviceFile)
        view.after = True
        try:
            after = view.read(uptr, len(data)) if data else b""
            back = decode.written(cmd, data, after, view, ok=rc >= 0, device=device)
            event = Ioctl(
                context=inode(context_of(file)), name=decode.name_of(cmd, data, device=device), cmd=cmd,
                fields=entered.fields, result=rc, back=back, duration=until - entered.time, reason=_reason(caller),
                device=_device(file),
            )  # fmt: skip
            self._tell(event, file, entered.time)
        except Exception as error:  # the call is done: what goes wrong from here on must not be its answer
            log.bug(error, cmd=hex(cmd))
        self._current = entered.outer

    def transfer(
        self, eventq: Eventq, verb: str, caller: Caller, addr: int, count: int, rc: int, entered: object
    ) -> None:
        assert isinstance(entered, Entered)
        until = now()
        entered.view.after = verb == "read"
        assert eventq.file is not None
        try:
            kind, event_type = eventq.type.name.lower(), eventq.event_type if isinstance(eventq, Veventq) else 0
            data = entered.view.read(addr, min(rc if rc >= 0 else count * (verb == "write"), LONGEST_READ))
            event = Queue(
                context=inode(eventq.file.ictx), op=verb, queue=f"{kind}:{eventq.id}", count=count,
                records=decode.records(kind, event_type, data, entered.view, write=verb == "write"), result=rc,
                duration=until - entered.time, reason=_reason(caller),
            )  # fmt: skip
            self._tell(event, eventq.file.ictx, entered.time)
        except Exception as error:
            log.bug(error)
        self._current = entered.outer

    def object(self, ictx: Context, verb: str, obj: IommufdObject) -> None:
        event = Object(context=inode(ictx), verb=verb, object=f"{obj.type.name.lower()}:{obj.id}")
        self._tell(event, ictx, now())

    def hardware(self, port: Events, event: Event) -> None:
        self._tell(event, port, now())

    def _tell(self, event: Event, source: Source, at: int) -> None:
        event.time = at
        event.machine = source.machine if isinstance(source, Events) else source.machine.name
        if self._current is not None and (pid := self._current.task.pid):
            event.pid, event.comm = pid, self._comm(pid, at)
        for reader in self.readers:
            if reader.wants(event, source):
                reader.put(event)

    def _comm(self, pid: int, at: int) -> str:
        """The name of a process; what it was called when it has ended."""
        read_at, comm = self._comms.get(pid, (-COMM_LIFE, ""))
        if at - read_at < COMM_LIFE:
            return comm
        try:
            with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
                comm = file.read().rstrip("\n")
        except OSError:
            pass
        if len(self._comms) > MANY_COMMS:
            self._comms.clear()
        self._comms[pid] = at, comm
        return comm


def context_of(file: File) -> Context | None:
    """A context itself, or that a VFIO device is bound to."""
    if isinstance(file, VfioDeviceFile):
        return file.iommufd
    return file if isinstance(file, Context) else None


def inode(ictx: Context | None) -> int:
    """By which `show` names a context."""
    return ictx.opened.key[1] if isinstance(ictx, ServedContext) else 0


def _device(file: Context | VfioDeviceFile | KvmFile) -> str:
    """What a call is made on; empty for a context."""
    if isinstance(file, KvmFile):
        return "vm" if isinstance(file, Vm) else "kvm"
    return file.device.dev.name if isinstance(file, VfioDeviceFile) else ""


def _owner(source: Context | VfioDeviceFile | KvmFile) -> object:
    served = ServedContext | ServedDevice | ServedVm | ServedKvm
    return source.opened.owner if isinstance(source, served) else None


def _reason(caller: Caller) -> str:
    return caller.error.reason if caller.error is not None else ""


class Reader:
    """A stream socket on which events leave, in the reactor: at most RING of them wait."""

    def __init__(
        self,
        trace: Trace,
        reactor: Reactor,
        sock: socket.socket,
        wants: Callable[[Event, Source], bool],
        encode: Callable[[Event], bytes],
        *,
        uid: int,
        first: bytes = b"",
        closed: Callable[[], None] | None = None,
    ) -> None:
        """Takes over `sock`. `first` comes before all events; `closed` is called when it is all over. EMFILE."""
        self.wants = wants
        self.uid = uid
        self.ending = False
        self._trace = trace
        self._reactor = reactor
        self._sock = sock
        self._encode = encode
        self._closed = closed
        self._ring: deque[Event] = deque()
        self._lost = 0
        self._unsent = first
        self._armed = bool(first)
        sock.setblocking(False)
        trace.add(self)
        try:
            reactor.register(sock.fileno(), self, IDLE | select.EPOLLOUT * self._armed)
        except OSError:  # fs.epoll.max_user_watches
            trace.remove(self)
            raise

    def put(self, event: Event) -> None:
        """Keep an event until it can be sent; or count it as lost."""
        if len(self._ring) >= RING:
            self._lost += 1
            return
        if self._lost:
            self._note_lost(event.time)
        self._ring.append(event)
        self._arm()

    def end(self) -> None:
        """Nothing more is to come: close when all has been read. A reader that has gone is closed already."""
        if not self.ending and self._sock.fileno() >= 0:
            self.ending = True
            self._arm()

    def ready(self, mask: int) -> None:
        """The socket takes something, or its reader has gone."""
        if mask & HUNG_UP:
            self.close()
            return
        if not self._unsent:
            self._load()
        if self._unsent:
            self._send()
        if not self._unsent and not self._ring and not self._lost and self._sock.fileno() >= 0:
            if self.ending:
                self.close()
                return
            self._armed = False
            self._reactor.modify(self._sock.fileno(), IDLE)

    def close(self) -> None:
        if self._sock.fileno() < 0:
            return
        self._reactor.unregister(self._sock.fileno())
        self._sock.close()
        self._ring.clear()
        self._trace.remove(self)
        if self._closed is not None:
            self._closed()

    def _arm(self) -> None:
        if not self._armed:
            self._armed = True
            self._reactor.modify(self._sock.fileno(), IDLE | select.EPOLLOUT)

    def _load(self) -> None:
        ring = self._ring
        if not ring and self._lost:
            self._note_lost(now())
        self._unsent = b"".join(self._encode(ring.popleft()) for _ in range(min(len(ring), CHUNK)))

    def _send(self) -> None:
        try:
            sent = self._sock.send(self._unsent, socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return
        except OSError:
            self.close()
            return
        self._unsent = self._unsent[sent:]

    def _note_lost(self, at: int) -> None:
        self._ring.append(Lost(count=self._lost, time=at))
        self._lost = 0


def follow_owner(server: Server, machine: Machine, owner: object, uid: int, sock: socket.socket) -> Reader | None:
    """Text for who runs processes: their calls, and the hardware of their machine. None when too many follow."""
    since, usual = now(), Filter()

    def wants(event: Event, source: Source) -> bool:
        mine = source is machine.events if isinstance(source, Events) else _owner(source) is owner
        return mine and usual(event)

    def encode(event: Event) -> bytes:
        return line(event, since).encode() + b"\n"

    try:
        return Reader(server.trace, server.reactor, sock, wants, encode, uid=uid, closed=server.channel_closed)
    except (EMFILE, OSError) as error:
        why = error.reason if isinstance(error, EMFILE) else error.strerror
        with sock, contextlib.suppress(OSError):  # a reader that has gone already
            sock.send(f"no trace: {why}\n".encode(), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        return None
