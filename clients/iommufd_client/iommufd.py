"""Room client: /dev/iommu, as a Python object over a blocking socket."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Concatenate, ParamSpec, Self, TypeVar

from iommufd_uapi import wire

from . import ioctls, mock
from .call import IommufdOSError
from .connection import Connection
from .guest import GuestMemory

if TYPE_CHECKING:
    from collections.abc import Callable

    from .device import VfioDevice
    from .files import File, HasFileno
    from .ioctls import Steps
    from .vm import Vm

P = ParamSpec("P")
T = TypeVar("T")


def blocking(function: Callable[P, Steps[T]]) -> Callable[Concatenate[Connection, P], T]:
    """A method that runs the steps, one ioctl after the other."""

    def method(self: Connection, /, *args: P.args, **kwargs: P.kwargs) -> T:
        steps = function(*args, **kwargs)
        try:
            struct, memory = next(steps)
            while True:
                try:
                    result = self.ioctl(struct, memory=memory)
                except IommufdOSError as error:
                    struct, memory = steps.throw(error)
                else:
                    struct, memory = steps.send(result)
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]

    functools.update_wrapper(method, function)
    return method


class Iommufd(Connection):
    """One open /dev/iommu of the daemon.

    The socket is `socket_path`, else $IOMMUFDD_SOCKET, $XDG_RUNTIME_DIR/iommufdd.sock, or
    /run/iommufdd/iommufdd.sock. The `machine` is `[INSTANCE][@MACHINE]`: "" a private one of the daemon's default
    kind, "@vtd" a private vtd, "ci" the one that all who say so share, "ci@vtd" the same, and it must be a vtd.
    With `explain` every IommufdOSError says why, at some cost. A `container` is opened as /dev/vfio/vfio: pinned
    memory is charged by process, as VFIO does.

    One call at a time: a thread that does not want to wait for another takes a `channel()`; so must a process
    after a fork.
    """

    def __init__(
        self,
        socket_path: str | None = None,
        *,
        machine: str = "",
        container: bool = False,
        explain: bool = False,
    ) -> None:
        """OSError if there is no daemon, IommufdOSError if it refuses."""
        super().__init__(socket_path, machine=machine, container=container, explain=explain)

    @classmethod
    def from_identity(
        cls,
        identity: HasFileno | int,
        socket_path: str | None = None,
        *,
        mm: int = 0,
        explain: bool = False,
    ) -> Self:
        """A further channel to the context that a descriptor identifies.

        Its address space is `mm`, or a new one. Objects, ids and files are the context's. EBADF; EBADFD if
        the descriptor is no context.
        """
        self = cls.__new__(cls)
        Connection.__init__(self, socket_path, kind=wire.Kind.CHANNEL, mm=mm, context=identity, explain=explain)
        return self

    def channel(self, *, new_mm: bool = False) -> Self:
        """A further channel to this context, for another thread; with `new_mm`, for another process."""
        mm = 0 if new_mm else self.mm
        return type(self).from_identity(self.identity, self.socket_path, mm=mm, explain=self.explain)

    def device(self, name: str) -> VfioDevice:
        """/dev/vfio/devices/NAME of this context's machine, not yet bound. ENOENT."""
        from .device import VfioDevice

        return VfioDevice(name, self.socket_path, context=self.identity, explain=self.explain)

    def vm(self) -> Vm:
        """A new VM of this context's machine, over the memory registered here."""
        from .vm import Vm

        return Vm(self.socket_path, mm=self.mm, context=self.identity, explain=self.explain)

    def guest_memory(self, size: int, name: str = "guest", *, hugetlb: bool = False) -> GuestMemory:
        """Memory that devices can reach once it is mapped."""
        memory = GuestMemory(size, name, hugetlb=hugetlb)
        try:
            return memory.register(self)
        except BaseException:
            memory.close()
            raise

    destroy = blocking(ioctls.destroy)
    ioas_alloc = blocking(ioctls.ioas_alloc)
    ioas_map = blocking(ioctls.ioas_map)
    ioas_map_file = blocking(ioctls.ioas_map_file)
    ioas_copy = blocking(ioctls.ioas_copy)
    ioas_unmap = blocking(ioctls.ioas_unmap)
    ioas_iova_ranges = blocking(ioctls.ioas_iova_ranges)
    ioas_allow_iovas = blocking(ioctls.ioas_allow_iovas)
    ioas_change_process = blocking(ioctls.ioas_change_process)
    option = blocking(ioctls.option)
    vfio_ioas_get = blocking(ioctls.vfio_ioas_get)
    vfio_ioas_set = blocking(ioctls.vfio_ioas_set)
    vfio_ioas_clear = blocking(ioctls.vfio_ioas_clear)
    get_hw_info = blocking(ioctls.get_hw_info)
    hwpt_alloc = blocking(ioctls.hwpt_alloc)
    hwpt_set_dirty_tracking = blocking(ioctls.hwpt_set_dirty_tracking)
    hwpt_get_dirty_bitmap = blocking(ioctls.hwpt_get_dirty_bitmap)
    hwpt_invalidate = blocking(ioctls.hwpt_invalidate)
    viommu_alloc = blocking(ioctls.viommu_alloc)
    vdevice_alloc = blocking(ioctls.vdevice_alloc)
    hw_queue_alloc = blocking(ioctls.hw_queue_alloc)
    test = blocking(mock.test)
    mock_domain = blocking(mock.mock_domain)
    access_read = blocking(mock.access_read)
    access_write = blocking(mock.access_write)

    _fault_queue_alloc = blocking(ioctls.fault_queue_alloc)
    _veventq_alloc = blocking(ioctls.veventq_alloc)
    _create_access = blocking(mock.create_access)
    _dmabuf_get = blocking(mock.dmabuf_get)

    def fault_queue_alloc(self) -> tuple[int, File]:
        """IOMMU_FAULT_QUEUE_ALLOC: its id, and the file to read page faults from and write answers to."""
        id, fd = self._fault_queue_alloc()
        return id, self.file(fd)

    def veventq_alloc(self, viommu_id: int, type: int, depth: int) -> tuple[int, File]:
        """IOMMU_VEVENTQ_ALLOC: its id, and the file to read events from. EEXIST."""
        id, fd = self._veventq_alloc(viommu_id, type, depth)
        return id, self.file(fd)

    def create_access(self, ioas_id: int, flags: int = 0) -> File:
        """What a driver in the kernel (mdev) does to an IOAS without a device; closing it ends the access."""
        return self.file(self._create_access(ioas_id, flags))

    def dmabuf_get(self, length: int, open_flags: int = 0) -> File:
        """A DMA-BUF of the mock exporter, which IOAS_MAP_FILE takes. EINVAL past 2 MiB."""
        return self.file(self._dmabuf_get(length, open_flags))
