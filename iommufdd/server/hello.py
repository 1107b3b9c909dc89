"""The first packet of a connection (docs/PROTOCOL.md section 2): which context, device or VM, which address space."""

from __future__ import annotations

from typing import TYPE_CHECKING

from iommufd_uapi.wire import HELLO_CONTAINER, MAGIC, MAX_REASON, VERSION, Hello, HelloReply, Kind
from iommufdd.errors import EBADF, EINVAL, IommufdError, ProtocolError

from .devices import OpenDevice
from .instance import OpenContext
from .vms import OpenVm

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .channel import Channel
    from .instance import AddressSpace
    from .vms import AnyOpened

EPROTONOSUPPORT = 93  # no errno of the core


class Refusal(Exception):
    """A hello that is answered with an errno; then the channel is closed."""

    def __init__(self, hello: Hello, errno: int, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
        told = reason.encode(errors="replace")[:MAX_REASON].decode(errors="ignore")  # cut at a character
        self.answer = HelloReply(kind=hello.kind, error=errno).pack() + told.encode()


def greet(channel: Channel, packet: bytes, fds: Sequence[int]) -> bytes:
    """Join the channel to what is asked for; the reply. Refusal; ProtocolError for what is no hello."""
    if len(packet) < Hello.SIZEOF:
        raise ProtocolError(f"a hello of {len(packet)} bytes")
    hello, text = Hello.unpack(packet), packet[Hello.SIZEOF :]
    if text and hello.kind not in (Kind.SUPERVISE, Kind.MOUNT):
        raise ProtocolError(f"a hello of {len(packet)} bytes")
    if hello.magic != MAGIC:
        raise ProtocolError(f"magic {hello.magic:#x}")
    if hello.version != VERSION:
        raise Refusal(hello, EPROTONOSUPPORT, f"version {hello.version}")
    try:
        if hello.kind == Kind.SUPERVISE:
            from .seccomp.hello import supervise

            return supervise(channel, hello, _name(hello.machine), text, fds)
        if hello.kind == Kind.MOUNT:
            from .fuse.hello import mount

            return mount(channel, hello, _name(hello.machine), text, fds)
        _join(channel, hello, fds)
    except IommufdError as error:
        raise Refusal(hello, error.errno, error.reason) from None
    return HelloReply(kind=hello.kind, mm=channel.space.token).pack()


def _join(channel: Channel, hello: Hello, fds: Sequence[int]) -> None:
    server, uid = channel.server, channel.peer.uid
    machine, device = _check(hello, fds)
    space = server.spaces.open(hello.mm, uid)
    try:
        channel.join(_open(channel, hello, machine, device, fds, space), space)
    except IommufdError:
        server.spaces.leave(space, channel)
        raise


def _open(
    channel: Channel, hello: Hello, machine: str, device: str, fds: Sequence[int], space: AddressSpace
) -> AnyOpened:
    """What the channel is for, with a reference for it. EBADFD, ENOENT, EMFILE."""
    instances, uid = channel.server.instances, channel.peer.uid
    if hello.kind == Kind.IOMMUFD:
        return OpenContext(instances.join(machine), uid, container=bool(hello.flags & HELLO_CONTAINER))
    if hello.kind in (Kind.DEVICE, Kind.VM):
        instance = instances.find(fds[0]).instance if fds else instances.join(machine)
        return OpenDevice(instance, device, uid) if hello.kind == Kind.DEVICE else OpenVm(instance, space.mm, uid)
    context = instances.find(fds[0])
    context.ctx.get()
    return context


def _check(hello: Hello, fds: Sequence[int]) -> tuple[str, str]:
    """The names of the machine and the device. EINVAL, EBADF."""
    known = HELLO_CONTAINER if hello.kind == Kind.IOMMUFD else 0
    if hello.flags & ~known or hello.reserved or hello.reserved2 or hello.kind > Kind.VM:
        raise EINVAL(f"kind {hello.kind}, or a field that must be zero is not")
    machine, device = _name(hello.machine), _name(hello.device)
    if hello.kind == Kind.CHANNEL and not fds:
        raise EBADF("no descriptor of a context")
    if len(fds) > 1 or (fds and hello.kind == Kind.IOMMUFD):
        raise EINVAL("descriptors that mean nothing")
    if fds and machine:
        raise EINVAL("a context has its machine: none can be named")
    if device and hello.kind != Kind.DEVICE:
        raise EINVAL("a device name that means nothing")
    return machine, device


def _name(field: bytes) -> str:
    """A zero-padded name; EINVAL unless it is printable UTF-8 followed by zeros."""
    try:
        name = field.rstrip(b"\0").decode()
    except UnicodeDecodeError:
        raise EINVAL("a name that is not UTF-8") from None
    if name and not name.isprintable():
        raise EINVAL("a name that cannot be printed")
    return name
