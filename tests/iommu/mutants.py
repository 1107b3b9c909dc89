"""Seeded mutants of the walker and its caches: would the tests notice? `python -m tests.iommu.mutants [NUMBER...]`

Each mutant is one replacement in the source of one module. A forked child imports the hardware with it and runs the
fast tests; a mutant that passes them all has survived.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import hypothesis  # noqa: F401  # loaded once, before the children are forked
import pytest  # noqa: F401

import iommufdd.context
import iommufdd.iommu.ops
import tests.core.harness  # noqa: F401

CHILDREN = 2
SECONDS = 20  # of processor time: a mutant that takes more hangs, which is noticed too


class Suite(NamedTuple):
    """Mutants, and what must notice them."""

    mutants: Sequence[Mutant]
    hardware: tuple[str, ...]  # how the names of the modules begin that are imported again
    checks: Callable[[], Iterable[Callable[[], object]]]  # those that stop most mutants first


class Mutant(NamedTuple):
    """One change: in words, and as text that occurs once."""

    module: str
    words: str
    old: str
    new: str


class Survived(NamedTuple):
    number: int
    mutant: Mutant


_X86 = [
    ("presence is looked for in bit 1", "P = 1 << 0", "P = 1 << 1"),
    ("R/W is bit 3", "RW = 1 << 1", "RW = 1 << 3"),
    ("U/S is bit 3", "US = 1 << 2", "US = 1 << 3"),
    ("A is bit 4", "\nA = 1 << 5", "\nA = 1 << 4"),
    ("D is bit 8", "\nD = 1 << 6", "\nD = 1 << 8"),
    ("PS is bit 8", "PS = 1 << 7", "PS = 1 << 8"),
    ("EA is bit 11", "EA = 1 << 10", "EA = 1 << 11"),
    ("XD is bit 62", "XD = 1 << 63", "XD = 1 << 62"),
    ("address bit 51 is ignored", "ADDRESS = 0x000F", "ADDRESS = 0x0007"),
    ("address bit 12 is ignored", "ADDRESS = 0x000F_FFFF_FFFF_F000", "ADDRESS = 0x000F_FFFF_FFFF_E000"),
    ("one bit less has to be canonical", "top = iova >> 9 * levels + 11", "top = iova >> 9 * levels + 12"),
    ("the upper half is not canonical", "return top == 0 or top == (1 << 64 - (9 * levels + 11)) - 1",
     "return top == 0"),
    ("anything is canonical", "if not canonical(iova, rules.levels)", "if False"),
    ("five levels are always canonical for four", "if not canonical(iova, rules.levels)",
     "if not canonical(iova, 5)"),
    ("indexes are a bit off", "iova >> 9 * level & 0xFF8", "iova >> 9 * level + 1 & 0xFF8"),
    ("indexes have 8 bits", "iova >> 9 * level & 0xFF8", "iova >> 9 * level & 0x7F8"),
    ("XD is read the wrong way round", "rights &= entry ^ XD", "rights &= entry"),
    ("only the last entry's rights count", "rights &= entry ^ XD", "rights = entry ^ XD"),
    ("PS is ignored", "leaf = level == 1 or entry & PS", "leaf = level == 1"),
    ("PS at level 1 is a table", "leaf = level == 1 or entry & PS", "leaf = entry & PS or level == 0"),
    ("one reserved address bit too few", "entry & ADDRESS & -(1 << rules.haw)", "entry & ADDRESS & -(2 << rules.haw)"),
    ("reserved bits are looked at in leaves only", "entry & ADDRESS & -(1 << rules.haw) or (",
     "(entry & ADDRESS & -(1 << rules.haw) and level == 1) or ("),
    ("the quick test forgets reserved bits", "mask = needed | ADDRESS & -(1 << haw)", "mask = needed"),
    ("the quick test forgets U/S", "needed = P if access & PRIV else P | US", "needed = P"),
    ("the quick test forgets R/W", "        needed |= RW\n", "        pass\n"),
    ("the quick test forgets XD", "        mask |= XD\n", "        pass\n"),
    ("large pages need not be aligned or there", "(large and _bad_size(level, entry, rules))",
     "(large and level > 3)"),
    ("large pages are not looked at", "or (leaf and level > 1):", "or (leaf and level > 3):"),
    ("unrolled: level 4's index is a bit off", "iova >> 36 & 0xFF8", "iova >> 37 & 0xFF8"),
    ("unrolled: level 1's index has 8 bits", "iova >> 9 & 0xFF8", "iova >> 9 & 0x7F8"),
    ("unrolled: PS of level 2 is ignored", "if e2 & table_mask != needed:", "if e2 & table_mask & ~PS != needed:"),
    ("unrolled: PS of level 3 is ignored", "if e3 & table_mask != needed:", "if e3 & table_mask & ~PS != needed:"),
    ("unrolled: PS of tables is ignored", "mask | PS | XD, mask", "mask | XD, mask"),
    ("unrolled: XD of tables is ignored", "mask | PS | XD, mask", "mask | PS, mask"),
    ("unrolled: level 3 is not tested", "if e3 & table_mask != needed:", "if not e3:"),
    ("unrolled: the leaf is not tested", "if e1 & mask != needed:", "if not e1:"),
    ("unrolled: rights of level 4 do not count", "_SHARED & e4 & e3 & e2 & e1", "_SHARED & e3 & e2 & e1"),
    ("unrolled: pages can always be executed", "_LEAF = XD | D", "_LEAF = D"),
    ("unrolled: a clean leaf is dirty", "e1 & _LEAF\n", "e1 & _LEAF | D\n"),
    ("unrolled: also in the upper half", "and not iova >> 47 and", "and"),
    ("PAT of a large page is reserved", " & ADDRESS & ~(1 << 12))", " & ADDRESS)"),
    ("1 GiB pages need no support", "level == 3 and rules.pages_1g", "level == 3"),
    ("512 GiB pages", "level == 3 and rules.pages_1g", "rules.pages_1g"),
    ("reserved bits come before permissions", "    if bad is None:\n        large", "    if entry & P:\n        large"),
    ("D is set in every entry", "access if leaf else 0, rules)", "access, rules)"),
    ("D is never set", "access if leaf else 0, rules)", "0, rules)"),
    ("D is set by reads", "if leaf_access & WRITE:", "if leaf_access:"),
    ("PAT is an address bit", "entry & ADDRESS & -size", "entry & ADDRESS"),
    ("a clean page may be written from the cache", "else entry & D\n", "else D\n"),
    ("the next table is a level too low", "        level -= 1", "        level -= 2"),
    ("absent entries are used", "if not entry & P:", "if not entry:"),
    ("supervisors need U/S too", "if not access & PRIV and not rights & US:", "if not rights & US:"),
    ("users need no U/S", "if not access & PRIV and not rights & US:", "if access & PRIV and not rights & US:"),
    ("WPE is ignored", "(rules.write_protect or not access & PRIV)", "(not access & PRIV)"),
    ("WPE is always on", "(rules.write_protect or not access & PRIV)", "True"),
    ("writes need no R/W", "if access & WRITE and not rights & RW and", "if False and"),
    ("XD is ignored", "if access & EXEC and not rights & XD:", "if False:"),
    ("reads are refused like writes", "if access & WRITE and not rights & RW and", "if not rights & RW and"),
    ("A is never set", "new = entry | A", "new = entry"),
    ("EA is set without EAFE", "if rules.extended_access:", "if not rules.extended_access:"),
    ("a supervisor page is cached for users", "users = USERS if rights & US else 0", "users = USERS"),
    ("a read-only page is cached for writes of users", "        users &= ~WRITES\n", "        pass\n"),
    ("a read-only page is cached for writes of supervisors", "            privs &= ~WRITES\n", "            pass\n"),
    ("a page without execution is cached for it", "        result &= ~EXECS\n", "        pass\n"),
    ("a clean leaf is cached for writes", "        if not rights & D:\n", "        if False:\n"),
    ("kept tables are used without a look at rights", "return _test(P, start.rights, access, rules) is None",
     "return True"),
]  # fmt: skip
_WALK = [
    ("four levels always", "levels=4 + entry.fspm", "levels=4"),
    ("1 GiB pages always", "pages_1g=description.pages_1g, ", ""),
    ("the host is 52 bits wide", "haw=description.haw,", "haw=52,"),
    ("EAFE is taken for WPE", "write_protect=entry.wpe", "write_protect=entry.eafe"),
    ("WPE is taken for EAFE", "extended_access=entry.eafe", "extended_access=entry.wpe"),
    ("SRE consents to execution", "(EXEC, self.entry.ere,", "(EXEC, self.entry.sre,"),
    ("ERE consents to privilege", "(PRIV, self.entry.sre,", "(PRIV, self.entry.ere,"),
    ("privilege needs no consent in a device TLB", "ALL if entry.sre else USERS", "ALL"),
    ("execution needs no consent in a device TLB", "ALL if entry.ere else ~EXECS", "ALL"),
    ("an entry may reach into the interrupts", "            entry = _beside_interrupts(entry, iova)\n",
     "            pass\n"),
    ("interrupt addresses are cached", "if self._cached and iova not in INTERRUPTS:", "if self._cached:"),
    ("nothing is cached", "if self._cached and iova not in INTERRUPTS:", "if False:"),
    ("fresh walks are cached", "if self._cached and iova not in INTERRUPTS:", "if True:"),
    ("the second stage is one address wider", "if ipa > context.domain.aperture_end:",
     "if ipa > context.domain.aperture_end + 1:"),
    ("the second stage has no width", "if ipa > context.domain.aperture_end:", "if False:"),
    ("the second stage's rights are ignored", "if not rights >> access & 1:", "if False:"),
    ("the second stage's R is ignored", "if not rights >> access & 1:", "if not rights >> (access & WRITE) & 1:"),
    ("the second stage's W is ignored", "if not rights >> access & 1:", "if not rights >> (access & ~WRITE) & 1:"),
    ("SSADE is ignored", "if context.entry.ssade:", "if False:"),
    ("SSADE is always on", "if context.entry.ssade:", "if True:"),
    ("a read is cached for writes that mark nothing", "return extent, rights & ~WRITES", "return extent, rights"),
    ("a dirty bit stands for more than its entry", "            extent = extent.part(",
     "            extent.part("),
    ("dirty pages are not marked", "            domain.dirty_bits.set_dirty(ipa)\n", "            pass\n"),
    ("second-stage dirty bits without snooping",
     "        if not self._context.entry.pwsnp:\n            raise self._stop",
     "        if False:\n            raise self._stop"),
    ("first-stage bits without snooping",
     "        if not self._context.entry.pwsnp:\n            raise TranslationFault",
     "        if False:\n            raise TranslationFault"),
    ("A is stored to read-only tables", "page = self._table(gpa, READ | WRITE, During.UPDATE)",
     "page = self._table(gpa, READ, During.UPDATE)"),
    ("a failed store is a failed read", "page = self._table(gpa, READ | WRITE, During.UPDATE)",
     "page = self._table(gpa, READ | WRITE, During.WALK)"),
    ("tables are read without their rights", "if found is not None and found.allowed >> access & 1:",
     "if found is not None:"),
    ("a table that is gone reads as it may", "if len(data) < 8:", "if len(data) > 8:"),
    ("only the low byte of an entry is stored", "(new & 0xFFFF).to_bytes(2", "(old & 0xFF00 | new & 0xFF).to_bytes(2"),
    ("kept tables are looked up by too few bits", "found = tables.get((level, iova >> 9 * level + 12))",
     "found = tables.get((level, iova >> 9 * level + 21))"),
    ("kept tables forget rights", "            rights &= entry ^ XD\n", ""),
    ("kept tables are a level too high", "            level -= 1\n", "            pass\n"),
    ("kept tables name the first entry's", "Kept(Start(entry &", "Kept(Start(steps[0][3] &"),
    ("a page's offset is lost", "gpa = leaf.out + iova - leaf.first", "gpa = leaf.out"),
]  # fmt: skip
_PASID = [
    ("AW is a bit off", "aw=w0 >> 2 & 7", "aw=w0 >> 3 & 7"),
    ("PGTT has two bits", "pgtt=w0 >> 6 & 7", "pgtt=w0 >> 6 & 3"),
    ("SSADE is bit 10", "ssade=bool(w0 >> 9 & 1)", "ssade=bool(w0 >> 10 & 1)"),
    ("PWSNP and PGSNP are swapped", "pwsnp=bool(w1 >> 23 & 1)", "pwsnp=bool(w1 >> 24 & 1)"),
    ("SRE and ERE are swapped", "sre=bool(w2 & 1), ere=bool(w2 >> 1 & 1)", "sre=bool(w2 >> 1 & 1), ere=bool(w2 & 1)"),
    ("FSPM has one bit", "fspm=w2 >> 2 & 3", "fspm=w2 >> 2 & 1"),
    ("WPE is bit 5", "wpe=bool(w2 >> 4 & 1)", "wpe=bool(w2 >> 5 & 1)"),
    ("EAFE is bit 6", "eafe=bool(w2 >> 7 & 1)", "eafe=bool(w2 >> 6 & 1)"),
    ("FPD is P", "fpd=bool(w0 & 2)", "fpd=bool(w0 & 1)"),
    ("an entry is present by FPD", "present=bool(w0 & 1)", "present=bool(w0 & 3)"),
    ("reserved bits beside DID are ignored", "0x7F << 16 | ", ""),
    ("reserved bits of pointers are ignored", "_BEYOND = 0xFFF << 52", "_BEYOND = 0"),
    ("no reserved bit counts", "return bool(words[0] &", "return bool(0 and words[0] &"),
    ("PASIDs share entries", "return ABSENT if leaf is None else WORDS.unpack_from(leaf, pasid % LEAF_ENTRIES",
     "return ABSENT if leaf is None else WORDS.unpack_from(leaf, pasid % 2"),
]  # fmt: skip
BOTH_STAGES = [
    ("an entry of both stages begins with the first's", "if ipa - extent.first < iova - first:", "if False:"),
    ("an entry of both stages ends with the first's", "if extent.last - ipa < last - iova:", "if False:"),
    ("the second stage's rights are forgotten", "granted & rights, ipa=start", "granted, ipa=start"),
    ("the first stage's rights are forgotten", "granted & rights, ipa=start", "rights, ipa=start"),
    ("an entry of both stages leads to the extent's start", "extent.pos + start - extent.first", "extent.pos"),
]  # of tlb.py
_TLB = [
    *BOTH_STAGES,
    ("a large entry has no end", "if at >= 0 and iova <= self.large[at].last:", "if at >= 0:"),
    ("a large entry ends a byte early", "if at >= 0 and iova <= self.large[at].last:",
     "if at >= 0 and iova < self.large[at].last:"),
    ("the pages of a large entry outlive it", "                entry.aliases.append(page)\n        return entry",
     "        return entry"),
    ("mode off keeps", "self.keeps = caches.mode != \"off\"\n        self.capacity",
     "self.keeps = True\n        self.capacity"),
    ("mode off keeps tables", "        if self.tlb.keeps:\n            capacity",
     "        if True:\n            capacity"),
    ("mode off keeps PASID entries", "self.keeps = caches.mode != \"off\"\n        self.entries",
     "self.keeps = True\n        self.entries"),
    ("the last page of a range stays", "lo, hi = first >> 12, last >> 12", "lo, hi = first >> 12, (last >> 12) - 1"),
    ("the first page of a range stays", "lo, hi = first >> 12, last >> 12", "lo, hi = (first >> 12) + 1, last >> 12"),
    ("a large entry that begins before the range stays", "at = max(bisect_right(self.large, first, key=_first) - 1, 0)",
     "at = bisect_right(self.large, first, key=_first)"),
    ("a range drops all large entries behind it", "            if entry.first > last:\n                break\n", ""),
    ("dropping all leaves tables", "        self.tables.clear()\n", ""),
    ("a range drops tables beside it", "first >> shift(key[0]) <= key[1] <= last >> shift(key[0])",
     "first >> shift(key[0]) <= key[1]"),
    ("a range drops the first table only", "first >> shift(key[0]) <= key[1] <= last >> shift(key[0])",
     "first >> shift(key[0]) == key[1]"),
    ("a full cache grows", "if self.capacity and len(self._all) >= self.capacity:", "if False:"),
    ("greedy evicts", "caches.iotlb_entries if caches.mode == \"faithful\" else 0", "caches.iotlb_entries"),
    ("the seed is ignored", "random.Random(caches.seed)", "random.Random(0)"),
    ("evictions are not repeatable", "random.Random(caches.seed)", "random.SystemRandom(caches.seed)"),
    ("a PASID-cache invalidation drops all", "if wanted(key, context)]\n        return [self.entries",
     "]\n        return [self.entries"),
    ("a PASID-cache invalidation drops nothing", "if wanted(key, context)]\n        return [self.entries",
     "if False]\n        return [self.entries"),
    ("spaces of different tags are one", "found = self.spaces.get(tag)\n        if found is None:",
     "found = next(iter(self.spaces.values()), None)\n        if found is None:"),
]  # fmt: skip
MUTANTS = [
    Mutant(module, *change)
    for module, changes in (("x86_64", _X86), ("vtd_walk", _WALK), ("vtd_pasid", _PASID), ("tlb", _TLB))
    for change in changes
]


def source(module: str) -> str:
    return (Path(iommufdd.iommu.ops.__file__).parent / f"{module}.py").read_text()


def mutated(mutant: Mutant) -> str:
    """The source with the change. AssertionError unless its text occurs once."""
    text = source(mutant.module)
    assert text.count(mutant.old) == 1, f"{mutant.module}: {mutant.old!r} occurs {text.count(mutant.old)} times"
    return text.replace(mutant.old, mutant.new)


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module of the hardware from other source."""

    def __init__(self, module: str, text: str) -> None:
        self.name = f"iommufdd.iommu.{module}"
        self.text = text

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        return importlib.util.spec_from_loader(fullname, self) if fullname == self.name else None

    def exec_module(self, module: ModuleType) -> None:
        exec(compile(self.text, self.name, "exec"), module.__dict__)


