"""Memory slots: which guest page is which address of the VMM (virt/kvm/kvm_main.c)."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

import iommufd_uapi.kvm as uapi
from iommufdd.errors import EEXIST, EINVAL
from iommufdd.user import PAGE_SHIFT, PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Iterator

FLAGS = uapi.KVM_MEM_LOG_DIRTY_PAGES | uapi.KVM_MEM_READONLY
MAX_GFN = (1 << 52 - PAGE_SHIFT) - 1  # kvm_mmu_max_gfn()
USER_END = 1 << 56  # access_ok()
PIECE = 1 << 16  # bytes of a bitmap at once


class Change(enum.Enum):
    """enum kvm_mr_change"""

    CREATE = "create"
    DELETE = "delete"
    MOVE = "move"
    FLAGS = "flags"
    NONE = "none"


class MemorySlot:
    """struct kvm_memory_slot"""

    def __init__(self, slot_id: int, region: uapi.KvmUserspaceMemoryRegion) -> None:
        self.id = slot_id
        self.base_gfn = region.guest_phys_addr >> PAGE_SHIFT
        self.npages = region.memory_size >> PAGE_SHIFT
        self.userspace_addr = region.userspace_addr
        self.flags = region.flags
        logs = region.flags & uapi.KVM_MEM_LOG_DIRTY_PAGES
        self.dirty: set[int] | None = set() if logs else None  # guest pages written to

    @property
    def last_gfn(self) -> int:
        return self.base_gfn + self.npages - 1

    @property
    def readonly(self) -> bool:
        return bool(self.flags & uapi.KVM_MEM_READONLY)

    def address(self, gfn: int) -> int:
        """Where the VMM has the page (__gfn_to_hva_memslot)."""
        return self.userspace_addr + (gfn - self.base_gfn << PAGE_SHIFT)

    def mark_dirty(self, gfn: int) -> None:
        """mark_page_dirty_in_slot()"""
        if self.dirty is not None:
            self.dirty.add(gfn)

    def take_dirty(self) -> set[int]:
        """The guest pages written to since last time."""
        assert self.dirty is not None
        found, self.dirty = self.dirty, set()
        return found

    def bitmap(self, gfns: set[int]) -> Iterator[bytes]:
        """A bit for each page of the slot, set for those of gfns, in whole 64 bit words; piece by piece."""
        pieces: dict[int, bytearray] = {}
        size = -(-self.npages // 64) * 8
        for gfn in gfns:
            at, bit = divmod(gfn - self.base_gfn, 8)
            start = at & -PIECE
            piece = pieces.setdefault(start, bytearray(min(PIECE, size - start)))
            piece[at - start] |= 1 << bit
        for start in range(0, size, PIECE):
            yield bytes(pieces.get(start) or min(PIECE, size - start))


class MemorySlots:
    """struct kvm_memslots of one address space."""

    def __init__(self) -> None:
        self.by_id: dict[int, MemorySlot] = {}
        self.generation = 0  # counts changes

    def __iter__(self) -> Iterator[MemorySlot]:
        return iter(self.by_id.values())

    def find(self, gfn: int) -> MemorySlot | None:
        """gfn_to_memslot()"""
        return next((slot for slot in self if slot.base_gfn <= gfn <= slot.last_gfn), None)

    def in_range(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Guest pages (first, last) that the VMM has in [start, end) (kvm_for_each_memslot_in_hva_range)."""
        for slot in self:
            low = max(start, slot.userspace_addr)
            high = min(end, slot.userspace_addr + (slot.npages << PAGE_SHIFT))
            if low < high:
                base = slot.base_gfn - (slot.userspace_addr >> PAGE_SHIFT)
                yield base + (low >> PAGE_SHIFT), base + (high - 1 >> PAGE_SHIFT)

    def check(self, region: uapi.KvmUserspaceMemoryRegion) -> tuple[Change, int]:
        """What a region asks for, and the id of its slot (kvm_set_memory_region): EINVAL, EEXIST."""
        check_region(region)
        slot_id = region.slot & 0xFFFF
        old = self.by_id.get(slot_id)
        if not region.memory_size:
            if old is None:
                raise EINVAL(f"slot {slot_id} cannot be deleted: there is none")
            return Change.DELETE, slot_id
        new = MemorySlot(slot_id, region)
        change = Change.CREATE if old is None else _modification(old, new)
        if change in (Change.CREATE, Change.MOVE):
            self._check_place(new)
        return change, slot_id

    def _check_place(self, new: MemorySlot) -> None:
        for slot in self:
            if slot.id != new.id and slot.base_gfn <= new.last_gfn and new.base_gfn <= slot.last_gfn:
                raise EEXIST(f"slot {slot.id} is at guest page {slot.base_gfn:#x}..{slot.last_gfn:#x}")
        if new.last_gfn > MAX_GFN:
            raise EINVAL(f"guest page {new.last_gfn:#x} is beyond what a guest can have")


def _modification(old: MemorySlot, new: MemorySlot) -> Change:
    """EINVAL unless only the guest address or the logging changes."""
    if (new.userspace_addr, new.npages) != (old.userspace_addr, old.npages) or (
        (new.flags ^ old.flags) & uapi.KVM_MEM_READONLY
    ):
        raise EINVAL(f"slot {old.id} can only move or log: not change address, size or KVM_MEM_READONLY")
    if new.base_gfn != old.base_gfn:
        return Change.MOVE
    return Change.FLAGS if new.flags != old.flags else Change.NONE


def check_region(region: uapi.KvmUserspaceMemoryRegion) -> None:
    """The numbers by themselves: EINVAL."""
    if region.flags & ~FLAGS:
        raise EINVAL(f"flags {region.flags & ~FLAGS:#x} are not known")
    if region.memory_size % PAGE_SIZE or region.guest_phys_addr % PAGE_SIZE:
        raise EINVAL("the size or the guest address is no multiple of a page")
    if region.userspace_addr % PAGE_SIZE or region.userspace_addr + region.memory_size > USER_END:
        raise EINVAL(f"address {region.userspace_addr:#x} is no multiple of a page, or no user address")
    as_id, slot_id = region.slot >> 16, region.slot & 0xFFFF
    if as_id >= uapi.KVM_ADDRESS_SPACE_NUM or slot_id >= uapi.KVM_USER_MEM_SLOTS:
        raise EINVAL(f"slot {slot_id} of address space {as_id}")
    if region.guest_phys_addr + region.memory_size >= 1 << 64:
        raise EINVAL("the guest addresses wrap")
    if region.memory_size >> PAGE_SHIFT > uapi.KVM_MEM_MAX_NR_PAGES:
        raise EINVAL(f"a slot of {region.memory_size >> PAGE_SHIFT} pages")
