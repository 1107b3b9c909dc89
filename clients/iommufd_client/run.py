"""Room client: `iommufdctl run -- CMD`. CMD and its children see a /dev/iommu; their calls go to a daemon.

A filter notifies the few calls that matter (filter.py). The listener goes to the daemon; a child of ours, CMD's
parent, stays as keeper with a copy of it, so that a dead daemon means ENODEV, not ENOSYS for every open (keeper.py).
"""

from __future__ import annotations

import array
import ctypes
import fcntl
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import traceback
from typing import TYPE_CHECKING, NamedTuple

from iommufd_uapi import seccomp

from .filter import program
from .follower import Follower
from .keeper import Keeper, RunError, check_welcome, die_with_parent, wait_for_keeper
from .machine_options import Choice

if TYPE_CHECKING:
    from collections.abc import Callable

PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 36, 38
SECCOMP_FILTER_FLAG_NEW_LISTENER = seccomp.SECCOMP_FILTER_FLAG_NEW_LISTENER
NOT_EXECUTABLE, NOT_FOUND = 126, 127

HELLO = struct.Struct("<IHHIIQQ32s32s")  # struct iofd_hello (iommufd_uapi.wire, which takes long to import)
MAGIC, VERSION, SUPERVISE = 0x4446_4F49, 1, 3
EXPLAIN, SUMMARY, PROC, REACH, TRACE = 1, 2, 4, 32, 64
KVM = 512
SANITIZE = {"": 0, "report": 128, "fail": 128 | 256}

BASE, ROOM = 900, 124  # the daemon's descriptors: from 900 on, or the last 124 numbers below a lower limit


class Options(NamedTuple):
    """What the command line says."""

    command: list[str]
    machine: Choice = Choice([], "")
    socket_path: str = ""  # of a daemon that runs already; else a private one is started
    caller: str = ""
    explain: bool = False
    summary: bool = False
    proc: bool = False
    fd_base: int = 0  # lowest number for descriptors that the daemon installs
    trace: str = ""  # a file for the events, "-" for stderr
    sanitize: str = ""  # "report", "fail"
    kvm: bool = False  # /dev/kvm is the daemon's


def run(options: Options) -> int:
    """Run CMD; its exit status as a shell has it. RunError, OSError."""
    numbers = seccomp.native()
    if numbers is None:
        raise RunError(f"not made for {os.uname().machine}: x86_64 and aarch64 only")
    return with_keeper(lambda tell: _keep(options, numbers, tell))


def with_keeper(keep: Callable[[int], int]) -> int:
    """Start CMD and stay while it runs, in a child, which is CMD's ancestor; its exit status.

    What `keep` is given is for Keeper: the pipe by which it tells that it stays in the background.
    """
    stays, tell = os.pipe()
    parent = os.getpid()
    sys.stdout.flush()
    sys.stderr.flush()
    keeper = os.fork()
    if not keeper:
        os.close(stays)
        _be_keeper(keep, tell, parent)
    os.close(tell)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # the keeper has what there was, and CMD gets it
    return wait_for_keeper(keeper, stays)


def _be_keeper(keep: Callable[[int], int], tell: int, parent: int) -> None:
    """Never returns."""
    status = 1
    try:
        die_with_parent(signal.SIGKILL)
        if os.getppid() == parent:
            ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
            status = keep(tell)
    except (RunError, OSError) as error:
        complain(str(error))
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _keep(options: Options, numbers: seccomp.Syscalls, tell: int) -> int:
    """Start the daemon and CMD; CMD's exit status. RunError, OSError."""
    base = options.fd_base or fd_base()
    waits = bool(options.socket_path) or options.machine != Choice([], "")  # for a daemon that may refuse
    follower = Follower(options.trace) if options.trace else None
    page = notification_page()
    connection, daemon = connect(options.socket_path) if options.socket_path else spawn(options.machine)
    try:
        child, ours = _start(options, numbers, base)
        try:
            listener = _receive_listener(ours, child)
            _hand_over(connection, options, listener, page, base, follower)
            if waits:  # else CMD need not wait for it to start: its first call on /dev/iommu will
                _hear_welcome(connection)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # CMD has what there was
            ours.send(b"go")
        except BaseException:
            ours.close()
            os.waitpid(child, 0)
            raise
        ours.close()
        keeper = Keeper(connection, listener, page, child, numbers, front=tell, welcome=not waits, follower=follower)
        keeper.kvm = options.kvm
        return keeper.run(last_words=options.explain or options.summary or bool(options.sanitize))
    except BaseException:
        connection.close()
        if daemon is not None:
            daemon.wait()
        raise


