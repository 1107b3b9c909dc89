"""Room uapi: the admin socket. One JSON object a line each way, over SOCK_STREAM; answers come in order.

    {"request": "stats"}
    {"reply": "stats", "contexts": 1, ...}

An address space is named by the `mm` of a hello reply. A machine instance by the name it is shared by, or, shared or
not, by the inode of the identity of one of its contexts; "" is the one that has the device, if there is only one.
Bytes are base64 text.
"""

from __future__ import annotations

from typing import Literal, TypeVar

import msgspec

from .events import USUAL, AnyEvent, Event

MAX_DMA = 1 << 20  #: bytes of one `dma`
MAX_LINE = MAX_DMA // 3 * 4 + 65_536  #: bytes of one request


# ---- requests ----------------------------------------------------------------------------------------------


class Request(msgspec.Struct, tag_field="request", forbid_unknown_fields=True):
    """Base of all requests."""


class Show(Request, tag="show"):
    """What is open: instances, contexts, channels, files handed out, objects."""


class Stats(Request, tag="stats"):
    """Counts. With `classes`, also the live objects of the daemon's classes, after a garbage collection."""

    classes: bool = False


class Credentials(Request, tag="credentials"):
    """Set the credentials of an address space's channels; null stays. EPERM without --virtual-caller."""

    mm: int
    uid: int | None = None
    caps: list[str] | None = None  #: "CAP_IPC_LOCK", "CAP_SYS_RAWIO", "CAP_SYS_RESOURCE"
    memlock: int | None = None  #: bytes


class Fault(Request, tag="fault"):
    """Make the nth acquisition from now fail, from 1; 0 disarms, null only asks (/proc/self/fail-nth).

    Each channel of the address space has a gate of its own; all of them are armed.
    """

    mm: int
    nth: int | None = None


class Dma(Request, tag="dma"):
    """Let a device read, write, fill or compare memory, and wait until it has. The reply may carry an error.

    What has been written is `done` bytes from the start. A requester that closes its connection cancels it.
    EINVAL, ENOENT: no such instance or device.
    """

    device: str
    op: Literal["read", "write", "fill", "compare"]
    iova: int
    length: int  #: at most MAX_DMA
    data: bytes = b""  #: write, compare: `length` bytes; fill: the pattern, at least one
    instance: str = ""
    pasid: int | None = None  #: none: a request without PASID
    privileged: bool = False
    page_timeout: float | None = None  #: seconds to wait for a page; none: as long as the daemon says


class Walk(Request, tag="walk"):
    """What a translation does, level by level, from memory alone; and what is cached of it. EINVAL, ENOENT."""

    device: str
    iova: int
    instance: str = ""
    pasid: int | None = None
    op: Literal["read", "write"] = "read"
    privileged: bool = False


class Trace(Request, tag="trace"):
    """Follow what happens. After the reply come events, one a line (decode_event), until either side hangs up.

    The words of `only` are those of events.KINDS. EINVAL for another; EMFILE when too many follow already.
    """

    pids: list[int] = []  #: of processes; empty: all
    machine: str | None = None  #: null: all
    only: list[str] = msgspec.field(default_factory=lambda: sorted(USUAL))
    failed: bool = False  #: nothing but what failed


class Sanitize(Request, tag="sanitize"):
    """What the translation sanitizer has found so far. ENOENT when there is no machine of that name.

    With `settle`, what was used and not flushed until now counts as never flushed.
    """

    machine: str | None = None  #: the name of an instance, "" for the private ones; null for all
    settle: bool = False


# ---- replies -----------------------------------------------------------------------------------------------


class Reply(msgspec.Struct, tag_field="reply"):
    """Base of all replies."""


class Error(Reply, tag="error"):
    """The request failed."""

    errno: int
    reason: str


class Done(Reply, tag="done"):
    """`channels`: how many were changed."""

    channels: int


class Gate(msgspec.Struct):
    """The fault gate of one channel."""

    left: int  #: passes until it fails, 0 disarmed
    fired: str | None  #: the kind of acquisition that failed


class Gates(Reply, tag="fault"):
    """The gates of an address space, as they are now."""

    gates: list[Gate]


class Refusal(msgspec.Struct):
    """Why an IOMMU did not translate."""

    code: int  #: the model's fault reason
    name: str  #: of the code, in the specification's words
    stage: int  #: 0: before any table
    level: int  #: of the entry: 1 maps the smallest pages; 0 without an entry
    address: int  #: input address of the stage that stopped
    text: str  #: all of this in one line
    steps: list[str] = []  #: the entries used


class Moved(Reply, tag="dma"):
    """A DMA is over; well if `error` is empty."""

    done: int  #: bytes; of a compare that failed, the offset of the first difference
    data: bytes = b""  #: read
    error: str = ""  #: one line
    fault: Refusal | None = None  #: if that was the reason


class Area(msgspec.Struct):
    """Where an address of a kernel's own table leads: a stretch of an IOAS."""

    ioas: int
    inode: int  #: of the context
    first: int  #: of the stretch that is contiguous in memory
    last: int
    file: str
    offset: int  #: in the file, of the address asked for
    readable: bool
    writable: bool


class Row(msgspec.Struct):
    """One entry that a walk uses, or one thing that a cache has."""

    what: str
    depth: int = 0  #: how far to indent
    address: int | None = None  #: of the entry; where a kernel's own table is asked, the address to translate
    words: list[int] = []  #: the entry, raw
    bits: str = ""  #: the entry, decoded
    leads: str = ""  #: where it leads
    differs: str = ""  #: of a cache: what memory says instead
    area: Area | None = None  #: what a kernel's own table has there


