"""The Linux kernel's own iommufd tests, unmodified, under `iommufdctl run`: python -m tests.selftest [--rounds N]"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from . import exceptions, faults, floor, hugepages, report, runner, source
from .build import PROGRAMS, build
from .say import BrokenError, CannotError, note, progress

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .floor import Floors
    from .runner import Outcome
    from .source import Source

KSFT_SKIP = 4

EPILOG = f"""\
The source is, in this order: --linux-src or LINUX_SRC; the cache; {source.INSTALLED}; the Debian package
{source.PACKAGE} of {source.SUITE} (about 160 MB, once), fetched with apt from the archive this machine is
configured for, without privilege and without a trace outside the cache. Needed besides: gcc, libcap-dev.

exit status:
  0 all programs reach the floor; 1 they do not, or a step failed; 2 wrong usage; 4 this host cannot run them

examples:
  python -m tests.selftest --rounds 3
  python -m tests.selftest --linux-src ~/linux
  python -m tests.selftest -v --test iommufd_ioas.mock_domain.access_rw
  python -m tests.selftest --json r.json; jq '.runs[0].tests[] | select(.verdict == "fail") | .name' r.json
"""


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.selftest",
        description="Run the Linux kernel's own iommufd tests, unmodified, under `iommufdctl run`.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    given = os.environ.get("LINUX_SRC")
    parser.add_argument(
        "--linux-src", type=Path, metavar="PATH", default=Path(given) if given else None,
        help="an unpacked source, its tar, or its Debian package",
    )  # fmt: skip
    parser.add_argument(
        "--cache", type=Path, metavar="DIR", default=source.default_cache(), help="default: $XDG_CACHE_HOME/iommufdd"
    )
    parser.add_argument("--rounds", type=_positive, default=1, metavar="N", help="so many times in a row (default 1)")
    parser.add_argument("--program", choices=PROGRAMS, help="only this one")
    parser.add_argument(
        "--test", action="append", default=[], metavar="NAME", help="only this one, as the table of failures names it"
    )
    parser.add_argument("--floor", type=Path, default=floor.COMMITTED, metavar="FILE", help="what must be reached")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results there too")
    parser.add_argument(
        "--limit", type=_positive, default=300, metavar="S", help="seconds for one program (default 300)"
    )
    parser.add_argument(
        "--reserve-hugepages", action="store_true", help=f"as root: {hugepages.NEEDED} of 2 MiB for the duration"
    )
    parser.add_argument("--bare", action="store_true", help="without `run`: against this kernel's own /dev/iommu")
    parser.add_argument("-v", "--verbose", action="store_true", help="the compiler's and the tests' own output too")
    return parser.parse_args(argv)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """Fetch, build, run, report; the exit status."""
    args = arguments(argv)
    try:
        return _main(args)
    except CannotError as why:
        progress("")
        print(f"selftest: cannot run here: {why}", file=sys.stderr)
        return KSFT_SKIP
    except (BrokenError, OSError, ValueError) as error:
        progress("")
        print(f"selftest: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _main(args: argparse.Namespace) -> int:
    floors = floor.load(args.floor)
    if not args.bare:
        runner.require_seccomp()
    found = source.find(args.linux_src, args.cache)
    folder = build(found, args.cache, verbose=args.verbose)
    note(f"Linux {found.version} ({found.origin})")
    with ExitStack() as stack:
        if args.reserve_hugepages:
            stack.enter_context(hugepages.reserved())
        if not hugepages.available():
            note(f"fewer than {hugepages.NEEDED} free huge pages of 2 MiB: the tests that need them are excepted")
            _check_exceptions(found, floors)
        results = _run_all(args, folder, floors)
    for name in dict.fromkeys(result.outcome.program for result in results):
        print("\n".join(report.program([result for result in results if result.outcome.program == name])))
    bad = [result for result in results if result.failed]
    what = "floor reached" if not args.test else "passed"
    print(f"\n{'FAILED' if bad else what}: {len(results) - len(bad)} of {len(results)} runs")
    if args.json:
        facts = {"linux": found.version, "rounds": args.rounds, "passed": not bad}
        args.json.write_text(json.dumps(report.as_json(results, **facts), indent=1) + "\n")
    return 1 if bad else 0


def _run_all(args: argparse.Namespace, folder: Path, floors: Floors) -> list[report.Round]:
    results = []
    for number in range(1, args.rounds + 1):
        for name in [args.program] if args.program else PROGRAMS:
            only = [test for test in args.test if test.startswith("basic_fail_nth.") == (name == faults.PROGRAM)]
            if args.test and not only:
                continue
            huge = hugepages.available()
            outcome = _run(args, folder / name, only, number)
            huge = huge and hugepages.available()  # others may have taken them meanwhile
            chains = None
            if name == faults.PROGRAM and not args.bare:
                alone = functools.partial(_alone, args, folder / name, number)
                chains = faults.sweep(outcome, alone)
            judgement = None if only else floor.judge(outcome, floors, chains, hugepages=huge)
            results.append(report.Round(number, outcome, judgement, chains, hugepages=huge))
            note(report.summary(results[-1]))
    return results


def _run(args: argparse.Namespace, program: Path, only: Sequence[str], number: int, *options: str) -> Outcome:
    prefix = () if args.bare else (*runner.UNDER_RUN, *options, "--")
    return runner.run(program, prefix=prefix, only=only, limit=args.limit, echo=args.verbose, label=f"round {number}")


def _alone(args: argparse.Namespace, program: Path, number: int, test: str) -> Outcome:
    """Counted: the summary costs time, so it is not asked for where time is told."""
    return _run(args, program, [test], number, "--summary")


def _check_exceptions(found: Source, floors: Floors) -> None:
    """The committed names must be those that the source itself gives."""
    text = (found.tree / source.SELFTESTS / "iommu/iommufd.c").read_text("utf-8")
    committed = floors.programs[PROGRAMS[0]].without_hugepages
    if strange := committed.symmetric_difference(exceptions.need_hugepages(text)):
        note(f"the floor's exceptions are not those of Linux {found.version}: {' '.join(sorted(strange))}")


if __name__ == "__main__":
    sys.exit(main())
