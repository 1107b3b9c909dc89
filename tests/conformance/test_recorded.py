"""The recorded programs that must replay byte for byte, in process and over the socket."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.conformance.inprocess import InProcess
from tests.conformance.oversocket import daemon
from tests.conformance.run import DEFAULTS, REQUIRED, differences, find_programs, read_list, run_program

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.conformance.oversocket import OverSocket

recorded = pytest.mark.parametrize("path", find_programs(DEFAULTS, read_list(REQUIRED)), ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def new_machine() -> Iterator[Callable[[], OverSocket]]:
    with daemon() as new_driver:
        yield new_driver


@recorded
def test_in_process(path: Path) -> None:
    assert not differences(path, run_program(path, InProcess()))


@recorded
def test_over_the_socket(path: Path, new_machine: Callable[[], OverSocket]) -> None:
    assert not differences(path, run_program(path, new_machine()))
