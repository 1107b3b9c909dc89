"""The sanitizer over SMMUv3: guests that forget or botch a command are told which, right ones are left alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from iommufd_uapi.smmuv3 import Cmd
from iommufdd.iommu.dma import Op, State

from .smmu_right import RIGHT, must_be_left_alone
from .smmu_vmm import IOVA, VSID, A, B, SmmuVmm
from .smmu_wrong import WRONG, Said, must_be_told

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.mark.parametrize("program", WRONG, ids=lambda program: program.__name__)
def test_a_wrong_program_is_told(program: Callable[[], tuple[SmmuVmm, Said]]) -> None:
    must_be_told(*program())


@pytest.mark.parametrize("program", RIGHT, ids=lambda program: program.__name__)
def test_a_right_program_is_left_alone(program: Callable[[], tuple[SmmuVmm, int]]) -> None:
    must_be_left_alone(*program())


def test_there_are_twelve_of_each() -> None:
    assert min(len(WRONG), len(RIGHT)) >= 12


def test_the_report_reads_like_this() -> None:
    vmm = SmmuVmm()
    vmm.map(A)
    vmm.read()
    old, new = vmm.guest.cd, vmm.other(B)
    vmm.guest.store_cd(new)
    vmm.read()
    vmm.send(Cmd.cfgi_cd(VSID, 3), Cmd.tlbi_nh_asid(5))
    vmm.end()
    on = f"on viommu {vmm.guest.viommu}"
    assert vmm.sanitizer.summary() == [
        "sanitizer: 2 translations used; 1 never flushed, 0 used before their flush came",
        "never flushed: dev1, no PASID, read at iova 0x7f1234567000",
        "  the IOTLB gave guest physical 0x5000 (its entry 2 was made 1 DMA before); memory says guest physical 0x6000",
        f"  changed: CD, word 1 of the entry at 0x100000: {old.ttb0:#x} then, {new.ttb0:#x} now",
        f"  right: CMD_CFGI_CD sid=0x100 leaf {on}",
        f"  came: CMD_CFGI_CD ssid=0x3 sid=0x100 leaf {on}: it is tagged for another address space",
        "invalidations that dropped nothing, as no device had used what they name: 1",
        f"       1 CMD_CFGI_CD ssid=0x3 sid=0x100 leaf {on}",
    ]


def test_in_mode_fail_the_command_is_in_the_error() -> None:
    from iommufdd.sanitizer import Mode

    vmm = SmmuVmm()
    vmm.sanitizer.mode = Mode.FAIL
    vmm.map(A)
    vmm.read()
    vmm.map(B)
    vmm.read()
    vmm.sanitizer.settle()
    dma = vmm.lab.dma(vmm.idev, Op.READ, IOVA)
    assert dma.run() is State.FAILED
    assert "right: CMD_TLBI_NH_VA asid=0x5 leaf addr=0x7f1234567000" in dma.error


def test_what_a_tag_names() -> None:
    smmu = SmmuVmm().lab.iommu
    tags = ("all", 1, (1, 5), "vfio0", ("vfio0", None), ("vfio0", 3))
    words = ["all", "vmid 1", "vmid 1, asid 5", "vfio0", "vfio0", "vfio0, ssid 3"]
    assert [smmu.tag_words(tag) for tag in tags] == words
