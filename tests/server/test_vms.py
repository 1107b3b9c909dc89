"""VMs over the socket: hello of kind 5, descriptors in memory behind a pointer, lives of what is shared."""

from __future__ import annotations

import os
from contextlib import aclosing, contextmanager
from errno import EBADF, EBADFD, EBUSY, EINVAL, ENOENT, ENOTTY, EOPNOTSUPP
from typing import TYPE_CHECKING

import pytest
import trio

import iommufd_uapi.kvm as kvm
from iommufd_client import call as calls
from iommufd_client.aio import open_iommufd
from iommufd_client.call import IommufdOSError
from iommufd_client.endpoint import DmaError
from iommufd_client.memory import Buffers
from iommufd_client.show import render
from iommufd_client.testing import Daemon
from iommufd_client.vm import Vm
from iommufd_uapi.events import line
from iommufd_uapi.iommufd import HwptAlloc

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from iommufd_client.files import File
    from iommufd_client.iommufd import Iommufd

PAGE = 4096


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with Daemon() as started:
        yield started


@pytest.fixture
def iommufd(daemon: Daemon) -> Iterator[Iommufd]:
    with daemon.open(machine="@vtd") as opened:
        yield opened


def errno_of(call: Callable[[], object]) -> int:
    with pytest.raises(IommufdOSError) as caught:
        call()
    assert caught.value.errno is not None
    return caught.value.errno


def hwpt_kvm(iommufd: Iommufd, dev_id: int, fd: int) -> int:
    return iommufd.hwpt_alloc(dev_id, 0, data=kvm.HwptKvm(fd=fd))


def objects(daemon: Daemon) -> int:
    with daemon.admin() as admin:
        return admin.stats().objects


@contextmanager
def exported(vm: Vm) -> Iterator[File]:
    """The table of a VM with one vCPU."""
    with vm.create_vcpu(0), vm.create_tdp_fd() as table:
        yield table


def test_hello(daemon: Daemon, iommufd: Iommufd) -> None:
    assert errno_of(lambda: Vm(daemon.socket_path, mm=12345)) == ENOENT
    assert errno_of(lambda: Vm(daemon.socket_path, context=0)) == EBADFD
    assert errno_of(lambda: Vm(daemon.socket_path, machine="x", context=iommufd.identity)) == EINVAL
    assert errno_of(lambda: Vm(daemon.socket_path, machine="@nonsense")) == ENOENT
    with Vm(daemon.socket_path) as vm:
        assert vm.check_extension(kvm.KVM_CAP_TDP_FD) == 1
        assert errno_of(lambda: vm.ioctl(0xAE99, 0)) == ENOTTY
        assert errno_of(lambda: vm.ioctl(0x3B81, bytearray(12))) == ENOTTY


def test_a_dma_through_the_table_of_a_vm(daemon: Daemon, iommufd: Iommufd) -> None:
    with (
        iommufd.guest_memory(16 * PAGE) as ram, iommufd.vm() as vm, iommufd.device("vfio0") as device,
        daemon.admin() as admin, exported(vm) as table,
    ):  # fmt: skip
        vm.enable_cap(kvm.KVM_CAP_TDP_CHECK)
        vm.set_user_memory_region(0, 0x10000, ram, flags=kvm.KVM_MEM_LOG_DIRTY_PAGES)
        hwpt = hwpt_kvm(iommufd, device.bind(iommufd), table.fileno())
        device.attach(hwpt)
        endpoint = admin.endpoint("vfio0", iommufd)
        data = os.urandom(3 * PAGE)
        endpoint.write(0x10800, data)
        assert ram.read(0x800, len(data)) == data
        assert endpoint.read(0x10800, len(data)) == data
        assert vm.get_dirty_log(0) == b"\x0f" + bytes(7)
        assert vm.get_dirty_log(0) == bytes(8)
        endpoint.write(0x12000, b"again")
        assert vm.get_dirty_log(0)[0] == 4
        with pytest.raises(DmaError, match="answered FAILURE"):
            endpoint.read(0x20000, 1)
        info = vm.get_tdp_info()
        assert (info.importers, info.violations, info.present) == (1, 0, 4 * PAGE)
        drawn = render(admin.show())
        assert "VM  1 slot, 64 KiB  1 vCPU  table exported, 1 importer, 16 KiB mapped" in drawn
        assert (admin.stats().pinned_pages, admin.stats().objects_by_type["HWPT_KVM"]) == (0, 1)
        device.detach()
        iommufd.destroy(hwpt)


