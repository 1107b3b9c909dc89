"""What every function does, whichever IOMMU it is behind."""

from __future__ import annotations

from iommufdd.iommu.dma import Op, State
from iommufdd.iommu.vtd import Vtd
from tests.core.harness import FAULT

from .lab import Lab, endpoint


def test_a_reset_empties_the_device_tlb_and_gives_up_what_is_under_way() -> None:
    lab: Lab = Lab()
    assert isinstance(lab.iommu, Vtd)
    idev = lab.device(pri=True)
    dev = endpoint(idev)
    ioas, _ = lab.ram()
    fault_id, fd = lab.c.fault_queue()
    lab.attach(idev, lab.c.hwpt(idev.id, ioas, FAULT, fault=fault_id))
    lab.read(idev, 0x1000)
    assert dev.tlb is not None
    assert len(dev.tlb)
    waiting = lab.dma(idev, Op.READ, 0x7000_0000)
    assert waiting.run() is State.PARKED
    queued = dev.dma(lab.dma(idev, Op.READ, 0x1000))
    other = lab.device()
    lab.attach(other, ioas)
    endpoint(other).queue = dev.queue
    others = endpoint(other).dma(lab.dma(other, Op.READ, 0x1000))
    idev.dev.reset()
    assert not len(dev.tlb)
    assert waiting.state is queued.state is State.FAILED
    assert waiting.error == queued.error == "the function was reset"
    assert not dev.queue.pump(8, 1 << 20)
    assert others.state is State.DONE
    assert len(lab.c.read(fd, 40)) == 40  # its answer will find nobody
    assert lab.read(idev, 0x1000)
