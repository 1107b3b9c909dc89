"""Room client: the same over Trio.

    async with open_iommufd() as iommufd:
        ioas = await iommufd.ioas_alloc()

A call that is cancelled while its answer is on the way has been made: the answer is dropped, objects it made stay.
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Self

from iommufd_uapi import wire

from . import ioctls, mock
from .aio_connection import Connection as Connection
from .aio_connection import File as File
from .aio_connection import awaited
from .aio_vfio import VfioDevice as VfioDevice
from .aio_vm import Vm as Vm
from .channel import hello
from .connection import default_socket_path
from .files import fd_number
from .guest import GuestMemory

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from .files import HasFileno


class Iommufd(Connection):
    """One open /dev/iommu of the daemon; see `iommufd_client.Iommufd`."""

    @classmethod
    async def open(
        cls, socket_path: str | None = None, *, machine: str = "", container: bool = False, explain: bool = False
    ) -> Self:
        """OSError if there is no daemon, IommufdOSError if it refuses."""
        self = cls(socket_path or default_socket_path(), explain=explain, kind=wire.Kind.IOMMUFD)
        await self._connect(hello(wire.Kind.IOMMUFD, machine=machine, container=container), [])
        return self

    @classmethod
    async def from_identity(
        cls, identity: HasFileno | int, socket_path: str | None = None, *, mm: int = 0, explain: bool = False
    ) -> Self:
        """A further channel to the context that a descriptor identifies. EBADFD."""
        self = cls(socket_path or default_socket_path(), explain=explain, kind=wire.Kind.CHANNEL)
        await self._connect(hello(wire.Kind.CHANNEL, mm=mm), [fd_number(identity)])
        return self

    async def channel(self, *, new_mm: bool = False) -> Self:
        """A further channel to this context, for calls at the same time."""
        mm = 0 if new_mm else self.mm
        return await type(self).from_identity(self.identity, self.socket_path, mm=mm, explain=self.explain)

    async def device(self, name: str) -> VfioDevice:
        """/dev/vfio/devices/NAME of this context's machine, not yet bound. ENOENT."""
        return await VfioDevice.open(name, self.socket_path, context=self.identity, explain=self.explain)

    async def vm(self) -> Vm:
        """A new VM of this context's machine, over the memory registered here."""
        return await Vm.open(self.socket_path, mm=self.mm, context=self.identity, explain=self.explain)

    @asynccontextmanager
    async def guest_memory(
        self, size: int, name: str = "guest", *, hugetlb: bool = False
    ) -> AsyncIterator[GuestMemory]:
        """Memory that devices can reach once it is mapped; unregistered and closed at the end of the block."""
        with GuestMemory(size, name, hugetlb=hugetlb) as memory:
            await self.register(memory.address, len(memory), memory.fd)
            try:
                yield memory
            finally:
                if not self.closed:
                    await self.unregister(memory.address, len(memory))

    async def fault_queue_alloc(self) -> tuple[int, File]:
        """IOMMU_FAULT_QUEUE_ALLOC: its id, and the file to read page faults from and write answers to."""
        id, fd = await self._fault_queue_alloc()
        return id, File(fd, self)

    async def veventq_alloc(self, viommu_id: int, type: int, depth: int) -> tuple[int, File]:
        """IOMMU_VEVENTQ_ALLOC: its id, and the file to read events from. EEXIST."""
        id, fd = await self._veventq_alloc(viommu_id, type, depth)
        return id, File(fd, self)

    async def create_access(self, ioas_id: int, flags: int = 0) -> File:
        """What a driver in the kernel (mdev) does to an IOAS without a device; closing it ends the access."""
        return File(await self._create_access(ioas_id, flags), self)

    async def dmabuf_get(self, length: int, open_flags: int = 0) -> File:
        """A DMA-BUF of the mock exporter, which IOAS_MAP_FILE takes. EINVAL past 2 MiB."""
        return File(await self._dmabuf_get(length, open_flags), self)

    destroy = awaited(ioctls.destroy)
    ioas_alloc = awaited(ioctls.ioas_alloc)
    ioas_map = awaited(ioctls.ioas_map)
    ioas_map_file = awaited(ioctls.ioas_map_file)
    ioas_copy = awaited(ioctls.ioas_copy)
    ioas_unmap = awaited(ioctls.ioas_unmap)
    ioas_iova_ranges = awaited(ioctls.ioas_iova_ranges)
    ioas_allow_iovas = awaited(ioctls.ioas_allow_iovas)
    ioas_change_process = awaited(ioctls.ioas_change_process)
    option = awaited(ioctls.option)
    vfio_ioas_get = awaited(ioctls.vfio_ioas_get)
    vfio_ioas_set = awaited(ioctls.vfio_ioas_set)
    vfio_ioas_clear = awaited(ioctls.vfio_ioas_clear)
    get_hw_info = awaited(ioctls.get_hw_info)
    hwpt_alloc = awaited(ioctls.hwpt_alloc)
    hwpt_set_dirty_tracking = awaited(ioctls.hwpt_set_dirty_tracking)
    hwpt_get_dirty_bitmap = awaited(ioctls.hwpt_get_dirty_bitmap)
    hwpt_invalidate = awaited(ioctls.hwpt_invalidate)
    viommu_alloc = awaited(ioctls.viommu_alloc)
    vdevice_alloc = awaited(ioctls.vdevice_alloc)
    hw_queue_alloc = awaited(ioctls.hw_queue_alloc)
    test = awaited(mock.test)
    mock_domain = awaited(mock.mock_domain)
    access_read = awaited(mock.access_read)
    access_write = awaited(mock.access_write)
    _fault_queue_alloc = awaited(ioctls.fault_queue_alloc)
    _veventq_alloc = awaited(ioctls.veventq_alloc)
    _create_access = awaited(mock.create_access)
    _dmabuf_get = awaited(mock.dmabuf_get)


@asynccontextmanager
async def open_iommufd(
    socket_path: str | None = None, *, machine: str = "", container: bool = False, explain: bool = False
) -> AsyncIterator[Iommufd]:
    """A new /dev/iommu, closed at the end of the block. OSError if there is no daemon."""
    iommufd = await Iommufd.open(socket_path, machine=machine, container=container, explain=explain)
    try:
        yield iommufd
    finally:
        await iommufd.aclose()
