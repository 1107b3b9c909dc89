"""To be replaced by the VT-d model: an IOMMU of this description, whose devices can be named and nothing more."""

from __future__ import annotations

from typing import TYPE_CHECKING

from iommufdd.errors import EOPNOTSUPP

from .ops import Cap, Device, Domain, DomainType

if TYPE_CHECKING:
    from iommufdd.description import DeviceDescription, VtdIommu
    from iommufdd.user_data import UserData

    from .group import IommuGroup


class Vtd:
    """An IOMMU without domains."""

    user_pasid_table = True

    def __init__(self, description: VtdIommu) -> None:
        self.description = description
        self.blocked_domain: Domain = Domain(self)
        self.blocked_domain.type = DomainType.BLOCKED

    def new_device(self, description: DeviceDescription, group: IommuGroup) -> Device:
        dev = Device()
        dev.iommu, dev.group, dev.name = self, group, description.name
        group.devices.append(dev)
        return dev

    def capable(self, dev: Device, cap: Cap) -> bool:
        return False

    def domain_alloc_paging(self, dev: Device, flags: int, user_data: UserData | None) -> Domain:
        raise EOPNOTSUPP("no domains yet")
