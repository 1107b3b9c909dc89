"""Room client: `iommufdctl mount PATH`. A FUSE file over PATH is /dev/iommu; a daemon answers for it.

We mount, hand the /dev/fuse descriptor to the daemon and keep no copy: if the daemon dies, the kernel ends the mount
(ENOTCONN) instead of letting callers wait.
"""

from __future__ import annotations

import array
import ctypes
import os
import signal
import socket
import sys
import threading
from typing import NamedTuple

from . import namespace, run
from .exact import exact_keeper, exact_listener
from .keeper import FORWARDED, PATIENCE, SI_KERNEL, Keeper, RunError, check_welcome, die_with_parent
from .machine_options import Choice
from .run import EXPLAIN, SUMMARY

MOUNT = 4  # the hello's kind
OTHERS, CONTAINER = 8, 16
DEV_FUSE = "/dev/fuse"
MAX_READ = 40 * 3072  # whole records of a fault queue; less than FUSE's 32 pages
AT_FDCWD, AT_STATX_DONT_SYNC = -100, 0x4000
TOLD = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}  # each ends a mount for everybody


class Options(NamedTuple):
    """What the command line says."""

    path: str
    command: list[str]
    machine: Choice = Choice([], "")
    socket_path: str = ""  # of a daemon that runs already; else a private one is started
    caller: str = ""
    explain: bool = False
    summary: bool = False
    exact: bool = False  # also what never reaches a FUSE file; needs a command


def mount(options: Options) -> int:
    """Mount, and stay until told to stop or until CMD has ended; the exit status. RunError, OSError."""
    if not os.access(DEV_FUSE, os.R_OK | os.W_OK):
        raise RunError(f"{DEV_FUSE} cannot be opened: modprobe fuse, or mode 0666 for it")
    if not options.command and os.geteuid():
        raise RunError("only root can mount for everybody; others give a command: iommufdctl mount PATH -- CMD")
    if options.exact:
        return run.with_keeper(lambda front: _mount(options, front))
    return _mount(options, -1)


def _mount(options: Options, front: int) -> int:
    """`front`: for the keeper of --exact. RunError, OSError."""
    # A private daemon ends when the mount has: nobody waits for it.
    connection, _ = run.connect(options.socket_path) if options.socket_path else run.spawn(options.machine)
    with connection:
        return _command(options, connection, front) if options.command else _everybody(options, connection)


def _hand_over(connection: socket.socket, options: Options, fds: list[int], dev: int, flags: int) -> None:
    """The hello, and the daemon's answer; the descriptors are /dev/fuse, and those of a listener. RunError."""
    flags |= EXPLAIN * options.explain | SUMMARY * options.summary
    flags |= CONTAINER * (os.path.basename(options.path) == "vfio")
    hello = run.HELLO.pack(run.MAGIC, run.VERSION, MOUNT, flags, 0, dev, 0, options.machine.name.encode(), b"")
    rights = socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds)
    try:
        connection.sendmsg([hello + options.caller.encode()], [rights])
        check_welcome(connection.recv(4096))
    except OSError as error:
        raise RunError(f"the daemon went away: {error.strerror}") from None


def _mount_file(path: str) -> tuple[int, int]:
    """Mount over a file; /dev/fuse, and st_dev of what is there now. OSError."""
    device = os.open(DEV_FUSE, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        return device, _mounted(device, path)
    except BaseException:
        os.close(device)
        raise


def _mounted(device: int, path: str) -> int:
    options = f"fd={device},rootmode=100666,user_id=0,group_id=0,allow_other,max_read={MAX_READ}"
    flags = namespace.MS_NOSUID | namespace.MS_NODEV | namespace.MS_NOEXEC  # as a PROT_EXEC mapping gets EPERM there
    namespace.mount("iommufd", path, "fuse.iommufd", flags, options)
    found = (ctypes.c_uint32 * 64)()  # struct statx; nobody answers for the file yet, so nothing may be asked
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.statx(AT_FDCWD, os.fsencode(path), AT_STATX_DONT_SYNC, 0, found) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), path)
    return os.makedev(found[34], found[35])


# ---- for everybody ----


def _everybody(options: Options, connection: socket.socket) -> int:
    path = os.path.abspath(options.path)
    made = _make_file(path)
    try:
        device, dev = _mount_file(path)
    except OSError as error:
        if made:
            os.unlink(path)
        raise RunError(f"cannot mount on {path}: {error.strerror}") from None
    try:
        try:
            _hand_over(connection, options, [device], dev, OTHERS)
        finally:
            os.close(device)
        signal.pthread_sigmask(signal.SIG_BLOCK, TOLD)  # before anybody knows that we are here to be told
        print(f"{path} is ready; SIGINT or SIGTERM ends it", flush=True)
        return _until_told(connection)
    finally:
        namespace.unmount(path)
        if made:
            os.unlink(path)


