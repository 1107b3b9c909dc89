"""The trace: every call in a line, readers that are slow, stopped or gone, and nothing at all when nobody reads."""

from __future__ import annotations

import errno
import os
import re
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from iommufd_uapi import admin, decode, events, iommufd, iommufd_test, wire
from iommufdd.errors import EMFILE
from iommufdd.machine_file import Machines
from iommufdd.server import trace
from iommufdd.server.instance import Instances
from iommufdd.server.nofile import Nofile
from iommufdd.wiring import new_machine
from tests.core import scenarios_selftest
from tests.core.harness import Client
from tests.core.scenarios import SCENARIOS
from tests.server.conftest import Daemon, Local, eventually
from tests.server.peer import Segment, ioctl, request, selftest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


assert scenarios_selftest  # registers the selftest's

SNAPSHOT = Path(__file__).with_name("traced.txt")


class Kept:
    """A reader that keeps all."""

    uid = 0

    def __init__(self) -> None:
        self.events: list[events.Event] = []
        self.ending = False

    def wants(self, event: events.Event, source: object) -> bool:
        return events.Filter()(event)

    def put(self, event: events.Event) -> None:
        self.events.append(event)


def traced(c: Client) -> tuple[trace.Trace, Kept]:
    """All that happens on a client's machine from now on."""
    instances, kept = Instances(new_machine, Machines(), Nofile(1024)), Kept()
    instances._built.add(c.world.machine)
    follower = trace.Trace(instances)
    follower.add(cast("trace.Reader", kept))
    return follower, kept


def masked(line: str) -> str:
    """Without times and without who called."""
    return re.sub(r"<[\d.]+>$", "<T>", re.sub(r"^[\d.]+ (- |\d+ \(.*?\) )(\[test\] )?", "", line))


def lines_of_the_scenarios() -> Iterator[str]:
    for name, make in SCENARIOS.items():
        c = Client()
        call = make(c)
        follower, kept = traced(c)
        rc = call()
        follower.remove(cast("trace.Reader", kept))
        assert not c.ictx.events.listening
        yield f"{name}:"
        for event in kept.events:
            yield "  " + masked(events.line(event, event.time))
        assert rc >= 0


def test_every_call_as_a_line() -> None:
    """Every row of the table and every operation of the selftest. To renew: write what is made, and read the diff."""
    made = "\n".join(lines_of_the_scenarios()) + "\n"
    if os.environ.get("RENEW_SNAPSHOT"):
        SNAPSHOT.write_text(made)
    assert made == SNAPSHOT.read_text()


def test_a_failure_has_errno_and_reason() -> None:
    c = Client()
    ioas = c.ioas_alloc()
    _, kept = traced(c)
    c.destroy(7, errno.ENOENT)
    c.ioctl(iommufd.IoasUnmap(ioas_id=ioas, iova=0x1000, length=0x1000), errno.ENOENT)
    c.rc(iommufd.IoasAlloc.CMD, 0xDEAD0000)
    c.rc(0x3BFF, 5)
    assert [masked(events.line(each, each.time)) for each in kept.events] == [
        "IOMMU_DESTROY(iommufd:0, {id=7}) = -1 ENOENT (No such file or directory): there is no object 7 <T>",
        ("IOMMU_IOAS_UNMAP(iommufd:0, {ioas_id=ioas:1, iova=0x1000, length=0x1000})"
         " = -1 ENOENT (No such file or directory): nothing is mapped in 0x1000..0x1fff <T>"),
        ("IOMMU_IOAS_ALLOC(iommufd:0, {arg=0xdead0000})"
         " = -1 EFAULT (Bad address): memory at 0xdead0000 cannot be read <T>"),
        ("ioctl 0x3bff(iommufd:0, {arg=0x5})"
         " = -1 ENOTTY (Inappropriate ioctl for device): ioctl 0x3bff is not known <T>"),
    ]


