"""The vIOMMU of SMMUv3: what it refuses, and in which order (arm-smmu-v3-iommufd.c)."""

from __future__ import annotations

import errno
from typing import Any

import pytest

import iommufd_uapi.iommufd as uapi
from iommufd_uapi.smmuv3 import Cmd, Config, EventId, S1Dss, Ste
from iommufdd.errors import EBUSY, EINVAL, ENOENT, EOPNOTSUPP
from iommufdd.hw_pagetable import HwPagetable
from iommufdd.iommu.ops import PasidDomain
from tests.core.harness import FAULT, NEST_PARENT, PASID

from .smmu_lab import Guest, SmmuLab, master

VA = 0x7F12_3456_7000


# ---- VIOMMU_ALLOC ----


def test_which_viommus_there_are() -> None:
    lab = SmmuLab()
    idev = lab.device()
    ioas, _ = lab.ram()
    parent = lab.parent(idev, ioas)
    lab.viommu(idev, parent, uapi.IOMMU_VIOMMU_TYPE_TEGRA241_CMDQV, errno.EOPNOTSUPP)
    lab.viommu(idev, ioas, expect=errno.ENOENT)
    lab.viommu(idev, lab.c.hwpt(idev.id, ioas), expect=errno.EINVAL)
    first, second = lab.viommu(idev, parent), lab.viommu(idev, parent)
    lab.c.destroy(parent, errno.EBUSY)
    for viommu in (first, second):
        lab.c.destroy(viommu)
    lab.c.destroy(parent)


@pytest.mark.parametrize("capabilities", [{"stage1": False}, {"s2fwb": False}])
def test_an_smmu_that_cannot_keep_a_guest_coherent_makes_none(capabilities: dict[str, Any]) -> None:
    lab = SmmuLab(**capabilities)
    idev = lab.device()
    ioas, _ = lab.ram()
    if "stage1" in capabilities:
        lab.c.hwpt(idev.id, ioas, NEST_PARENT, expect=errno.EOPNOTSUPP)
        parent = lab.c.hwpt(idev.id, ioas)
    else:
        parent = lab.parent(idev, ioas)
    lab.viommu(idev, parent, expect=errno.EOPNOTSUPP)


def test_a_root_complex_that_forces_write_back_will_do() -> None:
    lab = SmmuLab(s2fwb=False)
    idev = lab.device(canwbs=True)
    ioas, _ = lab.ram()
    lab.viommu(idev, lab.parent(idev, ioas))


def test_the_parent_belongs_to_this_smmu() -> None:
    lab, other = SmmuLab(), SmmuLab()
    idev = lab.device()
    lab.iommu, mine = other.iommu, lab.iommu
    stranger = lab.device()
    lab.iommu = mine
    ioas, _ = lab.ram()
    parent = lab.parent(idev, ioas)
    lab.viommu(stranger, parent, expect=errno.EINVAL)
    viommu = lab.viommu(idev, parent)
    lab.vste(stranger, viommu, Ste.bypass(), expect=errno.EINVAL)
    lab.c.vdevice(viommu, stranger.id, 1, errno.EINVAL)
    with pytest.raises(EINVAL):
        lab.attach(stranger, parent)
    with pytest.raises(EINVAL):
        lab.attach(stranger, lab.vste(idev, viommu, Ste.bypass()))


# ---- paging domains ----

SETS = [
    (0, 0), (1, 0), (2, 0), (8, 0), (2 | 8, 0), (1 | 2, errno.EOPNOTSUPP), (1 | 8, errno.EOPNOTSUPP),
    (1 | 2 | 8, errno.EOPNOTSUPP), (16, errno.EOPNOTSUPP), (4 | 1, errno.EOPNOTSUPP),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "expect"), SETS)
def test_sets_of_flags(flags: int, expect: int) -> None:
    lab = SmmuLab()
    idev = lab.device()
    fault_id, _ = lab.c.fault_queue()
    lab.c.hwpt(idev.id, lab.ram()[0], flags, fault=fault_id, expect=expect)


def test_a_domain_made_on_another_hwpt_or_with_data_is_not_supported() -> None:
    lab = SmmuLab()
    idev = lab.device()
    ioas, _ = lab.ram()
    parent = lab.parent(idev, ioas)
    lab.vste(idev, parent, Ste.bypass(), expect=errno.EOPNOTSUPP)
    lab.vste(idev, ioas, Ste.bypass(), expect=errno.EOPNOTSUPP)


# ---- vSTEs ----

