"""Room client: `iommufdctl demo`, a guest's page table nested on Intel VT-d, told step by step."""

from __future__ import annotations

import select
import sys
import threading
import time
from typing import TYPE_CHECKING, NamedTuple

from iommufd_uapi import iommufd as uapi

from .demo import Story
from .endpoint import DmaError
from .pagetable import PageTable
from .show import YELLOW, amount
from .testing import Daemon

if TYPE_CHECKING:
    from .admin import Admin
    from .device import VfioDevice
    from .endpoint import Endpoint
    from .files import File
    from .guest import GuestMemory
    from .iommufd import Iommufd
    from .show import Paint

RAM = 4 << 20
TABLES = 0x10_0000  # guest-physical: where the guest has its page tables
BUFFER, OTHER = 0x20_0000, 0x30_0000
IOVA = 0x7F12_3456_7000
REPLACES = 1000
PATIENCE = 10.0  # seconds
MARKS = b"A", b"B"


class Vmm(NamedTuple):
    """What a VMM with one device has."""

    iommufd: Iommufd
    device: VfioDevice
    endpoint: Endpoint
    ram: GuestMemory
    dev: int
    parent: int


def run(paint: Paint) -> int:
    """Tell the story; the exit status."""
    start = time.perf_counter()
    story = Story(paint)
    with Daemon("--machine", "vtd", "--sanitize", "--log-level", "error") as daemon:
        story.say(f"iommufdd runs as process {daemon.pid}, with an emulated Intel VT-d and four devices; no privilege")
        with (
            daemon.open(explain=True) as iommufd,
            daemon.admin() as admin,
            iommufd.device("vfio0") as device,
            iommufd.guest_memory(RAM, "guest RAM") as ram,
        ):
            ok = _tell(iommufd, device, ram, admin, daemon, story)
        with daemon.admin() as admin:
            left = admin.stats().objects
    story.step("The end")
    story.say(f"the VMM has gone; objects left in the daemon: {left}")
    story.say(f"{time.perf_counter() - start:.2f} s in all")
    return 0 if ok and not left else 1


def _tell(
    iommufd: Iommufd, device: VfioDevice, ram: GuestMemory, admin: Admin, daemon: Daemon, story: Story
) -> bool:
    """All of it; whether everything went as it should."""
    story.step("A device for the guest: its memory is stage 2, a nest parent")
    vmm = _realize(iommufd, device, ram, admin, story)
    story.step("The guest has a page table of its own: stage 1, nested on it")
    table = PageTable(ram, TABLES)
    hwpt, fault_file = _nest(vmm, table, story)
    story.step("DMA through both stages")
    done = _dma(vmm, table, story)
    story.step("A page fault: the device asks, the VMM answers, the DMA goes on")
    done &= _page_fault(vmm, table, fault_file, daemon, story)
    story.step("The guest changes a page and forgets the invalidation")
    done &= _forget(vmm, table, hwpt, admin, story)
    story.step(f"Another page table under traffic, {REPLACES} times")
    done &= _replace(vmm, daemon, story)
    device.close()
    iommufd.destroy(hwpt)
    fault_file.close()
    return done


def _realize(iommufd: Iommufd, device: VfioDevice, ram: GuestMemory, admin: Admin, story: Story) -> Vmm:
    dev = device.bind(iommufd)
    story.call("VFIO_DEVICE_BIND_IOMMUFD", f"/dev/vfio/devices/vfio0 is device {dev}")
    ioas = iommufd.ioas_alloc()
    iommufd.ioas_map(ioas, ram, iova=0)
    story.call("IOMMU_IOAS_MAP", f"{amount(RAM)} of guest memory at guest-physical 0")
    parent = iommufd.hwpt_alloc(dev, ioas, flags=uapi.IOMMU_HWPT_ALLOC_NEST_PARENT)
    story.call("IOMMU_HWPT_ALLOC, nest parent", f"hwpt_paging {parent}")
    return Vmm(iommufd, device, admin.endpoint("vfio0", iommufd), ram, dev, parent)


def _nest(vmm: Vmm, table: PageTable, story: Story) -> tuple[int, File]:
    fault_id, file = vmm.iommufd.fault_queue_alloc()
    hwpt = vmm.iommufd.hwpt_alloc(
        vmm.dev, vmm.parent, data=uapi.HwptVtdS1(pgtbl_addr=table.root, addr_width=48), fault_id=fault_id
    )
    story.call("IOMMU_HWPT_ALLOC, VT-d stage 1", f"hwpt_nested {hwpt}: root at guest-physical {table.root:#x}")
    vmm.device.attach(hwpt)
    story.call("VFIO_DEVICE_ATTACH_IOMMUFD_PT", "requests of vfio0 are translated twice from now on")
    return hwpt, file


