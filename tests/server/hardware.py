"""A daemon in a thread of this process, so that a test can bind devices on its machines: as a VFIO device would."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

import trio

import iommufd_uapi.iommufd as uapi
from iommufd_client import Admin, GuestMemory, Iommufd
from iommufdd.attach import attach, detach, replace
from iommufdd.device import IommufdDevice, bind, unbind
from iommufdd.mm import RegisteredMm
from iommufdd.objects import Holder
from iommufdd.server.admin import serve_admin
from iommufdd.server.listener import listen_at
from iommufdd.server.segments import SegmentMemory
from iommufdd.server.serve import Server
from iommufdd.user import Caller, FaultGate, Task
from iommufdd.wiring import new_machine
from tests.core.world import FdTable
from tests.iommu.tables import X86Table

if TYPE_CHECKING:
    from collections.abc import Callable

    from iommufd_client import File
    from iommufdd.iommu.endpoint import Endpoint
    from iommufdd.server.instance import OpenContext

T = TypeVar("T")
TIMEOUT = 60.0
POOL = 0x100000  # guest physical address of the guest's tables
RAM = 4 << 20


class Driver(Holder):
    """The open file of a VFIO device: it holds the bound device, and keeps the context."""

    def __init__(self, opened: OpenContext, dev: Endpoint) -> None:
        super().__init__()
        self.opened = opened
        opened.ctx.get()
        task = Task(opened.instance.machine.user(0), cap_ipc_lock=True)
        self.caller = Caller(task, RegisteredMm(), SegmentMemory(), FdTable(), FaultGate())
        self.idev: IommufdDevice = bind(opened.ctx, self.caller, dev, self)

    def close(self) -> None:
        for pasid in list(self.idev.igroup.pasid_attach):
            detach(self.idev, pasid)
        unbind(self.idev, self)
        self.opened.ctx.put()

    def __str__(self) -> str:
        return "the open file of a device"


class Served:
    """A server on sockets in a directory, run by its own thread; `call()` is how a test reaches in."""

    def __init__(self, directory: Path, **options: Any) -> None:
        self.socket_path = str(directory / "iommufdd.sock")
        self.options = options
        self.drivers: list[Driver] = []
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: trio.run(self._main))

    async def _main(self) -> None:
        self.server = Server(new_machine, nofile=4096, **self.options)
        self.server.listen(listen_at(self.socket_path, 0o600))
        admin = listen_at(self.socket_path + ".admin", 0o600, socket.SOCK_STREAM)
        try:
            async with trio.open_nursery() as nursery:
                self._token = trio.lowlevel.current_trio_token()
                self._scope = nursery.cancel_scope
                nursery.start_soon(self.server.reactor.run)
                nursery.start_soon(self.server.pump.expire)
                nursery.start_soon(serve_admin, self.server, admin)
                self._ready.set()
        finally:
            self.server.close()

    def call(self, function: Callable[..., T], *args: Any) -> T:
        """Run it in the server's thread, between two turns."""
        return trio.from_thread.run_sync(function, *args, trio_token=self._token)

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(TIMEOUT)
        return self

    def __exit__(self, *exc: object) -> None:
        for driver in list(self.drivers):
            self.close(driver)
        self.call(self._scope.cancel)
        self._thread.join(TIMEOUT)
        assert not self._thread.is_alive()

    def open(self, machine: str = "@vtd") -> Iommufd:
        return Iommufd(self.socket_path, machine=machine, explain=True)

    def admin(self) -> Admin:
        return Admin(self.socket_path + ".admin")

    def context(self, iommufd: Iommufd) -> OpenContext:
        inode = os.fstat(iommufd.identity.fileno()).st_ino
        return next(each for key, each in self.server.instances.contexts.items() if key[1] == inode)

    def bind(self, iommufd: Iommufd, device: str = "vfio0") -> Driver:
        opened = self.context(iommufd)
        driver = self.call(Driver, opened, opened.instance.machine.devices[device])
        self.drivers.append(driver)
        return driver

    def attach(self, driver: Driver, pt: int, pasid: int = 0) -> int:
        return self.call(attach, driver.caller, driver.idev, pasid, pt)

    def replace(self, driver: Driver, pt: int, pasid: int = 0) -> int:
        return self.call(replace, driver.caller, driver.idev, pasid, pt)

    def close(self, driver: Driver) -> None:
        """As when the process with the device's descriptor ends."""
        self.drivers.remove(driver)
        self.call(driver.close)


class Guest:
    """A VMM with a device that its guest translates for: memory, a table in it, a nested domain, attached."""

    def __init__(self, served: Served, *, device: str = "vfio0", machine: str = "@vtd", faults: bool = False) -> None:
        self.served = served
        self.iommufd = served.open(machine)
        self.driver = served.bind(self.iommufd, device)
        self.ioas = self.iommufd.ioas_alloc()
        self.ram: GuestMemory = self.iommufd.guest_memory(RAM)
        self.iommufd.ioas_map(self.ioas, self.ram, iova=0)
        self.table = X86Table(self.ram, POOL)
        pasids = uapi.IOMMU_HWPT_ALLOC_PASID
        nests = uapi.IOMMU_HWPT_ALLOC_NEST_PARENT | pasids
        parent = self.iommufd.hwpt_alloc(self.driver.idev.id, self.ioas, flags=nests)
        self.faults: File | None = None
        fault_id = None
        if faults:
            fault_id, self.faults = self.iommufd.fault_queue_alloc()
        self.hwpt = self.iommufd.hwpt_alloc(
            self.driver.idev.id,
            parent,
            flags=pasids,
            data=uapi.HwptVtdS1(flags=0, pgtbl_addr=self.table.root, addr_width=48),
            fault_id=fault_id,
        )
        served.attach(self.driver, self.hwpt)

    def request(self) -> uapi.HwptPgfault:
        """The page request that waits; a test asks when one must be there."""
        assert self.faults is not None
        return uapi.HwptPgfault.unpack(self.faults.read(uapi.HwptPgfault.SIZEOF))

    def respond(self, cookie: int, code: int = uapi.IOMMUFD_PAGE_RESP_SUCCESS) -> None:
        assert self.faults is not None
        self.faults.write(uapi.HwptPageResponse(cookie=cookie, code=code).pack())

    def flush(self, iova: int, npages: int = 1) -> None:
        self.iommufd.hwpt_invalidate(self.hwpt, [uapi.HwptVtdS1Invalidate(addr=iova, npages=npages)])

    def die(self) -> None:
        """All descriptors of the process are closed."""
        if self.faults is not None:
            self.faults.close()
        self.ram.fd.close()
        self.iommufd.close()
        self.served.close(self.driver)

    def close(self) -> None:
        self.served.close(self.driver)
        if self.faults is not None:
            self.faults.close()
        self.iommufd.close()
        self.ram.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        if not self.iommufd.closed:
            self.close()
