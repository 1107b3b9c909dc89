"""A machine with an SMMUv3, and guests that have STEs, CDs and LPAE tables in their memory."""

from __future__ import annotations

import iommufd_uapi.iommufd as uapi
from iommufd_uapi.bits import Bitfield
from iommufd_uapi.smmuv3 import Cd, EventRecord, S1Dss, Ste
from iommufdd.description import Caches, DeviceDescription, SmmuV3Iommu
from iommufdd.device import IommufdDevice, bind
from iommufdd.iommu.group import IommuGroup
from iommufdd.iommu.monitor import Invalidation, Monitor
from iommufdd.iommu.replace import Switch
from iommufdd.iommu.smmuv3 import SmmuV3
from iommufdd.iommu.smmuv3_master import Master
from iommufdd.objects import Holder
from tests.core.harness import Client

from .lab import Lab
from .tables import Table

CDS = 0x10_0000  # guest physical address of the guest's CD table
POOL = 0x11_0000  # and of its translation tables
PAGE = 0b11 | 1 << 6 | 1 << 10 | 1 << 11  # a page that users may read and write, accessed, not global
TYPE = uapi.IOMMU_VIOMMU_TYPE_ARM_SMMUV3


class SmmuLab(Lab):
    """One context, one SMMU, devices on demand."""

    iommu: SmmuV3  # type: ignore[assignment]

    def __init__(self, iommu: SmmuV3 | None = None, *, mode: str = "greedy", **capabilities: object) -> None:
        """mode: of the caches. capabilities: keys of SmmuV3Iommu."""
        caches = Caches(mode=mode)  # type: ignore[arg-type]
        self.c = Client()
        self.iommu = iommu or SmmuV3(
            SmmuV3Iommu(name="smmu0", caches=caches, **capabilities)  # type: ignore[arg-type]
        )
        self.driver = Holder()
        self.c.world.drivers.append(self.driver)
        self._made = 0

    def device(
        self, *, ats: bool = False, pri: bool = False, pasids: int = 0, group: IommuGroup | None = None,
        stall: bool = False, streams: int = 1, canwbs: bool = False,
    ) -> IommufdDevice:  # fmt: skip
        """A device, bound."""
        self._made += 1
        description = DeviceDescription(
            name=f"dev{self._made}", bdf=f"0000:{self._made:02x}:00.0", iommu="smmu0", ats=ats or pri, pri=pri,
            pasid_width=pasids, stall=stall, streams=streams, canwbs=canwbs,
        )  # fmt: skip
        dev = self.iommu.new_device(description, group or IommuGroup(self.iommu.blocked_domain))
        return bind(self.c.ictx, self.c.caller, dev, self.driver)

    # ---- a guest ----

    def viommu(self, idev: IommufdDevice, parent: int, kind: int = TYPE, expect: int = 0) -> int:
        return self.c.ioctl(uapi.ViommuAlloc(type=kind, dev_id=idev.id, hwpt_id=parent), expect).out_viommu_id

    def vste(
        self, idev: IommufdDevice, viommu: int, ste: Ste | tuple[int, int], *, flags: int = 0, fault: int = 0,
        expect: int = 0,
    ) -> int:  # fmt: skip
        """A nested HWPT from a vSTE."""
        words = ste.words()[:2] if isinstance(ste, Ste) else ste
        data = uapi.HwptArmSmmuv3(ste=words).pack()
        cmd = uapi.HwptAlloc(
            flags=flags, dev_id=idev.id, pt_id=viommu, fault_id=fault, data_type=uapi.IOMMU_HWPT_DATA_ARM_SMMUV3,
            data_len=len(data), data_uptr=self.c.process.put(data),
        )  # fmt: skip
        return self.c.ioctl(cmd, expect).out_hwpt_id

    def invalidate(self, viommu: int, *commands: Bitfield, expect: int = 0) -> int:  # type: ignore[override]
        """HWPT_INVALIDATE with raw commands; the number done."""
        data = b"".join(command.pack() for command in commands)
        cmd = uapi.HwptInvalidate(
            hwpt_id=viommu, data_uptr=self.c.process.put(data), entry_len=16, entry_num=len(commands),
            data_type=uapi.IOMMU_VIOMMU_INVALIDATE_DATA_ARM_SMMUV3,
        )  # fmt: skip
        return self.c.ioctl(cmd, expect).entry_num

    def veventq(self, viommu: int, depth: int = 16) -> int:
        """The fd of an event queue."""
        cmd = uapi.VeventqAlloc(viommu_id=viommu, type=uapi.IOMMU_VEVENTQ_TYPE_ARM_SMMUV3, veventq_depth=depth)
        return self.c.ioctl(cmd).out_veventq_fd

    def event(self, fd: int) -> tuple[int, int, bytes]:
        """(flags, sequence, record) read from an event queue; the record is empty for a lost-events marker."""
        data = self.c.read(fd, 40)
        header = uapi.IommufdVeventHeader.unpack(data)
        return header.flags, header.sequence, data[8:]

    def records(self) -> list[EventRecord]:
        """What the hardware has recorded."""
        return [event.record for event in self.iommu.events]


