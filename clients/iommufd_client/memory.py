"""Room client: the memory that the pointers of an ioctl name, as the kernel's copy_from_user() finds it.

`Memory` is the port. `OwnMemory` is this very process, so that a struct with raw pointers behaves as it does
under the kernel. `Buffers` gives addresses to Python objects, for callers that have no pointers at all.
"""

from __future__ import annotations

import os
from struct import Struct
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from ctypes import CDLL

    from typing_extensions import Buffer

PAGE_SIZE = 4096
ADDRESSES = 1 << 64

EFAULT, EINTR, ENOTTY = 14, 4, 25

PROCMAP_QUERY = 0xC0686611  # _IOWR('f', 17, struct procmap_query): Linux 6.11
_QUERY_BYTES = 104
_VMA_WRITABLE = 0x02
_IOVEC = Struct("@PN").pack  # struct iovec


class Memory(Protocol):
    """What a call may touch. Addresses are any 64-bit numbers; no method raises for a bad one."""

    def read(self, addr: int, length: int) -> bytes:
        """The readable prefix of [addr, addr + length)."""
        ...

    def writable(self, addr: int, length: int) -> int:
        """Bytes of the writable prefix of [addr, addr + length); nothing is written."""
        ...

    def write(self, addr: int, data: bytes) -> int:
        """Store the longest writable prefix; how many bytes were stored."""
        ...


class NoMemory:
    """No address is mapped: every access is a fault."""

    def read(self, addr: int, length: int) -> bytes:
        return b""

    def writable(self, addr: int, length: int) -> int:
        return 0

    def write(self, addr: int, data: bytes) -> int:
        return 0


class Buffers:
    """Python buffers at addresses of our own choice, far apart, so that running off one is a fault."""

    # In the kernel's half: no pointer of a real process ever lies here.
    BASE = 0xFFFF_9000_0000_0000
    STRIDE = 1 << 36

    __slots__ = ("_views",)

    def __init__(self) -> None:
        self._views: list[memoryview] = []

    def add(self, buffer: Buffer) -> int:
        """The address of a buffer; 0 (NULL) for an empty one. bytes can be read only."""
        view = memoryview(buffer).cast("B")
        if not view.nbytes:
            return 0
        self._views.append(view)
        return self.BASE + self.STRIDE * (len(self._views) - 1)

    def _at(self, addr: int, length: int) -> memoryview:
        index, offset = divmod(addr - self.BASE, self.STRIDE)
        if 0 <= index < len(self._views):
            return self._views[index][offset : offset + length]
        return memoryview(b"")

    def read(self, addr: int, length: int) -> bytes:
        return bytes(self._at(addr, length))

    def writable(self, addr: int, length: int) -> int:
        view = self._at(addr, length)
        return 0 if view.readonly else view.nbytes

    def write(self, addr: int, data: bytes) -> int:
        view = self._at(addr, len(data))
        if view.readonly:
            return 0
        view[:] = data[: view.nbytes]
        return view.nbytes


class OwnMemory:
    """The address space of this process. A fault anywhere is a short answer, never a signal."""

    __slots__ = ("_maps", "_pid")

    def __init__(self) -> None:
        self._maps = -1  # /proc/self/maps, open: it stays with the mm of its opener
        self._pid = 0

    def read(self, addr: int, length: int) -> bytes:
        length = _clip(addr, length)
        if length <= 0:
            return b""
        data = bytearray(length)
        done = _transfer("process_vm_readv", data, addr, length)
        return bytes(data) if done == length else bytes(memoryview(data)[:done])

    def write(self, addr: int, data: bytes) -> int:
        length = _clip(addr, len(data))
        return _transfer("process_vm_writev", bytearray(data), addr, length) if length > 0 else 0

    def writable(self, addr: int, length: int) -> int:
        """As `Memory`; asks the VMAs. A page of a file beyond its end is not writable."""
        end = addr + _clip(addr, length)
        at = addr
        while at < end:
            stop, file_backed = self._vma(at)
            if stop <= at:
                break
            stop = min(stop, end)
            if file_backed:
                present = self._present(at, stop)
                if present < stop:
                    return present - addr
            at = stop
        return max(at - addr, 0)

    def _present(self, at: int, stop: int) -> int:
        """The end of the pages from `at` that have something behind them."""
        while at < stop:
            if not self.read(at, 1):
                break
            at = min((at // PAGE_SIZE + 1) * PAGE_SIZE, stop)
        return at

    def _vma(self, addr: int) -> tuple[int, bool]:
        """The end of the writable VMA at addr, and whether it shows a file; (0, False) if there is none."""
        if self._pid != os.getpid():
            self._reopen()
        query = bytearray(_QUERY_BYTES)
        query[0] = _QUERY_BYTES
        query[8] = _VMA_WRITABLE
        query[16:24] = addr.to_bytes(8, "little")
        from fcntl import ioctl

        try:
            ioctl(self._maps, PROCMAP_QUERY, query)
        except OSError as error:
            return self._vma_text(addr) if error.errno == ENOTTY else (0, False)
        start, end, inode = (int.from_bytes(query[at : at + 8], "little") for at in (24, 32, 64))
        return (end, inode != 0) if start <= addr else (0, False)

    def _vma_text(self, addr: int) -> tuple[int, bool]:
        """The same from the text, for kernels before 6.11."""
        with open("/proc/self/maps", "rb") as maps:
            for line in maps:
                span, prot, _, _, inode = line.split(None, 5)[:5]
                start, end = (int(number, 16) for number in span.split(b"-"))
                if start <= addr < end:
                    return (end, inode != b"0") if prot[1:2] == b"w" else (0, False)
        return 0, False

    def _reopen(self) -> None:
        """After a fork: the file we inherited still shows the parent."""
        self.close()
        self._maps = os.open("/proc/self/maps", os.O_RDONLY | os.O_CLOEXEC)
        self._pid = os.getpid()

    def close(self) -> None:
        if self._maps >= 0:
            os.close(self._maps)
        self._maps, self._pid = -1, 0

    def __del__(self) -> None:
        self.close()


OWN_MEMORY = OwnMemory()
NO_MEMORY = NoMemory()


def _clip(addr: int, length: int) -> int:
    """What of the range lies below 2**64."""
    return min(length, ADDRESSES - addr)


_libc: CDLL | None = None


def _load() -> CDLL:
    """libc with both calls declared; ctypes is imported by those alone who have raw pointers."""
    from ctypes import CDLL, c_char_p, c_int, c_ssize_t, c_ulong

    libc = CDLL(None, use_errno=True)
    for call in (libc.process_vm_readv, libc.process_vm_writev):
        call.restype = c_ssize_t
        call.argtypes = (c_int, c_char_p, c_ulong, c_char_p, c_ulong, c_ulong)  # iovecs as bytes
    return libc


def _transfer(name: str, data: bytearray, addr: int, length: int) -> int:
    """process_vm_readv() or process_vm_writev() on ourselves: bytes moved before the first fault.

    The kernel stops at a page that it cannot get, and says so only when it moved nothing at all.
    """
    global _libc
    if _libc is None:
        _libc = _load()
    from ctypes import addressof, c_char, get_errno

    local = _IOVEC(addressof(c_char.from_buffer(data)), length)
    remote = _IOVEC(addr, length)
    call = getattr(_libc, name)
    pid = os.getpid()
    while True:
        done: int = call(pid, local, 1, remote, 1, 0)
        if done >= 0:
            return done
        error = get_errno()
        if error == EFAULT:
            return 0
        if error != EINTR:
            raise OSError(error, f"{name}: {os.strerror(error)}")
