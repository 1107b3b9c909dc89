"""`iommufdctl machine`, and what --machine of run and mount comes to."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

from iommufd_client import IommufdOSError
from iommufd_client.machine_options import Choice, UsageError, choose
from iommufd_client.testing import Daemon, DaemonError
from tests.client.test_cli import run

if TYPE_CHECKING:
    from pathlib import Path

LAB = """\
name = "lab"
[[iommu]]
name = "dmar0"
model = "vtd"
[[device]]
name = "nic"
bdf = "0000:01:00.0"
iommu = "dmar0"
"""


@pytest.fixture
def lab(tmp_path: Path) -> Path:
    path = tmp_path / "lab.toml"
    path.write_text(LAB)
    return path


def test_list() -> None:
    done = run("machine", "list")
    assert (done.returncode, done.stderr) == (0, "")
    rows = [line.split(maxsplit=1) for line in done.stdout.splitlines()]
    assert [row[0] for row in rows] == ["mock", "smmuv3", "tegra241", "vtd"]
    assert rows[3][1] == "dmar0 (vtd); vfio0, vfio1, vfio2, vfio3"


def test_show(lab: Path) -> None:
    done = run("machine", "show", str(lab))
    assert (done.returncode, done.stderr) == (0, "")
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["levels", "4,", "5"] in lines  # a default
    assert ["reserved", "0xfee00000..0xfeefffff", "(msi)"] in lines
    assert ["nic", "0000:01:00.0", "dmar0", "-", "no", "no", "0", "yes", "no", "-", "1", "no", "no"] in lines
    assert run("machine", "show", "mock").stdout.startswith("machine mock: no IOMMU but the selftest's mock")


def test_show_as_toml_is_a_machine_file(lab: Path, tmp_path: Path) -> None:
    first = run("machine", "show", "--toml", str(lab)).stdout
    assert "access-dirty = true\n" in first
    (tmp_path / "again.toml").write_text(first)
    assert run("machine", "check", str(tmp_path / "again.toml")).returncode == 0
    assert run("machine", "show", "--toml", str(tmp_path / "again.toml")).stdout == first


def test_check(lab: Path, tmp_path: Path) -> None:
    done = run("machine", "check", str(lab))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    bad = tmp_path / "bad"  # a file whatever its name
    bad.write_text(LAB.replace("0000:01:00.0", "1") + "pri = true\n")
    done = run("machine", "check", str(bad), str(lab), str(tmp_path / "none"))
    assert (done.returncode, done.stdout) == (1, "")
    first, second = done.stderr.splitlines()
    assert first.startswith(f"{bad}:7: device[0].bdf: ")
    assert second == f"{tmp_path}/none: No such file or directory"


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (("show", "none"), 1, "iommufdctl machine: there is no machine 'none'; there are mock, smmuv3, tegra241, vtd"),
        (("show", "none.toml"), 1, "none.toml: No such file or directory"),
        ((), 2, "usage: iommufdctl machine"),
        (("look",), 2, "usage: iommufdctl machine"),
        (("check",), 2, "usage: iommufdctl machine check"),
    ],
)
def test_what_is_wrong_is_said(words: tuple[str, ...], status: int, said: str) -> None:
    done = run("machine", *words)
    assert (done.returncode, done.stdout) == (status, "")
    assert done.stderr.startswith(said)


@pytest.mark.parametrize("words", [("--help",), ("list", "--help"), ("show", "--help"), ("check", "--help")])
def test_help(words: tuple[str, ...]) -> None:
    done = run("machine", *words)
    assert (done.returncode, done.stderr) == (0, "")
    assert "iommufdctl machine" in done.stdout


# ---- --machine ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "socket_path", "choice"),
    [
        ("", "", Choice([], "")),
        ("", "/s", Choice([], "")),
        ("vtd", "", Choice(["--machine=vtd"], "")),
        ("vtd", "/s", Choice([], "vtd")),
        ("./a", "", Choice(["--machine=./a"], "")),
        ("-a.toml", "", Choice(["--machine=-a.toml"], "")),
        ("ci@vtd", "", Choice([], "ci@vtd")),
        ("@vtd", "/s", Choice([], "@vtd")),
    ],
)
def test_what_is_chosen(text: str, socket_path: str, choice: Choice) -> None:
    assert choose(text, socket_path) == choice


def test_what_cannot_be_chosen() -> None:
    with pytest.raises(UsageError, match=r"start it with --machine a.toml, and say --machine @NAME"):
        choose("a.toml", "/s")
    with pytest.raises(UsageError, match="more than 32 bytes"):
        choose("é" * 17, "/s")


def test_the_daemons_machines(lab: Path) -> None:
    with Daemon("--machine", str(lab), "--machine", "vtd") as daemon:
        for name in ("", "@lab", "ci@lab", "@mock", "@vtd"):
            daemon.open(machine=name).close()
        with daemon.open(machine="ci"), pytest.raises(IommufdOSError, match="'ci' is there, as 'lab'") as caught:
            daemon.open(machine="ci@vtd")
        assert caught.value.errno == errno.EEXIST
        with pytest.raises(IommufdOSError, match="no machine 'x'; there are lab, mock, smmuv3, tegra241, vtd"):
            daemon.open(machine="@x")


def test_a_daemon_with_a_bad_machine_does_not_start(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text('name = "a"\nx = 1\ny\n')
    for word, said in ((str(path), f"{path}:3:2: "), ("none", "iommufdd: there is no machine 'none'; ")):
        with pytest.raises(DaemonError) as caught:
            Daemon("--machine", word).start()
        first, log = str(caught.value).split("\n", 1)
        assert first == "iommufdd exited with 1"
        assert log.startswith(said)
        assert len(log.splitlines()) == 1
