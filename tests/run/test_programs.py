"""The recorded ioctl programs through a C program, static and dynamic, under `run`: identical to a real kernel's.

Ways to a /dev/iommu that differ little from one that replays all are content with some; IOMMUFDD_ALL_PROGRAMS=1 in the
environment makes them replay all too.
"""

from __future__ import annotations

import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from tests.conformance.run import DEFAULTS, differences, find_programs

if TYPE_CHECKING:
    from iommufd_client.testing import Daemon

    from .conftest import Run

EXEMPT = {"e09_fork": "private memory of a process that has ended is read: it went with the process"}
HUGE_PAGES = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")
ENOUGH = 32  # for the programs that run at the same time
ALL = os.environ.get("IOMMUFDD_ALL_PROGRAMS") == "1"
ANSWER = re.compile(r"\d+ (\w+)(?: \S+ ([0-9a-f]+) rc=)?.*? e=(\w+)(?: out=.{8}(.{8}))?")
CALLER = "caps=ipc_lock+sys_rawio+sys_resource"  # root's of the machine that recorded


def programs() -> list[Path]:
    """All that can be the same on this host."""
    huge = HUGE_PAGES.exists() and int(HUGE_PAGES.read_text()) >= ENOUGH
    found = [path for path in find_programs(DEFAULTS) if path.stem not in EXEMPT]
    return [path for path in found if huge or "huge" not in path.read_text("latin-1")]


def some(paths: list[Path]) -> list[Path]:
    """Few programs, in which every call (ioctl, test operation) gets every errno that it gets in any of them."""
    if ALL:
        return paths
    answers = {path: _answers(path) for path in paths}
    left = set().union(*answers.values())
    chosen = []
    while left:
        chosen.append(max(paths, key=lambda path: len(answers[path] & left)))
        left -= answers[chosen[-1]]
    return chosen


def _answers(path: Path) -> set[tuple[str, ...]]:
    """What its recording has."""
    lines = path.with_suffix(".out").read_text("latin-1").splitlines()
    # call, ioctl, errno, test operation
    found = [match.groups("") for match in map(ANSWER.match, lines) if match]
    return {(call, cmd, error, op if cmd == "a0" else "") for call, cmd, error, op in found}


def test_the_answers_are_those_of_a_real_kernel(run: Run, compiled: Path, daemon: Daemon) -> None:
    check(run, compiled, daemon, programs())


def check(run: Run, compiled: Path, daemon: Daemon, paths: list[Path]) -> None:
    # Numbers from 3 on, as the kernel gives them: some programs print theirs.
    options = ("--socket-path", daemon.socket_path, "--fd-base", "3", "--caller", CALLER)

    def different(path: Path) -> list[str]:
        result = run(*options, "--", compiled / "ioctlrun", stdin=path)
        found = [f"{path.stem}: {each}" for each in differences(path, result.stdout)]
        return [f"{path.stem}: {result.stderr}", *found] if result.stderr else found

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        problems = [line for lines in pool.map(different, paths) for line in lines]
    assert not problems, "\n".join(problems[:20])
    assert not daemon.log.count("event=bug")
