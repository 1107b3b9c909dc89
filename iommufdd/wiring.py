"""Which hardware models a machine is made of: the one place that imports them."""

from __future__ import annotations

import os
import tomllib

import msgspec

from .description import MachineDescription, VtdIommu
from .iommu.group import IommuGroup
from .iommu.mock import MockIommu
from .machine import Machine

FOLDER = os.path.join(os.path.dirname(__file__), "machines")


def new_machine(name: str) -> Machine:
    """A fresh machine instance, `[INSTANCE][@MACHINE]`; every one has the selftest's mock IOMMU."""
    instance, _, machine = name.partition("@")
    made = Machine(instance, MockIommu())
    if machine == "vtd":
        add_devices(made, built_in(machine))
    return made


def built_in(name: str) -> MachineDescription:
    """The description of a built-in machine."""
    with open(os.path.join(FOLDER, name + ".toml"), "rb") as file:
        return msgspec.convert(tomllib.load(file), MachineDescription)


def add_devices(machine: Machine, description: MachineDescription) -> None:
    """The IOMMUs of a description, and the devices behind them."""
    from .iommu.vtd import Vtd

    iommus = {each.name: Vtd(each) for each in description.iommu if isinstance(each, VtdIommu)}
    machine.iommus.update(iommus)
    groups: dict[int, IommuGroup] = {}
    for device in description.device:
        iommu = iommus[device.iommu]
        group = IommuGroup(iommu.blocked_domain)
        if device.group is not None:
            group = groups.setdefault(device.group, group)
        endpoint = iommu.new_device(device, group)
        endpoint.queue = machine.dma
        machine.devices[device.name] = endpoint
