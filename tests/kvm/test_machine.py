"""VMs, tables, HWPTs and DMA in any order: what a DMA sees is what the guest has now, and the invariants hold."""

from __future__ import annotations

import itertools
import struct
from errno import EBUSY, EEXIST, EINVAL
from typing import TYPE_CHECKING

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from iommufdd.hw_pagetable import HwptKvm
from iommufdd.iommu.dma import Op, State
from iommufdd.kvm.vm import Features
from iommufdd.mm import Region
from iommufdd.user import PAGE_SIZE
from tests.iommu.lab import endpoint

from .decode import decode
from .room import LOG, READONLY, Room

if TYPE_CHECKING:
    from iommufdd.kvm.tdp_fd import TdpFile
    from tests.core.world import Memfd

PAGES = 1024  # of a slot: two large pages
AREAS = [0, 4 << 20, 1 << 30, (1 << 30) + (4 << 20) - PAGE_SIZE]  # where slots may be; the last cannot have large pages
NPAGES = st.sampled_from((0, 1, 2, 255, 511, 512, 1023))
SLOTS = st.sampled_from((0, 1))
HOW = "unmap", "remap", "protect"
_serial = itertools.count(1)
alive = precondition(lambda self: self.room.c.mm.alive)


class Sharing(RuleBasedStateMachine):
    """A VM with two slots, a device, a HWPT over the VM's table, and one over an IOAS."""

    def __init__(self) -> None:
        super().__init__()
        self.room = Room(features=Features(max_level=3))
        self.idev = self.room.device(pri=True)
        self.ioas, self.ram = self.room.ram(4)
        self.fd = 0  # of the table, while it is open
        self.hwpt = 0
        self.attached = ""  # "kvm", "ioas"
        self.vcpu = False
        self.tracked: set[int] = set()
        self.files: dict[int, tuple[Memfd, int]] = {}  # by slot: what is behind it, and at which address

    @initialize(shared=st.booleans())
    def begin(self, shared: bool) -> None:
        """Half of all stories begin with a device on the VM's table."""
        if shared:
            self.create_vcpu()
            self.create_slot(0, AREAS[0], 0)
            self.create_tdp_fd()
            self.alloc_hwpt()
            self.attach(kvm=True)

    # ---- the VM ----

    @precondition(lambda self: not self.vcpu and self.room.c.mm.alive)
    @rule()
    def create_vcpu(self) -> None:
        self.room.vcpu()
        self.vcpu = True

    @alive
    @rule(slot=SLOTS, area=st.sampled_from(AREAS), flags=st.sampled_from((0, 0, LOG, READONLY, LOG | READONLY)))
    def create_slot(self, slot: int, area: int, flags: int) -> None:
        if slot in self.files:
            return
        taken = [each.base_gfn for each in self.room.vm.slots[0]]
        if any(abs((base << 12) - area) < PAGES * PAGE_SIZE for base in taken):
            return
        file = self.room.c.world.memfd(PAGES)
        addr = self.room.c.process.map(file)
        self.room.slot(slot, area, addr, PAGES * PAGE_SIZE, flags)
        self.files[slot] = file, addr

    @alive
    @rule(slot=SLOTS, now=st.integers(0, 2))
    def delete_slot(self, slot: int, now: int) -> None:
        if now:
            return
        if self.files.pop(slot, None) is None:
            self.room.slot(slot, 0, expect=EINVAL)
        else:
            self.room.slot(slot, 0)

    @alive
    @rule(slot=SLOTS)
    def toggle_logging(self, slot: int) -> None:
        found = self.room.vm.slots[0].by_id.get(slot)
        if found is not None:
            self.room.slot(slot, found.base_gfn << 12, found.userspace_addr, PAGES * PAGE_SIZE, found.flags ^ LOG)

    @alive
    @rule(slot=SLOTS)
    def read_log(self, slot: int) -> None:
        found = self.room.vm.slots[0].by_id.get(slot)
        if found is not None and found.flags & LOG:
            self.room.dirty_log(slot)

    @alive
    @rule(slot=SLOTS, page=NPAGES, count=st.sampled_from((1, 2, 600)), how=st.sampled_from(HOW))
    def change_memory(self, slot: int, page: int, count: int, how: str) -> None:
        """The VMM takes memory away, puts other memory there, or makes it read-only."""
        if slot not in self.files:
            return
        _, addr = self.files[slot]
        start, end = addr + page * PAGE_SIZE, addr + min(page + count, PAGES) * PAGE_SIZE
        if how == "unmap":
            self.room.c.mm.unmap(start, end)
        elif how == "protect":
            self.room.c.mm.protect(start, end, readable=True, writable=False)
        else:
            file = self.room.c.world.memfd(PAGES)
            self.room.c.mm.map(Region(start, end, file, page * PAGE_SIZE, readable=True, writable=True))

    @alive
    @rule(slot=SLOTS, page=NPAGES, write=st.booleans())
    def vcpu_access(self, slot: int, page: int, write: bool) -> None:
        found = self.room.vm.slots[0].by_id.get(slot)
        if found is not None and self.vcpu:
            try:
                self.room.vm.vcpu_access(found.base_gfn + page << 12, 1 + write)
            except Exception as error:
                assert type(error).__name__ == "EFAULT"  # noqa: PT017

    @alive
    @rule(slot=SLOTS)
    def age(self, slot: int) -> None:
        if slot in self.files:
            addr = self.files[slot][1]
            self.room.vm.clear_flush_young(addr, addr + PAGES * PAGE_SIZE)

    @alive
    @rule(slot=SLOTS, page=NPAGES)
    def track_writes(self, slot: int, page: int) -> None:
        found = self.room.vm.slots[0].by_id.get(slot)
        if found is not None:
            gfn = found.base_gfn + page
            self.room.vm.write_track(gfn, tracked=gfn not in self.tracked)
            self.tracked ^= {gfn}

    # ---- the table and the HWPT ----

    @alive
    @rule()
    def create_tdp_fd(self) -> None:
        if self.tdp is not None:
            self.room.tdp_fd(EEXIST)
        elif not self.vcpu:
            self.room.tdp_fd(EINVAL)
        else:
            self.fd = self.room.tdp_fd()

    @precondition(lambda self: self.fd)
    @rule()
    def close_tdp_fd(self) -> None:
        self.room.c.fds.close(self.fd)
        self.fd = 0

    @precondition(lambda self: self.fd and self.room.c.mm.alive)
    @rule()
    def alloc_hwpt(self) -> None:
        if self.hwpt:
            self.room.hwpt_kvm(self.idev, self.fd, EBUSY)
        else:
            self.hwpt = self.room.hwpt_kvm(self.idev, self.fd)

    @precondition(lambda self: self.hwpt and self.room.c.mm.alive)
    @rule()
    def destroy_hwpt(self) -> None:
        self.room.c.destroy(self.hwpt, EBUSY if self.attached == "kvm" else 0)
        if self.attached != "kvm":
            self.hwpt = 0

    @rule(kvm=st.booleans())
    def attach(self, kvm: bool) -> None:
        """Attach, or replace."""
        if not self.hwpt if kvm else not self.room.c.mm.alive:
            return
        change = self.room.replace if self.attached else self.room.attach
        change(self.idev, self.hwpt if kvm else self.ioas)
        self.attached = "kvm" if kvm else "ioas"

    @precondition(lambda self: self.attached)
    @rule(now=st.integers(0, 3))
    def detach(self, now: int) -> None:
        if now:
            return
        self.room.detach(self.idev)
        self.attached = ""

    # ---- DMA ----

    @precondition(lambda self: self.attached)
    @rule(slot=SLOTS, page=NPAGES, write=st.booleans(), offset=st.sampled_from((0, 4090)))
    def dma(self, slot: int, page: int, write: bool, offset: int) -> None:
        """It has what the guest has at that moment, or fails where the guest has nothing."""
        bases = [each.base_gfn for each in self.room.vm.slots[0]]
        gpa = (bases[slot % len(bases)] if bases else 1 << 24) + page << 12 | offset
        fresh = next(_serial).to_bytes(4, "little")
        dma = self.room.dma(self.idev, Op.WRITE if write else Op.READ, gpa, 4, data=fresh if write else b"")
        want = self.expected(gpa, write=write)
        before = want[0].pread(want[1], 4) if want is not None else b""
        dma.run()
        if self.attached != "kvm" or want is None:
            assert dma.state is State.FAILED or self.attached == "ioas", (dma, self.attached)
        elif dma.state is State.FAILED:
            assert gpa >> 12 in self.tracked
        else:
            assert want[0].pread(want[1], 4) == (fresh if write else bytes(dma.data)), hex(gpa)
            assert write or bytes(dma.data) == before

    def expected(self, gpa: int, *, write: bool) -> tuple[Memfd, int] | None:
        """Where a guest's byte is now: by the slots and the VMM's memory, not by any table."""
        if not self.room.c.mm.alive:
            return None
        for slot in self.room.vm.slots[0]:
            offset = gpa - (slot.base_gfn << 12)
            if 0 <= offset < slot.npages << 12 and not (write and slot.readonly):
                runs = self.room.c.mm.resolve(slot.userspace_addr + offset, 1, write=write)
                if runs:
                    return runs[0].file, (runs[0].page << 12) + offset % PAGE_SIZE  # type: ignore[return-value]
        return None

    # ---- the end of the VMM ----

    @precondition(lambda self: self.attached == "kvm")
    @rule(now=st.integers(0, 7))
    def vmm_dies(self, now: int) -> None:
        if now == 0:
            self.room.c.mm.exit()

    # ---- what always holds ----

    @property
    def tdp(self) -> TdpFile | None:
        return self.room.vm.exported.get(0)

    @invariant()
    def sound(self) -> None:
        self.room.sound()

    @invariant()
    def lives(self) -> None:
        """The table lives while somebody has it; page requests are on while it is attached."""
        assert (self.tdp is not None) == bool(self.fd or self.hwpt)
        if self.tdp is not None:
            assert self.tdp.refs == bool(self.fd) + bool(self.hwpt)
            assert len(self.tdp.importers) == bool(self.hwpt)
        assert endpoint(self.idev).iopf.enabled == (self.attached == "kvm")

    @invariant()
    def the_table_shows_what_the_slots_say(self) -> None:
        """Read from its bytes, with nothing but the slots and the VMM's memory to compare with."""
        mmu, memory = self.room.vm.mmu, self.room.memory
        if not mmu.root:
            return
        found = decode(lambda hpa: struct.pack("<512Q", *memory.entries(hpa)), mmu.root, mmu.level)
        for each in found.values():
            run = memory.run(each.hpa)
            assert run is not None
            pos = run.pos + each.hpa - run.first
            for gpa in (each.gpa, each.gpa + each.size - PAGE_SIZE):
                want = self.expected(gpa, write="w" in each.rights)
                assert want == (run.file, pos + gpa - each.gpa), f"{gpa:#x}"

    @invariant()
    def caches_lead_to_what_the_guest_has(self) -> None:
        hwpt = self.room.c.ictx.objects.get(self.hwpt)
        if isinstance(hwpt, HwptKvm):
            for cached in hwpt.cached():
                want = self.expected(cached.first, write=bool(cached.allowed >> 2 & 1))
                assert want == (cached.file, cached.pos), f"{cached.where} {cached.first:#x}"

    def teardown(self) -> None:
        if self.attached:
            self.room.detach(self.idev)
        self.room.c.close()
        self.room.unbind(self.idev)
        for fd in list(self.room.c.fds.files):
            self.room.c.fds.close(fd)
        assert self.room.vm.dying
        assert self.room.memory.in_use == (0, 0)
        if self.room.c.mm.alive:
            self.room.c.mm.exit()


TestSharing = Sharing.TestCase
TestSharing.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
