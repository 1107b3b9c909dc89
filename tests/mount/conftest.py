"""`iommufdctl mount` with real processes, in mount namespaces of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from iommufd_client.testing import Daemon
from tests.run.conftest import compiled, linked

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["compiled", "linked"]

HABITS = Path(__file__).with_name("habits.py")
LIMIT = 60.0  # seconds for one command


class Mount:
    """The command, with what it needs to be found wherever the tests were started."""

    def __init__(self) -> None:
        path = os.pathsep.join(each or os.getcwd() for each in sys.path)
        self.environment = os.environ | {"PYTHONPATH": path}

    def words(self, *arguments: str | Path) -> list[str]:
        return [sys.executable, "-m", "iommufd_client.cli", "mount", *map(str, arguments)]

    def __call__(self, *arguments: str | Path, stdin: Path | None = None) -> subprocess.CompletedProcess[str]:
        with open(stdin or os.devnull, "rb") as source:
            return subprocess.run(
                self.words(*arguments),
                stdin=source,
                capture_output=True,
                timeout=LIMIT,
                env=self.environment,
                encoding="latin-1",
            )

    def habit(self, name: str, *options: str) -> subprocess.CompletedProcess[str]:
        return self(*options, "/dev/iommu", "--", sys.executable, HABITS, name)

    def start(self, *arguments: str | Path) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.words(*arguments),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=self.environment,
            text=True,
        )


@pytest.fixture(scope="session")
def mount() -> Mount:
    """Skips where nothing can be mounted: no /dev/fuse, or no right to it."""
    mount = Mount()
    probe = mount("/dev/iommu", "--", "true")
    if probe.returncode:
        pytest.skip(f"nothing can be mounted here: {probe.stderr.strip()}")
    return mount


@pytest.fixture(scope="session")
def daemon() -> Iterator[Daemon]:
    """One daemon for many mounts: each has a machine of its own all the same."""
    with Daemon() as daemon:
        yield daemon