HARDWARE = ("walk", "x86_64", "tlb", "monitor", "replace", "dma", "endpoint", "vtd")


def forget_hardware(hardware: tuple[str, ...]) -> None:
    """So that it is imported again."""
    for name in list(sys.modules):
        parts = name.split(".")
        if parts[:2] == ["tests", "iommu"] and len(parts) > 2:
            del sys.modules[name]
        if parts[:2] == ["iommufdd", "iommu"] and len(parts) > 2 and parts[2].startswith(hardware):
            del sys.modules[name]


def checks() -> Iterator[Callable[[], object]]:
    """The fast tests, those that stop most mutants first."""
    import random

    faults = importlib.import_module("tests.iommu.test_vtd_faults")
    walks = importlib.import_module("tests.iommu.walk_checks").CHECKS
    drive = importlib.import_module("tests.iommu.cache_model").drive
    caches = importlib.import_module("tests.iommu.test_vtd_cache")
    walk_tests = importlib.import_module("tests.iommu.test_vtd_walk")
    yield walks["the_same_through_every_cache"]
    yield from (lambda mode=mode: drive(mode, random.Random(mode), 60) for mode in ("greedy", "faithful", "off"))
    yield walks["an_index_is_nine_bits_of_each_level"]
    yield caches.test_evictions_follow_the_seed
    yield caches.test_a_large_page_goes_as_a_whole
    yield caches.test_a_pasid_entry_is_cached_until_it_is_invalidated
    yield caches.test_dirty_tracking_flushes_what_was_cached_without_it
    yield walk_tests.test_faults_are_recorded_unless_fpd_is_set
    yield walk_tests.test_a_fresh_walk_leaves_no_trace
    yield walk_tests.test_the_entries_used_are_told
    yield from (lambda code=code: faults.test_reason(code) for code in faults.CASES)
    yield from walks.values()


