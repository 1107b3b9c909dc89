"""A hostile client: everything that devices and their IOMMUs take, in any order, with what nobody should send.

Every step either works or fails with an errno. What is closed, and when, is random too; in the end all is.
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
import struct
from typing import TYPE_CHECKING, Any

import iommufd_uapi.iommufd as uapi
from iommufd_client import DmaError, GuestMemory, Iommufd, VfioDevice
from iommufd_uapi import admin
from iommufd_uapi.smmuv3 import Cd, Ste
from tests.iommu.tables import X86Table

if TYPE_CHECKING:
    from collections.abc import Callable

    from iommufd_client import File

PAGES = 512
RAM = PAGES << 12
POOL = 0x10_0000
CDS = 0x8_0000
DEVICES = ("vfio0", "vfio1", "vfio2", "vfio3")
U64 = 2**64 - 1


class Vm:
    """One open context with what was made on it."""

    def __init__(self, iommufd: Iommufd) -> None:
        self.iommufd = iommufd
        self.devices: dict[VfioDevice, int] = {}  # and the id where it is bound
        self.ids: list[int] = []
        self.ioas: list[int] = []
        self.parents: list[int] = []
        self.viommus: list[int] = []
        self.nested: list[int] = []
        self.faults: list[tuple[int, File]] = []
        self.events: list[File] = []
        self.memory: list[GuestMemory] = []
        self.loose: list[int] = []  # memfds that may shrink

    def close(self) -> None:
        ends: list[Any] = [*self.devices, *(file for _, file in self.faults), *self.events, *self.memory]
        for each in ends:
            each.close()
        for fd in self.loose:
            os.close(fd)
        self.iommufd.close()


class Hostile:
    """Steps of one seed against the daemon at `path`."""

    def __init__(self, path: str, machine: str, seed: int) -> None:
        self.path = path
        self.machine = machine
        self.random = random.Random(seed)
        self.vms: list[Vm] = []
        self.admins: list[socket.socket] = []
        self.refused: dict[str, int] = {}
        self.done: dict[str, int] = {}
        self.steps: list[tuple[Callable[[], None], int]] = [
            (self.open, 2), (self.close, 1), (self.channel, 1), (self.device, 6), (self.close_device, 3),
            (self.attach, 14), (self.detach, 4), (self.reset, 2), (self.ioas, 3), (self.map, 8), (self.unmap, 3),
            (self.shrink, 3), (self.parent, 6), (self.nested, 14), (self.viommu, 5), (self.events, 2), (self.faults, 3),
            (self.answer, 8), (self.invalidate, 8), (self.tables, 6), (self.dma, 25), (self.walk, 5), (self.look, 1),
            (self.hang_up, 6), (self.destroy, 3), (self.dirty, 3), (self.trace, 1),
        ]  # fmt: skip

    def run(self, count: int) -> None:
        """So many steps; then everything is closed, in any order."""
        try:
            steps, weights = zip(*self.steps, strict=True)
            for step in self.random.choices(steps, weights, k=count):
                name = step.__name__
                try:
                    step()
                    self.done[name] = self.done.get(name, 0) + 1
                except (ConnectionError, BrokenPipeError) as error:
                    raise AssertionError(f"{name}: the daemon hung up") from error
                except (OSError, DmaError, IndexError):  # an errno, or nothing there to do it with
                    self.refused[name] = self.refused.get(name, 0) + 1
        finally:
            ends: list[Any] = [*self.vms, *self.admins]
            self.random.shuffle(ends)
            for end in ends:
                end.close()

    # ---- what is there ----

    def any(self, *bounds: int) -> int:
        """A number that may be anything, or one of those that matter, or beside it."""
        edges = [*bounds, 0, 1, 4096, 1 << 20, 1 << 21, 1 << 39, 1 << 47, 1 << 48, 1 << 57, 1 << 63, U64]
        return max(0, min(U64, self.random.choice(edges) + self.random.choice((0, 0, -1, 1, 8, 4096))))

    def vm(self) -> Vm:
        return self.random.choice(self.vms)

    def object(self, vm: Vm, *kinds: list[int]) -> int:
        """Mostly of the kinds that fit."""
        fitting = [each for kind in kinds for each in kind]
        return self.random.choice(fitting) if fitting and self.random.random() < 0.9 else self.random.randrange(20)

    def bound(self) -> tuple[Vm, VfioDevice]:
        vm = self.vm()
        bound = [device for device, dev_id in vm.devices.items() if dev_id]
        return vm, self.random.choice(bound if bound and self.random.random() < 0.9 else list(vm.devices))

    def pasid(self) -> int | None:
        return self.random.choice((None, None, None, 0, 1, 2, 5, 1 << 10, 1 << 20, 2**32 - 1))

    # ---- opening and closing ----

    def open(self) -> None:
        if len(self.vms) < 4:
            name = self.random.choice(("", "lab", "lab", "1"))
            self.vms.append(Vm(Iommufd(self.path, machine=f"{name}@{self.machine}")))
            if self.random.random() < 0.8:
                self._start(self.vms[-1])

    def _start(self, vm: Vm) -> None:
        """A guest that translates for a device, as it should be."""
        vms, self.vms = self.vms, [vm]
        try:
            self.ioas()
            self.faults()
            device = vm.iommufd.device(self.random.choice(DEVICES))
            vm.devices[device] = 0
            vm.devices[device] = dev_id = device.bind(vm.iommufd)
            flags = self.random.choice((1, 1, 3, 9)) if self.machine == "vtd" else 1
            vm.parents.append(parent := vm.iommufd.hwpt_alloc(dev_id, vm.ioas[0], flags=flags))
            if self.machine != "vtd":
                with contextlib.suppress(OSError):
                    self.viommu()
            for kind in (0, 3):
                self.tables(kind)
            for fault_id in (None, vm.faults[0][0]):
                data: Any = uapi.HwptVtdS1(pgtbl_addr=POOL, addr_width=48)
                if self.machine != "vtd":
                    data = uapi.HwptArmSmmuv3(ste=Ste.s1(CDS, s1cdmax=4, s1dss=2, s1stalld=False).words()[:2])
                    parent = vm.viommus[-1]
                with contextlib.suppress(OSError):
                    flags = uapi.IOMMU_HWPT_ALLOC_PASID * self.random.randrange(2)
                    vm.nested.append(vm.iommufd.hwpt_alloc(dev_id, parent, data=data, flags=flags, fault_id=fault_id))
            device.attach(self.random.choice(vm.nested))
        finally:
            self.vms = vms

    def close(self) -> None:
        if len(self.vms) > 1 and self.random.random() < 0.4:
            self.vms.pop(self.random.randrange(len(self.vms))).close()

    def channel(self) -> None:
        vm = self.vm()
        further = vm.iommufd.channel(new_mm=self.random.random() < 0.5)
        if self.random.random() < 0.2:
            vm.iommufd.close()
            vm.iommufd = further
        else:
            further.close()

    def device(self) -> None:
        vm, name = self.vm(), self.random.choice(DEVICES)
        device = (
            vm.iommufd.device(name) if self.random.random() < 0.9
            else VfioDevice(name, self.path, machine=self.random.choice(("lab", "1", f"@{self.machine}")))
        )  # fmt: skip
        vm.devices[device] = 0
        with contextlib.suppress(OSError):
            vm.devices[device] = device.bind(self.vm().iommufd if self.random.random() < 0.1 else vm.iommufd)

    def close_device(self) -> None:
        vm, device = self.bound()
        if self.random.random() < 0.4:
            del vm.devices[device]
            device.close()

    def reset(self) -> None:
        self.bound()[1].reset()

    def destroy(self) -> None:
        vm = self.vm()
        vm.iommufd.destroy(self.random.randrange(40))

    # ---- memory ----

    def ioas(self) -> None:
        vm = self.vm()
        vm.ioas.append(vm.iommufd.ioas_alloc())
        memory = vm.iommufd.guest_memory(RAM)
        vm.memory.append(memory)
        vm.iommufd.ioas_map(vm.ioas[-1], memory, iova=0)

    def map(self) -> None:
        vm = self.vm()
        ioas, iova = self.object(vm, vm.ioas), self.random.choice((None, self.any(RAM) & -4096))
        writable = self.random.random() < 0.8
        if self.random.random() < 0.5 and vm.memory:
            vm.iommufd.ioas_map(ioas, self.random.choice(vm.memory), iova=iova, writable=writable)
            return
        fd = os.memfd_create("loose", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        vm.loose.append(fd)
        size = self.random.choice((4096, 8192, RAM, 1 << 30))
        os.ftruncate(fd, size)
        os.pwrite(fd, self.garbage(4096), 0)
        vm.iommufd.ioas_map_file(ioas, fd, 0, size, iova, writable=writable)

    def unmap(self) -> None:
        vm = self.vm()
        if self.random.random() < 0.5 and vm.memory:
            memory = vm.memory.pop()
            memory.close()
            return
        vm.iommufd.ioas_unmap(self.object(vm, vm.ioas), *self.random.choice(((0, U64), (0, RAM), (4096, 4096))))

    def shrink(self) -> None:
        fd = self.random.choice(self.vm().loose)
        os.ftruncate(fd, self.random.choice((0, 1, 4096, 5000, 1 << 30)))

    def garbage(self, length: int) -> bytes:
        """Table entries of any format, many of which lead into RAM, or back to where they are."""
        addresses = (0, CDS, POOL, POOL + 4096, RAM - 4096, RAM, self.any() & 0x000F_FFFF_FFFF_F000)
        bits = (0, 1, 3, 7, 0x27, 0x67, 0x83, 0xE7, 0x403, 0x441, 0x443, 0x747, 1 << 63 | 7, 0xFFF)
        choose = self.random.choice
        count = 16
        block = b"".join(struct.pack("<Q", choose(addresses) | choose(bits)) for _ in range(count))
        return (block * (length // (8 * count) + 1))[:length]

    def tables(self, kind: int = -1) -> None:
        """Write a table that works, one that is garbage, or one whose every entry leads to itself; or a CD."""
        memory = self.random.choice(self.vm().memory)
        kind = self.random.randrange(4) if kind < 0 else kind
        if kind == 0:
            table = X86Table(memory, POOL)
            for page in range(8):
                table.map(page << 12, self.random.randrange(PAGES + 4) << 12)
        elif kind == 1:
            memory.write(POOL, self.garbage(16 << 12))
        elif kind == 2:
            memory.write(POOL, struct.pack("<Q", POOL | self.random.choice((0x67, 0x443, 3))) * 512)
        else:
            cd = Cd.s1(POOL, asid=self.random.randrange(4))
            cd.s = self.random.randrange(2)
            cd.t0sz = self.random.choice((16, 16, 25, 39, 0))
            cd.ha, cd.hd = self.random.randrange(2), self.random.randrange(2)
            memory.write(CDS, cd.pack() * 64 if self.random.random() < 0.8 else self.garbage(4096))

    # ---- domains ----

    def parent(self) -> None:
        vm, device = self.bound()
        flags = self.random.choice((1, 1, 1, 1 | 8, 2, 3, 8, 0, 64))
        vm.parents.append(vm.iommufd.hwpt_alloc(vm.devices[device], self.object(vm, vm.ioas), flags=flags))

    def nested(self) -> None:
        vm, device = self.bound()
        root = self.random.choice((POOL, POOL, POOL, 0, RAM, self.any() & -4096))
        fault = self.random.choice(vm.faults)[0] if vm.faults and self.random.random() < 0.5 else None
        data: Any
        if self.machine == "vtd":
            width, flags = self.random.choice((48, 48, 48, 57, 39, 0)), self.random.choice((0, 0, 0, 1, 3, 7, 8))
            data, over = uapi.HwptVtdS1(flags=flags, pgtbl_addr=root, addr_width=width), vm.parents
        else:
            ste = Ste.s1(
                self.random.choice((CDS, CDS, POOL, RAM, self.any() & 0xF_FFFF_FFFF_FFC0)),
                s1cdmax=self.random.choice((0, 0, 4, 10, 20)), s1dss=self.random.choice((0, 1, 2)),
                eats=self.random.choice((0, 0, 1)), s1stalld=self.random.random() < 0.5,
            )  # fmt: skip
            data, over = uapi.HwptArmSmmuv3(ste=ste.words()[:2]), vm.viommus
        flags = self.random.choice((0, 0, 8))
        hwpt = vm.iommufd.hwpt_alloc(
            vm.devices[device], self.object(vm, over), data=data, flags=flags, fault_id=fault
        )
        vm.nested.append(hwpt)

    def viommu(self) -> None:
        vm, device = self.bound()
        kind = uapi.IOMMU_VIOMMU_TYPE_ARM_SMMUV3
        vm.viommus.append(vm.iommufd.viommu_alloc(vm.devices[device], self.object(vm, vm.parents), kind))
        vm.iommufd.vdevice_alloc(vm.viommus[-1], vm.devices[device], self.random.choice((0, 1, 0x100, self.any())))

    def events(self) -> None:
        vm = self.vm()
        kind = uapi.IOMMU_VEVENTQ_TYPE_ARM_SMMUV3
        depth = self.random.choice((1, 4, 64))
        vm.events.append(vm.iommufd.veventq_alloc(self.random.choice(vm.viommus), kind, depth)[1])

    def attach(self) -> None:
        vm, device = self.bound()
        device.attach(self.object(vm, vm.nested, vm.nested, vm.parents, vm.ioas), pasid=self.pasid())

    def detach(self) -> None:
        _, device = self.bound()
        if self.random.random() < 0.5:
            device.detach(pasid=self.pasid())

    def dirty(self) -> None:
        vm = self.vm()
        hwpt = self.random.choice(vm.parents)
        vm.iommufd.hwpt_set_dirty_tracking(hwpt, self.random.random() < 0.7)
        vm.iommufd.hwpt_get_dirty_bitmap(hwpt, 0, RAM, clear=self.random.random() < 0.5)

    def invalidate(self) -> None:
        vm = self.vm()
        if self.machine == "vtd":
            entries = [
                uapi.HwptVtdS1Invalidate(addr=self.any() & -4096, npages=self.any(), flags=flags)
                for flags in self.random.choices((0, 1, 2), (2, 1, 1), k=self.random.randrange(4))
            ]
            vm.iommufd.hwpt_invalidate(self.random.choice(vm.nested), entries)
            return
        ops = (0x01, 0x03, 0x04, 0x05, 0x06, 0x10, 0x11, 0x12, 0x13, 0x20, 0x28, 0x2A, 0x30, 0x40, 0x44, 0x46)
        data = b"".join(
            struct.pack("<QQ", self.random.choice(ops) | self.random.getrandbits(56) << 8, self.any())
            for _ in range(self.random.randrange(4))
        )
        kind = uapi.IOMMU_VIOMMU_INVALIDATE_DATA_ARM_SMMUV3
        vm.iommufd.hwpt_invalidate(self.object(vm, vm.viommus), data, data_type=kind, entry_len=16)

    # ---- page faults ----

    def faults(self) -> None:
        vm = self.vm()
        vm.faults.append(vm.iommufd.fault_queue_alloc())

    def answer(self) -> None:
        vm = self.vm()
        file = self.random.choice([*(file for _, file in vm.faults), *vm.events])
        data = vm.iommufd.read(file, self.random.choice((0, 39, 40, 64, 4096)))
        for at in range(0, len(data) - 39, 40):
            fault = uapi.HwptPgfault.unpack(data, at)
            answer = uapi.HwptPageResponse(cookie=fault.cookie, code=self.random.choice((0, 0, 1, 2)))
            if self.random.random() < 0.8:
                vm.iommufd.write(file, answer.pack() * self.random.choice((1, 1, 2)))

    # ---- the admin socket ----

    def _admin(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(30)
        sock.connect(self.path + ".admin")
        if len(self.admins) > 12:  # of 16
            self.admins.pop(0).close()
        self.admins.append(sock)
        return sock

    def _send(self, *requests: admin.Request) -> socket.socket:
        """Nobody waits for the answer."""
        sock = self._admin()
        sock.sendall(b"".join(map(admin.encode, requests)))
        return sock

    def _instance(self) -> str:
        if self.random.random() < 0.1:
            return self.random.choice(("", "lab", "nobody"))
        return str(os.fstat(self.vm().iommufd.identity.fileno()).st_ino)

    def _iova(self) -> int:
        return self.random.choice((0, 0x1000, 0x3FF0, POOL, RAM - 8, self.any()))

    def dma(self) -> None:
        requests = []
        for _ in range(self.random.choice((1, 1, 3))):
            op = self.random.choice(("read", "write", "fill", "compare"))
            length = self.random.choice((0, 1, 8, 4096, 10_000, 1 << 20))
            data = b"" if op == "read" else self.garbage(64) if op == "fill" else self.garbage(length)
            requests.append(admin.Dma(
                self.random.choice(DEVICES), op, self._iova(), length, data, self._instance(),  # type: ignore[arg-type]
                self.random.choice((None, None, 0, 1, 2, 5, 1 << 20)), self.random.random() < 0.1,
                self.random.choice((None, 0.0, 0.01, 1e9)),
            ))  # fmt: skip
        sock = self._send(*requests)
        if self.random.random() < 0.3:
            sock.settimeout(0.05)
            assert sock.recv(1 << 16)

    def walk(self) -> None:
        sock = self._send(admin.Walk(self.random.choice(DEVICES), self._iova(), self._instance(), self.pasid()))
        line = sock.makefile("rb").readline()
        assert line
        reply = admin.decode_reply(line)
        assert not isinstance(reply, admin.Error) or reply.errno in (2, 22, 95), reply

    def look(self) -> None:
        requests = (admin.Show(), admin.Stats(), admin.Sanitize(settle=self.random.random() < 0.5))
        sock = self._send(self.random.choice(requests))
        line = sock.makefile("rb").readline()
        assert line
        assert not isinstance(admin.decode_reply(line), admin.Error)

    def trace(self) -> None:
        """A reader that does not read."""
        self._send(admin.Trace(only=["ioctl", "dma", "fault", "object"]))

    def hang_up(self) -> None:
        sock = self.random.choice(self.admins)
        self.admins.remove(sock)
        if self.random.random() < 0.3:
            sock.shutdown(socket.SHUT_WR)
            self.admins.append(sock)
        else:
            sock.close()
