"""Runs one program of the suite under `iommufdctl run`, or bare, and times its tests by the arrival of their lines."""

from __future__ import annotations

import os
import re
import selectors
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from .say import CannotError, note, progress
from .tap import Parser

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from .tap import Result

# Root of a machine of its own: in a container root often lacks some of it, and CI may be anybody.
CALLER = "uid=0,gid=0,caps=ipc_lock+sys_rawio+sys_resource,memlock=8388608"
UNDER_RUN = (sys.executable, "-m", "iommufd_client.cli", "run", "--proc", "--caller", CALLER)
ACTIONS = Path("/proc/sys/kernel/seccomp/actions_avail")
NO_RUN = re.compile(r"^iommufdctl: (no seccomp listener|not made for)")  # how `run` says that this host cannot
GRACE = 5.0  # seconds: for the last output, and between SIGTERM and SIGKILL


class Outcome(NamedTuple):
    """One run of one program."""

    program: str
    status: int
    planned: int | None  # None: the harness never began
    tests: tuple[Result, ...]
    remarks: tuple[str, ...]  # what was printed outside of any test, without the harness's own counts
    seconds: float
    timed_out: bool


def require_seccomp() -> None:
    try:
        actions = ACTIONS.read_text("ascii").split()
    except OSError:
        actions = []
    if "user_notif" not in actions:
        raise CannotError("this kernel has no seccomp user notification (Linux 5.0, CONFIG_SECCOMP_FILTER)")


def run(program: Path, *, prefix: Sequence[str], only: Sequence[str], limit: float, echo: bool, label: str) -> Outcome:
    """The program to its end, or to the limit in seconds; afterwards nothing that it started is left."""
    command = [*prefix, str(program), *(word for name in only for word in ("-r", name))]
    environment = {name: value for name, value in os.environ.items() if name != "KSFT_TAP_LEVEL"}
    parser = Parser()
    start = time.monotonic()
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment | {"NO_COLOR": "1"},
        start_new_session=True,
    ) as process:
        try:
            for line in _lines(process, start + limit):
                parser.feed(line, time.monotonic())
                if echo:
                    note(line)
                progress(f"{label} {program.name}: {len(parser.tests)}/{parser.planned or '?'} {parser.running or ''}")
            timed_out = process.poll() is None and time.monotonic() >= start + limit
        finally:
            _end(process)
    seconds = time.monotonic() - start
    parser.end(time.monotonic())
    progress("")
    remarks = tuple(parser.remarks())
    tests = tuple(parser.tests)
    outcome = Outcome(program.name, process.returncode, parser.planned, tests, remarks, seconds, timed_out)
    _cannot(outcome)
    return outcome


def _cannot(outcome: Outcome) -> None:
    for line in outcome.remarks:
        if outcome.planned is None and NO_RUN.search(line):
            raise CannotError(line.removeprefix("iommufdctl: "))


def _lines(process: subprocess.Popen[bytes], deadline: float) -> Iterator[str]:
    """As they come, until the end of the output, or GRACE after the process's, or the deadline."""
    assert process.stdout is not None
    rest = b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while time.monotonic() < deadline:
            if not selector.select(min(1.0, max(0.0, deadline - time.monotonic()))):
                if process.poll() is not None:  # something that outlived it holds the pipe
                    deadline = min(deadline, time.monotonic() + GRACE)
                continue
            chunk = os.read(process.stdout.fileno(), 1 << 16)
            if not chunk:
                break
            *whole, rest = (rest + chunk).split(b"\n")
            yield from (line.decode("utf-8", "replace") for line in whole)
    if rest:
        yield rest.decode("utf-8", "replace")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends what runs in the session of the process: the harness gives each test a process group of its own."""
    try:
        process.wait(0.5)
    except subprocess.TimeoutExpired:
        process.terminate()
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
    end = time.monotonic() + GRACE
    while (left := _session(process.pid)) and time.monotonic() < end:
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        time.sleep(0.01)


def _session(leader: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != leader:
            try:
                if os.getsid(int(entry.name)) == leader:
                    found.append(int(entry.name))
            except (ProcessLookupError, PermissionError):
                pass
    return found
