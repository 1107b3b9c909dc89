"""What fstat() shows, as bytes: where each architecture has its fields (the numbers are the headers')."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

import pytest

from iommufd_uapi.seccomp import ARCHITECTURES
from iommufdd.server.devices import OpenDevice
from iommufdd.server.instance import OpenContext
from iommufdd.server.seccomp import status
from iommufdd.server.serve import Server
from tests.vfio.daemon import machine_with_devices

if TYPE_CHECKING:
    from collections.abc import Iterator

    from iommufdd.server.devices import Opened


class File:
    """As much of an Installed as is asked."""

    def __init__(self, opened: Opened) -> None:
        self.opened = opened
        self.probe = os.memfd_create("test")


class Memory:
    def read(self, addr: int, length: int) -> bytes:
        return b"\0"[:length]

    def write(self, addr: int, data: bytes) -> int:
        self.data = data
        return len(data)


class Thread:
    def __init__(self) -> None:
        self.caller = self
        self.memory = Memory()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server(machine_with_devices)
    yield server
    server.close()


def show(name: str, call: str, file: File, *args: int) -> bytes:
    numbers, thread = ARCHITECTURES[name], Thread()
    fill = status.table(numbers)[getattr(numbers, call)]
    assert fill(thread, file, [0, *args]) == 0  # type: ignore[arg-type]
    return thread.memory.data


def number(data: bytes, at: int, size: int) -> int:
    return int.from_bytes(data[at : at + size], "little")


def test_where_the_fields_are(server: Server) -> None:
    device = OpenDevice(server.instances.join(""), "vfio2", 0)
    file = File(device)
    inode = os.fstat(file.probe).st_ino
    wanted = (stat.S_IFCHR | 0o660, os.makedev(511, 2), 1)
    x86 = show("x86_64", "fstat", file, 0)
    assert (number(x86, 24, 4), number(x86, 40, 8), number(x86, 16, 8)) == wanted
    assert (len(x86), number(x86, 48, 8), number(x86, 56, 8)) == (144, 0, 4096)
    arm = show("aarch64", "newfstatat", file, 0, 0, status.AT_EMPTY_PATH)
    assert (number(arm, 16, 4), number(arm, 32, 8), number(arm, 20, 4)) == wanted
    assert (len(arm), number(arm, 48, 8), number(arm, 56, 4)) == (128, 0, 4096)
    both = show("aarch64", "statx", file, 0, status.AT_EMPTY_PATH, 0, 0)
    assert (number(both, 28, 2), number(both, 128, 4), number(both, 132, 4)) == (wanted[0], 511, 2)
    assert len(both) == 256
    assert number(x86, 8, 8) == number(arm, 8, 8) == number(both, 32, 8) == inode
    assert number(x86, 88, 8) == number(arm, 88, 8) == number(both, 112, 8)  # st_mtime
    os.close(file.probe)
    device.file.put()


def test_the_numbers_of_the_nodes(server: Server) -> None:
    instance = server.instances.join("")
    contexts = [OpenContext(instance, 0, container=container) for container in (False, True)]
    assert [os.minor(status.rdev(context)) for context in contexts] == [124, 196]
    assert {os.major(status.rdev(context)) for context in contexts} == {10}
    for context in contexts:
        context.ctx.put()
