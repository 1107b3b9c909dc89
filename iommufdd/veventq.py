"""vEVENTQ: events of a vIOMMU for its guest, with sequence numbers and a marker for what was lost (eventq.c)."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, NamedTuple

import iommufd_uapi.iommufd as uapi

from .errors import EEXIST, EINVAL, EOPNOTSUPP, IommufdError
from .eventq import IN, Eventq, open_eventq
from .objects import ObjectType
from .user import Gate
from .viommu import Viommu

if TYPE_CHECKING:
    from .ucmd import Ucmd
    from .user import Caller

VEVENTQ_MAX_DEPTH = 1 << 19


class Vevent(NamedTuple):
    """struct iommufd_vevent; the single lost-events marker has no data."""

    flags: int
    sequence: int
    data: bytes

    def pack(self) -> bytes:
        return uapi.IommufdVeventHeader(self.flags, self.sequence).pack() + self.data


class Veventq(Eventq):
    """struct iommufd_veventq: events of one type for one vIOMMU; `depth` bounds those that carry data."""

    type = ObjectType.VEVENTQ

    def __init__(self, viommu: Viommu, event_type: int, depth: int) -> None:
        super().__init__()
        self.viommu = viommu
        self.event_type = event_type
        self.depth = depth
        self.sequence = 0
        self.num_events = 0
        self.deliver: deque[Vevent] = deque()

    def destroy(self) -> None:
        if self in self.viommu.veventqs:
            self.viommu.veventqs.remove(self)
        super().destroy()

    def report(self, data: bytes) -> None:
        """Queue an event; when full the lost-events marker moves to the tail (iommufd_vevent_handler)."""
        if self.deliver and self.deliver[-1].flags & uapi.IOMMU_VEVENTQ_FLAG_LOST_EVENTS:
            self.deliver.pop()
        if self.num_events == self.depth:
            self.deliver.append(Vevent(uapi.IOMMU_VEVENTQ_FLAG_LOST_EVENTS, self.sequence, b""))
        else:
            self.deliver.append(Vevent(0, self.sequence, data))
            self.num_events += 1
        self.sequence = (self.sequence + 1) & 0x7FFFFFFF
        self.changed()

    def read(self, caller: Caller, addr: int, count: int) -> int:
        """iommufd_veventq_fops_read(): whole records; EINVAL, EFAULT, ENOMEM."""
        header = uapi.IommufdVeventHeader.SIZEOF
        if count < header:
            raise EINVAL(f"a count of {count} is less than a header")
        done = 0
        while self.deliver:
            vevent = self.deliver[0]
            if header > count - done:
                break
            if header + len(vevent.data) > count - done:
                if not done:
                    raise EINVAL(f"the first event is {header + len(vevent.data)} bytes")
                break
            try:
                caller.gate(Gate.MEMORY)
                caller.copy_to_user(addr + done, vevent.pack())
            except IommufdError:
                if not done:
                    raise
                break
            self.deliver.popleft()
            self.num_events -= bool(vevent.data)
            done += header + len(vevent.data)
        return done

    def write(self, caller: Caller, addr: int, count: int) -> int:
        raise EINVAL("a vEVENTQ cannot be written")

    def poll(self) -> int:
        return IN if self.deliver else 0


def veventq_alloc(ucmd: Ucmd, cmd: uapi.VeventqAlloc) -> None:
    """IOMMU_VEVENTQ_ALLOC: EOPNOTSUPP, EINVAL, ENOENT, EEXIST, ENOMEM, EMFILE, EFAULT."""
    if cmd.flags or cmd.reserved or cmd.type == uapi.IOMMU_VEVENTQ_TYPE_DEFAULT:
        raise EOPNOTSUPP("flags are not known, reserved is not 0, or the type is 0")
    if not 0 < cmd.veventq_depth <= VEVENTQ_MAX_DEPTH:
        raise EINVAL(f"a depth of {cmd.veventq_depth} is not within 1..{VEVENTQ_MAX_DEPTH}")
    viommu = ucmd.get(cmd.viommu_id, Viommu)
    if viommu.find_veventq(cmd.type) is not None:
        raise EEXIST(f"{viommu} has a vEVENTQ of type {cmd.type:#x}")
    veventq = ucmd.alloc(Veventq(viommu, cmd.type, cmd.veventq_depth))
    veventq.hold(viommu)
    viommu.veventqs.append(veventq)
    cmd.out_veventq_id = veventq.id
    open_eventq(ucmd, veventq, cmd, "out_veventq_fd")
