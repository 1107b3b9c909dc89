"""Room uapi: what happens in a daemon, as events, and the line of text that people read for each.

The event port of the core carries them (iommufdd/user.py), the admin socket streams them as JSON lines
(admin.Trace), `iommufdctl trace` and `run --trace` print them. A model of hardware makes its events from what it
knows and leaves the fields of `Event` alone: whoever carries the event on fills them in.

Names and decoded fields are text already (iommufd_uapi.decode): only the daemon knows what an id stands for.
"""

from __future__ import annotations

import errno
import os
from typing import TypeAlias

import msgspec

NEVER_FLUSHED = "never flushed"  #: Stale.outcome
DONE = "done"  #: Dma.outcome of a transfer that went through


class Event(msgspec.Struct, tag_field="kind", kw_only=True, omit_defaults=True, gc=False):
    """Base of all events: when, on which machine, and on whose behalf if a call was in work."""

    time: int = 0  #: us, CLOCK_MONOTONIC
    machine: str = ""  #: empty for a private one
    pid: int = 0  #: of the process, as the daemon sees it; 0 for hardware on its own
    comm: str = ""  #: its name


class Ioctl(Event, tag="ioctl", gc=False):
    """One ioctl, answered."""

    context: int  #: inode of the open /dev/iommu, as in `show`; of a VFIO device the one it is bound to, or 0
    name: str  #: the macro; of IOMMU_TEST_CMD that of the operation
    cmd: int
    fields: dict[str, str]  #: what the caller passed, in the order of the struct
    result: int  #: or minus an errno
    back: dict[str, str]  #: what came back
    duration: int  #: us
    reason: str = ""  #: of an error
    device: str = ""  #: the VFIO device that was called; empty when it was /dev/iommu


class Queue(Event, tag="queue", gc=False):
    """A read() or write() of an event queue."""

    context: int
    op: str  #: "read", "write"
    queue: str  #: "fault:3", "veventq:5"
    count: int  #: bytes asked for
    records: list[str]  #: what was read or written; a last "..." if there was more
    result: int  #: bytes, or minus an errno
    duration: int  #: us
    reason: str = ""


class Object(Event, tag="object", gc=False):
    """An object was born, or goes."""

    context: int
    verb: str  #: "alloc", "destroy"
    object: str  #: "ioas:1"


class Dma(Event, tag="dma", gc=False):
    """A transfer of a device."""

    device: str  #: as the machine description names it
    pasid: int | None  #: none: a request without PASID
    iova: int
    length: int  #: bytes
    op: str  #: "read", "write", "fill", "compare", "privileged read", ...
    outcome: str = DONE  #: or why it did not go through, and how far it came


class Fault(Event, tag="fault", gc=False):
    """A translation that failed, as the IOMMU reports it."""

    device: str
    pasid: int | None
    iova: int
    perm: str  #: what was asked for: "read", "privileged write", "execute"
    code: int  #: the number of the reason in the IOMMU's own specification
    reason: str


class PageRequest(Event, tag="page_request", gc=False):
    """A device asks for a page (PRI)."""

    device: str
    pasid: int | None
    iova: int  #: of the page
    perm: str
    group: int  #: of the requests that are answered together
    last: bool = True  #: of its group


class PageResponse(Event, tag="page_response", gc=False):
    """The answer to a group of page requests."""

    device: str
    pasid: int | None
    group: int
    code: str  #: "SUCCESS", "INVALID", ...


class Invalidate(Event, tag="invalidate", gc=False):
    """One command to a cache."""

    iommu: str
    cache: str  #: "IOTLB", "device TLB", "PASID cache"
    granularity: str  #: "page", "PASID", "domain", "all"
    tag: str  #: what it names, in the words of the IOMMU's specification: "did 3, pasid 1"
    first: int = 0  #: of a "page" one
    last: int = 2**64 - 1
    leaf: bool = False  #: tables that are kept stay
    user: bool = False  #: the user asked for it, not the driver
    dropped: int = 0  #: translations
    tables: int = 0  #: tables, or contexts, that were kept


