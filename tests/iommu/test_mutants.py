"""The tests of walks and caches notice wrong walkers. In a process of its own, which forks one child per mutant."""

import subprocess
import sys
from pathlib import Path

from .mutants import MUTANTS, mutated


def test_every_mutant_changes_its_module() -> None:
    assert len(MUTANTS) >= 30
    assert len({mutant.words for mutant in MUTANTS}) == len(MUTANTS)
    for mutant in MUTANTS:
        compile(mutated(mutant), mutant.module, "exec")


def test_mutants_are_noticed() -> None:
    root = Path(__file__).parent.parent.parent
    done = subprocess.run(
        [sys.executable, "-m", "tests.iommu.mutants"], cwd=root, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
