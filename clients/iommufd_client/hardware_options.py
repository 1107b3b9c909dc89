"""Room client: the options of `iommufdctl dma` and `iommufdctl walk`."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from .dma import Data
    from .endpoint import How

DMA = """\
Let a device of a daemon's machine read, write, fill or compare memory, as a program that drives it would. It goes
through the tables that the device is attached to, waits for pages where it takes page faults, and says why it was
refused."""

DMA_EPILOG = """\
data:
  write and compare take their bytes from --file, --data or --text; LENGTH may cut them short. fill
  repeats them, or zeros. read prints a hexdump on a terminal, else raw bytes to stdout or to --file.
  Numbers may be hexadecimal (0x1000) or end in K, M or G.

machine:
  INSTANCE is the name that a machine is shared by, or the inode of one of its contexts, which
  'iommufdctl show' prints. It can be left out when only one machine has the device.

exit status:
  0 done; 1 refused, or different, with a line that says why and where to look; 2 wrong usage

examples:
  iommufdctl dma vfio0 write 0x1000 --text hello
  iommufdctl dma vfio0 read 0x1000 64
  iommufdctl dma vfio0 read 0x1000 16M --file memory.bin
  iommufdctl dma vfio0 fill 0 --size 4M --data deadbeef --repeat 100
  iommufdctl dma vfio0 compare 0x1000 --file expected.bin --pasid 5
"""

WALK = """\
Show how an address of a device would be translated: the entry that attaches the device or PASID, every table entry of
both stages with its bits by name, the result or the fault, and what the caches have of it. Nothing is changed, nothing
is cached by it, no accessed or dirty bit is set."""

WALK_EPILOG = """\
reading it:
  A guest's tables are bytes in its memory: each entry is shown with its address, and above it where
  stage 2 finds that address. The tables of the kernel's own have no bytes: the stretch of the IOAS is
  shown. 'differs from memory' marks what a cache has kept: that flush is missing, or still to come.

machine:
  INSTANCE is as for 'iommufdctl dma': a name, or the inode of a context. It can be left out when only
  one machine has the device.

exit status:
  0 it is translated; 1 it is not; 2 wrong usage

examples:
  iommufdctl walk vfio0 0x7f0000001000
  iommufdctl walk vfio0 0x1000 --pasid 5 --write
  iommufdctl walk vfio0 0x1000 --json | jq '.rows[].bits'