class Replace(Event, tag="replace", gc=False):
    """A device goes from one domain to another; "" is none, so attach and detach are told too."""

    device: str
    pasid: int  #: 0: that of requests without one
    old: str  #: "hwpt_paging:4"
    new: str
    verdict: str = ""  #: of one domain for another: "hitless", or "window" when a walk could find neither in between
    opens: str = ""  #: the store that opens the window


class Stale(Event, tag="stale", gc=False):
    """The sanitizer has found a use of a translation that memory no longer gives, or has settled what became of it."""

    device: str
    pasid: int | None
    iova: int
    perm: str  #: "read", "privileged write"
    outcome: str  #: "not flushed yet", "used before the flush came", "never flushed"
    cache: str  #: what gave it
    gave: str
    says: str  #: what memory says
    changed: str  #: the entry
    right: str  #: the invalidation that was due


class Misread(Event, tag="misread", gc=False):
    """A device's walk has met an entry of a VM's own table that means another thing to the VM's CPU."""

    hwpt: str  #: "hwpt_kvm:2"
    gpa: int
    level: int
    entry: int
    reason: str


class Lost(Event, tag="lost", gc=False):
    """The reader was too slow: so many events are missing here."""

    count: int


AnyEvent: TypeAlias = (
    Ioctl | Queue | Object | Dma | Fault | PageRequest | PageResponse | Invalidate | Replace | Stale | Misread | Lost
)
#: words of `--only`
KINDS: dict[str, frozenset[type[Event]]] = {
    "ioctl": frozenset([Ioctl]),
    "queue": frozenset([Queue]),
    "dma": frozenset([Dma]),
    "fault": frozenset([Fault, PageRequest, PageResponse, Misread]),
    "invalidate": frozenset([Invalidate]),
    "replace": frozenset([Replace]),
    "stale": frozenset([Stale]),
    "object": frozenset([Object]),
}
USUAL = frozenset(KINDS) - {"object"}  #: objects come and go by ioctls, whose lines tell them already


class Filter(msgspec.Struct, frozen=True):
    """Which events a reader wants."""

    pids: frozenset[int] = frozenset()  #: of processes; none: all
    machine: str | None = None
    only: frozenset[str] = USUAL  #: words of KINDS
    failed: bool = False  #: nothing but what failed

    def __call__(self, event: Event) -> bool:
        """Whether to tell."""
        return (
            any(type(event) in KINDS[word] for word in self.only)
            and (not self.pids or event.pid in self.pids)
            and (self.machine is None or event.machine == self.machine)
            and (not self.failed or failed(event))
        )


def failed(event: Event) -> bool:
    """An error, a transfer that did not go through, a fault or misread, a page request not answered with SUCCESS."""
    match event:
        case Ioctl() | Queue():
            return event.result < 0
        case Dma():
            return event.outcome != DONE
        case PageResponse():
            return event.code != "SUCCESS"
        case Stale():
            return event.outcome == NEVER_FLUSHED
    return isinstance(event, Fault | Misread)


# ---- for people --------------------------------------------------------------------------------------------


def line(event: Event, since: int) -> str:
    """One line, without its newline: seconds from `since` (us, as Event.time), who, what, the result, how long.

    strace's shape: `0.001234 4711 (vmm) IOMMU_IOAS_ALLOC(iommufd:9, {flags=0}) = 0 {out_ioas_id=ioas:1} <0.000021>`.
    """
    who = f"{event.pid} ({event.comm})" if event.pid else "-"
    where = f"[{event.machine}] " if event.machine else ""
    text = f"{(event.time - since) / 1e6:.6f} {who} {where}{_what(event)}"
    return text if text.isprintable() else "".join(map(_printable, text))


