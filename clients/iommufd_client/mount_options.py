"""Room client: the options of `iommufdctl mount`."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from . import machine_options
from .run_options import caller

if TYPE_CHECKING:
    from collections.abc import Callable

MOUNT = """\
Put a /dev/iommu at PATH: a file that answers as the device does. For programs that 'iommufdctl run' cannot serve:
set-user-ID programs, those that stat() the device or open it read-only, those that have a seccomp listener already,
and for whole systems. Needs /dev/fuse, and root or user namespaces."""

MOUNT_EPILOG = f"""\
how:
  PATH becomes a FUSE file of one daemon: a private one, unless --socket-path names one that runs. A
  missing PATH is made, and removed at the end; over the real /dev/iommu, the mount hides it meanwhile.
  A PATH whose last part is 'vfio' is /dev/vfio/vfio.

for everybody:
  Without CMD, root mounts for all processes that see PATH, and mount stays in the foreground until
  SIGINT, SIGTERM or SIGHUP. It prints a line when PATH is ready. At the end PATH is unmounted at once;
  a program that still has it open is served until it closes it.

for one command:
  With CMD, the mount is made in a mount namespace of CMD, and who is not root becomes root of a user
  namespace with it (as 'unshare -Urm' does). Where PATH does not exist, its folder (/dev) is a private
  copy: nothing outside changes. Signals go on to CMD; if mount is killed, so is CMD. Children that
  outlive CMD keep PATH.

{machine_options.EPILOG}
callers:
  As for 'iommufdctl run': --caller uid=1000,gid=1000,caps=ipc_lock+sys_resource,memlock=65536, or part
  of it, replaces what callers have when they start. In a user namespace no capability counts.

mappings:
  With CMD, Linux 6.9 and CAP_SYS_ADMIN over the whole host, registers of vIOMMUs can be mapped; mappings
  that a device refuses then succeed, with nothing behind them. Elsewhere mmap() answers ENODEV.

--exact:
  The kernel answers some calls on a FUSE file itself: mmap(), read() and write() of 0 bytes,
  FIONREAD. With --exact (and CMD) a seccomp filter notifies the daemon of these calls, which answers
  for its own file as a device does; any other file's go on as always. Registers can be mapped without
  privilege. It costs about 20 us for each mmap() of a file that is not glibc's loader's, for each
  read() and write() of 0 bytes and each FIONREAD, and less than 0.1 us for other calls. It does not
  set no_new_privs, as who can mount need not: set-user-ID programs go on working. It takes the one
  seccomp listener that a process can have: CMD gets EBUSY for its own, and --exact does not work
  under 'iommufdctl run' or a container's agent that listens. A signal whose handler is installed
  without SA_RESTART can end such a call with EINTR. Children that outlive CMD are served: a copy of
  mount stays for them. If the daemon dies, the kernel answers again.

limits:
  The node is a regular file; without --exact, read() of 0 bytes answers 0. Descriptors that an ioctl
  returns, and mappings under --exact, are made by tracing the caller for about 0.2 ms: x86-64 only, and
  not under a debugger or strace (EOPNOTSUPP, ENODEV). If the daemon dies, calls answer ENOTCONN.
  docs/LIMITS.md has more.

exit status:
  with CMD that of CMD (128+N if signal N killed it; 127 if there is no such command, 126 if it cannot
  be run); without CMD 0 when told to stop; 1 if mount itself failed, 2 for wrong usage

examples:
  iommufdctl mount /dev/iommu                              for the whole system, as root
  iommufdctl mount /dev/iommu -- qemu-system-x86_64 ...    for one program, as anybody
  iommufdctl mount --exact /dev/iommu -- ./my-test         the kernel's answers to the letter
  iommufdctl mount --caller caps=none /dev/iommu -- ./my-test
"""


def add(command: Callable[[str, str, str, str], argparse.ArgumentParser]) -> None:
    """Declare the subcommand."""
    parser = command("mount", "put a /dev/iommu at a path (FUSE)", MOUNT, MOUNT_EPILOG)
    parser.usage = "iommufdctl mount [options] PATH [-- CMD [ARG...]]"
    parser.add_argument("--socket-path", metavar="PATH", default="", help="use the daemon at this socket")
    parser.add_argument("--machine", metavar="NAME|FILE", default="", help=machine_options.HELP)
    parser.add_argument(
        "--caller", type=caller, metavar="SPEC", default="", help="credentials that callers start with, see below"
    )
    parser.add_argument("--explain", action="store_true", help="print every ioctl that fails, and why, on stderr")
    parser.add_argument("--summary", action="store_true", help="print counts and what was left open, on stderr")
    parser.add_argument("--exact", action="store_true", help="with CMD: also answer what FUSE cannot, see below")
    parser.add_argument("path", metavar="PATH", help="where: /dev/iommu, or any other path")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="CMD", help=argparse.SUPPRESS)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from .keeper import RunError
    from .mount import Options, mount

    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command and sys.argv[-1] == "--":  # an empty variable, say: not a mount for everybody
        print("iommufdctl mount: give a command after --", file=sys.stderr)
        return 2
    if len(args.caller.encode()) > 256:
        print("iommufdctl mount: --caller is too long", file=sys.stderr)
        return 2
    try:
        machine = machine_options.choose(args.machine, args.socket_path)
    except machine_options.UsageError as error:
        print(f"iommufdctl mount: {error}", file=sys.stderr)
        return 2
    if args.exact and not command:
        print("iommufdctl mount: --exact needs a command: iommufdctl mount --exact PATH -- CMD", file=sys.stderr)
        return 2
    words = args.path, command, machine, args.socket_path, args.caller
    options = Options(*words, explain=args.explain, summary=args.summary, exact=args.exact)
    try:
        return mount(options)
    except RunError as error:
        print(f"iommufdctl: {error}", file=sys.stderr)
        return 1
