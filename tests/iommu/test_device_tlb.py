"""Device TLBs: what a device may go on using by itself, and what it must ask for again."""

from __future__ import annotations

import iommufd_uapi.iommufd as uapi
from iommufdd.iommu.dma import Dma, Op, State
from iommufdd.iommu.vtd_regs import Reason
from iommufdd.iommu.walk import PRIV

from .lab import Lab, endpoint


def test_what_a_user_was_granted_is_no_answer_to_a_privileged_request() -> None:
    lab = Lab()
    idev = lab.device(ats=True)
    hwpt, _, table = lab.guest(idev)
    table.map(0x7000, 0x8000)
    lab.attach(idev, hwpt)
    assert lab.read(idev, 0x7000, 4) == bytes(4)
    assert lab.fault(idev, 0x7000, priv=PRIV) == Reason.NO_SUPERVISOR_REQUESTS
    assert lab.read(idev, 0x7000, 4) == bytes(4)


def test_each_mode_has_its_answer() -> None:
    lab = Lab()
    idev = lab.device(ats=True)
    _, ram, table = lab.guest(idev)
    table.map(0x7000, 0x8000, rights="rw")  # a supervisor's page
    ioas, _ = lab.ram()
    del ioas, ram
    parent = next(obj.id for obj in lab.c.ictx.objects if obj.type.name == "HWPT_PAGING")
    lab.attach(idev, lab.nested(idev, parent, table.root, s1_flags=uapi.IOMMU_VTD_S1_SRE))
    for _ in range(2):
        dma = Dma(endpoint(idev), Op.READ, 0x7000, 4, priv=PRIV)
        assert dma.run() is State.DONE
        assert lab.fault(idev, 0x7000) == Reason.FS_USER
