"""The tests that fail on the kernel too where no huge pages are reserved, read from the suite's source."""

from __future__ import annotations

import re
from typing import NamedTuple

BLOCK = re.compile(r"^(FIXTURE_SETUP|FIXTURE_VARIANT_ADD|TEST_F)\((.*?)\)\n\{(.*?)^\}", re.MULTILINE | re.DOTALL)
FUNCTION = re.compile(r"^(?:static [^;{}()]*?)?\b(\w+)\([^;{}]*\)\n\{(.*?)^\}", re.MULTILINE | re.DOTALL)
HUGE = re.compile(r"\.hugepages = true")
FILE = re.compile(r"\.file = true")  # maps a memfd of small pages whatever `hugepages` says
MMAP = re.compile(r"\bmmap\(")
WORD = re.compile(r"\b\w+\b")


class Suite(NamedTuple):
    """The source taken apart; keys as the macros' arguments."""

    setups: dict[str, str]
    variants: dict[str, dict[str, str]]
    tests: dict[str, dict[str, str]]
    functions: dict[str, str]


def parse(source: str) -> Suite:
    suite = Suite({}, {}, {}, {name: body for name, body in FUNCTION.findall(source) if not name.isupper()})
    for macro, arguments, body in BLOCK.findall(source):
        fixture, _, name = arguments.partition(", ")
        if macro == "FIXTURE_SETUP":
            suite.setups[fixture] = body
        else:
            group = suite.tests if macro == "TEST_F" else suite.variants
            group.setdefault(fixture, {})[name] = body
    return suite


def names(suite: Suite, fixture: str, case: str) -> list[str]:
    """The test once for each variant, as the harness prints it."""
    return [f"{fixture}.{variant}.{case}" for variant in suite.variants.get(fixture, ())] or [f"{fixture}.{case}"]


def all_tests(source: str) -> list[str]:
    suite = parse(source)
    return [name for fixture, cases in suite.tests.items() for case in cases for name in names(suite, fixture, case)]


def need_hugepages(source: str) -> list[str]:
    """Those whose mmap() with MAP_HUGETLB must succeed: by the test, or by the fixture's flags in a huge variant."""
    suite = parse(source)
    found = []
    for fixture, cases in suite.tests.items():
        setup = suite.setups.get(fixture, "")
        huge = {
            f"{fixture}.{name}." for name, body in suite.variants.get(fixture, {}).items()
            if HUGE.search(body) and not FILE.search(body)
        }  # fmt: skip
        for case, body in cases.items():
            if "MAP_HUGETLB" in body:
                found += names(suite, fixture, case)
            elif "MAP_HUGETLB" in setup and (MMAP.search(setup) or "mmap_flags" in _reachable(suite, body)):
                found += [prefix + case for prefix in sorted(huge)]
    return sorted(found)


def _reachable(suite: Suite, body: str) -> str:
    """The text of a test and of the functions it names."""
    called = (suite.functions[word] for word in sorted(set(WORD.findall(body))) if word in suite.functions)
    return "\n".join([body, *called])
