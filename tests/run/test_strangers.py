"""A daemon that may not look into CMD: of a user namespace of its own, and as under Yama's ptrace_scope 1.

In a child user namespace nothing of /proc/PID may be opened, by nobody's ptrace rights; the keeper, outside, may. No
host with Yama is needed for the other: yama/sitecustomize.py takes from the daemon what Yama takes.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from iommufd_client.reach import hand_over
from iommufd_client.testing import Daemon
from iommufd_uapi import seccomp
from iommufdd.errors import ProtocolError
from iommufdd.server.seccomp.reach import Ask, Reach, Waiting

from .test_behaviour import HABITS
from .test_end import _children, _runs, _soon, outlive
from .test_programs import check, programs, some

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .conftest import Run

HERE = Path(__file__).parent
PATIENCE = 10.0
IOAS_ALLOC = 0x3B81
BLIND = {"e11_rlimit_user": "from a user namespace all uids look alike, so that setuid() is not seen"}


@pytest.fixture(scope="session")
def python_outside(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Python that has no rights over processes of our user namespace, whatever its uid."""
    unshare = shutil.which("unshare")
    if unshare is None or subprocess.run([unshare, "--user", "true"], capture_output=True).returncode:
        pytest.skip("no user namespaces here")
    path = tmp_path_factory.mktemp("stranger") / "python"
    path.write_text(f'#!/bin/sh\nexec {unshare} --user {sys.executable} "$@"\n')
    path.chmod(0o755)
    with subprocess.Popen(["sleep", "60"]) as target:
        looked = subprocess.run([path, "-c", f"open('/proc/{target.pid}/maps')"], capture_output=True, text=True)
        target.kill()
    assert "PermissionError" in looked.stderr
    return str(path)


@pytest.fixture(scope="session")
def stranger(python_outside: str) -> Iterator[Daemon]:
    with Daemon(python=python_outside) as daemon:
        yield daemon


@pytest.fixture
def yama(run: Run) -> Run:
    """`run` whose private daemon is as powerless as under Yama."""
    run = type(run)()
    path = os.pathsep.join([str(HERE / "yama"), run.environment["PYTHONPATH"]])
    run.environment = run.environment | {"PYTHONPATH": path}
    return run


# ---- what works ----


@pytest.mark.parametrize("habit", HABITS)
def test_a_stranger_serves_this_habit(run: Run, compiled: Path, stranger: Daemon, habit: str) -> None:
    result = run("--socket-path", stranger.socket_path, "--", compiled / "behave", habit)
    assert (result.returncode, result.stderr) == (0, ""), result.stdout
    assert set(result.stdout.split()) == {"ok"}


@pytest.mark.parametrize("habit", ["threads", "forks", "execs", "dups", "memory"])
def test_under_yama_this_habit_is_served(yama: Run, compiled: Path, habit: str) -> None:
    result = yama("--", compiled / "behave", habit)
    assert (result.returncode, result.stderr) == (0, ""), result.stdout
    assert set(result.stdout.split()) == {"ok"}


def test_a_stranger_gives_the_answers_of_a_real_kernel(run: Run, compiled: Path, stranger: Daemon) -> None:
    check(run, compiled, stranger, some([path for path in programs() if path.stem not in BLIND]))


def test_a_stranger_keeps_nothing(run: Run, compiled: Path, stranger: Daemon) -> None:
    run("--socket-path", stranger.socket_path, "--", compiled / "behave", "queue")  # what the first one needs, stays
    with stranger.admin() as admin:
        before = admin.stats(classes=True)
        for habit in ("threads", "execs", "dups", "rights", "raw", "memory"):
            run("--socket-path", stranger.socket_path, "--", compiled / "behave", habit)
        after = admin.stats(classes=True)
    for count in ("contexts", "channels", "objects", "page_files", "files", "charged_fds", "open_fds"):
        assert getattr(after, count) <= getattr(before, count), count
    grown = {name: count for name, count in after.classes.items() if count > before.classes.get(name, 0)}
    assert not [name for name in grown if ".seccomp." in name and not name.endswith(("Watch", "Fds"))], grown
    assert not stranger.log.count("event=bug")


@pytest.mark.parametrize("way", ["stranger", "yama"])
def test_children_that_outlive_the_command_are_still_below_the_keeper(
    yama: Run, run: Run, compiled: Path, stranger: Daemon, tmp_path: Path, way: str
) -> None:
    answer = tmp_path / "answer"
    options = ("--socket-path", stranger.socket_path) if way == "stranger" else ()
    result = (run if options else yama)(*options, "--", compiled / "behave", "orphan", answer)
    assert result.returncode == 7
    assert _soon(lambda: answer.exists() and answer.read_text() == "served\n")


