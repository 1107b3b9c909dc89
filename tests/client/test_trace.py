"""`iommufdctl trace`: its lines, its summary, and its ends."""

from __future__ import annotations

import json
import select
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from iommufd_client import DmaError
from iommufd_client.testing import Daemon
from iommufd_client.trace import Summary
from iommufd_uapi import events

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    Start = Callable[..., subprocess.Popen[str]]

PATIENCE = 60.0


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    with Daemon() as daemon:
        yield daemon


@pytest.fixture
def start(daemon: Daemon) -> Iterator[Start]:
    """The command with options, once the daemon has it as a reader."""
    started: list[subprocess.Popen[str]] = []

    def one(*options: str) -> subprocess.Popen[str]:
        words = [sys.executable, "-m", "iommufd_client.cli", "trace", "--socket-path", daemon.socket_path, *options]
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(process)
        return process

    yield one
    for process in started:
        process.kill()
        process.communicate()


def first_line(daemon: Daemon, process: subprocess.Popen[str]) -> str:
    """Calls, until the trace has begun and shows one."""
    assert process.stdout is not None
    poll = select.poll()
    poll.register(process.stdout, select.POLLIN)
    with daemon.open() as iommufd:
        while not poll.poll(20):
            assert process.poll() is None
            with pytest.raises(OSError, match="no object 77"):
                iommufd.destroy(77)
    return process.stdout.readline()


def test_lines_and_the_usual_end(daemon: Daemon, start: Start) -> None:
    process = start()
    line = first_line(daemon, process)
    assert "IOMMU_DESTROY(iommufd:" in line
    assert "{id=77}) = -1 ENOENT (No such file or directory): there is no object 77 <" in line
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, err) == (0, "")


def test_json(daemon: Daemon, start: Start) -> None:
    event = json.loads(first_line(daemon, start("--json", "--failed")))
    assert (event["kind"], event["name"], event["fields"]) == ("ioctl", "IOMMU_DESTROY", {"id": "77"})


def test_the_daemon_ends(daemon: Daemon, start: Start, tmp_path: Path) -> None:
    path = tmp_path / "log"
    shown, written = start("--failed"), start("-o", str(path))
    first_line(daemon, shown)
    with daemon.open() as iommufd:
        while not path.exists() or not path.read_text():
            iommufd.ioas_alloc()
    daemon.stop()
    assert shown.wait(PATIENCE) == written.wait(PATIENCE) == 0
    assert "(iommufd:" in path.read_text()


def test_wrong_words(start: Start) -> None:
    process = start("--only", "ioctl,weather")
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 2
    assert "'weather' is not one of ioctl, queue, dma, fault, invalidate, replace, stale, object" in err


def test_no_daemon(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "iommufd_client.cli", "trace", "--socket-path", str(tmp_path / "none")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 1
    assert done.stderr.startswith(f"iommufdctl: no daemon answers at {tmp_path}/none.admin: ")


def test_the_library_follows(daemon: Daemon) -> None:
    with daemon.admin() as admin, daemon.open() as iommufd:
        since, found = admin.trace(only=["ioctl"])
        iommufd.ioas_alloc()
        event = next(found)
        assert isinstance(event, events.Ioctl)
        assert event.time >= since
        assert event.back == {"out_ioas_id": "ioas:1"}


WORDS = "dma,fault,invalidate,replace"


def work(daemon: Daemon) -> None:
    """A device that is attached, moves bytes, misses, loses what it was attached to, and is attached again."""
    with daemon.open(machine="lab@vtd") as iommufd, iommufd.device("vfio1") as device, daemon.admin() as admin:
        device.bind(iommufd)
        ioas, other = iommufd.ioas_alloc(), iommufd.ioas_alloc()
        endpoint = admin.endpoint("vfio1", iommufd)
        with iommufd.guest_memory(1 << 16) as ram:
            iommufd.ioas_map(ioas, ram, iova=0x10000)
            device.attach(ioas)
            endpoint.write(0x10000, bytes(0x1000))
            with pytest.raises(DmaError):
                endpoint.read(0x9000, 4)
            device.attach(other)


def test_hardware_behind_a_real_daemon(daemon: Daemon) -> None:
    with daemon.admin() as admin:
        _, found = admin.trace(only=WORDS.split(","))
        work(daemon)
        lines: list[str] = []
        while "-> nothing" not in "".join(lines):
            event = next(found)
            lines.append(events.line(event, event.time).split(" ", 1)[1])
    hardware = [line.removeprefix("- [lab] ") for line in lines if line.startswith("- ")]
    assert hardware[:3] == [
        "dma vfio1 write 0x10000+0x1000 = done",
        "fault vfio1 read iova 0x9000: 0x71 a first-stage entry is not present",
        "dma vfio1 read 0x9000+0x4 = fault 0x71: a first-stage entry is not present (stage 1 level 1 address 0x9000)",
    ], "what no call has done is told of no process"
    switches = [line.partition("[lab] ")[2] for line in lines if " replace " in line]
    assert switches == [
        "replace vfio1 pasid 0 nothing -> hwpt_paging:4",
        "replace vfio1 pasid 0 hwpt_paging:4 -> hwpt_paging:5: hitless",
        "replace vfio1 pasid 0 hwpt_paging:5 -> nothing",
    ]
    assert any("[lab] invalidate dmar0 IOTLB PASID (did 2, pasid 0): dropped 1" in line for line in lines)


@pytest.mark.parametrize("word", WORDS.split(","))
def test_only_what_is_asked_for(daemon: Daemon, start: Start, word: str) -> None:
    process = start("--only", word)
    assert process.stdout is not None
    poll = select.poll()
    poll.register(process.stdout, select.POLLIN)
    while not poll.poll(20):
        work(daemon)
    process.send_signal(signal.SIGINT)
    lines, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, err) == (0, "")
    assert lines
    for line in lines.splitlines():
        assert line.partition("[lab] ")[2].startswith(f"{word} "), line


def test_the_summary_of_a_trace() -> None:
    summary = Summary()
    call = events.Ioctl(context=1, name="IOMMU_DESTROY", cmd=1, fields={}, result=0, back={}, duration=30)
    failed = events.Ioctl(context=1, name="IOMMU_DESTROY", cmd=1, fields={}, result=-2, back={}, duration=10)
    read = events.Queue(context=1, op="read", queue="fault:3", count=40, records=[], result=40, duration=60)
    for event in (call, failed, read, events.Dma("vfio0", 0, 0, 1, "read", "fault"), events.Lost(count=5)):
        summary.add(event)
    assert [line.split() for line in summary.text().splitlines()] == [
        ["%", "time", "seconds", "usecs/call", "calls", "errors", "name"],
        ["60.00", "0.000060", "60", "1", "read", "of", "a", "fault"],
        ["40.00", "0.000040", "20", "2", "1", "IOMMU_DESTROY"],
        ["0.00", "0.000000", "0", "1", "1", "dma"],
        ["0.00", "0.000000", "0", "5", "events", "lost"],
        ["100.00", "0.000100", "9", "2", "total"],
    ]
