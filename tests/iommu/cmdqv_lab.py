"""A guest behind an SMMUv3 with a Tegra241 CMDQV: page 0 of its VINTF, and queues in its memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import iommufd_uapi.iommufd as uapi
from iommufd_uapi.bits import Bitfield
from iommufd_uapi.tegra241_cmdqv import VCMDQ_EN, Lvcmdq, Register
from iommufdd.iommu.tegra241_cmdqv import Vcmdq, Vintf
from iommufdd.mmap import Vma
from iommufdd.viommu import Viommu

from .smmu_lab import Guest, SmmuLab

if TYPE_CHECKING:
    from iommufdd.device import IommufdDevice

TYPE = uapi.IOMMU_VIOMMU_TYPE_TEGRA241_CMDQV
QUEUE = uapi.IOMMU_HW_QUEUE_TYPE_TEGRA241_CMDQV
QUEUES = 0x20_0000  # guest physical address of the first queue
ROOM = 0x4000  # bytes between two queues
ENTRY = 16


class CmdqvLab(SmmuLab):
    """One context, one SMMU with a CMDQV; a vIOMMU has two LVCMDQs unless said otherwise."""

    def __init__(self, *, mode: str = "greedy", **capabilities: object) -> None:
        super().__init__(None, mode=mode, **{"cmdqv": True} | capabilities)

    def vintf(
        self, idev: IommufdDevice, parent: int, *, kind: int = TYPE, length: int = 16, at: int = 0, expect: int = 0
    ) -> tuple[int, uapi.ViommuTegra241Cmdqv]:  # fmt: skip
        """(vIOMMU, its data); length, at: of the data."""
        at = at or self.c.process.put(bytes(16))
        cmd = uapi.ViommuAlloc(type=kind, dev_id=idev.id, hwpt_id=parent, data_len=length, data_uptr=at)
        viommu = self.c.ioctl(cmd, expect).out_viommu_id
        data = self.c.process.mm.read(at, 16)
        return viommu, uapi.ViommuTegra241Cmdqv.unpack(data.ljust(16, b"\0"))

    def viommu(self, idev: IommufdDevice, parent: int, kind: int = TYPE, expect: int = 0) -> int:
        return self.vintf(idev, parent, kind=kind, expect=expect)[0]

    def hw_queue(self, viommu: int, index: int, iova: int, length: int, *, kind: int = QUEUE, expect: int = 0) -> int:
        cmd = uapi.HwQueueAlloc(
            viommu_id=viommu, type=kind, index=index, nesting_parent_iova=iova, length=length
        )  # fmt: skip
        return self.c.ioctl(cmd, expect).out_hw_queue_id

    def errors(self, viommu: int, depth: int = 512) -> int:
        """The fd of a queue for CMDQV errors."""
        kind = uapi.IOMMU_VEVENTQ_TYPE_TEGRA241_CMDQV
        return self.c.ioctl(uapi.VeventqAlloc(viommu_id=viommu, type=kind, veventq_depth=depth)).out_veventq_fd

    def error_maps(self, fd: int) -> list[int]:
        """The 128 bits of each error event that there is."""
        maps: list[int] = []
        while self.c.fds.files[fd].poll():  # type: ignore[union-attr]
            _, _, data = self.event(fd)
            assert len(data) == 16
            maps.append(int.from_bytes(data, "little"))
        return maps

    def driver_half(self, viommu: int) -> Vintf:
        found = self.c.ictx.objects.get(viommu)
        assert isinstance(found, Viommu)
        assert isinstance(found.driver, Vintf)
        return found.driver


class Queue:
    """A guest's driver of one VCMDQ; commands go to memory and PROD, and CONS is not waited for."""

    def __init__(self, guest: CmdqvGuest, index: int, entries: int) -> None:
        self.guest = guest
        self.index = index
        self.entries = entries
        self.base = QUEUES + ROOM * index
        self.id = guest.lab.hw_queue(guest.viommu, index, self.base, ENTRY * entries)
        self.registers = Lvcmdq(guest.page, index)
        self.prod = 0

    @property
    def vcmdq(self) -> Vcmdq:
        found = self.guest.lab.driver_half(self.guest.viommu).lvcmdqs[self.index]
        assert found is not None
        return found

    def enable(self) -> None:
        self.registers.write(Register.CONFIG, VCMDQ_EN)
        self.vcmdq.poll()
        assert self.registers.read(Register.STATUS) == VCMDQ_EN

    def put(self, *commands: Bitfield) -> None:
        """Commands, and the doorbell."""
        for command in commands:
            self.guest.ram.write(self.base + ENTRY * (self.prod % self.entries), command.pack())
            self.prod = self.prod + 1 & 2 * self.entries - 1
        self.registers.write(Register.PROD, self.prod)

    def issue(self, *commands: Bitfield) -> int:
        """Put them and have the hardware look: what it did."""
        self.put(*commands)
        return self.vcmdq.poll()

    @property
    def cons(self) -> int:
        return self.registers.read(Register.CONS) & 0xF_FFFF

    @property
    def error(self) -> int:
        """One of Cerror."""
        return self.registers.error


class CmdqvGuest(Guest):
    """A VM whose vIOMMU is a VINTF; `page` is page 0, mapped."""

    lab: CmdqvLab

    def __init__(self, lab: CmdqvLab, idev: IommufdDevice, *, vsid: int = 0x100, **options: int) -> None:
        super().__init__(lab, idev, vsid=vsid, **options)
        driver = lab.driver_half(self.viommu)
        assert driver.page0 is not None
        self.vma: Vma = lab.c.mmap(driver.page0.offset, driver.page0.length)
        self.page = self.vma.region.data
        self.errors = lab.errors(self.viommu)

    def queue(self, index: int = 0, entries: int = 8, *, enabled: bool = True) -> Queue:
        queue = Queue(self, index, entries)
        if enabled:
            queue.enable()
        return queue
