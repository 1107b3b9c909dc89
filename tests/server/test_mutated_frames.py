"""A hundred thousand mutated packets at a live daemon, from clients that are killed in the middle of it.

After each round the daemon must be what it was: no object, area, pin, descriptor or mapping more, and none of its own
Python objects. All the while another client works, and every answer it gets is right.
"""

from __future__ import annotations

import errno
import os
import random
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

from iommufd_uapi import admin, iommufd, wire
from tests.server.conftest import Daemon, Start, eventually
from tests.server.peer import Peer, Segment, close_all, hello, ioctl, memfd

PACKETS = 100_000
ROUNDS = 3
WORKERS = 3
SEED = 20260101
PAGE = 4096
TIMEOUT = 300.0  # for a round, on a machine that does other things


class Mutators:
    """Processes that mutate; one is killed every now and then, another takes its place."""

    def __init__(self, daemon: Daemon, directory: Path) -> None:
        self.daemon = daemon
        self.rng = random.Random(SEED)
        self.counter = directory / "counter"
        self.counter.write_bytes(bytes(8 * WORKERS))
        self.children: list[subprocess.Popen[bytes]] = []
        self.stderr = (directory / "stderr").open("w+b")
        self.killed = 0

    def count(self) -> int:
        return sum(struct.unpack(f"<{WORKERS}Q", self.counter.read_bytes()))

    def start(self, slot: int) -> subprocess.Popen[bytes]:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        seed = self.rng.randrange(2**32)
        arguments = [self.daemon.path, str(seed), str(self.counter), str(slot)]
        command = [sys.executable, "-m", "tests.server.mutate", *arguments]
        return subprocess.Popen(command, env=environment, stderr=self.stderr)

    def kill(self, child: subprocess.Popen[bytes]) -> None:
        assert child.poll() is None, self.errors()
        child.kill()
        child.wait()
        self.killed += 1

    def round(self, packets: int) -> None:
        """Until so many more packets were answered."""
        target, until = self.count() + packets, time.monotonic() + TIMEOUT
        self.children = [self.start(slot) for slot in range(WORKERS)]
        kill_at = self.count() + packets // 8
        while self.count() < target:
            time.sleep(0.02)
            assert time.monotonic() < until, f"{self.count()} of {target} packets"
            assert all(child.poll() is None for child in self.children), self.errors()
            if self.count() >= kill_at:
                kill_at += packets // 8
                slot = self.rng.randrange(WORKERS)
                self.kill(self.children[slot])
                self.children[slot] = self.start(slot)
        for child in self.children:
            self.kill(child)
        self.children = []

    def errors(self) -> str:
        self.stderr.seek(0)
        return self.stderr.read().decode()

    def close(self) -> None:
        for child in self.children:
            child.kill()
            child.wait()
        self.stderr.close()


class Bystander:
    """A client in a thread that does its work, checks every answer, and cleans up after itself."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.laps = 0
        self.failure: BaseException | None = None
        self._go = threading.Event()
        self._stopped = threading.Event()
        self._end = False
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def run(self) -> None:
        fd = memfd(8 * PAGE)
        try:
            assert self.peer.register(fd, 0x10000, 8 * PAGE) == 0
            while not self._end:
                if self._go.wait(0.05):
                    self.lap()
                else:
                    self._stopped.set()
        except BaseException as failure:
            self.failure = failure
        finally:
            self._stopped.set()
            os.close(fd)

    def lap(self) -> None:
        peer = self.peer
        ioas = peer.ioas()
        assert ioas == 1
        struct = iommufd.IoasMap(flags=7, ioas_id=ioas, user_va=0x10000, length=8 * PAGE, iova=0x4000)
        unmap = iommufd.IoasUnmap(ioas_id=ioas, iova=0x4000, length=8 * PAGE)
        ranges = iommufd.IoasIovaRanges(ioas_id=ioas, num_iovas=1, allowed_iovas=1)
        replies = peer.call(
            ioctl(struct), ioctl(struct), ioctl(ranges, Segment(1, writable=16), flags=wire.Flag.REASON), ioctl(unmap)
        )
        assert [reply.result for reply in replies] == [0, -errno.EEXIST, 0, 0]
        assert peer.destroy(ioas) == 0
        self.laps += 1
        time.sleep(0.005)

    def work(self) -> None:
        self._stopped.clear()
        self._go.set()

    def rest(self) -> None:
        self._go.clear()
        assert self._stopped.wait(60)
        assert self.failure is None

    def close(self) -> None:
        self._end = True
        self.thread.join()


def every_hello(daemon: Daemon) -> None:
    """Each kind, known or not, with descriptors and without; most are refused."""
    fd = memfd(PAGE)
    for kind in range(6):
        for count in range(3):
            peer = Peer(daemon.path, greet=False)
            peer.send(hello(kind=kind), [fd] * count)
            close_all(peer.receive()[1])
            peer.close()
    os.close(fd)


def steady(counts: admin.Counts) -> dict[str, object]:
    """What must be as before: all but the number of turns."""
    return {name: getattr(counts, name) for name in counts.__struct_fields__ if name != "turns"}


def test_mutated_packets(start: Start, tmp_path: Path) -> None:
    daemon = start("--log-level", "warning")
    bystander = Bystander(daemon.connect())
    mutators = Mutators(daemon, tmp_path)
    try:
        with daemon.admin() as teller:
            # What is made or imported once, at its first use, is not a leak.
            every_hello(daemon)
            bystander.work()
            mutators.round(1000)
            bystander.rest()
            eventually(lambda: teller.stats().channels == 1)
            before, laps = teller.stats(), bystander.laps
            for _ in range(ROUNDS):
                bystander.work()
                mutators.round(PACKETS // ROUNDS + 1)
                bystander.rest()
                eventually(lambda: teller.stats().channels == 1)
                after = teller.stats()
                assert steady(after) == steady(before)
            assert mutators.count() >= PACKETS
            assert mutators.killed >= ROUNDS * (WORKERS + 6)
            assert bystander.laps > laps + 100
    finally:
        mutators.close()
        bystander.close()
