"""The recorded ioctl programs through a C program, static and dynamic, under `mount`: identical to a real kernel's.

What FUSE cannot do is left out, line by line: exempt.txt gives the reasons.
"""

from __future__ import annotations

import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from tests.conformance.run import DEFAULTS, Difference, differences, find_programs
from tests.run.test_programs import CALLER, programs

if TYPE_CHECKING:
    from collections.abc import Iterator

    from iommufd_client.testing import Daemon

    from .conftest import Mount

EXEMPT = Path(__file__).with_name("exempt.txt")
MAPPING = re.compile(r"\d+: mmapfd (\S+) ")
USES = r"\d+: (?:dump|poke|crc|munmap|load|fill|mprotect) {} "
READ_NOTHING = re.compile(r"\d+: read \S+ 0( |$)")


def exempt() -> dict[str, set[str]]:
    """By program the numbers of lines that are not compared; "*" for all."""
    found: dict[str, set[str]] = {}
    for line in EXEMPT.read_text().splitlines():
        words = line.partition("#")[0].split()
        if words:
            found[words[0]] = set(words[1:])
    return found


def counted(path: Path, found: list[Difference], lines: set[str]) -> Iterator[Difference]:
    """Those that are not known: mappings of the iommufd and their use, reads of 0 bytes, the lines of the list."""
    mapped = {match[1] for number, line in enumerate(path.read_text("latin-1").splitlines(), 1)
              if (match := MAPPING.match(f"{number}: {line}"))}  # fmt: skip
    uses = re.compile("|".join(USES.format(re.escape(name)) for name in mapped) or "$.")
    for each in found:
        step = f"{each.step} "
        if not (MAPPING.match(step) or uses.match(step) or READ_NOTHING.match(step) or step.split(":")[0] in lines):
            yield each


def test_the_answers_are_those_of_a_real_kernel(mount: Mount, compiled: Path, daemon: Daemon) -> None:
    lines = exempt()
    chosen = [path for path in programs() if lines.get(path.stem) != {"*"}]

    def different(path: Path) -> list[str]:
        node = "/dev/vfio/vfio" if "/dev/vfio/vfio" in path.read_text("latin-1") else "/dev/iommu"
        options = ("--socket-path", daemon.socket_path, "--caller", CALLER)
        result = mount(*options, node, "--", compiled / "ioctlrun", stdin=path)
        found = list(counted(path, differences(path, result.stdout), lines.get(path.stem, set())))
        problems = [f"{path.stem}: {each}" for each in found]
        return [f"{path.stem}: {result.stderr}", *problems] if result.stderr else problems

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        problems = [line for found in pool.map(different, chosen) for line in found]
    assert not problems, "\n".join(problems[:20])
    assert len(chosen) > 100
    assert not daemon.log.count("event=bug")


def test_the_list_of_exceptions_names_programs() -> None:
    assert exempt().keys() <= {path.stem for path in find_programs(DEFAULTS)}
