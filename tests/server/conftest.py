"""Fixtures: a real daemon as a child process, and a server in this process that moves when it is told to."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import pytest

from iommufd_uapi import admin
from iommufdd.description import MachineDescription
from iommufdd.machine import Machine
from iommufdd.server.listener import adopt
from iommufdd.server.serve import Server
from iommufdd.wiring import new_machine
from tests.server.peer import Peer

START_TIMEOUT = 60.0  # a noisy machine with two CPUs
STOP_TIMEOUT = 30.0


class Admin:
    """A connection to the admin socket."""

    def __init__(self, path: str) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(START_TIMEOUT)
        self.sock.connect(path)
        self.file = self.sock.makefile("rwb")

    def ask(self, request: admin.Request) -> admin.AnyReply:
        self.file.write(admin.encode(request))
        self.file.flush()
        return admin.decode_reply(self.file.readline())

    def stats(self) -> admin.Counts:
        reply = self.ask(admin.Stats(classes=True))
        assert isinstance(reply, admin.Counts)
        return reply

    def close(self) -> None:
        self.file.close()
        self.sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Daemon:
    """`iommufdd` as a child: started, told to stop, or found dead."""

    def __init__(self, directory: Path, *options: str, wrapper: tuple[str, ...] = (), **popen: Any) -> None:
        self.path = str(directory / "iommufdd.sock")
        self.ready = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.ready.settimeout(START_TIMEOUT)
        self.ready.bind(str(directory / "notify"))
        self.stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed by forget()
        self.peers: list[Peer] = []
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        environment |= {"NOTIFY_SOCKET": str(directory / "notify")} | popen.pop("env", {})
        command = [sys.executable, "-m", "iommufdd.cli", *options]
        self.process = subprocess.Popen([*wrapper, *command], env=environment, stderr=self.stderr, **popen)

    @property
    def pid(self) -> int:
        return self.process.pid

    def wait_ready(self) -> str:
        """The first word to the service manager."""
        try:
            return self.ready.recv(4096).decode()
        except TimeoutError:
            pytest.fail(f"the daemon did not start: {self.log()}")

    def log(self) -> str:
        self.stderr.seek(0)
        return self.stderr.read().decode()

    def admin(self) -> Admin:
        return Admin(self.path + ".admin")

    def connect(self, path: str | socket.socket = "", **options: Any) -> Peer:
        """A peer, closed when the daemon is stopped."""
        peer = Peer(path or self.path, **options)
        self.peers.append(peer)
        return peer

    def forget(self) -> None:
        """Close what tests have left open."""
        for peer in self.peers:
            peer.close()
        self.ready.close()
        self.stderr.close()

    def stop(self, how: int = signal.SIGTERM) -> int:
        """Its exit status; ends only this process, by its pid."""
        if self.process.poll() is None:
            self.process.send_signal(how)
        try:
            return self.process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise


Start = Callable[..., Daemon]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start daemons with options; all are stopped at the end, and none may have met a bug."""
    daemons: list[Daemon] = []

    def start_one(*options: str, socket_path: bool = True, wait: bool = True, **popen: Any) -> Daemon:
        directory = Path(tempfile.mkdtemp(dir=tmp_path))
        path = ("--socket-path", str(directory / "iommufdd.sock")) if socket_path else ()
        daemon = Daemon(directory, *path, *options, **popen)
        daemons.append(daemon)
        if wait:
            assert daemon.wait_ready().startswith("READY=1")
        return daemon

    yield start_one
    for daemon in daemons:
        daemon.stop()
        text = daemon.log()
        daemon.forget()
        assert "Traceback" not in text
        assert "event=bug" not in text


@pytest.fixture
def daemon(start: Start) -> Daemon:
    """A running daemon."""
    return start()


class Local:
    """A server in this process. `pump()` lets it handle all that is ready; nothing happens in between."""

    def __init__(self, factory: Callable[[str, MachineDescription], Machine] = new_machine, **options: Any) -> None:
        self.server = Server(factory, linger=0.0, **options)
        self.peers: list[LocalPeer] = []

    def pump(self) -> None:
        while self.server.reactor.step() or self.server.reactor.work():
            pass

    def connect(self, **options: Any) -> LocalPeer:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        adopt(self.server, theirs)
        ours.setblocking(False)
        peer = LocalPeer(self, ours, **options)
        self.peers.append(peer)
        return peer

    def close(self) -> None:
        for peer in self.peers:
            peer.close()
        self.pump()
        left = [*self.server.channels, *self.server.instances.contexts, *self.server.instances.devices]
        self.server.close()
        assert not left


class LocalPeer(Peer):
    """A peer that makes its server work before it receives."""

    def __init__(self, local: Local, ours: socket.socket, **options: Any) -> None:
        self.local = local
        super().__init__(ours, **options)

    def receive(self) -> tuple[bytes, list[int]]:
        self.local.pump()
        return super().receive()

    def close(self) -> None:
        super().close()
        self.local.pump()


@pytest.fixture
def local() -> Iterator[Local]:
    """A server in this process; at the end everything must be gone, but for files a test has kept."""
    before = len(os.listdir("/proc/self/fd"))
    made = Local(nofile=4096)
    yield made
    made.close()
    assert len(os.listdir("/proc/self/fd")) == before


def eventually(check: Callable[[], bool], timeout: float = START_TIMEOUT) -> None:
    """Wait for something another process does."""
    until = time.monotonic() + timeout
    while not check():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.01)
