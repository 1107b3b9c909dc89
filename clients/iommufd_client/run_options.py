"""Room client: the options of `iommufdctl run`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from . import launch_options, machine_options
from .machine_options import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

RUN = """\
Run a program that sees /dev/iommu (and /dev/vfio/vfio) where there is none. The program is not changed and need not
be: static or dynamic, Go or C, with threads, fork and exec. Needs no privilege; Linux 5.19 or later."""

RUN_EPILOG = f"""\
how:
  A seccomp filter notifies a daemon of opens for reading and writing and of ioctls of iommufd; the
  rest runs as always. The daemon is a private one, unless --socket-path names one that runs; what that
  may not open of CMD (Yama's ptrace_scope 1, a daemon of another user), run opens for it. Programs
  gain no privileges by set-user-ID bits (no_new_privs), and only /dev/iommu itself is there: stat()
  does not find it.

descriptors:
  The daemon's get numbers from 900 on (below, where RLIMIT_NOFILE is lower). Copies made by dup2() to
  a low number, or received by SCM_RIGHTS, do ioctl, poll and close, but not read and write.

signals:
  A handler without SA_RESTART that runs before the daemon has taken the call gives EINTR, and nothing
  was done. From then on the call is carried out, and the handler runs after it.

{machine_options.EPILOG}
callers:
  Whether pinned pages count against RLIMIT_MEMLOCK depends on who calls. --caller replaces the uid,
  capabilities and limit that CMD starts with: uid=1000,gid=1000,caps=ipc_lock+sys_resource,memlock=65536
  or part of it; caps may be 'none'. What CMD changes itself (setuid, setrlimit) counts from then on.

KVM:
  --kvm shows a /dev/kvm with as much of KVM as the RFC "Sharing KVM TDP to IOMMU" needs: VMs with memory
  slots, the dirty log, vCPUs that do not run, and KVM_CREATE_TDP_FD (0xc010aee4), whose descriptor goes to
  IOMMU_HWPT_ALLOC with data type 0x4b564d00. Without --kvm the host's own /dev/kvm is left alone. KVM's
  ioctls are taken on descriptor numbers from 900 on only.

sanitizer:
  --sanitize compares what the IOMMU's caches give a device with what the page tables say, for every DMA.
  A guest's page table whose change must be followed by an invalidation that never came, or was the wrong
  one, is told on stderr at the end: device, PASID, IOVA, both results, the entry that changed, and the
  invalidation that was due. Uses before it came are counted, no more. --sanitize=fail also ends with
  status 66 if one never came, and fails DMA through what was never flushed ('iommufdctl sanitize --settle'
  says that until now nothing more is to come).

the end:
  run ends when CMD does. Children that outlive CMD keep /dev/iommu: their parent, a copy of run, stays in
  the background until the last of them has ended. SIGTERM, SIGHUP, SIGINT, SIGQUIT, SIGUSR1 and SIGUSR2 go
  on to CMD; if run is killed, so is CMD. If the daemon dies, calls on /dev/iommu answer ENODEV.

exit status:
  that of CMD; 128+N if signal N killed it; 127 if there is no such command, 126 if it cannot be run;
  1 if run itself failed, 2 for wrong usage; 66 with --sanitize=fail if CMD's is 0 and an invalidation was
  forgotten

examples:
  iommufdctl run -- ./iommufd                       the kernel's own selftest
  iommufdctl run --explain -- qemu-system-x86_64 ...
  iommufdctl run --trace - -- ./program             every call, as strace would print it
  iommufdctl run --caller uid=1000,caps=none,memlock=65536 -- ./my-test
  iommufdctl run --machine vtd -- ./my-vmm          a machine with an Intel VT-d
  iommufdctl run --machine vtd --kvm -- ./my-vmm    the same, and VMs whose page tables its devices can walk
  iommufdctl run --socket-path ./s --machine pair -- ./a & iommufdctl run --socket-path ./s --machine pair -- ./b
"""


def add(command: Callable[[str, str, str, str], argparse.ArgumentParser]) -> None:
    """Declare the subcommand."""
    parser = command("run", "run a program that sees a /dev/iommu", RUN, RUN_EPILOG)
    parser.usage = "iommufdctl run [options] [--] CMD [ARG...]"
    launch_options.add_daemon(parser, "CMD starts")
    parser.add_argument(
        "--proc",
        action="store_true",
        help="serve VmPin and VmLck of /proc/N/status, and fault injection; each fopen() for reading costs 15 us more",
    )
    parser.add_argument(
        "--kvm", action="store_true", help="/dev/kvm too is the daemon's: VMs whose page tables a device can share"
    )
    parser.add_argument(
        "--fd-base",
        type=_fd_base,
        default=0,
        metavar="N",
        help="lowest number of the daemon's descriptors; 3 gives the kernel's numbers, and costs every read() 15 us",
    )
    launch_options.add_told(parser)
    parser.add_argument(
        "--trace", metavar="FILE", default="", help="a line for every call and event, as strace has it; - is stderr"
    )
    parser.add_argument(
        "--sanitize",
        "--sanitize=report",
        action="store_const",
        const="report",
        default="",
        help="tell on stderr of DMA through translations that should have been flushed",
    )
    parser.add_argument(
        "--sanitize=fail", action="store_const", const="fail", dest="sanitize", help="and end with status 66"
    )
    launch_options.add_command(parser)
    parser.set_defaults(run=_run)


def _fd_base(text: str) -> int:
    value = int(text)
    if not 3 <= value < 1 << 20:
        raise argparse.ArgumentTypeError(f"{text} is not between 3 and 1048575")
    return value


def _run(args: argparse.Namespace) -> int:
    return launch_options.launch("run", lambda: _start(args))


def _start(args: argparse.Namespace) -> int:
    """UsageError, RunError."""
    from .run import Options, run

    command = launch_options.command(args)
    if not command:
        raise UsageError("give a command: iommufdctl run -- CMD")
    machine = launch_options.machine(args)
    options = Options(
        command, machine, args.socket_path, args.caller, args.explain, args.summary, args.proc, args.fd_base,
        args.trace, args.sanitize, args.kvm,
    )  # fmt: skip
    return run(options)
