"""`iommufdctl run` with real processes: C programs compiled here, static and dynamic."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from iommufd_client.testing import Daemon

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = Path(__file__).parent
LIMIT = 60.0  # seconds for one run
COMPILED: dict[str, Path] = {}  # by linkage: the tests of mount have a fixture `compiled` of their own


class Run:
    """The command, with what it needs to be found wherever the tests were started."""

    verb = "run"

    def __init__(self) -> None:
        path = os.pathsep.join(each or os.getcwd() for each in sys.path)
        self.environment = os.environ | {"PYTHONPATH": path}

    def words(self, *arguments: str | Path) -> list[str]:
        return [sys.executable, "-m", "iommufd_client.cli", self.verb, *map(str, arguments)]

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

    def start(self, *arguments: str | Path, stdin: int | None = None) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.words(*arguments),
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=self.environment,
            text=True,
        )


@pytest.fixture(scope="session")
def run() -> Run:
    """Skips where this host lets nobody listen to seccomp (an old kernel, another listener around us)."""
    run = Run()
    probe = run("--", "true")
    if probe.returncode:
        pytest.skip(f"no seccomp user notification here: {probe.stderr.strip()}")
    return run


@pytest.fixture(scope="session", params=["dynamic", "static"])
def linked(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def compiled(linked: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the C programs, each under its name without the suffix."""
    if linked not in COMPILED:
        COMPILED[linked] = _compile(linked, tmp_path_factory.mktemp(linked))
    return COMPILED[linked]


def _compile(linked: str, folder: Path) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    options = ["-static"] if linked == "static" else []
    for source in HERE.glob("*.c"):
        made = subprocess.run(
            [compiler, "-O1", "-pthread", *options, "-o", folder / source.stem, source], capture_output=True, text=True
        )
        if made.returncode:
            pytest.skip(f"cannot compile {linked} programs: {made.stderr.strip().splitlines()[-1]}")
    return folder


@pytest.fixture(scope="session")
def daemon() -> Iterator[Daemon]:
    """One daemon for many runs: each has a machine of its own all the same."""
    with Daemon() as daemon:
        yield daemon
