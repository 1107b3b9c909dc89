"""The harness's output, the tables, the floor, the faults, and the run of a program, on small stand-ins."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.selftest import faults, floor, hugepages, report, runner
from tests.selftest.__main__ import main
from tests.selftest.floor import Floor, Floors
from tests.selftest.runner import Outcome
from tests.selftest.say import CannotError
from tests.selftest.tap import Parser, Result, Verdict

PRINTED = """\
TAP version 13
1..5
# Starting 5 tests from 3 test cases.
#  RUN           iommufd.simple_close ...
#            OK  iommufd.simple_close
ok 1 iommufd.simple_close
#  RUN           area.no_domain.map ...
# /src/selftests/iommu/iommufd.c:66:map:Expected -1 (-1) != self->fd (-1)
# map: Test terminated by assertion
#          FAIL  area.no_domain.map
not ok 2 area.no_domain.map
#  RUN           area.domain.map ...
#      SKIP      no domain here
#            OK  area.domain.map
ok 3 area.domain.map # SKIP no domain here
#  RUN           area.domain.huge ...
iommufd: iommufd.c:9: setup: Assertion `vrc == self->buffer' failed.
#          FAIL  area.domain.huge
not ok 4 area.domain.huge #  aborted
#  RUN           area.no_domain.huge ...
"""

AREA = Floor(
    tests=5,
    floor=4,
    skips=frozenset({"area.domain.map"}),
    without_hugepages=frozenset({"area.domain.huge"}),
    faults={},
)


def parsed(printed: str = PRINTED, step: float = 0.5) -> Parser:
    parser, at = Parser(), 0.0
    for line in printed.splitlines():
        parser.feed(line, at)
        at += step if line.startswith("#  RUN") else 0
    parser.end(at)
    return parser


def outcome(parser: Parser, **changed: Any) -> Outcome:
    made = Outcome("iommufd", 1, parser.planned, tuple(parser.tests), tuple(parser.remarks()), 3.0, timed_out=False)
    return made._replace(**changed)


def judged(printed: str = PRINTED, *, huge: bool = True, slowest: float = 10, **changed: Any) -> floor.Judgement:
    floors = Floors(slowest, {"iommufd": AREA._replace(**changed)})
    return floor.judge(outcome(parsed(printed)), floors, hugepages=huge)


# ---- the harness's output ----------------------------------------------------------------------------------


def test_verdicts_and_times() -> None:
    parser = parsed()
    assert parser.planned == 5
    assert [(test.name, test.verdict.value) for test in parser.tests] == [
        ("iommufd.simple_close", "pass"),
        ("area.no_domain.map", "fail"),
        ("area.domain.map", "skip"),
        ("area.domain.huge", "fail"),
        ("area.no_domain.huge", "fail"),
    ]
    assert [test.seconds for test in parser.tests] == [0.5] * 5
    assert parser.tests[2].reason == "no domain here"


def test_the_parts_of_a_name() -> None:
    test = parsed().tests[1]
    assert (test.fixture, test.variant, test.case) == ("area", "no_domain", "map")
    assert parsed().tests[0].variant == ""


def test_messages_without_folders() -> None:
    first, last = parsed().tests[1], parsed().tests[4]
    assert first.messages == (
        "iommufd.c:66:map:Expected -1 (-1) != self->fd (-1)",
        "map: Test terminated by assertion",
    )
    assert "no verdict" in last.messages[-1]


def test_lines_of_no_test() -> None:
    parser = parsed("iommufdctl: no daemon\nTAP version 13\n1..0\n# PASSED: 0 / 0 tests passed.\n\ncounts: 3\n")
    assert parser.remarks() == ["iommufdctl: no daemon", "counts: 3"]
    assert parser.planned == 0


def test_a_verdict_without_a_beginning() -> None:
    parser = parsed("1..2\n#  RUN           a.b ...\nok 2 a.c\n")
    assert [(test.name, test.verdict.value) for test in parser.tests] == [("a.b", "fail"), ("a.c", "pass")]


# ---- tables ------------------------------------------------------------------------------------------------


def test_a_row_for_each_fixture() -> None:
    rows = [line.split() for line in report.fixtures(parsed().tests)]
    assert rows[1] == ["iommufd", "1", "1", "1", "0", "0", "0.50"]
    assert rows[2] == ["area", "2", "x", "2", "4", "0", "1", "3", "2.00"]
    assert rows[3] == ["5", "1", "1", "3", "2.50"]


def test_the_summary_names_the_slowest() -> None:
    tests = (Result("a.b", Verdict.PASS, 0.1, "", ()), Result("a.c", Verdict.PASS, 1.25, "", ()))
    made = outcome(parsed(), tests=tests, planned=2)
    assert report.summary(report.Round(1, made, None)).endswith("2 pass, 0 skip, 0 fail in 3.0 s; slowest a.c 1.25 s")


def test_failures_once_with_their_rounds() -> None:
    results = [report.Round(number, outcome(parsed()), None) for number in (1, 2)]
    lines = report.failures(results, {"area.domain.huge"})
    assert [line for line in lines if line.startswith("FAIL")] == [
        "FAIL area.no_domain.map in round 1, 2",
        "FAIL area.no_domain.huge in round 1, 2",
    ]
    assert "     map: Test terminated by assertion" in lines


def test_what_passing_tests_print_is_shown() -> None:
    spoken = Result("a.b", Verdict.PASS, 0.1, "", ("daemon: bug",))
    made = outcome(parsed(), tests=(spoken,), remarks=("17 ioctls",))
    assert report.printed(made) == ["     17 ioctls", "     a.b: daemon: bug"]


# ---- the floor ---------------------------------------------------------------------------------------------


def test_passes_and_own_skips_count() -> None:
    judgement = judged(floor=2)
    assert (judgement.good, judgement.problems) == (2, [])
    assert judged(floor=3).problems == ["2 of 5 good, the floor is 3"]


def test_another_skip_does_not_count() -> None:
    judgement = judged(floor=2, skips=frozenset())
    assert (judgement.good, judgement.skipped) == (1, ["area.domain.map"])
    assert judgement.problems


def test_exceptions_without_hugepages() -> None:
    judgement = judged(floor=3, huge=False)
    assert (judgement.excepted, judgement.problems) == (["area.domain.huge"], [])
    assert "area.domain.huge" not in judgement.failed
    assert judged(floor=3, huge=True).problems


def test_an_exception_must_fail_at_its_mmap() -> None:
    printed = PRINTED.replace("Assertion `vrc == self->buffer'", "Assertion `bitmap'")
    assert judged(printed, huge=False, floor=3).excepted == []


