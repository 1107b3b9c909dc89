"""What is there: everything open as a tree, and everything countable as counts. Reads, changes nothing."""

from __future__ import annotations

import collections
import gc
import os
from typing import TYPE_CHECKING

from iommufd_uapi import admin
from iommufdd.device import IommufdDevice
from iommufdd.ioas import Ioas
from iommufdd.iommu.dma import State
from iommufdd.iommu.endpoint import Endpoint
from iommufdd.objects import IommufdObject
from iommufdd.user import PAGE_SHIFT

from .credentials import CAPABILITIES
from .instance import OpenContext, ServedContext

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from iommufdd.pages import Pages

    from .channel import Channel
    from .devices import OpenDevice
    from .instance import Instance
    from .serve import Server
    from .vms import AnyOpened, OpenVm

OWN_ROOMS = ("iommufdd.", "iommufd_uapi.")


def counts(server: Server, *, classes: bool) -> admin.Counts:
    """All counts; with `classes`, also live objects of our own classes, after a garbage collection."""
    contexts = list(server.instances.contexts.values())
    objects = [obj for context in contexts for obj in context.ctx.objects]
    return admin.Counts(
        instances=len(list(server.instances)),
        contexts=len(contexts),
        channels=len(server.channels),
        devices=len(server.instances.devices),
        address_spaces=len(server.spaces.by_token),
        regions=sum(len(space.mm) for space in server.spaces.by_token.values()),
        objects=len(objects),
        objects_by_type=dict(collections.Counter(obj.type.name for obj in objects)),
        areas=sum(len(obj.iopt.areas) for obj in objects if isinstance(obj, Ioas)),
        pinned_pages=sum(_pinned(context) for context in contexts),
        files=len(server.pipes.by_key),
        page_files=len(server.page_files),
        charged_fds=server.nofile.total,
        open_fds=len(os.listdir("/proc/self/fd")) - 1,  # less the directory itself
        map_entries=_map_entries(),
        turns=server.reactor.turns,
        classes=_classes() if classes else {},
    )


def tree(server: Server) -> admin.Tree:
    """Instances, contexts, channels, files and objects."""
    return admin.Tree([_instance(server, instance) for instance in server.instances])


def _instance(server: Server, instance: Instance) -> admin.Instance:
    contexts = sorted(instance.contexts, key=lambda each: each.key)
    devices = sorted(instance.devices, key=lambda each: each.name)
    users = {channel.caller.task.user for channel in _channels(server, [*contexts, *devices])}
    users |= {pages.user for context in contexts for pages in _pages(context)}
    return admin.Instance(
        instance.machine.name,
        instance.machine.description.name,
        [admin.User(user.uid, user.locked_vm) for user in sorted(users, key=lambda user: user.uid)],
        [_context(server, context) for context in contexts],
        [_device(server, device) for device in devices],
        sorted(_processes(server, instance), key=lambda process: process.pid),
        [_endpoint(dev) for dev in instance.machine.devices.values() if isinstance(dev, Endpoint)],
        [_vm(server, vm) for vm in instance.vms],
    )


def _device(server: Server, device: OpenDevice) -> admin.Device:
    ictx = device.file.iommufd
    inode = next((context.key[1] for context in device.instance.contexts if context.ctx is ictx), 0)
    channels = [_channel(each) for each in _channels(server, [device])]
    return admin.Device(device.name, inode, device.file.devid if inode else 0, channels)


def _vm(server: Server, vm: OpenVm) -> admin.Vm:
    file, slots = vm.file, list(vm.file.slots[0])
    processes = (each for supervisor in server.supervisors for each in supervisor.processes.values())
    return admin.Vm(
        pid=next((process.tgid for process in processes if process.mm is file.mm), 0),
        channels=[_channel(each) for each in _channels(server, [vm])],
        slots=len(slots),
        memory=sum(slot.npages for slot in slots) << PAGE_SHIFT,
        vcpus=len(file.vcpus),
        exported=0 in file.exported,
        importers=sum(len(tdp.importers) for tdp in file.exported.values()),
        present=file.mmu.stats.present,
    )


