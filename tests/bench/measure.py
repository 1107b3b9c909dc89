"""Cases measured side by side: every round runs each case once, so that a noisy minute hits all alike."""

from __future__ import annotations

import enum
import os
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence


class Unavailable(Exception):
    """A bench that cannot run here; one line on why."""


class When(enum.Enum):
    """The rounds in which a case runs."""

    EVERY = enum.auto()
    FIRST = enum.auto()
    LAST = enum.auto()


class Aim(NamedTuple):
    """A figure to reach: a ratio to stay below, or so many operations a second."""

    ratio: float | None = None
    rate: float | None = None


class Case(NamedTuple):
    """One thing to measure: a cell of the table."""

    row: str
    column: str
    run: Callable[[], float]  # does one round's worth of work; seconds for one operation
    group: str = ""
    base: Case | None = None  # what the ratio is to; of an earlier position in the list
    aim: Aim | None = None
    when: When = When.EVERY

    @property
    def key(self) -> tuple[str, str, str]:
        return self.group, self.row, self.column


class Unit(NamedTuple):
    """How seconds for one operation are shown."""

    name: str
    scale: float
    rate: bool = False

    def of(self, seconds: float) -> float:
        return self.scale / seconds if self.rate else seconds * self.scale


US = Unit("us", 1e6)
MS = Unit("ms", 1e3)
PER_SECOND = Unit("/s", 1.0, rate=True)


@dataclass
class Figure:
    """What a case gave: seconds for one operation, round by round."""

    group: str
    row: str
    column: str
    base: Figure | None
    aim: Aim | None
    samples: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return median(self.samples)

    @property
    def best(self) -> float:
        return min(self.samples)

    @property
    def ratio(self) -> float | None:
        """How many times the base's time: the median of the rounds' ratios, where both ran in each."""
        if self.base is None:
            return None
        if len(self.samples) == len(self.base.samples):
            return median(mine / other for mine, other in zip(self.samples, self.base.samples, strict=True))
        return self.median / self.base.median


@dataclass(frozen=True)
class Plan:
    """How much to measure, and who is told how far it is."""

    rounds: int = 5
    quick: bool = False  # tiny sizes: to see that everything runs
    say: Callable[[str], None] = lambda text: None

    def count(self, number: int) -> int:
        """`number` operations, or very few."""
        return max(number // 100, 2) if self.quick else number

    def sizes(self, *sizes: int) -> tuple[int, ...]:
        """Sizes of data to work on, or small ones, still ascending."""
        return tuple(100 * 4**at for at in range(len(sizes))) if self.quick else sizes


class Bench(NamedTuple):
    """One table."""

    name: str
    title: str  # what is measured, in one line
    unit: Unit
    ratio: str  # what a ratio is to
    cases: Callable[[Plan], AbstractContextManager[Sequence[Case]]]


def measure(bench: Bench, plan: Plan) -> list[Figure]:
    """Run the rounds of a bench. Unavailable."""
    plan.say(f"{bench.name}: setting up")
    try:
        return _measure(bench, plan)
    finally:
        plan.say("")


def _measure(bench: Bench, plan: Plan) -> list[Figure]:
    with pinned(client_cpu()), bench.cases(plan) as cases:
        figures: dict[tuple[str, str, str], Figure] = {}
        for case in cases:
            base = figures[case.base.key] if case.base is not None else None
            figures[case.key] = Figure(*case.key, base, case.aim)
        for at in range(plan.rounds):
            for case in cases:
                if _due(case.when, at, plan.rounds):
                    where = " ".join(filter(None, case.key))
                    plan.say(f"{bench.name}: round {at + 1} of {plan.rounds}: {where}")
                    figures[case.key].samples.append(case.run())
    return list(figures.values())


def _due(when: When, at: int, rounds: int) -> bool:
    return when is When.EVERY or at == (0 if when is When.FIRST else rounds - 1)


# ---- CPUs ----


def client_cpu() -> int:
    """Where the bench itself runs, and everything that shares a CPU with it."""
    return min(ALLOWED)


def server_cpu() -> int | None:
    """A second CPU, for the daemon; None where there is no other."""
    return max(ALLOWED) if len(ALLOWED) > 1 else None


ALLOWED = frozenset(os.sched_getaffinity(0))  # before anything is pinned


@contextmanager
def pinned(cpu: int) -> Iterator[None]:
    """This process, and what it starts, on one CPU: placement decides more than anything that is measured."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {cpu})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
