"""A HWPT over a VM's table: its allocation's refusals in their order (RFC p10, p13, p18), and its whole life."""

from __future__ import annotations

from errno import EBADF, EBUSY, EFAULT, EINVAL, ENODEV, ENOENT, ENOMEM, EOPNOTSUPP

import pytest

import iommufd_uapi.iommufd as uapi
from iommufdd.description import VtdIommu
from iommufdd.hw_pagetable import HwptKvm
from iommufdd.iommu.dma import Op, State
from iommufdd.iommu.group import (
    IOMMU_PAGE_RESP_FAILURE,
    IOMMU_PAGE_RESP_INVALID,
    IOMMU_PAGE_RESP_SUCCESS,
    AttachHandle,
    Fault,
    IopfGroup,
)
from iommufdd.iommu.ops import PhysicalRun, TdpMetadata
from iommufdd.iommu.vtd import Vtd
from iommufdd.kvm.tdp_fd import TdpFile
from iommufdd.user import File, Gate
from tests.core.harness import DATA, DIRTY, FAULT, NEST_PARENT, NOWHERE, PASID, Client
from tests.iommu.lab import endpoint

from .room import Room

WRONG = {"reserved": 1, "dev_id": 99, "data_len": 7, "data_uptr": NOWHERE}


def ready() -> tuple[Room, int, int]:
    """(room, id of a bound device, a TDP fd)"""
    room = Room()
    return room, room.device(pri=True).id, room.runnable()


# ---- the core's order (1 to 13) ----


@pytest.mark.parametrize(
    ("row", "keep", "errno"),
    [
        (1, ("reserved", "dev_id", "data_len", "data_uptr"), EOPNOTSUPP),
        (3, ("dev_id", "data_len", "data_uptr"), ENOENT),
        (4, ("data_len", "data_uptr"), EINVAL),
        (5, ("data_uptr",), EFAULT),
    ],
)
def test_what_the_struct_can_do_wrong(row: int, keep: tuple[str, ...], errno: int) -> None:
    """Each row with everything after it wrong too."""
    room, _, _ = ready()
    idev = room.device()
    room.hwpt_kvm(idev, 77, errno, **{name: WRONG[name] for name in keep})  # type: ignore[arg-type]
    assert not [obj for obj in room.c.ictx.objects if isinstance(obj, HwptKvm)]


def test_row_2_and_4_lengths_and_pointers() -> None:
    room, _, fd = ready()
    idev = room.device()
    room.hwpt_kvm(idev, fd, EINVAL, data_type=0)
    room.hwpt_kvm(idev, fd, EINVAL, data_len=0)
    room.hwpt_kvm(idev, fd, EINVAL, data_len=16)
    room.hwpt_kvm(idev, fd, EINVAL, data_uptr=0)


def test_row_6_a_driver_that_knows_no_vm() -> None:
    room, _, _ = ready()
    mock = room.c.mock_domain(room.c.ioas_alloc())
    room.hwpt_kvm(room.device(), 99, EOPNOTSUPP, dev_id=mock.idev)
    assert room.c.caller.error is not None
    assert "cannot walk" in room.c.caller.error.reason


def test_row_8_descriptors_that_are_no_table() -> None:
    room, _, fd = ready()
    idev = room.device()
    room.hwpt_kvm(idev, 99, EBADF)
    room.hwpt_kvm(idev, 2**64 - 1, EBADF)
    room.hwpt_kvm(idev, room.fd, EOPNOTSUPP)
    room.hwpt_kvm(idev, room.c.process.install(File()), EOPNOTSUPP)
    other = Room()
    room.hwpt_kvm(idev, room.c.process.install(other.tdp(other.runnable())), EOPNOTSUPP)  # of another machine
    assert room.hwpt_kvm(idev, fd | 0xFFFF_0000_0000_0000, flags=NEST_PARENT, expect=EOPNOTSUPP) == 0


def test_row_9_a_table_without_a_description(monkeypatch: pytest.MonkeyPatch) -> None:
    room, _, fd = ready()
    monkeypatch.setattr(TdpFile, "get_metadata", lambda self: None)
    room.hwpt_kvm(room.device(), fd, EFAULT, flags=NEST_PARENT)
    assert room.tdp(fd).refs == 1


