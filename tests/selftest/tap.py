"""The kselftest harness's output, line by line, as results of tests."""

from __future__ import annotations

import enum
import re
from typing import NamedTuple

PLAN = re.compile(r"1\.\.(\d+)(?: # SKIP (.*))?$")
RUN = re.compile(r"#  RUN           (\S+) \.\.\.$")
OUTCOME = re.compile(r"#            OK  \S+$|#          FAIL  \S+$")
VERDICT = re.compile(r"(not )?ok (\d+) (\S+)(?: # +(?:(SKIP|XFAIL|XPASS)\b)?\s*(.*))?$")
TOTALS = re.compile(r"# (?:PASSED|FAILED|Totals|Starting|Planned|\d+ skipped)\b")
SOURCE = re.compile(r"\S*/(\w+\.[ch]:)")


class Verdict(enum.Enum):
    PASS = "pass"
    SKIP = "skip"
    FAIL = "fail"


class Result(NamedTuple):
    """One test that was started; `seconds` as its lines arrived here."""

    name: str  # fixture.variant.test, or fixture.test
    verdict: Verdict
    seconds: float
    reason: str  # of a skip
    messages: tuple[str, ...]  # what was printed while it ran

    @property
    def fixture(self) -> str:
        return self.name.split(".")[0]

    @property
    def variant(self) -> str:
        """Empty for a fixture without variants."""
        return ".".join(self.name.split(".")[1:-1])

    @property
    def case(self) -> str:
        """What TEST_F calls it."""
        return self.name.split(".")[-1]


class Parser:
    """Takes lines with the time of their arrival."""

    def __init__(self) -> None:
        self.tests: list[Result] = []
        self.planned: int | None = None
        self.running: str | None = None
        self.others: list[str] = []  # lines that belong to no test
        self._since = 0.0
        self._messages: list[str] = []

    def feed(self, line: str, at: float) -> None:
        if started := RUN.match(line):
            self.end(at)  # the one before never got its verdict
            self.running, self._since, self._messages = started[1], at, []
        elif verdict := VERDICT.match(line):
            self._verdict(verdict, at)
        elif plan := PLAN.match(line):
            self.planned = int(plan[1])
        elif self.running is None:
            self.others.append(line)
        elif not OUTCOME.match(line):
            self._messages.append(SOURCE.sub(r"\1", line.removeprefix("# ")))

    def _verdict(self, found: re.Match[str], at: float) -> None:
        failed, _, name, directive, reason = found.groups()
        if name != self.running:
            self.end(at)
            self._since, self._messages = at, []
        verdict = Verdict.FAIL if failed else Verdict.SKIP if directive == "SKIP" else Verdict.PASS
        self._add(name, verdict, at, reason or "")

    def _add(self, name: str, verdict: Verdict, at: float, reason: str = "") -> None:
        self.tests.append(Result(name, verdict, at - self._since, reason, tuple(self._messages)))
        self.running = None

    def end(self, at: float) -> None:
        """The program has ended; a test that runs still has failed."""
        if self.running is not None:
            self._messages.append("no verdict: the program ended, or was ended, while this test ran")
            self._add(self.running, Verdict.FAIL, at)

    def remarks(self) -> list[str]:
        """The lines that are neither a test's nor the harness's own counts."""
        return [line for line in self.others if line.strip() and not TOTALS.match(line) and line != "TAP version 13"]