def test_memory_that_the_client_takes_back_leaves_the_table_first(daemon: Daemon, iommufd: Iommufd) -> None:
    with iommufd.vm() as vm, iommufd.device("vfio0") as device, daemon.admin() as admin:
        vm.enable_cap(kvm.KVM_CAP_TDP_CHECK)
        with iommufd.guest_memory(4 * PAGE) as ram:
            vm.set_user_memory_region(0, 0, ram)
            with exported(vm) as table:
                device.attach(hwpt_kvm(iommufd, device.bind(iommufd), table.fileno()))
            endpoint = admin.endpoint("vfio0", iommufd)
            endpoint.write(0, b"there")
            files = admin.stats().page_files
        with pytest.raises(DmaError):
            endpoint.read(0, 5)
        assert admin.stats().page_files == files - 1, "a table holds no file that it does not show"
        assert (vm.get_tdp_info().present, vm.get_tdp_info().violations) == (0, 0)


def test_descriptors_that_are_no_table(daemon: Daemon, iommufd: Iommufd) -> None:
    with iommufd.device("vfio0") as device, iommufd.vm() as vm, exported(vm) as table:
        dev_id = device.bind(iommufd)
        for fd, errno in ((99999, EBADF), (2**32 - 1, EBADF), (0, EOPNOTSUPP), (iommufd.identity.fileno(), EOPNOTSUPP)):
            assert errno_of(lambda fd=fd: hwpt_kvm(iommufd, dev_id, fd)) == errno  # type: ignore[misc]
        with daemon.open(machine="@vtd") as other, other.device("vfio0") as foreign:
            foreign_id = foreign.bind(other)
            assert errno_of(lambda: hwpt_kvm(other, foreign_id, table.fileno())) == EOPNOTSUPP
        hwpt = hwpt_kvm(iommufd, dev_id, table.fileno())
        assert errno_of(lambda: hwpt_kvm(iommufd, dev_id, table.fileno())) == EBUSY
        iommufd.destroy(hwpt)


def test_a_table_lives_as_long_as_somebody_has_it(daemon: Daemon, iommufd: Iommufd) -> None:
    before = objects(daemon)
    with iommufd.guest_memory(PAGE) as ram, iommufd.device("vfio0") as device, daemon.admin() as admin:
        vm = iommufd.vm()
        vm.set_user_memory_region(0, 0, ram)
        with exported(vm) as table:
            device.attach(hwpt := hwpt_kvm(iommufd, device.bind(iommufd), table.fileno()))
        vm.close()
        endpoint = admin.endpoint("vfio0", iommufd)
        endpoint.write(0, b"still")
        assert ram.read(0, 5) == b"still"
        device.detach()
        iommufd.destroy(hwpt)
        assert "iommufdd.server.vms.ServedVm" not in admin.stats(classes=True).classes
        assert objects(daemon) == before + 1, "the device"


def test_a_vm_of_another_address_space(daemon: Daemon) -> None:
    """Its table can be had, but its faults fail: a HWPT asks for whoever made it."""
    with (
        daemon.open(machine="shared@vtd") as other, other.guest_memory(PAGE) as ram, daemon.admin() as admin,
        Vm(daemon.socket_path, machine="shared") as vm, other.device("vfio0") as device, exported(vm) as table,
    ):  # fmt: skip
        vm.set_user_memory_region(0, 0, ram)
        device.attach(hwpt_kvm(other, device.bind(other), table.fileno()))
        with pytest.raises(DmaError, match="answered FAILURE"):
            admin.endpoint("vfio0", other).read(0, 1)
        assert vm.get_tdp_info().faults == 0


