"""The command `iommufdctl`. Each command imports what it needs when it runs."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING

from . import __version__

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .show import Paint

DESCRIPTION = """\
Look at, try out and check iommufdd, the daemon that serves Linux's /dev/iommu over emulated IOMMU hardware."""

EPILOG = """\
environment:
  IOMMUFDD_SOCKET   the daemon's socket, unless --socket-path says so. Without either:
                    $XDG_RUNTIME_DIR/iommufdd.sock if it exists, else /run/iommufdd/iommufdd.sock
  NO_COLOR          no colours, even on a terminal

exit status:
  0 all is well; 1 it did not work: no daemon, or a check failed; 2 wrong usage

examples:
  iommufdctl run -- ./program           a program that sees a /dev/iommu
  iommufdctl demo                       a guest's page table nested on an emulated VT-d, in a second
  iommufdctl machine show vtd           the hardware a program can find
  iommufdctl doctor                     what works on this host, and what to do about the rest
  iommufdctl show                       what the daemon has open
  iommufdctl dma vfio0 read 0x1000 64   what a device reads there, or why it cannot
  iommufdctl walk vfio0 0x1000          how that address is translated
  iommufdctl trace --failed             which calls fail, and why
  iommufdctl sanitize                   DMA through translations that nobody has flushed
  iommufdctl ioctls IOAS_MAP            size, pointers and descriptors of an ioctl
"""

SHOW = """\
Print what a daemon has open: machines, contexts (open /dev/iommu's), their channels, and their objects. An object
stands below what it holds, so that whatever stands below keeps DESTROY of the above at EBUSY."""

SHOW_EPILOG = """\
examples:
  iommufdctl show
  iommufdctl show --socket-path ./iommu.sock
  iommufdctl show --json | jq '.instances[].contexts[].objects[] | select(.type == "IOAS")'
"""

DOCTOR = """\
Check what iommufdd needs on this host: first what everything needs, then 'iommufdctl run' and 'iommufdctl mount'. All
of it is tried, nothing is changed. With CMD: which way that program gets a /dev/iommu, why, and the line to type."""

DOCTOR_EPILOG = """\
verdicts:
  ok     works
  note   optional: something is slower, or one kind of program is not served
  FAIL   iommufdctl run does not work here; the line with -> says what to do about it

CMD:
  It is looked for on PATH and read, not started. 'by run' is a seccomp filter, for static, dynamic and Go
  programs and scripts of this machine; 'by mount' is a file mounted over /dev/iommu, for programs that gain
  privileges by exec, and for 32-bit ones. What a program will do cannot be seen: those that stat() the node, open
  it with O_RDONLY or by io_uring, or listen to seccomp themselves are not served by run.

exit status:
  0 if run works here, 1 if not; with CMD 0 if there is a way for it, 1 if not; 2 for wrong usage

examples:
  iommufdctl doctor
  iommufdctl doctor --json | jq '.[] | select(.verdict != "ok")'
  iommufdctl doctor qemu-system-x86_64
  iommufdctl doctor -- ./my-test --verbose
  iommufdctl doctor --json ping | jq -r '.way, .reason'     run, mount or none
"""

SANITIZE = """\
Print what the translation sanitizer of a daemon has found so far: DMA that used a cached translation although the
page table had changed and the invalidation that was due never came, or has not come yet. The daemon watches its
machines if it was started with --sanitize, or the machine of an 'iommufdctl run --sanitize'."""

SANITIZE_EPILOG = """\
report:
  never flushed      the device was detached, or --settle given, before an invalidation covered it
  not flushed yet    the invalidation may still come: a use before it comes is no mistake
  came               invalidations that did not do it, and why

exit status:
  0 nothing was never flushed; 1 something was, or no daemon, or no such machine; 2 for wrong usage

examples:
  iommufdctl sanitize
  iommufdctl sanitize --machine pair --settle
  iommufdctl sanitize --json | jq '.machines[].never'
"""

IOCTLS = """\
List the ioctls of /dev/iommu with their numbers, structs and sizes, the memory their pointers name and the
descriptors they take and give. The second size is the least that the kernel accepts."""

IOCTLS_EPILOG = """\
examples:
  iommufdctl ioctls
  iommufdctl ioctls HWPT VEVENTQ        those whose names contain one of the words
  iommufdctl ioctls --json | jq -r '.[] | [.number, .name] | @tsv'
"""

DEMO = """\
Start a private daemon and be a small VMM, told step by step. Needs no privilege and leaves nothing behind."""

