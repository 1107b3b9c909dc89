"""The object table: ids, two-step birth, tombstones, and the order of the end (main.c, upper half)."""

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

import iommufd_uapi.iommufd as uapi
from iommufd_uapi.events import Dma, Event
from iommufdd.context import Context
from iommufdd.errors import EBUSY, ENOENT, ENOMEM
from iommufdd.objects import MAX_ID, Holder, IommufdObject, ObjectTable, ObjectType
from iommufdd.user import Events, FaultGate, Gate
from iommufdd.wiring import new_machine

from .harness import NEST_PARENT, Client
from .invariants import check
from .snapshot import difference, state


class Thing(IommufdObject):
    type = ObjectType.SELFTEST

    def __init__(self, log: list[str]) -> None:
        super().__init__()
        self.log = log

    def destroy(self) -> None:
        self.log.append(f"destroy {self.id}")
        super().destroy()


class Recorder:
    """A listener of the event port."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def enter(self, ictx: object, caller: object, cmd: int, uptr: int) -> object:
        return cmd

    def ioctl(self, ictx: object, caller: object, cmd: int, uptr: int, rc: int, entered: object) -> None:
        assert entered == cmd
        self.seen.append(f"ioctl {rc}")

    def transfer(
        self, eventq: object, verb: str, caller: object, addr: int, count: int, rc: int, entered: object
    ) -> None:
        self.seen.append(f"{verb} {eventq} {count} = {rc}")

    def object(self, ictx: object, verb: str, obj: object) -> None:
        self.seen.append(f"{verb} {obj}")

    def hardware(self, port: Events, event: Event) -> None:
        self.seen.append(f"{port.machine}: {event}")


def table(listener: Recorder | None = None) -> tuple[ObjectTable, list[str]]:
    context = Context(new_machine("test"))
    if listener is not None:
        context.events.add(listener)
    return ObjectTable(context, context.events), []


def born(objects: ObjectTable, log: list[str]) -> Thing:
    thing = objects.alloc(Thing(log), FaultGate())
    objects.finalize(thing)
    return thing


@given(st.lists(st.integers(0, 5)))
def test_the_lowest_free_id_is_given_out(steps: list[int]) -> None:
    objects, log = table()
    taken: set[int] = set()
    for step in steps:
        if step and step in taken:
            objects.remove(step)
            taken.discard(step)
        else:
            expected = min(set(range(1, 50)) - taken)
            assert born(objects, log).id == expected
            taken.add(expected)
    assert {obj.id for obj in objects} == taken


def test_what_is_being_born_cannot_be_seen_but_has_its_id() -> None:
    objects, log = table()
    unborn = objects.alloc(Thing(log), FaultGate())
    assert objects.get(unborn.id) is None
    with pytest.raises(ENOENT):
        objects.remove(unborn.id)
    assert born(objects, log).id == 2
    assert len(objects) == 2
    objects.abort(unborn)
    assert log == ["destroy 1"]
    assert born(objects, log).id == 1


def test_ids_end() -> None:
    objects, log = table()
    objects._next = MAX_ID
    assert born(objects, log).id == MAX_ID
    with pytest.raises(ENOMEM):
        objects.alloc(Thing(log), FaultGate())
    objects.remove(MAX_ID)
    assert born(objects, log).id == MAX_ID


def test_a_failed_gate_takes_no_id() -> None:
    objects, log = table()
    gate = FaultGate()
    gate.arm(1)
    with pytest.raises(ENOMEM):
        objects.alloc(Thing(log), gate)
    assert gate.fired is Gate.OBJECT
    assert born(objects, log).id == 1


def test_users_are_the_edges_that_end_at_an_object() -> None:
    objects, log = table()
    ground, one = born(objects, log), born(objects, log)
    other = Holder()
    assert one.hold(ground) is ground
    other.hold(ground)
    other.hold(ground)
    assert ground.users == 3
    other.let_go(ground)
    with pytest.raises(EBUSY, match="Holder, selftest 2"):
        objects.remove(ground.id)
    other.let_go_all()
    objects.remove(one.id)
    assert ground.users == 0
    objects.remove(ground.id)
    assert log == ["destroy 2", "destroy 1"]


def test_a_tombstone_is_absent_and_keeps_its_id() -> None:
    objects, log = table()
    thing = born(objects, log)
    objects.tombstone_user(thing)
    assert log == ["destroy 1"]
    assert objects.get(1) is None
    with pytest.raises(ENOENT):
        objects.remove(1)
    assert born(objects, log).id == 2
    objects.destroy_all()
    assert not len(objects)


def test_close_destroys_leaves_first() -> None:
    objects, log = table()
    one, two, three, four = (born(objects, log) for _ in range(4))
    one.hold(two)
    two.hold(three)
    four.hold(three)
    objects.destroy_all()
    # In passes by id: 1 frees 2 in the same pass, 3 waits for 4.
    assert log == ["destroy 1", "destroy 2", "destroy 4", "destroy 3"]


def test_close_gives_up_on_what_something_outside_holds() -> None:
    objects, log = table()
    kept = born(objects, log)
    born(objects, log)
    Holder().hold(kept)
    objects.destroy_all()
    assert log == ["destroy 2"]


def test_birth_and_end_are_told_to_the_event_port() -> None:
    events = Recorder()
    objects, log = table(events)
    objects.abort(objects.alloc(Thing(log), FaultGate()))
    born(objects, log)
    objects.remove(1)
    born(objects, log)
    objects.tombstone_user(next(iter(objects)))
    assert events.seen == ["alloc selftest 1", "destroy selftest 1"] * 2


def test_an_ioctl_is_told_with_its_answer() -> None:
    events = Recorder()
    c = Client()
    port = c.ictx.machine.events
    assert not port.listening
    port.add(events)
    c.ioas_alloc()
    c.destroy(7, errno.ENOENT)
    assert events.seen == ["alloc ioas 1", "ioctl 0", f"ioctl {-errno.ENOENT}"]
    port.remove(events)
    c.ioas_alloc()
    assert len(events.seen) == 3
    assert not port.listening


def test_several_listen_to_the_hardware() -> None:
    port = Events("lab")
    first, second = Recorder(), Recorder()
    port.add(first)
    port.add(second)
    event = Dma("vfio0", 0, 0x1000, 4, "read")
    port.hardware(event)
    port.remove(first)
    assert port.listening
    port.hardware(event)
    assert event.machine == "lab"
    assert (len(first.seen), len(second.seen)) == (1, 2)


# ---- by ioctl ----


def test_destroy_names_who_is_in_the_way() -> None:
    c = Client()
    ioas = c.ioas_alloc()
    mock = c.mock_domain(ioas)
    c.destroy(ioas, errno.EBUSY)
    assert c.caller.error is not None
    assert "hwpt_paging" in c.caller.error.reason
    c.destroy(mock.hwpt, errno.EBUSY)
    assert c.caller.error is not None
    assert "the attachment of device" in c.caller.error.reason
    c.destroy(mock.idev, errno.EBUSY)
    for nothing in (0, 99, 2**32 - 1):
        c.destroy(nothing, errno.ENOENT)


def test_a_reply_that_cannot_be_written_gives_the_id_back() -> None:
    c = Client()
    addr = c.process.buffer(1)
    c.mm.write(addr, uapi.IoasAlloc().pack())
    c.mm.protect(addr, addr + 4096, readable=True, writable=False)
    before = state(c.world)
    assert c.rc(uapi.IoasAlloc.CMD, addr) == -errno.EFAULT
    assert not difference(before, state(c.world))
    assert c.ioas_alloc() == 1


def test_the_context_lives_as_long_as_what_it_gave_out() -> None:
    """An event queue's file, an access, and a mapping each keep it, closed or not."""
    c = Client()
    ioas = c.ioas_alloc()
    mock = c.mock_domain(ioas)
    _, queue = c.fault_queue()
    access = c.access(ioas)
    c.viommu(mock.idev, c.hwpt(mock.idev, ioas, NEST_PARENT), in_data=1)
    vma = c.mmap(4096, 8192)
    c.close()
    assert len(c.ictx.objects) == 8
    check(c.world)
    c.fds.close(access)
    c.munmap(vma)
    assert len(c.ictx.objects) == 7
    c.fds.close(queue)
    assert not len(c.ictx.objects)