def _dma(vmm: Vmm, table: PageTable, story: Story) -> bool:
    table.map(IOVA, BUFFER)
    vmm.endpoint.write(IOVA + 0x10, b"written by vfio0")
    seen = vmm.ram.read(BUFFER + 0x10, 16)
    story.call(f"vfio0 writes at iova {IOVA + 0x10:#x}", f"guest memory at {BUFFER + 0x10:#x} has {seen!r}")
    for row in vmm.endpoint.walk(IOVA + 0x10).rows:
        if row.what.startswith("stage 1"):
            story.say(story.paint(f"   {row.what}  at {row.address:#x}: {row.bits:<12} {row.leads}", YELLOW))
    return seen == b"written by vfio0"


def _page_fault(vmm: Vmm, table: PageTable, fault_file: File, daemon: Daemon, story: Story) -> bool:
    """The device waits in another thread, as hardware does beside the CPU."""
    missing = IOVA + 0x5000
    outcome: list[object] = []

    def device() -> None:
        with daemon.admin() as admin:
            try:
                admin.endpoint("vfio0", vmm.iommufd).write(missing, b"late")
                outcome.append("done")
            except DmaError as error:
                outcome.append(error)

    thread = threading.Thread(target=device)
    thread.start()
    request = _wait_for_request(fault_file)
    story.call("page request", f"device {request.dev_id} wants to write {request.addr:#x} (cookie {request.cookie})")
    table.map(missing, OTHER)
    fault_file.write(uapi.HwptPageResponse(cookie=request.cookie, code=0).pack())
    thread.join()
    story.call("page mapped, response SUCCESS", f"the DMA is {outcome[0]}; memory has {vmm.ram.read(OTHER, 4)!r}")
    return vmm.ram.read(OTHER, 4) == b"late"


def _wait_for_request(fault_file: File) -> uapi.HwptPgfault:
    select.select([fault_file], [], [], PATIENCE)
    return uapi.HwptPgfault.unpack(fault_file.read(uapi.HwptPgfault.SIZEOF))


def _forget(vmm: Vmm, table: PageTable, hwpt: int, admin: Admin, story: Story) -> bool:
    vmm.ram.write(BUFFER, b"the old page")
    vmm.ram.write(OTHER + 0x1000, b"the new page")
    table.map(IOVA, OTHER + 0x1000)
    stale = vmm.endpoint.read(IOVA, 12)
    story.call("the table now leads elsewhere", f"vfio0 still reads {stale!r}")
    found = max(admin.sanitize(settle=True), key=lambda machine: machine.never)  # the keeper has a machine too
    for line in found.lines[1:5]:
        story.say(story.paint(f"   {line}", YELLOW))
    vmm.iommufd.hwpt_invalidate(hwpt, [uapi.HwptVtdS1Invalidate(addr=IOVA, npages=1)])
    fresh = vmm.endpoint.read(IOVA, 12)
    story.call("IOMMU_HWPT_INVALIDATE", f"vfio0 reads {fresh!r}")
    return found.never == 1 and stale != fresh == b"the new page"


def _replace(vmm: Vmm, daemon: Daemon, story: Story) -> bool:
    """Two address spaces show different pages at one IOVA; the device reads while the VMM switches."""
    places = []
    for mark in MARKS:
        ioas = vmm.iommufd.ioas_alloc()
        page = vmm.ram.slice(BUFFER + 0x1000 * (1 + MARKS.index(mark)), 0x1000)
        page.view[:] = mark * len(page)
        vmm.iommufd.ioas_map(ioas, page, iova=0x1000)
        places.append(ioas)
    vmm.device.attach(places[0])
    seen: dict[bytes, int] = {}
    stop = threading.Event()

    def traffic() -> None:
        with daemon.admin() as admin:
            endpoint = admin.endpoint("vfio0", vmm.iommufd)
            while not stop.is_set():
                data = endpoint.read(0x1000, 0x1000)
                key = bytes(sorted(set(data)))
                seen[key] = seen.get(key, 0) + 1

    thread = threading.Thread(target=traffic)
    thread.start()
    for at in range(REPLACES):
        vmm.device.attach(places[(at + 1) % 2])
    stop.set()
    thread.join()
    reads = sum(seen.values())
    words = ", ".join(f"{count} saw {mark.decode()}" for mark, count in sorted(seen.items()))
    story.call("VFIO_DEVICE_ATTACH_IOMMUFD_PT, again and again", f"{reads} reads meanwhile: {words}; none failed")
    vmm.device.detach()
    for ioas in places:
        vmm.iommufd.destroy(ioas)
    return bool(seen) and set(seen) <= set(MARKS)


if __name__ == "__main__":
    from .show import plain

    sys.exit(run(plain))
