"""Room client: `iommufdctl demo smmuv3`, a vIOMMU with two devices on ARM SMMUv3, told step by step."""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, NamedTuple

from iommufd_uapi import iommufd as uapi
from iommufd_uapi.smmuv3 import Cmd, Event, Idr0, Idr5, Ste, output_bits

from .demo import Story
from .endpoint import DmaError
from .lpae import LpaeTable
from .show import YELLOW, amount
from .testing import Daemon

if TYPE_CHECKING:
    from iommufd_uapi.smmuv3 import Command

    from .admin import Admin
    from .device import VfioDevice
    from .endpoint import Endpoint
    from .files import File
    from .guest import GuestMemory
    from .iommufd import Iommufd
    from .show import Paint

RAM = 4 << 20
CDS, TABLES = 0x8_0000, 0x10_0000  # guest-physical: where the guest has its CDs and its translation tables
BUFFER, OTHER = 0x20_0000, 0x30_0000
IOVA = 0x7F12_3456_7000
VSIDS = {"vfio0": 0x10, "vfio1": 0x18}  # the guest's names for the devices
DEPTH = 4  # of the event queue
HEADER = uapi.IommufdVeventHeader.SIZEOF
RECORD = HEADER + uapi.VeventArmSmmuv3.SIZEOF


class Function(NamedTuple):
    """One of the devices, as VMM and guest have it."""

    device: VfioDevice
    endpoint: Endpoint
    dev: int
    vsid: int
    asid: int
    table: LpaeTable

    @property
    def cd(self) -> int:
        """Where the guest has its CD."""
        return CDS + 64 * self.asid


class Vmm(NamedTuple):
    """What a VMM with one vIOMMU has."""

    iommufd: Iommufd
    ram: GuestMemory
    viommu: int
    functions: list[Function]


def run(paint: Paint) -> int:
    """Tell the story; the exit status."""
    start = time.perf_counter()
    story = Story(paint)
    with Daemon("--machine", "smmuv3", "--sanitize", "--log-level", "error") as daemon:
        story.say(f"iommufdd runs as process {daemon.pid}, with an emulated ARM SMMUv3 and four devices; no privilege")
        with daemon.open(explain=True) as iommufd, daemon.admin() as admin, ExitStack() as opened:
            devices = [opened.enter_context(iommufd.device(name)) for name in VSIDS]
            ram = opened.enter_context(iommufd.guest_memory(RAM, "guest RAM"))
            ok = _tell(iommufd, devices, ram, admin, story)
        with daemon.admin() as admin:
            left = admin.stats().objects
    story.step("The end")
    story.say(f"the VMM has gone; objects left in the daemon: {left}")
    story.say(f"{time.perf_counter() - start:.2f} s in all")
    return 0 if ok and not left else 1


def _tell(iommufd: Iommufd, devices: list[VfioDevice], ram: GuestMemory, admin: Admin, story: Story) -> bool:
    """All of it; whether everything went as it should."""
    story.step("A vIOMMU: the guest's memory is stage 2, and both devices get the StreamIDs that the guest knows")
    vmm = _realize(iommufd, devices, ram, admin, story)
    story.step("The guest has a CD and a table for each device; the VMM passes on what the guest's STEs say")
    hwpts = _nest(vmm, story)
    with iommufd.veventq_alloc(vmm.viommu, uapi.IOMMU_VEVENTQ_TYPE_ARM_SMMUV3, DEPTH)[1] as events:
        story.call("IOMMU_VEVENTQ_ALLOC", f"room for {DEPTH} events")
        story.step("DMA through both stages")
        done = _dma(vmm, story)
        story.step("The guest gives a device another table; its commands name the device by its vSID")
        done &= _invalidate(vmm, admin, story)
        story.step("A fault is the guest's to know: it comes back as an event record with the vSID")
        done &= _event(vmm, events, story)
        story.step("More faults than the queue has room for")
        done &= _overflow(vmm, events, story)
    for device, hwpt in zip(devices, hwpts, strict=True):
        device.close()
        iommufd.destroy(hwpt)
    return done


def _realize(
    iommufd: Iommufd, devices: list[VfioDevice], ram: GuestMemory, admin: Admin, story: Story
) -> Vmm:
    devs = [device.bind(iommufd) for device in devices]
    info = iommufd.get_hw_info(devs[0]).info
    assert isinstance(info, uapi.HwInfoArmSmmuv3)
    idr0, oas = Idr0.of(info.idr), output_bits(Idr5.of(info.idr[5:]).oas)
    story.call("IOMMU_GET_HW_INFO", f"SMMUv3: S1P={idr0.s1p} S2P={idr0.s2p} ATS={idr0.ats}, {oas} bits of address")
    ioas = iommufd.ioas_alloc()
    iommufd.ioas_map(ioas, ram, iova=0)
    story.call("IOMMU_IOAS_MAP", f"{amount(RAM)} of guest memory at guest-physical 0")
    parent = iommufd.hwpt_alloc(devs[0], ioas, flags=uapi.IOMMU_HWPT_ALLOC_NEST_PARENT)
    viommu = iommufd.viommu_alloc(devs[0], parent, uapi.IOMMU_VIOMMU_TYPE_ARM_SMMUV3)
    story.call("IOMMU_VIOMMU_ALLOC", f"viommu {viommu} over the nest parent {parent}")
    vmm = Vmm(iommufd, ram, viommu, [])
    for device, dev, (name, vsid) in zip(devices, devs, VSIDS.items(), strict=True):
        device.attach(parent)
        iommufd.vdevice_alloc(viommu, dev, vsid)
        story.call("IOMMU_VDEVICE_ALLOC", f"{name} is vSID {vsid:#x}")
        asid = len(vmm.functions) + 1
        table = LpaeTable(ram, TABLES + (asid << 16))
        vmm.functions.append(Function(device, admin.endpoint(name, iommufd), dev, vsid, asid, table))
    return vmm