"""


def add(command: Callable[[str, str, str, str], argparse.ArgumentParser]) -> None:
    """Declare the subcommands."""
    dma = command("dma", "let a device read or write memory", DMA, DMA_EPILOG)
    dma.add_argument("device", metavar="DEVICE", help="its name on the machine, as vfio0")
    dma.add_argument("op", choices=("read", "write", "fill", "compare"), help="what the device does")
    dma.add_argument("iova", metavar="IOVA", type=number)
    dma.add_argument("length", metavar="LENGTH", type=number, nargs="?", help="bytes; any number")
    dma.add_argument("--size", type=number, metavar="LENGTH", help="the same, by name")
    data = dma.add_mutually_exclusive_group()
    data.add_argument("--file", metavar="FILE", help="raw bytes from there, of a read to there; '-': stdin, stdout")
    data.add_argument("--data", metavar="HEX", type=_hex, help="bytes in hexadecimal")
    data.add_argument("--text", metavar="TEXT", help="bytes of a text, in UTF-8")
    dma.add_argument("--repeat", type=_positive, default=1, metavar="N", help="do it N times")
    dma.add_argument(
        "--page-timeout", type=_seconds, metavar="SECONDS", help="wait this long for a page (default: the daemon's)"
    )
    _common(dma)
    dma.set_defaults(run=_dma)

    walk = command("walk", "how a device's address is translated", WALK, WALK_EPILOG)
    walk.add_argument("device", metavar="DEVICE", help="its name on the machine, as vfio0")
    walk.add_argument("iova", metavar="IOVA", type=number)
    walk.add_argument("--write", action="store_true", help="for a write; otherwise for a read")
    walk.add_argument("--json", action="store_true", help="print JSON")
    _common(walk)
    walk.set_defaults(run=_walk)


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pasid", type=int, metavar="N", help="a request with this PASID (default: without one)")
    parser.add_argument("--privileged", action="store_true", help="a privileged request")
    parser.add_argument("--machine", metavar="INSTANCE", default="", help="which machine, see below")
    parser.add_argument("--socket-path", metavar="PATH", help="the daemon's socket (default: $IOMMUFDD_SOCKET, ...)")
    parser.add_argument("--admin-socket", metavar="PATH", help="its admin socket (default: the socket with .admin)")


def number(text: str) -> int:
    """A number of bytes, or an address: 4096, 0x1000, 4K."""
    found = re.fullmatch(r"(0x[0-9a-f]+|[0-9]+)([kmgt]?)(?:ib|b)?", text, re.IGNORECASE)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no number like 4096, 0x1000 or 4K")
    return int(found[1], 0 if found[1][:2].lower() == "0x" else 10) << 10 * " kmgt".index(found[2].lower() or " ")


def _hex(text: str) -> bytes:
    try:
        return bytes.fromhex(text.removeprefix("0x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not an even number of hexadecimal digits") from None


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"{text} is not 0 or more")
    return value


# ---- commands ----------------------------------------------------------------------------------------------


def _dma(args: argparse.Namespace) -> int:
    from . import dma
    from .admin import connect

    length = args.size if args.length is None else args.length
    data = _data(args)
    if args.op in ("write", "compare"):
        length = data.length if length is None else length
        if length > data.length:
            return _usage(f"{data.length} bytes of data for a length of {length}: give --file, --data or --text")
    elif length is None:
        return _usage(f"a {args.op} needs a LENGTH")
    if args.op == "fill" and not data.length:
        return _usage("a fill needs a pattern of at least one byte")
    if args.op == "read" and args.file is None and length > dma.DUMPED and sys.stdout.isatty():
        return _usage(f"{length} bytes are many for a terminal: give --file")
    how: How = {"pasid": args.pasid, "privileged": args.privileged, "page_timeout": args.page_timeout}
    transfer = dma.Transfer(args.device, args.op, args.iova, length, data, args.machine, how, args.repeat,
                            args.file or "")  # fmt: skip
    with connect(args.socket_path, args.admin_socket) as admin:
        return dma.run(admin, transfer, _advice(args))


def _usage(text: str) -> int:
    print(f"iommufdctl dma: {text}", file=sys.stderr)
    return 2


def _data(args: argparse.Namespace) -> Data:
    from .dma import Data

    if args.op == "read":
        return Data()
    if args.file is not None:
        return Data.of_file(args.file)
    if args.text is not None:
        return Data(args.text.encode())
    return Data(args.data if args.data is not None else b"\0" if args.op == "fill" else b"")


def _advice(args: argparse.Namespace) -> str:
    """The walk that shows why; {iova} is still to be filled in."""
    words = ["iommufdctl", "walk", args.device, "{iova:#x}"]
    for option, value in (
        ("--pasid", args.pasid),
        ("--machine", args.machine or None),
        ("--socket-path", args.socket_path),
        ("--admin-socket", args.admin_socket),
    ):
        words += [] if value is None else [option, shlex.quote(str(value)).replace("{", "{{").replace("}", "}}")]
    words += ["--write"] * (args.op in ("write", "fill")) + ["--privileged"] * args.privileged
    return " ".join(words)


def _walk(args: argparse.Namespace) -> int:
    from .admin import connect
    from .show import terminal
    from .walk import render

    with connect(args.socket_path, args.admin_socket) as admin:
        walked = admin.walk(
            args.device,
            args.iova,
            instance=args.machine,
            pasid=args.pasid,
            op="write" if args.write else "read",
            privileged=args.privileged,
        )
    if args.json:
        import msgspec

        print(msgspec.json.format(msgspec.json.encode(walked), indent=2).decode())
    else:
        print(render(walked, _asked(args), terminal()))
    return int(walked.fault is not None)


def _asked(args: argparse.Namespace) -> str:
    who = "no PASID" if args.pasid is None else f"PASID {args.pasid}"
    verb = ("privileged " if args.privileged else "") + ("write" if args.write else "read")
    return f"iova {args.iova:#x}  {who}  {verb}"
