"""The examples run, by themselves and against a given daemon."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from iommufd_client.testing import Daemon

EXAMPLES = sorted((Path(__file__).parents[2] / "clients" / "examples").glob("*.py"))


def run(example: Path, **environment: str) -> str:
    inherited = {name: text for name, text in os.environ.items() if name != "IOMMUFDD_SOCKET"}
    done = subprocess.run(
        [sys.executable, "-W", "error", str(example)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**inherited, **environment},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_an_example_runs(example: Path) -> None:
    assert run(example)


def test_the_vmm_on_a_given_daemon(iommufdd_daemon: Daemon) -> None:
    vmm = next(path for path in EXAMPLES if path.name == "vmm.py")
    text = run(vmm, IOMMUFDD_SOCKET=iommufdd_daemon.socket_path)
    assert text == run(vmm)
    assert text.splitlines()[-1] == (
        "[Errno 16] Device or resource busy: ioas 2 is in use by hwpt_paging 3"
    )
    assert len(vmm.read_text().splitlines()) <= 45
