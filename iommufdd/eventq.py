"""Event queues and the files they are read through; the fault queue (eventq.c).

Queues are pull: a record can be withdrawn on detach and its cookie is made when it is read. The file only tells that
its poll mask may have changed; whoever shows it to a process asks poll().
"""

from __future__ import annotations

import heapq
import select
from collections import deque
from typing import TYPE_CHECKING

import iommufd_uapi.iommufd as uapi

from .errors import EFAULT, EINVAL, EOPNOTSUPP, ESPIPE, IommufdError
from .objects import Holder, IommufdObject, ObjectType
from .user import File, Gate

if TYPE_CHECKING:
    from collections.abc import Callable

    from .context import Context
    from .iommu.group import AttachHandle, IopfGroup
    from .ucmd import Ucmd
    from .user import Caller

IN = select.POLLIN | select.POLLRDNORM
RESP_INVALID = uapi.IOMMUFD_PAGE_RESP_INVALID


class EventqFile(File, Holder):
    """The file of a queue: it holds the queue, and keeps the context alive."""

    def __init__(self, ictx: Context, eventq: Eventq) -> None:
        Holder.__init__(self)
        self.refs = 1
        self.ictx = ictx
        self.eventq = self.hold(eventq)
        eventq.file = self
        ictx.get()

    def release(self) -> None:
        self.eventq.file = None
        self.let_go(self.eventq)
        self.ictx.put()

    def read(self, caller: Caller, addr: int, count: int) -> int:
        done = self._transfer("read", self.eventq.read, caller, addr, count)
        self.changed()
        return done

    def write(self, caller: Caller, addr: int, count: int) -> int:
        return self._transfer("write", self.eventq.write, caller, addr, count)

    def _transfer(
        self, verb: str, act: Callable[[Caller, int, int], int], caller: Caller, addr: int, count: int
    ) -> int:
        """Do it, and tell whoever listens."""
        events = self.ictx.events
        if not events.listening:
            return act(caller, addr, count)
        entered = events.enter(self.ictx, caller, 0, addr)
        try:
            done = act(caller, addr, count)
        except IommufdError as error:
            caller.error = error
            events.transfer(self.eventq, verb, caller, addr, count, -error.errno, entered)
            caller.error = None  # it keeps the frames of the call alive
            raise
        events.transfer(self.eventq, verb, caller, addr, count, done, entered)
        return done

    def poll(self) -> int:
        return self.eventq.poll()

    def __str__(self) -> str:
        return f"the open file of {self.eventq}"


class Eventq(IommufdObject):
    """struct iommufd_eventq"""

    file: EventqFile | None = None

    def read(self, caller: Caller, addr: int, count: int) -> int:
        """Whole records to addr; the bytes copied."""
        raise NotImplementedError

    def write(self, caller: Caller, addr: int, count: int) -> int:
        """Responses from addr; the bytes taken."""
        raise NotImplementedError

    def poll(self) -> int:
        """The poll(2) mask of the queue's file (iommufd_eventq_fops_poll)."""
        raise NotImplementedError

    def changed(self) -> None:
        if self.file is not None:
            self.file.changed()


