"""Speed, as ratios measured side by side: python -m tests.bench [NAME...] [--rounds N] [--json FILE] [--list]"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from . import depth, dirty, hardware, mapping, replay, roundtrip, sanitizer, smmuv3, startup, supervised
from .measure import Plan, Unavailable, measure
from .table import as_json, progress, table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .measure import Bench, Figure

BENCHES: dict[str, Bench] = {
    bench.name: bench
    for bench in (
        roundtrip.BENCH,
        depth.BENCH,
        mapping.BENCH,
        dirty.BENCH,
        replay.BENCH,
        sanitizer.BENCH,
        startup.BENCH,
        supervised.BENCH,
        hardware.TRANSLATE,
        hardware.DMA,
        smmuv3.BENCH,
    )
}

EPILOG = """\
Every figure comes from rounds in which all cases of a bench take turns. Compare ratios, not times: times are
those of this machine in this minute. Close what else is running; 'one CPU' means client and daemon share one.

examples:
  python -m tests.bench
  python -m tests.bench roundtrip --rounds 15
  python -m tests.bench map --json map.json && jq '.figures[] | [.row, .column, .ratio]' map.json
"""


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench",
        description="Measure iommufdd.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHES)}; all without one")
    parser.add_argument("--rounds", type=_positive, default=5, metavar="N", help="default 5")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there too")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: to see that it runs, not how fast")
    parser.add_argument("--list", action="store_true", help="list the benches and exit")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.names if name not in BENCHES]:
        parser.error(f"no such bench: {' '.join(unknown)}")
    return args


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """Run benches; 1 if one could not run."""
    args = arguments(argv)
    if args.list:
        for bench in BENCHES.values():
            print(f"{bench.name:10} {bench.title}")
        return 0
    plan = Plan(rounds=args.rounds, quick=args.quick, say=progress)
    results: list[tuple[Bench, list[Figure]]] = []
    start = time.monotonic()
    for name in args.names or BENCHES:
        try:
            results.append((BENCHES[name], measure(BENCHES[name], plan)))
        except Unavailable as why:
            print(f"{name}: cannot run: {why}\n")
            continue
        print(table(*results[-1]) + "\n")
    print(f"{time.monotonic() - start:.0f} s, {plan.rounds} rounds")
    if args.json:
        args.json.write_text(json.dumps(as_json(results, plan), indent=1) + "\n")
    return 0 if len(results) == len(args.names or BENCHES) else 1


if __name__ == "__main__":
    sys.exit(main())
