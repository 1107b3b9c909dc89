"""Who the caller is: from the peer's process, or as given."""

from __future__ import annotations

import os
import re
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from iommufdd.server import credentials
from iommufdd.server.credentials import OWN, UNLIMITED, Memlock, Peer, Virtual, parse_caps, parse_virtual, peer_of
from iommufdd.wiring import new_machine


@pytest.fixture
def pair() -> Iterator[socket.socket]:
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    yield left
    left.close()
    right.close()


def test_peer(pair: socket.socket) -> None:
    assert peer_of(pair) == (os.getpid(), os.geteuid(), os.getegid())


def test_own_capabilities(pair: socket.socket) -> None:
    mask = int(re.findall(r"CapEff:\s+(\w+)", Path("/proc/self/status").read_text())[0], 16)
    expected = {name for name, bit in credentials.CAPABILITIES.items() if mask >> bit & 1}
    assert credentials.capabilities(pair, peer_of(pair)) == expected


def test_a_peer_that_is_gone_has_no_rights(pair: socket.socket) -> None:
    child = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    gone = Peer(int(child.stdout), 0, 0)
    assert credentials.capabilities(pair, gone) == frozenset()
    assert Memlock(gone)() == credentials.DEFAULT_MEMLOCK
    assert Memlock(Peer(0, 0, 0))() == credentials.DEFAULT_MEMLOCK


def test_a_number_that_belongs_to_another_uid_by_now(pair: socket.socket) -> None:
    other = Peer(os.getpid(), os.geteuid() + 1, 0)
    assert credentials.capabilities(pair, other) == frozenset()
    assert Memlock(other)() == credentials.DEFAULT_MEMLOCK


def test_memlock_is_read_when_asked_for() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    limit = Memlock(Peer(os.getpid(), os.geteuid(), os.getegid()))
    try:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, hard))
        assert limit() == 65536
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (131072, hard))
        assert limit() == 131072
    finally:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (soft, hard))


def test_memlock_without_the_right_to_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(pid: int, what: int) -> None:
        raise PermissionError

    expected = Memlock(Peer(os.getpid(), os.geteuid(), os.getegid()))()
    monkeypatch.setattr(resource, "prlimit", refuse)
    assert Memlock(Peer(os.getpid(), os.geteuid(), os.getegid()))() == expected


def test_virtual(pair: socket.socket) -> None:
    machine = new_machine("x")
    task = credentials.task_of(pair, peer_of(pair), machine, parse_virtual("uid=77,caps=ipc_lock,memlock=4096"))
    assert (task.user.uid, task.cap_ipc_lock, task.cap_sys_rawio, task.memlock_pages()) == (77, True, False, 1)
    assert task.user is machine.user(77)
    own = credentials.task_of(pair, peer_of(pair), machine, OWN)
    assert own.user.uid == os.geteuid()


def test_parsing() -> None:
    assert parse_virtual("") == OWN
    assert parse_virtual("uid=1,gid=2,caps=none,memlock=unlimited") == Virtual(1, 2, frozenset(), UNLIMITED)
    assert parse_caps("CAP_IPC_LOCK+sys_rawio+Sys_Resource") == frozenset(credentials.CAPABILITIES)


@pytest.mark.parametrize("text", ["uid", "uid=x", "uid=-1", "memlock=1k", "caps=root", "who=1", "uid=1,uid=2", "=1"])
def test_not_parsed(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_virtual(text)
