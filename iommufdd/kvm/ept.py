"""The entries of an EPT as KVM writes them (Intel SDM vol. 3, 30.3; arch/x86/kvm/mmu/spte.h, with the RFC's p24).

The CPU is one whose EPT has no accessed and dirty bits: KVM tracks both by taking rights away.
"""

from __future__ import annotations

R, W, X = 1 << 0, 1 << 1, 1 << 2
RWX = R | W | X
WB = 6 << 3  # memory type
IPAT = 1 << 6
PS = 1 << 7
LOW_PRESENT = 1 << 11  # where KVM's mark was before the RFC, and is in 7.2; to VT-d it is SNP
HOST_WRITABLE = 1 << 53
MMU_WRITABLE = 1 << 55
PRESENT = 1 << 59  # KVM's own mark of an entry that is backed by memory (SPTE_MMU_PRESENT_MASK)
AD_DISABLED = 1 << 60
SUPPRESS_VE = 1 << 63
NOTHING = SUPPRESS_VE  # an empty entry (SHADOW_NONPRESENT_VALUE)
ADDRESS = 0x000F_FFFF_FFFF_F000
SAVED_SHIFT = 52  # where R and X are kept while access is tracked
SAVED = (R | X) << SAVED_SHIFT
MMIO = W | X  # a misconfiguration to the CPU: KVM's mark of emulated MMIO (VMX_EPT_MISCONFIG_WX_VALUE)


def make_leaf(hpa: int, level: int, *, writable: bool, host_writable: bool) -> int:
    """A leaf entry; host_writable: the VMM could write (make_spte)."""
    entry = PRESENT | AD_DISABLED | R | X | WB | IPAT | hpa
    if level > 1:
        entry |= PS
    if host_writable:
        entry |= HOST_WRITABLE
    return entry | W | MMU_WRITABLE if writable else entry


def make_table(hpa: int) -> int:
    """An entry that leads to a table (make_nonleaf_spte)."""
    return PRESENT | AD_DISABLED | RWX | hpa


def make_mmio(gpa: int, generation: int) -> int:
    """KVM's mark that nothing is there, with the generation of the slots in what is ignored (make_mmio_spte).

    With the RFC's p24 its low bits are 3 to 11, so that bit 11 may be set.
    """
    return MMIO | (generation & 0x1FF) << 3 | (generation >> 9 & 0x7F) << 52 | gpa


def is_leaf(entry: int, level: int) -> bool:
    """A present entry maps memory by itself."""
    return level == 1 or bool(entry & PS)


def is_mmio(entry: int) -> bool:
    """is_mmio_spte()"""
    return not entry & PRESENT and entry & RWX == MMIO


def track_access(entry: int) -> int:
    """Take all rights away and remember R and X (mark_spte_for_access_track); W comes back with a write."""
    if not entry & RWX:
        return entry
    return entry & ~(RWX | SAVED) | (entry & (R | X)) << SAVED_SHIFT


def pages(level: int) -> int:
    """Pages of 4 KiB that a leaf of this level maps."""
    return int(1 << 9 * (level - 1))


def reserved_masks(maxphyaddr: int, max_level: int) -> tuple[int, ...]:
    """rsvd_bits_mask[2][5], flat, and bit 11 in all of them, as the RFC promises (__reset_rsvds_bits_mask_ept)."""
    high = ADDRESS & -(1 << maxphyaddr) | LOW_PRESENT
    no_1g, no_2m = (0 if max_level >= 3 else PS), (0 if max_level >= 2 else PS)
    top = high | _bits(3, 7)
    small = (high, high | _bits(3, 6) | no_2m, high | _bits(3, 6) | no_1g, top, top)
    large = (high, high | _bits(12, 20) | no_2m, high | _bits(12, 29) | no_1g, top, top)
    return small + large


def _bits(low: int, high: int) -> int:
    return int((1 << high + 1) - (1 << low))
