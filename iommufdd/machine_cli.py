"""`iommufdd machine`, which `iommufdctl machine` starts: machines listed, shown, checked."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from .errors import ENOENT
from .machine_file import MachineFileError, Machines, dotted, toml

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from .description import AnyIommu, DeviceDescription, MachineDescription

PROG = "iommufdctl machine"

LIST_EPILOG = """\
example:
  iommufdctl machine list
"""

SHOW_EPILOG = """\
examples:
  iommufdctl machine show vtd
  iommufdctl machine show vtd --toml > my.toml          a file to begin with
"""

CHECK_EPILOG = """\
complaints:
  one a line on stderr: FILE:LINE: KEY: what is wrong with it

exit status:
  0 all files are good, 1 some are not, 2 wrong usage

example:
  iommufdctl machine check my.toml && iommufdctl run --machine my.toml -- ./program
"""


def main(argv: Sequence[str]) -> int:
    """Run the command; the exit status."""
    args = _parser().parse_args(argv)
    try:
        return int(args.run(args))
    except MachineFileError as error:
        print(error, file=sys.stderr)
    except ENOENT as error:
        print(f"{PROG}: {error.reason}", file=sys.stderr)
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=PROG, description="List, show and check descriptions of machines.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, summary: str, epilog: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    listing = command("list", "the machines that every daemon knows, with their IOMMUs and devices", LIST_EPILOG)
    listing.set_defaults(run=_list)
    show = command("show", "everything a machine is made of, defaults included", SHOW_EPILOG)
    show.add_argument("machine", metavar="NAME|FILE", help="a file has a slash in its name, or ends in .toml")
    show.add_argument("--toml", action="store_true", help="as a machine file")
    show.set_defaults(run=_show)
    check = command("check", "say what is wrong with machine files; nothing if they are good", CHECK_EPILOG)
    check.add_argument("files", metavar="FILE", nargs="+")
    check.set_defaults(run=_check)
    return parser


# ---- commands ----------------------------------------------------------------------------------------------


def _list(args: argparse.Namespace) -> int:
    machines = Machines()
    for row in aligned([[name, summary(machines.describe(name))] for name in machines.names]):
        print(row)
    return 0


def _show(args: argparse.Namespace) -> int:
    description = Machines([args.machine]).describe()
    sys.stdout.write(toml(description) if args.toml else "\n".join([*table(description), ""]))
    return 0


def _check(args: argparse.Namespace) -> int:
    status = 0
    for path in args.files:
        try:
            Machines().add_file(path)
        except MachineFileError as error:
            print(error, file=sys.stderr)
            status = 1
    return status


# ---- text --------------------------------------------------------------------------------------------------


def summary(description: MachineDescription) -> str:
    """One line: which IOMMUs, which devices."""
    iommus = [f"{iommu.name} ({model(iommu)})" for iommu in description.iommu]
    devices = [device.name for device in description.device]
    if not iommus:
        return "no IOMMU but the selftest's mock, which every machine has"
    return f"{', '.join(iommus)}; {', '.join(devices) or 'no devices'}"


def model(iommu: AnyIommu) -> str:
    """The value of the key model."""
    return str(iommu.__struct_config__.tag)


def table(description: MachineDescription) -> Iterator[str]:
    """Lines: each IOMMU with its keys, then a row for each device."""
    yield f"machine {description.name}: {summary(description)}"
    for iommu in description.iommu:
        yield ""
        yield f"iommu {iommu.name}"
        yield from aligned([["", *row] for row in _keys(iommu)])
    if description.device:
        yield ""
        yield from aligned(_devices(description.device))


def _keys(iommu: AnyIommu) -> Iterator[list[str]]:
    import msgspec

    for key, value in msgspec.to_builtins(iommu).items():
        if key == "reserved":
            regions = [f"{region.start:#x}..{region.last:#x} ({region.kind})" for region in iommu.reserved]
            yield [key, ", ".join(regions) or "none"]
        elif isinstance(value, dict):
            yield from ([dotted((key, inner)), said(each)] for inner, each in value.items())
        elif key != "name":
            yield [key, said(value)]


def _devices(devices: Sequence[DeviceDescription]) -> list[list[str]]:
    import msgspec

    rows: list[dict[str, Any]] = [msgspec.to_builtins(device) for device in devices]
    heads = list(rows[0])
    return [["device", *heads[1:]], *([said(row[head]) for head in heads] for row in rows)]


def said(value: object) -> str:
    """A value for people."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(said, value)) or "none"
    return "-" if value is None else str(value)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of equally many cells, in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