def test_a_bug_of_the_trace_is_not_the_answer(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*args: object, **options: object) -> dict[str, str]:
        raise ZeroDivisionError

    monkeypatch.setattr(decode, "arguments", broken)
    monkeypatch.setattr(decode, "written", broken)
    c = Client()
    _, kept = traced(c)
    assert c.ioas_alloc() == 1
    assert kept.events == []
    assert len([record for record in caplog.records if record.exc_info]) == 2


# ---- readers -----------------------------------------------------------------------------------------------


class Follower:
    """One who follows a server in this process, through a socket."""

    def __init__(self, local: Local, uid: int = 0, **chosen: Any) -> None:
        self.local = local
        self.sock, theirs = socket.socketpair()
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        self.sock.setblocking(False)
        wanted = events.Filter(**chosen)
        try:
            self.reader = trace.Reader(
                local.server.trace, local.server.reactor, theirs, lambda event, _: wanted(event), admin.encode,
                uid=uid,
            )  # fmt: skip
        except BaseException:
            self.sock.close()
            theirs.close()
            raise

    def read(self) -> list[events.AnyEvent]:
        """All that is to come."""
        data = b""
        while True:
            self.local.pump()
            try:
                part = self.sock.recv(1 << 16)
            except BlockingIOError:
                break
            if not part:
                break
            data += part
        return [admin.decode_event(line) for line in data.splitlines()]

    def close(self) -> None:
        self.sock.close()
        self.local.pump()


@pytest.fixture
def follow(local: Local) -> Iterator[Callable[..., Follower]]:
    made: list[Follower] = []

    def one(**chosen: Any) -> Follower:
        made.append(Follower(local, **chosen))
        return made[-1]

    yield one
    for each in made:
        each.close()
    assert local.server.trace.readers == []
    assert local.server.instances._listener is None


def names(found: list[events.AnyEvent]) -> list[str]:
    return [event.name if isinstance(event, events.Ioctl) else type(event).__name__ for event in found]


def test_machines_that_are_there_and_those_to_come(local: Local, follow: Callable[..., Follower]) -> None:
    before = local.connect(machine=b"old")
    follower = follow()
    after = local.connect(machine=b"new")
    before.ioas()
    after.ioas()
    first, second = follower.read()
    assert (first.machine, second.machine) == ("old", "new")
    assert first.pid == os.getpid()
    assert first.comm == Path("/proc/self/comm").read_text().strip()
    assert isinstance(first, events.Ioctl)
    assert first.context == os.fstat(before.identity).st_ino
    assert (first.fields, first.back) == ({"flags": "0"}, {"out_ioas_id": "ioas:1"})
    follower.close()
    assert not any(instance.machine.events.listening for instance in local.server.instances)


def test_filters(local: Local, follow: Callable[..., Follower]) -> None:
    peer = local.connect(machine=b"lab")
    every = follow()
    failed, other = follow(failed=True), follow(pids=frozenset([1]))
    objects, elsewhere = follow(only=frozenset(["object"])), follow(machine="attic")
    ioas = peer.ioas()
    assert peer.one(ioctl(iommufd.Destroy(id=9))).result == -errno.ENOENT
    assert peer.one(ioctl(iommufd.Destroy(id=ioas))).result == 0
    assert names(every.read()) == ["IOMMU_IOAS_ALLOC", "IOMMU_DESTROY", "IOMMU_DESTROY"]
    (only,) = failed.read()
    assert isinstance(only, events.Ioctl)
    assert (only.result, only.reason) == (-errno.ENOENT, "there is no object 9")
    assert [(each.verb, each.object) for each in objects.read() if isinstance(each, events.Object)] == [
        ("alloc", "ioas:1"),
        ("destroy", "ioas:1"),
    ]
    assert other.read() == elsewhere.read() == []


