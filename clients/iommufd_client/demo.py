"""Room client: `iommufdctl demo`, a small VMM against a private daemon, told step by step."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from iommufd_uapi import iommufd as uapi
from iommufd_uapi import iommufd_test as mock

from .memory import Buffers
from .show import BOLD, CYAN, YELLOW, amount, render
from .testing import Daemon

if TYPE_CHECKING:
    from .guest import GuestMemory
    from .iommufd import Iommufd
    from .show import Paint

GUEST_RAM = 0x100_0000  # guest-physical address of the memory: the mock device reaches no lower
DIRTY = 3  # pages that the device writes to


class Story:
    """Prints numbered steps."""

    def __init__(self, paint: Paint) -> None:
        self.paint = paint
        self._steps = 0

    def step(self, text: str) -> None:
        self._steps += 1
        print(f"\n{self.paint(f'{self._steps}. {text}', BOLD)}")

    def call(self, name: str, result: str) -> None:
        print(f"   {self.paint(name, CYAN)}  ->  {result}")

    def say(self, text: str) -> None:
        print(f"   {text}")


def run(paint: Paint) -> int:
    """Tell the story; the exit status."""
    start = time.perf_counter()
    story = Story(paint)
    with Daemon() as daemon:
        story.say(f"iommufdd runs as process {daemon.pid}; no kernel support, no privilege")
        with daemon.open(explain=True) as iommufd:
            ok = _vmm(iommufd, daemon, story)
        with daemon.admin() as admin:
            left = admin.stats().objects
    story.step("The end")
    story.say(f"the client has gone; objects left in the daemon: {left}")
    story.say(f"{time.perf_counter() - start:.2f} s in all")
    return 0 if ok and not left else 1


def _vmm(iommufd: Iommufd, daemon: Daemon, story: Story) -> bool:
    """All calls of the VMM; whether each did what it should."""
    story.step("An I/O address space, and a device attached to it")
    ioas, device = _attach(iommufd, story)

    story.step("Guest memory, mapped where the guest expects it, and once more where there is room")
    with iommufd.guest_memory(4 << 20, "ram") as ram:
        iova = iommufd.ioas_map(ioas, ram, iova=GUEST_RAM)
        story.call("IOMMU_IOAS_MAP fixed", f"{amount(len(ram))} at iova {iova:#x}")
        iova = iommufd.ioas_map(ioas, ram.slice(0x1000, 0x2000), writable=False)
        story.call("IOMMU_IOAS_MAP auto, read-only", f"two pages of it at iova {iova:#x}")

        story.step("A device reads and writes guest memory by DMA")
        arrived = _dma(iommufd, ioas, ram, story)

        story.step("A page table of our own, which tracks dirty pages")
        hwpt = iommufd.hwpt_alloc(device.out_idev_id, ioas, flags=uapi.IOMMU_HWPT_ALLOC_DIRTY_TRACKING)
        story.call("IOMMU_HWPT_ALLOC", f"hwpt_paging {hwpt}")
        dirty = _dirty(iommufd, hwpt, len(ram), story)

        story.step("What is refused is explained")
        refused = _refused(iommufd, ioas, story)

        story.step("What the daemon has open (iommufdctl show)")
        with daemon.admin() as admin:
            tree = admin.show()
        tree.instances = [each for each in tree.instances if any(context.objects for context in each.contexts)]
        print("\n".join(f"   {line}" for line in render(tree, story.paint).splitlines()))

        story.step("Take it down")
        iommufd.destroy(hwpt)
        story.call("IOMMU_IOAS_UNMAP", f"{amount(iommufd.ioas_unmap(ioas))} unmapped")
        iommufd.destroy(device.out_stdev_id)
        iommufd.destroy(ioas)
        story.call("IOMMU_DESTROY", "device and ioas are gone")
    return arrived and dirty == DIRTY and refused == 2


def _attach(iommufd: Iommufd, story: Story) -> tuple[int, mock.MockDomainFlags]:
    ioas = iommufd.ioas_alloc()
    story.call("IOMMU_IOAS_ALLOC", f"ioas {ioas}")
    device = iommufd.mock_domain(ioas)
    dev_id = device.out_idev_id
    story.call("IOMMU_TEST_OP_MOCK_DOMAIN", f"device {dev_id}, page table hwpt_paging {device.out_hwpt_id}")
    info = iommufd.get_hw_info(dev_id)
    story.call("IOMMU_GET_HW_INFO", f"type {info.data_type:#x}, capabilities {info.capabilities:#x}, {info.info}")
    first, last = iommufd.ioas_iova_ranges(ioas).ranges[0]
    story.call("IOMMU_IOAS_IOVA_RANGES", f"the device reaches {first:#x}..{last:#x}")
    return ioas, device


def _dma(iommufd: Iommufd, ioas: int, ram: GuestMemory, story: Story) -> bool:
    """Both ways; whether both arrived."""
    ram.write(0x1000, b"written by the guest")
    with iommufd.create_access(ioas) as access:
        seen = iommufd.access_read(access, GUEST_RAM + 0x1000, 20)
        story.call("IOMMU_TEST_OP_ACCESS_RW read", repr(seen))
        iommufd.access_write(access, GUEST_RAM + 0x2000, b"written by a device")
    arrived = ram.read(0x2000, 19)
    story.call("guest memory at 0x2000", repr(arrived))
    return (seen, arrived) == (b"written by the guest", b"written by a device")


def _dirty(iommufd: Iommufd, hwpt: int, length: int, story: Story) -> int:
    """Pages dirtied by the mock device; how many of them the bitmap shows."""
    iommufd.hwpt_set_dirty_tracking(hwpt, enable=True)
    writes = Buffers()
    bits = ((1 << DIRTY) - 1).to_bytes(length // 4096 // 8, "little")
    pages = mock.Dirty(iova=GUEST_RAM, length=length, page_size=4096, uptr=writes.add(bits))
    iommufd.test(pages, hwpt, memory=writes)
    bitmap = iommufd.hwpt_get_dirty_bitmap(hwpt, GUEST_RAM, length)
    found = sum(byte.bit_count() for byte in bitmap)
    story.call("IOMMU_HWPT_GET_DIRTY_BITMAP", f"{found} of {8 * len(bitmap)} pages, after the device wrote to {DIRTY}")
    return found


def _refused(iommufd: Iommufd, ioas: int, story: Story) -> int:
    """Make calls that fail; how many did."""
    failed = 0
    for name, call in (
        ("IOMMU_IOAS_MAP of an address without memory", lambda: iommufd.ioas_map(ioas, 0x1000, 0x1000)),
        ("IOMMU_DESTROY of an ioas in use", lambda: iommufd.destroy(ioas)),
    ):
        try:
            call()
        except OSError as error:
            failed += 1
            story.call(name, story.paint(str(error), YELLOW))
    return failed


if __name__ == "__main__":
    from .show import plain

    sys.exit(run(plain))
