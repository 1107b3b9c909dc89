"""Hardware for tests: devices that share a group, have reserved regions, and refuse domains when told to."""

from __future__ import annotations

from typing import TYPE_CHECKING

from iommufdd.attach import attach, detach, replace
from iommufdd.device import IommufdDevice, bind, unbind
from iommufdd.iommu.group import IommuGroup, Iopf
from iommufdd.iommu.ops import IOMMU_NO_PASID, Cap, Device, Domain, DomainType, ResvRegion
from iommufdd.objects import Holder
from iommufdd.user import PAGE_SIZE

from .harness import Client

if TYPE_CHECKING:
    from collections.abc import Iterable

    from iommufdd.errors import IommufdError
    from iommufdd.user_data import UserData


class ModelDomain(Domain):
    """A domain without tables: devices remember it."""

    def __init__(self, owner: ModelIommu, kind: DomainType = DomainType.PAGING) -> None:
        super().__init__(owner)
        self.type = kind
        self.pgsize_bitmap = owner.pgsize_bitmap

    def attach_dev(self, dev: Device, old: Domain | None) -> None:
        assert isinstance(dev, ModelDevice)
        dev.accept(self, IOMMU_NO_PASID)

    def set_dev_pasid(self, dev: Device, pasid: int, old: Domain | None) -> None:
        assert isinstance(dev, ModelDevice)
        dev.accept(self, pasid)


class ModelDevice(Device):
    """A device; `now` is what each PASID uses, `log` everything it was told."""

    def __init__(self, iommu: ModelIommu, name: str, beside: Device | None, max_pasids: int) -> None:
        self.iommu = iommu
        self.name = name
        self.group = beside.group if beside is not None else IommuGroup(iommu.blocked_domain)
        self.group.devices.append(self)
        self.max_pasids = max_pasids
        self.regions: list[ResvRegion] = []
        self.caps = {Cap.CACHE_COHERENCY}
        self.now: dict[int, Domain] = {}
        self.log: list[tuple[int, Domain]] = []
        self.refuses: dict[Domain, type[IommufdError]] = {}
        self.iopf = Iopf(self)

    def resv_regions(self) -> Iterable[ResvRegion]:
        return self.regions

    def accept(self, domain: Domain, pasid: int) -> None:
        if (error := self.refuses.get(domain)) is not None:
            raise error(f"{self.name} refuses")
        self.log.append((pasid, domain))
        if domain.type is DomainType.BLOCKED:
            self.now.pop(pasid, None)
        else:
            self.now[pasid] = domain


class ModelIommu:
    """An IOMMU that pages, and no more; each instance is one of its own."""

    user_pasid_table = False

    def __init__(self) -> None:
        self.driver = f"model {id(self):#x}"
        self.pgsize_bitmap = PAGE_SIZE
        self.blocked_domain: Domain = ModelDomain(self, DomainType.BLOCKED)
        self.domains: list[ModelDomain] = []  # all it ever made
        self.refused_by: list[tuple[ModelDevice, type[IommufdError]]] = []  # who will refuse the next one it makes

    def capable(self, dev: Device, cap: Cap) -> bool:
        assert isinstance(dev, ModelDevice)
        return cap in dev.caps

    def domain_alloc_paging(self, dev: Device, flags: int, user_data: UserData | None) -> Domain:
        domain = ModelDomain(self)
        self.domains.append(domain)
        for device, error in self.refused_by:
            device.refuses[domain] = error
        self.refused_by.clear()
        return domain


class Bench:
    """A context, and devices of a model that a driver binds and attaches without ioctls."""

    def __init__(self, client: Client | None = None, iommu: ModelIommu | None = None) -> None:
        self.c = client or Client()
        self.iommu = iommu or ModelIommu()
        self.driver = Holder()
        self.c.world.drivers.append(self.driver)
        self._made = 0

    def device(self, beside: Device | None = None, *, max_pasids: int = 1 << 10) -> ModelDevice:
        """A device in a group of its own, or in that of another."""
        self._made += 1
        return ModelDevice(self.iommu, f"model{self._made}", beside, max_pasids)

    def bind(self, dev: Device) -> IommufdDevice:
        return bind(self.c.ictx, self.c.caller, dev, self.driver)

    def bound(self, count: int, *, max_pasids: int = 1 << 10) -> list[IommufdDevice]:
        """Devices of one group, bound."""
        first = self.device(max_pasids=max_pasids)
        rest = [self.device(first, max_pasids=max_pasids) for _ in range(count - 1)]
        return [self.bind(dev) for dev in (first, *rest)]

    def unbind(self, idev: IommufdDevice) -> None:
        unbind(idev, self.driver)

    def attach(self, idev: IommufdDevice, pt: int, pasid: int = IOMMU_NO_PASID) -> int:
        return attach(self.c.caller, idev, pasid, pt)

    def replace(self, idev: IommufdDevice, pt: int, pasid: int = IOMMU_NO_PASID) -> int:
        return replace(self.c.caller, idev, pasid, pt)

    def detach(self, idev: IommufdDevice, pasid: int = IOMMU_NO_PASID) -> None:
        detach(idev, pasid)


def model(idev: IommufdDevice) -> ModelDevice:
    """The device behind a bound one."""
    assert isinstance(idev.dev, ModelDevice)
    return idev.dev
