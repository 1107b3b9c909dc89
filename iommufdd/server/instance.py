"""What is open: machine instances, contexts by their identity, the address spaces of clients. devices.py: devices."""

from __future__ import annotations

import fcntl
import os
import secrets
import weakref
from typing import TYPE_CHECKING

from iommufdd.context import Context
from iommufdd.errors import EBADFD, EEXIST, EINVAL, EMFILE, ENOENT, EPERM
from iommufdd.mm import RegisteredMm

from .files import FileKey, file_key

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from iommufdd.description import MachineDescription
    from iommufdd.doorbells import Polling
    from iommufdd.event_port import EventListener
    from iommufdd.iommu.dma import Pumping
    from iommufdd.machine import Machine
    from iommufdd.machine_file import Machines

    from .channel import Channel
    from .devices import OpenDevice
    from .nofile import Nofile
    from .vms import OpenVm

REGISTERS_END = 1 << 40  # bytes, all of them holes
SEALED = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


class Instance:
    """A machine and what keeps it: the contexts open on it, and whoever may open more."""

    def __init__(self, instances: Instances, machine: Machine) -> None:
        self.instances = instances
        self.machine = machine
        self.contexts: set[OpenContext] = set()
        self.devices: set[OpenDevice] = set()
        self.vms: set[OpenVm] = set()
        self._users: set[object] = set()
        machine.dma.pumping = instances.pumping
        machine.polling = instances.polling

    def keep(self, user: object) -> None:
        """`user` needs the machine. Its name leads here until the last user lets it go."""
        self._users.add(user)
        if self.machine.name:
            self.instances.named[self.machine.name] = self

    def let_go(self, user: object) -> None:
        self._users.discard(user)
        if not self._users and self.instances.named.get(self.machine.name) is self:
            del self.instances.named[self.machine.name]


class ServedContext(Context):
    """A context that tells when its last reference, wherever that was, is gone."""

    opened: OpenContext

    def release(self) -> None:
        super().release()
        self.opened.settle()


class OpenContext:
    """One open /dev/iommu: the context, and the memfd whose inode is its identity."""

    def __init__(self, instance: Instance, uid: int, *, container: bool, mappable: bool = False) -> None:
        """container: as /dev/vfio/vfio. mappable: the memfd has room for registers at their offsets. EMFILE."""
        self.instance = instance
        self.uid = uid
        self.container = container
        self.owner: object = None  # the front end that opened it for a process
        instance.instances.nofile.charge(uid)
        try:
            self.identity = os.memfd_create("iommufd", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except OSError:
            instance.instances.nofile.uncharge(uid)
            raise EMFILE("the daemon has no descriptor left") from None
        if mappable:
            os.ftruncate(self.identity, REGISTERS_END)
        fcntl.fcntl(self.identity, fcntl.F_ADD_SEALS, SEALED & ~fcntl.F_SEAL_WRITE if mappable else SEALED)
        self.key = file_key(self.identity)
        self.ctx = self.file = ServedContext(instance.machine, container=container)
        self.ctx.opened = self
        instance.contexts.add(self)
        instance.keep(self)
        instance.instances.contexts[self.key] = self

    def settle(self) -> None:
        """Forget the context if it has no reference left."""
        if self.ctx.refs == 0 and self.identity >= 0:
            os.close(self.identity)
            self.identity = -1
            self.instance.instances.nofile.uncharge(self.uid)
            self.instance.instances.forget(self)


class Instances:
    """All machine instances and contexts of the daemon."""

    def __init__(
        self, new_machine: Callable[[str, MachineDescription], Machine], machines: Machines, nofile: Nofile
    ) -> None:
        self.nofile = nofile
        self.contexts: dict[FileKey, OpenContext] = {}
        self.devices: set[OpenDevice] = set()
        self.vms: set[OpenVm] = set()
        self.named: dict[str, Instance] = {}
        self.pumping: Pumping | None = None  # of every machine's DMA
        self.polling: Polling | None = None  # of what guests write without a trap
        self._new_machine = new_machine
        self._machines = machines
        self._built: weakref.WeakSet[Machine] = weakref.WeakSet()
        self._listener: EventListener | None = None

    def __iter__(self) -> Iterator[Instance]:
        """Every instance on which something is open."""
        found = {context.instance: None for context in self.contexts.values()}
        found |= {device.instance: None for device in self.devices}
        return iter(found | {vm.instance: None for vm in self.vms})

    def join(self, name: str) -> Instance:
        """The machine instance `[INSTANCE][@MACHINE]`; a new one if INSTANCE is empty or nobody keeps it yet.

        Whoever joins calls keep(), before anybody else can ask. EEXIST: it is another machine. ENOENT: no machine has
        that name. EINVAL: nothing behind the @, or INSTANCE alone is the name of a machine.
        """
        instance, at, machine = name.partition("@")
        if at and not machine:
            raise EINVAL(f"{name!r} names no machine behind the @")
        if not at and instance in self._machines.names:
            raise EINVAL(f"{instance!r} is a machine: '@{instance}' is a private one, 'NAME@{instance}' a shared one")
        found = self.named.get(instance)
        if found is None:
            return self._new(instance, self._machines.describe(machine))
        if machine and found.machine.description != self._machines.describe(machine):
            raise EEXIST(f"{instance!r} is there, as {found.machine.description.name!r}")
        return found

    def _new(self, name: str, description: MachineDescription) -> Instance:
        machine = self._new_machine(name, description)
        self._built.add(machine)
        if self._listener is not None:
            machine.events.add(self._listener)
        return Instance(self, machine)

    def listen(self, listener: EventListener | None) -> None:
        """Let it hear of all that happens on every machine, those to come included; None: nobody any more."""
        for machine in self._built:
            if self._listener is not None:
                machine.events.remove(self._listener)
            if listener is not None:
                machine.events.add(listener)
        self._listener = listener

    def find(self, fd: int) -> OpenContext:
        """The context that a descriptor identifies; EBADFD."""
        context = self.contexts.get(file_key(fd))
        if context is None:
            raise EBADFD("the descriptor is no context, or its context is closed")
        return context

    def forget(self, context: OpenContext) -> None:
        """A context is gone, and its machine with the last who kept it."""
        instance = context.instance
        del self.contexts[context.key]
        instance.contexts.discard(context)
        instance.let_go(context)


class AddressSpace:
    """An mm that channels share, and the number that names it in a hello."""

    def __init__(self, uid: int) -> None:
        self.token = secrets.randbits(63) + 1
        self.uid = uid
        self.mm = RegisteredMm()
        self.channels: set[Channel] = set()


class AddressSpaces:
    """The mm of every client, by token."""

    def __init__(self) -> None:
        self.by_token: dict[int, AddressSpace] = {}

    def open(self, token: int, uid: int) -> AddressSpace:
        """A new one for 0. ENOENT, EPERM when it belongs to another uid."""
        if not token:
            space = AddressSpace(uid)
            self.by_token[space.token] = space
            return space
        found = self.by_token.get(token)
        if found is None:
            raise ENOENT(f"there is no address space {token:#x}")
        if found.uid != uid:
            raise EPERM("the address space belongs to another uid")
        return found

    def leave(self, space: AddressSpace, channel: Channel) -> None:
        """A channel closes; the last one takes the address space along (exit_mmap)."""
        space.channels.discard(channel)
        if not space.channels and self.by_token.pop(space.token, None) is not None:
            space.mm.exit()
