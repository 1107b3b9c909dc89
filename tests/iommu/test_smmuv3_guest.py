"""What a guest of SMMUv3 sends and hears: invalidation arrays, events (arm-smmu-v3-iommufd.c)."""

from __future__ import annotations

import errno

import pytest

import iommufd_uapi.iommufd as uapi
from iommufd_uapi.smmuv3 import Cmd, Command, EventId, Op, Ste

from .smmu_lab import CDS, Guest, SmmuLab, Watch, master

VA = 0x7F12_3456_7000


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


def test_events_end_with_the_attachment() -> None:
    lab = SmmuLab()
    idev = lab.device()
    guest = Guest(lab, idev)
    guest.start()
    lab.replace(idev, guest.ioas)
    assert lab.fault(idev, VA) == EventId.F_TRANSLATION
    assert not lab.iommu.events[-1].relayed
    assert lab.c.read(guest.fd, 40) == b""