def _processes(server: Server, instance: Instance) -> Iterator[admin.Process]:
    for supervisor in server.supervisors:
        for process in supervisor.processes.values() if supervisor.instance is instance else ():
            held = supervisor.held(process)
            contexts = sorted(each.key[1] for each in held if isinstance(each, OpenContext))
            names = sorted(each.name for each in held if not isinstance(each, OpenContext))
            yield admin.Process(process.tgid, contexts, names)


def _endpoint(dev: Endpoint) -> admin.Endpoint:
    features = [name for name, has in (("ats", dev.ats), ("pri", dev.pri), ("pasid", dev.max_pasids)) if has]
    counters, queue = dev.counters, dev.queue
    return admin.Endpoint(
        dev.name,
        dev.description.bdf,
        dev.description.iommu,
        features,
        _attachments(dev),
        **{name: getattr(counters, name) for name in counters.__slots__},
        running=sum(dma.dev is dev and dma.state is State.RUNNING for dma in queue.running),
        waiting=sum(dma.dev is dev for dma in queue.parked),
    )


def _attachments(dev: Endpoint) -> list[admin.Attachment]:
    found = []
    for pasid, handle in sorted(dev.group.handles.items()):
        idev = handle.idev
        if isinstance(idev, IommufdDevice) and isinstance(idev.ictx, ServedContext):
            hwpt = idev.igroup.pasid_attach[pasid].hwpt
            inode = idev.ictx.opened.key[1]
            found.append(admin.Attachment(pasid or None, hwpt.type.name, hwpt.id, inode))
    return found


def _context(server: Server, context: OpenContext) -> admin.Context:
    ctx = context.ctx
    return admin.Context(
        inode=context.key[1],
        refs=ctx.refs,
        account_mode=ctx.account_mode.name.lower(),
        channels=[_channel(each) for each in _channels(server, [context])],
        files=sorted(str(pipe.file) for pipe in server.pipes.by_key.values() if pipe.opened is context),
        pinned_pages=_pinned(context),
        objects=[_object(obj) for obj in ctx.objects],
    )


def _channels(server: Server, opened: Sequence[AnyOpened]) -> list[Channel]:
    found = [channel for channel in server.channels if channel.joined and channel.opened in opened]
    return sorted(found, key=lambda channel: channel.fd)


def _channel(channel: Channel) -> admin.Channel:
    task, mm = channel.caller.task, channel.caller.mm
    caps = {name for name in CAPABILITIES if getattr(task, name.lower())}
    return admin.Channel(
        pid=channel.peer.pid,
        uid=task.user.uid,
        mm=channel.space.token,
        caps=sorted(caps),
        memlock=task.memlock if isinstance(task.memlock, int) else task.memlock(),
        locked_vm=mm.locked_vm,
        pinned_vm=mm.pinned_vm,
        regions=len(channel.space.mm),
        waiting=channel.waiting,
    )


def _object(obj: IommufdObject) -> admin.Object:
    areas = list(obj.iopt.areas) if isinstance(obj, Ioas) else []
    return admin.Object(
        id=obj.id,
        type=obj.type.name,
        users=obj.users,
        holders=[str(holder) for holder in obj.holders],
        holds=[held.id for held in obj.held],
        areas=len(areas),
        mapped=sum(area.length for area in areas),
        name=obj.dev.name if isinstance(obj, IommufdDevice) else "",
    )


def _pinned(context: OpenContext) -> int:
    return sum(pages.npinned for pages in _pages(context))


def _pages(context: OpenContext) -> Iterator[Pages]:
    """Each pages object of a context once."""
    seen: set[int] = set()
    for obj in context.ctx.objects:
        for area in obj.iopt.areas if isinstance(obj, Ioas) else ():
            if id(area.pages) not in seen:
                seen.add(id(area.pages))
                yield area.pages


def _map_entries() -> int:
    """Lines of /proc/self/maps with a file. Anonymous memory is the allocator's, which takes and returns it at will."""
    with open("/proc/self/maps", "rb") as file:
        return sum(line.split()[4] != b"0" for line in file)


def _classes() -> dict[str, int]:
    gc.collect()
    found = collections.Counter(
        f"{type(each).__module__}.{type(each).__qualname__}"
        for each in gc.get_objects()
        if type(each).__module__.startswith(OWN_ROOMS)
    )
    return dict(sorted(found.items()))
