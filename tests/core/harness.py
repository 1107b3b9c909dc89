"""The test language: an open /dev/iommu, one line for an ioctl and one for its errno."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import iommufd_uapi.iommufd as uapi
import iommufd_uapi.iommufd_test as test_uapi
from iommufd_uapi.vfio import VFIO_IOMMU_MAP_DMA, VFIO_IOMMU_UNMAP_DMA, VfioIommuType1DmaMap, VfioIommuType1DmaUnmap
from iommufdd.context import Context
from iommufdd.errors import IommufdError
from iommufdd.mmap import Vma
from iommufdd.user import PAGE_SIZE, File

from .world import ARGUMENT, DATA, Memfd, Process, World

if TYPE_CHECKING:
    from collections.abc import Callable

    from iommufd_uapi.layout import Ioctl, Layout, VfioIoctl

I = TypeVar("I", bound="Ioctl")  # noqa: E741
L = TypeVar("L", bound="Layout")
F = TypeVar("F", bound=File)

APERTURE = test_uapi.MOCK_APERTURE_START
NOWHERE = 0xDEAD0000  # nothing is ever mapped there
FIXED, WRITE, READ = uapi.IOMMU_IOAS_MAP_FIXED_IOVA, uapi.IOMMU_IOAS_MAP_WRITEABLE, uapi.IOMMU_IOAS_MAP_READABLE
RW = READ | WRITE
NEST_PARENT, DIRTY = uapi.IOMMU_HWPT_ALLOC_NEST_PARENT, uapi.IOMMU_HWPT_ALLOC_DIRTY_TRACKING
FAULT, PASID = uapi.IOMMU_HWPT_FAULT_ID_VALID, uapi.IOMMU_HWPT_ALLOC_PASID
PASID_DEVICE, NO_DIRTY_DEVICE = test_uapi.MOCK_FLAGS_DEVICE_PASID, test_uapi.MOCK_FLAGS_DEVICE_NO_DIRTY
__all__ = ["APERTURE", "ARGUMENT", "DATA", "OPS", "Client", "Memfd", "Mock", "Process", "World"]

OPS = {op.union: number for number, op in test_uapi.TEST_OPS.items()}


class Mock(NamedTuple):
    """What MOCK_DOMAIN made."""

    stdev: int
    hwpt: int
    idev: int


class Client:
    """One open /dev/iommu, used by one process."""

    def __init__(self, process: Process | None = None, *, ictx: Context | None = None, container: bool = False) -> None:
        self.process = process or World().process()
        self.world = self.process.world
        self.mm, self.fds, self.caller = self.process.mm, self.process.fds, self.process.caller
        self.gate = self.caller.gate
        self.ictx = ictx or Context(self.world.machine, container=container)
        if ictx is None:
            self.world.contexts.append(self.ictx)
            self.fd = self.process.install(self.ictx)
            self.ictx.put()  # the descriptor has it

    def close(self) -> None:
        self.fds.close(self.fd)

    # ---- calls ----

    def rc(self, cmd: int, uptr: int) -> int:
        """The raw answer of ioctl(2)."""
        return self.ictx.ioctl(self.caller, cmd, uptr)

    def vfio(self, cmd: int, arg: VfioIoctl | int, expect: int = 0) -> int:
        """An ioctl of VFIO; its result, and the struct brought up to date."""
        if isinstance(arg, int):
            return self._check(self.rc(cmd, arg), expect)
        self.process.put(arg.pack(), ARGUMENT)
        result = self._check(self.rc(cmd, ARGUMENT), expect)
        arg.update(self.mm.read(ARGUMENT, arg.SIZEOF))
        return result

    def ioctl(self, arg: I, expect: int = 0, *, uptr: int = ARGUMENT) -> I:
        """An ioctl that must give this errno; the struct brought up to date."""
        self.result(arg, expect, uptr=uptr)
        return arg

    def result(self, arg: Ioctl, expect: int = 0, *, uptr: int = ARGUMENT) -> int:
        """As ioctl(), and the value it returned."""
        self.mm.write(uptr, arg.pack())
        result = self._check(self.rc(arg.CMD, uptr), expect)
        if len(data := self.mm.read(uptr, arg.SIZEOF)) == arg.SIZEOF:
            arg.update(data)
        return result

    def _check(self, rc: int, expect: int) -> int:
        if expect:
            assert rc == -expect, f"{_errno(rc)}, expected {_errno(-expect)}: {self.caller.error}"
        else:
            assert rc >= 0, f"{_errno(rc)}: {self.caller.error}"
        return rc

    def test(self, op: L, expect: int = 0, *, id: int = 0) -> L:
        """An operation of the selftest command, by its struct; the struct brought up to date."""
        cmd = self.ioctl(test_uapi.TestCmd(op=OPS[type(op)], id=id, u=op.pack()), expect)
        op.update(cmd.u)
        return op

    def fails(self, call: Callable[[], object], expect: int) -> None:
        """A system call other than ioctl must fail."""
        try:
            call()
        except IommufdError as error:
            assert error.errno == expect, f"{_errno(-error.errno)}, expected {_errno(-expect)}: {error}"  # noqa: PT017
        else:
            raise AssertionError(f"success, expected {_errno(-expect)}")

    # ---- IOAS ----

    def destroy(self, obj_id: int, expect: int = 0) -> None:
        self.ioctl(uapi.Destroy(id=obj_id), expect)

    def ioas_alloc(self) -> int:
        return self.ioctl(uapi.IoasAlloc()).out_ioas_id

    def map(self, ioas: int, addr: int, length: int, iova: int | None = None, flags: int = RW, expect: int = 0) -> int:
        cmd = uapi.IoasMap(flags=flags, ioas_id=ioas, user_va=addr, length=length)
        if iova is not None:
            cmd.flags, cmd.iova = flags | FIXED, iova
        return self.ioctl(cmd, expect).iova

    def map_file(
        self, ioas: int, fd: int, start: int, length: int, iova: int | None = None, flags: int = RW, expect: int = 0
    ) -> int:
        cmd = uapi.IoasMapFile(flags=flags, ioas_id=ioas, fd=fd, start=start, length=length)
        if iova is not None:
            cmd.flags, cmd.iova = flags | FIXED, iova
        return self.ioctl(cmd, expect).iova

    def copy(
        self, dst: int, src: int, src_iova: int, length: int, iova: int | None = None, flags: int = RW, expect: int = 0
    ) -> int:
        cmd = uapi.IoasCopy(flags=flags, dst_ioas_id=dst, src_ioas_id=src, length=length, src_iova=src_iova)
        if iova is not None:
            cmd.flags, cmd.dst_iova = flags | FIXED, iova
        return self.ioctl(cmd, expect).dst_iova

    def unmap(self, ioas: int, iova: int, length: int, expect: int = 0) -> int:
        return self.ioctl(uapi.IoasUnmap(ioas_id=ioas, iova=iova, length=length), expect).length

    def allow(self, ioas: int, *spans: tuple[int, int], expect: int = 0) -> None:
        uptr = self.process.put(b"".join(uapi.IovaRange(*span).pack() for span in spans))
        self.ioctl(uapi.IoasAllowIovas(ioas_id=ioas, num_iovas=len(spans), allowed_iovas=uptr), expect)

    def ranges(self, ioas: int) -> list[tuple[int, int]]:
        """IOAS_IOVA_RANGES: (start, last) of what is not reserved."""
        cmd = self.ioctl(uapi.IoasIovaRanges(ioas_id=ioas, num_iovas=64, allowed_iovas=DATA))
        found = [uapi.IovaRange.unpack(self.mm.read(DATA + 16 * n, 16)) for n in range(cmd.num_iovas)]
        return [(span.start, span.last) for span in found]

    def reserve(self, ioas: int, start: int, length: int, expect: int = 0) -> None:
        self.test(test_uapi.AddReserved(start, length), expect, id=ioas)

    def option(self, option: int, value: int | None = None, *, obj: int = 0, expect: int = 0) -> int:
        op = uapi.IOMMU_OPTION_OP_GET if value is None else uapi.IOMMU_OPTION_OP_SET
        return self.ioctl(uapi.Option(option_id=option, op=op, object_id=obj, val64=value or 0), expect).val64

    # ---- devices and HWPTs ----

    def mock_domain(self, pt: int, flags: int = 0, expect: int = 0) -> Mock:
        op = self.test(test_uapi.MockDomainFlags(dev_flags=flags), expect, id=pt)
        return Mock(op.out_stdev_id, op.out_hwpt_id, op.out_idev_id)

    def replace(self, stdev: int, pt: int, expect: int = 0) -> int:
        return self.test(test_uapi.MockDomainReplace(pt), expect, id=stdev).pt_id

    def pasid_attach(self, stdev: int, pasid: int, pt: int, expect: int = 0) -> int:
        return self.test(test_uapi.PasidAttach(pasid, pt), expect, id=stdev).pt_id

    def pasid_replace(self, stdev: int, pasid: int, pt: int, expect: int = 0) -> int:
        return self.test(test_uapi.PasidReplace(pasid, pt), expect, id=stdev).pt_id

    def pasid_detach(self, stdev: int, pasid: int) -> None:
        self.test(test_uapi.PasidDetach(pasid), id=stdev)

    def hwpt(self, dev: int, pt: int, flags: int = 0, *, fault: int = 0, expect: int = 0) -> int:
        """A paging HWPT without driver data."""
        return self.ioctl(uapi.HwptAlloc(flags=flags, dev_id=dev, pt_id=pt, fault_id=fault), expect).out_hwpt_id

    def nested(
        self, dev: int, pt: int, flags: int = 0, *, fault: int = 0, iotlb: int = 0xBEEF, expect: int = 0
    ) -> int:
        data = test_uapi.HwptSelftest(iotlb).pack()
        cmd = uapi.HwptAlloc(
            flags=flags, dev_id=dev, pt_id=pt, fault_id=fault, data_type=test_uapi.IOMMU_HWPT_DATA_SELFTEST,
            data_len=len(data), data_uptr=self.process.put(data),
        )  # fmt: skip
        return self.ioctl(cmd, expect).out_hwpt_id

    # ---- vIOMMU and queues ----

    def viommu(self, dev: int, hwpt: int, *, in_data: int | None = None, expect: int = 0) -> int:
        cmd = uapi.ViommuAlloc(type=test_uapi.IOMMU_VIOMMU_TYPE_SELFTEST, dev_id=dev, hwpt_id=hwpt)
        if in_data is not None:
            data = test_uapi.ViommuSelftest(in_data).pack()
            cmd.data_len, cmd.data_uptr = len(data), self.process.put(data)
        return self.ioctl(cmd, expect).out_viommu_id

    def vdevice(self, viommu: int, dev: int, virt_id: int, expect: int = 0) -> int:
        return self.ioctl(uapi.VdeviceAlloc(viommu_id=viommu, dev_id=dev, virt_id=virt_id), expect).out_vdevice_id

    def veventq(self, viommu: int, depth: int = 4, expect: int = 0) -> tuple[int, int]:
        """(id, fd)"""
        cmd = uapi.VeventqAlloc(
            viommu_id=viommu, type=test_uapi.IOMMU_VEVENTQ_TYPE_SELFTEST, veventq_depth=depth
        )
        self.ioctl(cmd, expect)
        return cmd.out_veventq_id, cmd.out_veventq_fd

    def fault_queue(self, expect: int = 0) -> tuple[int, int]:
        """(id, fd)"""
        cmd = self.ioctl(uapi.FaultAlloc(), expect)
        return cmd.out_fault_id, cmd.out_fault_fd

    def hw_queue(self, viommu: int, index: int, iova: int, length: int = PAGE_SIZE, expect: int = 0) -> int:
        cmd = uapi.HwQueueAlloc(
            viommu_id=viommu, type=test_uapi.IOMMU_HW_QUEUE_TYPE_SELFTEST, index=index,
            nesting_parent_iova=iova, length=length,
        )  # fmt: skip
        return self.ioctl(cmd, expect).out_hw_queue_id

    # ---- accesses and files ----

    def access(self, ioas: int, *, pins: bool = True, expect: int = 0) -> int:
        """A selftest access: its fd."""
        return self.test(test_uapi.CreateAccess(flags=int(pins)), expect, id=ioas).out_access_fd

    def pin(self, fd: int, iova: int, length: int, *, write: bool = False, expect: int = 0) -> int:
        op = test_uapi.AccessPages(flags=int(write), iova=iova, length=length)
        return self.test(op, expect, id=fd).out_access_pages_id

    def unpin(self, fd: int, item: int, expect: int = 0) -> None:
        self.test(test_uapi.DestroyAccessPages(item), expect, id=fd)

    def access_read(self, fd: int, iova: int, length: int, *, slow: bool = False, expect: int = 0) -> bytes:
        flags = test_uapi.MOCK_ACCESS_RW_SLOW_PATH if slow else 0
        self.test(test_uapi.AccessRw(iova, length, DATA, flags), expect, id=fd)
        return self.mm.read(DATA, length)

    def access_write(self, fd: int, iova: int, data: bytes, *, slow: bool = False, expect: int = 0) -> None:
        flags = test_uapi.MOCK_ACCESS_RW_WRITE | (test_uapi.MOCK_ACCESS_RW_SLOW_PATH if slow else 0)
        self.test(test_uapi.AccessRw(iova, len(data), self.process.put(data), flags), expect, id=fd)

    def file(self, fd: int, kind: type[F]) -> F:
        """The open file, of this kind."""
        file = self.fds.fget(fd)
        assert isinstance(file, kind)
        return file

    def read(self, fd: int, count: int, addr: int = DATA) -> bytes:
        """read(2)"""
        return self.mm.read(addr, self.file(fd, File).read(self.caller, addr, count))

    def write(self, fd: int, data: bytes) -> int:
        """write(2)"""
        return self.file(fd, File).write(self.caller, self.process.put(data), len(data))

    def mmap(self, offset: int, length: int, prot: int = 3, flags: int = 1) -> Vma:
        vma = self.ictx.mmap(self.caller, offset, length, prot, flags)
        assert isinstance(vma, Vma)
        self.world.vmas.append(vma)
        return vma

    def munmap(self, vma: Vma) -> None:
        self.world.vmas.remove(vma)
        vma.put()

    # ---- VFIO ----

    def vfio_ioas(self, op: int, ioas: int = 0, expect: int = 0) -> int:
        return self.ioctl(uapi.VfioIoas(ioas_id=ioas, op=op), expect).ioas_id

    def map_dma(self, addr: int, length: int, iova: int, flags: int = 3, expect: int = 0) -> None:
        self.vfio(VFIO_IOMMU_MAP_DMA, VfioIommuType1DmaMap(flags=flags, vaddr=addr, iova=iova, size=length), expect)

    def unmap_dma(self, iova: int, length: int, flags: int = 0, expect: int = 0) -> int:
        cmd = VfioIommuType1DmaUnmap(flags=flags, iova=iova, size=length)
        self.vfio(VFIO_IOMMU_UNMAP_DMA, cmd, expect)
        return cmd.size


def _errno(rc: int) -> str:
    return "success" if rc >= 0 else errno.errorcode.get(-rc, str(rc))
