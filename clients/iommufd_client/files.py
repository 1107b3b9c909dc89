"""Room client: descriptors that are closed exactly once, and the memfds that the daemon trusts."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Protocol, Self

if TYPE_CHECKING:
    import mmap

    from typing_extensions import Buffer

F_ADD_SEALS = 1033
F_SEAL_SHRINK, F_SEAL_GROW = 2, 4


class HasFileno(Protocol):
    """Whatever has a descriptor."""

    def fileno(self) -> int: ...


class Fd:
    """A descriptor of this process. Usable wherever `fileno()` is: poll, select, os.fstat, SCM_RIGHTS."""

    __slots__ = ("__weakref__", "_fd")

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def fileno(self) -> int:
        """The number. ValueError once it is closed or detached."""
        if self._fd < 0:
            raise ValueError(f"{type(self).__name__} is closed")
        return self._fd

    def detach(self) -> int:
        """The number, which is the caller's to close from now on."""
        fd, self._fd = self.fileno(), -1
        return fd

    @property
    def closed(self) -> bool:
        return self._fd < 0

    def close(self) -> None:
        """Close it; once is enough, again does nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        if self._fd >= 0:
            from warnings import warn

            warn(f"unclosed {self!r}", ResourceWarning, stacklevel=2, source=self)
            self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {'closed' if self._fd < 0 else self._fd}>"


class Channel(Protocol):
    """What a file needs of its connection."""

    def read(self, fd: HasFileno | int, count: int) -> bytes: ...
    def write(self, fd: HasFileno | int, data: Buffer) -> int: ...


class File(Fd):
    """A file that the daemon handed out: an event queue, an access, a DMA-BUF. `poll` works on its number."""

    __slots__ = ("_channel",)

    def __init__(self, fd: int, channel: Channel) -> None:
        super().__init__(fd)
        self._channel = channel

    def read(self, count: int) -> bytes:
        """read(2), which never waits: whole records, b"" when there is none. IommufdOSError as the kernel."""
        return self._channel.read(self, count)

    def write(self, data: Buffer) -> int:
        """write(2): how many bytes were taken."""
        return self._channel.write(self, data)


class Mapping(Fd):
    """Registers of a vIOMMU, mapped here; as long as the descriptor is open, in any process, their owner is busy."""

    __slots__ = ("_map", "view")

    def __init__(self, registers: int, fd: int, length: int, prot: int) -> None:
        """Takes over both descriptors: the file with the registers, and the one that stands for the mapping."""
        super().__init__(fd)
        import mmap

        try:
            self._map: mmap.mmap = mmap.mmap(registers, length, prot=prot)
        except BaseException:
            super().close()
            raise
        finally:
            os.close(registers)
        self.view = memoryview(self._map)  #: the registers

    def close(self) -> None:
        """munmap(2). BufferError while somebody holds a part of the view."""
        if self.closed:
            return
        self.view.release()
        self._map.close()
        super().close()


def fd_number(fd: HasFileno | int) -> int:
    """The number of an open file, or the number given."""
    return fd if isinstance(fd, int) else fd.fileno()


def sealed_memfd(name: str, size: int, *, grow: bool = False, hugetlb: bool = False) -> int:
    """A memfd that cannot shrink (the daemon maps no other), nor grow unless asked. ENOMEM, EINVAL."""
    from fcntl import fcntl

    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | (os.MFD_HUGETLB if hugetlb else 0)
    fd = os.memfd_create(name, flags)
    try:
        os.ftruncate(fd, size)
        fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | (0 if grow else F_SEAL_GROW))
    except BaseException:
        os.close(fd)
        raise
    return fd
