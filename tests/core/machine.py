"""Base of the state machine: how a rule picks its arguments, makes a call, and what is checked after every one.

A call that fails must leave everything as it was, injected fault or not; `unless` names the kernel function because of
which it need not.
"""

from __future__ import annotations

import functools
from random import Random
from typing import TYPE_CHECKING

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant

import iommufd_uapi.iommufd as uapi
import iommufd_uapi.iommufd_test as test_uapi
from iommufdd.errors import IommufdError
from iommufdd.ioas import Ioas
from iommufdd.user import PAGE_SIZE, File, Gate

from . import invariants
from .harness import APERTURE, ARGUMENT, DIRTY, FAULT, NEST_PARENT, OPS, PASID, Client, Process, World
from .snapshot import difference, state

if TYPE_CHECKING:
    from collections.abc import Callable

    from iommufd_uapi.layout import Ioctl, Layout
    from iommufdd.objects import IommufdObject

    from .snapshot import State

number = st.integers(0, 31)
flag = st.booleans()
fault = st.sampled_from([0] * 20 + list(range(1, 11)))  # the acquisition that fails, 0 none
length = st.sampled_from([n * PAGE_SIZE for n in (1, 1, 2, 2, 3, 4, 4, 8)] + [PAGE_SIZE // 2, 4 * PAGE_SIZE + 1, 0])
offset = st.integers(0, 12).map(lambda n: n * PAGE_SIZE) | st.integers(0, 12).map(lambda n: n * PAGE_SIZE // 2)
bits = st.integers(0, 7)


class CoreMachine(RuleBasedStateMachine):
    """Two contexts on one machine; `who` in a rule picks a process and the context it calls."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        first = self.world.process()
        second = self.world.process(uid=1000, privileged=False, memlock=12 * PAGE_SIZE)
        self.memfds = [self.world.memfd(12), self.world.memfd(6)]
        self.clients: list[Client] = []
        self.calls = 0
        for process in (first, second):
            for at, file in enumerate(self.memfds):
                process.map(file, writable=not at)
                process.install(file)
            self.open(process)

    def open(self, process: Process, *, container: bool = False) -> None:
        self.clients.append(Client(process, container=container))

    @initialize(start=st.sampled_from(["bare", "device", "hwpt", "viommu", "viommu"]), mapped=flag)
    def furnish(self, start: str, mapped: bool) -> None:
        """A start with something to work on, so that not every example has to get there by itself."""
        for client in self.clients:
            ioas = client.ioas_alloc()
            client.vfio_ioas(uapi.IOMMU_VFIO_IOAS_SET, ioas)
            if mapped:
                client.map(ioas, self.addr(0), 4 * PAGE_SIZE, APERTURE)
                client.access(ioas)
            if start == "bare":
                continue
            mock = client.mock_domain(ioas, test_uapi.MOCK_FLAGS_DEVICE_PASID)
            if start == "device":
                continue
            fault_id, _ = client.fault_queue()
            client.replace(mock.stdev, client.hwpt(mock.idev, ioas, PASID | FAULT | DIRTY, fault=fault_id))
            parent = client.hwpt(mock.idev, ioas, NEST_PARENT | PASID)
            if start == "viommu":
                viommu = client.viommu(mock.idev, parent, in_data=1)
                client.vdevice(viommu, mock.idev, 1)
                client.nested(mock.idev, viommu)
                client.veventq(viommu, 2)

    # ---- picking ----

    def client(self, who: int) -> Client:
        return self.clients[who % len(self.clients)]

    def pick(
        self, client: Client, kind: type[IommufdObject] | tuple[type[IommufdObject], ...], n: int, having: str = ""
    ) -> int:
        """The id of an object of this kind, that has this attribute; now and then any other id."""
        ids = [obj.id for obj in client.ictx.objects if isinstance(obj, kind) and (not having or getattr(obj, having))]
        return ids[n % len(ids)] if ids and n % 8 != 7 else n // 4

    def pick_fd(self, client: Client, kind: type[File] | tuple[type[File], ...], n: int) -> int:
        """A descriptor of a file of this kind; now and then any other number."""
        fds = [fd for fd, file in client.fds.files.items() if isinstance(file, kind)]
        return fds[n % len(fds)] if fds and n % 8 != 7 else n

    def any_id(self, client: Client, n: int) -> int:
        """The id of any object; now and then one that is free."""
        ids = [*(obj.id for obj in client.ictx.objects), n]
        return ids[n % len(ids)]

    def addr(self, at: int) -> int:
        """An address near the start of a mapping: within it, or in the hole behind it."""
        return 0x10000000 + at

    def pick_iova(self, client: Client, ioas_id: int, at: int) -> int:
        """The start of an area, or an IOVA that may lie anywhere."""
        ioas = client.ictx.objects.get(ioas_id)
        areas = list(ioas.iopt.areas) if isinstance(ioas, Ioas) else []
        if areas and at % 4:
            return areas[at // 4 % len(areas)].iova
        return APERTURE + at

    # ---- calling ----

    def call(self, client: Client, arg: Ioctl, nth: int, unless: str = "", new: str = "") -> bool:
        """An ioctl; whether it succeeded. `new` names the field of a new object's id."""
        client.mm.write(ARGUMENT, arg.pack())
        before = self.system_call(client, lambda: client.rc(arg.CMD, ARGUMENT), nth, unless)
        if before is None:
            return False
        arg.update(client.mm.read(ARGUMENT, arg.SIZEOF))
        if new:
            ctx = before[f"ctx{self.world.contexts.index(client.ictx)}"]
            assert getattr(arg, new) == ctx["next id"], "not the lowest free id"
        return True

    def test(self, client: Client, op: Layout, nth: int, unless: str = "", *, id: int = 0) -> bool:
        cmd = test_uapi.TestCmd(op=OPS[type(op)], id=id, u=op.pack())
        done = self.call(client, cmd, nth, unless)
        op.update(cmd.u)
        return done

    def system_call(self, client: Client, call: Callable[[], int], nth: int, unless: str = "") -> State | None:
        """The state before a call that succeeds, None when it failed; then nothing has changed."""
        self.calls += 1
        before = state(self.world)
        client.gate.arm(nth)
        try:
            rc = call()
        except IommufdError as error:
            rc = -error.errno
        fired = client.gate.fired
        client.gate.arm(0)
        if rc >= 0:
            return before
        if unless and (unless != RESPOND or fired is Gate.COPY_OUT):
            return None
        changes = difference(before, state(self.world))
        assert not changes, f"{client.caller.error!r} left {changes}"
        return None

    # ---- checking ----

    @invariant()
    def agrees(self) -> None:
        invariants.check(self.world)

    def teardown(self) -> None:
        """Close everything, in an order that differs from run to run."""
        order = Random(self.calls)
        processes = self.world.processes
        ends = [functools.partial(self.clients[0].munmap, vma) for vma in self.world.vmas]
        ends += [functools.partial(process.fds.close, fd) for process in processes for fd in process.fds.files]
        order.shuffle(ends)
        for end in ends:
            end()
            invariants.check(self.world)
        living = [process.mm for process in self.world.processes if process.mm.alive]
        assert self.world.lost_count or all(mm.pinned_vm == mm.locked_vm == 0 for mm in living)
        for process in self.world.processes:
            process.exit()
        invariants.check_empty(self.world)


RESPOND = "iommufd_ucmd_respond() comes after the change"
