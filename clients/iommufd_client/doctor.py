"""Room client: `iommufdctl doctor`, what of iommufdd works on this host, and what to do about the rest.

Every check tries the thing itself where it can, and changes nothing that outlives it. Here is what everything needs;
doctor_run.py has what `run` and `mount` need, doctor_program.py which way a given program goes.
"""

from __future__ import annotations

import errno
import os
import sys
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

OK, NOTE, FAIL = "ok", "note", "fail"
MIN_PACKET = 131_072
HUGE = "/sys/kernel/mm/hugepages/hugepages-2048kB"


class Finding(NamedTuple):
    """One check: what it is about, how it went, what was seen, and what to do."""

    topic: str
    verdict: str  #: "ok"; "note": something optional is missing; "fail": iommufdd does not work here
    seen: str
    advice: str = ""


def examine(socket_path: str) -> list[Finding]:
    """All checks, in the order of what is needed first."""
    from . import doctor_run

    found = [finding for check in CHECKS for finding in check(socket_path)]
    return found + [finding for check in doctor_run.CHECKS for finding in check()]


def read_text(path: str) -> str | None:
    """What a small file says; None when it cannot be read."""
    try:
        with open(path, encoding="utf-8") as file:
            return file.read().strip()
    except OSError:
        return None


# ---- needed by everything ----------------------------------------------------------------------------------


def python(_path: str) -> Iterator[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    verdict = OK if sys.version_info >= (3, 11) else FAIL
    yield Finding("Python", verdict, version, "" if verdict == OK else "install Python 3.11 or later")
    system = os.uname()
    if system.sysname == "Linux":
        yield Finding("kernel", OK, f"Linux {system.release} {system.machine}")
    else:
        yield Finding("kernel", FAIL, system.sysname, "iommufdd needs Linux: memfd, SCM_RIGHTS, process_vm_readv")


def sockets(_path: str) -> Iterator[Finding]:
    import socket
    from array import array

    try:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    except OSError as error:
        yield Finding("SOCK_SEQPACKET", FAIL, str(error), "the sandbox forbids Unix sockets of this type")
        return
    with ours, theirs:
        try:
            ours.settimeout(1)
            ours.sendmsg([bytes(MIN_PACKET)], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", [ours.fileno()]))])
            data, ancillary, _, _ = theirs.recvmsg(MIN_PACKET + 1, 64)
        except OSError as error:
            yield Finding("SOCK_SEQPACKET", FAIL, str(error), f"raise net.core.wmem_default above {2 * MIN_PACKET}")
            return
        for _, _, fds in ancillary:
            os.close(int.from_bytes(fds[:4], sys.byteorder))
    if len(data) == MIN_PACKET and ancillary:
        yield Finding("SOCK_SEQPACKET", OK, f"packets of {MIN_PACKET} bytes, with descriptors")
    else:
        yield Finding("SOCK_SEQPACKET", FAIL, f"{len(data)} bytes, {len(ancillary)} descriptors arrived", "")


def daemon(socket_path: str) -> Iterator[Finding]:
    import importlib.util

    from .iommufd import Iommufd

    try:
        with Iommufd(socket_path):
            yield Finding("daemon", OK, f"answers at {socket_path}")
            return
    except OSError as error:
        why = error.strerror or str(error)
    installed = importlib.util.find_spec("iommufdd") is not None
    advice = f"start one: iommufdd --socket-path {socket_path}" if installed else "install the package iommufdd"
    if os.path.exists(socket_path) and not os.access(socket_path, os.W_OK):
        advice = "ask for the group of the socket, or start a daemon of your own"
    yield Finding("daemon", NOTE, f"{socket_path}: {why}", advice)


# ---- memory ------------------------------------------------------------------------------------------------


def memfd(_path: str) -> Iterator[Finding]:
    from .files import sealed_memfd

    try:
        os.close(sealed_memfd("doctor", 4096))
        yield Finding("memfd seals", OK, "guest memory can be mapped by the daemon")
    except OSError as error:
        yield Finding("memfd seals", FAIL, str(error), "guest memory is a sealed memfd: Linux 3.17, no sandbox")


def own_memory(_path: str) -> Iterator[Finding]:
    from ctypes import addressof, c_char

    from .memory import OwnMemory

    page = bytearray(b"doctor")
    memory, address = OwnMemory(), addressof(c_char.from_buffer(page))
    try:
        works = memory.read(address, 6) == page and memory.read(0, 1) == b""
        yield Finding("process_vm_readv", OK if works else NOTE, "raw pointers are read without faults")
    except OSError as error:
        advice = "ioctls with raw pointers need it: allow it in the sandbox (typed methods do not need it)"
        yield Finding("process_vm_readv", NOTE, str(error), advice)


def procmap_query(_path: str) -> Iterator[Finding]:
    """How the daemon looks a VMA up, in CMD's memory as in that of a client."""
    from fcntl import ioctl

    from .memory import PROCMAP_QUERY

    with open("/proc/self/maps", "rb") as maps:
        try:
            ioctl(maps, PROCMAP_QUERY, bytearray(104))
        except OSError as error:
            if error.errno == errno.ENOTTY:
                seen = "not before Linux 6.11: /proc/PID/maps is read as text, 41 us a look-up instead of 1"
                yield Finding("PROCMAP_QUERY", NOTE, seen)
                return
    yield Finding("PROCMAP_QUERY", OK, "permissions of memory are looked up fast")


def huge_pages(_path: str) -> Iterator[Finding]:
    total, free = read_text(f"{HUGE}/nr_hugepages"), read_text(f"{HUGE}/free_hugepages")
    if total is None:
        yield Finding("huge pages", NOTE, "the kernel has no 2 MiB pages", "guest memory without hugetlb works")
    elif free == "0":
        advice = f"for hugetlb guest memory: echo 64 > {HUGE}/nr_hugepages"
        yield Finding("huge pages", NOTE, f"none of {total} free", advice)
    else:
        yield Finding("huge pages", OK, f"{free} of {total} free")


def memlock(_path: str) -> Iterator[Finding]:
    import resource

    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if locked == resource.RLIM_INFINITY or os.geteuid() == 0:
        yield Finding("RLIMIT_MEMLOCK", OK, "unlimited for this caller")
    else:
        advice = "mappings past it answer ENOMEM, as in the kernel: ulimit -l, or iommufdd --caller memlock=..."
        yield Finding("RLIMIT_MEMLOCK", NOTE, f"{locked >> 10} KiB", advice)


CHECKS: tuple[Callable[[str], Iterator[Finding]], ...] = (
    python, sockets, memfd, daemon, own_memory, procmap_query, huge_pages, memlock,
)  # fmt: skip
