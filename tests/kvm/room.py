"""A machine with a VM in it: memory slots over the VMM's own memory, devices that walk the VM's table."""

from __future__ import annotations

from typing import TypeVar

import iommufd_uapi.iommufd as uapi
import iommufd_uapi.kvm as kvm
from iommufdd.device import IommufdDevice
from iommufdd.iommu.vtd import Vtd
from iommufdd.kvm.tdp_fd import TdpFile
from iommufdd.kvm.vm import Features, Vm
from iommufdd.user import PAGE_SIZE
from tests.core.harness import DATA, Client
from tests.core.world import ARGUMENT, Memfd
from tests.iommu.lab import Lab

K = TypeVar("K", bound=kvm.KvmIoctl)
SMM = 1 << 16  # slot numbers of address space 1
LOG, READONLY = kvm.KVM_MEM_LOG_DIRTY_PAGES, kvm.KVM_MEM_READONLY


class Room(Lab):
    """A lab whose client also has a VM."""

    def __init__(
        self, iommu: Vtd | None = None, *, mode: str = "greedy", features: Features | None = None, check: bool = True,
        **capabilities: object,
    ) -> None:  # fmt: skip
        """check: the invariants are looked at after every change."""
        super().__init__(iommu, mode=mode, **capabilities)  # type: ignore[arg-type]
        self.vm = self.new_vm(self.c, features, check=check)
        self.fd = self.c.process.install(self.vm)
        self.vm.put()  # the descriptor has it
        self.memory = self.c.world.machine.memory

    def new_vm(self, c: Client, features: Features | None = None, *, check: bool = True) -> Vm:
        vm = Vm(c.world.machine, c.mm, features)
        vm.check(wanted=check)
        return vm

    # ---- ioctls of the VM ----

    def call(self, arg: K, expect: int = 0, *, vm: Vm | None = None, c: Client | None = None) -> K:
        """An ioctl that must give this errno; the struct brought up to date."""
        c = c or self.c
        c.process.put(arg.pack(), ARGUMENT)
        c._check((vm or self.vm).ioctl(c.caller, arg.CMD, ARGUMENT), expect)
        arg.update(c.mm.read(ARGUMENT, arg.SIZEOF))
        return arg

    def number(self, cmd: int, arg: int, expect: int = 0) -> int:
        """An ioctl whose argument is a number."""
        return self.c._check(self.vm.ioctl(self.c.caller, cmd, arg), expect)

    def vcpu(self, vcpu_id: int = 0, expect: int = 0) -> int:
        return self.number(kvm.KVM_CREATE_VCPU, vcpu_id, expect)

    def slot(
        self, slot: int, gpa: int, addr: int = 0, size: int = 0, flags: int = 0, expect: int = 0
    ) -> None:
        """KVM_SET_USER_MEMORY_REGION; without a size the slot goes."""
        region = kvm.KvmUserspaceMemoryRegion(slot=slot, flags=flags, guest_phys_addr=gpa, memory_size=size,
                                              userspace_addr=addr)  # fmt: skip
        self.call(region, expect)

    def ram_slot(self, slot: int = 0, gpa: int = 0, pages: int = 16, flags: int = 0) -> Memfd:
        """A slot over fresh memory."""
        file = self.c.world.memfd(pages)
        self.slot(slot, gpa, self.c.process.map(file), pages * PAGE_SIZE, flags)
        return file

    def enable(self, cap: int, value: int, expect: int = 0) -> None:
        self.call(kvm.KvmEnableCap(cap=cap, args=(value, 0, 0, 0)), expect)

    def tdp_fd(self, expect: int = 0, **fields: int) -> int:
        return self.call(kvm.KvmCreateTdpFd(**fields), expect).fd

    def dirty_log(self, slot: int = 0, expect: int = 0) -> list[int]:
        """KVM_GET_DIRTY_LOG: the guest pages, by their number in the slot."""
        self.call(kvm.KvmDirtyLog(slot=slot, dirty_bitmap=DATA), expect)
        found = self.vm.slots[0].by_id.get(slot)
        if expect or found is None:
            return []
        bits = int.from_bytes(self.c.mm.read(DATA, -(-found.npages // 64) * 8), "little")
        return [page for page in range(found.npages) if bits >> page & 1]

    def info(self) -> kvm.KvmTdpInfo:
        return self.call(kvm.KvmTdpInfo())

    # ---- HWPTs ----

    def runnable(self, *, vcpus: int = 1) -> int:
        """vCPUs, and a TDP fd."""
        for vcpu_id in range(vcpus):
            self.vcpu(vcpu_id)
        return self.tdp_fd()

    def hwpt_kvm(
        self, idev: IommufdDevice, fd: int, expect: int = 0, *, c: Client | None = None, **fields: int
    ) -> int:
        """IOMMU_HWPT_ALLOC over a TDP fd; fields: of the struct, instead of what is right."""
        c = c or self.c
        data = kvm.HwptKvm(fd=fd).pack()
        right = {"dev_id": idev.id, "data_type": kvm.IOMMU_HWPT_DATA_KVM, "data_len": len(data),
                 "data_uptr": c.process.put(data)}  # fmt: skip
        return c.ioctl(uapi.HwptAlloc(**(right | fields)), expect).out_hwpt_id

    def sharing(self, **kind: bool | int) -> tuple[IommufdDevice, int]:
        """(a device attached to the VM's table, the HWPT)"""
        fd = self.runnable()
        kind.setdefault("pri", True)
        idev = self.device(**kind)  # type: ignore[arg-type]
        hwpt = self.hwpt_kvm(idev, fd)
        self.attach(idev, hwpt)
        return idev, hwpt

    def tdp(self, fd: int) -> TdpFile:
        return self.c.file(fd, TdpFile)

    def sound(self) -> None:
        """No invariant is broken."""
        checks = self.vm.mmu.checks
        assert checks is not None
        checks.look()
        assert checks.violations == []