class Fault(Eventq):
    """struct iommufd_fault: page requests to deliver, and those delivered that wait for a response."""

    type = ObjectType.FAULT

    def __init__(self) -> None:
        super().__init__()
        self.deliver: deque[IopfGroup] = deque()
        self.response: dict[int, IopfGroup] = {}  # by cookie
        self._free: list[int] = []  # cookies given back, a heap
        self._next = 1
        self._zero = False

    def iopf_handler(self, group: IopfGroup) -> None:
        """iommufd_fault_iopf_handler()"""
        self.deliver.append(group)
        self.changed()

    def auto_response(self, handle: AttachHandle) -> None:
        """Answer INVALID whatever came through an attachment that ends (iommufd_auto_response_faults)."""
        for group in [group for group in self.deliver if group.handle is handle]:
            self.deliver.remove(group)
            group.withdrawn = True
            group.respond(RESP_INVALID)
        for cookie in [cookie for cookie, group in self.response.items() if group.handle is handle]:
            group = self._take(cookie)
            group.withdrawn = True
            group.respond(RESP_INVALID)
        self.changed()

    def destroy(self) -> None:
        for group in (*self.deliver, *self.response.values()):
            group.respond(RESP_INVALID)
        self.deliver.clear()
        self.response.clear()
        super().destroy()

    def _give(self, group: IopfGroup) -> None:
        """The lowest free cookie, from 1."""
        if self._free:
            group.cookie = heapq.heappop(self._free)
        else:
            group.cookie = self._next
            self._next += 1
        self.response[group.cookie] = group

    def _take(self, cookie: int) -> IopfGroup:
        group = self.response.pop(cookie)
        heapq.heappush(self._free, cookie)
        return group

    def read(self, caller: Caller, addr: int, count: int) -> int:
        """iommufd_fault_fops_read(): whole groups; ESPIPE, EINVAL, EFAULT, ENOMEM."""
        size = uapi.HwptPgfault.SIZEOF
        if count % size:
            raise ESPIPE(f"a count of {count} is no multiple of {size}")
        done = 0
        while self.deliver:
            group = self.deliver[0]
            if done >= count or len(group.faults) * size > count - done:
                if not done:
                    raise EINVAL(f"the first group is {len(group.faults) * size} bytes")
                break
            try:
                caller.gate(Gate.MEMORY)
                self._give(group)
                self._copy(caller, addr + done, group)
            except IommufdError:
                if group.cookie in self.response:
                    self._take(group.cookie)
                if not done:
                    raise
                break
            self.deliver.popleft()
            done += len(group.faults) * size
        return done

    def _copy(self, caller: Caller, addr: int, group: IopfGroup) -> None:
        """iommufd_compose_fault_message() for each record."""
        for fault in group.faults:
            record = uapi.HwptPgfault(
                flags=fault.flags, dev_id=group.handle.idev.id, pasid=fault.pasid, grpid=fault.grpid,
                perm=fault.perm, addr=fault.addr, cookie=group.cookie,
            )  # fmt: skip
            caller.copy_to_user(addr, record.pack())
            addr += record.SIZEOF

    def write(self, caller: Caller, addr: int, count: int) -> int:
        """iommufd_fault_fops_write(): stops at the first bad response; ESPIPE, EFAULT, EINVAL."""
        size = uapi.HwptPageResponse.SIZEOF
        if count % size:
            raise ESPIPE(f"a count of {count} is no multiple of {size}")
        done = 0
        while done < count:
            try:
                self._respond(uapi.HwptPageResponse.unpack(caller.copy_from_user(addr + done, size)))
            except IommufdError:
                if not done:
                    raise
                break
            done += size
        return done

    def _respond(self, response: uapi.HwptPageResponse) -> None:
        if response.code not in (uapi.IOMMUFD_PAGE_RESP_SUCCESS, uapi.IOMMUFD_PAGE_RESP_INVALID):
            raise EINVAL(f"response code {response.code} is neither SUCCESS nor INVALID")
        if response.cookie not in self.response:
            if response.cookie == 0 and self.response and not self._zero:
                self._zero = True  # quirk: erasing the reserved 0 of the xarray makes it a cookie like any other
                heapq.heappush(self._free, 0)
            raise EINVAL(f"cookie {response.cookie} is not waiting for a response")
        self._take(response.cookie).respond(response.code)

    def poll(self) -> int:
        return select.POLLOUT | (IN if self.deliver else 0)


def fault_alloc(ucmd: Ucmd, cmd: uapi.FaultAlloc) -> None:
    """IOMMU_FAULT_QUEUE_ALLOC: EOPNOTSUPP, ENOMEM, EMFILE, EFAULT."""
    if cmd.flags:
        raise EOPNOTSUPP(f"flags {cmd.flags:#x} are not known")
    fault = ucmd.alloc(Fault())
    cmd.out_fault_id = fault.id
    open_eventq(ucmd, fault, cmd, "out_fault_fd")


def open_eventq(ucmd: Ucmd, eventq: Eventq, cmd: uapi.FaultAlloc | uapi.VeventqAlloc, field: str) -> None:
    """iommufd_eventq_init() and the answer: a file, its number, then the struct; undone in turn."""
    caller = ucmd.caller
    caller.gate(Gate.MEMORY)
    file = EventqFile(ucmd.ictx, eventq)
    try:
        fd = caller.get_unused_fd()
        setattr(cmd, field, fd)
        try:
            ucmd.respond(cmd)
        except EFAULT:
            caller.files.put_unused_fd(fd)
            raise
    except IommufdError:
        file.put()
        raise
    caller.files.fd_install(fd, file)
