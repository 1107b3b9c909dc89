"""Room uapi: the admin socket. One JSON object a line each way, over SOCK_STREAM; answers come in order.

    {"request": "stats"}
    {"reply": "stats", "contexts": 1, ...}

An address space is named by the `mm` of a hello reply.
"""

from __future__ import annotations

from typing import TypeVar

import msgspec

MAX_LINE = 65_536  #: bytes of one request


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


class Counts(Reply, tag="stats"):
    """Everything that could leak, counted."""

    instances: int
    contexts: int
    channels: int
    address_spaces: int
    regions: int  #: registered memory
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


class User(msgspec.Struct):
    """struct user_struct"""

    uid: int
    locked_vm: int  #: pages


class Instance(msgspec.Struct):
    """One machine."""

    name: str
    users: list[User]
    contexts: list[Context]


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


AnyRequest = Show | Stats | Credentials | Fault | Sanitize
AnyReply = Error | Done | Gates | Counts | Tree | Sanitized
R = TypeVar("R", bound=Reply)

_encoder = msgspec.json.Encoder()
_requests: msgspec.json.Decoder[AnyRequest] = msgspec.json.Decoder(AnyRequest)
_replies: msgspec.json.Decoder[AnyReply] = msgspec.json.Decoder(AnyReply)


def encode(message: Request | Reply) -> bytes:
    """One line."""
    return _encoder.encode(message) + b"\n"


def decode_request(line: bytes) -> AnyRequest:
    """msgspec.DecodeError (ValidationError) for anything else."""
    return _requests.decode(line)


def decode_reply(line: bytes) -> AnyReply:
    """msgspec.DecodeError (ValidationError) for anything else."""
    return _replies.decode(line)
