"""SMMUv3's hardware beside refusals: flags, dirty pages, caches that are off, walks without side effects."""

from __future__ import annotations

import random

import pytest

import iommufd_uapi.iommufd as uapi
from iommufd_uapi.smmuv3 import Cmd, Config, EventId, Ste
from iommufdd.errors import EINVAL
from iommufdd.iommu.dma import Op
from iommufdd.iommu.smmuv3_master import Master
from iommufdd.iommu.smmuv3_regs import idr
from iommufdd.iommu.tlb import TlbEntry
from iommufdd.iommu.walk import ALL, READ, WRITE, TranslationFault
from tests.core.harness import DIRTY, PASID

from .smmu_lab import PAGE, Guest, SmmuLab, Watch, master

VA = 0x7F12_3456_7000
AP2, AF, DBM = 1 << 7, 1 << 10, 1 << 51


def test_hardware_sets_the_flags_of_a_guests_table() -> None:
    lab = SmmuLab()
    idev = lab.device()
    guest = Guest(lab, idev, ha=1, hd=1)
    guest.start()
    slot = guest.table.map(VA, 0x5000, PAGE & ~AF | AP2 | DBM)
    fresh = lab.iommu.walk_fresh(master(idev), None, VA, WRITE)
    assert fresh.allowed >> READ & 1
    assert guest.table.get(slot) & AF == 0  # a fresh walk sets nothing
    lab.read(idev, VA)
    assert guest.table.get(slot) & (AF | AP2) == AF | AP2
    lab.write(idev, VA, b"dirty")
    assert guest.table.get(slot) & (AF | AP2 | DBM) == AF | DBM
    assert guest.ram.read(0x5000, 5) == b"dirty"


def test_a_fresh_walk_leaves_no_trace() -> None:
    lab = SmmuLab()
    idev = lab.device()
    guest = Guest(lab, idev)
    guest.start()
    guest.table.map(VA, 0x5000)
    lab.iommu.walk_fresh(master(idev), None, VA, READ)
    assert not lab.iommu.contexts.entries
    assert not lab.iommu.stes.entries
    assert not len(lab.iommu.iotlb)
    lab.read(idev, VA)
    guest.table.map(VA, 0x6000)
    entry = lab.iommu.walk_fresh(master(idev), None, VA, READ)
    assert (entry.ipa, [step.level for step in entry.steps]) == (0x6000, [0, 4, 3, 2, 1])


@pytest.mark.parametrize("mode", ["off", "faithful", "greedy"])
def test_blocks_pages_and_cache_modes(mode: str) -> None:
    lab = SmmuLab(mode=mode)
    idev = lab.device()
    guest = Guest(lab, idev)
    guest.start()
    guest.table.map(0x4020_0000, 0x20_0000, level=2)
    guest.ram.write(0x20_0000 + 0x12_3456, b"block")
    assert lab.read(idev, 0x4020_0000 + 0x12_3456, 5) == b"block"
    guest.table.map(VA, 0x5000)
    guest.table.map(VA + 0x1000, 0x9000)
    lab.write(idev, VA + 0xFFE, b"across")
    assert guest.ram.read(0x5FFE, 2) + guest.ram.read(0x9000, 4) == b"across"


