"""Room client: `iommufdctl doctor`, what it prints."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from .doctor import FAIL, OK, Finding, examine
from .show import BOLD, GREEN, RED, YELLOW

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from .doctor_program import Program, Way
    from .show import Paint

SUMMARY_OK = "iommufdctl run works here"
SUMMARY_FAIL = "iommufdctl run does not work here: {}"


def report(socket_path: str, words: Sequence[str], *, as_json: bool, paint: Paint) -> int:
    """Examine the host, and CMD if there is one; the exit status."""
    host = examine(socket_path)
    if words:
        return _report_program(host, words, as_json=as_json, paint=paint)
    failing = topics(host)
    if as_json:
        _dump([finding._asdict() for finding in host])
    else:
        _print(host, paint)
        print(paint(SUMMARY_FAIL.format(", ".join(failing)), RED) if failing else paint(SUMMARY_OK, GREEN))
    return 1 if failing else 0


def _report_program(host: Sequence[Finding], words: Sequence[str], *, as_json: bool, paint: Paint) -> int:
    from .doctor_program import NONE, choose, findings, look
    from .doctor_run import mounts

    program = look(words[0])
    way = choose(program, words, topics(host), mounts())
    if as_json:
        _dump(_as_json(program, way, host))
    else:
        # Of the host only what stands in the way; doctor without CMD has it all.
        _print([*(each for each in host if each.verdict == FAIL), *findings(program, way)], paint)
    return 1 if way.way == NONE else 0


def topics(host: Iterable[Finding]) -> list[str]:
    """Of the checks that fail: all of them are needed by `run`."""
    return [finding.topic for finding in host if finding.verdict == FAIL]


def _as_json(program: Program, way: Way, host: Iterable[Finding]) -> dict[str, object]:
    from .doctor_program import findings

    elf = program.elf
    return {
        **way._asdict(),
        "program": {
            "path": program.path,
            "scripts": program.scripts,
            "machine": elf and elf.machine_name,
            "bits": elf and elf.bits,
            "static": elf and not elf.loader,
            "loader": elf and elf.loader,
            "go": elf and elf.go,
            "privileges": program.privileges,
            "readable": program.readable,
        },
        "findings": [finding._asdict() for finding in findings(program, way)],
        "host": [finding._asdict() for finding in host],
    }


def _dump(value: object) -> None:
    print(json.dumps(value, indent=2))


def _print(found: Sequence[Finding], paint: Paint) -> None:
    width = max(len(finding.topic) for finding in found)
    for finding in found:
        mark, colour = {OK: ("ok  ", GREEN), FAIL: ("FAIL", RED)}.get(finding.verdict, ("note", YELLOW))
        print(f"{paint(mark, colour)}  {paint(finding.topic.ljust(width), BOLD)}  {finding.seen}")
        if finding.advice:
            print(f"      {'':{width}}  -> {finding.advice}")
