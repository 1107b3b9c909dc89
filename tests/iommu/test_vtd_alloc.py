"""What VT-d says of itself, and which domains it makes (intel/iommu.c, intel/nested.c)."""

import errno
import itertools
from typing import Any

import pytest

import iommufd_uapi.iommufd as uapi
from iommufdd.description import VtdIommu
from iommufdd.device import IommufdDevice
from iommufdd.iommu.vtd import Vtd
from iommufdd.iommu.vtd_domain import VtdPaging
from tests.core.harness import DIRTY, FAULT, NEST_PARENT, NOWHERE, PASID, READ, RW

from .lab import Lab, behind, domain, endpoint, word

SRE, EAFE, WPE = 1, 2, 4
ROOT = 0x100000


# ---- HWPT_ALLOC, paging (SEMANTICS 2.3) ----

CAPABILITIES = ("first_stage", "second_stage", "nested", "access_dirty", "coherent_walk")


SETS: list[dict[str, Any]] = [
    dict(zip(CAPABILITIES, values, strict=True))
    for values in itertools.product((True, False), repeat=len(CAPABILITIES))
]


def expected_stage(has: dict[str, Any], flags: int) -> int:
    """1, 2, or 0 for EOPNOTSUPP."""
    if flags in (0, PASID) and has["first_stage"]:
        return 1
    if flags & DIRTY and not (has["access_dirty"] and has["second_stage"] and has["coherent_walk"]):
        return 0
    if flags & NEST_PARENT and not has["nested"]:
        return 0
    return 2 if has["second_stage"] else 0


@pytest.mark.parametrize("has", SETS, ids=lambda has: "-".join(k for k, v in has.items() if v))
def test_sets_of_flags(has: dict[str, Any]) -> None:
    lab = Lab(**has)
    idev = lab.device(pasids=4)
    for flags in (a | b | c for a in (0, NEST_PARENT) for b in (0, DIRTY) for c in (0, PASID)):
        stage = expected_stage(has, flags)
        hwpt = lab.c.hwpt(idev.id, lab.c.ioas_alloc(), flags, expect=0 if stage else errno.EOPNOTSUPP)
        if stage:
            made = domain(lab, hwpt)
            assert isinstance(made, VtdPaging)
            assert (made.stage, made.nest_parent, made.dirty_ops is not None) == (
                stage, bool(flags & NEST_PARENT), bool(flags & DIRTY)
            )  # fmt: skip


def test_what_a_paging_hwpt_refuses() -> None:
    lab = Lab()
    idev = lab.device()
    ioas = lab.c.ioas_alloc()
    for flags in (1 << 4, 1 << 31, NEST_PARENT | 1 << 8, FAULT | NEST_PARENT):
        lab.c.hwpt(idev.id, ioas, flags, fault=NOWHERE, expect=errno.EOPNOTSUPP)
    data = lab.c.process.put(bytes(24))
    for data_type in (uapi.IOMMU_HWPT_DATA_VTD_S1, 77):
        cmd = uapi.HwptAlloc(dev_id=idev.id, pt_id=ioas, data_type=data_type, data_len=24, data_uptr=data)
        lab.c.ioctl(cmd, errno.EOPNOTSUPP)


