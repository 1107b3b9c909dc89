"""What a run must reach: the committed counts, and the tests that may skip or fail, by name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from . import faults
from .tap import Verdict

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .faults import Chain
    from .runner import Outcome

HUGE_MMAP = re.compile(r"MAP_FAILED|vrc == self->buffer")  # the assertions on mmap() with MAP_HUGETLB
COMMITTED = Path(__file__).with_name("floor.json")


class Floor(NamedTuple):
    """For one program."""

    tests: int
    floor: int  # of passes, the skips below among them
    skips: frozenset[str]  # the suite's own
    without_hugepages: frozenset[str]  # may fail at their mmap() where there are no huge pages, as on the kernel
    faults: dict[str, frozenset[str]]  # by chain: the kinds of gates at which a fault must have fired


class Floors(NamedTuple):
    """The file."""

    slowest: float  # seconds that no test may exceed
    programs: dict[str, Floor]


def load(path: Path = COMMITTED) -> Floors:
    """ValueError if the file is not such a one."""
    try:
        found = json.loads(path.read_text("utf-8"))
        programs = {
            name: Floor(
                tests=int(entry["tests"]),
                floor=int(entry["floor"]),
                skips=frozenset(entry.get("skips", ())),
                without_hugepages=frozenset(entry.get("without_hugepages", ())),
                faults={chain: frozenset(kinds) for chain, kinds in entry.get("faults", {}).items()},
            )
            for name, entry in found["programs"].items()
        }
        return Floors(float(found["slowest_seconds"]), programs)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no floor file: {error!r}") from None


class Judgement(NamedTuple):
    """One outcome against its floor."""

    good: int
    excepted: list[str]  # failures that are the kernel's own without huge pages
    skipped: list[str]  # skips that are not the suite's own
    failed: list[str]
    problems: list[str]  # empty: the floor is reached


def judge(outcome: Outcome, floors: Floors, chains: Sequence[Chain] | None = None, *, hugepages: bool) -> Judgement:
    """`chains`: the faults of each, None where faults cannot be counted."""
    floor = floors.programs[outcome.program]
    skips = {test.name for test in outcome.tests if test.verdict is Verdict.SKIP}
    failed = [test for test in outcome.tests if test.verdict is Verdict.FAIL]
    failures = {test.name for test in failed}
    excepted = {
        test.name for test in failed
        if not hugepages and test.name in floor.without_hugepages and HUGE_MMAP.search("\n".join(test.messages))
    }  # fmt: skip
    good = len(outcome.tests) - len(failures) - len(skips - floor.skips)
    judgement = Judgement(good, sorted(excepted), sorted(skips - floor.skips), sorted(failures - excepted), [])
    judgement.problems.extend(_problems(outcome, floor, judgement))
    if chains is not None and outcome.tests:
        judgement.problems.extend(faults.problems(chains, floor.faults))
    for test in outcome.tests:
        if test.seconds > floors.slowest:
            judgement.problems.append(f"{test.name} took {test.seconds:.1f} s, more than {floors.slowest:g} s")
    return judgement


def _problems(outcome: Outcome, floor: Floor, judgement: Judgement) -> list[str]:
    found = []
    if outcome.planned is None:
        found.append(f"{outcome.program} did not begin (exit status {outcome.status})")
    elif len(outcome.tests) != outcome.planned:
        found.append(f"{outcome.planned - len(outcome.tests)} of {outcome.planned} tests were not reached")
    if outcome.timed_out:
        found.append(f"not done after {outcome.seconds:.0f} s, ended")
    need = floor.floor - len(judgement.excepted)
    if judgement.good < need:
        found.append(f"{judgement.good} of {floor.tests} good, the floor is {need}")
    return found
