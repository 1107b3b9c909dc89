"""Room client: a private daemon for tests and demonstrations, as a child process."""

from __future__ import annotations

import os
import select
import shutil
import socket
import subprocess
import sys
import tempfile
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from .admin import Admin
    from .iommufd import Iommufd

START_TIMEOUT = 30.0
STOP_TIMEOUT = 10.0


class DaemonError(RuntimeError):
    """The daemon did not start or did not stop; the message has its log."""


class Daemon:
    """`iommufdd` on a socket in a temporary directory, ready as soon as the block is entered.

        with Daemon() as daemon, daemon.open() as iommufd:
            iommufd.ioas_alloc()

    It ends with the block, and also when this process is killed: it runs with --terminate, and we are its
    last client. With `terminate=False` it has no client of ours and stays until the end of the block.
    """

    def __init__(self, *options: str, terminate: bool = True, python: str = sys.executable) -> None:
        self.options = options
        self.terminate = terminate
        self.python = python
        self.directory = ""
        self._process: subprocess.Popen[bytes] | None = None
        self._keeper: Iommufd | None = None
        self._ready: socket.socket | None = None  # where it says that it listens

    @property
    def socket_path(self) -> str:
        return os.path.join(self.directory, "iommufdd.sock")

    @property
    def admin_path(self) -> str:
        return self.socket_path + ".admin"

    @property
    def pid(self) -> int:
        """RuntimeError unless it runs."""
        if self._process is None:
            raise RuntimeError("the daemon is not running")
        return self._process.pid

    @property
    def log(self) -> str:
        """What it has written so far; still there after it has ended."""
        if not self.directory:
            return self._last_words
        with open(os.path.join(self.directory, "log"), encoding="utf-8", errors="replace") as file:
            return file.read()

    _last_words = ""

    def start(self) -> Self:
        """Start it and wait until it listens. DaemonError."""
        self.directory = tempfile.mkdtemp(prefix="iommufdd-")
        try:
            self._start()
            if self.terminate:
                self._keeper = self.open()
        except BaseException:
            self.stop()
            raise
        return self

    def _start(self) -> None:
        self._ready = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._ready.bind(os.path.join(self.directory, "notify"))
        with open(os.path.join(self.directory, "log"), "wb") as log:
            self._process = subprocess.Popen(
                self._command(), stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self._environment()
            )
        exited = os.pidfd_open(self._process.pid)
        try:
            seen, _, _ = select.select([self._ready.fileno(), exited], [], [], START_TIMEOUT)
        finally:
            os.close(exited)
        if self._ready.fileno() not in seen:
            why = f"exited with {self._process.wait()}" if seen else f"is not ready after {START_TIMEOUT:g} s"
            raise DaemonError(f"iommufdd {why}\n{self.log}")

    def _command(self) -> list[str]:
        command = [self.python, "-m", "iommufdd.cli", "--socket-path", self.socket_path]
        return [*command, *(["--terminate"] if self.terminate else []), *self.options]

    def _environment(self) -> dict[str, str]:
        """Ours, with the packages where we have found them, and nothing of a service manager's."""
        environment = {name: text for name, text in os.environ.items() if not name.startswith("LISTEN_")}
        environment["NOTIFY_SOCKET"] = os.path.join(self.directory, "notify")
        environment["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
        return environment

    def open(self, *, machine: str = "", explain: bool = True) -> Iommufd:
        """A new /dev/iommu, by default on a machine of its own."""
        from .iommufd import Iommufd

        return Iommufd(self.socket_path, machine=machine, explain=explain)

    def admin(self) -> Admin:
        """A connection to its admin socket."""
        from .admin import Admin

        return Admin(self.admin_path)

    def stop(self) -> int:
        """End it with SIGTERM, or by force if it does not react; its exit status. DaemonError by force."""
        status, forced = 0, False
        if self._process is not None:
            self._process.terminate()  # before the keeper goes: on its way out it no longer expects signals
            try:
                status = self._process.wait(STOP_TIMEOUT)
            except subprocess.TimeoutExpired:
                self._process.kill()
                status, forced = self._process.wait(), True
        if self._keeper is not None:
            self._keeper.close()
        if self._ready is not None:
            self._ready.close()
        self._last_words = self.log
        shutil.rmtree(self.directory, ignore_errors=True)
        self.directory, self._process, self._keeper, self._ready = "", None, None, None
        if forced:
            raise DaemonError(f"iommufdd did not stop within {STOP_TIMEOUT:g} s\n{self._last_words}")
        return status

    def wait(self, timeout: float = STOP_TIMEOUT) -> int:
        """Wait until it ends by itself; its exit status. subprocess.TimeoutExpired."""
        if self._process is None:
            raise RuntimeError("the daemon is not running")
        return self._process.wait(timeout)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.stop()
