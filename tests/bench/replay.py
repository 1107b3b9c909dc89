"""The recorded programs of the conformance tests, in process."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tests.conformance.inprocess import InProcess
from tests.conformance.parse import parse_program
from tests.conformance.run import DEFAULTS, find_programs, run_program

from .measure import MS, Bench, Case, Plan

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@contextmanager
def cases(plan: Plan) -> Iterator[list[Case]]:
    paths = find_programs(DEFAULTS)
    if plan.quick:
        paths = paths[:3]

    def parse(path: Path) -> None:
        parse_program(path.read_text("latin-1"))

    def run(path: Path) -> None:
        run_program(path, InProcess())

    floor = Case(f"parse {len(paths)} programs", "", _over(parse, paths))
    yield [floor, Case("parse and run them", "", _over(run, paths), base=floor)]


def _over(work: Callable[[Path], None], paths: list[Path]) -> Callable[[], float]:
    def run() -> float:
        start = time.thread_time()
        for path in paths:
            work(path)
        return time.thread_time() - start

    return run


BENCH = Bench("replay", "replay of the recorded ioctl programs, in process", MS, "how many times parsing alone", cases)