ALLOWED = [
    (0, 0), (0xFFFF_FFFF_FFFF_FFFE, 2**64 - 1),  # V=0: the rest does not matter
    Ste.abort().words()[:2], Ste.bypass().words()[:2], (0x40A6_100B, 0xD6), (0xF80F_FFFF_FFFF_FFFB, 0x1800_00FF),
]  # fmt: skip
REFUSED = [
    Ste(v=1, config=config).words()[:2] for config in (1, 2, 3, 6, 7)
] + [(1 | 0xB, 2 << 28), (0xB, 3 << 28), (0xB | 1 << 52, 0), (0xB | 1 << 58, 0)] + [
    (0xB, bit) for bit in (1 << 8, 1 << 19, 1 << 25, 1 << 26, 1 << 30, 1 << 44, 1 << 63)
]  # fmt: skip


@pytest.mark.parametrize("words", ALLOWED)
def test_stes_that_a_guest_may_have(words: tuple[int, int]) -> None:
    lab = SmmuLab()
    idev = lab.device()
    guest = Guest(lab, idev)
    lab.attach(idev, lab.vste(idev, guest.viommu, words))
    ste = Ste.of(lab.iommu.stream_table.read(master(idev).sid))
    wanted = {Config.ABORT: Config.ABORT, Config.BYPASS: Config.S2_TRANS, Config.S1_TRANS: Config.NESTED}
    vste = Ste.of(words) if words[0] & 1 else Ste()
    assert ste.config == wanted[Config(vste.config)]
    if ste.config == Config.NESTED:
        assert (ste.s1contextptr, ste.s1cdmax, ste.s1dss, ste.s1fmt) == (
            vste.s1contextptr, vste.s1cdmax, vste.s1dss, vste.s1fmt)  # fmt: skip
        assert (ste.mev, ste.s2vmid, ste.s2fwb, ste.eats) == (1, 1, 1, 0)


@pytest.mark.parametrize("words", REFUSED)
def test_stes_that_a_guest_may_not_have(words: tuple[int, int]) -> None:
    lab = SmmuLab()
    idev = lab.device()
    guest = Guest(lab, idev)
    lab.vste(idev, guest.viommu, words, expect=errno.EIO)


def test_nested_allocation_in_the_drivers_order() -> None:
    lab = SmmuLab()
    idev = lab.device()
    guest = Guest(lab, idev)
    bad = (0xB, 1 << 63)
    lab.vste(idev, guest.viommu, bad, flags=PASID, expect=errno.EOPNOTSUPP)
    fault_id, _ = lab.c.fault_queue()
    lab.vste(idev, guest.viommu, bad, flags=FAULT, fault=fault_id, expect=errno.EIO)
    for length, kind, expect in ((8, 2, errno.EINVAL), (24, 2, errno.EINVAL), (16, 1, errno.EINVAL)):
        cmd = uapi.HwptAlloc(dev_id=idev.id, pt_id=guest.viommu, data_type=kind, data_len=length,
                             data_uptr=lab.c.process.put(bytes(32)))  # fmt: skip
        lab.c.ioctl(cmd, expect)


# ---- attaching ----


def test_attach_in_the_drivers_order() -> None:
    lab = SmmuLab()
    idev, second = lab.device(pasids=4), lab.device()
    guest = Guest(lab, idev)
    hwpt = guest.hwpt()
    with pytest.raises(ENOENT):  # no vDEVICE
        lab.attach(second, hwpt)
    for ste in (Ste.abort(), Ste.bypass(), Ste()):
        nested = guest.hwpt(ste)
        lab.attach(second, nested)
        lab.detach(second)
    paging = lab.c.hwpt(idev.id, guest.ioas, PASID)
    lab.attach(idev, paging)
    lab.attach(idev, paging, 3)
    with pytest.raises(EINVAL):  # the core: a nested HWPT has no PASIDs
        lab.replace(idev, hwpt)
    with pytest.raises(EINVAL):
        lab.attach(idev, hwpt, 2)
    lab.detach(idev, 3)
    lab.replace(idev, hwpt)
    assert master(idev).vmaster is not None
    lab.detach(idev)
    assert master(idev).vmaster is None


def test_a_second_stage_refuses_a_device_whose_pasids_are_in_use() -> None:
    lab = SmmuLab()
    idev = lab.device(pasids=4)
    guest = Guest(lab, idev)
    dev = master(idev)
    first, parent = lab.c.hwpt(idev.id, guest.ioas, PASID), guest.parent
    lab.attach(idev, first)
    lab.attach(idev, first, 3)
    objects = lab.c.ictx.objects
    for number in (parent, guest.hwpt()):
        hwpt = objects.get(number)
        assert isinstance(hwpt, HwPagetable)
        with pytest.raises(EBUSY):
            hwpt.domain.attach_dev(dev, dev.group.domain)