def outcome(result: int, reason: str) -> str:
    """`= 0`, or `= -1 EINVAL (Invalid argument): the reason`."""
    if result >= 0:
        return f"= {result}"
    why = f": {reason}" if reason else ""
    return f"= -1 {errno_name(-result)} ({os.strerror(-result)}){why}"


def errno_name(number: int) -> str:
    """EINVAL. Of two names for one number, the kernel's."""
    return "EOPNOTSUPP" if number == errno.EOPNOTSUPP else errno.errorcode.get(number, str(number))


def braces(fields: dict[str, str]) -> str:
    """{size=12, flags=0}"""
    return "{" + ", ".join(f"{name}={text}" for name, text in fields.items()) + "}"


def _what(event: Event) -> str:
    match event:
        case Ioctl():
            return _ioctl(event)
        case Queue():
            return _queue(event)
        case Object():
            return f"{event.verb} {event.object} of iommufd:{event.context}"
        case Lost():
            return f"... {event.count} events lost"
        case Dma():
            return f"dma {_device(event)} {event.op} {event.iova:#x}+{event.length:#x} = {event.outcome}"
        case Fault():
            return f"fault {_device(event)} {event.perm} iova {event.iova:#x}: {event.code:#x} {event.reason}"
        case PageRequest():
            more = "" if event.last else ", more to come"
            return f"page request {_device(event)} {event.perm} {event.iova:#x} (group {event.group}{more})"
        case PageResponse():
            return f"page response {_device(event)} (group {event.group}) = {event.code}"
        case Invalidate():
            return _invalidate(event)
        case Replace():
            return _replace(event)
        case Stale():
            return _stale(event)
        case Misread():
            return f"misread {event.hwpt} level {event.level} {event.gpa:#x}: {event.entry:#018x}: {event.reason}"
    raise TypeError(f"no event: {event!r}")


def _ioctl(event: Ioctl) -> str:
    passed = f", {braces(event.fields)}" if event.fields else ""
    back = f" {braces(event.back)}" if event.back else ""
    result = outcome(event.result, event.reason)
    file = event.device or f"iommufd:{event.context}"
    return f"{event.name}({file}{passed}) {result}{back} <{event.duration / 1e6:.6f}>"


def _queue(event: Queue) -> str:
    records = f"[{', '.join(event.records)}]" if event.records else ""
    passed, back = (f", {records}", "") if records and event.op == "write" else ("", f" {records}" if records else "")
    result = outcome(event.result, event.reason)
    return f"{event.op}({event.queue}{passed}, {event.count}) {result}{back} <{event.duration / 1e6:.6f}>"


def _invalidate(event: Invalidate) -> str:
    where = f" {event.first:#x}..{event.last:#x}" if event.granularity == "page" else ""
    leaf = " leaf" if event.leaf else ""
    tables = f", tables {event.tables}" if event.tables else ""
    what = f"{event.iommu} {event.cache} {event.granularity} ({event.tag}){where}{leaf}"
    return f"invalidate {what}: dropped {event.dropped}{tables}"


def _replace(event: Replace) -> str:
    verdict = f": {event.verdict}" if event.verdict else ""
    opens = f": {event.opens} opens it" if event.opens else ""
    return f"replace {_device(event)} {event.old or 'nothing'} -> {event.new or 'nothing'}{verdict}{opens}"


def _stale(event: Stale) -> str:
    was = f"the {event.cache} gave {event.gave}, memory says {event.says}"
    return f"stale {_device(event)} {event.perm} iova {event.iova:#x}: {event.outcome}: {was}; right: {event.right}"


def _device(event: Dma | Fault | PageRequest | PageResponse | Replace | Stale) -> str:
    return event.device if event.pasid is None else f"{event.device} pasid {event.pasid}"


def _printable(letter: str) -> str:
    return letter if letter.isprintable() else ascii(letter)[1:-1]
