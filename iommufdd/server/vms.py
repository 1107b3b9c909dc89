"""VMs that are open."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from iommufdd.kvm.vm import Vm

if TYPE_CHECKING:
    from iommufdd.user import Mm

    from .devices import Opened
    from .instance import Instance

#: what a channel is for
AnyOpened: TypeAlias = "Opened | OpenVm"


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