DEMO_EPILOG = """\
demos:
  vtd     a guest's page table nested on Intel VT-d: DMA through both stages, a page fault, a forgotten
          invalidation, replace under traffic (the default)
  smmuv3  a vIOMMU on ARM SMMUv3: two vDEVICEs, DMA through a guest's CDs, invalidations by vSID, events read back
          until the queue overflows
  mock    with the kernel selftest's device: address space, DMA, dirty tracking, calls that fail and why
  kvm     a device walks a VM's own page table: nothing is pinned, what misses is asked for, what goes is flushed

examples:
  iommufdctl demo
  iommufdctl demo smmuv3
  iommufdctl demo kvm
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.print_capabilities:
        return _print_json(capabilities())
    if args.run is None:
        parser.print_usage(sys.stderr)
        print("iommufdctl: give a command; --help lists them", file=sys.stderr)
        return 2
    try:
        status: int = args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader has enough (head): that is no error, but nothing more can be written.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
    except (OSError, RuntimeError) as error:
        print(f"iommufdctl: {error}", file=sys.stderr)
        return 1
    return status


def capabilities() -> dict[str, object]:
    """What this build can do, for programs that start it."""
    from iommufd_uapi import wire
    from iommufd_uapi.iommufd import IOCTLS as STRUCTS

    return {
        "type": "iommufdctl",
        "version": __version__,
        "protocol": wire.VERSION,
        "kernel": "7.2",
        "commands": [
            "demo", "dma", "doctor", "ioctls", "machine", "mount", "run", "sanitize", "show", "trace", "walk"
        ],
        "features": ["json", "socket-path"],
        "ioctls": [struct.MACRO for struct in STRUCTS],
    }


# ---- options -----------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="iommufdctl", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.set_defaults(run=None)
    parser.add_argument("--version", action="version", version=f"iommufdctl {__version__}")
    parser.add_argument(
        "--print-capabilities", action="store_true", help="print JSON for programs that start this one, and exit"
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    def command(name: str, summary: str, text: str, epilog: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            help=summary,
            description=text,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    show = command("show", "what a daemon has open", SHOW, SHOW_EPILOG)
    _socket_path(show)
    show.add_argument("--admin-socket", metavar="PATH", help="its admin socket (default: the socket with .admin)")
    _json(show)
    show.set_defaults(run=_show)

    sanitize = command("sanitize", "DMA through translations that were not flushed", SANITIZE, SANITIZE_EPILOG)
    _socket_path(sanitize)
    sanitize.add_argument("--admin-socket", metavar="PATH", help="its admin socket (default: the socket with .admin)")
    sanitize.add_argument("--machine", metavar="INSTANCE", help="of the machine of this name alone")
    sanitize.add_argument("--settle", action="store_true", help="what is not flushed yet never will be")
    _json(sanitize)
    sanitize.set_defaults(run=_sanitize)

    doctor = command("doctor", "what works on this host", DOCTOR, DOCTOR_EPILOG)
    _socket_path(doctor)
    _json(doctor)
    doctor.usage = "iommufdctl doctor [options] [[--] CMD [ARG...]]"
    doctor.add_argument("words", nargs=argparse.REMAINDER, metavar="CMD", help=argparse.SUPPRESS)
    doctor.set_defaults(run=_doctor)

    ioctls = command("ioctls", "the ioctls, their structs and pointers", IOCTLS, IOCTLS_EPILOG)
    ioctls.add_argument("word", nargs="*", metavar="WORD", help="only those whose names contain it")
    _json(ioctls)
    ioctls.set_defaults(run=_ioctls)

    from . import hardware_options, machine_options, mount_options, run_options, trace

    run_options.add(command)
    mount_options.add(command)
    machine_options.add(command)
    hardware_options.add(command)
    trace.add(command)
    demo = command("demo", "a small VMM against a private daemon", DEMO, DEMO_EPILOG)
    demo.add_argument("name", nargs="?", choices=sorted(DEMOS), default="vtd", help="default: vtd")
    demo.set_defaults(run=_demo)
    return parser


def _socket_path(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--socket-path", metavar="PATH", help="the daemon's socket (default: $IOMMUFDD_SOCKET, ...)")


def _json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def _print_json(value: object) -> int:
    import json

    print(json.dumps(value, indent=2))
    return 0


def _paint() -> Paint:
    from .show import terminal

    return terminal()


# ---- commands ----------------------------------------------------------------------------------------------


def _show(args: argparse.Namespace) -> int:
    from iommufd_uapi import admin as requests

    from .admin import connect
    from .show import render

    with connect(args.socket_path, args.admin_socket) as admin:
        if not args.json:
            print(render(admin.show(), _paint()))
            return 0
        import json

        return _print_json(json.loads(admin.ask(requests.Show())))


def _sanitize(args: argparse.Namespace) -> int:
    from iommufd_uapi import admin as requests

    from .admin import connect

    with connect(args.socket_path, args.admin_socket) as admin:
        found = admin.sanitize(args.machine, settle=args.settle)
    if args.json:
        import json

        _print_json(json.loads(requests.encode(requests.Sanitized(found))))
    elif not found:
        print("no machine is open")
    for machine in () if args.json else found:
        name = f"machine {machine.machine!r}" if machine.machine else "a private machine"
        print(f"{name}: the sanitizer is off" if machine.mode == "off" else f"{name}, mode {machine.mode}:")
        print("".join(f"  {line}\n" for line in machine.lines), end="")
    return int(any(machine.never for machine in found))


def _doctor(args: argparse.Namespace) -> int:
    from .connection import default_socket_path
    from .doctor_show import report

    words = args.words[1:] if args.words[:1] == ["--"] else args.words
    return report(args.socket_path or default_socket_path(), words, as_json=args.json, paint=_paint())


def _ioctls(args: argparse.Namespace) -> int:
    from .catalog import entries, text

    words = [word.upper() for word in args.word]
    found = [entry for entry in entries() if not words or any(word in entry.name for word in words)]
    if not found:
        print(f"iommufdctl: no ioctl has {' or '.join(words)} in its name", file=sys.stderr)
        return 1
    if args.json:
        return _print_json([entry._asdict() for entry in found])
    print(text(found, _paint()))
    return 0


DEMOS = {"kvm": "demo_kvm", "mock": "demo", "smmuv3": "demo_smmuv3", "vtd": "demo_vtd"}  # the modules


def _demo(args: argparse.Namespace) -> int:
    from importlib import import_module

    status: int = import_module(f".{DEMOS[args.name]}", __package__).run(_paint())
    return status


if __name__ == "__main__":
    sys.exit(main())
