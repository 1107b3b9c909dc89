"""Results as text for people and as JSON for programs."""

from __future__ import annotations

import os
import platform
from typing import TYPE_CHECKING, NamedTuple

from . import faults
from .tap import Verdict

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from .faults import Chain
    from .floor import Judgement
    from .runner import Outcome
    from .tap import Result

MESSAGES = 6  # lines shown of each failure
REMARKS = 20


class Round(NamedTuple):
    """One run of one program and what it amounts to; no judgement where only some tests ran."""

    number: int
    outcome: Outcome
    judgement: Judgement | None
    chains: list[Chain] | None = None
    hugepages: bool = True  # before and after

    @property
    def failed(self) -> bool:
        if self.judgement is not None:
            return bool(self.judgement.problems)
        tests = self.outcome.tests
        return not tests or any(test.verdict is Verdict.FAIL for test in tests)


def counts(tests: Iterable[Result]) -> dict[Verdict, int]:
    found = dict.fromkeys(Verdict, 0)
    for test in tests:
        found[test.verdict] += 1
    return found


def summary(result: Round) -> str:
    """`round 1: iommufd 246/246: 241 pass, 5 skip, 0 fail in 8.4 s; slowest ... 1.1 s`"""
    outcome, found = result.outcome, counts(result.outcome.tests)
    numbers = ", ".join(f"{number} {verdict.value}" for verdict, number in found.items())
    good = "" if result.judgement is None else f" {result.judgement.good}/{outcome.planned or '?'}"
    text = f"round {result.number}: {outcome.program}{good}: {numbers} in {outcome.seconds:.1f} s"
    if outcome.tests:
        slowest = max(outcome.tests, key=lambda test: test.seconds)
        text += f"; slowest {slowest.name} {slowest.seconds:.2f} s"
    return text


def fixtures(tests: Sequence[Result]) -> list[str]:
    """A row for each fixture: its tests times its variants, how they went, and how long they took."""
    groups: dict[str, list[Result]] = {}
    for test in tests:
        groups.setdefault(test.fixture, []).append(test)
    width = max([len("fixture"), *map(len, groups)])
    lines = [f"{'fixture':{width}}  tests x variants  total   pass  skip  fail  seconds"]
    for name, group in groups.items():
        variants, found = {test.variant for test in group}, counts(group)
        size = f"{len({test.case for test in group})}" + (f" x {len(variants)}" if variants != {""} else "")
        lines.append(_row(name, width, size, len(group), found, sum(test.seconds for test in group)))
    if len(groups) > 1:
        lines.append(_row("", width, "", len(tests), counts(tests), sum(test.seconds for test in tests)))
    return lines


def _row(name: str, width: int, size: str, total: int, found: dict[Verdict, int], seconds: float) -> str:
    numbers = f"{found[Verdict.PASS]:>5}  {found[Verdict.SKIP]:>4}  {found[Verdict.FAIL]:>4}"
    return f"{name:{width}}  {size:>16}  {total:>5}  {numbers}  {seconds:>7.2f}"


def _good(result: Round) -> int:
    tests = result.outcome.tests
    return result.judgement.good if result.judgement else sum(test.verdict is not Verdict.FAIL for test in tests)


def _skips(tests: Iterable[Result]) -> list[str]:
    """A line for each reason."""
    reasons: dict[str, list[str]] = {}
    for test in tests:
        reasons.setdefault(test.reason, []).append(test.name)
    return [f"SKIP {len(names)}, {reason}: {' '.join(names)}" for reason, names in reasons.items()]


def by_variant(names: Iterable[str]) -> list[str]:
    """`fixture.variant: case case`"""
    groups: dict[str, list[str]] = {}
    for name in names:
        group, _, case = name.rpartition(".")
        groups.setdefault(group, []).append(case)
    return [f"{group}: {' '.join(cases)}" for group, cases in groups.items()]


def failures(results: Sequence[Round], excepted: Iterable[str]) -> list[str]:
    """Each test that failed in some round, with the messages of the first time."""
    apart = set(excepted)
    lines: list[str] = []
    first: dict[str, Result] = {}
    rounds: dict[str, list[int]] = {}
    for result in results:
        for test in result.outcome.tests:
            if test.verdict is Verdict.FAIL and test.name not in apart:
                first.setdefault(test.name, test)
                rounds.setdefault(test.name, []).append(result.number)
    for name, test in first.items():
        lines.append(f"FAIL {name} in round {', '.join(map(str, rounds[name]))}")
        lines += [f"     {message}" for message in test.messages[:MESSAGES]]
        if len(test.messages) > MESSAGES:
            lines.append(f"     ... {len(test.messages) - MESSAGES} lines more")
    return lines


def printed(outcome: Outcome) -> list[str]:
    """What `run` and the daemon wrote: outside of tests, and in tests that passed, which themselves write nothing."""
    lines = list(outcome.remarks)
    lines += [
        f"{test.name}: {message}" for test in outcome.tests if test.verdict is Verdict.PASS for message in test.messages
    ]
    shown = [f"     {line}" for line in lines[:REMARKS]]
    return shown if len(lines) <= REMARKS else [*shown, f"     ... {len(lines) - REMARKS} lines more"]


def program(results: Sequence[Round]) -> list[str]:
    """All rounds of one program: its worst as a table, the failures of all, its faults, what is wrong."""
    worst = min(results, key=_good)
    lines = ["", f"{worst.outcome.program}, round {worst.number}:"]
    if worst.outcome.tests:
        lines += [f"  {line}" for line in fixtures(worst.outcome.tests)]
    if worst.chains:
        lines += ["", *(f"  {line}" for line in faults.table(worst.chains))]
    judgements = [result.judgement for result in results if result.judgement is not None]
    excepted = sorted({name for judgement in judgements for name in judgement.excepted})
    if excepted:
        lines += ["", f"  without 2 MiB huge pages {len(excepted)} fail on the kernel too:"]
        lines += [f"    {line}" for line in by_variant(excepted)]
    skipped = {name for judgement in judgements for name in judgement.skipped}
    lines += _skips(test for test in worst.outcome.tests if test.name in skipped)
    lines += failures(results, excepted)
    lines += printed(worst.outcome)
    for result in results:
        if result.judgement is not None:
            lines += [f"round {result.number}: {problem}" for problem in result.judgement.problems]
    return lines


def as_json(results: Sequence[Round], **facts: object) -> dict[str, object]:
    return {
        **facts,
        "kernel": platform.release(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "runs": [_run(result) for result in results],
    }


def _run(result: Round) -> dict[str, object]:
    outcome = result.outcome
    return {
        "round": result.number,
        "program": outcome.program,
        "status": outcome.status,
        "seconds": round(outcome.seconds, 3),
        "planned": outcome.planned,
        "hugepages": result.hugepages,
        **{verdict.value: number for verdict, number in counts(outcome.tests).items()},
        "judgement": None if result.judgement is None else result.judgement._asdict(),
        "faults": None if result.chains is None else [chain._asdict() for chain in result.chains],
        "remarks": outcome.remarks,
        "tests": [
            {**test._asdict(), "verdict": test.verdict.value, "seconds": round(test.seconds, 4)}
            for test in outcome.tests
        ],
    }
