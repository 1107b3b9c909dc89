"""A program for tests of `iommufdctl mount`: mmap() of the file, and what --exact answers. As habits.py."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import signal
import struct
import subprocess
import sys
import threading
import time

from tests.mount.habits import (
    DESTROY,
    HWPT_ALLOC,
    IOAS_ALLOC,
    MOCK_DOMAIN,
    VIOMMU_ALLOC,
    device,
    failure,
    fault_queue,
    ioctl,
    test,
)

LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.mmap.restype = ctypes.c_void_p
LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
RW = mmap.PROT_READ | mmap.PROT_WRITE
PAGE = mmap.PAGESIZE
MAP_FAILED = ctypes.c_void_p(-1).value


def mapped(fd: int, offset: int, length: int, prot: int = RW, flags: int = mmap.MAP_SHARED, at: int = 0) -> int:
    """mmap(2): the address. OSError. (Python's own looks at st_size first.)"""
    found: int | None = LIBC.mmap(at or None, length, prot, flags, fd, offset)
    if found == MAP_FAILED or found is None:
        raise OSError(ctypes.get_errno(), "mmap")
    return found


def unmap(at: int, length: int) -> None:
    assert LIBC.munmap(at, length) == 0


def word(at: int) -> ctypes.c_uint32:
    return ctypes.c_uint32.from_address(at)


def viommu(fd: int, value: int) -> tuple[int, int, int]:
    """A vIOMMU with registers that start with `value`: its id, their offset and length."""
    ioas = ioctl(fd, IOAS_ALLOC, 0, 0)[2]
    idev = test(fd, MOCK_DOMAIN, ioas)[6]
    parent = ioctl(fd, HWPT_ALLOC, 1, idev, ioas, *(0 for _ in range(7)))[4]
    data = ctypes.create_string_buffer(struct.pack("<IIQQ", value, 0, 0, 0), 24)
    at = ctypes.addressof(data)
    found = ioctl(fd, VIOMMU_ALLOC, 0, 0xDEADBEEF, idev, parent, 0, 24, 0, at & 0xFFFFFFFF, at >> 32)[5]
    _, _, offset, length = struct.unpack("<IIQQ", data.raw)
    return found, offset, length


def registers() -> None:
    """Of two contexts; what is mapped is not destroyed, and outlives its descriptor."""
    fd, other = device(), device()
    one, offset, length = viommu(fd, 0x1234)
    _, offset2, length2 = viommu(other, 0x5678)
    at, second = mapped(fd, offset, length), mapped(other, offset2, length2)
    again = mapped(fd, offset, length, mmap.PROT_READ)
    assert (word(at).value, word(again).value, word(second).value) == (0x1234, 0x1234, 0x5678)
    word(at + length - 4).value = 77
    assert (word(again + length - 4).value, word(second + length - 4).value) == (77, 0)
    assert failure(ioctl, fd, DESTROY, one) == errno.EBUSY
    unmap(at, length)
    assert failure(ioctl, fd, DESTROY, one) == errno.EBUSY
    unmap(again, length)
    assert ioctl(fd, DESTROY, one)
    third = viommu(fd, 0x9ABC)[1:]
    at = mapped(fd, *third)
    assert (word(at).value, word(at + length - 4).value) == (0x9ABC, 0)
    os.close(other)
    fresh = device()
    at2 = mapped(fresh, *viommu(fresh, 0xDEF0)[1:])
    assert (word(second).value, word(at2).value) == (0x5678, 0xDEF0)
    unmap(second, length2)
    assert word(at).value == 0x9ABC


def no_registers() -> None:
    """Where nothing is behind the file."""
    fd = device()
    assert failure(mapped, fd, *viommu(fd, 1)[1:]) == errno.ENODEV


def errors() -> None:
    """What iommufd_fops_mmap and do_mmap refuse."""
    fd = device()
    _, offset, length = viommu(fd, 5)
    for wrong in (0, offset + PAGE, offset + length):
        assert failure(mapped, fd, wrong, length) == errno.ENXIO
    for wrong in (PAGE, length + PAGE):
        assert failure(mapped, fd, offset, wrong) == errno.ENXIO
    assert failure(mapped, fd, offset, 0) == errno.EINVAL
    assert failure(mapped, fd, offset + 4, length) == errno.EINVAL
    assert failure(mapped, fd, offset, length, RW, mmap.MAP_PRIVATE) == errno.EINVAL
    assert failure(mapped, fd, offset, length, RW | mmap.PROT_EXEC) == errno.EPERM
    assert failure(mapped, fault_queue(fd)[1], 0, PAGE) == errno.ENODEV
    for flags, prot in ((os.O_RDONLY, RW), (os.O_WRONLY, mmap.PROT_READ)):
        reopened = device(flags)
        assert failure(mapped, reopened, *viommu(reopened, 6)[1:], prot) == errno.EACCES
    reader = device(os.O_RDONLY)
    at = mapped(reader, *viommu(reader, 7)[1:], mmap.PROT_READ)
    assert word(at).value == 7
    assert LIBC.mprotect(ctypes.c_void_p(at), PAGE, RW) == -1
    assert ctypes.get_errno() == errno.EACCES
    hole = mapped(-1, 0, 4 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    assert mapped(fd, offset, length, at=hole + PAGE, flags=mmap.MAP_SHARED | 0x10) == hole + PAGE  # MAP_FIXED
    assert word(hole + PAGE).value == 5
    before = os.listdir("/proc/self/fd")
    mapped(fd, offset, length)
    assert os.listdir("/proc/self/fd") == before


def shared() -> None:
    """By threads at once, by a child of fork, by a program after exec, through a copy of the descriptor."""
    fd = device()
    found, offset, length = viommu(fd, 1)
    crowd: list[int] = []
    threads = [threading.Thread(target=lambda: crowd.append(mapped(fd, offset, length))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    word(crowd[0] + 8).value = 99
    assert [word(at + 8).value for at in crowd] == [99] * 8
    for at in crowd[1:]:
        unmap(at, length)
    copy = os.dup(fd)
    child = os.fork()
    if not child:
        word(mapped(copy, offset, length) + 12).value = 98
        os.set_inheritable(copy, True)
        words = [sys.executable, __file__, "after_exec", str(copy), str(offset), str(length)]
        os.execv(sys.executable, words)
    assert os.waitpid(child, 0)[1] == 0
    assert (word(crowd[0] + 12).value, word(crowd[0] + 16).value) == (98, 97)
    os.close(fd)
    assert failure(ioctl, copy, DESTROY, found) == errno.EBUSY
    unmap(crowd[0], length)
    assert ioctl(copy, DESTROY, found)


def after_exec() -> None:
    fd, offset, length = map(int, sys.argv[2:])
    at = mapped(fd, offset, length)
    assert word(at + 12).value == 98
    word(at + 16).value = 97


def nothing() -> None:
    """Reads and writes of nothing, and FIONREAD: a device's answers, and those of other files as ever."""
    fd = device()
    queue = fault_queue(fd)[1]
    assert failure(os.read, fd, 0) == errno.EINVAL
    assert failure(os.write, fd, b"") == errno.EINVAL
    assert failure(os.readv, fd, []) == errno.EINVAL
    assert failure(os.pread, fd, 0, 0) == errno.EINVAL
    assert failure(os.pread, queue, 0, 0) == errno.ESPIPE
    assert os.read(queue, 0) == b""
    for ours in (fd, queue):
        assert failure(os.lseek, ours, 0, os.SEEK_SET) == errno.ESPIPE
    count = bytearray(8)
    for ours in (fd, queue):
        for cmd in (0x541B, 1, 0x5460):  # FIONREAD, FIBMAP, FIOQSIZE
            assert failure(fcntl.ioctl, ours, cmd, count) == errno.ENOTTY
    end, other = os.pipe()
    os.write(other, b"abc")
    fcntl.ioctl(end, 0x541B, count)
    assert (count[0], os.read(end, 0), os.write(other, b"")) == (3, b"", 0)
    a_file()
    os.close(fd)
    assert failure(os.read, fd, 0) == errno.EBADF


def a_file() -> None:
    """A mapping of another file."""
    with open(__file__, "rb") as file:
        assert file.read(3) == mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)[:3]


def an_orphan() -> None:
    """Like that, when it is told to; and it says so."""
    go, answer = sys.argv[2:]
    with open(go, "rb") as file:
        file.read()
    a_file()
    with open(answer, "w", encoding="ascii") as text:
        text.write("mapped\n")


def reused() -> None:
    """A number that another thread closes and opens again all the time: each answer is one file's or the other's."""
    fd = device()
    until = time.monotonic() + 0.5

    def change() -> None:
        null = os.open("/dev/null", os.O_RDONLY)
        while time.monotonic() < until:
            os.dup2(null, fd)
            fresh = device()
            os.dup2(fresh, fd)
            os.close(fresh)

    thread = threading.Thread(target=change)
    thread.start()
    while time.monotonic() < until:
        found = ctypes.CDLL(None, use_errno=True).read(fd, None, 0)
        assert (found, found and ctypes.get_errno()) in ((0, 0), (-1, errno.EINVAL))
    thread.join()


def alarmed() -> None:
    """Signals that come while a mapping is made."""
    seen = []
    signal.signal(signal.SIGALRM, lambda number, frame: seen.append(number))
    signal.siginterrupt(signal.SIGALRM, False)
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
    fd = device()
    _, offset, length = viommu(fd, 3)
    for _ in range(200):
        at = mapped(fd, offset, length)
        assert word(at).value == 3
        unmap(at, length)
    signal.setitimer(signal.ITIMER_REAL, 0)
    assert len(seen) > 5


def killed() -> None:
    """SIGKILL at any point of a mapping."""
    fd = device()
    found, offset, length = viommu(fd, 3)
    for turn in range(30):
        child = os.fork()
        if not child:
            while True:
                unmap(mapped(fd, offset, length), length)
        time.sleep(0.005 + turn * 0.0004)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert word(mapped(fd, offset, length)).value == 3
    assert failure(ioctl, fd, DESTROY, found) == errno.EBUSY


def traced() -> None:
    """Under a debugger nothing is mapped; everything else is answered."""
    fd = device()
    _, offset, length = viommu(fd, 3)
    assert ctypes.CDLL(None).ptrace(0, 0, 0, 0) == 0  # PTRACE_TRACEME
    assert failure(mapped, fd, offset, length) == errno.ENODEV
    assert failure(mapped, fd, 0, length) == errno.ENXIO


def outlives() -> None:
    """The daemon is killed, and life goes on."""
    fd = device()
    _, offset, length = viommu(fd, 3)
    at = mapped(fd, offset, length)
    print("ready", flush=True)
    sys.stdin.readline()
    assert word(at).value == 3
    assert failure(ioctl, fd, IOAS_ALLOC, 0, 0) in (errno.ENOTCONN, errno.ECONNABORTED)
    assert failure(mapped, fd, offset, length) == errno.ENODEV
    a_file()
    assert os.read(fd, 0) == b""
    words = [sys.executable, "-m", "tests.mount.mappings", "a_file"]
    assert subprocess.run(words).returncode == 0
    print("ok", flush=True)


def privileges() -> None:
    """set-user-ID programs still work, though there is a filter."""
    with open("/proc/self/status", encoding="ascii") as file:
        found = dict(line.split(":", 1) for line in file)
    assert found["NoNewPrivs"].strip() == "0"
    assert found["Seccomp"].strip() == "2"


if __name__ == "__main__":
    globals()[sys.argv[1]]()