def test_pasids_need_a_cd_table_or_a_blocked_rid() -> None:
    lab = SmmuLab()
    idev = lab.device(pasids=4)
    ioas, ram = lab.ram()
    paging = lab.c.hwpt(idev.id, ioas, PASID)
    ram.write(0x3000, b"pasid")
    lab.attach(idev, paging, 3)  # the RID is blocked
    assert lab.read(idev, 0x3000, 5, pasid=3) == b"pasid"
    ste = Ste.of(lab.iommu.stream_table.read(master(idev).sid))
    assert (ste.config, ste.s1dss) == (Config.S1_TRANS, S1Dss.TERMINATE)
    assert lab.fault(idev, 0x3000) == EventId.F_STREAM_DISABLED
    assert lab.fault(idev, 0x3000, pasid=4) == EventId.C_BAD_CD
    lab.attach(idev, paging)
    assert lab.read(idev, 0x3000, 5) == b"pasid"
    lab.detach(idev)
    assert lab.fault(idev, 0x3000) == EventId.F_STREAM_DISABLED
    assert lab.read(idev, 0x3000, 5, pasid=3) == b"pasid"
    lab.detach(idev, 3)
    assert Ste.of(lab.iommu.stream_table.read(master(idev).sid)) == Ste.abort()
    parent = lab.parent(idev, ioas)
    lab.attach(idev, parent)
    with pytest.raises(EINVAL):  # the core sees the flag first
        lab.attach(idev, paging, 3)
    dev = master(idev)
    hwpt = lab.c.ictx.objects.get(paging)
    assert isinstance(hwpt, HwPagetable)
    assert isinstance(hwpt.domain, PasidDomain)
    with pytest.raises(EINVAL):
        hwpt.domain.set_dev_pasid(dev, 3, None)
    lab.detach(idev)
    hwpt = lab.c.ictx.objects.get(parent)
    assert isinstance(hwpt, HwPagetable)
    assert isinstance(hwpt.domain, PasidDomain)
    with pytest.raises(EINVAL):  # a second stage has no PASIDs
        hwpt.domain.set_dev_pasid(dev, 3, None)


def test_a_forced_write_back_domain_refuses_a_device_that_cannot() -> None:
    lab = SmmuLab()
    can, cannot = lab.device(canwbs=True), lab.device()
    ioas, _ = lab.ram()
    hwpt = lab.c.hwpt(can.id, ioas)
    lab.attach(can, hwpt)
    with pytest.raises(EINVAL):
        lab.attach(cannot, hwpt)
    lab.attach(cannot, lab.c.hwpt(cannot.id, ioas))


def test_page_faults_of_devices_with_several_streams() -> None:
    lab = SmmuLab()
    fault_id, _ = lab.c.fault_queue()
    ioas, _ = lab.ram()
    many, one, plain = lab.device(stall=True, streams=2), lab.device(stall=True), lab.device(streams=2)
    hwpt = lab.c.hwpt(many.id, ioas, FAULT, fault=fault_id)
    with pytest.raises(EOPNOTSUPP):
        lab.attach(many, hwpt)
    lab.attach(one, hwpt)
    lab.attach(plain, hwpt)  # faults simply never come
    assert (master(one).iopf.enabled, master(plain).iopf.enabled) == (True, False)
    lab.detach(one)
    assert not master(one).iopf.enabled


# ---- vDEVICEs ----


def test_a_vdevice_has_one_stream() -> None:
    lab = SmmuLab()
    many, one = lab.device(streams=2), lab.device()
    ioas, _ = lab.ram()
    viommu = lab.viommu(one, lab.parent(one, ioas))
    first = lab.c.vdevice(viommu, one.id, 7)
    lab.c.vdevice(viommu, many.id, 7, errno.EEXIST)
    lab.c.vdevice(viommu, many.id, 8, errno.EOPNOTSUPP)
    lab.c.destroy(first)
    lab.c.vdevice(viommu, one.id, 8)


def test_a_vdevice_that_is_gone_takes_no_commands_but_its_events_go_on() -> None:
    lab = SmmuLab()
    idev = lab.device()
    guest = Guest(lab, idev)
    guest.start()
    lab.c.destroy(guest.vdevice)
    assert lab.invalidate(guest.viommu, Cmd.cfgi_cd(0x100), expect=errno.EIO) == 0
    lab.fault(idev, VA)
    assert lab.event(guest.fd)[2][4:8] == (0x100).to_bytes(4, "little")  # the vSID is that of the attach
    again = guest.hwpt()
    with pytest.raises(ENOENT):
        lab.replace(idev, again)
    lab.c.vdevice(guest.viommu, idev.id, 0x200)
    lab.replace(idev, again)
    lab.fault(idev, VA)
    assert lab.event(guest.fd)[2][4:8] == (0x200).to_bytes(4, "little")
