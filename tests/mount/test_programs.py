"""The recorded ioctl programs through a C program, static and dynamic, under `mount`: identical to a real kernel's.

What FUSE cannot do is left out, line by line: exempt.txt gives the reasons, exempt_exact.txt those under --exact. There
the programs with such lines are replayed, and some others.
"""

from __future__ import annotations

import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.conformance.run import DEFAULTS, Difference, differences, find_programs
from tests.run.test_programs import CALLER, programs, some

from .conftest import passthrough

if TYPE_CHECKING:
    from collections.abc import Iterator

    from iommufd_client.testing import Daemon

    from .conftest import Mount

EXEMPT, EXEMPT_EXACT = (Path(__file__).with_name(name) for name in ("exempt.txt", "exempt_exact.txt"))
MAPPING = re.compile(r"\d+: mmapfd (\S+) ")
USES = r"\d+: (?:dump|poke|crc|munmap|load|fill|mprotect) {} "
WELL = re.compile(r" rc=0 ")
READ_NOTHING = re.compile(r"\d+: read \S+ 0( |$)")


def exempt(lists: Path) -> dict[str, set[str]]:
    """By program the numbers of lines that are not compared on this host; "*" for all."""
    found: dict[str, set[str]] = {}
    counts = True
    for line in lists.read_text().splitlines():
        text = line.partition("#")[0].strip()
        if text.startswith("["):
            counts = (text == "[passthrough]") == passthrough()
        elif text and counts:
            name, *numbers = text.split()
            found.setdefault(name, set()).update(numbers)
    return found


def counted(path: Path, found: list[Difference], lines: set[str]) -> Iterator[Difference]:
    """Those that are not known: refused mappings of the iommufd and their use, reads of 0 bytes, the lines listed."""
    mapped = {match[1] for number, line in enumerate(path.read_text("latin-1").splitlines(), 1)
              if (match := MAPPING.match(f"{number}: {line}"))}  # fmt: skip
    uses = re.compile("|".join(USES.format(re.escape(name)) for name in mapped) or "$.")
    for each in found:
        step = f"{each.step} "
        mapping = MAPPING.match(step) and not (passthrough() and WELL.search(each.expected or ""))
        if not (mapping or uses.match(step) or READ_NOTHING.match(step) or step.split(":")[0] in lines):
            yield each


def only_exact(path: Path) -> bool:
    """Whether a program is not compared in full without --exact."""
    lines = path.read_text("latin-1").splitlines()
    special = (MAPPING.match(step) or READ_NOTHING.match(step) for step in (f"0: {line} " for line in lines))
    return path.stem in exempt(EXEMPT) or any(special)


def problems(mount: Mount, compiled: Path, daemon: Daemon, lists: Path, *words: str) -> tuple[int, list[str]]:
    """How many programs were compared, and every difference that is not known."""
    lines = exempt(lists)
    chosen = [path for path in programs() if lines.get(path.stem) != {"*"}]
    if words:  # all else is plain `mount` again
        representative = some(chosen)
        chosen = [path for path in chosen if only_exact(path) or path in representative]

    def different(path: Path) -> list[str]:
        node = "/dev/vfio/vfio" if "/dev/vfio/vfio" in path.read_text("latin-1") else "/dev/iommu"
        options = (*words, "--socket-path", daemon.socket_path, "--caller", CALLER)
        result = mount(*options, node, "--", compiled / "ioctlrun", stdin=path)
        known = lines.get(path.stem, set())
        found = differences(path, result.stdout)
        exactly = [each for each in found if each.step.split(":")[0] not in known]
        left = exactly if words else counted(path, found, known)
        return [f"{path.stem}: {result.stderr}"] * bool(result.stderr) + [f"{path.stem}: {each}" for each in left]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return len(chosen), [line for found in pool.map(different, chosen) for line in found]


def test_the_answers_are_those_of_a_real_kernel(mount: Mount, compiled: Path, daemon: Daemon) -> None:
    count, found = problems(mount, compiled, daemon, EXEMPT)
    assert not found, "\n".join(found[:20])
    assert count > 100
    assert not daemon.log.count("event=bug")


def test_under_exact_every_line_is(exact: Mount, compiled: Path, daemon: Daemon) -> None:
    count, found = problems(exact, compiled, daemon, EXEMPT_EXACT, "--exact")
    assert not found, "\n".join(found[:20])
    assert count > 50
    assert not daemon.log.count("event=bug")


@pytest.mark.parametrize("lists", [EXEMPT, EXEMPT_EXACT])
def test_the_list_of_exceptions_names_programs(lists: Path) -> None:
    assert exempt(lists).keys() <= {path.stem for path in find_programs(DEFAULTS)}
