"""QEMU 11.1's sequence for an accelerated SMMUv3 as a C program under `iommufdctl run` (smmuv3.c), down to DMA."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from iommufd_client import DmaError
from iommufd_client.testing import Daemon

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from .conftest import Run

MACHINE = "qemu"
BUFFER, IOVA = 0x40C0_0000, 0xFFFF_F000


def test_a_vmm_with_an_accelerated_smmuv3(run: Run, compiled: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    with Daemon() as daemon, daemon.admin() as admin:
        options = ("--socket-path", daemon.socket_path, "--machine", f"{MACHINE}@smmuv3", "--trace", trace)
        program = run.start(*options, "--", compiled / "smmuv3", stdin=-1)
        device = admin.endpoint("vfio1", MACHINE)

        def late() -> None:  # the guest has unmapped it
            with pytest.raises(DmaError, match="fault 0x10"):
                device.write(IOVA, b"late")

        steps: tuple[tuple[str, Callable[[], None]], ...] = (
            ("bypass", lambda: device.write(BUFFER, b"guest physical")),
            ("stage 1", lambda: device.write(IOVA, b"through stage 1")),
            ("unmapped", late),
            ("unmapped", late),
            ("again", lambda: device.write(IOVA, b"and again")),
        )
        for where, act in steps:
            assert program.stdout is not None
            assert program.stdin is not None
            assert program.stdout.readline() == f"{where}\n"
            act()
            program.stdin.write("\n")
            program.stdin.flush()
        out, err = program.communicate(timeout=60)
    assert (program.returncode, out, err) == (0, "ok\n", "")
    text = trace.read_text()
    for line in (
        r"IOMMU_VDEVICE_ALLOC\(iommufd:\d+, \{.*virt_id=0x100.*\}\) = 0",
        r"IOMMU_HWPT_ALLOC\(.*ste=\{v config=S1_TRANS s1contextptr=0x40a61000 s1dss=SSID0 ",
        r"IOMMU_HWPT_INVALIDATE\(iommufd:\d+, \{.*cmd=\{CFGI_CD sid=0x100 leaf\}",
        r"IOMMU_HWPT_INVALIDATE\(iommufd:\d+, \{.*cmd=\{TLBI_NH_VA asid=0x1 leaf addr=0xfffff000\}",
        r"\{F_TRANSLATION sid=0x100 class=IN addr=0xfffff000\}",
        r"invalidate smmu0 IOTLB ASID \(vmid 1, asid 1\): ",
    ):
        assert re.search(line, text), line