def test_rows_10_to_13_acquisitions_and_the_reply() -> None:
    """The n-th acquisition fails, and nothing is left: no object, importer or reference."""
    room, _, fd = ready()
    idev = room.device()
    room.c.gate.passed = []
    wanted = room.hwpt_kvm(idev, fd)
    gates, room.c.gate.passed = room.c.gate.passed, None
    assert gates[-5:] == [Gate.COPY_IN, Gate.OBJECT, Gate.DOMAIN, Gate.MEMORY, Gate.COPY_OUT]
    room.c.destroy(wanted)
    expected = {Gate.OBJECT: ENOMEM, Gate.DOMAIN: ENOMEM, Gate.MEMORY: ENOMEM, Gate.COPY_OUT: EFAULT}
    for nth, gate in enumerate(gates, 1):
        room.c.gate.arm(nth)
        room.hwpt_kvm(idev, fd, gate.error("").errno if gate not in expected else expected[gate])
        assert room.c.gate.fired is gate
        assert room.tdp(fd).importers == {}
        assert room.tdp(fd).refs == 1
    room.c.gate.arm(0)
    assert room.hwpt_kvm(idev, fd) == wanted, "no id is lost"


def test_row_12_one_hwpt_for_each_table() -> None:
    room, _, fd = ready()
    idev = room.device(pri=True)
    hwpt = room.hwpt_kvm(idev, fd)
    room.hwpt_kvm(idev, fd, EBUSY)
    mine, room.c = room.c, Client(room.c.process)
    room.hwpt_kvm(room.device(), fd, EBUSY)  # from another iommufd
    room.c = mine
    room.attach(idev, hwpt)
    room.c.destroy(hwpt, EBUSY)
    room.detach(idev)
    room.c.destroy(hwpt)
    assert room.hwpt_kvm(idev, fd)
    room.sound()


def test_what_means_nothing_here() -> None:
    """pt_id and fault_id are not looked at, and of the flags only NEST_PARENT."""
    room, dev, fd = ready()
    idev = room.device()
    hwpt = room.hwpt_kvm(idev, fd, pt_id=4711, fault_id=4711, flags=DIRTY | FAULT | PASID | 1 << 20)
    assert hwpt
    c = room.c
    c.ioctl(uapi.HwptSetDirtyTracking(hwpt_id=hwpt, flags=1), ENOENT)
    c.ioctl(uapi.HwptGetDirtyBitmap(hwpt_id=hwpt, length=4096, page_size=4096, data=DATA), ENOENT)
    c.ioctl(uapi.HwptInvalidate(hwpt_id=hwpt), EINVAL)
    c.viommu(c.mock_domain(c.ioas_alloc()).idev, hwpt, expect=ENOENT)
    room.nested(idev, hwpt, 0x1000, expect=EINVAL)
    c.hwpt(dev, hwpt, expect=EINVAL)
    assert c.ranges(c.ioas_alloc()) == [(0, 2**64 - 1)]


# ---- the driver's order (RFC p18 to p21) ----

EPT = TdpMetadata(1, 4, 0x1_0000_0000, 3, (1 << 11,) * 10)


class Nothing:
    """No memory."""

    def load(self, hpa: int) -> int | None:
        return None

    def store(self, hpa: int, entry: int) -> None:
        raise AssertionError("nothing is there")

    def run(self, hpa: int) -> PhysicalRun | None:
        return None


@pytest.mark.parametrize(
    ("flags", "tdp", "lacks", "errno"),
    [
        (NEST_PARENT, None, {"snoop_control": False}, EOPNOTSUPP),
        (0, None, {"snoop_control": False}, EINVAL),
        (0, EPT._replace(type=2, level=3), {"snoop_control": False}, EINVAL),
        (0, EPT._replace(level=3, rsvd_bits_mask=(0,) * 10), {"snoop_control": False}, EOPNOTSUPP),
        (0, EPT._replace(rsvd_bits_mask=(*EPT.rsvd_bits_mask[:9], 0)), {}, EOPNOTSUPP),
        (0, EPT, {"snoop_control": False}, EOPNOTSUPP),
        (0, EPT, {"second_stage": False, "nested": False}, EOPNOTSUPP),
        (0, EPT, {"coherent_walk": False}, EOPNOTSUPP),
        (0, EPT, {"pages_1g": False}, EOPNOTSUPP),
        (0, EPT._replace(max_huge_page_level=2), {"pages_1g": False, "pages_2m": False}, EOPNOTSUPP),
        (0, EPT._replace(level=5), {"levels": (4,), "mgaw": 48}, EOPNOTSUPP),
    ],
)
def test_the_drivers_refusals(flags: int, tdp: TdpMetadata | None, lacks: dict[str, object], errno: int) -> None:
    iommu = Vtd(VtdIommu(name="dmar0", **lacks))  # type: ignore[arg-type]
    room = Room(iommu)
    dev = endpoint(room.device(pri=True))
    room.c.fails(lambda: iommu.domain_alloc_kvm(dev, flags, tdp, Nothing()), errno)


