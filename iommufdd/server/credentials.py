"""Who the caller is: struct task_struct of a peer, from SO_PEERCRED and /proc, or as told at the start."""

from __future__ import annotations

import functools
import os
import re
import resource
import signal
import socket
import struct
from typing import TYPE_CHECKING, NamedTuple

from iommufdd.user import Task

if TYPE_CHECKING:
    from iommufdd.machine import Machine

SO_PEERPIDFD = 77  # since Linux 6.5
DEFAULT_MEMLOCK = 8 << 20
CAPABILITIES = {"CAP_IPC_LOCK": 14, "CAP_SYS_RAWIO": 17, "CAP_SYS_RESOURCE": 24}  # those iommufd asks for
UNLIMITED = 2**64 - 1  # RLIM_INFINITY as the kernel counts it


class Peer(NamedTuple):
    """struct ucred: who connected."""

    pid: int
    uid: int
    gid: int


class Virtual(NamedTuple):
    """Credentials given to every caller instead of its own; None keeps the peer's."""

    uid: int | None = None
    gid: int | None = None
    caps: frozenset[str] | None = None
    memlock: int | None = None


OWN = Virtual()


def peer_of(connection: socket.socket) -> Peer:
    """SO_PEERCRED, as it was at connect()."""
    return Peer(*struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)))


def task_of(connection: socket.socket, peer: Peer, machine: Machine, virtual: Virtual) -> Task:
    """The peer's credentials now; its RLIMIT_MEMLOCK is read again whenever pages are charged."""
    caps = virtual.caps if virtual.caps is not None else capabilities(connection, peer)
    memlock = virtual.memlock if virtual.memlock is not None else Memlock(peer)
    uid = peer.uid if virtual.uid is None else virtual.uid
    task = Task(machine.user(uid), memlock=memlock, name=f"pid {peer.pid}", pid=peer.pid)
    set_capabilities(task, caps)
    return task


def set_capabilities(task: Task, caps: frozenset[str]) -> None:
    """Of these, by their names in capabilities(7), the ones that iommufd asks for."""
    task.cap_ipc_lock = "CAP_IPC_LOCK" in caps
    task.cap_sys_rawio = "CAP_SYS_RAWIO" in caps
    task.cap_sys_resource = "CAP_SYS_RESOURCE" in caps


def capabilities(connection: socket.socket, peer: Peer) -> frozenset[str]:
    """The effective capabilities of a peer, none when in doubt.

    capable() asks for rights in the initial user namespace: those of a peer in another one do not count.
    """
    try:
        pidfd = struct.unpack("i", connection.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD, 4))[0]
    except OSError:
        pidfd = -1
    try:
        status = _read(f"/proc/{peer.pid}/status")
        same_space = _read(f"/proc/{peer.pid}/uid_map") == _own_uid_map()
        alive = pidfd < 0 or _alive(pidfd)  # if so, what was read is not of a later process with that number
    except OSError:
        return frozenset()
    finally:
        if pidfd >= 0:
            os.close(pidfd)
    effective = re.search(r"^CapEff:\s*([0-9a-f]+)$", status, re.MULTILINE)
    if effective is None or not alive or not same_space or _uid(status) != peer.uid:
        return frozenset()
    mask = int(effective[1], 16)
    return frozenset(name for name, bit in CAPABILITIES.items() if mask >> bit & 1)


class Memlock:
    """RLIMIT_MEMLOCK of a process, in bytes; the default limit once it cannot be had."""

    __slots__ = ("peer",)

    def __init__(self, peer: Peer) -> None:
        self.peer = peer

    def __call__(self) -> int:
        pid = self.peer.pid
        try:
            if pid <= 0 or _uid(_read(f"/proc/{pid}/status")) != self.peer.uid:
                return DEFAULT_MEMLOCK
            try:
                soft = resource.prlimit(pid, resource.RLIMIT_MEMLOCK)[0]
            except PermissionError:
                soft = _memlock_of_limits(_read(f"/proc/{pid}/limits"))
        except (OSError, ValueError):
            return DEFAULT_MEMLOCK
        return UNLIMITED if soft == resource.RLIM_INFINITY else soft


def parse_virtual(text: str) -> Virtual:
    """`uid=1000,gid=1000,caps=ipc_lock+sys_rawio,memlock=65536`, or part of it; ValueError tells what is wrong."""
    found: dict[str, str] = {}
    for part in filter(None, text.split(",")):
        key, equals, value = part.partition("=")
        if not equals or key not in Virtual._fields or key in found:
            raise ValueError(f"{part!r} is not one of uid=N, gid=N, caps=NAME+NAME, memlock=BYTES")
        found[key] = value
    return Virtual(
        uid=_number(found.get("uid"), "uid"),
        gid=_number(found.get("gid"), "gid"),
        caps=parse_caps(found["caps"]) if "caps" in found else None,
        memlock=UNLIMITED if found.get("memlock") == "unlimited" else _number(found.get("memlock"), "memlock"),
    )


def parse_caps(text: str) -> frozenset[str]:
    """`ipc_lock+sys_rawio`, with or without `cap_`, in either case; ValueError for another capability."""
    names = frozenset(
        "CAP_" + name.upper().removeprefix("CAP_") for name in text.split("+") if name not in ("", "none")
    )
    if unknown := names - CAPABILITIES.keys():
        raise ValueError(f"{min(unknown)} is not one of {', '.join(CAPABILITIES)}")
    return names


def _number(text: str | None, what: str) -> int | None:
    if text is None:
        return None
    if not text.isdecimal():
        raise ValueError(f"{what}={text} is not a number")
    return int(text)


def _read(path: str) -> str:
    with open(path, encoding="ascii", errors="replace") as file:
        return file.read()


@functools.cache
def _own_uid_map() -> str:
    return _read("/proc/self/uid_map")


def _uid(status: str) -> int:
    """The effective uid in a /proc/PID/status."""
    found = re.search(r"^Uid:\s*\d+\s+(\d+)", status, re.MULTILINE)
    return int(found[1]) if found else -1


def _alive(pidfd: int) -> bool:
    try:
        signal.pidfd_send_signal(pidfd, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _memlock_of_limits(limits: str) -> int:
    """The soft limit in a /proc/PID/limits, which everybody may read; ValueError."""
    found = re.search(r"^Max locked memory\s+(\d+|unlimited)", limits, re.MULTILINE)
    if found is None:
        raise ValueError("no line 'Max locked memory'")
    return UNLIMITED if found[1] == "unlimited" else int(found[1])
