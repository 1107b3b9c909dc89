"""/dev/kvm: every answer of kvm_dev_ioctl() in its order, and the files that it gives."""

from __future__ import annotations

from errno import EINVAL, EIO, EMFILE, ENODEV, ENOMEM

import pytest

import iommufd_uapi.kvm as kvm
from iommufdd.errors import IommufdError
from iommufdd.kvm.dev import KvmDevice
from iommufdd.kvm.vm import Vcpu, Vm
from iommufdd.user import Gate

from .room import Room


@pytest.fixture
def room() -> Room:
    return Room()


@pytest.fixture
def dev(room: Room) -> KvmDevice:
    machine = room.c.world.machine
    return KvmDevice(machine, lambda caller: Vm(machine, caller.mm))


def call(room: Room, dev: KvmDevice, cmd: int, arg: int = 0) -> int:
    return dev.ioctl(room.c.caller, cmd, arg)


def test_what_it_answers(room: Room, dev: KvmDevice) -> None:
    assert call(room, dev, kvm.KVM_GET_API_VERSION) == 12
    assert call(room, dev, kvm.KVM_GET_API_VERSION, 1) == -EINVAL
    assert call(room, dev, kvm.KVM_CHECK_EXTENSION, kvm.KVM_CAP_USER_MEMORY) == 1
    assert call(room, dev, kvm.KVM_CHECK_EXTENSION, 0xFFFF) == 0
    for cmd in (kvm.KVM_CREATE_VCPU, kvm.KVM_SET_USER_MEMORY_REGION, 0xAE04, 0x3B81, 0):
        assert call(room, dev, cmd) == -EINVAL, hex(cmd)
    with pytest.raises(IommufdError) as caught:
        dev.mmap(room.c.caller, 0, 4096, 1, 1)
    assert caught.value.errno == ENODEV


def test_a_vm_belongs_to_who_asked_for_it(room: Room, dev: KvmDevice) -> None:
    fd = call(room, dev, kvm.KVM_CREATE_VM)
    vm = room.c.caller.files.fget(fd)
    assert isinstance(vm, Vm)
    assert (vm.mm, vm.refs) == (room.c.mm, 1)
    other = room.c.process.fork()
    assert vm.ioctl(other.caller, kvm.KVM_CHECK_EXTENSION, 3) == -EIO
    assert dev.ioctl(other.caller, kvm.KVM_CREATE_VM, 0) >= 0


def test_the_order_of_refusals(room: Room, dev: KvmDevice) -> None:
    """A number is looked for first, then memory, then the type; what fails leaves neither number nor VM."""
    gate = room.c.caller.gate
    for nth, errno in ((1, EMFILE), (2, ENOMEM), (0, EINVAL)):
        gate.arm(nth)
        before = room.c.mm.notifiers
        assert call(room, dev, kvm.KVM_CREATE_VM, 7) == -errno
        gate.arm(0)
        assert room.c.mm.notifiers == before
        assert room.c.caller.error is not None
    gate.passed = []
    first = call(room, dev, kvm.KVM_CREATE_VM)
    assert gate.passed == [Gate.FD, Gate.MEMORY]
    gate.passed = None
    assert call(room, dev, kvm.KVM_CREATE_VM) == first + 1, "no number was lost"


def test_a_vcpu_does_not_run(room: Room) -> None:
    vcpu = room.c.caller.files.fget(room.vcpu())
    assert isinstance(vcpu, Vcpu)
    for caller, errno in ((room.c.caller, EINVAL), (room.c.process.fork().caller, EIO)):
        with pytest.raises(IommufdError) as caught:
            vcpu.ioctl(caller, 0xAE80, 0)
        assert caught.value.errno == errno
