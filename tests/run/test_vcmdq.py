"""A VCMDQ under `iommufdctl run`: a program writes the registers that it has mapped, and no call tells the daemon."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .conftest import Run


def test_a_program_issues_commands_itself(run: Run) -> None:
    result = run("--machine", "tegra241", "--", sys.executable, Path(__file__).parent / "vcmdq.py")
    assert (result.returncode, result.stdout, result.stderr) == (0, "ok\n", "")
