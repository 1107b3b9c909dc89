"""Room client: a device of a daemon's machine, and the DMA it is told to do through the admin socket."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias, TypedDict

from iommufd_uapi import admin

if TYPE_CHECKING:
    from collections.abc import Iterator

    from typing_extensions import Buffer, Unpack

    from .admin import Admin
    from .files import HasFileno


Op: TypeAlias = Literal["read", "write", "fill", "compare"]


class How(TypedDict, total=False):
    """What a request is like."""

    pasid: int | None  #: none: a request without PASID
    privileged: bool
    page_timeout: float | None  #: seconds that the device waits for a page; none: as long as the daemon says


class Opened(Protocol):
    """A /dev/iommu of the daemon: it names its machine, also a private one."""

    @property
    def identity(self) -> HasFileno: ...


def instance_of(where: str | Opened) -> str:
    """The name of a machine instance for the admin socket: as it is shared, or of an open /dev/iommu."""
    return where if isinstance(where, str) else str(os.fstat(where.identity.fileno()).st_ino)


class DmaError(Exception):
    """A DMA that failed after `done` bytes; `fault` is the IOMMU's refusal, if it was one.

    A comparison that found a difference has no fault, and `done` is the offset of the first one.
    """

    def __init__(self, device: str, done: int, reason: str, fault: admin.Refusal | None, data: bytes = b"") -> None:
        super().__init__(f"{device}: {reason}")
        self.device = device
        self.done = done
        self.reason = reason
        self.fault = fault
        self.data = data  # what was read until then


class Endpoint:
    """One device. Transfers of any length; each part of 1 MiB is one call, and others may come in between.

    Errors: DmaError; IommufdOSError ENOENT, EINVAL when there is no such device.
    """

    def __init__(self, admin: Admin, device: str, instance: str | Opened = "") -> None:
        """`instance`: the name of a shared machine, or an open /dev/iommu; "" if only one machine has the device."""
        self._admin = admin
        self.device = device
        self.instance = instance_of(instance)

    def read(self, iova: int, length: int, **how: Unpack[How]) -> bytes:
        """What the device reads."""
        return self._run("read", iova, length, b"", how)

    def write(self, iova: int, data: Buffer, **how: Unpack[How]) -> None:
        """Let it write data."""
        data = bytes(data)
        self._run("write", iova, len(data), data, how)

    def fill(self, iova: int, length: int, pattern: Buffer = b"\0", **how: Unpack[How]) -> None:
        """Let it write the pattern again and again."""
        self._run("fill", iova, length, bytes(pattern), how)

    def compare(self, iova: int, data: Buffer, **how: Unpack[How]) -> None:
        """Let it read, and complain about the first byte that is not that of data."""
        data = bytes(data)
        self._run("compare", iova, len(data), data, how)

    def walk(self, iova: int, *, pasid: int | None = None, write: bool = False) -> admin.Walked:
        """How a request would be translated, and what is cached of it. Nothing happens."""
        return self._admin.walk(self.device, iova, instance=self.instance, pasid=pasid, op="write" if write else "read")

    def _run(self, op: Op, iova: int, length: int, data: bytes, how: How) -> bytes:
        result = Result(self.device)
        for request in requests(self.device, self.instance, op, iova, length, data, how):
            result.add(self._admin.dma(request))
        return b"".join(result.data)


class Result:
    """What the parts of a transfer come to."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.done = 0
        self.data: list[bytes] = []

    def add(self, moved: admin.Moved) -> None:
        """The next part. DmaError."""
        self.done += moved.done
        if moved.data:
            self.data.append(moved.data)
        if moved.error:
            raise DmaError(self.device, self.done, moved.error, moved.fault, b"".join(self.data))


def requests(
    device: str, instance: str, op: Op, iova: int, length: int, data: bytes, how: How
) -> Iterator[admin.Dma]:
    """The calls that make up a transfer. Even one of no bytes is asked for, so that errors show."""
    for at in range(0, max(length, 1), admin.MAX_DMA):
        count = min(length - at, admin.MAX_DMA)
        part = data[at : at + count]
        if op == "fill" and data:
            phase = at % len(data)
            part = data[phase:] + data[:phase]
        yield admin.Dma(device, op, iova + at, count, part, instance, **how)