@pytest.mark.parametrize(
    ("levels", "mgaw", "stage", "depth", "last"),
    [
        ((4, 5), 57, 1, 5, (1 << 56) - 1),
        ((4, 5), 52, 1, 5, (1 << 51) - 1),
        ((4, 5), 48, 1, 4, (1 << 47) - 1),
        ((4,), 57, 1, 4, (1 << 47) - 1),
        ((4,), 40, 1, 4, (1 << 39) - 1),
        ((4, 5), 57, 2, 5, (1 << 57) - 1),
        ((4, 5), 49, 2, 5, (1 << 49) - 1),
        ((4, 5), 48, 2, 5, (1 << 48) - 1),  # quirk: 4 levels would do
        ((4,), 57, 2, 4, (1 << 48) - 1),
        ((3, 4), 48, 2, 4, (1 << 48) - 1),
        ((3, 4), 39, 2, 4, (1 << 39) - 1),  # quirk: 3 levels would do
        ((3, 5), 39, 2, 5, (1 << 39) - 1),
        ((3,), 57, 2, 3, (1 << 39) - 1),
        ((3,), 36, 2, 3, (1 << 36) - 1),
    ],
)
def test_width(levels: tuple[int, ...], mgaw: int, stage: int, depth: int, last: int) -> None:
    """compute_vasz_lg2_fs(), compute_vasz_lg2_ss(): seen in the entry and in the IOAS's ranges."""
    lab = Lab(levels=levels, mgaw=mgaw)
    idev = lab.device()
    ioas = lab.c.ioas_alloc()
    hwpt = lab.c.hwpt(idev.id, ioas, DIRTY if stage == 2 else 0)
    assert lab.c.ranges(ioas) == [(0, last)]
    lab.attach(idev, hwpt)
    entry = word(lab, idev, 0)
    assert entry & 1
    assert entry >> 6 & 7 == stage
    if stage == 2:
        assert entry >> 2 & 7 == depth - 2
    else:
        assert word(lab, idev, 2) >> 2 & 3 == depth - 4
    assert lab.c.ranges(ioas) == [(0, 0xFEDFFFFF), (0xFEF00000, last)]


def test_a_nest_parent_has_no_read_only_entries() -> None:
    lab = Lab()
    idev = lab.device()
    ioas = lab.c.ioas_alloc()
    addr = lab.c.process.buffer()
    parent = lab.parent(idev, ioas)
    lab.c.map(ioas, addr, 4096, 0x1000, READ, expect=errno.EINVAL)
    lab.c.map(ioas, addr, 4096, 0x1000, RW)
    lab.c.destroy(parent)
    lab.c.map(ioas, addr, 4096, 0x8000, READ)
    lab.c.hwpt(idev.id, ioas, NEST_PARENT, expect=errno.EINVAL)
    lab.c.hwpt(idev.id, ioas, DIRTY)
    lab.c.hwpt(idev.id, ioas, NEST_PARENT, expect=errno.EINVAL)
    lab.c.unmap(ioas, 0x8000, 4096)
    lab.parent(idev, ioas)


# ---- HWPT_ALLOC, nested (2.4) ----


def nested_cmd(lab: Lab, idev: IommufdDevice, pt: int, length: int = 24, **keys: int) -> uapi.HwptAlloc:
    uptr = lab.c.process.put(uapi.HwptVtdS1(pgtbl_addr=ROOT, addr_width=48).pack() + bytes(16))
    return uapi.HwptAlloc(
        **{"dev_id": idev.id, "pt_id": pt, "data_type": uapi.IOMMU_HWPT_DATA_VTD_S1, "data_len": length,
           "data_uptr": uptr, **keys}
    )  # fmt: skip


def test_what_a_nested_hwpt_refuses_when_it_is_made() -> None:
    lab = Lab()
    idev = lab.device()
    ioas, _ = lab.ram()
    parent = lab.parent(idev, ioas)
    plain = lab.c.hwpt(idev.id, ioas, DIRTY)
    first = lab.c.hwpt(idev.id, ioas)
    other = lab.device()
    auto = lab.attach(other, ioas)
    good = lab.c.ioctl(nested_cmd(lab, idev, parent)).out_hwpt_id
    for pt, length, keys, error in (
        (parent, 24, {"flags": DIRTY}, errno.EOPNOTSUPP),
        (parent, 24, {"flags": NEST_PARENT}, errno.EOPNOTSUPP),
        (parent, 24, {"flags": 1 << 4}, errno.EOPNOTSUPP),
        (parent, 0, {"data_type": 0}, errno.EOPNOTSUPP),
        (parent, 24, {"data_type": 2}, errno.EOPNOTSUPP),
        (parent, 0, {}, errno.EINVAL),
        (plain, 24, {}, errno.EINVAL),
        (first, 24, {}, errno.EINVAL),
        (auto, 24, {}, errno.EINVAL),
        (good, 24, {}, errno.EINVAL),
        (idev.id, 24, {}, errno.EINVAL),
        (NOWHERE, 24, {}, errno.EINVAL),
        (plain, 24, {"data_type": 2}, errno.EINVAL),  # the core's look at the parent comes first
        (parent, 23, {}, errno.EINVAL),
        (parent, 25, {}, errno.EINVAL),
        (parent, 24, {"data_uptr": NOWHERE}, errno.EFAULT),
        (parent, 24, {"flags": FAULT, "fault_id": NOWHERE}, errno.ENOENT),
    ):
        lab.c.ioctl(nested_cmd(lab, idev, pt, length, **keys), error)
    lab.c.ioctl(nested_cmd(lab, idev, parent, flags=PASID))
    behind_nothing = behind(lab, Vtd(VtdIommu(name="dmar1", nested=False)))
    lab.c.ioctl(nested_cmd(lab, behind_nothing, parent), errno.EOPNOTSUPP)


