"""The faults that fired, as `run --summary` reports them.

One line of JSON on stderr, the processes in the order in which they opened their fail-nth file:

    {"fail_nth": [{"pid": 4711, "met": {"MEMORY": 30, "PIN": 12}, "fired": {"MEMORY": 9, "PIN": 2}}, ...]}

`met`: the acquisitions that passed a gate of the kind while the process was armed, in all rounds of its sweep; `fired`:
those that were made to fail. Each chain of iommufd_fail_nth is one test, which is one process.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, NamedTuple

from .tap import Verdict

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from .tap import Result

KEY = "fail_nth"


class Chain(NamedTuple):
    """One sweep; the counts by kind of gate."""

    name: str
    met: dict[str, int]
    fired: dict[str, int]

    @property
    def missed(self) -> list[str]:
        """Kinds of gates that were met but never fired."""
        return sorted(kind for kind, count in self.met.items() if count and not self.fired.get(kind))


def reported(remarks: Iterable[str], tests: Sequence[Result]) -> list[Chain] | None:
    """The chains by name; None without a report."""
    names = [test.case for test in tests if test.verdict is not Verdict.SKIP]
    for line in remarks:
        entries = _entries(line)
        if entries is not None:
            names += ["?"] * (len(entries) - len(names))
            return [
                Chain(name, _counts(entry.get("met")), _counts(entry.get("fired")))
                for name, entry in zip(names, entries, strict=False)
            ]
    return None


def is_report(line: str) -> bool:
    return _entries(line) is not None


def _entries(line: str) -> list[dict[str, object]] | None:
    start = line.find("{")  # a prefix such as `iommufdctl: ` may stand before
    if start < 0 or KEY not in line:
        return None
    try:
        found = json.loads(line[start:])
    except ValueError:
        return None
    entries = found.get(KEY)
    return entries if isinstance(entries, list) and all(isinstance(entry, dict) for entry in entries) else None


def _counts(value: object) -> dict[str, int]:
    return {str(kind): int(count) for kind, count in value.items()} if isinstance(value, dict) else {}


def table(chains: Sequence[Chain]) -> list[str]:
    """Faults fired, a row for each chain and a column for each kind; `-` where the chain has no such gate."""
    kinds = sorted({kind for chain in chains for kind in (*chain.met, *chain.fired)})
    width = max([len("chain"), *(len(chain.name) for chain in chains)])
    lines = ["  ".join([f"{'chain':{width}}", *(f"{kind:>8}" for kind in kinds), f"{'fired':>6}"])]
    for chain in chains:
        cells = [
            f"{chain.fired.get(kind, 0) if kind in chain.met or kind in chain.fired else '-':>{max(8, len(kind))}}"
            for kind in kinds
        ]
        lines.append("  ".join([f"{chain.name:{width}}", *cells, f"{sum(chain.fired.values()):>6}"]))
    return lines
