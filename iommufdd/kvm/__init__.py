"""The corner of KVM that shares a VM's page tables with an IOMMU (RFC "Sharing KVM TDP to IOMMU", December 2023).

memory.py      the machine's physical addresses: pages of tables, and where clients' files are
ept.py         the entries of an EPT, bit by bit
slots.py       memory slots: which guest page is which address of the VMM
mmu.py         the table: filled on demand, zapped, flushed
tdp_fd.py      the descriptor that stands for a table: importers, faults
dev.py         /dev/kvm
vm.py          a VM: its ioctls
invariants.py  what must hold while a table is shared
"""
