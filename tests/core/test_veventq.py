"""vEVENTQ against a list: sequence numbers, the marker of what was lost, whole records (eventq.c)."""

import errno

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

import iommufd_uapi.iommufd as uapi
import iommufd_uapi.iommufd_test as test_uapi
from iommufdd.user import PAGE_SIZE, File
from iommufdd.veventq import Veventq
from iommufdd.viommu import Viommu

from .harness import DATA, NEST_PARENT, NOWHERE, Client, Mock
from .invariants import check
from .snapshot import difference, state

LOST = uapi.IOMMU_VEVENTQ_FLAG_LOST_EVENTS
HEADER, RECORD = 8, 12
DEPTH = 3


def guest(depth: int = DEPTH, virt_id: int = 7) -> tuple[Client, Mock, int, int]:
    """A client, a device attached through a vIOMMU, the vIOMMU, and the descriptor of its queue."""
    c = Client()
    ioas = c.ioas_alloc()
    mock = c.mock_domain(ioas)
    viommu = c.viommu(mock.idev, c.hwpt(mock.idev, ioas, NEST_PARENT))
    c.vdevice(viommu, mock.idev, virt_id)
    c.replace(mock.stdev, c.nested(mock.idev, viommu))
    return c, mock, viommu, c.veventq(viommu, depth)[1]


