"""What the tool says while it works, and how it says that something is missing."""

from __future__ import annotations

import os
import sys


class CannotError(Exception):
    """This host cannot run the tests; the text says what is missing and what to do. Exit status 4, kselftest's SKIP."""


class BrokenError(Exception):
    """The tests could be run here, but a step failed."""


def note(text: str) -> None:
    """A line to keep."""
    progress("")
    print(text, flush=True)


def progress(text: str) -> None:
    """How far it is: on a terminal only, and gone when the text is empty."""
    if sys.stderr.isatty():
        width = max(1, os.get_terminal_size(sys.stderr.fileno()).columns - 1)
        print(f"\r{text[:width]:{width}}\r", end="", file=sys.stderr, flush=True)