def _nest(vmm: Vmm, story: Story) -> list[int]:
    hwpts = []
    for function in vmm.functions:
        vmm.ram.write(function.cd, function.table.cd(function.asid).pack())
        ste = Ste.s1(function.cd, eats=function.device.name == "vfio0", s1stalld=True)
        data = uapi.HwptArmSmmuv3(ste=ste.words()[:2])
        hwpt = vmm.iommufd.hwpt_alloc(function.dev, vmm.viommu, data=data)
        function.device.attach(hwpt)
        story.call("IOMMU_HWPT_ALLOC, vSTE", f"hwpt_nested {hwpt} for {function.device.name}: CD at {function.cd:#x}")
        hwpts.append(hwpt)
    return hwpts


def _dma(vmm: Vmm, story: Story) -> bool:
    for function in vmm.functions:
        function.table.map(IOVA, BUFFER + 0x1000 * function.asid)
        function.endpoint.write(IOVA, b"written by " + function.device.name.encode())
    where = BUFFER + 0x1000 * vmm.functions[1].asid
    seen = vmm.ram.read(where, 16)
    story.call(f"both devices write at iova {IOVA:#x}", f"guest memory at {where:#x} has {seen!r}")
    for row in vmm.functions[1].endpoint.walk(IOVA).rows:
        if row.what.startswith(("CD", "stage 1")):
            bits = " ".join(bit for bit in row.bits.split() if "=" not in bit or bit.startswith(("asid", "ttb0")))
            story.say(story.paint(f"   {row.what} at {row.address:#x}: {bits} {row.leads}", YELLOW))
    return seen == b"written by vfio1"


def _invalidate(vmm: Vmm, admin: Admin, story: Story) -> bool:
    function = vmm.functions[1]
    table = LpaeTable(vmm.ram, TABLES + 0x8_0000)
    table.map(IOVA, OTHER)
    vmm.ram.write(OTHER, b"the other table!")
    vmm.ram.write(function.cd, table.cd(function.asid).pack())
    stale = function.endpoint.read(IOVA, 16)
    story.call("the CD now leads to another table", f"vfio1 still reads {stale!r}")
    found = max(admin.sanitize(settle=True), key=lambda machine: machine.never)
    for line in found.lines[3:5]:
        story.say(story.paint(f"   {line}", YELLOW))
    commands = [Cmd.cfgi_cd(function.vsid), Cmd.tlbi_nh_asid(function.asid)]
    count = vmm.iommufd.hwpt_invalidate(vmm.viommu, [_entry(command) for command in commands])
    fresh, untouched = function.endpoint.read(IOVA, 16), vmm.functions[0].endpoint.read(IOVA, 16)
    story.call("IOMMU_HWPT_INVALIDATE", f"{count} commands; vfio1 reads {fresh!r}, vfio0 {untouched!r}")
    told = any("right: CMD_CFGI_CD sid=0x18" in line for line in found.lines)
    return told and stale != fresh == b"the other table!" and untouched == b"written by vfio0"


def _entry(command: Command) -> uapi.ViommuArmSmmuv3Invalidate:
    return uapi.ViommuArmSmmuv3Invalidate(cmd=command.words())


def _refused(function: Function, iova: int) -> str:
    """The fault of a DMA that must fail."""
    try:
        function.endpoint.write(iova, b"x")
    except DmaError as error:
        return error.fault.text if error.fault is not None else str(error)
    return "none"


def _event(vmm: Vmm, events: File, story: Story) -> bool:
    function = vmm.functions[1]
    story.call(f"vfio1 writes at iova {IOVA + 0x5000:#x}", _refused(function, IOVA + 0x5000))
    data = events.read(RECORD)
    header, record = uapi.IommufdVeventHeader.unpack(data), Event.decode(data[HEADER :])
    story.call("read(vEVENTQ)", f"{len(data)} bytes, sequence {header.sequence}: {record}")
    return (header.sequence, record.sid) == (0, function.vsid)


def _overflow(vmm: Vmm, events: File, story: Story) -> bool:
    for page in range(DEPTH + 3):
        _refused(vmm.functions[1], IOVA + 0x10_0000 + page * 0x1000)
    data, seen = events.read(RECORD * (DEPTH + 1)), []
    while data:
        header = uapi.IommufdVeventHeader.unpack(data)
        lost = bool(header.flags & uapi.IOMMU_VEVENTQ_FLAG_LOST_EVENTS)
        seen.append((header.sequence, lost))
        data = data[HEADER if lost else RECORD :]
    story.call(f"{DEPTH + 3} faults, then read(vEVENTQ)", ", ".join(
        f"{sequence} LOST_EVENTS" if lost else f"event {sequence}" for sequence, lost in seen
    ))  # fmt: skip
    return len(seen) > 1 and seen[-1][1] and not any(lost for _, lost in seen[:-1])


if __name__ == "__main__":
    from .show import plain

    sys.exit(run(plain))
