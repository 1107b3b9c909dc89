"""The command `iommufdd`: options, logging, sockets, the way out. Slow imports wait until needed."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from . import __version__

if TYPE_CHECKING:
    import socket
    from collections.abc import Sequence

    from .machine_file import Machines
    from .server.credentials import Virtual
    from .server.serve import Server

DESCRIPTION = """\
Serve Linux's /dev/iommu (iommufd, as of Linux 7.2) to programs on a Unix socket, over emulated
IOMMU hardware. Needs no kernel support and no privilege.

Each client gets a machine of its own, unless it asks for a shared one by name. What it opens is
closed when its last descriptor is, however the client ends."""

EPILOG = """\
machines:
  A machine is what a client finds: IOMMUs and devices behind them, named and described in TOML. A
  client may ask for one of those the daemon knows: the built-in ones, and those of --machine, whose
  first is what clients get that do not ask. 'iommufdctl machine list' shows the built-in ones, 'machine
  show vtd --toml' how a file is written, 'machine check FILE' what is wrong with one. A FILE is a
  word with a slash, or that ends in .toml.

sockets:
  Clients connect to PATH (type SOCK_SEQPACKET); docs/PROTOCOL.md is the protocol. The admin socket
  (type SOCK_STREAM, mode 0600) answers JSON lines: what is open, counts, DMA of devices and how it is
  translated, and, for tests, credentials and faults; who may use it reaches all memory that devices of
  any client reach. Under systemd, sockets come by LISTEN_FDS
  (FileDescriptorName=admin marks the admin socket) and readiness is told to NOTIFY_SOCKET.

callers:
  Whether pages count against RLIMIT_MEMLOCK depends on the caller's uid, capabilities and limit.
  They are taken from the peer's process. --caller replaces them for every client, for example
      --caller uid=1000,caps=none,memlock=65536
  caps is none, or ipc_lock, sys_rawio and sys_resource joined by '+'. memlock is in bytes, or
  'unlimited'.

sanitizer:
  --sanitize watches the translations of all DMA, on machines with an IOMMU that translates: what a cache
  gave is compared with what memory says. What was used although an invalidation was due that never came,
  until its device was detached, goes to the log, and to 'iommufdctl sanitize'. --sanitize=fail also fails
  DMA that meets such a translation again. A use before the invalidation came is counted, no more.

exit status:
  0  stopped by SIGTERM or SIGINT, or --terminate and the last client has left
  66 the same, with --sanitize=fail, and an invalidation never came
  1  could not start
  2  wrong usage

