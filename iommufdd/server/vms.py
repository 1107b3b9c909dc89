"""VMs that are open, and /dev/kvm, from which programs under `run` get them."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from iommufdd.kvm.dev import KvmDevice
from iommufdd.kvm.vm import Vm

if TYPE_CHECKING:
    from iommufdd.user import Caller, Mm

    from .devices import Opened
    from .instance import Instance

#: what a channel, or a descriptor, is for
AnyOpened: TypeAlias = "Opened | OpenVm | OpenKvm"


class ServedVm(Vm):
    """A VM that tells when its last reference, wherever that was, is gone."""

    opened: OpenVm

    def release(self) -> None:
        super().release()
        self.opened.settle()


class OpenVm:
    """One VM: what KVM_CREATE_VM of /dev/kvm would give."""

    def __init__(self, instance: Instance, mm: Mm, uid: int) -> None:
        self.instance = instance
        self.uid = uid
        self.owner: object = None  # the front end that opened it for a process
        self.file = ServedVm(instance.machine, mm)
        self.file.opened = self
        instance.vms.add(self)
        instance.instances.vms.add(self)
        instance.keep(self)

    def settle(self) -> None:
        """It has no reference left."""
        self.instance.vms.discard(self)
        self.instance.instances.vms.discard(self)
        self.instance.let_go(self)


class ServedKvm(KvmDevice):
    """A /dev/kvm that tells when its last reference, wherever that was, is gone."""

    opened: OpenKvm

    def release(self) -> None:
        super().release()
        self.opened.settle()


class OpenKvm:
    """One open /dev/kvm."""

    def __init__(self, instance: Instance, uid: int) -> None:
        self.instance = instance
        self.uid = uid
        self.owner: object = None  # the front end that opened it for a process
        self.file = ServedKvm(instance.machine, self._new_vm)
        self.file.opened = self
        instance.keep(self)

    def settle(self) -> None:
        """It has no reference left."""
        self.instance.let_go(self)

    def _new_vm(self, caller: Caller) -> ServedVm:
        made = OpenVm(self.instance, caller.mm, self.uid)
        made.owner = self.owner
        return made.file
