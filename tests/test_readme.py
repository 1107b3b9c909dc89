"""The README keeps its word: its program runs, its drawing shows every room, its commands exist."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bench.__main__ import BENCHES
from tests.iommu.wrong import the_wrong_page_is_flushed

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_prototype_is_the_example_and_runs() -> None:
    block, _ = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert block == (ROOT / "clients/examples/vmm.py").read_text()
    assert 35 <= len(block.splitlines()) <= 50, "about 40 lines"
    environ = {key: value for key, value in os.environ.items() if key != "IOMMUFDD_SOCKET"}
    done = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, timeout=60, env=environ)
    assert done.returncode == 0, done.stderr
    assert "the device reads b'from the guest'" in done.stdout
    assert "the guest reads b'from the device'" in done.stdout
    assert "is in use by" in done.stdout
    assert f"```\n{done.stdout}```" in README


def test_the_guest_with_an_smmuv3_is_the_example_and_runs() -> None:
    _, block = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert block == (ROOT / "clients/examples/smmuv3.py").read_text()
    done = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, timeout=60)
    first, second, told = done.stdout.splitlines()
    assert first == "the guest reads b'through both stages'"
    assert second.startswith("vfio1: fault 0x10: no translation, stage 1 level 1, iova 0x1000")
    assert told.startswith("the guest is told F_TRANSLATION ")
    assert f"`{told}`" in README


def test_the_unmodified_program_runs() -> None:
    done = in_a_shell(0)
    assert done.stdout == "ioas 1\n"
    assert "IOMMU_DESTROY = ENOENT: there is no object 77" in done.stderr


def test_the_trace_is_what_it_says() -> None:
    shown = re.search(r"^    (.* IOMMU_IOAS_ALLOC\(.*)$", README, re.MULTILINE)
    assert shown is not None

    def masked(line: str) -> str:
        line = re.sub(r"\b\d+\.\d{6}\b|(?<=iommufd:)\d+|\b\d+(?= \()", "N", line)
        return re.sub(r"\(python[\d.]*\)", "(python)", line)

    assert masked(in_a_shell(1).stderr.rstrip("\n")) == masked(shown[1])


def in_a_shell(number: int) -> subprocess.CompletedProcess[str]:
    """One of the shell examples, with the command of this tree."""
    block = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)[number]
    command = "iommufdctl run"
    assert block.startswith(command)
    here = f"{shlex.quote(sys.executable)} -m iommufd_client.cli run"
    probe = subprocess.run(f"{here} -- true", shell=True, capture_output=True, text=True, timeout=60)
    if probe.returncode:
        pytest.skip(probe.stderr.strip())
    return subprocess.run(block.replace(command, here), shell=True, capture_output=True, text=True, timeout=60)


def test_the_machine_file_is_good_and_the_complaint_is_what_it_says(tmp_path: Path) -> None:
    (block,) = re.findall(r"```toml\n(.*?)```", README, re.DOTALL)
    path = os.pathsep.join(each or os.getcwd() for each in sys.path)

    def check() -> tuple[int, str]:
        command = [sys.executable, "-m", "iommufd_client.cli", "machine", "check", "lab.toml"]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=60, cwd=tmp_path, env=os.environ | {"PYTHONPATH": path}
        )
        return done.returncode, done.stdout + done.stderr

    (tmp_path / "lab.toml").write_text(block)
    assert check() == (0, "")
    (tmp_path / "lab.toml").write_text(block.replace("ats = true\n", ""))
    status, complaint = check()
    assert (status, f"`{complaint.strip()}`" in README) == (1, True), complaint


def test_the_report_is_what_that_program_is_told() -> None:
    (block,) = re.findall(r"```text\n(.*?)```", README, re.DOTALL)
    vmm, _ = the_wrong_page_is_flushed()
    vmm.end()
    assert block.splitlines() == [f"iommufd: {line}" for line in vmm.sanitizer.summary()]


def test_the_drawing_shows_every_module_of_the_core() -> None:
    (drawing,) = re.findall(r"```\n(iommufd_uapi/.*?)```", README, re.DOTALL)
    above, _, hardware = drawing.partition("iommufdd/iommu/")
    shown = set(re.findall(r"[\w/]+\.py", above)) | {f"iommu/{name}" for name in re.findall(r"\w+\.py", hardware)}
    core = {str(path.relative_to(ROOT / "iommufdd")) for path in (ROOT / "iommufdd").glob("*.py")}
    for room in ("iommu", "kvm", "vfio"):
        core |= {str(path.relative_to(ROOT / "iommufdd")) for path in (ROOT / "iommufdd" / room).glob("*.py")}
    uapi = {path.name for path in (ROOT / "uapi/iommufd_uapi").glob("*.py")}
    there = {name for name in core | uapi if not name.endswith("__init__.py")}
    assert shown == there


def test_the_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    named = set(re.findall(r"(?:`|^ {4})make (\w+)", README, re.MULTILINE))
    assert {"demo", "test", "conformance", "bench", "lint"} <= named
    for target in named:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_make_help_names_every_target() -> None:
    done = subprocess.run(["make", "help"], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    (phony,) = re.findall(r"^\.PHONY: help (.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert re.findall(r"^make (\w+)", done.stdout, re.MULTILINE) == phony.split()


def test_all_benches_are_named() -> None:
    section = README.partition("## How fast it is")[2].partition("\n## ")[0]
    assert sorted(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)) == sorted(BENCHES)


def test_the_verbs_exist() -> None:
    named = set(re.findall(r"`iommufdctl (\w+)", README))
    assert {"run", "mount", "doctor", "trace"} <= named
    for verb in named:
        command = [sys.executable, "-m", "iommufd_client.cli", verb, "--help"]
        done = subprocess.run(command, capture_output=True, timeout=60)
        assert done.returncode == 0, verb


def test_the_figures_are_those_of_the_recordings() -> None:
    count = len(list((ROOT / "tests/programs/hand").glob("*.prog"))) + len(
        list((ROOT / "tests/programs/random").glob("*.prog"))
    )
    assert README.count(f"{count}/{count} identical") == 2
