"""Room client: the options about machines: `--machine` of run and mount, and `iommufdctl machine`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

MACHINE = """\
List, show and check descriptions of machines: the IOMMUs and devices that a program finds."""

MACHINE_EPILOG = """\
commands:
  list                       the machines that every daemon knows, with their IOMMUs and devices
  show NAME|FILE [--toml]    everything a machine is made of, defaults included
  check FILE...              say what is wrong with machine files; nothing if they are good
  Each has a --help. The daemon's package answers: 'iommufdd machine' is the same.

machine files:
  TOML: a name, an [[iommu]] table for each IOMMU and a [[device]] table for each device. 'show vtd --toml'
  writes one with every key there is; only 'name', 'model', and 'bdf' and 'iommu' of devices must be there.
  A FILE is a word with a slash, or one that ends in .toml.

exit status:
  0 all is well, 1 a file or name is no good, 2 wrong usage

examples:
  iommufdctl machine show vtd
  iommufdctl machine show vtd --toml > my.toml
  iommufdctl machine check my.toml && iommufdctl run --machine ./my.toml -- ./program
"""

HELP = "a private machine of this name or file; NAME@MACHINE shares it by NAME, see below"

EPILOG = """\
machines:
  --machine vtd, or --machine ./my.toml, is a machine of CMD's own ('iommufdctl machine list' has the names;
  a file has a slash in its name, or ends in .toml). With --socket-path the daemon's machines count:
    @vtd      a private one of the daemon's machine vtd
    ci        the one that all who say so share; it is made of the daemon's default machine
    ci@vtd    the same, and it must be a vtd
"""

LONGEST = 32  # bytes of a name in a hello


class UsageError(ValueError):
    """What --machine says cannot be; the message is one line."""


class Choice(NamedTuple):
    """What --machine comes to."""

    options: list[str]  #: of a private daemon
    name: str  #: in the hello: [INSTANCE][@MACHINE]


def choose(text: str, socket_path: str) -> Choice:
    """UsageError."""
    if "/" in text or text.endswith(".toml"):
        if socket_path:
            raise UsageError(
                f"the daemon at --socket-path reads no files: start it with --machine {text}, and say --machine @NAME"
            )
        return Choice([f"--machine={text}"], "")
    if text and "@" not in text and not socket_path:
        return Choice([f"--machine={text}"], "")
    if len(text.encode()) > LONGEST:
        raise UsageError(f"the machine's name takes more than {LONGEST} bytes")
    return Choice([], text)


def add(command: Callable[[str, str, str, str], argparse.ArgumentParser]) -> None:
    """Declare the subcommand."""
    parser = command("machine", "the machines there are, and machine files", MACHINE, MACHINE_EPILOG)
    parser.usage = "iommufdctl machine COMMAND ..."
    parser.add_argument("words", nargs=argparse.REMAINDER, metavar="COMMAND", help=argparse.SUPPRESS)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    import os
    import subprocess
    import sys

    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    command = [sys.executable, "-m", "iommufdd.cli", "machine", *args.words]
    return subprocess.run(command, env=environment, check=False).returncode
