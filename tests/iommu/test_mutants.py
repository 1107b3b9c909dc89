"""The tests of walks and caches notice wrong walkers. In a process of its own, which forks one child per mutant."""

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from . import mutants, mutants_smmuv3

ALL = "IOMMUFDD_ALL_MUTANTS" in os.environ
SMMUV3 = [str(number) for number in range(0, len(mutants_smmuv3.MUTANTS), 1 if ALL else 3)]


@pytest.mark.parametrize("module", [mutants, mutants_smmuv3])
def test_every_mutant_changes_its_module(module: ModuleType) -> None:
    assert len(module.MUTANTS) >= 30
    assert len({mutant.words for mutant in module.MUTANTS}) == len(module.MUTANTS)
    for mutant in module.MUTANTS:
        compile(mutants.mutated(mutant), mutant.module, "exec")


@pytest.mark.parametrize("words", [["mutants"], ["mutants_smmuv3", *SMMUV3]], ids=lambda words: words[0])
def test_mutants_are_noticed(words: list[str]) -> None:
    root = Path(__file__).parent.parent.parent
    done = subprocess.run(
        [sys.executable, "-m", f"tests.iommu.{words[0]}", *words[1:]],
        cwd=root, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