def test_hardware_tells_of_itself(local: Local, follow: Callable[..., Follower]) -> None:
    local.connect(machine=b"lab")
    (instance,) = local.server.instances
    every, dma, failed = follow(), follow(only=frozenset(["dma"])), follow(failed=True)
    told = [
        events.Dma("vfio0", None, 0x1000, 0x200, "read"),
        events.Dma("vfio0", 5, 0x1000, 0, "write", "fault"),
        events.Fault("vfio0", 5, 0x1000, "write", 0x78, "not present"),
        events.PageRequest("vfio0", 5, 0x1000, "read", 3),
        events.PageResponse("vfio0", 5, 3, "INVALID"),
        events.Invalidate("vtd0", "IOTLB", "page", "did 3", 0x1000, 0x1FFF, leaf=True, dropped=2),
        events.Invalidate("vtd0", "IOTLB", "domain", "did 3", tables=4),
        events.Replace("vfio0", 0, "", "hwpt_paging:4"),
        events.Replace("vfio0", 0, "hwpt_paging:4", "hwpt_nested:5", "window", "P cleared"),
        events.Misread("hwpt_kvm:2", 0xFEB00000, 1, 6, "a mark"),
    ]
    for event in told:
        instance.machine.events.hardware(event)
    found = every.read()
    assert found == told
    assert [masked(events.line(each, each.time)) for each in found] == [
        "[lab] dma vfio0 read 0x1000+0x200 = done",
        "[lab] dma vfio0 pasid 5 write 0x1000+0x0 = fault",
        "[lab] fault vfio0 pasid 5 write iova 0x1000: 0x78 not present",
        "[lab] page request vfio0 pasid 5 read 0x1000 (group 3)",
        "[lab] page response vfio0 pasid 5 (group 3) = INVALID",
        "[lab] invalidate vtd0 IOTLB page (did 3) 0x1000..0x1fff leaf: dropped 2",
        "[lab] invalidate vtd0 IOTLB domain (did 3): dropped 0, tables 4",
        "[lab] replace vfio0 pasid 0 nothing -> hwpt_paging:4",
        "[lab] replace vfio0 pasid 0 hwpt_paging:4 -> hwpt_nested:5: window: P cleared opens it",
        "[lab] misread hwpt_kvm:2 level 1 0xfeb00000: 0x0000000000000006: a mark",
    ]
    assert dma.read() == told[:2]
    assert failed.read() == [told[1], told[2], told[4], told[-1]]


