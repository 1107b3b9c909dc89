"""State machine: the ioctls on IOASes, accesses, and memory that changes underneath."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

import iommufd_uapi.iommufd as uapi
import iommufd_uapi.iommufd_test as test_uapi
from iommufd_uapi.vfio import (
    VFIO_CHECK_EXTENSION,
    VFIO_GET_API_VERSION,
    VFIO_IOMMU_GET_INFO,
    VFIO_IOMMU_MAP_DMA,
    VFIO_IOMMU_UNMAP_DMA,
    VFIO_SET_IOMMU,
    VfioIommuType1DmaMap,
    VfioIommuType1DmaUnmap,
    VfioIommuType1Info,
)
from iommufdd.context import Context
from iommufdd.hw_pagetable import HwptPaging
from iommufdd.ioas import Ioas
from iommufdd.pages import Account
from iommufdd.selftest_access import SelftestAccess
from iommufdd.user import PAGE_SIZE, ULONG_MAX, PageFile

from . import naive
from .harness import APERTURE, ARGUMENT, DATA, Client
from .machine import RESPOND, CoreMachine, bits, fault, flag, length, number, offset

if TYPE_CHECKING:
    from iommufd_uapi.layout import VfioIoctl

MAX_PROCESSES, MAX_CONTEXTS = 4, 4
map_flags = st.sampled_from([7, 7, 7, 6, 6, 5, 3, 4, 2, 1, 0])


class IoasRules(CoreMachine):
    """0x80 to 0x88, 0x8f, 0x92, the selftest's accesses and checks, and VFIO."""

    @rule(who=number, nth=fault)
    def ioas_alloc(self, who: int, nth: int) -> None:
        client = self.client(who)
        if len(client.ictx.objects) < 40:
            self.call(client, uapi.IoasAlloc(), nth, new="out_ioas_id")

    @rule(who=number, n=number, nth=fault)
    def destroy(self, who: int, n: int, nth: int) -> None:
        client = self.client(who)
        obj_id = self.any_id(client, n)
        obj = client.ictx.objects.get(obj_id)
        busy = obj is None or bool(obj.holders)
        assert self.call(client, uapi.Destroy(id=obj_id), nth) == (not busy and nth not in (1, 2))

    @rule(who=number, to=number, at=offset, iova=offset, size=length, flags=map_flags, nth=fault)
    def map(self, who: int, to: int, at: int, iova: int, size: int, flags: int, nth: int) -> None:
        client = self.client(who)
        ioas = self.pick(client, Ioas, to)
        cmd = uapi.IoasMap(flags=flags, ioas_id=ioas, user_va=self.addr(at), length=size)
        cmd.iova = APERTURE + 2 * iova
        expected = naive.map_errno(client.ictx.objects.get(ioas), cmd)
        done = self.call(client, cmd, nth, unless=RESPOND)
        if expected is not None and not nth:
            assert done == (expected == 0)
            assert done or client.caller.error is None or client.caller.error.errno == expected

    @rule(who=number, to=number, n=number, at=offset, iova=offset, size=length, flags=map_flags, nth=fault)
    def map_file(self, who: int, to: int, n: int, at: int, iova: int, size: int, flags: int, nth: int) -> None:
        """Of files that do not keep a context: by its own descriptor it would stay for good, here as in the kernel."""
        client = self.client(who)
        ioas = self.pick(client, Ioas, to)
        fd = self.pick_fd(client, PageFile, n)
        if not isinstance(client.fds.fget(fd), PageFile | None):
            fd = -1
        cmd = uapi.IoasMapFile(flags=flags, ioas_id=ioas, fd=fd, start=at, length=size)
        cmd.iova = APERTURE + 2 * iova
        self.call(client, cmd, nth, unless=RESPOND)

    @rule(who=number, to=number, src=number, at=offset, iova=offset, size=length, flags=map_flags, nth=fault)
    def copy(self, who: int, to: int, src: int, at: int, iova: int, size: int, flags: int, nth: int) -> None:
        client = self.client(who)
        dst_id, src_id = self.pick(client, Ioas, to), self.pick(client, Ioas, src)
        cmd = uapi.IoasCopy(flags=flags, dst_ioas_id=dst_id, src_ioas_id=src_id, length=size)
        cmd.src_iova, cmd.dst_iova = self.pick_iova(client, src_id, at), APERTURE + 2 * iova
        self.call(client, cmd, nth, unless=RESPOND)

    @rule(who=number, to=number, at=offset, size=length, everything=flag, nth=fault)
    def unmap(self, who: int, to: int, at: int, size: int, everything: bool, nth: int) -> None:
        client = self.client(who)
        ioas_id = self.pick(client, Ioas, to)
        cmd = uapi.IoasUnmap(ioas_id=ioas_id, length=ULONG_MAX)
        if not everything:
            cmd.iova, cmd.length = self.pick_iova(client, ioas_id, at), size
        ioas = client.ictx.objects.get(ioas_id)
        expected = naive.unmap(ioas, cmd.iova, cmd.length) if not nth else None
        done = self.call(client, cmd, nth, unless="iopt_unmap_iova_range() goes area by area")
        if expected is not None and isinstance(ioas, Ioas):
            assert [area.iova for area in ioas.iopt.areas] == expected.left
            assert done == (expected.errno == 0)
            assert not done or cmd.length == expected.unmapped

    @rule(who=number, to=number, starts=st.sampled_from([0, 0, 2, 4, 6, 1]), nth=fault)
    def allow(self, who: int, to: int, starts: int, nth: int) -> None:
        client = self.client(who)
        spans = [uapi.IovaRange(0x800000 << n, (0x1000000 << n) - 1) for n in range(3) if starts >> n & 1]
        uptr = client.process.put(b"".join(span.pack() for span in spans))
        cmd = uapi.IoasAllowIovas(ioas_id=self.pick(client, Ioas, to), num_iovas=len(spans), allowed_iovas=uptr)
        self.call(client, cmd, nth)

    @rule(who=number, to=number, room=bits, nth=fault)
    def iova_ranges(self, who: int, to: int, room: int, nth: int) -> None:
        client = self.client(who)
        ioas = self.pick(client, Ioas, to)
        self.call(client, uapi.IoasIovaRanges(ioas_id=ioas, num_iovas=room, allowed_iovas=DATA), nth)

    @rule(who=number, to=number, option=flag, op=flag, value=flag, nth=fault)
    def option(self, who: int, to: int, option: bool, op: bool, value: bool, nth: int) -> None:
        client = self.client(who)
        obj = self.pick(client, Ioas, to) if option else 0
        self.call(client, uapi.Option(option_id=option, op=op, object_id=obj, val64=value), nth, unless=RESPOND)

    @rule(who=number, nth=fault)
    def change_process(self, who: int, nth: int) -> None:
        """quirk: mm->pinned_vm stays behind where nobody is charged, and where the payer is gone."""
        client = self.client(who)
        for ioas in (obj for obj in client.ictx.objects if isinstance(obj, Ioas)):
            for pages in (area.pages for area in ioas.iopt.areas):
                if pages.mm is not client.mm and (pages.account is Account.NONE or not pages.mm.alive):
                    self.world.lost_count = True
        self.call(client, uapi.IoasChangeProcess(), nth, unless="change_mm() goes on when a payer is gone")

    @rule(who=number, to=number, at=offset, size=length, nth=fault)
    def add_reserved(self, who: int, to: int, at: int, size: int, nth: int) -> None:
        client = self.client(who)
        ioas = self.pick(client, Ioas, to)
        start = self.pick_iova(client, ioas, at)
        self.test(client, test_uapi.AddReserved(start + (at << 8), size), nth, id=ioas)

    # ---- accesses ----

    @rule(who=number, to=number, pins=flag, nth=fault)
    def create_access(self, who: int, to: int, pins: bool, nth: int) -> None:
        client = self.client(who)
        if len(client.fds.files) < 20:
            self.test(client, test_uapi.CreateAccess(flags=pins or to % 2), nth, id=self.pick(client, Ioas, to))

    @rule(who=number, n=number, at=offset, size=length, write=flag, nth=fault)
    def access_pages(self, who: int, n: int, at: int, size: int, write: bool, nth: int) -> None:
        client = self.client(who)
        fd, iova = self.iova_of_access(client, n, at)
        self.test(client, test_uapi.AccessPages(flags=write, iova=iova, length=size), nth, unless=RESPOND, id=fd)

    def iova_of_access(self, client: Client, n: int, at: int) -> tuple[int, int]:
        fd = self.pick_fd(client, SelftestAccess, n)
        file = client.fds.fget(fd)
        ioas = file.access.ioas if isinstance(file, SelftestAccess) else None
        return fd, self.pick_iova(client, ioas.id if ioas is not None else 0, at)

    @rule(who=number, n=number, item=bits, nth=fault)
    def destroy_access_pages(self, who: int, n: int, item: int, nth: int) -> None:
        client = self.client(who)
        self.test(client, test_uapi.DestroyAccessPages(item), nth, id=self.pick_fd(client, SelftestAccess, n))

    @rule(who=number, n=number, at=offset, size=length, flags=bits, nth=fault)
    def access_rw(self, who: int, n: int, at: int, size: int, flags: int, nth: int) -> None:
        client = self.client(who)
        fd, iova = self.iova_of_access(client, n, at)
        self.test(client, test_uapi.AccessRw(iova, size, DATA, flags & ~2), nth, id=fd)

    @rule(who=number, n=number, to=number, nth=fault)
    def access_replace_ioas(self, who: int, n: int, to: int, nth: int) -> None:
        client = self.client(who)
        op = test_uapi.AccessReplaceIoas(self.pick(client, Ioas, to))
        self.test(client, op, nth, id=self.pick_fd(client, SelftestAccess, n))

    @rule(who=number, to=number, at=offset, size=length, refs=bits, nth=fault)
    def check_memory(self, who: int, to: int, at: int, size: int, refs: int, nth: int) -> None:
        client = self.client(who)
        hwpt = self.pick(client, HwptPaging, to)
        self.test(client, test_uapi.CheckMap(self.pick_iova(client, 0, at), size, self.addr(at)), nth, id=hwpt)
        self.test(client, test_uapi.CheckRefs(size, self.addr(at), refs), nth)

    # ---- VFIO ----

    @rule(who=number, to=number, op=bits, nth=fault)
    def vfio_ioas(self, who: int, to: int, op: int, nth: int) -> None:
        client = self.client(who)
        self.call(client, uapi.VfioIoas(ioas_id=self.pick(client, Ioas, to), op=op % 4), nth)

    def vfio(self, client: Client, cmd: int, arg: VfioIoctl | int, nth: int, unless: str = "") -> None:
        if not isinstance(arg, int):
            client.process.put(arg.pack(), ARGUMENT)
        self.system_call(client, lambda: client.rc(cmd, arg if isinstance(arg, int) else ARGUMENT), nth, unless)

    @rule(who=number, at=offset, iova=offset, size=length, flags=map_flags, nth=fault)
    def map_dma(self, who: int, at: int, iova: int, size: int, flags: int, nth: int) -> None:
        client = self.client(who)
        arg = VfioIommuType1DmaMap(flags=flags, vaddr=self.addr(at), iova=APERTURE + 4 * iova, size=size)
        self.vfio(client, VFIO_IOMMU_MAP_DMA, arg, nth)

    @rule(who=number, iova=offset, size=length, everything=flag, nth=fault)
    def unmap_dma(self, who: int, iova: int, size: int, everything: bool, nth: int) -> None:
        client = self.client(who)
        arg = VfioIommuType1DmaUnmap(flags=2)
        if not everything:
            arg = VfioIommuType1DmaUnmap(iova=APERTURE + iova, size=size)
        self.vfio(client, VFIO_IOMMU_UNMAP_DMA, arg, nth, unless="iopt_cut_iova(), iopt_unmap_iova_range()")

    @rule(who=number, kind=bits, nth=fault)
    def vfio_rest(self, who: int, kind: int, nth: int) -> None:
        client = self.client(who)
        for cmd in (VFIO_GET_API_VERSION, VFIO_CHECK_EXTENSION, VFIO_SET_IOMMU):
            self.vfio(client, cmd, kind, nth)
        self.vfio(client, VFIO_IOMMU_GET_INFO, VfioIommuType1Info(argsz=16 * kind), nth)

    # ---- the world underneath ----

    @rule(who=number, at=offset, size=length, what=bits)
    def change_memory(self, who: int, at: int, size: int, what: int) -> None:
        """munmap, mprotect or truncation: what is pinned stays pinned."""
        mm = self.client(who).mm
        start = self.addr(at // PAGE_SIZE * PAGE_SIZE)
        end = start + (size + PAGE_SIZE - 1) // PAGE_SIZE * PAGE_SIZE
        if what < 2 and end > start:
            mm.unmap(start, end)
        elif what < 6 and end > start:
            mm.protect(start, end, readable=bool(what & 1), writable=bool(what & 2))
        else:
            self.memfds[who % 2].truncate(size // PAGE_SIZE * PAGE_SIZE + 4 * PAGE_SIZE)

    @rule(who=number, privileged=flag, pages=number)
    def change_task(self, who: int, privileged: bool, pages: int) -> None:
        task = self.client(who).caller.task
        task.cap_ipc_lock = task.cap_sys_resource = privileged
        task.memlock = pages * PAGE_SIZE

    @precondition(lambda self: len(self.world.processes) < MAX_PROCESSES)
    @rule(who=number)
    def fork(self, who: int) -> None:
        child = self.client(who).process.fork()
        for file in {id(file): file for file in child.fds.files.values() if isinstance(file, Context)}.values():
            self.clients.append(Client(child, ictx=file))

    @precondition(lambda self: len({client.process for client in self.clients}) > 2)
    @rule(who=number)
    def exit(self, who: int) -> None:
        process = self.client(who).process
        self.clients = [client for client in self.clients if client.process is not process]
        process.exit()

    @rule(who=number, n=number)
    def close(self, who: int, n: int) -> None:
        """Any descriptor but a process's last of a context."""
        client = self.client(who)
        fds = list(client.fds.files)
        fd = fds[n % len(fds)]
        file = client.fds.fget(fd)
        if not isinstance(file, Context) or list(client.fds.files.values()).count(file) > 1:
            client.fds.close(fd)

    @precondition(lambda self: len(self.world.contexts) < MAX_CONTEXTS)
    @rule(who=number, container=flag)
    def open_another(self, who: int, container: bool) -> None:
        self.open(self.client(who).process, container=container)

    @rule(who=number, n=number)
    def dup(self, who: int, n: int) -> None:
        client = self.client(who)
        files = [file for file in client.fds.files.values() if file is not None]
        if len(files) < 20:
            client.process.install(files[n % len(files)])