class LpaeTable(Table):
    """A writer of 4 KiB, four-level LPAE tables that shares nothing with the walkers."""

    def slot(self, va: int, level: int = 3) -> int:
        """Where ARM's level keeps the descriptor of va; tables above are made."""
        table = self.root
        for above in range(level):
            addr = table + 8 * (va >> 39 - 9 * above & 511)
            if not self.get(addr):
                self.set(addr, self.page() | 3)
            table = self.get(addr) & 0xFFFF_FFFF_F000
        return table + 8 * (va >> 39 - 9 * level & 511)

    def map(self, va: int, gpa: int, attributes: int = PAGE, level: int = 3) -> int:
        """Map a page, or with level 2 a block of 2 MiB; the address of its descriptor."""
        addr = self.slot(va, level)
        self.set(addr, gpa | (attributes if level == 3 else attributes & ~2))
        return addr


class Guest:
    """A VM: memory, a vIOMMU, a CD table and tables; `idev` is its vDEVICE `vsid`."""

    def __init__(
        self, lab: SmmuLab, idev: IommufdDevice, *, vsid: int = 0x100, s1cdmax: int = 0, asid: int = 5,
        s1dss: int = S1Dss.SSID0, eats: int = 0, depth: int = 16, **cd: int,
    ) -> None:  # fmt: skip
        self.lab = lab
        self.idev = idev
        self.vsid = vsid
        self.ioas, self.ram = lab.ram()
        self.parent = lab.parent(idev, self.ioas)
        self.viommu = lab.viommu(idev, self.parent)
        self.vdevice = lab.c.vdevice(self.viommu, idev.id, vsid)
        self.table = LpaeTable(self.ram, POOL)
        self.cd = Cd.s1(self.table.root, asid=asid)
        for name, value in cd.items():
            setattr(self.cd, name, value)
        self.store_cd(self.cd)
        self.ste = Ste.s1(CDS, s1cdmax=s1cdmax, s1dss=s1dss, eats=eats, s1stalld=not self.cd.s)
        self.fd = lab.veventq(self.viommu, depth)

    def store_cd(self, cd: Cd, ssid: int = 0) -> None:
        self.ram.write(CDS + 64 * ssid, cd.pack())

    def hwpt(self, ste: Ste | None = None, **options: int) -> int:
        return self.lab.vste(self.idev, self.viommu, ste or self.ste, **options)

    def start(self) -> int:
        """Attach the nested HWPT."""
        hwpt = self.hwpt()
        self.lab.attach(self.idev, hwpt)
        return hwpt


class Watch(Monitor):
    """What the hardware was told, and the switches made."""

    def __init__(self, lab: SmmuLab) -> None:
        self.invalidations: list[Invalidation] = []
        self.switches: list[Switch] = []
        lab.iommu.monitors.append(self)

    def invalidated(self, what: Invalidation) -> None:
        self.invalidations.append(what)

    def switched(self, switch: Switch) -> None:
        self.switches.append(switch)

    def commands(self) -> list[str]:
        """The names of the commands since the last call."""
        names = [what.command for what in self.invalidations]
        self.invalidations.clear()
        return names


def master(idev: IommufdDevice) -> Master:
    """The device behind a bound one."""
    assert isinstance(idev.dev, Master)
    return idev.dev