def test_a_reader_that_has_stopped_holds_nobody_up(local: Local, follow: Callable[..., Follower]) -> None:
    peer = local.connect()
    stopped = follow()
    count = 2 * trace.RING
    batch = [ioctl(iommufd.Destroy(id=9))] * 512
    for _ in range(count // len(batch)):
        assert {reply.result for reply in peer.call(*batch)} == {-errno.ENOENT}
    assert len(stopped.reader._ring) == trace.RING
    assert len(stopped.reader._unsent) < 1 << 16
    found = stopped.read()
    assert isinstance(found[-1], events.Lost)
    assert sum(each.count if isinstance(each, events.Lost) else 1 for each in found) == count
    assert events.line(found[-1], found[-1].time) == f"0.000000 - ... {found[-1].count} events lost"
    peer.ioas()
    assert names(stopped.read()) == ["IOMMU_IOAS_ALLOC"]


def test_what_was_lost_is_told_where_it_is_missing(local: Local, follow: Callable[..., Follower]) -> None:
    slow = follow()
    for at in range(trace.RING + 3):
        slow.reader.put(events.Dma("vfio0", 0, at, 1, "read"))
    slow.reader._ring.popleft()
    slow.reader.put(events.Dma("vfio0", 0, 0xFFFF, 1, "read"))
    assert slow.read()[-2:] == [events.Lost(count=3), events.Dma("vfio0", 0, 0xFFFF, 1, "read")]


def test_a_reader_that_has_gone_is_forgotten(local: Local, follow: Callable[..., Follower]) -> None:
    peer = local.connect()
    gone, stays = follow(), follow()
    gone.sock.close()
    peer.ioas()
    local.pump()
    assert local.server.trace.readers == [stays.reader]
    assert len(stays.read()) == 1


def test_the_end_comes_when_all_is_read(local: Local, follow: Callable[..., Follower]) -> None:
    peer = local.connect()
    follower = follow()
    for _ in range(100):
        peer.ioas()
    follower.reader.end()
    assert local.server.trace.readers
    assert len(follower.read()) == 100
    assert local.server.trace.readers == []


def test_reads_and_writes_of_a_queue(local: Local, follow: Callable[..., Follower]) -> None:
    follower = follow()
    peer = local.connect()
    ioas = peer.ioas()
    reply = peer.one(ioctl(iommufd.FaultAlloc()))
    (fd,) = peer.fds
    fault = iommufd.FaultAlloc.unpack(reply.struct()).out_fault_id
    mock = iommufd_test.MockDomainFlags()
    device = peer.one(ioctl(selftest(iommufd_test.IOMMU_TEST_OP_MOCK_DOMAIN_FLAGS, ioas, mock)))
    made = iommufd_test.MockDomainFlags.unpack(iommufd_test.TestCmd.unpack(device.struct()).u)
    flags = iommufd.IOMMU_HWPT_FAULT_ID_VALID
    alloc = iommufd.HwptAlloc(flags=flags, dev_id=made.out_idev_id, pt_id=ioas, fault_id=fault)
    hwpt = iommufd.HwptAlloc.unpack(peer.one(ioctl(alloc)).struct()).out_hwpt_id
    replace = iommufd_test.MockDomainReplace(pt_id=hwpt)
    op = iommufd_test.IOMMU_TEST_OP_MOCK_DOMAIN_REPLACE
    assert peer.one(ioctl(selftest(op, made.out_stdev_id, replace))).result == 0
    iopf = iommufd_test.TriggerIopf(dev_id=made.out_idev_id, grpid=7, perm=3, addr=0x1000)
    assert peer.one(ioctl(selftest(iommufd_test.IOMMU_TEST_OP_TRIGGER_IOPF, 0, iopf))).result == 0
    follower.read()
    buffer = Segment(0x5000, writable=400)
    assert peer.one(request(wire.Op.READ, 0, [buffer], 400), [fd]).result == 40
    answer = Segment(0x5000, iommufd.HwptPageResponse(cookie=1).pack())
    assert peer.one(request(wire.Op.WRITE, 0, [answer], 8), [fd]).result == 8
    assert peer.one(request(wire.Op.WRITE, 0, [answer], 8), [fd]).result == -errno.EINVAL
    assert peer.one(request(wire.Op.READ, 0, [buffer], 41), [fd]).result == -errno.ESPIPE
    found = follower.read()
    assert [masked(events.line(each, each.time)) for each in found] == [
        (f"read(fault:{fault}, 400) = 40 [{{flags=IOMMU_PGFAULT_FLAGS_LAST_PAGE, dev_id=device:{made.out_idev_id}, "
         "pasid=0, grpid=7, perm=IOMMU_PGFAULT_PERM_READ|IOMMU_PGFAULT_PERM_WRITE, addr=0x1000, length=0x0, "
         "cookie=1}] <T>"),
        f"write(fault:{fault}, [{{cookie=1, code=IOMMUFD_PAGE_RESP_SUCCESS}}], 8) = 8 <T>",
        (f"write(fault:{fault}, [{{cookie=1, code=IOMMUFD_PAGE_RESP_SUCCESS}}], 8) = -1 EINVAL (Invalid argument):"
         " cookie 1 is not waiting for a response <T>"),
        f"read(fault:{fault}, 41) = -1 ESPIPE (Illegal seek): a count of 41 is no multiple of 40 <T>",
    ]
    os.close(fd)


# ---- the admin socket --------------------------------------------------------------------------------------


def start(client: Any, request: admin.Request) -> admin.AnyReply:
    reply: admin.AnyReply = client.ask(request)
    return reply


def test_over_the_socket(daemon: Daemon) -> None:
    with daemon.admin() as first, daemon.admin() as other:
        assert isinstance(start(first, admin.Trace()), admin.Tracing)
        peer = daemon.connect()
        peer.ioas()
        event = admin.decode_event(first.file.readline())
        assert isinstance(event, events.Ioctl)
        assert event.name == "IOMMU_IOAS_ALLOC"
        refused = start(other, admin.Trace(only=["weather"]))
        assert isinstance(refused, admin.Error)
        assert refused.errno == errno.EINVAL
        assert "'weather' is not one of ioctl, queue" in refused.reason


def test_many_readers(daemon: Daemon) -> None:
    followers = [daemon.admin() for _ in range(trace.MAX_READERS)]
    for follower in followers:
        assert isinstance(start(follower, admin.Trace()), admin.Tracing)
    with daemon.admin() as more:
        refused = start(more, admin.Trace())
        assert isinstance(refused, admin.Error)
        assert refused.errno == errno.EMFILE
        followers.pop().close()
        eventually(lambda: isinstance(start(more, admin.Trace()), admin.Tracing))
    for follower in followers:
        follower.close()


def test_a_daemon_ends_though_somebody_follows(daemon: Daemon) -> None:
    with daemon.admin() as follower:
        assert isinstance(start(follower, admin.Trace()), admin.Tracing)
        daemon.connect().ioas()
        assert daemon.stop() == 0
        assert len(follower.file.read().splitlines()) <= 1


def test_readers_of_one_uid_leave_room_for_those_of_another(local: Local) -> None:
    before = local.server.nofile.total
    followers = [Follower(local, uid=7) for _ in range(trace.MAX_READERS)]
    with pytest.raises(EMFILE, match="8 readers of uid 7"):
        Follower(local, uid=7)
    followers.append(Follower(local, uid=8))
    assert local.server.nofile.total == before + len(followers)
    for follower in followers:
        follower.reader.close()
        follower.sock.close()
    assert local.server.nofile.total == before


def test_the_end_of_what_nobody_reads_any_more(local: Local) -> None:
    """A keeper that was killed: its socket goes first, then its processes."""
    follower = Follower(local)
    follower.sock.close()
    local.pump()
    assert not local.server.trace.readers
    follower.reader.end()
    assert not follower.reader.ending  # --terminate does not wait for it


def test_a_reader_that_cannot_be_watched_is_none(local: Local, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise OSError(errno.ENOSPC, "fs.epoll.max_user_watches")

    with monkeypatch.context() as patched:
        patched.setattr(local.server.reactor, "register", refuse)
        with pytest.raises(OSError, match="max_user_watches"):
            Follower(local)
    assert not local.server.trace.readers
    assert local.server.nofile.total == 0


# ---- text --------------------------------------------------------------------------------------------------

TEXT = st.text(max_size=20)
RESULT = st.integers(-4095, 2**31 - 1)  # MAX_ERRNO
NUMBER = st.integers(0, 2**63 - 1)


@given(TEXT, TEXT, st.dictionaries(TEXT, TEXT, max_size=3), RESULT, NUMBER)
@example("a\nb", "\x1b[31m", {"x": "\x00"}, -22, 0)
def test_a_line_is_a_line(name: str, comm: str, fields: dict[str, str], result: int, time: int) -> None:
    event = events.Ioctl(
        context=1, name=name, cmd=1, fields=fields, result=result, back=fields, duration=5, reason=name,
        time=time, pid=5, comm=comm, machine=name,
    )  # fmt: skip
    assert events.line(event, 0).isprintable()
    assert admin.decode_event(admin.encode(event)) == event
