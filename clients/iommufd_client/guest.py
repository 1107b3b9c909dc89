"""Room client: guest memory, a memfd that this process maps and the daemon's devices reach by DMA."""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING, Protocol, Self

from .files import Fd, sealed_memfd

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from .files import HasFileno

PAGE_SIZE = 4096
HUGE_PAGE_SIZE = 2 << 20


class AddressSpace(Protocol):
    """The channel that guest memory is registered with."""

    def register(self, addr: int, length: int, fd: HasFileno | int, offset: int = 0) -> None: ...
    def unregister(self, addr: int, length: int) -> None: ...
    @property
    def closed(self) -> bool: ...


class Slice:
    """A part of guest memory: what IOAS_MAP needs to know, and the bytes."""

    __slots__ = ("address", "offset", "view")

    def __init__(self, address: int, offset: int, view: memoryview) -> None:
        self.address = address
        self.offset = offset  # from the start of the guest memory
        self.view = view

    def __len__(self) -> int:
        return self.view.nbytes


class GuestMemory:
    """`size` bytes of shared memory that neither shrink nor grow, mapped at `address` of this process.

    The size is rounded up to whole pages. Registered with a channel, its pages can be mapped by IOAS_MAP (by
    address) as well as by IOAS_MAP_FILE (by `fd`). Pages that are mapped outlive this object.
    """

    def __init__(self, size: int, name: str = "guest", *, hugetlb: bool = False) -> None:
        """ValueError for a size that is not positive; OSError: ENOMEM without huge pages."""
        if size <= 0:
            raise ValueError(f"guest memory of {size} bytes")
        from ctypes import addressof, c_char

        page = HUGE_PAGE_SIZE if hugetlb else PAGE_SIZE
        size = -(-size // page) * page
        self.name = name
        self.fd = Fd(sealed_memfd(name, size, hugetlb=hugetlb))
        try:
            self._map = mmap.mmap(self.fd.fileno(), size)
        except BaseException:
            self.fd.close()
            raise
        self._size = size
        self.address = addressof(c_char.from_buffer(self._map))
        self.view = memoryview(self._map)  #: the bytes, writable
        self._space: AddressSpace | None = None

    def register(self, space: AddressSpace) -> Self:
        """Tell the daemon that these addresses show this memfd; once, with one address space."""
        if self._space is not None:
            raise ValueError(f"{self.name} is registered already")
        space.register(self.address, len(self), self.fd)
        self._space = space
        return self

    def __len__(self) -> int:
        return self._size

    def slice(self, offset: int, length: int) -> Slice:
        """[offset, offset + length), to be mapped or accessed on its own. ValueError beyond the end."""
        if not 0 <= offset <= offset + length <= len(self):
            raise ValueError(f"[{offset:#x}, +{length:#x}) is not within {self.name} of {len(self):#x} bytes")
        return Slice(self.address + offset, offset, self.view[offset : offset + length])

    def read(self, offset: int, length: int) -> bytes:
        """Bytes at an offset; ValueError beyond the end."""
        return bytes(self.slice(offset, length).view)

    def write(self, offset: int, data: Buffer) -> None:
        """Store bytes at an offset; ValueError beyond the end."""
        source = memoryview(data).cast("B")
        self.slice(offset, source.nbytes).view[:] = source

    @property
    def closed(self) -> bool:
        return self.fd.closed

    def close(self) -> None:
        """Unregister and close. The memory itself goes with the last slice of it."""
        if self.closed:
            return
        space, self._space = self._space, None
        try:
            if space is not None and not space.closed:
                space.unregister(self.address, len(self))
        except ConnectionError:
            pass  # the daemon is gone, and the address space with it
        finally:
            self.fd.close()
            self.view.release()
            del self._map

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<GuestMemory {self.name} {'closed' if self.closed else f'{self.address:#x}+{len(self):#x}'}>"
