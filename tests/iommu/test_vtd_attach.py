"""Where VT-d's domains fit, and the order of its refusals (intel/iommu.c, intel/nested.c, intel/pasid.c)."""

import errno

import pytest

from iommufdd.description import Caches, VtdIommu
from iommufdd.device import IommufdDevice
from iommufdd.iommu.group import IommuGroup
from iommufdd.iommu.vtd import Vtd
from iommufdd.iommu.vtd_domain import VtdPaging
from tests.core.harness import DIRTY, FAULT, NEST_PARENT, PASID

from .lab import Lab, behind, domain, endpoint, word

SRE, EAFE, WPE = 1, 2, 4
ROOT = 0x100000


def test_the_content_is_looked_at_when_it_is_attached() -> None:
    for keys, width, s1_flags, error in (
        ({}, 48, 0, 0),
        ({}, 57, 0, 0),
        ({"levels": (4,), "mgaw": 48}, 57, 0, errno.EINVAL),
        ({}, 47, 0, errno.EINVAL),
        ({}, 0, 0, errno.EINVAL),
        ({}, 48, SRE | EAFE | WPE, 0),
        ({"supervisor": False}, 48, SRE, errno.EINVAL),
        ({"supervisor": False}, 48, WPE, 0),
        ({"extended_access": False}, 48, EAFE, errno.EINVAL),
        ({}, 48, 1 << 40, 0),
    ):
        lab = Lab(**keys)
        idev = lab.device(pasids=4)
        ioas, _ = lab.ram()
        parent = lab.parent(idev, ioas, PASID)
        hwpt = lab.nested(idev, parent, ROOT | 0xABC, width=width, s1_flags=s1_flags, flags=PASID)
        for pasid in (0, 3):
            if error:
                lab.refuses(idev, hwpt, error, pasid)
                assert not word(lab, idev, 0, pasid) & 1
                assert not lab.iommu._dids
                continue
            lab.attach(idev, hwpt, pasid)
            w0, w1, w2 = (word(lab, idev, number, pasid) for number in range(3))
            assert w0 & 0x1C1 == 0xC1  # P, nested
            assert w1 == domain_id(lab, hwpt) | 1 << 87 - 64
            assert w2 >> 12 == ROOT >> 12
            assert w2 >> 2 & 3 == int(width == 57)
            assert bool(w2 & 1) == bool(s1_flags & SRE)
            assert bool(w2 >> 4 & 1) == bool(s1_flags & WPE and s1_flags & SRE)
            assert bool(w2 >> 7 & 1) == bool(s1_flags & EAFE)


def domain_id(lab: Lab, hwpt: int, unit: Vtd | None = None) -> int:
    return (unit or lab.iommu).did(domain(lab, hwpt))


def exhaust(lab: Lab) -> list[IommufdDevice]:
    """Take every domain id of a unit with 16, but for the device that comes later."""
    taken = []
    while len(lab.iommu._dids) < 14:
        idev = lab.device(pasids=4)
        lab.attach(idev, lab.c.hwpt(idev.id, lab.c.ioas_alloc(), PASID))
        taken.append(idev)
    return taken


def test_the_order_of_refusals_at_attach() -> None:
    """Compatibility EINVAL, ids ENOSPC, page faults ENODEV, content EINVAL; a paging RID asks for page faults first."""
    lab = Lab(domain_ids=16)
    idev = lab.device(pasids=4)
    fault, _ = lab.c.fault_queue()
    ioas, _ = lab.ram()
    parent = lab.parent(idev, ioas, PASID)
    bad = lab.nested(idev, parent, ROOT, width=1, flags=FAULT | PASID, fault=fault)
    paging = lab.c.hwpt(idev.id, ioas, FAULT | PASID, fault=fault)
    holders = exhaust(lab)
    for hwpt, pasid, error in (
        (bad, 0, errno.ENOSPC), (bad, 3, errno.ENOSPC), (paging, 0, errno.ENODEV), (paging, 3, errno.ENOSPC),
    ):  # fmt: skip
        lab.refuses(idev, hwpt, error, pasid)
    other = behind(lab, Vtd(VtdIommu(name="dmar1", mgaw=48, domain_ids=16)), pasids=4)
    for pasid in (0, 3):
        lab.refuses(other, bad, errno.EINVAL, pasid)
    lab.detach(holders[0])
    for hwpt in (bad, paging):
        for pasid in (0, 3):
            lab.refuses(idev, hwpt, errno.ENODEV, pasid)
    faulting = lab.device(pri=True, pasids=4)
    for pasid in (0, 3):
        lab.refuses(faulting, bad, errno.EINVAL, pasid)
        assert not endpoint(faulting).iopf.enabled
    lab.attach(faulting, paging)
    assert endpoint(faulting).iopf.enabled
    lab.detach(faulting)
    assert not endpoint(faulting).iopf.enabled


# ---- domain ids ----


