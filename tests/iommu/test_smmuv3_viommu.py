"""The vIOMMU of SMMUv3: what it refuses and in which order, invalidation arrays, events (arm-smmu-v3-iommufd.c)."""

from __future__ import annotations

import errno
from typing import Any

import pytest

import iommufd_uapi.iommufd as uapi
from iommufd_uapi.smmuv3 import Cmd, Command, Config, EventId, Op, S1Dss, Ste
from iommufdd.errors import EBUSY, EINVAL, ENOENT, EOPNOTSUPP
from iommufdd.hw_pagetable import HwPagetable
from tests.core.harness import FAULT, NEST_PARENT, PASID

from .smmu_lab import CDS, Guest, SmmuLab, Watch, master

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


# ---- invalidation arrays ----


def test_the_commands_that_a_guest_may_send() -> None:
    lab = SmmuLab()
    lab.device()  # so that StreamIDs differ
    idev = lab.device(ats=True)
    guest = Guest(lab, idev, vsid=0x77)
    guest.start()
    watch = Watch(lab)
    commands = [
        Cmd.tlbi_nsnh_all(), Cmd.tlbi_nh_all(9), Cmd.tlbi_nh_asid(3, 9), Cmd.tlbi_nh_va(3, VA, vmid=9),
        Cmd.tlbi_nh_vaa(VA, vmid=9), Cmd.cfgi_cd(0x77, 5), Cmd.cfgi_cd_all(0x77), Cmd.atc_inv(0x77),
    ]  # fmt: skip
    assert lab.invalidate(guest.viommu, *commands) == 8
    told = [(what.command, what.tag, what.user) for what in watch.invalidations]
    name = master(idev).name
    assert told == [
        ("CMD_TLBI_NH_ALL", 1, True), ("CMD_TLBI_NH_ALL", 1, True), ("CMD_TLBI_NH_ASID", (1, 3), True),
        ("CMD_TLBI_NH_VA", (1, 3), True), ("CMD_TLBI_NH_VAA", 1, True), ("CMD_CFGI_CD", (name, 5), True),
        ("CMD_CFGI_CD_ALL", name, True),
    ]  # fmt: skip


@pytest.mark.parametrize("op", sorted({*range(256)} - {0x30, 0x10, 0x11, 0x12, 0x13, 0x05, 0x06, 0x40}))
def test_every_other_opcode_is_eio(op: int) -> None:
    lab = _shared_lab()
    guest = _GUESTS[lab]
    raw = Command(op=op)
    assert lab.invalidate(guest.viommu, Cmd.tlbi_nh_all(), raw, Cmd.tlbi_nh_all(), expect=errno.EIO) == 1


_GUESTS: dict[SmmuLab, Guest] = {}


def _shared_lab() -> SmmuLab:
    if not _GUESTS:
        lab = SmmuLab()
        _GUESTS[lab] = Guest(lab, lab.device())
    return next(iter(_GUESTS))


@pytest.mark.parametrize("at", [0, 1, 62, 63, 64, 125, 126, 127, 199])
def test_what_was_converted_counts_though_its_batch_was_not_issued(at: int) -> None:
    lab = SmmuLab()
    idev = lab.device()
    guest = Guest(lab, idev)
    watch = Watch(lab)
    commands: list[Command] = [Cmd.tlbi_nh_asid(n) for n in range(200)]
    commands[at] = Cmd.cfgi_cd(0xBAD)
    assert lab.invalidate(guest.viommu, *commands, expect=errno.EIO) == at
    assert len(watch.invalidations) == at // 63 * 63
    watch.invalidations.clear()
    commands[at] = Cmd.tlbi_nh_asid(at)
    assert lab.invalidate(guest.viommu, *commands) == 200
    assert [what.tag for what in watch.invalidations] == [(1, n) for n in range(200)]


