"""Room client: `iommufdctl show`, what a daemon has open, as a tree for people."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from iommufd_uapi.admin import Attachment, Channel, Context, Device, Endpoint, Instance, Object, Process, Tree, Vm

    Paint = Callable[[str, str], str]

BOLD, DIM, RED, GREEN, YELLOW, CYAN = "1", "2", "31", "32", "33", "36"
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


class Node:
    """A line with the lines below it."""

    __slots__ = ("below", "text")

    def __init__(self, text: str, below: Iterable[Node] = ()) -> None:
        self.text = text
        self.below = list(below)


def plain(text: str, colour: str) -> str:
    """A `Paint` without colours."""
    return text


def ansi(text: str, colour: str) -> str:
    """A `Paint` for terminals."""
    return f"\x1b[{colour}m{text}\x1b[0m"


def terminal() -> Paint:
    """Colours on a terminal that has them, unless they are not wanted (https://no-color.org)."""
    wanted = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return ansi if wanted else plain


def amount(count: int) -> str:
    """Bytes for people: "4 KiB", "1.5 GiB"."""
    value, unit = float(count), 0
    while value >= 1024 and unit < len(_UNITS) - 1:
        value /= 1024
        unit += 1
    return f"{value:.4g} {_UNITS[unit]}"


def several(count: int, noun: str) -> str:
    """ "1 area", "2 areas"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def render(tree: Tree, paint: Paint = plain) -> str:
    """The whole tree as text, without a newline at the end."""
    nodes = [_instance(instance, paint) for instance in tree.instances]
    return "\n".join(line for node in nodes for line in _draw(node)) or "nothing is open"


def _draw(node: Node, lead: str = "", rest: str = "") -> Iterator[str]:
    yield lead + node.text
    for index, below in enumerate(node.below):
        last = index == len(node.below) - 1
        yield from _draw(below, rest + ("└─ " if last else "├─ "), rest + ("   " if last else "│  "))


def _instance(instance: Instance, paint: Paint) -> Node:
    name = f"machine {instance.name}@{instance.machine}" if instance.name else f"private machine @{instance.machine}"
    locked = [f"uid {user.uid}: {several(user.locked_vm, 'page')} locked" for user in instance.users if user.locked_vm]
    below = [_process(process, paint) for process in instance.processes]
    below += [_context(context, paint) for context in instance.contexts]
    below += [_device(device, paint) for device in instance.devices]
    below += [_vm(vm, paint) for vm in instance.vms]
    below += [_endpoint(endpoint, paint) for endpoint in instance.endpoints]
    return Node("  ".join([paint(name, BOLD), *locked]), below)


def _device(device: Device, paint: Paint) -> Node:
    bound = f"bound as device {device.devid} to inode {device.context}" if device.context else "not bound"
    name = paint(f"/dev/vfio/devices/{device.name}", BOLD)
    return Node(f"{name}  {bound}", [_channel(channel, paint) for channel in device.channels])


def _vm(vm: Vm, paint: Paint) -> Node:
    facts = [paint("VM", BOLD), f"{several(vm.slots, 'slot')}, {amount(vm.memory)}", several(vm.vcpus, "vCPU")]
    if vm.pid:
        facts.insert(1, f"of pid {vm.pid}")
    if vm.exported:
        facts.append(f"table exported, {several(vm.importers, 'importer')}, {amount(vm.present)} mapped")
    return Node("  ".join(facts), [_channel(channel, paint) for channel in vm.channels])


def _process(process: Process, paint: Paint) -> Node:
    facts = [paint("process", GREEN), f"pid {process.pid} ({_command(process.pid)})"]
    if process.contexts:
        facts.append(f"has inode {', '.join(map(str, process.contexts))}")
    if process.devices:
        facts.append(f"has {', '.join(process.devices)}")
    return Node("  ".join(facts))


def _endpoint(endpoint: Endpoint, paint: Paint) -> Node:
    facts = [paint(endpoint.name, BOLD), endpoint.bdf, f"behind {endpoint.iommu}", *endpoint.features]
    below = [_attachment(attachment, paint) for attachment in endpoint.attachments]
    if moved := _moved(endpoint):
        below.append(Node(paint("  ".join(moved), YELLOW if endpoint.waiting else DIM)))
    return Node("  ".join(facts), below)


def _attachment(attachment: Attachment, paint: Paint) -> Node:
    what = "without PASID" if attachment.pasid is None else f"PASID {attachment.pasid}"
    return Node(f"{what}: {paint(f'{attachment.type.lower()} {attachment.id}', CYAN)}  inode {attachment.inode}")


def _moved(e: Endpoint) -> list[str]:
    """What a device has done, without what it has not."""
    counts = {
        f"read {amount(e.read)}": e.read,
        f"wrote {amount(e.written)}": e.written,
        f"{several(e.completed, 'transfer')} done": e.completed,
        f"{e.failed} failed": e.failed,
        several(e.faults, "fault"): e.faults,
        several(e.page_requests, "page request"): e.page_requests,
        f"{e.invalid} answered INVALID": e.invalid,
        f"{e.failures} answered FAILURE": e.failures,
        f"{e.withdrawn} withdrawn": e.withdrawn,
        f"{e.timeouts} timed out": e.timeouts,
        f"{e.running} running": e.running,
        f"{e.waiting} waiting for a page": e.waiting,
    }
    return [text for text, count in counts.items() if count]


def _context(context: Context, paint: Paint) -> Node:
    facts = [paint("/dev/iommu", BOLD), f"inode {context.inode}", several(context.refs, "reference")]
    if context.pinned_pages:
        facts.append(f"{several(context.pinned_pages, 'page')} pinned, charged by {context.account_mode}")
    below = [_channel(channel, paint) for channel in context.channels]
    return Node("  ".join(facts), [*below, *_objects(context.objects, paint)])


def _channel(channel: Channel, paint: Paint) -> Node:
    facts = [paint("channel", GREEN), f"pid {channel.pid} ({_command(channel.pid)})", f"uid {channel.uid}"]
    if channel.regions:
        facts.append(several(channel.regions, "registered region"))
    if channel.locked_vm or channel.pinned_vm:
        facts.append(f"locked {channel.locked_vm}, pinned {channel.pinned_vm} pages")
    if "CAP_IPC_LOCK" not in channel.caps:
        facts.append(f"may lock {amount(channel.memlock)}")
    if channel.waiting:
        facts.append(paint("does not read its replies", YELLOW))
    return Node("  ".join(facts))


def _command(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return "gone"


# ---- objects -----------------------------------------------------------------------------------------------


def _objects(objects: list[Object], paint: Paint) -> list[Node]:
    """The objects, each below the first one that it holds; what it holds besides is said."""
    by_id = {obj.id: obj for obj in objects}
    nodes = {obj.id: Node(_object(obj, by_id, paint)) for obj in objects}
    roots: list[Node] = []
    for obj in objects:
        held = [id for id in obj.holds if id in nodes]
        (nodes[held[0]].below if held else roots).append(nodes[obj.id])
    return roots


def _object(obj: Object, by_id: dict[int, Object], paint: Paint) -> str:
    facts = [paint(_name(obj), CYAN), several(obj.users, "user")]
    if obj.areas:
        facts.append(f"{several(obj.areas, 'area')}, {amount(obj.mapped)} mapped")
    also = [_name(by_id[id]) for id in obj.holds[1:] if id in by_id]
    if also:
        facts.append(f"also holds {', '.join(also)}")
    # The objects below it hold it, which is seen; here is who else does.
    others = [_holder(holder) for holder in obj.holders if not _is_object(holder)]
    if others:
        facts.append(f"held by {', '.join(others)}")
    return "  ".join(facts)


def _name(obj: Object) -> str:
    return f"{obj.type.lower()} {obj.id}" + (f" ({obj.name})" if obj.name else "")


def _holder(holder: str) -> str:
    return "its open file" if holder.startswith("the open file of") else holder


def _is_object(holder: str) -> bool:
    kind, _, number = holder.partition(" ")
    return kind.islower() and number.isdecimal()