def test_a_slow_test_is_a_problem() -> None:
    assert [text.split()[0] for text in judged(floor=2, slowest=0.4).problems] == [test.name for test in parsed().tests]


@pytest.mark.parametrize(
    ("printed", "changed", "problem"),
    [
        ("iommufdctl: no\n", {}, "iommufd did not begin (exit status 1)"),
        (PRINTED.replace("1..5", "1..9"), {}, "4 of 9 tests were not reached"),
        (PRINTED, {"timed_out": True}, "not done after 3 s, ended"),
    ],
)
def test_a_run_that_broke_off(printed: str, changed: dict[str, Any], problem: str) -> None:
    made = outcome(parsed(printed), **changed)
    assert problem in floor.judge(made, Floors(10, {"iommufd": AREA}), hugepages=True).problems


def test_the_committed_floor() -> None:
    floors = floor.load()
    assert {name: (entry.tests, entry.floor) for name, entry in floors.programs.items()} == {
        "iommufd": (246, 246),
        "iommufd_fail_nth": (8, 8),
    }
    assert len(floors.programs["iommufd"].skips) == 5
    assert len(floors.programs["iommufd"].without_hugepages) == 24
    assert not floors.programs["iommufd_fail_nth"].skips  # it skips all where it injects nothing


def test_a_file_that_is_no_floor(tmp_path: Path) -> None:
    (tmp_path / "floor.json").write_text("[]")
    with pytest.raises(ValueError, match="no floor file"):
        floor.load(tmp_path / "floor.json")


# ---- faults ------------------------------------------------------------------------------------------------

SUMMARY = """\
1..1
#  RUN           basic_fail_nth.device ...
ok 1 basic_fail_nth.device
iommufd: 2900 ioctls in 0.1 s, 300 failed
iommufd:       12 IOMMU_DESTROY, 3 failed
iommufd:       11 faults injected at gate COPY_IN
iommufd:        3 faults injected at gate FD
"""


