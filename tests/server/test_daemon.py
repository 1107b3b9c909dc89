"""The daemon as a process: how it starts, what it says, how it ends, and clients that die on it."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from iommufd_uapi import admin, iommufd, wire
from iommufdd import __version__
from tests.server.conftest import Daemon, Start, eventually
from tests.server.peer import hello, ioctl

ACTIVATE = """
import os, sys
for number, fd in enumerate(sys.argv[1].split(","), 3):
    os.dup2(int(fd), number)
os.environ["LISTEN_PID"] = str(os.getpid())
os.execvp(sys.argv[2], sys.argv[2:])
"""


def listening(path: Path, kind: int = socket.SOCK_SEQPACKET) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, kind)
    sock.bind(str(path))
    sock.listen()
    return sock


def run(*options: str) -> subprocess.CompletedProcess[str]:
    """The command, when it is not to stay."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    environment.pop("NOTIFY_SOCKET", None)
    command = [sys.executable, "-m", "iommufdd.cli", *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


# ---- options -----------------------------------------------------------------------------------------------


def test_version_needs_no_slow_import() -> None:
    code = (
        "import sys\nfrom iommufdd.cli import main\n"
        "try: main(['--version'])\nexcept SystemExit: pass\n"
        "print(sorted({'trio', 'construct', 'msgspec', 'iommufdd.context'} & set(sys.modules)))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == f"iommufdd {__version__}\n[]\n"


def test_capabilities() -> None:
    done = run("--print-capabilities")
    assert done.returncode == 0
    told = json.loads(done.stdout)
    assert told["protocol"] == wire.VERSION
    assert told["ioctls"]["IOMMU_IOAS_ALLOC"] == iommufd.IoasAlloc.CMD
    assert told["limits"]["packet_bytes"] == wire.MAX_PACKET


@pytest.mark.parametrize(
    "options",
    [["--no-such"], ["--mode", "9"], ["--caller", "who=me"], ["--spin-us", "-1"], ["--fd", "x"], ["stray"]],
)
def test_wrong_usage(options: list[str]) -> None:
    done = run(*options)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_help_names_every_option() -> None:
    done = run("--help")
    assert done.returncode == 0
    for word in ("--socket-path", "--fd", "--terminate", "exit status:", "examples:"):
        assert word in done.stdout


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ([], "nothing to serve"),
        (["--fd", "77"], "fd 77"),
        (["--fd", "2"], "fd 2"),
        (["--socket-path", "/nonexistent/iommufdd.sock"], "No such file"),
        (["--socket-path", "/tmp/" + "x" * 120], "cannot listen"),
    ],
)
def test_start_failures(options: list[str], reason: str) -> None:
    done = run(*options)
    assert done.returncode == 1
    assert reason in done.stderr
    assert len(done.stderr.splitlines()) == 1


# ---- sockets -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_life(start: Start, how: int) -> None:
    daemon = start("--mode", "0600")
    assert stat.S_IMODE(os.stat(daemon.path).st_mode) == 0o600
    assert stat.S_IMODE(os.stat(daemon.path + ".admin").st_mode) == 0o600
    peer = daemon.connect()
    assert peer.ioas() == 1
    assert daemon.stop(how) == 0
    assert peer.hung_up()
    peer.close()
    assert not os.path.exists(daemon.path)
    assert not os.path.exists(daemon.path + ".admin")


def test_what_systemd_is_told(start: Start) -> None:
    daemon = start(wait=False)
    assert "STATUS=" in daemon.wait_ready()
    daemon.process.send_signal(signal.SIGTERM)
    assert daemon.ready.recv(4096).decode().startswith("STOPPING=1")


def test_notify_socket_that_is_not_there(start: Start) -> None:
    daemon = start(wait=False, env={"NOTIFY_SOCKET": "/nonexistent"})
    eventually(lambda: os.path.exists(daemon.path + ".admin"))
    eventually(lambda: "event=notify-failed" in daemon.log())


def test_default_mode(daemon: Daemon) -> None:
    assert stat.S_IMODE(os.stat(daemon.path).st_mode) == 0o660


def test_live_socket_is_not_stolen(daemon: Daemon) -> None:
    done = run("--socket-path", daemon.path)
    assert done.returncode == 1
    assert "another process" in done.stderr
    assert daemon.connect().ioas() == 1


def test_live_socket_of_another_type_is_not_stolen(tmp_path: Path) -> None:
    with listening(tmp_path / "x", socket.SOCK_STREAM):
        assert "another process" in run("--socket-path", str(tmp_path / "x")).stderr


def test_dead_socket_is_replaced(start: Start) -> None:
    first = start()
    assert first.stop(signal.SIGKILL) == -signal.SIGKILL
    assert os.path.exists(first.path)
    second = start("--socket-path", first.path, "--admin-socket", "", socket_path=False)
    assert second.connect(first.path).ioas() == 1
    assert second.stop() == 0
    assert not os.path.exists(first.path)


