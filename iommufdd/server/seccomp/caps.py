"""capget and capset under virtual capabilities: a process sees them as its own, and can drop them."""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING, NamedTuple

from iommufdd.server.credentials import CAPABILITIES

if TYPE_CHECKING:
    from .target import Thread

HEADER = struct.Struct("<Ii")  # struct __user_cap_header_struct: version, pid
VERSIONS = {0x1998_0330: 1, 0x2007_1026: 2, 0x2008_0522: 2}  # how many struct __user_cap_data_struct follow
WORD = (1 << 32) - 1
NOT_OURS = 1 << 60


class Sets(NamedTuple):
    """The three capability sets of a thread."""

    effective: int
    permitted: int
    inheritable: int


def capget(thread: Thread, header_at: int, data_at: int) -> int:
    """The real sets and the virtual ones; NOT_OURS for all the kernel does as well."""
    words = _words(thread, header_at)
    virtual = _virtual(thread)
    if not words or not data_at or not virtual:
        return NOT_OURS
    real = _real(thread)
    virtual &= ~thread.process.dropped
    sets = Sets(real.effective | virtual, real.permitted | virtual, real.inheritable)
    data = _packed(sets, words)
    return 0 if thread.caller.memory.write(data_at, data) == len(data) else -errno.EFAULT


def capset(thread: Thread, header_at: int, data_at: int) -> int:
    """What virtual capabilities are left; NOT_OURS when the real ones are to change."""
    words = _words(thread, header_at)
    virtual = _virtual(thread)
    data = thread.caller.memory.read(data_at, 12 * words)
    if not words or not virtual or len(data) < 12 * words:
        return NOT_OURS
    parts = struct.unpack(f"<{3 * words}I", data)
    wanted = Sets(*(sum(parts[3 * word + at] << 32 * word for word in range(words)) for at in range(3)))
    real, dropped = _real(thread), thread.process.dropped
    if (wanted.effective | wanted.permitted) & virtual & dropped & ~real.permitted:
        return -errno.EPERM
    thread.process.dropped = dropped | virtual & ~wanted.effective
    plain = Sets(wanted.effective & ~virtual, wanted.permitted & ~virtual, wanted.inheritable)
    if plain == real:
        return 0
    # The kernel would refuse ours: it gets the others. The caller's copy stays without them, which nobody looks at.
    thread.caller.memory.write(data_at, _packed(plain, words))
    return NOT_OURS


def _packed(sets: Sets, words: int) -> bytes:
    """struct __user_cap_data_struct[words]"""
    return b"".join(struct.pack("<3I", *(each >> 32 * word & WORD for each in sets)) for word in range(words))


def _words(thread: Thread, header_at: int) -> int:
    """How many words the sets have; 0 for a version, or for another process, that we leave to the kernel."""
    data = thread.caller.memory.read(header_at, HEADER.size)
    if len(data) < HEADER.size:
        return 0
    version, pid = HEADER.unpack(data)
    return VERSIONS.get(version, 0) if pid in (0, thread.tid, thread.process.pid_inside()) else 0


def _virtual(thread: Thread) -> int:
    """The capabilities that the process is said to have and does not; none after setuid()."""
    supervisor = thread.process.supervisor
    names, origin = supervisor.virtual.caps, supervisor.origin
    if names is None or thread.process.uid() != origin.uid:
        return 0
    return sum(1 << CAPABILITIES[name] for name in names) & ~origin.caps


def _real(thread: Thread) -> Sets:
    found = thread.process.status()
    return Sets(*(int(found.get(name, b"0"), 16) for name in (b"CapEff", b"CapPrm", b"CapInh")))