def notification_page() -> int:
    """The file in which the daemon says which notification it has in work."""
    page = os.memfd_create("iommufdctl-notification", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(page, seccomp.NOTIF_PAGE)
    fcntl.fcntl(page, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    return page


def fd_base() -> int:
    """The lowest number for descriptors that the daemon installs: high, so that read() of others is not notified."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if soft == resource.RLIM_INFINITY or soft >= BASE + ROOM:
        return BASE
    return max(soft - ROOM, soft // 2, 3)


# ---- the daemon ----


def connect(path: str) -> tuple[socket.socket, None]:
    """A daemon that runs. RunError."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        connection.connect(path)
    except OSError as error:
        connection.close()
        raise RunError(f"no daemon answers at {path}: {error.strerror}") from None
    return connection, None


def spawn(machine: Choice) -> tuple[socket.socket, subprocess.Popen[bytes]]:
    """A private daemon, which ends when its connections and processes have; out of reach of the terminal."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    environment = {name: text for name, text in os.environ.items() if not name.startswith(("LISTEN_", "NOTIFY_"))}
    environment["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
    command = [sys.executable, "-m", "iommufdd.cli", "--fd", str(theirs.fileno()), "--terminate"]
    daemon = subprocess.Popen(
        [*command, "--log-level", "warning", *machine.options],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        env=environment,
        pass_fds=[theirs.fileno()],
        start_new_session=True,
    )
    theirs.close()
    return ours, daemon


def _hand_over(
    connection: socket.socket, options: Options, listener: int, page: int, base: int, follower: Follower | None
) -> None:
    """The hello. RunError."""
    told = TRACE * bool(follower) | EXPLAIN * options.explain | SUMMARY * options.summary | SANITIZE[options.sanitize]
    flags = told | PROC * options.proc | KVM * options.kvm | REACH
    hello = HELLO.pack(MAGIC, VERSION, SUPERVISE, flags, 0, base, 0, options.machine.name.encode(), b"")
    theirs = [follower.theirs.fileno()] if follower is not None else []
    rights = array.array("i", [listener, page, *_debug_folder(options), *theirs])
    try:
        connection.sendmsg([hello + options.caller.encode()], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
    except OSError as error:
        raise RunError(f"the daemon went away: {error.strerror}") from None
    if follower is not None:
        follower.theirs.close()


def _hear_welcome(connection: socket.socket) -> None:
    try:
        check_welcome(connection.recv(4096))
    except OSError as error:
        raise RunError(f"the daemon went away: {error.strerror}") from None


def _debug_folder(options: Options) -> list[int]:
    """A folder for the switches of fault injection; a line on stderr when there can be none."""
    if not options.proc:
        return []
    from .debugfs import debug_folder

    try:
        return [debug_folder()]
    except OSError as error:
        sys.stderr.write(f"iommufdctl: --proc without fault injection: {error.strerror or error}\n")
        return []


# ---- CMD ----


def _start(options: Options, numbers: seccomp.Syscalls, base: int) -> tuple[int, socket.socket]:
    """Fork CMD as far as its exec; (pid, the socket through which it sends its listener and waits)."""
    code = program(numbers, base, proc=options.proc, caps="caps=" in options.caller)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    parent = os.getpid()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        theirs.close()
        return child, ours
    status = NOT_FOUND
    try:
        ours.close()
        _become(options.command, numbers, code, theirs, parent)
    except FileNotFoundError:
        complain(f"{options.command[0]}: command not found")
    except OSError as error:
        status = NOT_EXECUTABLE
        complain(f"{options.command[0]}: {error.strerror}")
    except BaseException as error:
        complain(str(error))
    finally:
        os._exit(status)
    raise AssertionError


def complain(text: str) -> None:
    """One line on stderr, unbuffered: also from a child that ends by _exit()."""
    os.write(2, f"iommufdctl: {text}\n".encode())


def _become(command: list[str], numbers: seccomp.Syscalls, code: bytes, theirs: socket.socket, parent: int) -> None:
    """In the child: the filter, the listener to the parent, and exec when it says so."""
    libc = ctypes.CDLL(None, use_errno=True)
    die_with_parent(signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(NOT_EXECUTABLE)
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    listener = install(libc, numbers, code)
    theirs.sendmsg([b"l"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [listener]))])
    os.close(listener)
    if theirs.recv(16) != b"go":
        os._exit(NOT_EXECUTABLE)
    theirs.close()
    for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    os.execvp(command[0], command)


def install(libc: ctypes.CDLL, numbers: seccomp.Syscalls, code: bytes) -> int:
    """seccomp(SECCOMP_SET_MODE_FILTER): the listener. RunError."""
    buffer = ctypes.create_string_buffer(code, len(code))
    fprog = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(code) // 8, ctypes.addressof(buffer)), 16)
    flags = SECCOMP_FILTER_FLAG_NEW_LISTENER | seccomp.SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV
    mode = seccomp.SECCOMP_SET_MODE_FILTER
    listener = libc.syscall(numbers.seccomp, mode, flags, fprog)
    if listener < 0:
        number = ctypes.get_errno()
        hint = {
            16: ": a program around this one listens already (run under run, a container's agent)",
            22: ": Linux 5.19 or later is needed",
        }.get(number, "")
        raise RunError(f"no seccomp listener: {os.strerror(number)}{hint}")
    fcntl.fcntl(listener, fcntl.F_SETFD, fcntl.FD_CLOEXEC)
    return int(listener)


def _receive_listener(ours: socket.socket, child: int) -> int:
    """What the child sends, or its end. RunError."""
    _, ancillary, _, _ = ours.recvmsg(16, socket.CMSG_SPACE(4), socket.MSG_CMSG_CLOEXEC)
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            return array.array("i", data)[0]
    raise RunError("CMD was not started")
