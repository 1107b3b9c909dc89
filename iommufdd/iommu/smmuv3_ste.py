"""SMMUv3's STE and CD: which bits hardware looks at, and how the driver updates them (arm-smmu-v3.c).

An update is a list of groups of stores; after each group the driver invalidates the cached copy (CFGI, CMD_SYNC).
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

from iommufd_uapi.smmuv3 import Cd, Config, Eats, S1Dss, Ste

Words: TypeAlias = tuple[int, ...]
ENTRY_SIZE = 64
WORDS = struct.Struct("<8Q")
ZERO: Words = (0,) * 8
ALL: Words = (2**64 - 1,) * 8
ABORT_STE = Ste.abort().words()


def _or(*masks: Words) -> Words:
    return tuple(functools.reduce(int.__or__, words) for words in zip(*masks, strict=True))


_S1 = Ste.mask("s1fmt", "s1contextptr", "s1cdmax", "s1dss", "s1cir", "s1cor", "s1csh", "s1stalld", "strw", "eats",
               "mev", "s2vmid")  # fmt: skip
_S2 = Ste.mask("s2fwb", "eats", "shcfg", "mev", "s2vmid", "s2t0sz", "s2sl0", "s2ir0", "s2or0", "s2sh0", "s2tg",
               "s2ps", "s2aa64", "s2endi", "s2ptw", "s2s", "s2r", "s2ttb")  # fmt: skip
_SHCFG = Ste.mask("shcfg")


def ste_used(words: Words) -> Words:
    """arm_smmu_get_ste_used()"""
    ste = Ste.of(words)
    if not ste.v:
        return Ste.mask("v")
    used = Ste.mask("v", "config")
    if ste.config & 1:
        used = _or(used, _S1, _SHCFG if ste.s1dss == S1Dss.BYPASS else ZERO)
    if ste.config & 2:
        used = _or(used, _S2)
    return _or(used, _SHCFG) if ste.config == Config.BYPASS else used


def ste_safe(current: Words, target: Words) -> Words:
    """arm_smmu_get_ste_update_safe(): bits that may change at any time."""
    entries = Ste.of(current), Ste.of(target)
    split = any(ste.eats & Eats.S1CHK or ste.s2s for ste in entries)
    return _or(Ste.mask("mev"), ZERO if split else Ste(eats=Eats.TRANS).words())


_TTB0 = Cd.mask("t0sz", "tg0", "ir0", "or0", "sh0", "ttb0")


def cd_used(words: Words) -> Words:
    """arm_smmu_get_cd_used()"""
    cd = Cd.of(words)
    if not cd.v:
        return Cd.mask("v")
    return tuple(word & ~gone for word, gone in zip(ALL, _TTB0, strict=True)) if cd.epd0 else ALL


class Format(NamedTuple):
    """What an update must know of an entry's format."""

    name: str
    used: Callable[[Words], Words]
    safe: Callable[[Words, Words], Words]


STE_FORMAT = Format("STE", ste_used, ste_safe)
CD_FORMAT = Format("CD", cd_used, lambda current, target: ZERO)

Stores: TypeAlias = list[tuple[int, int]]  # (word, value)


def difference(entry: Words, target: Words, fmt: Format) -> tuple[list[int], Words]:
    """arm_smmu_entry_qword_diff(): the words whose used bits must change, and the entry with its unused bits new."""
    current, wanted, safe = fmt.used(entry), fmt.used(target), fmt.safe(entry, target)
    unused: list[int] = []
    changed: list[int] = []
    for at in range(8):
        kept = current[at] & ~(safe[at] & wanted[at])
        unused.append(entry[at] & kept | target[at] & ~kept)
        if unused[at] & wanted[at] != target[at]:
            changed.append(at)
    return changed, tuple(unused)


def update(entry: Words, target: Words, fmt: Format) -> list[Stores]:
    """arm_smmu_write_entry(): groups of stores, each followed by an invalidation of the cached copy."""
    changed, unused = difference(entry, target, fmt)
    everything = list(enumerate(target))
    if len(changed) == 1:
        critical = changed[0]
        first = [(at, value) for at, value in enumerate(unused) if at != critical]
        plan = [first, [(critical, target[critical])], everything]
    elif changed:
        plan = [[(0, 0)], everything[1:], [(0, target[0])]]
    else:
        plan = [everything]
    return _effective(entry, plan)


def _effective(entry: Words, plan: list[Stores]) -> list[Stores]:
    """entry_set(): words that are right already are not stored."""
    now = list(entry)
    groups: list[Stores] = []
    for stores in plan:
        group = [(at, value) for at, value in stores if now[at] != value]
        for at, value in group:
            now[at] = value
        if group:
            groups.append(group)
    return groups
