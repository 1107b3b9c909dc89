"""What a VT-d unit and its devices do, as the events that a trace tells; and nothing of it while nobody listens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import iommufd_uapi.iommufd as uapi
from iommufd_uapi.events import line
from iommufdd.hardware_events import connect, tell_stale
from iommufdd.iommu.dma import Op, State
from iommufdd.iommu.vtd import Vtd
from iommufdd.iommu.walk import PRIV
from iommufdd.machine_file import Machines
from iommufdd.wiring import new_machine
from tests.core.test_objects import Recorder

from .lab import POOL, Lab, endpoint
from .tables import X86Table
from .test_dma_queue import answer, faulting, request
from .vmm import forgetful

if TYPE_CHECKING:
    from iommufd_uapi.events import Event
    from iommufdd.user import Events

LEAF = uapi.IOMMU_VTD_INV_FLAGS_LEAF


class Heard(Recorder):
    """A listener that keeps what the hardware tells."""

    def __init__(self, lab: Lab) -> None:
        super().__init__()
        self.port = lab.c.world.machine.events
        self.events: list[Event] = []
        connect(self.port, [lab.iommu])
        self.port.add(self)

    def hardware(self, port: Events, event: Event) -> None:
        assert port is self.port
        self.events.append(event)

    def lines(self) -> list[str]:
        """What came since the last time, without time and machine."""
        found, self.events = self.events, []
        return [line(event, event.time).removeprefix("0.000000 - [test] ") for event in found]


def test_dma_and_faults() -> None:
    lab = Lab()
    heard = Heard(lab)
    idev = lab.device(pasids=8)
    ioas, ram = lab.ram()
    table = X86Table(ram, POOL, 4)
    hwpt = lab.nested(idev, lab.parent(idev, ioas), table.root, flags=uapi.IOMMU_HWPT_ALLOC_PASID)
    lab.attach(idev, hwpt)
    lab.attach(idev, hwpt, pasid=5)
    table.map(0x7F12_3456_7000, 0x5000)
    heard.lines()
    lab.write(idev, 0x7F12_3456_7000, bytes(0x1000), pasid=5)
    assert heard.lines() == ["dma dev1 pasid 5 write 0x7f1234567000+0x1000 = done"]
    lab.read(idev, 0x7F12_3456_7000)
    assert heard.lines() == ["dma dev1 read 0x7f1234567000+0x8 = done"]
    lab.fault(idev, 0x1000, priv=PRIV)
    refused, ended = heard.lines()
    assert refused == "fault dev1 privileged read iova 0x1000: 0x5d SRE is clear in the PASID table entry"
    assert ended.startswith("dma dev1 privileged read 0x1000+0x1 = fault 0x5d: SRE is clear")
    lab.dma(idev, Op.FILL, 0x7F12_3456_7F00, 0x200, data=b"x").run()
    refused, ended = heard.lines()
    assert refused == "fault dev1 write iova 0x7f1234568000: 0x71 a first-stage entry is not present"
    assert ended.startswith("dma dev1 fill 0x7f1234567f00+0x200 = 0x100 bytes, then fault 0x71: ")


def test_page_requests() -> None:
    lab = Lab()
    heard = Heard(lab)
    idev, fd = faulting(lab)
    heard.lines()
    for code, name in ((0, "SUCCESS"), (1, "INVALID")):
        dma = endpoint(idev).dma(lab.dma(idev, Op.WRITE, 0x4008, 4))
        endpoint(idev).queue.pump(1, 1 << 20)
        assert dma.state is State.PARKED
        answer(lab, fd, request(lab, fd).cookie, code)
        asked, answered, *_ = heard.lines()
        assert asked == f"page request dev1 write 0x4000 (group {code * 2})"
        assert answered == f"page response dev1 (group {code * 2}) = {name}"
        if code == 0:  # it asks again, for the page is still not there
            endpoint(idev).queue.pump(1, 1 << 20)
            answer(lab, fd, request(lab, fd).cookie, 1)
            assert heard.lines()[-1] == "dma dev1 write 0x4008+0x4 = the page request was answered INVALID"
    endpoint(idev).dma(lab.dma(idev, Op.READ, 0x8000, 4))
    endpoint(idev).queue.pump(1, 1 << 20)
    heard.lines()
    lab.detach(idev)
    assert "page response dev1 (group 3) = INVALID" in heard.lines()


def test_invalidations_and_what_they_dropped() -> None:
    lab = Lab()
    heard = Heard(lab)
    idev = lab.device(ats=True)
    hwpt, _, table = lab.guest(idev)
    lab.attach(idev, hwpt)
    table.map(0x5000, 0x9000)
    table.map(0x6000, 0xA000)
    lab.read(idev, 0x5000, 0x2000)
    heard.lines()
    lab.invalidate(hwpt, 0x5000, 1, LEAF)
    assert heard.lines() == [
        "invalidate dmar0 IOTLB page (did 2, pasid 0) 0x5000..0x5fff leaf: dropped 1",
        "invalidate dmar0 device TLB page (dev1, pasid 0) 0x5000..0x5fff: dropped 1",
    ]
    lab.invalidate(hwpt)
    assert heard.lines() == [
        "invalidate dmar0 IOTLB PASID (did 2, pasid 0): dropped 1, tables 3",
        "invalidate dmar0 device TLB PASID (dev1, pasid 0): dropped 1",
    ]
    lab.detach(idev)
    assert heard.lines() == [
        "invalidate dmar0 PASID cache PASID (did 2, pasid 0): dropped 0, tables 1",
        "invalidate dmar0 IOTLB domain (did 2): dropped 1",  # where the guest's tables are
        "invalidate dmar0 device TLB PASID (dev1, pasid 0): dropped 0",
        f"replace dev1 pasid 0 hwpt_nested:{hwpt} -> nothing",
    ]


def test_who_asked_for_an_invalidation() -> None:
    lab = Lab()
    heard = Heard(lab)
    idev = lab.device()
    hwpt, _, _ = lab.guest(idev)
    lab.attach(idev, hwpt)
    heard.lines()
    lab.invalidate(hwpt, 0x5000, 1)
    lab.detach(idev)
    assert [event.user for event in heard.events if hasattr(event, "user")] == [True, False, False]


def test_one_domain_for_another() -> None:
    lab = Lab()
    heard = Heard(lab)
    idev = lab.device()
    (ioas, _), (other, _) = lab.ram(), lab.ram()
    first = lab.attach(idev, ioas)
    assert heard.lines() == [f"replace dev1 pasid 0 nothing -> hwpt_paging:{first}"]
    second = lab.replace(idev, other)
    assert heard.lines()[-1] == f"replace dev1 pasid 0 hwpt_paging:{first} -> hwpt_paging:{second}: hitless"
    lab.iommu.vendor_replace = True
    nested, _, _ = lab.guest(idev)
    lab.replace(idev, nested)
    assert heard.lines()[-1] == (
        f"replace dev1 pasid 0 hwpt_paging:{second} -> hwpt_nested:{nested}: window: P cleared opens it"
    )


def test_the_models_have_a_monitor_only_while_somebody_listens() -> None:
    lab = Lab()
    heard = Heard(lab)
    other = Recorder()
    monitors = lab.iommu.monitors
    assert len(monitors) == 1
    heard.port.add(other)
    assert len(monitors) == 1, "each event is told once"
    heard.port.remove(heard)
    assert len(monitors) == 1
    heard.port.remove(other)
    assert monitors == []
    idev = lab.device()
    lab.attach(idev, lab.ram()[0])
    assert heard.events == []
    assert other.seen == []


def test_every_machine_with_such_a_unit_is_connected() -> None:
    machine = new_machine("lab", Machines().describe("vtd"))
    (unit,) = machine.iommus.values()
    assert isinstance(unit, Vtd)
    listener = Recorder()
    assert unit.monitors == []
    machine.events.add(listener)
    assert len(unit.monitors) == 1
    machine.events.remove(listener)
    assert unit.monitors == []
    new_machine("bare").events.add(listener)  # the selftest's mock has nothing to tell


def test_what_the_sanitizer_finds_and_what_becomes_of_it() -> None:
    vmm = forgetful()
    heard = Heard(vmm.lab)
    vmm.sanitizer.listeners.append(tell_stale(heard.port))
    vmm.sanitizer.settle()
    (told,) = heard.lines()
    assert told == (
        "stale dev1 read iova 0x7f1234567000: never flushed: the IOTLB gave guest physical 0x5000, memory says guest "
        "physical 0x6000; right: HWPT_INVALIDATE {addr 0x7f1234567000, npages 1} on hwpt 4 (IOTLB)"
    )
    heard.port.remove(heard)
    vmm.sanitizer.listeners[-1](vmm.sanitizer.reported[0])
    assert not heard.events
