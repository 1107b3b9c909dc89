"""Room client: what `iommufdctl run` and `mount` ask alike: which daemon and machine, who calls, what is told."""

from __future__ import annotations

import argparse
import re
import sys
from typing import TYPE_CHECKING

from . import machine_options
from .machine_options import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

LONGEST_CALLER = 256  # bytes of --caller in a hello


def add_daemon(parser: argparse.ArgumentParser, who_starts: str) -> None:
    """Declare --socket-path, --machine and --caller."""
    parser.add_argument("--socket-path", metavar="PATH", default="", help="use the daemon at this socket")
    parser.add_argument("--machine", metavar="NAME|FILE", default="", help=machine_options.HELP)
    parser.add_argument(
        "--caller", type=_caller, metavar="SPEC", default="", help=f"credentials that {who_starts} with, see below"
    )


def add_told(parser: argparse.ArgumentParser) -> None:
    """Declare --explain and --summary."""
    parser.add_argument("--explain", action="store_true", help="print every ioctl that fails, and why, on stderr")
    parser.add_argument("--summary", action="store_true", help="print counts and what was left open, on stderr")


def add_command(parser: argparse.ArgumentParser) -> None:
    """Declare CMD, with all that follows it."""
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="CMD", help=argparse.SUPPRESS)


def command(args: argparse.Namespace) -> list[str]:
    """CMD and its arguments, without a -- in front; empty where none was given."""
    words: list[str] = args.command
    return words[1:] if words[:1] == ["--"] else words


def machine(args: argparse.Namespace) -> machine_options.Choice:
    """What --machine comes to; UsageError for that or for what a hello cannot carry."""
    if len(args.caller.encode()) > LONGEST_CALLER:
        raise UsageError("--caller is too long")
    return machine_options.choose(args.machine, args.socket_path)


def launch(verb: str, start: Callable[[], int]) -> int:
    """The exit status of `start`; 2 on its UsageError and 1 on its RunError, told in a line on stderr."""
    from .keeper import RunError

    try:
        return start()
    except UsageError as error:
        print(f"iommufdctl {verb}: {error}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"iommufdctl: {error}", file=sys.stderr)
        return 1


def _caller(text: str) -> str:
    """What the daemon would refuse without saying why."""
    for part in filter(None, text.split(",")):
        if not re.fullmatch(r"[ug]id=\d+|caps=[a-z_+]*|memlock=(\d+|unlimited)", part, re.IGNORECASE):
            raise argparse.ArgumentTypeError(f"{part!r} is not one of uid=N, gid=N, caps=NAME+NAME, memlock=BYTES")
    return text
