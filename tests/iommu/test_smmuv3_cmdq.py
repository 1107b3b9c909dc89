"""What each command drops, against a model that keeps every translation in one flat list (IHI0070 chapter 4)."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from iommufd_uapi.smmuv3 import Cmd, Command, L1Cd, Op, Resume, S1Dss, S1Fmt, Tlbi
from iommufdd.iommu.dma import Op as DmaOp
from iommufdd.iommu.smmuv3_cmdq import STAGE2, TABLES, IllegalCommand
from iommufdd.iommu.tlb import Space, TlbEntry
from iommufdd.iommu.walk import ALL

from .smmu_lab import CDS, PAGE, Guest, SmmuLab, Watch, master

VA = 0x7F12_3456_7000


class Flat(NamedTuple):
    """A translation that a TLB may hold."""

    vmid: int
    asid: int  # STAGE2, TABLES for what stage 2 alone gives
    first: int
    last: int


def expected(command: Tlbi, entry: Flat) -> bool:
    """The command must drop it: the scopes of 4.4.2 and 4.4.3, one by one."""
    op = command.op
    if op == Op.TLBI_NSNH_ALL:
        return True
    if entry.vmid != command.vmid:
        return False
    if op == Op.TLBI_S12_VMALL:
        return True
    if op == Op.TLBI_S2_IPA:
        return entry.asid < 0 and touches(command, entry)
    if entry.asid < 0:
        return False
    if op == Op.TLBI_NH_ALL:
        return True
    if op == Op.TLBI_NH_VAA:
        return touches(command, entry)
    return entry.asid == command.asid and (op == Op.TLBI_NH_ASID or touches(command, entry))


def tagged(lab: SmmuLab) -> Iterator[tuple[int, int, Space]]:
    """(VMID, ASID, translations)"""
    for tag, space in lab.iommu.iotlb.spaces.items():
        assert isinstance(tag, tuple)
        yield tag[0], tag[1], space


def touches(command: Tlbi, entry: Flat) -> bool:
    size = (command.num + 1) * 2**command.scale * {1: 4096, 2: 16384, 3: 65536}[command.tg] if command.tg else 4096
    return entry.first < command.addr + size and command.addr <= entry.last


def flat(rng: random.Random) -> Flat:
    size = rng.choice((1, 1, 1, 16, 512)) * 4096
    first = rng.randrange(64) * size if size > 4096 else rng.randrange(4096) * 4096
    return Flat(rng.randrange(3), rng.choice((STAGE2, TABLES, 0, 1, 2)), first, first + size - 1)


def tlbi(rng: random.Random) -> Tlbi:
    op = rng.choice([op for op in Op if op.name.startswith("TLBI_") and "EL2" not in op.name])
    tg = rng.choice((0, 1, 1, 2, 3))
    granule = {0: 12, 1: 12, 2: 14, 3: 16}[tg]
    return Tlbi(op=op, vmid=rng.randrange(3), asid=rng.randrange(3), leaf=rng.randrange(2), tg=tg,
                addr=rng.randrange(1 << 24 - granule) << granule, num=rng.randrange(32) if tg else 0,
                scale=rng.randrange(4) if tg else 0)  # fmt: skip


@pytest.mark.parametrize("seed", range(20))
def test_tlb_invalidations_against_a_flat_list(seed: int) -> None:
    rng = random.Random(seed)
    lab = SmmuLab()
    watch = Watch(lab)
    file = lab.c.world.memfd(4)
    held: dict[Flat, TlbEntry] = {}
    for _ in range(60):
        while len(held) < 80:
            new = flat(rng)
            for old in [old for old in held if old[:2] == new[:2] and old.first <= new.last and new.first <= old.last]:
                del held[old]
            held[new] = TlbEntry(new.first, new.last, file, 0, ALL, ipa=0)
            lab.iommu.iotlb.space((new.vmid, new.asid)).insert(held[new])
        command = tlbi(rng)
        lab.iommu.execute(command)
        gone = {entry for entry in held if expected(command, entry)}
        dropped = watch.invalidations.pop().dropped
        assert {entry for entry, kept in held.items() if kept in dropped} == gone, str(command)
        for entry in gone:
            del held[entry]
        there = {
            Flat(vmid, asid, entry.first, entry.last)
            for vmid, asid, space in tagged(lab)
            for entry in space.entries()
        }
        assert there == set(held)


def test_ranges_are_single_pages_where_there_are_none() -> None:
    lab = SmmuLab(range_invalidation=False)
    file = lab.c.world.memfd(4)
    space = lab.iommu.iotlb.space((0, 1))
    for page in range(3):
        space.insert(TlbEntry(page * 4096, page * 4096 + 4095, file, 0, ALL, ipa=0))
    lab.iommu.execute(Cmd.tlbi_nh_va(1, 0x1000, num=7, scale=3, tg=1))
    assert sorted(entry.first for entry in space.entries()) == [0, 0x2000]


@pytest.mark.parametrize("op", [Op.TLBI_EL2_ALL, Op.TLBI_EL2_ASID, Op.TLBI_EL2_VA, 0x7F])
def test_illegal_commands(op: int) -> None:
    lab = SmmuLab()
    with pytest.raises(IllegalCommand):
        lab.iommu.execute(Cmd.decode(bytes([op]) + bytes(15)))


@pytest.mark.parametrize("command", [Cmd.sync(), Cmd.cfgi_ste(0x999), Cmd.cfgi_cd(0x999), Cmd.atc_inv(0x999),
                                     Cmd.resume(0x999, 0), Cmd.pri_resp(0x100, 1)])  # fmt: skip
def test_commands_that_concern_nobody(command: Command) -> None:
    lab = SmmuLab()
    lab.device()
    lab.iommu.execute(command)


# ---- the walk cache ----


def test_only_a_command_without_leaf_drops_tables() -> None:
    lab = SmmuLab()
    idev = lab.device()
    guest = Guest(lab, idev)
    guest.start()
    guest.table.map(VA, 0x5000)
    guest.table.map(VA + 0x1000, 0x6000)
    lab.write(idev, VA, b"first")
    slot = guest.table.slot(VA, 2)  # a table moves
    table = guest.table.page()
    guest.table.set(slot, table | 3)
    guest.table.set(table + 8 * (VA + 0x1000 >> 12 & 511), 0x7000 | PAGE)
    lab.invalidate(guest.viommu, Cmd.tlbi_nh_va(5, VA + 0x1000, leaf=True))
    lab.write(idev, VA + 0x1000, b"old way")
    assert guest.ram.read(0x6000, 7) == b"old way"
    lab.invalidate(guest.viommu, Cmd.tlbi_nh_va(5, VA + 0x1000, leaf=False))
    lab.write(idev, VA + 0x1000, b"new way")
    assert guest.ram.read(0x7000, 7) == b"new way"


# ---- configuration caches ----


@pytest.mark.parametrize(
    ("command", "fresh"),
    [(Cmd.cfgi_cd(0x100, 2), {2}), (Cmd.cfgi_cd(0x100, 1), {1}), (Cmd.cfgi_cd_all(0x100), {1, 2}), (None, set())],
)
def test_a_cd_stays_until_it_is_invalidated(command: Command | None, fresh: set[int]) -> None:
    lab = SmmuLab()
    idev = lab.device(pasids=4)
    guest = Guest(lab, idev, s1cdmax=4, s1dss=S1Dss.TERMINATE)
    guest.table.map(VA, 0x5000)
    for ssid in (1, 2):
        guest.store_cd(guest.cd, ssid)
    guest.start()
    for ssid in (1, 2):
        lab.read(idev, VA, pasid=ssid)
        guest.store_cd(type(guest.cd)(), ssid)
    if command is not None:
        lab.invalidate(guest.viommu, command)
    bad = set()
    for ssid in (1, 2):
        dma = lab.dma(idev, op=DmaOp.READ, iova=VA, pasid=ssid)
        dma.run()
        if dma.fault is not None:
            bad.add(ssid)
    assert bad == fresh


def test_an_l1cd_stays_when_leaf_is_set() -> None:
    lab = SmmuLab()
    idev = lab.device(pasids=10)
    guest = Guest(lab, idev)
    for leaf in (0x20_0000, 0x21_0000):
        guest.ram.write(leaf + 64 * 2, guest.cd.pack())
        guest.cd.asid += 1
    guest.ram.write(CDS, L1Cd(v=1, l2ptr=0x20_0000).pack())
    guest.ste.s1fmt, guest.ste.s1cdmax, guest.ste.s1dss = S1Fmt.L2_4K, 8, S1Dss.TERMINATE
    guest.table.map(VA, 0x5000)
    guest.start()
    lab.read(idev, VA, pasid=2)
    guest.ram.write(CDS, L1Cd(v=1, l2ptr=0x21_0000).pack())

    def asid() -> int:
        lab.read(idev, VA, pasid=2)
        context = lab.iommu.contexts.entries[master(idev), 2]
        assert context.cd is not None
        return context.cd.asid

    lab.invalidate(guest.viommu, Cmd.cfgi_cd(0x100, 2, leaf=True))
    assert asid() == 5
    lab.invalidate(guest.viommu, Cmd.cfgi_cd(0x100, 2, leaf=False))
    assert asid() == 6


def test_cfgi_ste_drops_the_cds_too_and_no_translations() -> None:
    lab = SmmuLab()
    idev = lab.device()
    guest = Guest(lab, idev)
    guest.table.map(VA, 0x5000)
    guest.start()
    lab.read(idev, VA)
    assert lab.iommu.contexts.entries
    assert lab.iommu.stes.entries
    for command in (Cmd.cfgi_ste(0x100), Cmd.cfgi_all()):
        lab.iommu.execute(command)
        assert not lab.iommu.contexts.entries
        assert not lab.iommu.stes.entries
        assert lab.iommu.iotlb.space((1, 5)).lookup(VA) is not None
        lab.read(idev, VA)


# ---- the device TLB ----


def test_what_an_atc_inv_reaches() -> None:
    lab = SmmuLab()
    idev = lab.device(ats=True, pasids=4)
    guest = Guest(lab, idev, s1cdmax=4, eats=1)
    guest.store_cd(guest.cd, 1)
    guest.store_cd(guest.cd, 2)
    for page in range(4):
        guest.table.map(VA + page * 4096, 0x5000 + page * 4096)
    guest.start()
    atc = master(idev).tlb
    assert atc is not None

    def held(command: Command) -> set[tuple[int | None, int]]:
        for pasid in (None, 1, 2):
            for page in range(4):
                lab.read(idev, VA + page * 4096, pasid=pasid)
        lab.invalidate(guest.viommu, command)
        return {(tag, entry.first - VA >> 12) for tag, space in atc.spaces.items() for entry in space.entries()}  # type: ignore[misc]

    everything = {(pasid, page) for pasid in (None, 1, 2) for page in range(4)}
    base = VA & -8192
    near = {page for page in range(4) if (VA + page * 4096) & -8192 == base}
    assert held(Cmd.atc_inv(0x100, VA, 0, ssid=1)) == everything - {(1, 0)}
    assert held(Cmd.atc_inv(0x100, VA, 1, ssid=2)) == everything - {(2, page) for page in near}
    assert held(Cmd.atc_inv(0x100, VA, 0)) == {(pasid, page) for pasid, page in everything if page}
    assert held(Cmd.atc_inv(0x100, ssid=1)) == {(pasid, page) for pasid, page in everything if pasid != 1}
    assert held(Cmd.atc_inv(0x100)) == set()


# ---- RESUME ----


@pytest.mark.parametrize(("resp", "state"), [(Resume.RETRY, "running"), (Resume.ABORT, "failed")])
def test_resume(resp: Resume, state: str) -> None:
    lab = SmmuLab()
    idev = lab.device(stall=True)
    guest = Guest(lab, idev, s=1)
    fault_id, _ = lab.c.fault_queue()
    lab.attach(idev, guest.hwpt(flags=4, fault=fault_id))
    dma = lab.dma(idev, op=DmaOp.READ, iova=VA)
    dma.run()
    lab.iommu.execute(Cmd.resume(0x100, dma.group, resp))
    assert dma.state.value == state