def test_a_trace_and_the_sanitizer_see_it_all(daemon: Daemon) -> None:
    """The VM's calls with their fields, and page requests with their answers, FAILURE too; nothing is stale."""
    seen: list[str] = []
    with (
        Daemon("--sanitize=fail") as other, other.admin() as admin, other.admin() as reader,
        other.open(machine="@vtd") as iommufd, iommufd.guest_memory(PAGE) as ram, iommufd.vm() as vm,
        iommufd.device("vfio0") as device, exported(vm) as table,
    ):  # fmt: skip
        since, events = reader.trace()
        vm.set_user_memory_region(0, 0, ram)
        hwpt = hwpt_kvm(iommufd, device.bind(iommufd), table.fileno())
        device.attach(hwpt)
        endpoint = admin.endpoint("vfio0", iommufd)
        endpoint.write(0, b"x")
        vm.set_user_memory_region(0, 0)
        with pytest.raises(DmaError, match="answered FAILURE"):
            endpoint.write(0, b"x")
        vm.enable_cap(kvm.KVM_CAP_TDP_MMIO_MARKS)
        for why in ("answered FAILURE", "is gone"):
            with pytest.raises(DmaError, match=why):
                endpoint.write(0xFEB0_0000, b"x")
        device.detach()
        iommufd.destroy(hwpt)
        for event in events:
            seen.append(line(event, since))
            if "IOMMU_DESTROY" in seen[-1]:
                break
        (findings,) = (each for each in admin.sanitize() if each.checked)
        assert (findings.never, findings.raced) == (0, 0)
    text = "\n".join(seen)
    for words in (
        "KVM_SET_USER_MEMORY_REGION(vm, {slot=0, flags=0, guest_phys_addr=0, memory_size=0x1000",
        "replace vfio0 pasid 0 nothing -> hwpt_kvm:2", "page response vfio0 (group 0) = SUCCESS",
        "IOTLB domain", "page response vfio0 (group 1) = FAILURE", "data={fd=",
        "misread hwpt_kvm:2 level 1 0xfeb00000: 0x00", "KVM's mark of MMIO",
    ):  # fmt: skip
        assert words in text, words


def test_a_packet_whose_data_names_a_descriptor_that_was_not_sent(daemon: Daemon, iommufd: Iommufd) -> None:
    """The channel is closed, as for an index in a struct."""
    with daemon.open(machine="@vtd") as victim, victim.device("vfio0") as device:
        buffers = Buffers()
        cmd = HwptAlloc(dev_id=device.bind(victim), data_type=kvm.IOMMU_HWPT_DATA_KVM, data_len=8)
        cmd.data_uptr = buffers.add(kvm.HwptKvm(fd=0).pack())
        call = calls.ioctl(cmd.CMD, cmd, buffers)
        call.pointed.clear()
        call.segments[1].data = (5).to_bytes(8, "little")
        with pytest.raises(ConnectionError):
            victim._call(call)
    assert iommufd.ioas_alloc()


def test_the_same_over_trio(daemon: Daemon) -> None:
    async def main() -> None:
        async with (
            open_iommufd(daemon.socket_path, machine="@vtd") as iommufd, iommufd.guest_memory(4 * PAGE) as ram,
            aclosing(await iommufd.vm()) as vm, aclosing(await iommufd.device("vfio0")) as device,
        ):  # fmt: skip
            assert await vm.check_extension(kvm.KVM_CAP_TDP_FD) == 1
            await vm.enable_cap(kvm.KVM_CAP_TDP_CHECK)
            await vm.set_user_memory_region(0, 0, ram, flags=kvm.KVM_MEM_LOG_DIRTY_PAGES)
            with await vm.create_vcpu(0), await vm.create_tdp_fd() as table:
                dev_id = await device.bind(iommufd)
                hwpt = await iommufd.hwpt_alloc(dev_id, 0, data=kvm.HwptKvm(fd=table.fileno()))
                await device.attach(hwpt)

                def write() -> None:
                    with daemon.admin() as admin:
                        admin.endpoint("vfio0", iommufd).write(PAGE, b"trio")

                await trio.to_thread.run_sync(write)
                assert ram.read(PAGE, 4) == b"trio"
                assert await vm.get_dirty_log(0) == b"\x02" + bytes(7)
                assert (await vm.get_tdp_info()).mapped == 1
                await device.detach()
                await iommufd.destroy(hwpt)

    trio.run(main)
