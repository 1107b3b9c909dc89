"""Groups of devices and what each PASID of them uses (drivers/iommu/iommu.c, io-pgfault.c)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from iommufdd.errors import EBUSY, EINVAL, EOPNOTSUPP, EPERM, IommufdError

from .ops import IOMMU_NO_PASID, Device, Domain, DomainType, PasidDomain

if TYPE_CHECKING:
    from collections.abc import Callable


IOMMU_PAGE_RESP_SUCCESS = 0
IOMMU_PAGE_RESP_INVALID = 1
IOMMU_PAGE_RESP_FAILURE = 2  # no user can say it


class Owner(Protocol):
    """The bound device an attachment was made for."""

    id: int


class AttachHandle:
    """struct iommu_attach_handle: which domain a (group, PASID) uses, and on whose behalf."""

    __slots__ = ("domain", "idev")

    def __init__(self, domain: Domain, idev: Owner) -> None:
        self.domain = domain
        self.idev = idev


class Fault:
    """struct iommu_fault_page_request"""

    __slots__ = ("addr", "flags", "grpid", "pasid", "perm")

    def __init__(self, flags: int, pasid: int, grpid: int, perm: int, addr: int) -> None:
        self.flags = flags
        self.pasid = pasid
        self.grpid = grpid
        self.perm = perm
        self.addr = addr


class IopfGroup:
    """struct iopf_group: the page requests one response answers."""

    __slots__ = ("_answer", "cookie", "faults", "handle", "withdrawn")

    def __init__(self, handle: AttachHandle, faults: list[Fault], answer: Callable[[IopfGroup, int], None]) -> None:
        self.handle = handle
        self.faults = faults
        self._answer = answer
        self.cookie = 0
        self.withdrawn = False  # its attachment ended before the user answered

    def respond(self, code: int) -> None:
        """Answer the device: IOMMU_PAGE_RESP_*."""
        self._answer(self, code)


class IommuGroup:
    """struct iommu_group: devices that cannot be told apart on the bus, so they share every domain."""

    def __init__(self, iommu_blocked: Domain) -> None:
        self.devices: list[Device] = []
        self.blocking = iommu_blocked
        self.domain: Domain = iommu_blocked  # of requests without PASID
        self.handles: dict[int, AttachHandle] = {}  # pasid_array
        self.owner: object = None
        self.owner_count = 0

    def claim_dma_owner(self, owner: object) -> None:
        """iommu_device_claim_dma_owner(): EPERM another owner, EBUSY in use."""
        if self.owner_count:
            if self.owner is not owner:
                raise EPERM("the device's group belongs to another iommufd or driver")
        else:
            if self.domain is not self.blocking or self.handles:
                raise EBUSY("the device's group is in use")
            self.owner = owner
        self.owner_count += 1

    def release_dma_owner(self) -> None:
        self.owner_count -= 1
        if not self.owner_count:
            self.owner = None

    # ---- requests without PASID ----

    def attach_handle(self, handle: AttachHandle) -> None:
        """iommu_attach_group_handle(): EBUSY, EINVAL, the driver's."""
        if IOMMU_NO_PASID in self.handles or self.domain is not self.blocking:
            raise EBUSY("the group has a domain already")
        if handle.domain.owner.driver != self.devices[0].iommu.driver:
            raise EINVAL("the domain belongs to another IOMMU")
        self._set_domain(handle.domain)
        self.handles[IOMMU_NO_PASID] = handle

    def replace_handle(self, handle: AttachHandle) -> None:
        """iommu_replace_group_handle(): the driver's errors; the old domain stands on failure."""
        self._set_domain(handle.domain)
        self.handles[IOMMU_NO_PASID] = handle

    def detach_handle(self) -> None:
        """iommu_detach_group_handle(): back to blocking."""
        self._set_domain(self.blocking)
        self.handles.pop(IOMMU_NO_PASID, None)

    def _set_domain(self, new: Domain) -> None:
        """__iommu_group_set_domain_internal(): devices already moved go back when one refuses."""
        old = self.domain
        if new is old:
            return
        moved: list[Device] = []
        try:
            for dev in self.devices:
                new.attach_dev(dev, old)
                moved.append(dev)
        except IommufdError:
            for dev in moved:
                try:
                    old.attach_dev(dev, new)
                except IommufdError:  # the kernel warns: a driver must take back what it had
                    self.blocking.attach_dev(dev, new)
            raise
        self.domain = new

    # ---- PASIDs ----

    def attach_pasid(self, dev: Device, pasid: int, handle: AttachHandle) -> None:
        """iommu_attach_device_pasid(): EOPNOTSUPP, EINVAL, EBUSY, the driver's."""
        domain = handle.domain
        if not isinstance(domain, PasidDomain) or not isinstance(dev.iommu.blocked_domain, PasidDomain):
            raise EOPNOTSUPP("this IOMMU cannot attach PASIDs")
        if domain.owner.driver != dev.iommu.driver or pasid == IOMMU_NO_PASID:
            raise EINVAL("PASID 0 or a domain of another IOMMU")
        for member in self.devices:
            if member.max_pasids and pasid >= member.max_pasids:
                raise EINVAL(f"PASID {pasid} is beyond the {member.max_pasids} of {member.name}")
        if pasid in self.handles:
            raise EBUSY(f"PASID {pasid} is in use")
        self._set_pasid(domain, pasid, None)
        self.handles[pasid] = handle

    def replace_pasid(self, dev: Device, pasid: int, handle: AttachHandle) -> None:
        """iommu_replace_device_pasid()"""
        domain = handle.domain
        if not isinstance(domain, PasidDomain):
            raise EOPNOTSUPP("this IOMMU cannot attach PASIDs")
        if domain.owner.driver != dev.iommu.driver or pasid == IOMMU_NO_PASID:
            raise EINVAL("PASID 0 or a domain of another IOMMU")
        current = self.handles.get(pasid)
        if current is None:
            raise EINVAL(f"PASID {pasid} has no domain to replace")
        if current.domain is not domain:
            self._set_pasid(domain, pasid, current.domain)
        self.handles[pasid] = handle

    def detach_pasid(self, pasid: int) -> None:
        """iommu_detach_device_pasid()"""
        handle = self.handles.pop(pasid, None)
        for dev in self.devices:
            if dev.max_pasids and handle is not None:
                self._remove_pasid(dev, pasid, handle.domain)

    def _set_pasid(self, domain: Domain, pasid: int, old: Domain | None) -> None:
        """__iommu_set_group_pasid(): members without PASIDs are skipped, so nothing may happen at all (quirk)."""
        assert isinstance(domain, PasidDomain)
        moved: list[Device] = []
        for dev in self.devices:
            if not dev.max_pasids:
                continue
            try:
                domain.set_dev_pasid(dev, pasid, old)
            except IommufdError:
                for done in moved:
                    self._put_pasid_back(done, pasid, domain, old)
                raise
            moved.append(dev)

    def _put_pasid_back(self, dev: Device, pasid: int, domain: Domain, old: Domain | None) -> None:
        """Undo one member: back to the old domain, or no PASID when there was none, or when it refuses (a warning)."""
        if isinstance(old, PasidDomain):
            try:
                old.set_dev_pasid(dev, pasid, domain)
            except IommufdError:
                pass
            else:
                return
        self._remove_pasid(dev, pasid, domain)

    def _remove_pasid(self, dev: Device, pasid: int, domain: Domain) -> None:
        blocked = dev.iommu.blocked_domain
        assert isinstance(blocked, PasidDomain)
        blocked.set_dev_pasid(dev, pasid, domain)


