"""What the selftest command needs of the mock hardware behind it; the model is injected (iommufd_test.h)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

from .ops import Device, IommuOps

if TYPE_CHECKING:
    from .group import Iopf


class SelftestDevice(Device):
    """A device made for a test: a cache of four numbers, page requests and vEVENTs on demand."""

    is_mock = True
    cache: list[int]
    iopf: Iopf

    def trigger_vevent(self) -> None:
        """Report an event through the vIOMMU it is attached to: ENOENT, EOPNOTSUPP."""
        raise NotImplementedError


@runtime_checkable
class SelftestNested(Protocol):
    """A nested domain whose IOTLB is four numbers."""

    iotlb: list[int]


@runtime_checkable
class SelftestDirty(Protocol):
    """The dirty half of a paging domain, with writes on demand."""

    tracking: bool

    def set_dirty(self, iova: int) -> None: ...


class SelftestIommu(IommuOps, Protocol):
    """The IOMMU behind the selftest command: it makes devices on demand."""

    def new_device(self, flags: int) -> SelftestDevice:
        """EINVAL for flags it does not know."""
        ...

    def forget_device(self, dev: Device) -> None: ...
