"""What a machine file must make sense of, beyond types: one line for each complaint there can be.

A rule names the key to complain about, when, and what is said; {it} is the table.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Generic, NamedTuple, TypeAlias, TypeVar

from iommufd_uapi.iommufd_test import MOCK_PASID_WIDTH

from .description import (
    AnyIommu,
    Caches,
    DeviceDescription,
    MachineDescription,
    MockIommu,
    Reserved,
    SmmuV3Iommu,
    VtdIommu,
)

Key: TypeAlias = tuple[str | int, ...]  # ("iommu", 0, "mgaw")
T = TypeVar("T")

WIDTHS = {3: 39, 4: 48, 5: 57}  # levels of tables to bits of an address (VT-d spec, CAP.SAGAW)
DOMAIN_IDS = {4**bits for bits in range(2, 9)}  # CAP.ND is 2 * ND + 4 bits


class Rule(NamedTuple, Generic[T]):
    """`broken` makes `text` a complaint about `key` of the table."""

    key: str
    broken: Callable[[T, Facts], bool]
    text: str


class Facts:
    """A machine by what its tables refer to; where several claim one thing, the first has it."""

    def __init__(self, machine: MachineDescription) -> None:
        self.iommus = _first(machine.iommu, lambda iommu: iommu.name)
        self.devices = _first(machine.device, lambda device: device.name)
        self.slots = _first(machine.device, slot)
        self.streams = _streams(machine)
        self.groups = _first(machine.device, lambda device: device.group)

    def vtd(self, device: DeviceDescription) -> VtdIommu | None:
        """The VT-d unit that device is behind."""
        iommu = self.iommus.get(device.iommu)
        return iommu if isinstance(iommu, VtdIommu) else None

    def smmu(self, device: DeviceDescription) -> SmmuV3Iommu | None:
        """The SMMUv3 that device is behind."""
        iommu = self.iommus.get(device.iommu)
        return iommu if isinstance(iommu, SmmuV3Iommu) else None

    def mock(self, device: DeviceDescription) -> bool:
        """Device is behind an IOMMU of the selftest's kind."""
        return isinstance(self.iommus.get(device.iommu), MockIommu)


def slot(device: DeviceDescription) -> str:
    """The BDF with its segment, which is 0000 unless given."""
    return f"0000:{device.bdf}"[-len("0000:00:00.0") :]


def _streams(machine: MachineDescription) -> dict[tuple[str, int], DeviceDescription]:
    """Whose StreamIDs they are, by SMMU."""
    found: dict[tuple[str, int], DeviceDescription] = {}
    for device in machine.device:
        for sid in device.stream_ids:
            found.setdefault((device.iommu, sid), device)
    return found


def _first(tables: Iterable[T], value: Callable[[T], Hashable]) -> dict[Hashable, T]:
    found: dict[Hashable, T] = {}
    for table in tables:
        found.setdefault(value(table), table)
    return found


def _pasid_width(device: DeviceDescription, facts: Facts) -> int:
    vtd, smmu = facts.vtd(device), facts.smmu(device)
    return smmu.ssid_bits if smmu is not None else MOCK_PASID_WIDTH if vtd is None else vtd.pasid_width


