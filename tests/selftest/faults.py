"""The faults that fired in each chain of iommufd_fail_nth, as `run --summary` counts them: by kind of gate.

A chain is one test: it repeats its calls, the n-th acquisition failing in round n, until a round in which none is left
to fail. So in a chain that passes, each acquisition has been made to fail; what fired tells what the daemon acquires.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from .tap import Verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from .runner import Outcome

LINE = re.compile(r"\b(\d+) faults injected at gate (\w+)$")
PROGRAM = "iommufd_fail_nth"


class Chain(NamedTuple):
    """One sweep by itself."""

    name: str
    passed: bool
    fired: dict[str, int]  # by kind of gate


def count(lines: Iterable[str]) -> dict[str, int]:
    return {found[2]: int(found[1]) for line in lines if (found := LINE.search(line))}


def sweep(outcome: Outcome, run: Callable[[str], Outcome]) -> list[Chain]:
    """Each chain that ran, once more and alone, `run` taking a test's name: else the counts would be sums."""
    chains = []
    for test in outcome.tests:
        if test.verdict is Verdict.PASS:
            again = run(test.name)
            passed = [once.verdict for once in again.tests] == [Verdict.PASS]
            chains.append(Chain(test.case, passed, count(again.remarks)))
    return chains


def problems(chains: Sequence[Chain], required: dict[str, frozenset[str]]) -> list[str]:
    """What is missing of the kinds that must have fired, by chain."""
    fired = {chain.name: chain.fired for chain in chains}
    found = [f"chain {chain.name} does not pass alone" for chain in chains if not chain.passed]
    for name, kinds in required.items():
        if missing := sorted(kinds - fired.get(name, {}).keys()):
            found.append(f"chain {name}: no fault fired at {', '.join(missing)}")
    return found


def table(chains: Sequence[Chain]) -> list[str]:
    """A row for each chain and a column for each kind of gate; `-` where none fired."""
    kinds = sorted({kind for chain in chains for kind in chain.fired})
    width = max([len("faults fired"), *(len(chain.name) for chain in chains)])
    lines = ["  ".join([f"{'faults fired':{width}}", *kinds, f"{'all':>5}"])]
    for chain in chains:
        cells = [f"{chain.fired.get(kind, '-'):>{len(kind)}}" for kind in kinds]
        lines.append("  ".join([f"{chain.name:{width}}", *cells, f"{sum(chain.fired.values()):>5}"]))
    return lines
