"""Seeded mistakes in lpae.py, and the walks that must notice them."""

from __future__ import annotations

import functools
import importlib.util
import random
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from iommufdd.iommu import lpae

from . import lpae_reference as naive

SOURCE = Path(lpae.__file__).read_text()
WALKS = 6000

MUTANTS: list[tuple[str, str]] = [
    ("AP1 = 1 << 6", "AP1 = 1 << 5"),
    ("AP2 = 1 << 7 ", "AP2 = 1 << 8 "),
    ("S2R = 1 << 6", "S2R = 1 << 7"),
    ("S2W = 1 << 7", "S2W = 1 << 6"),
    ("AF = 1 << 10", "AF = 1 << 11"),
    ("DBM = 1 << 51", "DBM = 1 << 55"),
    ("CONTIGUOUS = 1 << 52", "CONTIGUOUS = 1 << 50"),
    ("PXN = 1 << 53", "PXN = 1 << 54"),
    ("XN = 1 << 54", "XN = 1 << 55"),
    ("PXN_TABLE = 1 << 59", "PXN_TABLE = 1 << 60"),
    ("XN_TABLE = 1 << 60", "XN_TABLE = 1 << 63"),
    ("AP_TABLE_PRIV = 1 << 61", "AP_TABLE_PRIV = 1 << 63"),
    ("AP_TABLE_RO = 1 << 62", "AP_TABLE_RO = 1 << 61"),
    ("12: {2, 3}, 14: {2}", "12: {2, 3}, 14: {2, 3}"),
    ("12: {2, 3}, 14: {2}", "12: {2}, 14: {2}"),
    ("12: {2, 3}, 14: {2}, 16: {2}", "12: {2, 3}, 14: {2}, 16: set()"),
    ("14: {1: 7, 2: 5}", "14: {1: 5, 2: 5}"),
    ("14: {1: 7, 2: 5}", "14: {1: 7, 2: 7}"),
    ("16: {1: 5, 2: 5}}", "16: {1: 5, 2: 4}}"),
    ("12: {1: 4, 2: 4, 3: 4}", "12: {1: 4, 2: 4}"),
    ("self.bits = 64 - self.tsz", "self.bits = 63 - self.tsz"),
    ("stride = self.granule - 3", "stride = 9"),
    ("max(-((self.granule - self.bits) // stride), 1)", "max((self.bits - self.granule) // stride, 1)"),
    ("self.start_level or max", "max"),
    ("(self.hd and self.ha) * _HD", "self.hd * _HD"),
    ("self.wxn * _WXN", "0"),
    ("self.pan * _PAN", "0"),
    ("self.xnx * _XNX", "0"),
    ("(1 << 48) - (1 << self.granule)", "(1 << 47) - (1 << self.granule)"),
    ("(1 << 48) - (1 << self.granule)", "(1 << 48) - (1 << 12)"),
    ("(1 << 52) - (1 << self.output)", "(1 << 48) - (1 << self.output)"),
    ("(1 << 52) - (1 << self.output)", "(1 << 52) - (2 << self.output)"),
    ("self.pa52 and self.granule == 16", "self.granule == 16"),
    ("self.pa52 and self.granule == 16", "False"),
    ("0 if self.had else HIERARCHY", "HIERARCHY"),
    ("({3} if self.high else set())", "set()"),
    ("(56 if self.tbi else 64)", "64"),
    ("(56 if self.tbi else 64)", "(55 if self.tbi else 64)"),
    ("self.compared if self.upper else 0", "0"),
    ("self.bits == 48 and not", "self.levels == 4 and not"),
    ("not (self.mode & ~_HD or self.haft or self.disabled)", "not (self.mode & ~_HD or self.haft)"),
    ("not (self.mode & ~_HD or self.haft or self.disabled)", "not (self.mode & ~_HD or self.disabled)"),
    ("not (self.mode & ~_HD or self.haft or self.disabled)", "not (self.haft or self.disabled)"),
    ("64 if rules.output == 52 else 8)", "8)"),
    ("8 << max(entries, 0)", "1 << rules.granule"),
    ("start.hierarchy | entry & rules.hierarchy)", "entry & rules.hierarchy)"),
    ("start.hierarchy | entry & rules.hierarchy)", "start.hierarchy)"),
    ("_address(entry, rules), start.level - 1", "entry & rules.address, start.level - 1"),
    ("start.level == 4 and ia >> rules.bits", "ia >> rules.bits"),
    ("rules.quick and start.level == 4 and ia >> rules.bits & rules.compared == rules.top",
     "rules.quick and start.level == 4"),
    ("if level < rules.levels:", "if True:"),
    ("if level < rules.levels:", "if False:"),
    ("if entry & 3 != 3 or level == 1:", "if entry & 3 != 3 or level <= 2:"),
    ("if table & rules.beyond:", "if False:"),
    ("if rules.haft and rules.ha and", "if rules.haft and"),
    ("if rules.haft and rules.ha and", "if rules.ha and"),
    ("        hierarchy |= entry\n", ""),
    ("out = _address(entry, rules) & -size", "out = _address(entry, rules)"),
    ("entry & RIGHTS | hierarchy & rules.hierarchy", "entry & RIGHTS | hierarchy"),
    ("        clean = False\n", "        pass\n"),
    ("Leaf(ia & -size, out & -size, size, granted & ~WRITES if clean else granted)",
     "Leaf(ia & -size, out & -size, size, granted)"),
    ("Leaf(ia & -size, out & -size, size, granted & ~WRITES if clean else granted)",
     "Leaf(ia & -size, out, size, granted & ~WRITES if clean else granted)"),
    ("rules.known[e3 & RIGHTS] = granted & ~WRITES if clean else granted", "granted"),
    ("ia >> 27 & 0xFF8", "ia >> 27 & 0xFF0"),
    ("    if e1 & ok != 3:\n        return None\n", ""),
    ("    if e2 & ok != 3:\n        return None\n", ""),
    ("mask = 3 | AF | CONTIGUOUS |", "mask = 3 | AF |"),
    ("mask = 3 | AF | CONTIGUOUS | beyond & (1 << 48) - 1", "mask = 3 | AF | CONTIGUOUS"),
    ("mask = 3 | AF | CONTIGUOUS | beyond & (1 << 48) - 1\n    needed = 3 | AF",
     "mask = 3 | CONTIGUOUS | beyond & (1 << 48) - 1\n    needed = 3"),
    ("        needed |= AP1\n", "        mask &= ~AP1\n"),
    ("        mask |= AP2\n", "        pass\n"),
    ("(PXN | AP1) if access & PRIV else XN", "PXN if access & PRIV else XN"),
    ("(PXN | AP1) if access & PRIV else XN", "XN if access & PRIV else PXN"),
    ("return 3 | beyond & (1 << 48) - 1 | hierarchy, mask", "return 3 | hierarchy, mask"),
    ("return 3 | beyond & (1 << 48) - 1 | hierarchy, mask", "return 3 | beyond & (1 << 48) - 1, mask"),
    ("if rules.disabled:", "if False:"),
    ("    if ia >> rules.bits & rules.compared != rules.top:", "    if False:"),
    ("(entry & 0xF000) << 36", "(entry & 0xF000) << 32"),
    ("if not entry & 1:", "if not entry & 3:"),
    ("if level > 1 else not entry & 2:", "if level > 1 else False:"),
    ("level not in rules.blocks if level > 1", "False if level > 1"),
    ("    if out & rules.beyond:\n", "    if False:\n"),
    ("if not (entry & AF or rules.ha or rules.affd):", "if not (entry & AF or rules.affd):"),
    ("if not (entry & AF or rules.ha or rules.affd):", "if not (entry & AF or rules.ha):"),
    ("if not (entry & AF or rules.ha or rules.affd):", "if False:"),
    ("new = entry | AF if rules.ha else entry", "new = entry | AF"),
    ("new = entry | AF if rules.ha else entry", "new = entry"),
    ("new | S2W if rules.stage == 2 else new & ~AP2", "new & ~AP2"),
    ("new | S2W if rules.stage == 2 else new & ~AP2", "new | S2W if rules.stage == 2 else new"),
    ("joined if joined <= rules.bits else shift", "joined"),
    ("joined if joined <= rules.bits else shift", "joined if joined < rules.bits else shift"),
    ("bits & DBM and bits & AP2)", "bits & AP2)"),
    ("bool(mode & _HD and bits & DBM and bits & AP2)", "False"),
    ("and not bits & AP_TABLE_PRIV\n", "\n"),
    ("(clean or not bits & AP2) and not bits & AP_TABLE_RO", "clean or not bits & AP2"),
    ("user_x = not bits & (XN | XN_TABLE)", "user_x = not bits & XN"),
    ("not bits & (PXN | PXN_TABLE) and not (user and write)", "not bits & PXN and not (user and write)"),
    ("not bits & (PXN | PXN_TABLE) and not (user and write)", "not bits & (PXN | PXN_TABLE)"),
    ("user_x = user_x and not (user and write)", "user_x = user_x and not write"),
    ("priv_x = priv_x and not write", "pass"),
    ("data = not (mode & _PAN and user)", "data = not mode & _PAN"),
    ("return granted, clean and write", "return granted, False"),
    ("bits & DBM and not bits & S2W)", "not bits & S2W)"),
    ("user_x = priv_x = not bits & XN", "user_x = priv_x = True"),
    ("user_x, priv_x = priv_x, not priv_x", "user_x, priv_x = not user_x, priv_x"),
    ("not privileged and access", "access"),
    ("access & (READ | WRITE) and not readable", "access & READ and not readable"),
    ("if access & READ and not readable:", "if False:"),
]  # fmt: skip


def mutated(old: str, new: str) -> ModuleType:
    """lpae.py with one thing changed."""
    assert SOURCE.count(old) == 1, old
    name = "iommufdd.iommu.lpae_mutant"
    spec = importlib.util.spec_from_loader(name, loader=None)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look for it
    try:
        exec(compile(SOURCE.replace(old, new, 1), name, "exec"), vars(module))
    finally:
        del sys.modules[name]
    return module


@functools.cache
def _walks() -> list[naive.Solved]:
    rng = random.Random(6)
    return [naive.solved(naive.random_case(rng)) for _ in range(WALKS)]


def battery(module: Any) -> None:
    """Walks that no mutant should survive. AssertionError, or whatever the mutant does."""
    for walk in _walks():
        naive.check(module, walk)