@pytest.mark.parametrize("way", ["errors", "closes", "processes"])
def test_kvm_of_a_daemon_that_may_not_look(run: Run, compiled: Path, stranger: Daemon, way: str) -> None:
    """Also the descriptor that lies behind a pointer."""
    result = run("--socket-path", stranger.socket_path, "--machine", "@vtd", "--kvm", "--", compiled / "kvm", way)
    assert (result.returncode, result.stdout, result.stderr) == (0, "ok\n", "")


# ---- what does not ----


def test_a_process_that_nobody_may_look_into_is_told_of_once(run: Run, compiled: Path, tmp_path: Path) -> None:
    program = tmp_path / "unreadable"
    shutil.copy(compiled / "behave", program)
    program.chmod(0o111)  # the kernel hides its memory, but from those with CAP_SYS_PTRACE
    drop = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if os.geteuid() == 0 else []
    words = run.words("--", "sh", "-c", f"{program} forks; {program} forks")
    result = subprocess.run([*drop, *words], env=run.environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("iommufd: pid ")
    assert line.endswith(" cannot be looked into (Permission denied): it sees no /dev/iommu")


def test_a_keeper_that_does_not_answer_keeps_nobody_else_waiting(
    run: Run, compiled: Path, stranger: Daemon, tmp_path: Path
) -> None:
    """The child of a CMD that has ended makes its first call while the keeper stands still, and then dies."""
    answer, options = tmp_path / "answer", ("--socket-path", stranger.socket_path)
    with run.start(*options, "--", compiled / "behave", "orphan", answer, "told", stdin=subprocess.PIPE) as process:
        assert _soon(lambda: bool(_children(process.pid)))
        (keeper,) = _children(process.pid)
        assert process.wait(PATIENCE) == 7
        os.kill(keeper, signal.SIGSTOP)
        assert process.stdin is not None
        process.stdin.write("x")
        process.stdin.flush()
        (child,) = _children(keeper)
        assert _soon(lambda: _calls(child) == IOAS_ALLOC)  # the keeper was asked, or is about to be
        with stranger.open() as iommufd:
            assert iommufd.ioas_alloc() == 1
        assert _calls(child) == IOAS_ALLOC
        os.kill(keeper, signal.SIGKILL)
        assert _soon(lambda: not _runs(child))  # its ioctl has failed
        assert not answer.exists()


def _calls(pid: int) -> int:
    """The second argument of the system call that a process is in; -1 if it is in none."""
    words = Path(f"/proc/{pid}/syscall").read_text().split()
    return int(words[2], 16) if len(words) > 3 else -1


def test_a_killed_daemon_means_enodev_to_the_call_that_waits(run: Run, compiled: Path, python_outside: str) -> None:
    outlive(Daemon(python=python_outside, terminate=False), run, compiled)


# ---- what the keeper gives ----


@pytest.fixture
def child() -> Iterator[int]:
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process.pid
        process.kill()


def answer_of(ask: Ask) -> tuple[int, int, list[int]]:
    """errno, value and descriptors that a keeper in our place sends."""
    numbers = seccomp.native()
    assert numbers is not None
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        hand_over(ours, ask.pack(), numbers)
        data, fds, _, _ = socket.recv_fds(theirs, 64, 8)
    error, value = seccomp.REACH_ANSWER.unpack(data)
    return error, value, fds


def close(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


def test_a_keeper_opens_what_is_below_it(child: int) -> None:
    error, _, fds = answer_of(Ask(seccomp.REACH_MM, child))
    assert (error, [os.readlink(f"/proc/self/fd/{fd}") for fd in fds]) == (
        0, [f"/proc/{child}/mem", f"/proc/{child}/maps"],
    )  # fmt: skip
    close(fds)
    assert answer_of(Ask(seccomp.REACH_MM, child, 0, (os.getpid(), child))) == (0, child, [])
    error, _, fds = answer_of(Ask(seccomp.REACH_FILE, child, 1))
    assert (error, os.path.sameopenfile(fds[0], 1)) == (0, True)
    close(fds)
    error, value, fds = answer_of(Ask(seccomp.REACH_NUMBER, child, 1))
    assert (error, fds) == (0, [])
    assert not os.path.lexists(f"/proc/{child}/fd/{value}")


def test_a_keeper_opens_nothing_else(child: int) -> None:
    for pid in (1, os.getpid(), os.getppid()):
        for what in (seccomp.REACH_MM, seccomp.REACH_FILE, seccomp.REACH_FDINFO, seccomp.REACH_CWD):
            error, _, fds = answer_of(Ask(what, pid, 0))
            assert (error in (errno.EPERM, errno.EACCES), fds) == (True, []), (pid, what)
    assert answer_of(Ask(seccomp.REACH_FDINFO, child, 999)) == (errno.ENOENT, 0, [])
    assert answer_of(Ask(seccomp.REACH_FILE, child, 999)) == (errno.EBADF, 0, [])
    assert answer_of(Ask(99, child)) == (errno.EINVAL, 0, [])


# ---- what the daemon takes ----


class Waits:
    """A supervisor, as far as its answers depend on it."""

    def __init__(self) -> None:
        self.alive = True
        self.keeper = os.getpid()

    def valid(self) -> bool:
        return self.alive


def taken(ask: Ask, fds: list[int], *, alive: bool = True, value: int = 0, keeper: int = 0) -> str:
    """What comes of an answer with these descriptors."""
    supervisor = Waits()
    supervisor.alive = alive
    supervisor.keeper = keeper or os.getpid()
    reach = Reach(supervisor)  # type: ignore[arg-type]
    reach.willing = True
    with pytest.raises(Waiting):
        reach._ask(ask)
    reach.waiting = ask
    reach.take(seccomp.REACH_ANSWER.pack(0, value), fds)
    close(fds)
    try:
        reach._ask(ask)
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    finally:
        reach.clear()
    return "taken"


def opened(pid: int, *parts: tuple[str, int]) -> list[int]:
    return [os.open(part if part.startswith("/") else f"/proc/{pid}/{part}", mode) for part, mode in parts]


MAPS = ("maps", os.O_RDONLY)


def test_only_what_was_asked_for_is_taken(child: int) -> None:
    ask = Ask(seccomp.REACH_MM, child)
    good = (("mem", os.O_RDWR), MAPS)
    assert taken(ask, opened(child, *good)) == "taken"
    for fds in (
        opened(os.getpid(), *good),  # another's
        opened(child, ("mem", os.O_RDONLY), MAPS),
        opened(child, MAPS, ("mem", os.O_RDWR)),
        opened(child, ("/dev/zero", os.O_RDWR), MAPS),
        opened(child, ("mem", os.O_RDWR)),
        opened(child, *good, MAPS),
        [],
    ):
        assert taken(ask, fds) == "EACCES"
    assert taken(ask, opened(child, *good), alive=False) == "EACCES"


def test_a_file_that_only_has_the_name_is_not_taken(child: int, tmp_path: Path) -> None:
    ask = Ask(seccomp.REACH_FDINFO, child, 1)
    assert taken(ask, opened(child, ("fdinfo/1", os.O_RDONLY))) == "taken"
    assert taken(ask, opened(child, ("fdinfo/2", os.O_RDONLY))) == "EACCES"
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    assert taken(ask, opened(child, (str(fifo), os.O_RDWR))) == "EACCES"


def test_another_mount_of_proc_is_as_good(child: int) -> None:
    """It has a st_dev of its own: a daemon in a service's sandbox sees another than the keeper."""
    if os.geteuid():
        pytest.skip("only root can mount a second /proc of its own pid namespace")
    unshare = [shutil.which("unshare") or "unshare", "--mount"]
    hold = "mount -t proc proc /proc && echo ready && cat"
    with subprocess.Popen(
        [*unshare, "sh", "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as elsewhere:
        assert elsewhere.stdout is not None
        if elsewhere.stdout.readline() != "ready\n":
            pytest.skip("no /proc can be mounted here")
        root = f"/proc/{elsewhere.pid}/root/proc/{child}"
        assert os.stat(root).st_dev != os.stat("/proc").st_dev
        ask = Ask(seccomp.REACH_MM, child)
        files = ((f"{root}/mem", os.O_RDWR), (f"{root}/maps", os.O_RDONLY))
        assert taken(ask, opened(child, *files)) == "EACCES"  # we do not see that mount
        assert taken(ask, opened(child, *files), keeper=elsewhere.pid) == "taken"
        elsewhere.communicate("")


def test_a_shared_mm_is_one_that_was_offered(child: int) -> None:
    assert taken(Ask(seccomp.REACH_MM, child, 0, (5, 6)), [], value=6) == "taken"
    assert taken(Ask(seccomp.REACH_MM, child, 0, (5, 6)), [], value=7) == "EACCES"


def test_a_keeper_that_was_not_asked_breaks_the_protocol() -> None:
    reach = Reach(Waits())  # type: ignore[arg-type]
    with pytest.raises(ProtocolError):
        reach.take(seccomp.REACH_ANSWER.pack(0, 0), [])
    reach.waiting = Ask(seccomp.REACH_NUMBER, 1)
    with pytest.raises(ProtocolError):
        reach.take(b"short", [])


def test_a_keeper_that_is_gone_gives_nothing() -> None:
    reach = Reach(Waits())  # type: ignore[arg-type]
    reach.willing, reach.waiting = True, Ask(seccomp.REACH_NUMBER, 1)
    reach.give_up()
    for pid in (1, 2):
        with pytest.raises(PermissionError):
            reach.free_number(pid, 0)
