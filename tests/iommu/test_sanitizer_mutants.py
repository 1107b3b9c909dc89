"""The programs of wrong.py and right.py are enough to notice a sanitizer that is subtly wrong itself."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

import iommufdd.finding
import iommufdd.sanitizer

from . import vmm
from .right import RIGHT, must_be_left_alone
from .wrong import WRONG, must_be_told

SOURCES = {module.__name__: Path(str(module.__file__)).read_text() for module in (iommufdd.finding, iommufdd.sanitizer)}


class Mutant(NamedTuple):
    """One change of the source."""

    name: str
    module: str
    old: str
    new: str


FINDING, SANITIZER = "iommufdd.finding", "iommufdd.sanitizer"
MUTANTS = (
    Mutant(
        "the range of an invalidation is not looked at", FINDING,
        "if what.first > self.last or what.last < self.first:",
        "if False:",
    ),
    Mutant(
        "the tag is not looked at", FINDING,
        "if not _reaches(due, what):\n            return",
        "if False:\n            return",
    ),
    Mutant(
        "LEAF is not looked at", FINDING,
        "if what.leaf and not due.leaf:",
        "if False:",
    ),
    Mutant(
        "LEAF is never enough", FINDING,
        "if what.leaf and not due.leaf:",
        "if what.leaf:",
    ),
    Mutant(
        "any cache's invalidation will do", FINDING,
        "return what.cache == due.cache or",
        "return True or",
    ),
    Mutant(
        "bits that hardware sets count as changes", FINDING,
        "old.entry & ~ignored, new.entry & ~ignored",
        "old.entry, new.entry",
    ),
    Mutant(
        "the last entry walked is blamed", FINDING,
        "both[at][0].entry ^ both[at][1].entry) & ~ignored]",
        "both[at][0].entry ^ both[at][1].entry) & ~ignored] + [len(both) - 1]",
    ),
    Mutant(
        "a large page's split counts as a leaf", FINDING,
        " and at == len(now) - 1",
        "",
    ),
    Mutant(
        "a wrong invalidation before the fill is named", FINDING,
        "elif came.at < self.since:",
        "elif False:",
    ),
    Mutant(
        "the driver's flush settles a guest's change", FINDING,
        "(what.user or not due.user) and ",
        "",
    ),
    Mutant(
        "only a user's flush settles anything", FINDING,
        "(what.user or not due.user)",
        "what.user",
    ),
    Mutant(
        "what is pending is dropped at the end", SANITIZER,
        "self._report(key, self._pending.pop(key))",
        "self._pending.pop(key)",
    ),
    Mutant(
        "every end is everybody's", SANITIZER,
        "if wanted(finding)]:\n            self._report",
        "]:\n            self._report",
    ),
    Mutant(
        "only the first page of a stretch is compared", SANITIZER,
        "while self._fresh_last < iova + count - 1:",
        "while False:",
    ),
    Mutant(
        "faults are not looked at", SANITIZER,
        "if change is None or",
        "if True or",
    ),
    Mutant(
        "a device TLB is taken for the IOTLB", SANITIZER,
        "DEVICE_TLB if entry.origin is not None else",
        "",
    ),
    Mutant(
        "a kept table is taken for the IOTLB", SANITIZER,
        "return KEPT_TABLE, now, entry.seq",
        "return \"IOTLB\", now, entry.seq",
    ),
    Mutant(
        "a stale use is reported at once", SANITIZER,
        "self._pending[key] = finding\n",
        "self._report(key, finding)\n",
    ),
    Mutant(
        "rights are not compared", SANITIZER,
        "steps, says = fault.steps, str(fault)\n",
        "return\n",
    ),
)  # fmt: skip


def load(mutant: Mutant | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the programs be watched by a sanitizer made of this source."""
    for name, source in SOURCES.items():
        if mutant is not None and mutant.module == name:
            assert source.count(mutant.old) == 1, mutant.name
            source = source.replace(mutant.old, mutant.new)
        module = ModuleType(name)
        module.__package__ = "iommufdd"
        monkeypatch.setitem(sys.modules, name, module)
        exec(compile(source, name, "exec"), module.__dict__)
    monkeypatch.setattr(vmm, "Sanitizer", sys.modules[SANITIZER].Sanitizer)


def misjudged() -> list[str]:
    """The programs that are not judged as they should be."""
    found = []
    for programs, judge in ((WRONG, must_be_told), (RIGHT, must_be_left_alone)):
        for program in programs:
            try:
                judge(*program())
            except Exception:
                found.append(program.__name__)
    return found


def test_as_it_is_all_programs_are_judged_well(monkeypatch: pytest.MonkeyPatch) -> None:
    load(None, monkeypatch)
    assert misjudged() == []


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name.replace(" ", "-"))
def test_a_mutant_is_noticed(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    load(mutant, monkeypatch)
    assert misjudged()
