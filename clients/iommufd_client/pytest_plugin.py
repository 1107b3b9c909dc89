"""Room client: pytest fixtures. `iommufd` is a fresh /dev/iommu on a machine of its own, from which nothing leaks.

The daemon is started once a session, when the first test asks for it, with the ini option `iommufdd_options`.
pytest finds the plugin by itself where iommufdd is installed; `-p no:iommufdd` leaves it out.
"""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .iommufd import Iommufd
    from .testing import Daemon

# What must be the same after a test as before. Not: turns of the reactor, or what the allocator keeps.
LEAKS = ("instances", "contexts", "channels", "address_spaces", "regions", "objects", "areas", "pinned_pages",
         "files", "page_files", "charged_fds")  # fmt: skip


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addini("iommufdd_options", "options of the daemon that the iommufdd_daemon fixture starts", default="")


@pytest.fixture(scope="session")
def iommufdd_daemon(request: pytest.FixtureRequest) -> Iterator[Daemon]:
    """A private daemon; it lasts as long as the session."""
    from .testing import Daemon

    try:
        options = request.config.getini("iommufdd_options")
    except (ValueError, KeyError):  # the fixture was imported and the plugin is not loaded
        options = ""
    with Daemon(*shlex.split(options)) as daemon:
        yield daemon


@pytest.fixture
def iommufd(iommufdd_daemon: Daemon) -> Iterator[Iommufd]:
    """A new /dev/iommu on a machine of its own. The test fails if it leaves anything behind in the daemon."""
    before = leakable(iommufdd_daemon)
    with iommufdd_daemon.open() as opened:
        yield opened
    after = leakable(iommufdd_daemon)
    if after != before:
        left = {name: after[name] - before[name] for name in LEAKS if after[name] != before[name]}
        pytest.fail(f"left behind in the daemon: {left}")


def leakable(daemon: Daemon) -> dict[str, int]:
    """The counts of what must not leak."""
    with daemon.admin() as admin:
        stats = admin.stats()
    return {name: getattr(stats, name) for name in LEAKS}