def test_ids_run_out_and_come_back() -> None:
    lab = Lab(domain_ids=16)
    holders = exhaust(lab)
    assert sorted(held[0] for held in lab.iommu._dids.values()) == list(range(2, 16))
    idev = lab.device(pasids=4)
    ioas = lab.c.ioas_alloc()
    automatic = lab.c.ioas_alloc()
    lab.refuses(idev, ioas, errno.ENOSPC)
    shared = lab.c.ictx.objects
    lab.detach(holders[3])
    hwpt = lab.attach(idev, ioas)
    assert domain_id(lab, hwpt) == 5
    again = lab.device()
    assert lab.attach(again, ioas) == hwpt  # the same domain has its id already
    assert shared.get(hwpt) is not None
    lab.refuses(lab.device(), automatic, errno.ENOSPC)


def test_the_rid_leaves_its_domain_before_it_takes_another() -> None:
    """So its id is free for the new one, unless somebody else uses it; a PASID takes the new one first."""
    lab = Lab(domain_ids=16)
    holders = exhaust(lab)
    idev = holders[0]
    old = idev.igroup.pasid_attach[0].hwpt.id
    did = domain_id(lab, old)
    new = lab.c.hwpt(idev.id, lab.ram()[0], PASID)
    lab.replace(idev, new)
    assert domain_id(lab, new) == did
    assert lab.read(idev, 0x1000) == bytes(8)
    lab.replace(idev, old)
    assert domain_id(lab, old) == did
    lab.attach(holders[1], old, 3)
    lab.refuses(idev, new, errno.ENOSPC, replacing=True)
    lab.refuses(holders[1], new, errno.ENOSPC, 3, replacing=True)
    lab.detach(holders[1], 3)
    lab.attach(idev, old, 3)
    lab.detach(idev)
    lab.refuses(idev, new, errno.ENOSPC, 3, replacing=True)
    lab.detach(idev, 3)
    lab.attach(idev, new, 3)
    for holder in holders:
        for pasid in (0, 3):
            lab.detach(holder, pasid)
    assert not lab.iommu._dids
    assert not lab.iommu._taken


def test_an_id_taken_over_after_a_refusal_stays_with_the_old_domain() -> None:
    lab = Lab(domain_ids=16)
    idev = exhaust(lab)[0]
    old = idev.igroup.pasid_attach[0].hwpt.id
    did = domain_id(lab, old)
    parent = lab.parent(idev, lab.ram()[0])
    bad = lab.nested(idev, parent, ROOT, width=3, flags=PASID)
    lab.refuses(idev, bad, errno.EINVAL, replacing=True)
    assert domain_id(lab, old) == did
    lab.refuses(lab.device(), lab.c.ioas_alloc(), errno.ENOSPC)
    lab.detach(idev)
    lab.attach(lab.device(), lab.c.ioas_alloc())


def test_as_many_ids_as_the_register_says() -> None:
    """CAP.ND counts in powers of four."""
    for domain_ids, there in ((16, 16), (63, 16), (64, 64), (255, 64), (65536, 65536)):
        unit = Vtd(VtdIommu(name="dmar0", domain_ids=domain_ids))
        assert 1 << 4 + 2 * (unit.cap & 7) == there
    lab = Lab(domain_ids=63)
    exhaust(lab)
    lab.refuses(lab.device(), lab.c.ioas_alloc(), errno.ENOSPC)


# ---- two units (3.2) ----

LESS: list[tuple[dict[str, object], int]] = [  # (what the other unit has not, flags of a domain that needs it)
    ({"first_stage": False}, 0),
    ({"coherent_walk": False}, 0),
    ({"coherent_walk": False}, NEST_PARENT),
    ({"levels": (4,), "mgaw": 48}, 0),
    ({"levels": (4,)}, NEST_PARENT),
    ({"mgaw": 48}, NEST_PARENT),
    ({"pages_1g": False}, 0),
    ({"pages_1g": False}, NEST_PARENT),
    ({"pages_2m": False}, NEST_PARENT),
    ({"access_dirty": False}, DIRTY),
    ({"nested": False}, NEST_PARENT),
    ({"second_stage": False}, NEST_PARENT),
    ({"caching_mode": True}, NEST_PARENT),
    ({"snoop_control": False}, NEST_PARENT),  # its maker's device has had it forced
]
MORE: list[tuple[dict[str, object], int]] = [
    ({"nested": False}, 0),
    ({"nested": False}, DIRTY),
    ({"pages_2m": False}, 0),
    ({"access_dirty": False}, NEST_PARENT),
    ({"first_stage": False}, NEST_PARENT),
    ({"caching_mode": True}, 0),
    ({"second_stage": False}, 0),
    ({"snoop_control": False}, 0),
]