class Iopf:
    """The page faults of one device (struct iommu_fault_param); on while a domain with a handler is attached."""

    def __init__(self, dev: Device) -> None:
        self._dev = dev
        self._users = 0
        self._partial: list[Fault] = []
        self.responses: list[tuple[Fault, int]] = []  # what the device was answered, newest last
        self.answered: Callable[[IopfGroup, int], None] | None = None  # the device, if it listens

    @property
    def enabled(self) -> bool:
        """A domain with a handler is attached."""
        return self._users > 0

    def enable(self, domain: Domain | None) -> None:
        """iopf_queue_add_device(), once for all domains."""
        if domain is not None and domain.iopf_handler is not None:
            self._users += 1

    def disable(self, domain: Domain | None) -> None:
        """iopf_queue_remove_device(), with the last domain: partial groups are dropped."""
        if domain is not None and domain.iopf_handler is not None:
            self._users -= 1
            if not self._users:
                self._partial.clear()

    def report(self, fault: Fault, *, pasid_valid: bool, last: bool) -> None:
        """A page request from the device (iommu_report_device_fault): EINVAL when nobody handles it."""
        handle = self._find_handler(fault, pasid_valid=pasid_valid)
        if handle is None or not self._users:
            self._note(fault, IOMMU_PAGE_RESP_INVALID)
            raise EINVAL("no domain with a fault queue is attached")
        if not last:
            self._partial.append(fault)
            return
        group = [part for part in self._partial if part.grpid == fault.grpid]
        self._partial = [part for part in self._partial if part.grpid != fault.grpid]
        assert handle.domain.iopf_handler is not None
        handle.domain.iopf_handler(IopfGroup(handle, [*group, fault], self._respond))

    def _respond(self, group: IopfGroup, code: int) -> None:
        self._note(group.faults[-1], code)
        if self.answered is not None:
            self.answered(group, code)

    def _note(self, fault: Fault, code: int) -> None:
        self.responses.append((fault, code))
        del self.responses[:-64]

    def _find_handler(self, fault: Fault, *, pasid_valid: bool) -> AttachHandle | None:
        """find_fault_handler(): a PASID nobody attached belongs to the user's table behind a nested RID."""
        handles = self._dev.group.handles
        handle = handles.get(fault.pasid if pasid_valid else IOMMU_NO_PASID)
        if handle is None and pasid_valid and self._dev.iommu.user_pasid_table:
            rid = handles.get(IOMMU_NO_PASID)
            handle = rid if rid is not None and rid.domain.type is DomainType.NESTED else None
        return handle if handle is not None and handle.domain.iopf_handler is not None else None
