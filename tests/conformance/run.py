"""Replay recorded ioctl programs and compare: python -m tests.conformance.run [--in-process] [--socket] [NAME...]

A program is NAME.prog with NAME.out, the recorded output, beside it. Lines that print the process's own VmPin and VmLck
are not compared.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from .interp import replay
from .parse import parse_program
from .process import Process

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from .process import Driver

PROGRAMS = Path(__file__).parent.parent / "programs"
DEFAULTS = (PROGRAMS / "hand", PROGRAMS / "random")
REQUIRED = PROGRAMS / "required.txt"
NOT_COMPARED = ("vmpin", "vmlck")


class Difference(NamedTuple):
    """One line that is not as recorded; None where there is no such line."""

    step: str  # the line of the program
    expected: str | None
    got: str | None

    def __str__(self) -> str:
        return f"    {self.step}\n      expected {self.expected}\n      got      {self.got}"


def find_programs(folders: Iterable[Path], names: Iterable[str] = ()) -> list[Path]:
    """The programs of the folders by name; with names, only those."""
    found = {path.stem: path for folder in folders for path in sorted(folder.glob("*.prog"))}
    if unknown := [name for name in names if name not in found]:
        raise SystemExit(f"no such program: {' '.join(unknown)}")
    return [found[name] for name in names or found]


def read_list(path: Path) -> list[str]:
    """The names in a list file; `#` starts a comment."""
    names = (line.partition("#")[0].strip() for line in path.read_text().splitlines())
    return [name for name in names if name]


def run_program(path: Path, driver: Driver) -> str:
    """The program's output; a crash of ours is its last line."""
    out: list[str] = []
    try:
        replay(parse_program(path.read_text("latin-1")), Process(driver), out)
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        where = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(frames[-4:]))
        out.append(f" {type(error).__name__}: {error} ({where})\n")
    return "".join(out)


def compared(output: str) -> Iterator[str]:
    for line in output.splitlines():
        if line.split(" ")[1:2] not in ([name] for name in NOT_COMPARED):
            yield line


def differences(path: Path, output: str) -> list[Difference]:
    """The lines of an output that are not as recorded."""
    steps = path.read_text("latin-1").splitlines()
    expected = path.with_suffix(".out").read_text("latin-1")
    pairs = itertools.zip_longest(compared(expected), compared(output))
    return [Difference(_step(steps, want or got or ""), want, got) for want, got in pairs if want != got]


def _step(steps: list[str], line: str) -> str:
    number = line.split(" ")[0]
    at = int(number) if number.isdigit() else 0
    return f"{at}: {steps[at - 1]}" if 0 < at <= len(steps) else line


class Score:
    """The results of one way of running."""

    def __init__(self, mode: str, required: list[str] | None, *, verbose: bool) -> None:
        self.mode = mode
        self.required = required
        self.verbose = verbose
        self.total = 0
        self.identical = 0
        self.failed: list[str] = []

    def add(self, path: Path, found: list[Difference]) -> None:
        self.total += 1
        if not found:
            self.identical += 1
            return
        fatal = self.required is None or path.stem in self.required
        if fatal:
            self.failed.append(path.stem)
        if fatal or self.verbose:
            print(f"  {path.stem}: {len(found)} lines differ{'' if fatal else ' (not required)'}")
            for difference in found if self.verbose else found[:1]:
                print(difference)

    def report(self, seconds: float) -> None:
        required = "" if self.required is None else f", {len(self.required)} required"
        print(f"{self.mode}: {self.identical}/{self.total} identical{required} ({seconds:.1f} s)")
        if self.failed:
            print(f"{self.mode}: {len(self.failed)} must be identical and are not: {' '.join(self.failed)}")


def run_mode(
    mode: str, paths: list[Path], required: list[str] | None, new_driver: Callable[[], Driver], *, verbose: bool
) -> bool:
    """Run all programs one way; whether all that count are identical."""
    score = Score(mode, None if required is None else [p.stem for p in paths if p.stem in required], verbose=verbose)
    start = time.monotonic()
    for at, path in enumerate(paths):
        progress(f"{mode} {at}/{len(paths)} {path.stem}")
        found = differences(path, run_program(path, new_driver()))
        progress("")
        score.add(path, found)
    score.report(time.monotonic() - start)
    return not score.failed


def progress(text: str) -> None:
    if sys.stderr.isatty():
        width = os.get_terminal_size(sys.stderr.fileno()).columns - 1
        print(f"\r{text[:width]:{width}}\r", end="", file=sys.stderr, flush=True)


def in_process() -> Callable[[], Driver]:
    from .inprocess import InProcess

    return InProcess


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="conformance", description="Replay recorded ioctl programs.")
    parser.add_argument("--in-process", action="store_true", help="call the core directly")
    parser.add_argument("--socket", action="store_true", help="through a daemon and the client library")
    parser.add_argument("--programs", type=Path, action="append", metavar="DIR", help="where the programs lie")
    parser.add_argument("--list", type=Path, metavar="FILE", help="only the programs named here must be identical")
    parser.add_argument("-v", "--verbose", action="store_true", help="every difference of every program")
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these programs")
    args = parser.parse_args(argv)
    if not args.in_process and not args.socket:
        args.in_process = args.socket = True
    if not args.programs and not args.list and not args.names:
        args.list = REQUIRED
    return args


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    paths = find_programs(args.programs or DEFAULTS, args.names)
    required = read_list(args.list) if args.list else None
    good = True
    if args.in_process:
        good &= run_mode("in process", paths, required, in_process(), verbose=args.verbose)
    if args.socket:
        from .oversocket import daemon

        with daemon() as new_driver:
            good &= run_mode("over the socket", paths, required, new_driver, verbose=args.verbose)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
