"""The two ends of a measurement over the socket: pinned daemons, a client in C, packets made beforehand."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Self

from iommufd_client.testing import Daemon
from iommufd_uapi import iommufd as uapi
from iommufd_uapi import wire

from .measure import Unavailable, client_cpu

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from iommufd_uapi.layout import Ioctl

STRUCT_ADDR = 0x1000
STRETCHES = 250


def option_get() -> uapi.Option:
    """The cheapest ioctl that succeeds and answers something: IOMMU_OPTION GET of RLIMIT_MODE."""
    return uapi.Option(option_id=uapi.IOMMU_OPTION_RLIMIT_MODE, op=uapi.IOMMU_OPTION_OP_GET)


OPTION_REPLY = wire.REPLY_RECORD.size + 8  # val64 comes back


def request(struct: Ioctl) -> bytes:
    """The request of an ioctl whose struct is all there is to it."""
    data = struct.pack()
    length = wire.CALL.size + wire.padded(len(data))
    size = len(data)
    head = wire.CALL.pack(length, wire.Op.IOCTL, 0, 1, struct.CMD, 0, STRUCT_ADDR, size, size, size, 0)
    return head + data + wire.PADDING[size & 7]


@contextmanager
def daemon(cpu: int, *options: str) -> Iterator[Daemon]:
    """A daemon that runs on this CPU alone."""
    with Daemon(*options, terminate=False) as started:
        os.sched_setaffinity(started.pid, {cpu})
        yield started


class Raw:
    """A channel that sends packets as they are."""

    def __init__(self, path: str) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.buffer = bytearray(wire.MAX_PACKET)
        self.sock.connect(path)
        self.trip(wire.Hello().pack())

    def trip(self, packet: bytes) -> int:
        """Send a packet and receive the answer, without descriptors; its length."""
        self.sock.send(packet)
        return self.sock.recv_into(self.buffer)

    def results(self, length: int) -> list[int]:
        """The results in the last answer."""
        found, at = [], 0
        while at < length:
            reply = wire.ReplyHeader.unpack(self.buffer, at)
            found.append(reply.result)
            at += reply.length
        return found

    def close(self) -> None:
        self.sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Pinger:
    """pingpong.c, compiled."""

    def __init__(self, directory: str) -> None:
        compiler = shutil.which("cc") or shutil.which("gcc")
        if compiler is None:
            raise Unavailable("it needs a C compiler, cc or gcc")
        self._program = os.path.join(directory, "pingpong")
        source = Path(__file__).with_name("pingpong.c")
        subprocess.run([compiler, "-O2", "-Wall", "-o", self._program, source], check=True)

    def pair(self, peer_cpu: int, count: int) -> Callable[[], float]:
        """C to C, with packets as long as those of option_get()."""
        sizes = len(request(option_get())), OPTION_REPLY
        return lambda: self._run("pair", client_cpu(), peer_cpu, count, *sizes)

    def call(self, path: str, count: int) -> Callable[[], float]:
        """C to a daemon: option_get(), over and over."""
        hello = wire.Hello().pack()
        packets = hello + request(option_get())
        return lambda: self._run("call", client_cpu(), count, path, len(hello), OPTION_REPLY, data=packets)

    def _run(self, *args: object, data: bytes = b"") -> float:
        command = [self._program, *map(str, args)]
        done = subprocess.run(command, input=data, stdout=subprocess.PIPE, check=True)
        return float(done.stdout) / 1e9


@contextmanager
def pinger() -> Iterator[Pinger]:
    """Unavailable without a C compiler."""
    with tempfile.TemporaryDirectory(prefix="iommufdd-bench-") as directory:
        yield Pinger(directory)


def timed(work: Callable[[], object], count: int) -> float:
    """Seconds for one of `count` calls: the median of short stretches, as pingpong.c has it."""
    stretch = max(count // STRETCHES, 1)
    times = []
    for _ in range(0, count, stretch):
        start = time.perf_counter()
        for _ in range(stretch):
            work()
        times.append((time.perf_counter() - start) / stretch)
    return median(times)


def cpu_time(daemon: int) -> float:
    """CPU seconds that this thread and a daemon have had: what a call costs where both share a CPU with others."""
    return time.thread_time() + time.clock_gettime(~daemon << 3 | 2)  # clock_getcpuclockid(3)


def check(results: Sequence[object]) -> None:
    """All must be 0: what fails is not worth timing."""
    for result in results:
        if result != 0:
            raise AssertionError(f"an ioctl that is measured answered {result!r}")