def test_what_the_iommu_need_not_have() -> None:
    for metadata, lacks in (
        (EPT._replace(max_huge_page_level=2), {"pages_1g": False}),
        (EPT._replace(max_huge_page_level=1), {"pages_1g": False, "pages_2m": False}),
        (EPT, {"levels": (4,), "mgaw": 48}),
        (EPT, {"mgaw": 39}),  # quirk: a width in levels, compared with one in bits
    ):
        iommu = Vtd(VtdIommu(name="dmar0", **lacks))
        room = Room(iommu)
        domain = iommu.domain_alloc_kvm(endpoint(room.device()), FAULT | PASID, metadata, Nothing())
        assert (domain.aperture_end, domain.pgsize_bitmap) == (2**48 - 1, 0)
        assert domain.enforce_cache_coherency()


def test_attaching_to_another_unit_that_lacks_something_is_einval() -> None:
    room, _, fd = ready()
    hwpt = room.hwpt_kvm(room.device(), fd)
    room.iommu = Vtd(VtdIommu(name="dmar1", snoop_control=False))
    idev = room.device(pri=True)
    room.c.fails(lambda: room.attach(idev, hwpt), EINVAL)
    room.iommu = Vtd(VtdIommu(name="dmar2"))
    idev = room.device(pri=True)
    room.ram_slot()
    room.attach(idev, hwpt)
    assert room.read(idev, 0) == bytes(8)


# ---- attaching ----


def test_page_requests_are_on_while_it_is_attached() -> None:
    room, _, fd = ready()
    plain, idev = room.device(ats=True), room.device(pri=True)
    hwpt = room.hwpt_kvm(idev, fd)
    room.c.fails(lambda: room.attach(plain, hwpt), ENODEV)
    assert plain.dev.group.domain is room.iommu.blocked_domain
    assert not endpoint(idev).iopf.enabled
    room.attach(idev, hwpt)
    assert endpoint(idev).iopf.enabled
    room.detach(idev)
    assert not endpoint(idev).iopf.enabled


def test_replace_to_it_and_from_it() -> None:
    """Page requests go on and off with it, no translation of either survives, and no DMA sees a third thing."""
    room, _, fd = ready()
    idev = room.device(pri=True)
    guest = room.ram_slot(pages=4)
    ioas, ram = room.ram(4)
    guest.data[:4] = b"vm's"
    ram.write(0, b"ioas")
    hwpt = room.hwpt_kvm(idev, fd)
    room.attach(idev, ioas)
    for _ in range(2):
        assert (room.read(idev, 0, 4), endpoint(idev).iopf.enabled) == (b"ioas", False)
        room.replace(idev, hwpt)
        assert (room.read(idev, 0, 4), endpoint(idev).iopf.enabled) == (b"vm's", True)
        room.sound()
        room.replace(idev, ioas)
    assert list(room.c.ictx.objects.get(hwpt).cached()) == []  # type: ignore[union-attr]
    plain = room.device()
    room.attach(plain, ioas)
    room.c.fails(lambda: room.replace(plain, hwpt), ENODEV)
    assert room.read(plain, 0, 4) == b"ioas"


def test_it_cannot_be_attached_to_a_pasid() -> None:
    room, _, fd = ready()
    idev = room.device(pri=True, pasids=8)
    hwpt = room.hwpt_kvm(idev, fd, flags=PASID)
    room.c.fails(lambda: room.attach(idev, hwpt, 5), EINVAL)


# ---- page requests ----


def test_a_dma_without_a_page_asks_kvm_and_goes_on() -> None:
    room = Room()
    guest = room.ram_slot(pages=8)
    guest.data[0x2FFE:0x3002] = b"over"
    (slot,) = room.vm.slots[0]
    room.slot(0, 0, slot.userspace_addr, 8 * 4096, 1)  # logged: pages of 4 KiB
    idev, _ = room.sharing()
    dev = endpoint(idev)
    assert room.read(idev, 0x2FFE, 4) == b"over"
    assert (dev.counters.page_requests, room.info().faults, room.info().mapped) == (2, 2, 2)
    assert [code for _, code in dev.iopf.responses] == [IOMMU_PAGE_RESP_SUCCESS] * 2
    room.write(idev, 0x7000, b"device")
    assert guest.data[0x7000:0x7006] == b"device"
    assert 7 in room.dirty_log()
    assert not guest.pinners
    assert room.iommu.fault_count == {}
    room.sound()