def _make_file(path: str) -> bool:
    """An empty file to mount on, unless there is one. OSError."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o666))
    except FileExistsError:
        return False
    return True


def _until_told(connection: socket.socket) -> int:
    ended = threading.Event()

    def relay() -> None:
        _relay(connection)
        ended.set()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=relay, daemon=True).start()
    signal.sigwait(TOLD)
    if ended.is_set():
        sys.stderr.write("iommufdctl: the daemon is gone\n")
        return 1
    return 0


def _relay(connection: socket.socket) -> None:
    """Print what the daemon says, to its end."""
    while True:
        try:
            text = connection.recv(65_536)
        except OSError:
            return
        if not text:
            return
        sys.stderr.write("".join(f"iommufd: {line}\n" for line in text.decode(errors="replace").splitlines()))
        sys.stderr.flush()


# ---- for one command ----


def _command(options: Options, connection: socket.socket, front: int) -> int:
    """CMD in a mount namespace of its own, and a user namespace unless we are root; its exit status."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    parent = os.getpid()
    signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED | {signal.SIGCHLD})
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if not child:
        ours.close()
        connection.close()
        _be_child(options, theirs, parent)
    theirs.close()
    try:
        keeper = _serve(options, connection, ours, child, front)
        ours.send(b"go")
    except BaseException:
        ours.close()
        os.waitpid(child, 0)
        raise
    ours.close()
    if keeper is not None:
        return keeper.run(last_words=options.explain or options.summary)
    relay = threading.Thread(target=_relay, args=(connection,), daemon=True)
    relay.start()
    status = _wait(child)
    if options.explain or options.summary:
        relay.join(PATIENCE)
    return status if status >= 0 else 128 - status


def _serve(
    options: Options, connection: socket.socket, ours: socket.socket, child: int, front: int
) -> Keeper | None:
    """What the child has mounted is the daemon's from now on; a keeper if there is a listener to keep. RunError."""
    fds, dev = _receive(ours)
    try:
        if not options.exact:
            _hand_over(connection, options, fds, dev, 0)
            return None
        fds.append(run.notification_page())
        _hand_over(connection, options, fds, dev, 0)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # CMD has what there was
        return exact_keeper(connection, os.dup(fds[1]), fds[2], child, front)
    finally:
        for fd in fds:
            os.close(fd)


def _receive(ours: socket.socket) -> tuple[list[int], int]:
    """The child's /dev/fuse, mounted, and its listener if there is one; st_dev of the file. RunError."""
    data, ancillary, _, _ = ours.recvmsg(4096, socket.CMSG_SPACE(8), socket.MSG_CMSG_CLOEXEC)
    for level, kind, rights in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            return list(array.array("i", rights)), int(data)
    raise RunError(data.decode() or "CMD was not started")


def _wait(child: int) -> int:
    """Until CMD has ended; signals go on to it."""
    while True:
        info = signal.sigwaitinfo(FORWARDED | {signal.SIGCHLD})
        if info.si_signo != signal.SIGCHLD:
            if info.si_code != SI_KERNEL:  # else CMD has it already
                os.kill(child, info.si_signo)
            continue
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)


def _be_child(options: Options, theirs: socket.socket, parent: int) -> None:
    """Never returns."""
    status = run.NOT_FOUND
    try:
        _become(options, theirs, parent)
    except FileNotFoundError:
        run.complain(f"{options.command[0]}: command not found")
    except PermissionError as error:
        status = run.NOT_EXECUTABLE
        run.complain(f"{options.command[0]}: {error.strerror}")
    except BaseException as error:
        run.complain(str(error))
    finally:
        os._exit(status)


def _become(options: Options, theirs: socket.socket, parent: int) -> None:
    """The namespaces, the mount, and exec when the daemon serves it. OSError."""
    path = os.path.abspath(options.path)
    try:
        namespace.enter()
        namespace.make_place(path)
        device, dev = _mount_file(path)
    except OSError as error:
        theirs.send(f"no private mount on {path}: {error.strerror or error}".encode())
        os._exit(1)
    try:
        fds = [device, exact_listener()] if options.exact else [device]
    except RunError as error:
        theirs.send(str(error).encode())
        os._exit(1)
    theirs.sendmsg([b"%d" % dev], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])
    for fd in fds:
        os.close(fd)
    if theirs.recv(16) != b"go":
        os._exit(1)
    theirs.close()
    die_with_parent(signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED | {signal.SIGCHLD})
    os.execvp(options.command[0], options.command)
