"""`iommufdctl run --machine`: whose machine a program finds, and what keeps it from being started."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from iommufd_client.testing import Daemon

    from .conftest import Run

PATIENCE = 30.0
OPEN = "import os; os.open('/dev/iommu', os.O_RDWR); print('open', flush=True)"
OPEN_AND_WAIT = f"{OPEN}; input()"


@pytest.mark.parametrize("machine", ["vtd", "@vtd", "ci@mock", "FILE"])
def test_a_private_daemon_has_the_machine(run: Run, tmp_path: Path, machine: str) -> None:
    (tmp_path / "lab.toml").write_text('name = "lab"\n')
    machine = machine.replace("FILE", f"{tmp_path}/lab.toml")
    done = run("--machine", machine, "--", sys.executable, "-c", OPEN)
    assert (done.returncode, done.stdout, done.stderr) == (0, "open\n", "")


def test_nothing_is_started_without_its_machine(run: Run, tmp_path: Path, daemon: Daemon) -> None:
    bad = tmp_path / "bad.toml"
    bad.write_text("name = 3\n")
    socket = ("--socket-path", daemon.socket_path)
    for status, said, *options in (
        (1, "there is no machine 'none'; there are mock, smmuv3, tegra241, vtd", "none"),
        (1, "the daemon refuses: there is no machine 'none'; there are mock, smmuv3, tegra241, vtd", "@none"),
        (1, "the daemon refuses: there is no machine 'none'; there are mock, smmuv3, tegra241, vtd", "@none", *socket),
        (1, "the daemon refuses: 'vtd' is a machine: '@vtd' is a private one", "vtd", *socket),
        (1, f"{bad}:1: name: Expected `str`, got `int`", bad),
        (2, f"start it with --machine {bad}, and say --machine @NAME", bad, *socket),
    ):
        done = run("--machine", *options, "--", "echo", "started")
        assert (done.returncode, done.stdout) == (status, ""), options
        assert said in done.stderr
        assert "Traceback" not in done.stderr


def test_runs_of_one_name_share_a_machine(run: Run, daemon: Daemon) -> None:
    shared = ("--socket-path", daemon.socket_path, "--machine")
    words = ("--", sys.executable, "-c", OPEN_AND_WAIT)
    with run.start(*shared, "pair@vtd", *words, stdin=subprocess.PIPE) as one:
        assert one.stdout is not None
        assert one.stdout.readline() == "open\n"
        with run.start(*shared, "pair", *words, stdin=subprocess.PIPE) as two:
            assert two.stdout is not None
            assert two.stdout.readline() == "open\n"
            with daemon.admin() as admin:
                (pair,) = (instance for instance in admin.show().instances if instance.name == "pair")
            assert (pair.machine, len(pair.contexts)) == ("vtd", 2)
            assert "'pair' is there, as 'vtd'" in run(*shared, "pair@mock", "--", "true").stderr
            two.communicate("\n")
        one.communicate("\n")
    until = time.monotonic() + PATIENCE
    while run(*shared, "pair@mock", "--", "true").returncode:  # the name is free when the daemon has seen their end
        assert time.monotonic() < until
