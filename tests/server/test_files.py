"""Descriptors handed out: readiness, the last close wherever it happens, and who can claim to hold one."""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Iterator

import pytest

from iommufdd.server.files import Pipes, file_key
from iommufdd.server.instance import OpenContext
from iommufdd.server.nofile import Nofile
from iommufdd.user import File


class Queue(File):
    """A file with readiness that a test sets."""

    def __init__(self) -> None:
        self.refs = 1
        self.mask = 0
        self.released = False

    def set(self, mask: int) -> None:
        self.mask = mask
        self.changed()

    def poll(self) -> int:
        return self.mask

    def release(self) -> None:
        self.released = True


class Home(OpenContext):
    """Stands for the context."""

    def __init__(self) -> None:
        pass


@pytest.fixture
def pipes() -> Iterator[Pipes]:
    made = Pipes(Nofile(1024))
    yield made
    assert made.nofile.total == 0
    assert not made.by_key
    made.close()


def hand_out(pipes: Pipes, file: Queue) -> int:
    """What a client gets: its descriptor."""
    pipe = pipes.reserve(Home(), 0)
    pipes.publish(pipe, file)
    fd = os.dup(pipe.read_fd)
    pipes.sent(pipe)
    return fd


def readable(fd: int) -> bool:
    return bool(select.select([fd], [], [], 0)[0])


def test_readiness(pipes: Pipes) -> None:
    file = Queue()
    fd = hand_out(pipes, file)
    assert not readable(fd)
    file.set(select.POLLOUT)  # always true of a fault queue, and nothing a read end can show
    assert not readable(fd)
    file.set(select.POLLIN | select.POLLOUT)
    file.set(select.POLLIN)
    assert readable(fd)
    file.set(0)
    assert not readable(fd)
    file.set(select.POLLIN)
    assert os.read(fd, 100) == b"!"  # eaten by a native read: shown again at the next change
    file.set(0)
    file.set(select.POLLIN)
    assert readable(fd)
    os.close(fd)
    pipes.ready(0)
    assert file.released


def test_ready_from_the_start(pipes: Pipes) -> None:
    file = Queue()
    file.mask = select.POLLIN
    fd = hand_out(pipes, file)
    assert readable(fd)
    os.close(fd)
    pipes.ready(0)


def test_change_after_the_last_close(pipes: Pipes) -> None:
    file = Queue()
    fd = hand_out(pipes, file)
    os.close(fd)
    file.set(select.POLLIN)  # nobody is there to be told
    file.set(0)
    pipes.ready(0)
    file.set(select.POLLIN)


def test_last_copy_counts(pipes: Pipes) -> None:
    file = Queue()
    fd = hand_out(pipes, file)
    copies = [os.dup(fd), os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)]
    child = os.fork()
    if not child:
        while True:
            select.select([], [], [])
    left, right = socket.socketpair()
    socket.send_fds(left, [b"x"], [fd])
    os.close(fd)
    for copy in copies:
        pipes.ready(0)
        assert not file.released
        os.close(copy)
    os.kill(child, 9)
    os.waitpid(child, 0)
    pipes.ready(0)
    assert not file.released  # one is still on its way
    left.close()
    right.close()
    pipes.ready(0)
    assert file.released


def test_identity(pipes: Pipes) -> None:
    file = Queue()
    fd = hand_out(pipes, file)
    assert pipes.by_key[file_key(fd)].file is file
    theirs = os.pipe()
    assert file_key(theirs[0]) not in pipes.by_key
    for each in (fd, *theirs):
        os.close(each)
    pipes.ready(0)


@pytest.mark.skipif(os.getuid() != 0, reason="needs a second uid")
def test_a_pipe_of_another_uid_never_counts() -> None:
    """Its inode number may come round; the owner does not."""
    ends = os.pipe()
    before = file_key(ends[0])
    os.fchown(ends[0], 65534, -1)
    assert file_key(ends[0]) != before
    os.close(ends[0])
    os.close(ends[1])


def test_put_back(pipes: Pipes) -> None:
    pipe = pipes.reserve(Home(), 7)
    assert pipes.nofile.taken == {7: 2}
    pipes.release(pipe)
    pipes.sent(pipe)


def test_many_at_once(pipes: Pipes) -> None:
    files = [Queue() for _ in range(1500 if pipes.nofile.limit > 4000 else 300)]
    fds = [hand_out(pipes, file) for file in files]
    for fd in fds:
        os.close(fd)
    pipes.ready(0)
    assert all(file.released for file in files)
