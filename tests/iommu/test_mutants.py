"""The tests of walks and caches notice wrong walkers. In a process of its own, which forks one child per mutant."""

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from . import mutants, mutants_smmuv3


@pytest.mark.parametrize("module", [mutants, mutants_smmuv3])
def test_every_mutant_changes_its_module(module: ModuleType) -> None:
    assert len(module.MUTANTS) >= 30
    assert len({mutant.words for mutant in module.MUTANTS}) == len(module.MUTANTS)
    for mutant in module.MUTANTS:
        compile(mutants.mutated(mutant), mutant.module, "exec")


@pytest.mark.parametrize("module", ["mutants", "mutants_smmuv3"])
def test_mutants_are_noticed(module: str) -> None:
    root = Path(__file__).parent.parent.parent
    done = subprocess.run(
        [sys.executable, "-m", f"tests.iommu.{module}"], cwd=root, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
