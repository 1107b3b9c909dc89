"""Fault queues: groups, cookies, and what becomes of requests whose attachment ends (eventq.c, io-pgfault.c)."""

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

import iommufd_uapi.iommufd as uapi
import iommufd_uapi.iommufd_test as test_uapi
from iommufdd.device import IommufdDevice
from iommufdd.eventq import EventqFile
from iommufdd.iommu.group import Fault as PageRequest
from iommufdd.iommu.group import Iopf
from iommufdd.iommu.mock import MockDevice
from iommufdd.user import PAGE_SIZE, File

from .harness import DATA, FAULT, NEST_PARENT, NOWHERE, PASID, PASID_DEVICE, Client
from .invariants import check
from .snapshot import difference, state

LAST, PASID_VALID = uapi.IOMMU_PGFAULT_FLAGS_LAST_PAGE, uapi.IOMMU_PGFAULT_FLAGS_PASID_VALID
RECORD = uapi.HwptPgfault.SIZEOF
IN, OUT = 0x41, 0x4


class Faulting:
    """A device behind a fault queue: it asks for pages, and the queue is read and answered."""

    def __init__(self) -> None:
        self.c = c = Client()
        self.ioas = c.ioas_alloc()
        self.mock = c.mock_domain(self.ioas, PASID_DEVICE)
        self.fault, self.fd = c.fault_queue()
        self.hwpt = c.hwpt(self.mock.idev, self.ioas, FAULT | PASID, fault=self.fault)
        c.replace(self.mock.stdev, self.hwpt)

    @property
    def iopf(self) -> Iopf:
        idev = self.c.ictx.objects.get(self.mock.idev)
        assert isinstance(idev, IommufdDevice)
        assert isinstance(idev.dev, MockDevice)
        return idev.dev.iopf

    def ask(self, group: int = 0, *, records: int = 1, pasid: int = 0) -> None:
        """A group of page requests; address n * 4096 in record n."""
        for n in range(records):
            last = n == records - 1
            flags = LAST * last | PASID_VALID * bool(pasid)
            request = PageRequest(flags, pasid, group, 1, n * PAGE_SIZE)
            self.iopf.report(request, pasid_valid=bool(pasid), last=last)

    def read(self, count: int = 4096) -> list[uapi.HwptPgfault]:
        data = self.c.read(self.fd, count // RECORD * RECORD)
        return [uapi.HwptPgfault.unpack(data, at) for at in range(0, len(data), RECORD)]

    def answer(self, *answers: tuple[int, int]) -> int:
        return self.c.write(self.fd, b"".join(uapi.HwptPageResponse(*answer).pack() for answer in answers))

    def answered(self) -> list[tuple[int, int]]:
        """(group, code), oldest first."""
        return [(request.grpid, code) for request, code in self.iopf.responses]

    def poll(self) -> int:
        return self.c.file(self.fd, File).poll()


def test_a_group_is_its_parts_in_the_order_they_came() -> None:
    device = Faulting()
    for at, group in enumerate((5, 6, 5, 5)):
        device.iopf.report(PageRequest(0, 0, group, 1, at), pasid_valid=False, last=False)
    assert device.poll() == OUT  # nothing is delivered before the last part
    device.iopf.report(PageRequest(LAST, 0, 5, 1, 9), pasid_valid=False, last=True)
    assert device.poll() == IN | OUT
    records = device.read()
    assert [(record.addr, record.flags) for record in records] == [(0, 0), (2, 0), (3, 0), (9, LAST)]
    assert {record.grpid for record in records} == {5}
    assert {record.cookie for record in records} == {1}
    device.iopf.report(PageRequest(LAST, 0, 6, 1, 9), pasid_valid=False, last=True)
    assert [record.addr for record in device.read()] == [1, 9]
    assert device.answer((2, 0), (1, 1)) == 16
    assert device.answered() == [(6, 0), (5, 1)]


@pytest.mark.parametrize(("room", "got"), [(1, 1), (2, 1), (3, 1), (4, 4), (5, 4), (6, 6)])
def test_groups_are_read_whole_or_not(room: int, got: int) -> None:
    device = Faulting()
    for group, records in enumerate((1, 3, 2)):
        device.ask(group, records=records)
    assert len(device.read(room * RECORD)) == got
    rest = device.read()
    assert len(rest) == 6 - got
    assert not device.read()


def test_a_first_group_that_does_not_fit() -> None:
    device = Faulting()
    device.ask(records=2)
    before = state(device.c.world)
    device.c.fails(lambda: device.read(RECORD), errno.EINVAL)
    device.c.fails(lambda: device.read(0), errno.EINVAL)
    device.c.fails(lambda: device.c.read(device.fd, RECORD - 1), errno.ESPIPE)
    device.c.fails(lambda: device.c.read(device.fd, 2 * RECORD, NOWHERE), errno.EFAULT)
    assert not difference(before, state(device.c.world))
    assert [record.cookie for record in device.read()] == [1, 1]


def test_a_group_that_cannot_be_stored_stays_at_the_head() -> None:
    device = Faulting()
    device.ask(1)
    device.ask(2, records=2)
    end = DATA + 15 * PAGE_SIZE  # of the memory there
    done = device.c.file(device.fd, File).read(device.c.caller, end - 2 * RECORD, 3 * RECORD)
    assert done == RECORD  # the second group had one record stored, and none delivered
    assert [(record.grpid, record.cookie) for record in device.read()] == [(2, 2), (2, 2)]


@given(st.lists(st.integers(0, 6), max_size=20))
def test_the_lowest_cookie_that_is_free(steps: list[int]) -> None:
    device = Faulting()
    waiting: set[int] = set()
    for step in steps:
        if step in waiting:
            device.answer((step, 0))
            waiting.discard(step)
        else:
            device.ask(step)
            (record,) = device.read()
            assert record.cookie == min(set(range(1, 30)) - waiting)
            waiting.add(record.cookie)


def test_an_answer_stops_at_the_first_that_is_wrong() -> None:
    device = Faulting()
    for group in range(3):
        device.ask(group)
    device.read()
    assert device.answer((2, 0), (1, 2), (3, 0)) == 8
    assert device.answer((1, 1), (2, 0), (3, 0)) == 8
    for wrong in ((3, 2), (9, 0), (2, 0)):
        device.c.fails(lambda answer=wrong: device.answer(answer), errno.EINVAL)  # type: ignore[misc]
    device.c.fails(lambda: device.c.write(device.fd, bytes(12)), errno.ESPIPE)
    device.c.fails(lambda: device.c.file(device.fd, File).write(device.c.caller, NOWHERE, 8), errno.EFAULT)
    assert device.answered() == [(1, 0), (0, 1)]


def test_cookie_0_once_asked_for_is_given_out() -> None:
    """quirk: xa_erase(0) of an allocating array makes a reserved index an ordinary one."""
    device = Faulting()
    device.ask(1)
    device.read()
    device.c.fails(lambda: device.answer((0, 0)), errno.EINVAL)
    device.ask(2)
    assert [record.cookie for record in device.read()] == [0]
    device.answer((0, 0))


# ---- attachments that end ----


@pytest.mark.parametrize("how", ["replace", "destroy", "blocked"])
def test_requests_of_an_attachment_that_ends_are_answered_invalid(how: str) -> None:
    """Delivered or not; those of another device of the same queue wait on."""
    device = Faulting()
    c = device.c
    other = c.mock_domain(device.hwpt)
    device.ask(1)
    c.test(test_uapi.TriggerIopf(dev_id=other.idev, grpid=7))
    device.ask(2)
    assert len(device.read(2 * RECORD)) == 2  # 1 and 7
    iopf = device.iopf
    if how == "replace":
        c.replace(device.mock.stdev, device.ioas)
    elif how == "destroy":
        c.destroy(device.mock.stdev)
    else:
        c.replace(device.mock.stdev, c.hwpt(device.mock.idev, device.ioas, FAULT, fault=device.fault))
    assert [(request.grpid, code) for request, code in iopf.responses] == [(2, 1), (1, 1)]
    c.fails(lambda: device.answer((1, 0)), errno.EINVAL)
    assert device.answer((2, 0)) == 8
    assert device.poll() == OUT
    check(c.world)


def test_requests_nobody_handles_are_answered_at_once() -> None:
    device = Faulting()
    device.c.replace(device.mock.stdev, device.ioas)
    device.c.test(test_uapi.TriggerIopf(dev_id=device.mock.idev, grpid=3))
    device.c.test(test_uapi.TriggerIopf(dev_id=device.mock.idev, grpid=4, pasid=5))
    assert device.answered() == [(3, 1), (4, 1)]
    assert not device.read()


def test_a_pasid_goes_to_its_own_hwpt_or_to_a_nested_one() -> None:
    """find_fault_handler(): the user's PASID table lies behind a nested RID."""
    device = Faulting()
    c = device.c
    mine, fd = c.fault_queue()
    hwpt = c.hwpt(device.mock.idev, device.ioas, FAULT | PASID, fault=mine)
    c.pasid_attach(device.mock.stdev, 5, hwpt)
    for pasid in (5, 6):
        c.test(test_uapi.TriggerIopf(dev_id=device.mock.idev, pasid=pasid, grpid=pasid))
    assert uapi.HwptPgfault.unpack(c.read(fd, RECORD)).pasid == 5
    assert device.answered() == [(6, 1)]
    parent = c.hwpt(device.mock.idev, device.ioas, NEST_PARENT | PASID)
    c.replace(device.mock.stdev, c.nested(device.mock.idev, parent, FAULT | PASID, fault=device.fault))
    c.test(test_uapi.TriggerIopf(dev_id=device.mock.idev, pasid=6, grpid=6))
    (record,) = device.read()
    assert (record.pasid, record.dev_id, record.flags) == (6, device.mock.idev, LAST | PASID_VALID)


def test_parts_without_an_end_go_with_the_last_queue() -> None:
    device = Faulting()
    device.iopf.report(PageRequest(0, 0, 5, 1, 0), pasid_valid=False, last=False)
    device.c.replace(device.mock.stdev, device.ioas)
    device.c.replace(device.mock.stdev, device.hwpt)
    device.ask(5)
    assert len(device.read()) == 1


def test_closing_the_file_answers_nothing() -> None:
    device = Faulting()
    c = device.c
    for group in (1, 2):
        device.ask(group)
    device.read(RECORD)
    c.fds.close(device.fd)
    c.destroy(device.fault, errno.EBUSY)
    assert not device.answered()
    c.replace(device.mock.stdev, device.ioas)
    assert sorted(device.answered()) == [(1, 1), (2, 1)]
    c.destroy(device.hwpt)
    c.destroy(device.fault)


# ---- files ----


def test_whoever_shows_poll_hears_of_every_change() -> None:
    device = Faulting()
    file = device.c.file(device.fd, EventqFile)
    seen: list[int] = []
    file.on_change = lambda: seen.append(file.poll())
    device.ask(1)
    device.ask(2)
    device.read(RECORD)
    device.read(RECORD)
    device.ask(3)
    device.c.replace(device.mock.stdev, device.ioas)
    assert seen == [IN | OUT, IN | OUT, IN | OUT, OUT, IN | OUT, OUT]


def test_no_number_for_the_file_undoes_the_queue() -> None:
    c = Client()
    c.fds.room = 1
    before = state(c.world)
    c.fault_queue(errno.EMFILE)
    assert not difference(before, state(c.world))


def test_a_reply_that_cannot_be_written_opens_nothing() -> None:
    c = Client()
    addr = c.process.buffer(1)
    c.mm.write(addr, uapi.FaultAlloc().pack())
    c.mm.protect(addr, addr + PAGE_SIZE, readable=True, writable=False)
    before = state(c.world)
    assert c.rc(uapi.FaultAlloc.CMD, addr) == -errno.EFAULT
    assert not difference(before, state(c.world))


def test_other_files_cannot_be_read() -> None:
    c = Client()
    fd = c.access(c.ioas_alloc())
    for one in (c.fd, fd):
        c.fails(lambda fd=one: c.read(fd, 8), errno.EINVAL)  # type: ignore[misc]
        c.fails(lambda fd=one: c.write(fd, bytes(8)), errno.EINVAL)  # type: ignore[misc]