@pytest.mark.parametrize(("keys", "flags"), LESS + MORE)
def test_a_domain_of_another_unit(keys: dict[str, object], flags: int) -> None:
    refused = (keys, flags) in LESS
    lab = Lab()
    mine = lab.device(pasids=4)
    unit = Vtd(VtdIommu(name="dmar1", caches=Caches(mode="greedy"), **keys))  # type: ignore[arg-type]
    other = behind(lab, unit, pasids=4)
    ioas, ram = lab.ram()
    ram.write(0x2000, b"memory")
    hwpt = lab.c.hwpt(mine.id, ioas, flags | PASID)
    lab.attach(mine, hwpt)
    for pasid in (0, 3):
        if refused:
            lab.refuses(other, hwpt, errno.EINVAL, pasid)
            assert not unit._dids
            assert not unit.roots
        else:
            lab.attach(other, hwpt, pasid)
            assert lab.read(other, 0x2000, 6, pasid or None) == b"memory"
    assert lab.read(mine, 0x2000, 6) == b"memory"


def test_domains_of_weaker_units_fit_stronger_ones() -> None:
    """Not the other way round only: what is less in the domain's maker is no hindrance."""
    for keys in ({"coherent_walk": False}, {"mgaw": 48}, {"pages_1g": False}, {"pages_2m": False},
                 {"caching_mode": True}, {"access_dirty": False}):  # fmt: skip
        lab = Lab(**keys)
        mine = lab.device()
        other = behind(lab, Vtd(VtdIommu(name="dmar1")))
        for flags in (0, NEST_PARENT):
            hwpt = lab.c.hwpt(mine.id, lab.ram()[0], flags)
            lab.attach(other, hwpt)
            assert lab.read(other, 0x1000) == bytes(8)
            lab.detach(other)


def test_automatic_domains_are_shared_where_they_fit() -> None:
    """EINVAL lets the search go on; ids are each unit's own."""
    lab = Lab()
    unit = Vtd(VtdIommu(name="dmar1"))
    weak = Vtd(VtdIommu(name="dmar2", first_stage=False))
    ioas, ram = lab.ram()
    ram.write(0, b"shared")
    filler = lab.device()
    lab.attach(filler, lab.c.ioas_alloc())
    mine, same, odd, second = lab.device(), behind(lab, unit), behind(lab, weak), behind(lab, weak)
    hwpt = lab.attach(mine, ioas)
    assert lab.attach(same, ioas) == hwpt
    assert (domain_id(lab, hwpt), domain_id(lab, hwpt, unit)) == (3, 2)
    another = lab.attach(odd, ioas)
    assert another != hwpt
    assert lab.attach(second, ioas) == another
    for idev in (mine, same, odd, second):
        assert lab.read(idev, 0, 6) == b"shared"
    lab.c.unmap(ioas, 0, 0x400000)
    for idev in (mine, same):
        assert lab.fault(idev, 0) == 0x71
    for idev in (odd, second):
        assert lab.fault(idev, 0) == 0x79
    root = domain(lab, hwpt)
    assert isinstance(root, VtdPaging)
    lab.detach(same)
    lab.detach(mine)
    assert lab.c.ictx.objects.get(hwpt) is None
    assert root.root not in unit.roots  # a unit forgets tables that are gone
    assert root.root not in lab.iommu.roots


def test_a_nested_domain_follows_its_parent_to_another_unit() -> None:
    lab = Lab()
    unit = Vtd(VtdIommu(name="dmar1"))
    mine, other = lab.device(), behind(lab, unit)
    hwpt, ram, table = lab.guest(mine)
    table.map(0x7000, 0x5000)
    ram.write(0x5000, b"both")
    lab.attach(mine, hwpt)
    lab.attach(other, hwpt)
    assert lab.read(mine, 0x7000, 4) == lab.read(other, 0x7000, 4) == b"both"


def test_a_group_is_switched_together_or_not_at_all() -> None:
    """One member sits behind a unit that the domain does not fit."""
    lab = Lab()
    group = IommuGroup(lab.iommu.blocked_domain)
    first = lab.device(group=group)
    weak = Vtd(VtdIommu(name="dmar1", first_stage=False))
    second = behind(lab, weak, group=group)
    ioas, _ = lab.ram()
    hwpt = lab.c.hwpt(first.id, ioas)
    lab.refuses(first, hwpt, errno.EINVAL)
    assert lab.fault(first, 0) == 0x59
    assert lab.fault(second, 0) == 0x51
    assert not lab.iommu._dids
    assert not weak._dids


# ---- the driver's own order of stores ----


def test_in_mode_vendor_a_refused_rid_stays_blocked() -> None:
    """quirk: and what comes after starts from what is there."""
    lab = Lab()
    lab.iommu.vendor_replace = True
    idev, other = lab.device(), lab.device()
    ioas, _ = lab.ram()
    parent = lab.parent(idev, ioas)
    bad = lab.nested(idev, parent, ROOT, width=3)
    for one in (idev, other):
        lab.attach(one, ioas)
    lab.refuses(idev, bad, errno.EINVAL, replacing=True)
    assert lab.fault(idev, 0x1000) == 0x59
    stores: list[int] = []
    lab.iommu.stored = lambda dev, pasid: stores.append(lab.iommu.table(dev).read(pasid)[0] & 1)
    lab.detach(other)
    assert stores[0] == 0  # its own entry went
    assert lab.fault(other, 0x1000) == 0x59
    lab.replace(idev, parent)
    assert lab.read(idev, 0x1000) == bytes(8)