examples:
  iommufdd --socket-path /run/iommufdd/iommufdd.sock
  iommufdd --socket-path ./iommu.sock --terminate --log-level debug
  iommufdd --socket-path ./iommu.sock --machine vtd --machine ./two-cards.toml
  iommufdd --fd 3                  (an inherited socket, listening or connected)
  echo '{"request": "stats"}' | socat - UNIX-CONNECT:./iommu.sock.admin
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the daemon; the exit status."""
    words = sys.argv[1:] if argv is None else argv
    if words[:1] == ["machine"]:
        from .machine_cli import main as machine

        return machine(words[1:])
    args = _parser().parse_args(words)
    if args.print_capabilities:
        import json

        print(json.dumps(capabilities(), indent=2))
        return 0
    _configure_logging(args.log_level, args.log_format)
    from .errors import ENOENT
    from .machine_file import MachineFileError, Machines
    from .server.listener import StartError

    try:
        return _serve(args, Machines(args.machine))
    except MachineFileError as error:
        print(error, file=sys.stderr)
    except (ENOENT, StartError) as error:
        print(f"iommufdd: {error}", file=sys.stderr)
    return 1


def capabilities() -> dict[str, object]:
    """What this build can do, for programs that start it."""
    from iommufd_uapi import wire
    from iommufd_uapi.iommufd import IOCTLS
    from iommufd_uapi.iommufd_test import TestCmd
    from iommufd_uapi.layout import Ioctl

    from .context import IOCTL_OPS
    from .machine_file import built_in_names

    structs: tuple[type[Ioctl], ...] = (*IOCTLS, TestCmd)
    macros = {struct.CMD: struct.MACRO for struct in structs}
    return {
        "version": __version__,
        "protocol": wire.VERSION,
        "kernel": "7.2",
        "ioctls": {macros[op.cmd]: op.cmd for op in IOCTL_OPS},
        "machines": built_in_names(),
        "limits": {
            "packet_bytes": wire.MAX_PACKET,
            "packet_descriptors": wire.MAX_FDS,
            "packet_requests": wire.MAX_REQUESTS,
            "request_segments": wire.MAX_SEGMENTS,
            "scratch_bytes": wire.MAX_SCRATCH,
        },
    }


# ---- options -----------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="iommufdd",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for add in _sockets, _machines, _callers, _hardware, _checks, _output:
        add(parser)
    return parser


def _sockets(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("where to listen").add_argument
    add("--socket-path", metavar="PATH", help="make and listen at this socket; a dead one there is replaced")
    add("--fd", type=int, action="append", default=[], metavar="N", help="serve this inherited socket")
    add("--admin-socket", metavar="PATH", help="admin socket (default: the socket path with .admin; '' for none)")
    add("--mode", type=_mode, default=0o660, metavar="OCTAL", help="mode of the socket (default 0660)")
    add("--terminate", action="store_true", help="exit when the last client has left")


def _machines(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("which machines clients find")
    group.add_argument(
        "--machine",
        action="append",
        default=[],
        metavar="NAME|FILE",
        help="know this machine; the first is the default (without: mock)",
    )


def _callers(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("who the callers are").add_argument
    add("--caller", type=_caller, metavar="SPEC", help="credentials of every caller, see below")
    add("--virtual-caller", action="store_true", help="let the admin socket set credentials of an address space")


def _hardware(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("hardware")
    group.add_argument(
        "--page-request-timeout",
        type=_seconds,
        default=10.0,
        metavar="SECONDS",
        help="how long a device waits for the answer to a page request (default 10; 'inf': for ever)",
    )


def _checks(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("checks").add_argument
    add(
        "--sanitize", "--sanitize=report", action="store_const", const="report", default="off",
        help="report DMA through translations that should have been flushed",
    )  # fmt: skip
    add("--sanitize=fail", action="store_const", const="fail", dest="sanitize", help="and fail")


def _output(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("output and tuning").add_argument
    add("--log-level", choices=("debug", "info", "warning", "error"), default="info", help="default: info")
    add("--log-format", choices=("text", "json"), default="text", help="default: text")
    add(
        "--spin-us",
        type=_microseconds,
        default=0,
        metavar="N",
        help="look for requests this long before sleeping, where clients run on other CPUs (default 0)",
    )
    add("--print-capabilities", action="store_true", help="print JSON and exit")
    add("--version", action="version", version=f"iommufdd {__version__}")


def _mode(text: str) -> int:
    value = int(text, 8)
    if not 0 <= value <= 0o777:
        raise ValueError
    return value


def _microseconds(text: str) -> int:
    value = int(text)
    if not 0 <= value <= 1000:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1000")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not more than 0")
    return value


def _caller(text: str) -> Virtual:
    from .server.credentials import parse_virtual

    try:
        return parse_virtual(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _configure_logging(level: str, style: str) -> None:
    import logging

    from .server.log import Json, KeyValue

    handler = logging.StreamHandler()
    handler.setFormatter(Json() if style == "json" else KeyValue())
    logging.basicConfig(level=level.upper(), handlers=[handler])


# ---- the way in and out ------------------------------------------------------------------------------------


def _serve(args: argparse.Namespace, machines: Machines) -> int:
    import gc

    import trio

    from .server.credentials import OWN
    from .server.serve import Server, run
    from .wiring import new_machine

    server = Server(
        new_machine,
        machines=machines,
        virtual=args.caller or OWN,
        virtual_caller=args.virtual_caller,
        spin=args.spin_us / 1e6,
        patience=args.page_request_timeout,
        sanitize=args.sanitize,
    )
    try:
        admin = _open_sockets(server, args)
        gc.freeze()  # what the imports made is never garbage
        trio.run(lambda: run(server, admin=admin, terminate=args.terminate))
    finally:
        server.close()
    return server.sanitize.end() if server.sanitize is not None else 0


def _open_sockets(server: Server, args: argparse.Namespace) -> socket.socket | None:
    """Everything to listen at; the admin socket. StartError."""
    import socket as sockets

    from .server.listener import SocketFile, StartError, activated, inherited, listen_at

    admin: socket.socket | None = None
    for fd, name in activated():
        if name == "admin":
            admin = sockets.socket(fileno=fd)
        else:
            server.listen(inherited(fd))
    for fd in args.fd:
        server.listen(inherited(fd))
    if args.socket_path:
        sock = listen_at(args.socket_path, args.mode)
        server.socket_files.append(SocketFile(args.socket_path))
        server.listen(sock)
    if not server.listeners and not server.channels:
        raise StartError("nothing to serve: give --socket-path or --fd, or start it from a socket unit")
    path = args.admin_socket
    if path is None and args.socket_path:
        path = args.socket_path + ".admin"
    if path and admin is None:
        admin = listen_at(path, 0o600, sockets.SOCK_STREAM)
        server.socket_files.append(SocketFile(path))
    return admin


if __name__ == "__main__":
    sys.exit(main())