class Events(RuleBasedStateMachine):
    """Events come and are read; the sequence number counts the lost ones too."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.mock, _, self.fd = guest()
        self.queued: list[int] = []  # sequence numbers of events
        self.marker: int | None = None  # always last
        self.sequence = 0

    @rule(count=st.integers(1, 3))
    def report(self, count: int) -> None:
        for _ in range(count):
            self.c.test(test_uapi.TriggerVevent(self.mock.idev))
            self.marker = None
            if len(self.queued) == DEPTH:
                self.marker = self.sequence
            else:
                self.queued.append(self.sequence)
            self.sequence += 1

    @rule(count=st.integers(8, 60))
    def read(self, count: int) -> None:
        expected = b""
        items = [(0, sequence) for sequence in self.queued] + ([(LOST, self.marker)] if self.marker is not None else [])
        done = 0
        for flags, sequence in items:
            record = uapi.IommufdVeventHeader(flags, sequence).pack() + (b"" if flags else b"\7\0\0\0")
            if len(expected) + len(record) > count:
                break
            expected += record
            done += 1
        if items and not done:
            self.c.fails(lambda: self.c.read(self.fd, count), errno.EINVAL)
            return
        assert self.c.read(self.fd, count) == expected
        if done > len(self.queued):
            self.marker = None
        self.queued = self.queued[done:]

    @invariant()
    def poll_tells(self) -> None:
        assert bool(self.c.file(self.fd, File).poll()) == bool(self.queued or self.marker is not None)


TestEvents = Events.TestCase


def test_the_sequence_wraps_at_31_bits() -> None:
    c, mock, _, fd = guest()
    queue = next(obj for obj in c.ictx.objects if isinstance(obj, Veventq))
    queue.sequence = 0x7FFFFFFF
    for _ in range(2):
        c.test(test_uapi.TriggerVevent(mock.idev))
    data = c.read(fd, 2 * RECORD)
    assert [uapi.IommufdVeventHeader.unpack(data, at).sequence for at in (0, RECORD)] == [0x7FFFFFFF, 0]


def test_an_event_that_cannot_be_stored_stays() -> None:
    c, mock, _, fd = guest()
    for _ in range(2):
        c.test(test_uapi.TriggerVevent(mock.idev))
    before = state(c.world)
    c.fails(lambda: c.read(fd, RECORD, NOWHERE), errno.EFAULT)
    assert not difference(before, state(c.world))
    end = DATA + 15 * PAGE_SIZE
    assert c.file(fd, File).read(c.caller, end - RECORD - 4, 2 * RECORD) == RECORD
    assert uapi.IommufdVeventHeader.unpack(c.read(fd, 100)).sequence == 1


def test_one_queue_of_a_type_and_any_type() -> None:
    c, _, viommu, _ = guest()
    c.veventq(viommu, expect=errno.EEXIST)
    cmd = uapi.VeventqAlloc(viommu_id=viommu, type=99, veventq_depth=1 << 19)
    c.ioctl(cmd)
    cmd.veventq_depth += 1
    c.ioctl(cmd, errno.EINVAL)
    check(c.world)


def test_who_gets_an_event() -> None:
    c, mock, viommu, fd = guest()
    c.veventq(c.viommu(mock.idev, c.hwpt(mock.idev, c.ioas_alloc(), NEST_PARENT)))
    c.test(test_uapi.TriggerVevent(mock.idev))
    assert len(c.read(fd, 100)) == RECORD
    queue = next(obj for obj in c.ictx.objects if isinstance(obj, Veventq))
    c.fds.close(fd)
    c.test(test_uapi.TriggerVevent(mock.idev))  # the queue lives without its file
    c.destroy(queue.id)
    c.test(test_uapi.TriggerVevent(mock.idev), errno.EOPNOTSUPP)
    obj = c.ictx.objects.get(viommu)
    assert isinstance(obj, Viommu)
    assert not obj.veventqs


def test_the_virtual_id_is_that_of_the_attachment() -> None:
    """Read at attach: a vDEVICE that goes is still named, and one that comes is not."""
    c, mock, viommu, fd = guest()
    vdevice = next(obj for obj in c.ictx.objects if str(obj).startswith("vdevice"))
    c.destroy(vdevice.id)
    c.vdevice(viommu, mock.idev, 8)
    c.test(test_uapi.TriggerVevent(mock.idev))
    assert c.read(fd, RECORD)[HEADER:] == b"\7\0\0\0"
    c.replace(mock.stdev, c.nested(mock.idev, viommu))  # the same vIOMMU: not read again
    c.test(test_uapi.TriggerVevent(mock.idev))
    assert c.read(fd, RECORD)[HEADER:] == b"\7\0\0\0"
    c.replace(mock.stdev, c.ioas_alloc())
    c.replace(mock.stdev, c.nested(mock.idev, viommu))
    c.test(test_uapi.TriggerVevent(mock.idev))
    assert c.read(fd, RECORD)[HEADER:] == b"\x08\0\0\0"


@pytest.mark.parametrize("attached", [False, True])
def test_a_device_without_a_virtual_id(attached: bool) -> None:
    """quirk: 0 is none."""
    c, mock, _, _ = guest(virt_id=0 if attached else 7)
    if not attached:
        c.replace(mock.stdev, c.ioas_alloc())
    c.test(test_uapi.TriggerVevent(mock.idev), errno.ENOENT)


def test_no_number_for_the_file_undoes_the_queue() -> None:
    c, _, viommu, fd = guest()
    queue = next(obj for obj in c.ictx.objects if isinstance(obj, Veventq))
    c.fds.close(fd)
    c.destroy(queue.id)
    c.fds.room = 1
    before = state(c.world)
    c.veventq(viommu, expect=errno.EMFILE)
    assert not difference(before, state(c.world))


def test_what_cannot_be_written_or_read() -> None:
    c, _, _, fd = guest()
    c.fails(lambda: c.write(fd, bytes(8)), errno.EINVAL)
    c.fails(lambda: c.read(fd, HEADER - 1), errno.EINVAL)
    assert c.read(fd, HEADER) == b""


def test_an_event_shows_the_low_half_of_a_virtual_id() -> None:
    """quirk: the selftest's event has a __u32 for it."""
    c = Client()
    mock = c.mock_domain(c.ioas_alloc())
    parent = c.hwpt(mock.idev, c.ioas_alloc(), NEST_PARENT)
    viommu = c.viommu(mock.idev, parent)
    c.vdevice(viommu, mock.idev, 5 << 32 | 0x77)
    _, fd = c.veventq(viommu)
    c.replace(mock.stdev, c.nested(mock.idev, viommu))
    c.test(test_uapi.TriggerVevent(mock.idev))
    assert c.read(fd, 64)[8:12] == b"\x77\0\0\0"
