"""Which hardware models a machine is made of: the one place that imports them."""

from __future__ import annotations

from .iommu.mock import MockIommu
from .machine import Machine


def new_machine(name: str) -> Machine:
    """A fresh machine instance; every one has the selftest's mock IOMMU."""
    return Machine(name, MockIommu())