class Walked(Reply, tag="walk"):
    """A translation, explained."""

    device: str
    model: str  #: of its IOMMU
    rows: list[Row]
    first: int = 0  #: of the stretch that the result holds for
    last: int = 0
    rights: str = ""  #: "rw"
    fault: Refusal | None = None
    cached: list[Row] = []


class Counts(Reply, tag="stats"):
    """Everything that could leak, counted."""

    instances: int
    contexts: int
    channels: int
    address_spaces: int
    regions: int  #: registered memory
    devices: int  #: open files of VFIO devices
    objects: int
    objects_by_type: dict[str, int]
    areas: int
    pinned_pages: int  #: in pages objects
    files: int  #: handed out
    page_files: int  #: files of clients kept open
    charged_fds: int  #: descriptors kept on behalf of clients
    open_fds: int  #: of the process
    map_entries: int  #: lines of /proc/self/maps that show a file
    turns: int  #: of the reactor
    classes: dict[str, int] = {}


class Object(msgspec.Struct):
    """One object of a context."""

    id: int
    type: str  #: enum iommufd_object_type, without its prefix
    users: int
    holders: list[str]  #: who keeps it
    holds: list[int]  #: ids it keeps
    areas: int = 0  #: of an IOAS
    mapped: int = 0  #: bytes of these
    name: str = ""  #: of a device


class Channel(msgspec.Struct):
    """One connection to a context."""

    pid: int
    uid: int
    mm: int
    caps: list[str]
    memlock: int
    locked_vm: int  #: pages charged to the mm
    pinned_vm: int
    regions: int
    waiting: bool  #: the peer does not read its replies


class Context(msgspec.Struct):
    """One open /dev/iommu."""

    inode: int  #: of its identity
    refs: int
    account_mode: str
    channels: list[Channel]
    files: list[str]  #: handed out
    pinned_pages: int
    objects: list[Object]


class Device(msgspec.Struct):
    """One open file of a VFIO device."""

    name: str
    context: int  #: inode of the identity of the context that it is bound to; 0: not bound
    devid: int  #: its id there
    channels: list[Channel]


class User(msgspec.Struct):
    """struct user_struct"""

    uid: int
    locked_vm: int  #: pages


class Process(msgspec.Struct):
    """One that `run` or `mount` serves, once it has called."""

    pid: int
    contexts: list[int]  #: inodes of those it has open, as far as its descriptors may be looked at
    devices: list[str] = []  #: names of those it has open


class Attachment(msgspec.Struct):
    """What one PASID of a device uses."""

    pasid: int | None  #: none: requests without PASID
    type: str  #: of the page table's object
    id: int
    inode: int  #: of the context


class Endpoint(msgspec.Struct):
    """A device that does DMA."""

    name: str
    bdf: str
    iommu: str
    features: list[str]  #: "ats", "pri", "pasid"
    attachments: list[Attachment]
    read: int  #: bytes
    written: int
    completed: int  #: transfers
    failed: int
    faults: int  #: recorded by the IOMMU
    page_requests: int
    invalid: int  #: answered INVALID by the user or the driver
    withdrawn: int  #: answered INVALID because the attachment ended
    timeouts: int
    running: int  #: transfers now
    waiting: int  #: for a page
    failures: int = 0  #: page requests answered FAILURE: KVM has no page


class Vm(msgspec.Struct):
    """A VM."""

    pid: int  #: of a process under `run` whose it is; 0: a client's
    channels: list[Channel]
    slots: int
    memory: int  #: bytes behind them
    vcpus: int
    exported: bool  #: its table has a descriptor
    importers: int
    present: int  #: bytes that the table maps


class Instance(msgspec.Struct):
    """One machine."""

    name: str  #: by which it is shared; "" for a private one
    machine: str  #: the name of its description
    users: list[User]
    contexts: list[Context]
    devices: list[Device] = []
    processes: list[Process] = []
    endpoints: list[Endpoint] = []
    vms: list[Vm] = []


class Tree(Reply, tag="show"):
    """All that is open."""

    instances: list[Instance]


class Findings(msgspec.Struct):
    """The sanitizer of one machine."""

    machine: str
    mode: str  #: off, report, fail
    checked: int = 0  #: uses of translations
    never: int = 0  #: stale translations used that were never flushed
    raced: int = 0  #: used before their flush came
    pending: int = 0  #: used, and not flushed yet
    useless: int = 0  #: invalidations that dropped nothing
    lines: list[str] = []  #: the report


class Sanitized(Reply, tag="sanitize"):
    """One for each machine."""

    machines: list[Findings]


class Tracing(Reply, tag="trace"):
    """Events follow. `time` is now, as Event.time has it."""

    time: int


AnyRequest = Show | Stats | Credentials | Fault | Dma | Walk | Trace | Sanitize
AnyReply = Error | Done | Gates | Counts | Tree | Moved | Walked | Tracing | Sanitized
R = TypeVar("R", bound=Reply)

_encoder = msgspec.json.Encoder()
_requests: msgspec.json.Decoder[AnyRequest] = msgspec.json.Decoder(AnyRequest)
_events: msgspec.json.Decoder[AnyEvent] = msgspec.json.Decoder(AnyEvent)
_replies: msgspec.json.Decoder[AnyReply] = msgspec.json.Decoder(AnyReply)


def encode(message: Request | Reply | Event) -> bytes:
    """One line."""
    return _encoder.encode(message) + b"\n"


def decode_request(line: bytes) -> AnyRequest:
    """msgspec.DecodeError (ValidationError) for anything else."""
    return _requests.decode(line)


def decode_reply(line: bytes) -> AnyReply:
    """msgspec.DecodeError (ValidationError) for anything else."""
    return _replies.decode(line)


def decode_event(line: bytes) -> AnyEvent:
    """msgspec.DecodeError (ValidationError) for anything else."""
    return _events.decode(line)
