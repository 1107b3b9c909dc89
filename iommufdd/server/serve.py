"""The running daemon: everything that is open, and the task that serves it until it is told to stop."""

from __future__ import annotations

import os
import signal
import socket
from logging import INFO
from typing import TYPE_CHECKING

import trio

from iommufd_uapi.wire import MAX_PACKET
from iommufdd.machine_file import Machines

from . import credentials, log
from .files import Pipes
from .instance import AddressSpaces, Instances
from .listener import Listener, SocketFile, adopt, is_listening, notify
from .memory import PageFiles
from .nofile import Nofile
from .packet import TAIL
from .polling import Poller
from .pump import PATIENCE, Pump
from .reactor import Reactor

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from iommufdd.description import MachineDescription
    from iommufdd.machine import Machine
    from iommufdd.user import Task

    from .channel import Channel
    from .fuse.session import Session
    from .sanitize import Sanitize
    from .seccomp.fds import Watch
    from .seccomp.notify import Supervisor
    from .trace import Trace

LINGER = 0.001  # seconds; see Reactor


class Server:
    """All that is open in one daemon. Has no task of its own: `reactor.run()` drives it."""

    def __init__(
        self,
        new_machine: Callable[[str, MachineDescription], Machine],
        *,
        machines: Machines | None = None,
        virtual: credentials.Virtual = credentials.OWN,
        virtual_caller: bool = False,
        linger: float = LINGER,
        spin: float = 0.0,
        nofile: int | None = None,
        patience: float = PATIENCE,
        sanitize: str = "off",
    ) -> None:
        """patience: seconds that devices wait for a page, see Pump. sanitize: off, report, fail (sanitizer.Mode)."""
        self.virtual = virtual
        self.virtual_caller = virtual_caller  # the admin socket may set credentials
        self.nofile = Nofile(nofile)
        self.page_files = PageFiles(self.nofile)
        self.pipes = Pipes(self.nofile)
        self.sanitize: Sanitize | None = None
        if sanitize != "off":
            from .sanitize import Sanitize

            self.sanitize = Sanitize(sanitize)
            new_machine = self.sanitize.watched(new_machine)
        self.instances = Instances(new_machine, machines or Machines(), self.nofile)
        self.spaces = AddressSpaces()
        self.reactor = Reactor(self.pipes, linger, spin)
        self.pump = Pump(self.reactor, lambda: [each.machine.dma for each in self.instances], patience)
        self.instances.pumping = self.pump
        self.poller = self.instances.polling = Poller()
        self.channels: set[Channel] = set()
        self.supervisors: set[Supervisor | Session] = set()
        self._watch: Watch | None = None
        self._trace: Trace | None = None
        self.listeners: list[Listener] = []
        self.socket_files: list[SocketFile] = []
        self.ratelimit = log.Ratelimit()
        self.idle = trio.Event()  # set when the last channel has closed, anew for each wait
        # What is received lies here; one buffer serves all channels, since each packet is handled at once.
        self.view = memoryview(bytearray(MAX_PACKET + TAIL))
        self.target = (self.view[:MAX_PACKET],)

    def listen(self, sock: socket.socket) -> None:
        """Serve a listening socket, or the one connection that a connected socket is."""
        if is_listening(sock):
            self.listeners.append(Listener(self, sock))
        else:
            adopt(self, sock)

    def task_of(self, channel: Channel, machine: Machine) -> Task:
        """Credentials of a channel's peer."""
        return credentials.task_of(channel.sock, channel.peer, machine, self.virtual)

    def watch(self) -> Watch:
        """The watch over descriptors in traced processes, made when first needed. EMFILE."""
        if self._watch is None:
            from .seccomp.fds import Watch

            self._watch = Watch(self.reactor, self.nofile, self.pipes.closers)
        return self._watch

    @property
    def trace(self) -> Trace:
        """Who follows what happens, made when first needed."""
        if self._trace is None:
            from .trace import Trace

            self._trace = Trace(self.instances)
        return self._trace

    @property
    def alone(self) -> bool:
        """One channel and nothing else to do: no descriptor is out whose end must be seen before its next packet."""
        waited_for = self.pipes.by_key or self.reactor.working or self.poller.watched
        return len(self.channels) == 1 and not waited_for

    def channel_closed(self) -> None:
        """Or a supervisor, or a reader: when there is nobody left to serve, --terminate ends the daemon."""
        ending = self._trace is not None and any(reader.ending for reader in self._trace.readers)
        if not self.channels and not self.supervisors and not ending:
            self.idle.set()

    def close(self) -> None:
        """Stop listening, hang up on everybody, and let go of everything."""
        for file in self.socket_files:
            file.unlink()
        for listener in self.listeners:
            listener.close()
        for channel in list(self.channels):
            channel.close("shutdown")
        for supervisor in list(self.supervisors):
            supervisor.close()
        if self._watch is not None:
            self._watch.close()
        for reader in list(self._trace.readers) if self._trace is not None else ():
            reader.close()
        self.reactor.close()
        self.pipes.close()
        self.page_files.close()


async def run(server: Server, *, admin: socket.socket | None = None, terminate: bool = False) -> None:
    """Serve until SIGTERM or SIGINT; with `terminate`, until the last client has left. Tells systemd."""
    from .admin import serve_admin

    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.reactor.run)
            nursery.start_soon(server.pump.expire)
            nursery.start_soon(server.poller.run)
            if admin is not None:
                nursery.start_soon(serve_admin, server, admin)
            if terminate:
                nursery.start_soon(_stop_when_idle, server, nursery.cancel_scope)
            notify(f"READY=1\nSTATUS=Serving\nMAINPID={os.getpid()}")
            log.event(INFO, "ready", listeners=len(server.listeners))
            nursery.start_soon(_stop_on_signal, signals, nursery.cancel_scope)
    notify("STOPPING=1\nSTATUS=Stopping")
    log.event(INFO, "stopped")


async def _stop_when_idle(server: Server, scope: trio.CancelScope) -> None:
    await server.idle.wait()
    scope.cancel()


async def _stop_on_signal(signals: AsyncIterator[int], scope: trio.CancelScope) -> None:
    async for _ in signals:
        scope.cancel()