RESERVED: tuple[Rule[Reserved], ...] = (
    Rule("start", lambda it, facts: it.start > it.last, "{it.start:#x} is beyond last, {it.last:#x}"),
    Rule("last", lambda it, facts: it.last >= 2**64, "{it.last:#x} has more than 64 bits"),
)
IOMMU: tuple[Rule[AnyIommu], ...] = (
    Rule("name", lambda it, facts: facts.iommus[it.name] is not it, "another IOMMU has the name {it.name}"),
)
VTD: tuple[Rule[VtdIommu], ...] = (
    Rule("first-stage", lambda it, facts: not (it.first_stage or it.second_stage), "neither first-stage nor second-stage: nothing is translated"),
    Rule("nested", lambda it, facts: it.nested and not (it.first_stage and it.second_stage), "needs first-stage and second-stage"),
    Rule("levels", lambda it, facts: it.second_stage and not it.levels, "second-stage needs a number of levels"),
    Rule("levels", lambda it, facts: len(set(it.levels)) < len(it.levels), "a number of levels is there twice"),
    Rule("levels", lambda it, facts: it.second_stage and bool(it.levels) and it.mgaw > WIDTHS[max(it.levels)], "tables of these levels do not reach {it.mgaw} bits (mgaw)"),
    Rule("domain-ids", lambda it, facts: it.domain_ids not in DOMAIN_IDS, "{it.domain_ids} is no power of 4"),
)
SMMUV3: tuple[Rule[SmmuV3Iommu], ...] = (
    Rule("stage1", lambda it, facts: not (it.stage1 or it.stage2), "neither stage1 nor stage2: nothing is translated"),
    Rule("granules", lambda it, facts: not it.granules, "no granule: nothing is translated"),
    Rule("granules", lambda it, facts: len(set(it.granules)) < len(it.granules), "a granule is there twice"),
    Rule("vax", lambda it, facts: it.vax == 52 and it.oas != 52, "needs oas = 52"),
    Rule("vcmdqs-log2", lambda it, facts: it.vcmdqs_log2 < it.vintfs_log2, "fewer than one VCMDQ for each VINTF (vintfs-log2)"),
    Rule("vintfs-log2", lambda it, facts: it.vintfs_log2 != 6 and not it.cmdqv, "needs cmdqv"),
    Rule("vcmdqs-log2", lambda it, facts: it.vcmdqs_log2 != 7 and not it.cmdqv, "needs cmdqv"),
    Rule("vintf-sids-log2", lambda it, facts: it.vintf_sids_log2 != 4 and not it.cmdqv, "needs cmdqv"),
)
MOCK: tuple[Rule[MockIommu], ...] = (
    Rule("reserved", lambda it, facts: bool(it.reserved), "the model mock has no reserved regions"),
    Rule("caches", lambda it, facts: it.caches != Caches(), "the model mock has no caches"),
)
DEVICE: tuple[Rule[DeviceDescription], ...] = (
    Rule("name", lambda it, facts: facts.devices[it.name] is not it, "another device has the name {it.name}"),
    Rule("bdf", lambda it, facts: facts.slots[slot(it)] is not it, "another device is at {it.bdf}"),
    Rule("iommu", lambda it, facts: it.iommu not in facts.iommus, "there is no IOMMU {it.iommu}"),
    Rule("group", lambda it, facts: it.group is not None and facts.groups[it.group].iommu != it.iommu, "group {it.group} has devices behind another IOMMU"),
    Rule("pri", lambda it, facts: it.pri and not it.ats, "needs ats"),
    Rule("pri", lambda it, facts: it.pri and (vtd := facts.vtd(it)) is not None and not vtd.page_requests, "{it.iommu} takes no page requests"),
    Rule("pasid-width", lambda it, facts: it.pasid_width > _pasid_width(it, facts), "{it.pasid_width} is more than the width of {it.iommu}"),
    Rule("pasid-width", lambda it, facts: facts.mock(it) and it.pasid_width not in (0, MOCK_PASID_WIDTH), "behind the model mock it is 0 or 20"),
    Rule("coherent", lambda it, facts: facts.mock(it) and not it.coherent, "behind the model mock all devices are coherent"),
    Rule("pri", lambda it, facts: it.pri and (smmu := facts.smmu(it)) is not None and not smmu.page_requests, "{it.iommu} takes no page requests"),
    Rule("coherent", lambda it, facts: facts.smmu(it) is not None and not it.coherent, "behind an SMMUv3 its coherent-walk decides"),
    Rule("stream-id", lambda it, facts: it.stream_id is not None and facts.smmu(it) is None, "{it.iommu} is no SMMUv3"),
    Rule("stream-id", lambda it, facts: (smmu := facts.smmu(it)) is not None and it.stream_ids[-1] >> smmu.sid_bits > 0, "StreamIDs of {it.iommu} are shorter (sid-bits)"),
    Rule("stream-id", lambda it, facts: facts.smmu(it) is not None and any(facts.streams[it.iommu, sid] is not it for sid in it.stream_ids), "another device has one of these StreamIDs"),
    Rule("streams", lambda it, facts: it.streams > 1 and facts.smmu(it) is None, "{it.iommu} is no SMMUv3"),
    Rule("stall", lambda it, facts: it.stall and facts.smmu(it) is None, "{it.iommu} is no SMMUv3"),
    Rule("stall", lambda it, facts: it.stall and (smmu := facts.smmu(it)) is not None and smmu.stall == "none", "{it.iommu} stalls nothing"),
    Rule("stall", lambda it, facts: it.stall and it.ats, "a device with ats does not stall"),
    Rule("canwbs", lambda it, facts: it.canwbs and facts.smmu(it) is None, "{it.iommu} is no SMMUv3"),
)


def complaints(machine: MachineDescription) -> Iterator[tuple[Key, str]]:
    """What makes no sense: (key, text) of each complaint, in the order of the tables."""
    facts = Facts(machine)
    for number, iommu in enumerate(machine.iommu):
        at: Key = ("iommu", number)
        yield from _judge(IOMMU, iommu, facts, at)
        if isinstance(iommu, VtdIommu):
            yield from _judge(VTD, iommu, facts, at)
        elif isinstance(iommu, SmmuV3Iommu):
            yield from _judge(SMMUV3, iommu, facts, at)
        else:
            yield from _judge(MOCK, iommu, facts, at)
        for index, region in enumerate(iommu.reserved):
            yield from _judge(RESERVED, region, facts, (*at, "reserved", index))
    for number, device in enumerate(machine.device):
        yield from _judge(DEVICE, device, facts, ("device", number))


def _judge(rules: Iterable[Rule[T]], it: T, facts: Facts, at: Key) -> Iterator[tuple[Key, str]]:
    for rule in rules:
        if rule.broken(it, facts):
            yield (*at, rule.key), rule.text.format(it=it)