def test_each_chain_is_counted_alone() -> None:
    passed = Result("basic_fail_nth.device", Verdict.PASS, 0.1, "", ())
    asked: list[str] = []

    def alone(name: str) -> Outcome:
        asked.append(name)
        return outcome(parsed(SUMMARY))

    chains = faults.sweep(outcome(parsed(), tests=(passed, *parsed().tests[1:])), alone)
    assert asked == ["basic_fail_nth.device"]
    assert chains == [faults.Chain("device", passed=True, fired={"COPY_IN": 11, "FD": 3})]


def test_the_table_of_faults() -> None:
    chains = [
        faults.Chain("basic", passed=True, fired={"FD": 1}),
        faults.Chain("device", passed=True, fired={"PIN": 2}),
    ]
    assert [line.split() for line in faults.table(chains)] == [
        ["faults", "fired", "FD", "PIN", "all"],
        ["basic", "1", "-", "1"],
        ["device", "-", "2", "2"],
    ]


def test_faults_in_the_floor() -> None:
    fail_nth = outcome(parsed(SUMMARY), program="iommufd_fail_nth")
    required = {"device": frozenset({"FD", "PIN"}), "basic": frozenset({"PIN"})}
    floors = Floors(10, {"iommufd_fail_nth": AREA._replace(floor=1, faults=required)})
    chains = [faults.Chain("device", passed=False, fired={"FD": 1})]
    assert floor.judge(fail_nth, floors, chains, hugepages=True).problems == [
        "chain device does not pass alone",
        "chain device: no fault fired at PIN",
        "chain basic: no fault fired at PIN",
    ]
    assert floor.judge(fail_nth, floors, None, hugepages=True).problems == []


# ---- running -----------------------------------------------------------------------------------------------


def stand_in(folder: Path, text: str) -> Path:
    path = folder / "iommufd"
    path.write_text(f"#!{sys.executable}\n{text}")
    path.chmod(0o755)
    return path


def run(path: Path, *, only: tuple[str, ...] = (), limit: float = 20) -> Outcome:
    return runner.run(path, prefix=("env",), only=only, limit=limit, echo=False, label="")


def test_a_program_to_its_end(tmp_path: Path) -> None:
    path = stand_in(tmp_path, f"import sys\nprint({PRINTED!r}, flush=True)\nprint(sys.argv[1:], file=sys.stderr)\n")
    made = run(path, only=("a.b", "a.c"))
    assert (made.status, made.planned, len(made.tests), made.timed_out) == (0, 5, 5, False)
    assert "['-r', 'a.b', '-r', 'a.c']" in made.tests[-1].messages


def test_a_program_that_hangs(tmp_path: Path) -> None:
    child = "import os, time; os.setpgid(0, 0); print('pid', os.getpid(), flush=True); time.sleep(60)"
    start = time.monotonic()
    made = run(stand_in(tmp_path, f"import os, time\nif not os.fork(): {child}\ntime.sleep(60)\n"), limit=1)
    assert made.timed_out
    assert time.monotonic() - start < 8
    pid = made.remarks[0].split()[1]
    status = Path(f"/proc/{pid}/status")
    assert not status.exists() or "\nState:\tZ" in status.read_text()


def test_this_host_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(runner, "ACTIONS", tmp_path / "none")
    with pytest.raises(CannotError, match="user notification"):
        runner.require_seccomp()
    assert main([]) == 4
    assert "cannot run here" in capsys.readouterr().err


@pytest.mark.parametrize(("reached", "status"), [(2, 0), (3, 1)])
def test_from_command_line_to_exit_status(
    reached: int, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = stand_in(tmp_path, f"print({PRINTED!r})\n")
    floors = {
        "slowest_seconds": 9,
        "programs": {"iommufd": {"tests": 5, "floor": reached, "skips": sorted(AREA.skips)}},
    }
    (tmp_path / "floor.json").write_text(json.dumps(floors))
    monkeypatch.setattr("tests.selftest.__main__.build", lambda *_, **__: program.parent)
    monkeypatch.setattr("tests.selftest.__main__.source.find", lambda *_: FakeSource())
    monkeypatch.setattr(hugepages, "available", lambda: True)
    arguments = ["--bare", "--program", "iommufd", "--rounds", "2", "--floor", str(tmp_path / "floor.json")]
    assert main([*arguments, "--json", str(tmp_path / "out.json")]) == status
    found = json.loads((tmp_path / "out.json").read_text())
    assert [run["pass"] for run in found["runs"]] == [1, 1]
    assert found["passed"] == (status == 0)
    assert "FAIL area.no_domain.map in round 1, 2" in capsys.readouterr().out


class FakeSource:
    version = "7.2.0"
    origin = "made up"
