"""Devices by name for the admin plane: let them do DMA, and show how they would be translated."""

from __future__ import annotations

import select
from typing import TYPE_CHECKING

import trio

from iommufd_uapi import admin
from iommufdd.errors import EINVAL, ENOENT, EOPNOTSUPP
from iommufdd.ioas import Ioas
from iommufdd.iommu.dma import Dma, Op
from iommufdd.iommu.endpoint import Endpoint
from iommufdd.iommu.explain import Explains, rights, why, words
from iommufdd.iommu.walk import PRIV, READ, WRITE

if TYPE_CHECKING:
    from collections.abc import Callable

    from iommufdd.iommu.explain import Row
    from iommufdd.iommu.walk import TranslationFault

    from .instance import Instance
    from .serve import Server

MAX_PASID = 1 << 20


def find(server: Server, name: str, device: str) -> tuple[Instance, Endpoint]:
    """A device of an instance (iommufd_uapi.admin says how it is named). ENOENT, EINVAL, EOPNOTSUPP."""
    found = _named(server, name) if name else list(server.instances)
    if not found:
        raise ENOENT(f"nothing is open on a machine {name!r}" if name else "nothing is open")
    having = [instance for instance in found if device in instance.machine.devices]
    if not having:
        there = sorted({each for instance in found for each in instance.machine.devices})
        raise ENOENT(f"there is no device {device!r}; there are {', '.join(there) or 'none'}")
    if len(having) > 1:
        names = [instance.machine.name or str(min(each.key[1] for each in instance.contexts)) for instance in having]
        raise EINVAL(f"{len(having)} machines have a {device}: name one of {', '.join(names)}")
    dev = having[0].machine.devices[device]
    if not isinstance(dev, Endpoint):
        raise EOPNOTSUPP(f"{device} does no DMA: it is the selftest's")
    return having[0], dev


def _named(server: Server, name: str) -> list[Instance]:
    """The instance of a name, and the one with a context of that inode.

    A client that gives its machine the inode of another's context as a name must not have what was meant for that.
    """
    return [
        each
        for each in server.instances
        if each.machine.name == name or any(name == str(context.key[1]) for context in each.contexts)
    ]


# ---- DMA ---------------------------------------------------------------------------------------------------


class HangUp:
    """Tells when the peer of a connection is gone, even while nobody reads it; a peer that has only said all is not."""

    def __init__(self, server: Server, fd: int, gone: Callable[[], None]) -> None:
        self._reactor = server.reactor
        self._fd = fd
        self._gone = gone
        self._reactor.register(fd, self, 0)

    def ready(self, mask: int) -> None:
        self.end()
        if mask & (select.EPOLLHUP | select.EPOLLERR):
            self._gone()

    def end(self) -> None:
        if self._fd >= 0:
            self._reactor.unregister(self._fd)
            self._fd = -1


async def transfer(server: Server, fd: int, request: admin.Dma) -> admin.Reply:
    """One DMA to its end; cancelled if the peer of `fd` goes meanwhile. ENOENT, EINVAL, EOPNOTSUPP."""
    _, dev = find(server, request.instance, request.device)
    over = trio.Event()
    dma = _new(dev, request, over)
    dev.dma(dma)
    if not over.is_set():
        try:
            hang_up = HangUp(server, fd, lambda: dma.cancel("whoever asked for it is gone"))
            try:
                await over.wait()
            finally:
                hang_up.end()
        finally:
            dma.cancel("the daemon stops")
    data = bytes(dma.data[: dma.done]) if dma.op is Op.READ else b""
    if dma.fault is None or not dma.error:
        return admin.Moved(dma.done, data, dma.error)
    fault = refusal(dev, dma.fault, dma.iova + dma.done)
    error = fault.text if dma.error == str(dma.fault) else f"{dma.error} ({fault.text})"
    return admin.Moved(dma.done, data, error, fault)


def _new(dev: Endpoint, request: admin.Dma, over: trio.Event) -> Dma:
    op, length = Op(request.op), request.length
    if not 0 <= length <= admin.MAX_DMA:
        raise EINVAL(f"a length of {length} bytes, not 0 to {admin.MAX_DMA}")
    _check(request.iova, length, request.pasid)
    if op in (Op.WRITE, Op.COMPARE) and len(request.data) != length:
        raise EINVAL(f"{len(request.data)} bytes of data for a length of {length}")
    if op is Op.FILL and not request.data:
        raise EINVAL("a fill needs a pattern of at least one byte")
    if request.page_timeout is not None and not request.page_timeout >= 0:
        raise EINVAL(f"a timeout of {request.page_timeout} seconds")
    return Dma(
        dev, op, request.iova, length, data=request.data, pasid=request.pasid, priv=PRIV if request.privileged else 0,
        timeout=request.page_timeout, ended=lambda _: over.set(),
    )  # fmt: skip


def _check(iova: int, length: int, pasid: int | None) -> None:
    if iova < 0 or iova + length > 1 << 64:
        raise EINVAL(f"iova {iova:#x} with {length:#x} bytes is not within 64 bits")
    if pasid is not None and not 0 <= pasid < MAX_PASID:
        raise EINVAL(f"PASID {pasid} is not within 20 bits")


def refusal(dev: Endpoint, fault: TranslationFault, iova: int) -> admin.Refusal:
    """A fault in the words of the admin plane."""
    iommu = dev.iommu
    steps = [words(iommu.step(step)) for step in fault.steps] if isinstance(iommu, Explains) else []
    return admin.Refusal(fault.code, fault.name, fault.stage, fault.level, fault.addr, why(fault, iova), steps)


# ---- walks -------------------------------------------------------------------------------------------------


def walk(server: Server, request: admin.Walk) -> admin.Walked:
    """How a request would be translated. ENOENT, EINVAL, EOPNOTSUPP."""
    _check(request.iova, 1, request.pasid)
    instance, dev = find(server, request.instance, request.device)
    iommu = dev.iommu
    if not isinstance(iommu, Explains):
        raise EOPNOTSUPP(f"the IOMMU of {request.device} cannot explain itself")
    access = (WRITE if request.op == "write" else READ) | (PRIV if request.privileged else 0)
    shown = iommu.explain(dev, request.pasid, request.iova, access)
    reply = admin.Walked(
        request.device,
        iommu.driver,
        rows=[_row(instance, row) for row in shown.rows],
        cached=[_row(instance, row) for row in shown.cached],
        fault=None if shown.fault is None else refusal(dev, shown.fault, request.iova),
    )
    if shown.entry is not None:
        reply.first, reply.last, reply.rights = shown.entry.first, shown.entry.last, rights(shown.entry)
    return reply


def _row(instance: Instance, row: Row) -> admin.Row:
    address = row.address if row.table is None else row.at
    return admin.Row(
        row.what, row.depth, address, list(row.words), row.bits, row.leads, row.differs, _area(instance, row)
    )


def _area(instance: Instance, row: Row) -> admin.Area | None:
    """What a kernel's own table has at an address: a stretch of the IOAS that it shows."""
    extent = row.table.extent(row.at) if row.table is not None else None
    if extent is None:
        return None
    ioas, inode = next(
        (obj.id, context.key[1])
        for context in instance.contexts
        for obj in context.ctx.objects
        if isinstance(obj, Ioas) and obj.iopt is row.table
    )
    offset = extent.pos + row.at - extent.first
    return admin.Area(
        ioas, inode, extent.first, extent.last, str(extent.file), offset, extent.readable, extent.writable
    )