def test_arrays_are_copied_whole() -> None:
    lab = SmmuLab()
    idev = lab.device()
    guest = Guest(lab, idev)
    watch = Watch(lab)
    put = lab.c.process.put

    def call(data: bytes, num: int, length: int, kind: int = 1, expect: int = 0) -> int:
        cmd = uapi.HwptInvalidate(hwpt_id=guest.viommu, data_uptr=put(data) if data else 0, data_type=kind,
                                  entry_len=length, entry_num=num)  # fmt: skip
        return lab.c.ioctl(cmd, expect).entry_num

    one = Cmd.tlbi_nh_asid(5).pack()
    assert call(b"", 0, 16, expect=errno.EINVAL) == 0
    assert call(one, 1, 16, kind=0, expect=errno.EINVAL) == 0
    assert call(one + b"\1" + bytes(7), 1, 24, expect=errno.E2BIG) == 0
    assert not watch.invalidations
    assert call(one + bytes(8), 1, 24) == 1
    assert call(one[:8] * 2, 2, 8) == 2
    assert [what.tag for what in watch.invalidations] == [(1, 5)] * 3


def test_an_invalidation_of_a_nested_hwpt_is_not_there() -> None:
    lab = SmmuLab()
    idev = lab.device()
    guest = Guest(lab, idev)
    lab.invalidate(guest.hwpt(), Cmd.tlbi_nh_all(), expect=errno.EOPNOTSUPP)
    lab.invalidate(guest.parent, Cmd.tlbi_nh_all(), expect=errno.EINVAL)


def test_two_viommus_on_one_parent_share_their_tags() -> None:
    lab = SmmuLab()
    one, two = lab.device(), lab.device()
    guest = Guest(lab, one)
    other = lab.viommu(two, guest.parent)
    guest.table.map(VA, 0x5000)
    guest.start()
    lab.read(one, VA)
    lab.invalidate(other, Cmd.tlbi_nsnh_all())
    assert lab.iommu.iotlb.space((1, 5)).lookup(VA) is None


# ---- events ----


def test_sequence_and_overflow() -> None:
    lab = SmmuLab()
    idev = lab.device()
    guest = Guest(lab, idev)
    other = lab.viommu(idev, guest.parent)
    lab.c.destroy(guest.vdevice)
    lab.c.vdevice(other, idev.id, 0x42)
    fd = lab.veventq(other, depth=2)
    lab.attach(idev, lab.vste(idev, other, guest.ste))
    for page in range(4):
        lab.fault(idev, VA + page * 4096)
    assert [lab.event(fd)[:2] for _ in range(2)] == [(0, 0), (0, 1)]
    assert lab.event(fd) == (uapi.IOMMU_VEVENTQ_FLAG_LOST_EVENTS, 3, b"")
    lab.fault(idev, VA)
    flags, sequence, data = lab.event(fd)
    assert (flags, sequence) == (0, 4)
    assert uapi.VeventArmSmmuv3.unpack(data).evt == (0x10 | 0x42 << 32, 1 << 35 | 2 << 40, VA, 0)
    assert lab.c.read(guest.fd, 40) == b""


def test_without_a_queue_or_a_vdevice_events_stay_with_the_host() -> None:
    lab = SmmuLab()
    one, two = lab.device(), lab.device()
    guest = Guest(lab, one)
    lab.attach(two, guest.hwpt(Ste.bypass()))
    lab.fault(two, 1 << 30)
    other = lab.viommu(two, guest.parent)
    lab.c.vdevice(other, two.id, 1)
    lab.replace(two, lab.vste(two, other, Ste.s1(CDS + 64 * 20)))
    assert lab.fault(two, VA) == EventId.C_BAD_CD
    assert [event.relayed for event in lab.iommu.events] == [False, False]
    assert lab.c.read(guest.fd, 40) == b""


def test_an_address_that_is_too_large_for_a_bypassed_stage_1_is_the_guests_fault() -> None:
    lab = SmmuLab()
    idev = lab.device()
    guest = Guest(lab, idev)
    lab.attach(idev, guest.hwpt(Ste.bypass()))
    guest.ram.write(0x5000, b"ipa")
    assert lab.read(idev, 0x5000, 3) == b"ipa"
    assert lab.fault(idev, 1 << 48) == EventId.F_ADDR_SIZE
    assert lab.event(guest.fd)[2][0] == EventId.F_ADDR_SIZE


def test_opcodes_are_the_specifications() -> None:
    assert (Op.TLBI_NSNH_ALL, Op.CFGI_CD, Op.ATC_INV) == (0x30, 0x05, 0x40)
