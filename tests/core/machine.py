"""Base of the state machine: how a rule picks its arguments, makes a call, and what is checked after every one.

A call that fails must leave everything as it was, injected fault or not; `unless` names the kernel function because of
which it need not.
"""

from __future__ import annotations

import functools
from random import Random
from typing import TYPE_CHECKING

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant

import iommufd_uapi.iommufd_test as test_uapi
from iommufdd.errors import IommufdError
from iommufdd.ioas import Ioas
from iommufdd.user import PAGE_SIZE, File, Gate

from . import invariants
from .harness import APERTURE, ARGUMENT, OPS, Client, Process, World
from .snapshot import difference, state

if TYPE_CHECKING:
    from collections.abc import Callable

    from iommufd_uapi.layout import Ioctl, Layout
    from iommufdd.objects import IommufdObject

    from .snapshot import State

number = st.integers(0, 31)
flag = st.booleans()
fault = st.just(0) | st.integers(0, 9)  # the acquisition that fails, 0 none
length = st.sampled_from([PAGE_SIZE, 2 * PAGE_SIZE, PAGE_SIZE // 2, 3 * PAGE_SIZE, 8 * PAGE_SIZE, 4 * PAGE_SIZE + 1, 0])
offset = st.integers(0, 24).map(lambda n: n * PAGE_SIZE // 2)
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

    # ---- picking ----

    def client(self, who: int) -> Client:
        return self.clients[who % len(self.clients)]

    def pick(self, client: Client, kind: type[IommufdObject] | tuple[type[IommufdObject], ...], n: int) -> int:
        """The id of an object of this kind; now and then any other id."""
        ids = [obj.id for obj in client.ictx.objects if isinstance(obj, kind)]
        return ids[n % len(ids)] if ids and n % 8 != 7 else n // 4

    def pick_fd(self, client: Client, kind: type[File], n: int) -> int:
        """A descriptor of a file of this kind; now and then any other number."""
        fds = [fd for fd, file in client.fds.files.items() if isinstance(file, kind)]
        return fds[n % len(fds)] if fds and n % 8 != 7 else n

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
        ends = [functools.partial(self.clients[0].munmap, vma) for vma in self.world.vmas]
        ends += [functools.partial(process.fds.close, fd) for process in self.world.processes for fd in process.fds.files]
        order.shuffle(ends)
        for end in ends:
            end()
            invariants.check(self.world)
        living = [process.mm for process in self.world.processes if process.mm.alive]
        assert all(mm.pinned_vm == mm.locked_vm == 0 for mm in living)
        for process in self.world.processes:
            process.exit()
        invariants.check_empty(self.world)


RESPOND = "iommufd_ucmd_respond() comes after the change"
