"""Which hardware models a machine is made of: the one place that imports them."""

from __future__ import annotations

from typing import Protocol, TypeAlias

from iommufd_uapi.iommufd_test import MOCK_FLAGS_DEVICE_PASID

from .description import MOCK, AnyIommu, DeviceDescription, MachineDescription, SmmuV3Iommu, VtdIommu
from .hardware_events import connect
from .iommu.endpoint import Endpoint
from .iommu.group import IommuGroup
from .iommu.mock import MockIommu
from .iommu.ops import Device, IommuOps
from .machine import Machine


class Model(IommuOps, Protocol):
    """An IOMMU that makes devices as they are described."""

    def new_device(self, description: DeviceDescription, group: IommuGroup) -> Device:
        """A device behind it, also in group.devices."""
        ...


AnyModel: TypeAlias = MockIommu | Model


def new_machine(name: str, description: MachineDescription = MOCK) -> Machine:
    """A fresh machine instance as described; every one has the selftest's mock IOMMU besides."""
    machine = Machine(name, MockIommu(), description)
    iommus = {iommu.name: _new_iommu(iommu) for iommu in description.iommu}
    machine.iommus.update(iommus)
    groups: dict[int, IommuGroup] = {}
    for device in description.device:
        iommu = iommus[device.iommu]
        group = IommuGroup(iommu.blocked_domain)
        if device.group is not None:
            group = groups.setdefault(device.group, group)
        dev = machine.devices[device.name] = _new_device(iommu, device, group)
        if isinstance(dev, Endpoint):
            dev.queue = machine.dma
    connect(machine.events, machine.iommus.values())
    return machine


def _new_iommu(description: AnyIommu) -> AnyModel:
    """The model that a description asks for. Models are imported when a machine has them."""
    if isinstance(description, VtdIommu):
        from .iommu.vtd import Vtd

        return Vtd(description)
    if isinstance(description, SmmuV3Iommu):
        from .iommu.smmuv3 import SmmuV3

        return SmmuV3(description)
    return MockIommu()


def _new_device(iommu: AnyModel, description: DeviceDescription, group: IommuGroup) -> Device:
    if not isinstance(iommu, MockIommu):
        return iommu.new_device(description, group)
    dev = iommu.new_device(MOCK_FLAGS_DEVICE_PASID if description.pasid_width else 0)
    dev.name, dev.group = description.name, group
    group.devices.append(dev)
    return dev