def test_a_file_that_is_no_socket_stays(tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_text("data")
    assert "is no socket" in run("--socket-path", str(path)).stderr
    assert path.read_text() == "data"


def test_socket_file_of_a_successor_is_left_alone(start: Start) -> None:
    daemon = start()
    os.unlink(daemon.path)
    with listening(Path(daemon.path)):
        assert daemon.stop() == 0
        assert os.path.exists(daemon.path)


def test_inherited_listening_socket(start: Start, tmp_path: Path) -> None:
    with listening(tmp_path / "given") as sock:
        daemon = start("--fd", str(sock.fileno()), socket_path=False, pass_fds=[sock.fileno()])
        assert daemon.connect(str(tmp_path / "given")).ioas() == 1


def test_inherited_connection(start: Start) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    options = ("--fd", str(theirs.fileno()), "--terminate")
    daemon = start(*options, socket_path=False, pass_fds=[theirs.fileno()])
    theirs.close()
    peer = daemon.connect(ours)
    assert peer.ioas() == 1
    peer.close()
    assert daemon.process.wait(30) == 0


def test_socket_activation(start: Start, tmp_path: Path) -> None:
    with listening(tmp_path / "main") as main, listening(tmp_path / "adm", socket.SOCK_STREAM) as adm:
        fds = [main.fileno(), adm.fileno()]
        wrapper = (sys.executable, "-c", ACTIVATE, ",".join(map(str, fds)))
        environment = {"LISTEN_FDS": "2", "LISTEN_FDNAMES": "iommufdd:admin"}
        daemon = start(socket_path=False, wrapper=wrapper, pass_fds=fds, env=environment)
        peer = daemon.connect(str(tmp_path / "main"))
        assert peer.ioas() == 1
        client = socket.socket(socket.AF_UNIX)
        client.connect(str(tmp_path / "adm"))
        client.sendall(b'{"request": "stats"}\n')
        assert json.loads(client.recv(1 << 16))["contexts"] == 1
        client.close()
    assert os.path.exists(tmp_path / "main")  # systemd's, not ours


def test_activation_meant_for_another_process() -> None:
    environment = os.environ | {"LISTEN_PID": "1", "LISTEN_FDS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    command = [sys.executable, "-m", "iommufdd.cli"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)


def test_terminate_when_the_last_client_has_left(start: Start) -> None:
    daemon = start("--terminate")
    first, second = daemon.connect(), daemon.connect()
    first.close()
    assert second.ioas() == 1
    assert daemon.process.poll() is None
    second.close()
    assert daemon.process.wait(30) == 0


def test_json_log(start: Start) -> None:
    daemon = start("--log-format", "json", "--log-level", "debug")
    peer = daemon.connect(greet=False)
    peer.send(b"no hello")
    assert peer.hung_up()
    daemon.stop()
    lines = [json.loads(line) for line in daemon.log().splitlines()]
    (line,) = [each for each in lines if each["event"] == "channel-closed"]
    assert (line["pid"], line["level"]) == (os.getpid(), "warning")


def test_one_line_for_a_malformed_packet(daemon: Daemon) -> None:
    peer = daemon.connect()
    peer.send(b"\n\x1b[31m")
    assert peer.hung_up()
    eventually(lambda: "channel-closed" in daemon.log())
    (line,) = [line for line in daemon.log().splitlines() if "channel-closed" in line]
    assert line.startswith(f"level=warning event=channel-closed pid={os.getpid()} uid={os.getuid()} why=")


def test_more_connections_than_descriptors(start: Start) -> None:
    """Every connection is answered: the last ones with EMFILE, and the first ones are served all the while."""
    daemon = start(wrapper=("/bin/sh", "-c", 'ulimit -n 160; exec "$@"', "sh"))
    first = daemon.connect()
    peers = [daemon.connect(greet=False) for _ in range(250)]
    refused = 0
    for peer in peers:
        try:
            peer.send(hello())
        except BrokenPipeError:
            pass
        refused += peer.welcome().error == errno.EMFILE
    assert 150 < refused < 250
    assert first.ioas() == 1
    for peer in peers:
        peer.close()
    with daemon.admin() as teller:
        eventually(lambda: teller.stats().channels == 1)
    assert daemon.connect().ioas() == 1


# ---- clients that die --------------------------------------------------------------------------------------

DIES = """
import sys
from iommufd_uapi import admin, iommufd, wire
from tests.server.peer import *
peer = Peer(sys.argv[1])
ioas, fd = peer.ioas(), memfd(1 << 20)
peer.register(fd, 0, 1 << 20)
peer.access(ioas)
peer.scratch(4096)
packet = ioctl(iommufd.FaultAlloc()) * 8 + ioctl(iommufd.IoasAlloc()) * 100
packet += ioctl(iommufd.IoasMap(flags=6, ioas_id=ioas, user_va=0, length=4096)) * 100
print("ready", flush=True)
while True:
    peer.send(packet, [fd])
    for other in peer.receive()[1]:
        os.close(other)
"""


def steady(counts: admin.Counts) -> dict[str, object]:
    """What must come back to what it was: all but the number of turns."""
    return {name: getattr(counts, name) for name in counts.__struct_fields__ if name != "turns"}


def test_killed_in_the_middle_of_a_batch(daemon: Daemon) -> None:
    with daemon.admin() as teller:
        teller.stats()  # imports and caches of the first time
        before = steady(teller.stats())
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        for _ in range(3):
            children = [
                subprocess.Popen([sys.executable, "-c", DIES, daemon.path], env=environment, stdout=subprocess.PIPE)
                for _ in range(2)
            ]
            for child in children:
                assert child.stdout is not None
                assert child.stdout.readline() == b"ready\n"
            time.sleep(0.2)
            for child in children:
                child.kill()
                child.communicate()
        eventually(lambda: teller.stats().channels == 0)
        assert steady(teller.stats()) == before


def test_one_slow_and_one_noisy_client_do_not_stop_a_third(daemon: Daemon) -> None:
    slow, noisy, third = daemon.connect(), daemon.connect(), daemon.connect()
    batch = ioctl(iommufd.IoasAlloc()) * 500
    for peer in (slow, noisy):
        peer.sock.setblocking(False)
        try:
            while True:
                peer.send(batch)
        except BlockingIOError:
            pass
    started = time.monotonic()
    for at in range(100):
        assert third.ioas() == at + 1
    assert time.monotonic() - started < 20
    assert daemon.stop() == 0
    for peer in (slow, noisy, third):
        peer.close()