# ---- devices ----


def test_pasids_are_those_that_both_have() -> None:
    """dev_iommu_get_max_pasids()"""
    for unit, device, both in ((20, 4, 16), (4, 20, 16), (0, 4, 0), (4, 0, 0), (1, 1, 2)):
        lab = Lab(pasid_width=unit)
        idev = lab.device(pasids=device)
        assert endpoint(idev).max_pasids == both
        info = lab.c.ioctl(uapi.HwInfo(dev_id=idev.id))
        assert info.out_max_pasid_log2 == max(both.bit_length() - 1, 0)


def test_hw_info() -> None:
    lab = Lab(levels=(3, 4), mgaw=40, haw=46, domain_ids=256, pasid_width=12, mamv=9, pages_1g=False, execute=True)
    idev = lab.device(ats=True)
    uptr = lab.c.process.put(b"\xff" * 32)
    info = lab.c.ioctl(uapi.HwInfo(dev_id=idev.id, data_uptr=uptr, data_len=32))
    data = lab.c.mm.read(uptr, 32)
    assert (info.data_len, info.data_type) == (24, uapi.IOMMU_HW_INFO_TYPE_INTEL_VTD)
    flags, cap, ecap = (int.from_bytes(data[at : at + size], "little") for at, size in ((0, 4), (8, 8), (16, 8)))
    assert flags == 1
    assert data[4:8] == bytes(4)
    assert data[24:] == bytes(8)
    for value, first, bits, expected in (
        (cap, 0, 3, 2), (cap, 7, 1, 0), (cap, 8, 5, 0b110), (cap, 16, 6, 39), (cap, 34, 4, 0b0001), (cap, 39, 1, 1),
        (cap, 48, 6, 9), (cap, 56, 1, 0), (cap, 60, 1, 0),
        (ecap, 2, 1, 1), (ecap, 26, 1, 1), (ecap, 29, 1, 1), (ecap, 30, 1, 1), (ecap, 31, 1, 1), (ecap, 34, 1, 1),
        (ecap, 35, 5, 11), (ecap, 40, 1, 1), (ecap, 43, 1, 1), (ecap, 45, 1, 1), (ecap, 46, 1, 1), (ecap, 47, 1, 1),
        (ecap, 48, 1, 1),
    ):  # fmt: skip
        assert value >> first & (1 << bits) - 1 == expected, (first, bits)
    ats_missing, dirty = 8, 1
    assert info.out_capabilities == dirty
    plain = lab.device()
    assert lab.c.ioctl(uapi.HwInfo(dev_id=plain.id)).out_capabilities == dirty | ats_missing
    short = lab.c.ioctl(uapi.HwInfo(dev_id=idev.id, data_uptr=lab.c.process.put(b"\xff" * 12), data_len=9))
    assert short.data_len == 24
    assert lab.c.mm.read(uptr, 12)[9:] == b"\xff" * 3
    for data_type, error in ((1, 0), (0, 0), (2, errno.EOPNOTSUPP), (3, errno.EOPNOTSUPP)):
        lab.c.ioctl(uapi.HwInfo(flags=1, dev_id=idev.id, data_type=data_type), error)
    bare = Lab(access_dirty=False)
    bare.c.ioctl(uapi.HwInfo(dev_id=NOWHERE), errno.ENOENT)
    assert bare.c.ioctl(uapi.HwInfo(dev_id=bare.device().id)).out_capabilities == ats_missing


