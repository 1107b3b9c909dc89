"""A VMM's way to a VCMDQ of `tegra241`, with nothing but system calls: run under `iommufdctl run`, it prints ok."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import select
import time
from typing import TypeVar

import iommufd_uapi.iommufd as uapi
from iommufd_uapi.layout import Ioctl, VfioIoctl
from iommufd_uapi.smmuv3 import Cmd
from iommufd_uapi.tegra241_cmdqv import VCMDQ_EN, Cerror, Lvcmdq, Register
from iommufd_uapi.vfio import VfioDeviceBindIommufd

LENGTH = 1 << 20
ENTRIES = 256
C = TypeVar("C", bound=Ioctl | VfioIoctl)


def ioctl(fd: int, cmd: C) -> C:
    buffer = bytearray(cmd.pack())
    fcntl.ioctl(fd, cmd.CMD, buffer, True)
    cmd.update(buffer)
    return cmd


def address(buffer: bytearray | mmap.mmap) -> int:
    return ctypes.addressof((ctypes.c_char * len(buffer)).from_buffer(buffer))


def wait(registers: Lvcmdq, register: Register, value: int) -> None:
    until = time.monotonic() + 30
    while registers.read(register) != value:
        assert time.monotonic() < until, register
        time.sleep(0.001)


def main() -> None:
    iommufd, device = os.open("/dev/iommu", os.O_RDWR), os.open("/dev/vfio/devices/vfio0", os.O_RDWR)
    dev = ioctl(device, VfioDeviceBindIommufd(argsz=16, iommufd=iommufd)).out_devid
    ioas = ioctl(iommufd, uapi.IoasAlloc()).out_ioas_id
    memfd = os.memfd_create("guest")
    os.ftruncate(memfd, LENGTH)
    ram = mmap.mmap(memfd, LENGTH)
    ioctl(iommufd, uapi.IoasMap(flags=7, ioas_id=ioas, user_va=address(ram), length=LENGTH))
    flags = uapi.IOMMU_HWPT_ALLOC_NEST_PARENT
    parent = ioctl(iommufd, uapi.HwptAlloc(flags=flags, dev_id=dev, pt_id=ioas)).out_hwpt_id
    data = bytearray(uapi.ViommuTegra241Cmdqv.SIZEOF)
    kind = uapi.IOMMU_VIOMMU_TYPE_TEGRA241_CMDQV
    alloc = uapi.ViommuAlloc(type=kind, dev_id=dev, hwpt_id=parent, data_len=len(data), data_uptr=address(data))
    viommu = ioctl(iommufd, alloc).out_viommu_id
    where = uapi.ViommuTegra241Cmdqv.unpack(data)
    page0 = mmap.mmap(iommufd, where.out_vintf_mmap_length, offset=where.out_vintf_mmap_offset)
    kind = uapi.IOMMU_VEVENTQ_TYPE_TEGRA241_CMDQV
    errors = ioctl(iommufd, uapi.VeventqAlloc(viommu_id=viommu, type=kind, veventq_depth=4)).out_veventq_fd
    kind = uapi.IOMMU_HW_QUEUE_TYPE_TEGRA241_CMDQV
    ioctl(iommufd, uapi.HwQueueAlloc(viommu_id=viommu, type=kind, length=16 * ENTRIES))

    queue = Lvcmdq(memoryview(page0), 0)
    queue.write(Register.CONFIG, VCMDQ_EN)
    wait(queue, Register.STATUS, VCMDQ_EN)
    for prod in range(1, 20):
        ram[16 * prod - 16 : 16 * prod] = Cmd.tlbi_nh_asid(prod).pack()
        queue.write(Register.PROD, prod)
        wait(queue, Register.CONS, prod)
    ram[16 * 19 : 16 * 20] = Cmd.cfgi_all().pack()
    queue.write(Register.PROD, 20)
    poll = select.poll()
    poll.register(errors, select.POLLIN)
    assert poll.poll(30_000) == [(errors, select.POLLIN)]
    assert os.read(errors, 64) == bytes(8) + bytes([1]) + bytes(15)
    assert queue.error == Cerror.ILL
    os.ftruncate(memfd, 0)  # the memory goes; the queue cannot be read any more
    queue.acknowledge()
    assert poll.poll(30_000) == [(errors, select.POLLIN)]
    assert queue.error == Cerror.ABT
    print("ok")


if __name__ == "__main__":
    main()