def noticed(module: str, text: str, suite: Suite) -> bool:
    """In a child: some test fails."""
    forget_hardware(suite.hardware)
    sys.meta_path.insert(0, Finder(module, text))
    try:
        for one in suite.checks():
            one()
    except BaseException as error:
        if "-v" in sys.argv:
            print(f"{type(error).__name__}: {error}")
        return True
    return False


def fork(module: str, text: str, suite: Suite) -> int:
    """The child's pid; it ends with 1 when a test failed, with 0 when none did, and by SIGPROF when it hangs."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        code = 2
        try:
            code = int(noticed(module, text, suite))
            sys.stdout.flush()
        finally:
            os._exit(code)
    return pid


def run(numbers: Sequence[int], suite: Suite) -> list[Survived]:
    """The mutants that no test has noticed. The unchanged source must pass."""
    first = suite.mutants[0].module
    status = os.waitpid(fork(first, source(first), suite), 0)[1]
    assert status == 0, "the tests fail without any mutant"
    running: dict[int, int] = {}
    survived: list[Survived] = []
    waiting = list(numbers)
    while waiting or running:
        while waiting and len(running) < CHILDREN:
            number = waiting.pop(0)
            mutant = suite.mutants[number]
            running[fork(mutant.module, mutated(mutant), suite)] = number
        pid, status = os.wait()
        number = running.pop(pid)
        assert status != 2 << 8
        if status == 0:
            survived.append(Survived(number, suite.mutants[number]))
    return survived


def main(suite: Suite) -> int:
    """How many were noticed; 1 when fewer than 95 %."""
    start = time.monotonic()
    numbers = [int(arg) for arg in sys.argv[1:] if arg.isdigit()] or range(len(suite.mutants))
    survived = run(numbers, suite)
    for number, mutant in survived:
        print(f"survived: {number} {mutant.module}: {mutant.words}")
    print(f"{len(numbers) - len(survived)} of {len(numbers)} mutants noticed, {time.monotonic() - start:.1f} s")
    return int(len(survived) > 0.05 * len(numbers))


if __name__ == "__main__":
    sys.exit(main(Suite(MUTANTS, HARDWARE, checks)))
