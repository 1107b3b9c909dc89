"""Room client: `iommufdctl demo kvm`, a device that walks a VM's own page table, told step by step."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from iommufd_uapi.kvm import KVM_CAP_TDP_CHECK, KVM_TDP_TYPE_EPT, HwptKvm

from .demo import Story
from .endpoint import DmaError
from .show import YELLOW, amount, several
from .testing import Daemon
from .walk import render

if TYPE_CHECKING:
    from .admin import Admin
    from .endpoint import Endpoint
    from .files import File
    from .guest import GuestMemory
    from .iommufd import Iommufd
    from .show import Paint
    from .vm import Vm

DEVICE = "vfio0"
GPA = 0x20_0000  # of the second slot: a large page of its own
RAM = 4 << 20


def run(paint: Paint) -> int:
    """Tell the story; the exit status."""
    start = time.perf_counter()
    story = Story(paint)
    with Daemon() as daemon, daemon.admin() as admin:
        story.say(f"iommufdd runs as process {daemon.pid}, with Intel VT-d and a small KVM")
        with daemon.open(machine="@vtd", explain=True) as iommufd, iommufd.guest_memory(RAM, "ram") as ram:
            with iommufd.vm() as vm:
                ok = _sharing(iommufd, admin, ram, vm, story)
            left = admin.stats()
    story.step("The end")
    story.say(f"pages that anybody had pinned: {left.pinned_pages}; objects left in the daemon: {left.objects}")
    story.say(f"{time.perf_counter() - start:.2f} s in all")
    return 0 if ok and not left.objects and not left.pinned_pages else 1


def _sharing(iommufd: Iommufd, admin: Admin, ram: GuestMemory, vm: Vm, story: Story) -> bool:
    """All of it; whether each step did what it should."""
    story.step("A VM with memory and a vCPU, whose page table KVM exports")
    vm.enable_cap(KVM_CAP_TDP_CHECK)
    vm.set_user_memory_region(0, GPA, ram)
    story.call("KVM_SET_USER_MEMORY_REGION", f"slot 0: {amount(len(ram))} at guest address {GPA:#x}")
    with vm.create_vcpu(0), vm.create_tdp_fd() as table, iommufd.device(DEVICE) as device:
        info = vm.get_tdp_info()
        story.call("KVM_CREATE_TDP_FD", f"an EPT of {info.level} levels at {info.root_hpa:#x}; nothing is mapped yet")

        story.step("A page table for a device that is the VM's own, and page requests on")
        hwpt = _hwpt(iommufd, device.bind(iommufd), table, story)
        device.attach(hwpt)
        endpoint = admin.endpoint(DEVICE, iommufd)
        fine = [info.type == KVM_TDP_TYPE_EPT, *_dma(endpoint, admin, ram, vm, story)]

        story.step("The slot goes: KVM zaps its table and flushes the device")
        vm.set_user_memory_region(0, GPA)
        fine.append(_refused(endpoint, vm, story))
        _counts(endpoint, admin, vm, story)

        story.step("The slot comes back: the same DMA goes through again")
        vm.set_user_memory_region(0, GPA, ram)
        fine.append(endpoint.read(GPA, 8) == b"by DMA!!")
        counts = _counts(endpoint, admin, vm, story)
        device.detach()
        iommufd.destroy(hwpt)
    return all(fine) and counts == (3, 0)


def _hwpt(iommufd: Iommufd, dev_id: int, table: File, story: Story) -> int:
    hwpt = iommufd.hwpt_alloc(dev_id, 0, data=HwptKvm(fd=table.fileno()))
    story.call("IOMMU_HWPT_ALLOC", f"hwpt_kvm {hwpt}: no address space, no pinned page")
    try:
        iommufd.hwpt_alloc(dev_id, 0, data=HwptKvm(fd=table.fileno()))
    except OSError as error:
        story.call("IOMMU_HWPT_ALLOC once more", story.paint(str(error), YELLOW))
    return hwpt


def _dma(endpoint: Endpoint, admin: Admin, ram: GuestMemory, vm: Vm, story: Story) -> list[bool]:
    story.step("A DMA: the device misses and asks for the page, KVM maps it, the DMA goes on")
    ram.write(0x1000, b"of the guest")
    seen = endpoint.read(GPA + 0x1000, 12)
    story.call("the device reads", repr(seen))
    endpoint.write(GPA, b"by DMA!!")
    story.call("the guest has", repr(ram.read(0, 8)))
    for line in render(endpoint.walk(GPA), f"address {GPA:#x}", story.paint).splitlines():
        story.say(line)
    mapped = _counts(endpoint, admin, vm, story)
    return [seen == b"of the guest", ram.read(0, 8) == b"by DMA!!", mapped == (1, 0)]


def _refused(endpoint: Endpoint, vm: Vm, story: Story) -> bool:
    """The DMA asks again, and KVM has nothing."""
    try:
        endpoint.read(GPA, 8)
    except DmaError as error:
        story.call("the same DMA", story.paint(error.reason, YELLOW))
        return vm.get_tdp_info().present == 0
    return False


def _counts(endpoint: Endpoint, admin: Admin, vm: Vm, story: Story) -> tuple[int, int]:
    """What all have counted; page requests of the device, and invariants found broken."""
    info = vm.get_tdp_info()
    found = [each for instance in admin.show().instances for each in instance.endpoints]
    (device,) = (each for each in found if each.name == DEVICE and each.attachments)
    story.call("the device", f"{several(device.page_requests, 'page request')}, {device.failures} answered FAILURE")
    story.call(
        "KVM",
        f"{several(info.faults, 'fault')}, {info.mapped} mapped, {info.zapped} zapped, flushes: {info.flushes},"
        f" {amount(info.present)} there now; {info.violations} invariants broken",
    )
    return device.page_requests, info.violations