def test_a_dma_to_nothing_is_answered_failure() -> None:
    room = Room()
    room.ram_slot(pages=2)
    idev, _ = room.sharing()
    dma = room.dma(idev, Op.WRITE, 0x1FFC, 8)
    assert dma.run() is State.FAILED
    assert (dma.error, dma.done) == ("the page request was answered FAILURE", 4)
    counters = endpoint(idev).counters
    assert (counters.page_requests, counters.failures, counters.failed) == (2, 1, 1)
    assert endpoint(idev).iopf.responses[-1][1] == IOMMU_PAGE_RESP_FAILURE


def test_in_the_queue_of_a_machine_it_is_the_same() -> None:
    """An answer that comes while the transfer takes its step neither loses nor doubles it."""
    room = Room()
    room.ram_slot(pages=64)
    idev, _ = room.sharing()
    queue = endpoint(idev).queue
    ended: list[object] = []
    for page in (0, 1, 70, 2):
        dma = room.dma(idev, Op.READ, page * 4096, 4096)
        dma.ended = ended.append
        queue.submit(dma)
    while queue.pump(1, 1 << 20):
        assert len(set(queue.running)) == len(queue.running)
    assert [getattr(dma, "state", None) for dma in ended].count(State.DONE) == 3
    assert len(ended) == 4
    assert not queue.parked


def test_the_first_page_of_a_group_that_fails_decides() -> None:
    room = Room()
    room.ram_slot(pages=2)
    idev, _ = room.sharing()
    dev = endpoint(idev)
    for addr, last in ((0, False), (0x9000, False), (0x1000, True)):
        dev.iopf.report(Fault(int(last) << 1, 0, 3, 1, addr), pasid_valid=False, last=last)
    assert [code for _, code in dev.iopf.responses] == [IOMMU_PAGE_RESP_FAILURE]
    assert room.info().mapped >= 1, "the others are there all the same"
    handle = dev.group.handles[0]
    assert handle.domain.iopf_handler is not None
    codes: list[int] = []
    stray = IopfGroup(AttachHandle(room.iommu.blocked_domain, handle.idev), [], lambda _, code: codes.append(code))
    handle.domain.iopf_handler(stray)
    assert codes == [IOMMU_PAGE_RESP_INVALID], "it came through another domain"


# ---- lives ----


def test_the_descriptor_of_the_table_outlives_the_users_close() -> None:
    room, _, fd = ready()
    idev = room.device(pri=True)
    room.ram_slot()
    hwpt = room.hwpt_kvm(idev, fd)
    room.attach(idev, hwpt)
    tdp = room.tdp(fd)
    room.c.fds.close(fd)
    room.c.fds.close(room.fd)
    room.write(idev, 0, b"still")
    assert (tdp.refs, room.vm.dying) == (1, False)
    room.sound()
    for vcpu in [number for number in room.c.fds.files if number != room.c.fd]:
        room.c.fds.close(vcpu)
    room.write(idev, 0x1000, b"there")
    room.detach(idev)
    room.c.destroy(hwpt)
    assert room.vm.dying, "and the VM with it"
    assert room.memory.in_use == (0, 0)


def test_when_the_vmm_is_gone_every_page_request_fails() -> None:
    room = Room()
    guest = room.ram_slot()
    idev, _ = room.sharing(pri=True)
    room.write(idev, 0, b"before")
    room.c.mm.exit()
    for op in (Op.READ, Op.WRITE):
        dma = room.dma(idev, op, 0)
        assert dma.run() is State.FAILED
        assert dma.error == "the page request was answered FAILURE"
    assert guest.data[:6] == b"before"
    room.sound()


def test_the_end_of_a_context_lets_the_table_go() -> None:
    room, _, fd = ready()
    idev = room.device(pri=True)
    room.ram_slot()
    room.attach(idev, room.hwpt_kvm(idev, fd))
    room.write(idev, 0, b"x")
    room.detach(idev)
    room.c.close()
    room.unbind(idev)
    for other in list(room.driver.held):
        room.unbind(other)  # type: ignore[arg-type]
    assert room.tdp(fd).importers == {}
    assert room.tdp(fd).refs == 1


def test_another_process_cannot_fault_pages_in() -> None:
    """A HWPT made by another address space than the VM's: KVM refuses its faults."""
    room, _, fd = ready()
    room.ram_slot()
    stranger = Client(room.c.world.process(), ictx=room.c.ictx)
    idev = room.device(pri=True)
    hwpt = room.hwpt_kvm(idev, stranger.process.install(room.tdp(fd)), c=stranger)
    room.attach(idev, hwpt)
    dma = room.dma(idev, Op.READ, 0)
    assert dma.run() is State.FAILED