def bitmap(lab: SmmuLab, hwpt: int, iova: int, pages: int, *, clear: bool = True) -> list[int]:
    """Pages that GET_DIRTY_BITMAP shows."""
    addr = lab.c.process.put(bytes(pages // 8 + 1))
    flags = 0 if clear else uapi.IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR
    lab.c.ioctl(uapi.HwptGetDirtyBitmap(hwpt_id=hwpt, flags=flags, iova=iova, length=pages * 4096, page_size=4096,
                                        data=addr))  # fmt: skip
    bits = int.from_bytes(lab.c.mm.read(addr, pages // 8 + 1), "little")
    return [page for page in range(pages) if bits >> page & 1]


def test_dirty_pages_of_a_paging_domain() -> None:
    lab = SmmuLab(mode="off")
    idev = lab.device()
    ioas, ram = lab.ram(16)
    hwpt = lab.c.hwpt(idev.id, ioas, DIRTY)
    lab.attach(idev, hwpt)
    assert bitmap(lab, hwpt, 0, 16, clear=False) == list(range(16))  # what is mapped begins dirty
    lab.c.ioctl(uapi.HwptSetDirtyTracking(flags=1, hwpt_id=hwpt))
    assert bitmap(lab, hwpt, 0, 16) == []
    lab.read(idev, 0x2000)
    lab.write(idev, 0x3FFF, b"ab")
    assert bitmap(lab, hwpt, 0, 16, clear=False) == [3, 4]
    assert bitmap(lab, hwpt, 0, 16) == [3, 4]
    assert bitmap(lab, hwpt, 0, 16) == []
    lab.c.unmap(ioas, 0, 16 * 4096)
    lab.c.map(ioas, lab.c.process.map(ram.file), 16 * 4096, 0)
    assert bitmap(lab, hwpt, 0, 16) == list(range(16))


def test_a_read_does_not_allow_later_writes_to_go_unseen() -> None:
    lab = SmmuLab()
    idev = lab.device()
    ioas, _ = lab.ram(16)
    hwpt = lab.c.hwpt(idev.id, ioas, DIRTY)
    lab.attach(idev, hwpt)
    lab.c.ioctl(uapi.HwptSetDirtyTracking(flags=1, hwpt_id=hwpt))
    lab.read(idev, 0x3000)
    lab.write(idev, 0x3000, b"seen")
    assert bitmap(lab, hwpt, 0, 16) == [3]


def test_writes_through_a_translation_that_is_cached_as_dirty_are_missed() -> None:
    """quirk: clearing flushes nothing, for the gather of dirty pages has no page size (arm_smmu_iotlb_sync)."""
    lab = SmmuLab()
    idev = lab.device()
    ioas, _ = lab.ram(16)
    hwpt = lab.c.hwpt(idev.id, ioas, DIRTY)
    lab.attach(idev, hwpt)
    lab.c.ioctl(uapi.HwptSetDirtyTracking(flags=1, hwpt_id=hwpt))
    watch = Watch(lab)
    lab.write(idev, 0x3000, b"a")
    assert bitmap(lab, hwpt, 0, 16) == [3]
    assert not watch.invalidations
    lab.write(idev, 0x3000, b"b")
    assert bitmap(lab, hwpt, 0, 16) == []
    lab.iommu.execute(Cmd.tlbi_nsnh_all())
    lab.write(idev, 0x3000, b"c")
    assert bitmap(lab, hwpt, 0, 16) == [3]


def test_who_has_no_dirty_tracking() -> None:
    for capabilities in ({"httu": "access"}, {"coherent_walk": True, "httu": "none"}):
        lab = SmmuLab(**capabilities)
        idev = lab.device()
        lab.c.hwpt(idev.id, lab.ram()[0], DIRTY, expect=95)


def test_what_is_mapped_read_only() -> None:
    lab = SmmuLab()
    idev = lab.device()
    file = lab.c.world.memfd(4)
    ioas = lab.c.ioas_alloc()
    lab.c.map(ioas, lab.c.process.map(file), 4 * 4096, 0x10000, flags=4)
    for flags in (0, uapi.IOMMU_HWPT_ALLOC_NEST_PARENT):
        lab.attach(idev, lab.c.hwpt(idev.id, ioas, flags))
        lab.read(idev, 0x10000)
        assert lab.fault(idev, 0x10000, Op.WRITE) == EventId.F_PERMISSION
        lab.detach(idev)


@pytest.mark.parametrize(("oas", "vax", "granules", "t0sz", "last"), [
    (48, 48, (4, 16, 64), 16, 2**48 - 1), (40, 48, (4,), 24, 2**40 - 1), (52, 52, (4,), 16, 2**48 - 1),
])  # fmt: skip
def test_apertures_and_what_the_ste_says_of_them(
    oas: int, vax: int, granules: tuple[int, ...], t0sz: int, last: int
) -> None:
    lab = SmmuLab(oas=oas, vax=vax, granules=granules)
    idev = lab.device()
    ioas, _ = lab.ram()
    lab.attach(idev, lab.parent(idev, ioas))
    assert lab.c.ranges(ioas) == [(0, 0x7FF_FFFF), (0x810_0000, last)]
    ste = Ste.of(lab.iommu.stream_table.read(master(idev).sid))
    assert (ste.config, ste.s2t0sz, ste.s2vmid) == (Config.S2_TRANS, t0sz, 1)


def test_start_levels_of_stage_2() -> None:
    """SL0 for 4 KiB counts tables from the last: 2 is four levels, 1 three; 40 bits are three levels, concatenated."""
    found = {}
    for oas in (32, 36, 40, 42, 44, 48):
        lab = SmmuLab(oas=oas)
        idev = lab.device()
        lab.attach(idev, lab.parent(idev, lab.ram()[0]))
        found[oas] = Ste.of(lab.iommu.stream_table.read(master(idev).sid)).s2sl0
    assert found == {32: 1, 36: 1, 40: 1, 42: 1, 44: 2, 48: 2}


def test_a_domain_of_64_kib_pages_does_not_fit_an_ioas() -> None:
    lab = SmmuLab(granules=(64,))
    idev = lab.device()
    lab.c.hwpt(idev.id, lab.c.ioas_alloc(), expect=22)


def test_ids_are_given_back() -> None:
    lab = SmmuLab(asid_bits=8, vmid_bits=8)
    idev = lab.device()
    ioas, _ = lab.ram()
    for flags, expect in ((0, 16), (uapi.IOMMU_HWPT_ALLOC_NEST_PARENT, 28)):  # EBUSY, ENOSPC
        made = [lab.c.hwpt(idev.id, ioas, flags) for _ in range(255)]
        lab.c.hwpt(idev.id, ioas, flags, expect=expect)
        lab.c.destroy(made[7])
        lab.c.hwpt(idev.id, ioas, flags)


def test_the_values_that_qemu_asks_for() -> None:
    lab = SmmuLab(httu="none", vmid_bits=8, asid_bits=16, two_level_cd=False, ats=False, stall="none", ssid_bits=10,
                  s2fwb=False)  # fmt: skip
    assert [hex(word) for word in idr(lab.iommu.description)] == [
        "0xd41301b", "0xa739a90", "0x0", "0x400", "0x0", "0x75"]  # fmt: skip


def test_a_device_that_shares_a_group() -> None:
    lab = SmmuLab()
    one = lab.device()
    two = lab.device(group=one.dev.group)
    ioas, ram = lab.ram()
    lab.attach(one, ioas)
    lab.attach(two, ioas)
    lab.write(two, 0x3000, b"both")
    assert lab.read(one, 0x3000, 4) == b"both"
    assert ram.read(0x3000, 4) == b"both"


def test_a_tag_is_flushed_with_its_last_user() -> None:
    lab = SmmuLab()
    one, two = lab.device(), lab.device()
    ioas, _ = lab.ram()
    other, _ = lab.ram()
    hwpt = lab.c.hwpt(one.id, ioas)
    for idev in (one, two):
        lab.attach(idev, hwpt)
    watch = Watch(lab)
    lab.replace(one, other)
    assert "CMD_TLBI_NH_ASID" not in watch.commands()
    lab.replace(two, other)
    assert watch.commands()[-1] == "CMD_TLBI_NH_ASID"


def test_unmapping_by_ranges_and_without() -> None:
    for ranges, size, commands in ((True, 33 * 4096, 2), (False, 5 * 4096, 5), (False, 512 * 4096, 1)):
        lab = SmmuLab(range_invalidation=ranges)
        idev = lab.device(ats=True)
        file = lab.c.world.memfd(512)
        ioas = lab.c.ioas_alloc()
        addr = lab.c.process.map(file)
        lab.c.map(ioas, addr, size, 0x10_0000)
        lab.c.map(ioas, addr, 4096, 0x4000_0000)
        lab.attach(idev, ioas)
        lab.read(idev, 0x10_0000, size)
        lab.read(idev, 0x4000_0000)
        watch = Watch(lab)
        lab.c.unmap(ioas, 0x10_0000, size)
        names = [what.command for what in watch.invalidations]
        assert names[:-1] == ["CMD_TLBI_NH_VA" if size < 512 * 4096 else "CMD_TLBI_NH_ASID"] * commands
        assert names[-1] == "CMD_ATC_INV"
        space = lab.iommu.iotlb.space((0, 1))
        assert space.lookup(0x10_0000) is None
        assert (space.lookup(0x4000_0000) is None) == (size == 512 * 4096)


@pytest.mark.parametrize("level", [0, 1, 2])
def test_a_table_that_stage_2_does_not_show_is_told_by_its_level(level: int) -> None:
    lab = SmmuLab()
    idev = lab.device()
    guest = Guest(lab, idev)
    guest.start()
    guest.table.map(VA, 0x5000)
    lab.read(idev, VA)  # so that the walk cache has what leads there
    other = VA + (1 << 39 - 9 * level)
    guest.table.set(guest.table.slot(other, level), 0x4000_0000 | 3)
    for walk in (lab.iommu.walk_fresh, lab.iommu.translate):
        with pytest.raises(TranslationFault) as caught:
            walk(master(idev), None, other, READ)
        fault = caught.value
        assert (fault.stage, fault.level, fault.code) == (2, 3 - level, EventId.F_TRANSLATION)
        assert [step.level for step in fault.steps] == [0, *range(4, 3 - level, -1)], "the CD, and then the tables"


@pytest.mark.parametrize("ranges", [True, False])
def test_the_ranges_of_a_flush_cover_it_and_no_more(ranges: bool) -> None:
    lab = SmmuLab(range_invalidation=ranges)
    idev = lab.device()
    ioas, _ = lab.ram()
    lab.attach(idev, ioas)
    domain = master(idev).group.domain
    file = lab.c.world.memfd(1)
    space = lab.iommu.iotlb.space((0, 1))
    for first, count in ((7, 1), (8, 5), (1, 70), (3, 64), (0, 33), (2, 500), (100, 511)):
        for page in range(700):
            space.insert(TlbEntry(page * 4096, page * 4096 + 4095, file, 0, ALL, ipa=0))
        domain.unmapped(first * 4096, (first + count) * 4096 - 1)
        gone = set(range(700)) - {entry.first >> 12 for entry in space.entries()}
        assert gone == set(range(first, first + count))


def test_a_pasid_that_is_replaced_leaves_the_others_in_the_device_tlb() -> None:
    lab = SmmuLab()
    idev = lab.device(ats=True, pasids=4)
    hwpts = [lab.c.hwpt(idev.id, lab.ram()[0], PASID) for _ in range(3)]
    lab.attach(idev, hwpts[0])
    lab.attach(idev, hwpts[1], 3)
    atc = master(idev).tlb
    assert atc is not None
    for pasid in (None, 3):
        lab.read(idev, 0x1000, pasid=pasid)
    lab.replace(idev, hwpts[2], 3)
    assert (len(list(atc.space(None).entries())), len(list(atc.space(3).entries()))) == (1, 0)
    lab.read(idev, 0x1000, pasid=3)
    lab.detach(idev, 3)
    assert (len(list(atc.space(None).entries())), len(list(atc.space(3).entries()))) == (1, 0)


def test_ats_of_pasids_while_the_rid_is_blocked() -> None:
    lab = SmmuLab()
    idev = lab.device(ats=True, pasids=4)
    dev = master(idev)
    ioas, ram = lab.ram()
    hwpt = lab.c.hwpt(idev.id, ioas, PASID)
    for pasid in (2, 3):
        lab.attach(idev, hwpt, pasid)
    assert dev.ats_enabled
    ste = Ste.of(lab.iommu.stream_table.read(dev.sid))
    assert (ste.eats, ste.s1dss, dev.used_ssids) == (1, 0, 2)
    lab.write(idev, 0x1000, b"pasid", pasid=2)
    assert ram.read(0x1000, 5) == b"pasid"
    lab.detach(idev, 2)
    assert lab.read(idev, 0x1000, 5, pasid=3) == b"pasid"
    assert lab.fault(idev, 0x1000, pasid=2) == EventId.C_BAD_CD
    lab.detach(idev, 3)
    assert (dev.ats_enabled, dev.used_ssids) == (False, 0)


def test_random_attachments_leave_nothing_behind() -> None:
    """Whatever is attached to RID and PASIDs, in any order: what is counted is what is there."""
    rng = random.Random(3)
    lab = SmmuLab()
    idev = lab.device(ats=True, pasids=4)
    dev = master(idev)
    guest = Guest(lab, idev, eats=1)
    hwpts = [lab.c.hwpt(idev.id, lab.ram()[0], PASID) for _ in range(3)]
    places = [*hwpts, guest.parent, guest.hwpt(), guest.hwpt(Ste.bypass()), guest.hwpt(Ste.abort())]
    attached: dict[int, int] = {}
    for _ in range(400):
        pasid = rng.choice((0, 0, 1, 2, 3))
        pt = rng.choice(places if pasid == 0 else hwpts)
        try:
            if rng.randrange(3) == 0:
                lab.detach(idev, pasid)
                attached.pop(pasid, None)
            else:
                (lab.replace if pasid in attached else lab.attach)(idev, pt, pasid)
                attached[pasid] = pt
        except EINVAL:
            continue
        assert dev.used_ssids == len(attached.keys() - {0})
        assert dev.ats_enabled == _translates(lab, dev)
        users = sum(len(domain.users) for domain in lab.iommu._roots.values())
        assert users == len(attached)
    for pasid in sorted(attached, reverse=True):
        lab.detach(idev, pasid)
    assert not any(domain.users for domain in lab.iommu._roots.values())
    assert Ste.of(lab.iommu.stream_table.read(dev.sid)) == Ste.abort()
    assert not dev.ats_enabled


def _translates(lab: SmmuLab, dev: Master) -> bool:
    """The STE allows ATS."""
    return Ste.of(lab.iommu.stream_table.read(dev.sid)).eats == 1
