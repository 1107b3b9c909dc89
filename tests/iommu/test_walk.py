"""What every walker owes to the fetch it is given."""

from __future__ import annotations

from typing import Any

import pytest

from iommufdd.iommu import lpae, x86_64
from iommufdd.iommu.walk import READ, Fetch, RawStep, TranslationFault, Why

PAGES = {0x1000: 0x2000, 0x2000: 0x3000, 0x3000: 0x4000, 0x4000: 0x5000}


def x86(fetch: Fetch, steps: list[RawStep]) -> None:
    rules = x86_64.Rules()
    x86_64.walk(lambda at: fetch(at) | 7, None, x86_64.root(0x1000, rules), rules, 0, READ, steps)


def arm(fetch: Fetch, steps: list[RawStep]) -> None:
    rules = lpae.Rules()
    lpae.walk(lambda at: fetch(at) | 3 | 1 << 6 | 1 << 10, None, lpae.root(0x1000, rules), rules, 0, READ, steps)


@pytest.mark.parametrize("walk", [x86, arm])
@pytest.mark.parametrize("bad", [0x1000, 0x2000, 0x3000, 0x4000])
def test_a_fetch_that_fails_can_tell_the_level_by_the_steps(walk: Any, bad: int) -> None:
    """The second stage names the level whose entry it could not read: 4 less the steps made."""
    steps: list[RawStep] = []

    def fetch(address: int) -> int:
        if address == bad:
            raise TranslationFault(Why.NOT_PRESENT, stage=2, level=4 - len(steps), addr=address)
        return PAGES[address]

    with pytest.raises(TranslationFault) as caught:
        walk(fetch, steps)
    assert caught.value.level == 5 - (bad >> 12)
    assert [step[2] for step in steps] == [page for page in PAGES if page < bad]
