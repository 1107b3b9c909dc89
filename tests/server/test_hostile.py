"""Hostile clients against devices and their IOMMUs: nothing is a bug, nothing hangs, nothing stays."""

from __future__ import annotations

import gc
import os
import weakref
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from iommufd_client import Admin, DmaError
from iommufd_client.testing import Daemon
from tests.server.conftest import eventually
from tests.server.hardware import Guest, Served
from tests.server.hostile import Hostile

if TYPE_CHECKING:
    from iommufd_uapi import admin

PATIENCE = 0.3
ROUNDS = 3
STEPS = 250
MOVES = ("turns", "classes", "map_entries")  # of the counts: what need not come back


def left(before: admin.Counts, now: admin.Counts) -> dict[str, tuple[int, int]]:
    """What has not come back."""
    names = [name for name in before.__struct_fields__ if name not in MOVES]
    return {name: (getattr(before, name), getattr(now, name)) for name in names
            if getattr(before, name) != getattr(now, name)}  # fmt: skip


@pytest.mark.parametrize("machine", ["vtd", "smmuv3"])
@pytest.mark.parametrize("options", [(), ("--sanitize=fail",)], ids=["plain", "sanitized"])
def test_a_daemon_survives(machine: str, options: tuple[str, ...]) -> None:
    with Daemon("--page-request-timeout", str(PATIENCE), *options, terminate=False) as daemon:
        with Admin(daemon.admin_path) as connection:
            before = connection.stats()
        for seed in range(ROUNDS):
            Hostile(daemon.socket_path, machine, seed).run(STEPS)

            def nothing_left() -> bool:
                with Admin(daemon.admin_path) as connection:
                    return not left(before, connection.stats(classes=True))  # collects garbage

            eventually(nothing_left)
        assert "event=bug" not in daemon.log


@pytest.mark.parametrize("machine", ["vtd", "smmuv3"])
def test_no_memory_of_a_guest_waits_for_the_garbage_collector(tmp_path: Path, machine: str) -> None:
    """A fault that was kept had the frames of its walk, the sanitizer's log the entries that were dropped."""
    with Served(tmp_path, sanitize="fail", patience=PATIENCE) as served:
        gc.collect()
        gc.disable()
        try:
            for seed in range(125, 132):
                Hostile(served.socket_path, machine, seed).run(STEPS + 100)
            eventually(lambda: not guest_memory())
        finally:
            gc.enable()


def guest_memory() -> list[str]:
    """Descriptors of guest memory in this process."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
        except FileNotFoundError:
            pass
    return [name for name in found if "memfd:guest" in name]


def test_who_gave_up_last_does_not_keep_its_device(tmp_path: Path) -> None:
    with Served(tmp_path, patience=0.01) as served:
        with Guest(served, faults=True) as guest, served.admin() as connection:
            device = weakref.ref(served.context(guest.iommufd).instance.machine.devices["vfio0"])
            with pytest.raises(DmaError, match="in time"):
                connection.endpoint("vfio0", guest.iommufd).read(0x1000, 4)
        del guest

        def forgotten() -> bool:
            gc.collect()
            return device() is None

        eventually(forgotten)
