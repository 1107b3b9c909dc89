"""`iommufdctl mount` with real processes, in mount namespaces of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from iommufd_client.testing import Daemon
from tests.run.conftest import LIMIT, Run, compiled, linked

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["LIMIT", "compiled", "linked"]

HABITS = Path(__file__).with_name("habits.py")


CAP_SYS_ADMIN = 1 << 21


def passthrough() -> bool:
    """Whether the kernel lets a daemon of ours give a file a file behind it."""
    with open("/proc/self/status", encoding="ascii") as file:
        caps = next(int(line.split()[1], 16) for line in file if line.startswith("CapEff"))
    with open("/proc/self/uid_map", encoding="ascii") as file:
        whole = file.read().split() == ["0", "0", "4294967295"]
    release = tuple(map(int, os.uname().release.split("-")[0].split(".")[:2]))
    return bool(caps & CAP_SYS_ADMIN) and whole and release >= (6, 9)


class Mount(Run):
    """The command under test."""

    verb = "mount"

    def habit(self, name: str, *options: str) -> subprocess.CompletedProcess[str]:
        return self(*options, "/dev/iommu", "--", sys.executable, HABITS, name)


@pytest.fixture(scope="session")
def mount() -> Mount:
    """Skips where nothing can be mounted: no /dev/fuse, or no right to it."""
    mount = Mount()
    probe = mount("/dev/iommu", "--", "true")
    if probe.returncode:
        pytest.skip(f"nothing can be mounted here: {probe.stderr.strip()}")
    return mount


@pytest.fixture(scope="session")
def exact(mount: Mount) -> Mount:
    """Skips where nobody may listen to seccomp, and where registers cannot be mapped."""
    probe = mount("--exact", "/dev/iommu", "--", "true")
    if probe.returncode:
        pytest.skip(f"no seccomp user notification here: {probe.stderr.strip()}")
    if os.uname().machine != "x86_64":
        pytest.skip("descriptors are given and registers mapped on x86-64 only")
    return mount


@pytest.fixture(scope="session")
def daemon() -> Iterator[Daemon]:
    """One daemon for many mounts: each has a machine of its own all the same."""
    with Daemon() as daemon:
        yield daemon
