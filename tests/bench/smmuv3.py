"""A guest's command queue and its events on SMMUv3: batches of 1,000 commands, and faults that come back as records."""

from __future__ import annotations

import time
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from iommufd_client.testing import Daemon
from iommufd_uapi import iommufd as uapi
from iommufd_uapi.smmuv3 import Cmd
from iommufdd.iommu.walk import READ, TranslationFault
from tests.iommu.smmu_lab import Guest, SmmuLab, master

from .measure import PER_SECOND, Bench, Case, Plan

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from iommufd_uapi.smmuv3 import Command

IOVA = 0x7F12_3400_0000
BATCH = 1000
HOLE = IOVA + BATCH * 4096
VSID = 0x100
QUEUE = 4096  # events
RECORD = 40


def _per(count: int, work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) / count


class Bed:
    """A guest with a table of small pages, in process."""

    def __init__(self, plan: Plan) -> None:
        self.lab = SmmuLab()
        self.idev = self.lab.device()
        self.guest = Guest(self.lab, self.idev, vsid=VSID, depth=QUEUE)
        for page in range(BATCH):
            self.guest.table.map(IOVA + page * 4096, page % 256 * 4096)
        self.guest.start()
        self.rounds = plan.count(20) // 2
        self.faults = plan.count(QUEUE)
        self.room = self.lab.c.process.buffer(RECORD * QUEUE // 4096)

    def batches(self, commands: list[Command], *, warm: bool = False) -> float:
        """HWPT_INVALIDATE; warm: each command has something to drop."""
        data = b"".join(command.pack() for command in commands)
        cmd = uapi.HwptInvalidate(hwpt_id=self.guest.viommu, data_uptr=self.lab.c.process.put(data), entry_len=16,
                                  entry_num=BATCH, data_type=uapi.IOMMU_VIOMMU_INVALIDATE_DATA_ARM_SMMUV3)  # fmt: skip
        seconds = 0.0
        for _ in range(self.rounds):
            if warm:
                self.lab.read(self.idev, IOVA, BATCH * 4096)
            start = time.perf_counter()
            self.lab.c.ioctl(cmd)
            seconds += time.perf_counter() - start
            if cmd.entry_num != BATCH:
                raise AssertionError(f"{cmd.entry_num} commands done")
        return seconds / self.rounds

    def events(self) -> float:
        """Faults, each of which ends up in the guest's queue, and reading them."""
        dev = master(self.idev)

        def work() -> None:
            for _ in range(self.faults):
                try:
                    dev.translate(None, HOLE, READ)
                except TranslationFault:
                    pass
            data = self.lab.c.read(self.guest.fd, RECORD * self.faults, self.room)
            if len(data) != RECORD * self.faults:
                raise AssertionError(f"{len(data)} bytes of events")

        return _per(self.faults, work)


class Socket:
    """The same batches through a daemon and the client library."""

    def __init__(self, plan: Plan, opened: ExitStack) -> None:
        daemon = opened.enter_context(Daemon("--machine", "smmuv3"))
        self.iommufd = iommufd = opened.enter_context(daemon.open())
        device = opened.enter_context(iommufd.device("vfio1"))
        dev = device.bind(iommufd)
        ram = opened.enter_context(iommufd.guest_memory(4 << 20))
        ioas = iommufd.ioas_alloc()
        iommufd.ioas_map(ioas, ram, iova=0)
        parent = iommufd.hwpt_alloc(dev, ioas, flags=uapi.IOMMU_HWPT_ALLOC_NEST_PARENT)
        self.viommu = iommufd.viommu_alloc(dev, parent, uapi.IOMMU_VIOMMU_TYPE_ARM_SMMUV3)
        iommufd.vdevice_alloc(self.viommu, dev, VSID)
        self.rounds = plan.count(20) // 2

    def batches(self, commands: list[Command]) -> float:
        entries = [uapi.ViommuArmSmmuv3Invalidate(cmd=command.words()) for command in commands]

        def work() -> None:
            for _ in range(self.rounds):
                if self.iommufd.hwpt_invalidate(self.viommu, entries) != BATCH:
                    raise AssertionError("commands were not done")

        return _per(self.rounds, work)


@contextmanager
def cases(plan: Plan) -> Iterator[list[Case]]:
    with ExitStack() as opened:
        bed, sock = Bed(plan), Socket(plan, opened)
        pages: list[Command] = [Cmd.tlbi_nh_va(5, IOVA + page * 4096) for page in range(BATCH)]
        cds: list[Command] = [Cmd.cfgi_cd(VSID, page) for page in range(BATCH)]
        yield [
            Case("TLBI_NH_VA, each of a cached page", "batches of 1,000", lambda: bed.batches(pages, warm=True)),
            Case("TLBI_NH_VA, nothing cached", "batches of 1,000", lambda: bed.batches(pages)),
            Case("CFGI_CD by vSID", "batches of 1,000", lambda: bed.batches(cds)),
            Case("TLBI_NH_VA, over the socket", "batches of 1,000", lambda: sock.batches(pages)),
            Case("faults, queued and read", "events", bed.events),
        ]


BENCH = Bench("smmuv3", "a guest's commands and events on SMMUv3", PER_SECOND, "", cases)
