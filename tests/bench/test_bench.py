"""That every bench runs and says what it should; how fast it all is, people judge."""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.bench.__main__ import BENCHES, main
from tests.bench.measure import PER_SECOND, US, Aim, Bench, Case, Plan, Unit, When, measure
from tests.bench.table import table

needs_compiler = pytest.mark.skipif(not (shutil.which("cc") or shutil.which("gcc")), reason="no C compiler")


def bench_of(*cases: Case, unit: Unit = US) -> Bench:
    @contextmanager
    def given(plan: Plan) -> Iterator[Sequence[Case]]:
        yield cases

    return Bench("name", "title", unit, "so many times", given)


@needs_compiler
def test_every_bench(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = os.sched_getaffinity(0)
    file = tmp_path / "figures.json"
    assert main(["--quick", "--rounds", "1", "--json", str(file)]) == 0
    out, err = capsys.readouterr()
    assert [line.partition(":")[0] for line in out.splitlines() if line.split(":")[0] in BENCHES] == list(BENCHES)
    assert not err  # progress is for a terminal
    written = json.loads(file.read_text())
    assert {figure["bench"] for figure in written["figures"]} == set(BENCHES)
    assert all(figure["min"] > 0 and len(figure["samples"]) == 1 for figure in written["figures"])
    assert os.sched_getaffinity(0) == before


def test_list_and_unknown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(BENCHES)
    with pytest.raises(SystemExit):
        main(["nonsense"])


def test_rounds_are_interleaved() -> None:
    ran: list[str] = []

    def case(name: str, when: When = When.EVERY) -> Case:
        def run() -> float:
            ran.append(name)
            return 1.0

        return Case(name, "", run, when=when)

    measure(bench_of(case("a"), case("b", When.FIRST), case("c", When.LAST)), Plan(rounds=3))
    assert "".join(ran) == "abaac"


def test_ratio_is_the_median_of_the_rounds_ratios() -> None:
    floor_times, case_times = iter([1.0, 10.0, 2.0]), iter([3.0, 20.0, 8.0])
    floor = Case("floor", "", lambda: next(floor_times))
    case = Case("case", "", lambda: next(case_times), base=floor)
    _, figure = measure(bench_of(floor, case), Plan(rounds=3))
    assert (figure.median, figure.best, figure.ratio) == (8.0, 3.0, 3.0)


@pytest.mark.parametrize(
    ("aim", "unit", "verdict"),
    [
        (Aim(ratio=2.0), US, "aim x2 or less: met, x2 (case)"),
        (Aim(ratio=1.9), US, "aim x1.9 or less: MISSED, x2 (case)"),
        (Aim(rate=500), PER_SECOND, "aim 500/s or more: met, 500/s (case)"),
        (Aim(rate=501), PER_SECOND, "aim 501/s or more: MISSED, 500/s (case)"),
    ],
)
def test_aims(aim: Aim, unit: Unit, verdict: str) -> None:
    floor = Case("floor", "", lambda: 0.001)
    bench = bench_of(floor, Case("case", "", lambda: 0.002, base=floor, aim=aim), unit=unit)
    text = table(bench, measure(bench, Plan(rounds=1)))
    assert verdict in text
    assert ("x0.5" if unit.rate else "x2") in text
