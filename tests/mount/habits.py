"""A program for tests of `iommufdctl mount`: `habits.py HABIT` exits 0 or fails an assertion. No project code."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import resource
import select
import signal
import stat
import struct
import sys
import threading
import time
from collections.abc import Callable

PATH = os.environ.get("IOMMU", "/dev/iommu")
DESTROY, IOAS_ALLOC, HWPT_ALLOC, FAULT_ALLOC, VIOMMU_ALLOC, VDEVICE_ALLOC, VEVENTQ_ALLOC, TEST = (
    0x3B80, 0x3B81, 0x3B89, 0x3B8E, 0x3B90, 0x3B91, 0x3B93, 0x3BA0,
)  # fmt: skip
MOCK_DOMAIN, CREATE_ACCESS, MOCK_DOMAIN_REPLACE, TRIGGER_VEVENT, DMABUF_GET = 2, 5, 10, 17, 22


def failure(call: Callable[..., object], *args: object) -> int:
    """The errno of a call that must fail."""
    try:
        result = call(*args)
    except OSError as error:
        return error.errno or 0
    raise AssertionError(f"it gave {result}")


def device(flags: int = os.O_RDWR) -> int:
    return os.open(PATH, flags | os.O_CLOEXEC)


def ioctl(fd: int, cmd: int, *words: int) -> list[int]:
    """A struct of 32-bit words after its size; what it is afterwards."""
    data = bytearray(struct.pack(f"<{len(words) + 1}I", 4 * len(words) + 4, *words))
    fcntl.ioctl(fd, cmd, data)
    return list(struct.unpack(f"<{len(words) + 1}I", data))


def test(fd: int, op: int, *words: int) -> list[int]:
    """IOMMU_TEST_CMD; words from its id on."""
    return ioctl(fd, TEST, op, *words, *(0 for _ in range(16 - len(words))))


def fault_queue(fd: int) -> tuple[int, int]:
    """(id, descriptor)"""
    fault, queue = ioctl(fd, FAULT_ALLOC, 0, 0, 0)[2:]
    return fault, queue


def node() -> None:
    status = os.stat(PATH)
    assert stat.S_ISREG(status.st_mode)
    assert status.st_mode & 0o777 == 0o666
    assert os.access(PATH, os.R_OK | os.W_OK)
    for flags in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_RDWR | os.O_TRUNC, os.O_RDWR | os.O_APPEND):
        fd = device(flags)
        assert ioctl(fd, IOAS_ALLOC, 0, 0)[2] == 1
        os.close(fd)
    fd = device()
    assert failure(os.open, PATH, os.O_RDWR | os.O_CREAT | os.O_EXCL) == errno.EEXIST
    assert failure(os.open, PATH, os.O_RDONLY | os.O_DIRECTORY) == errno.ENOTDIR
    assert failure(os.read, fd, 8) == errno.EINVAL
    assert failure(os.write, fd, b"12345678") == errno.EINVAL
    assert failure(os.ftruncate, fd, 0) == errno.EINVAL
    assert failure(os.fchmod, fd, 0o600) == errno.EPERM
    assert failure(os.fsync, fd) == errno.EINVAL
    assert not os.isatty(fd)
    poll = select.poll()
    poll.register(fd)
    assert poll.poll(0) == [(fd, select.POLLIN | select.POLLOUT)]


def memory() -> None:
    """A page of the device itself as the argument: a daemon that touched it would wait for itself."""
    fd = device()
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    at = libc.mmap(None, 4096, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE, fd, 0)
    libc.ioctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p]
    assert libc.ioctl(fd, IOAS_ALLOC, at) == -1
    assert ctypes.get_errno() == errno.EFAULT
    ioas = ioctl(fd, IOAS_ALLOC, 0, 0)[2]
    test(fd, MOCK_DOMAIN, ioas)
    map_cmd = bytearray(struct.pack("<IIIIQQQ", 40, 6, ioas, 0, at, 4096, 0))
    assert failure(fcntl.ioctl, fd, 0x3B85, map_cmd) == errno.EFAULT
    struct.pack_into("<IIIiQQQ", map_cmd, 0, 40, 6, ioas, fd, 0, 4096, 0)  # IOMMU_IOAS_MAP_FILE of itself
    assert failure(fcntl.ioctl, fd, 0x3B8F, map_cmd) == errno.EINVAL


def numbers() -> None:
    """Descriptors that an ioctl gives have the lowest number, and EMFILE comes where the kernel has it."""
    fd = device()
    lowest = os.dup(0)
    os.close(lowest)
    fault, queue = fault_queue(fd)
    assert queue == lowest
    assert fcntl.fcntl(queue, fcntl.F_GETFD) == fcntl.FD_CLOEXEC
    ioas = ioctl(fd, IOAS_ALLOC, 0, 0)[2]
    access = test(fd, CREATE_ACCESS, ioas, 0)[4]
    assert access == lowest + 1
    buffer = bytearray(struct.pack("<IIIIQ", 72, DMABUF_GET, 0, 0, 4096).ljust(72, b"\0"))
    assert fcntl.ioctl(fd, TEST, buffer) == lowest + 2
    assert failure(ioctl, queue, IOAS_ALLOC, 0, 0) == errno.ENOTTY
    assert failure(ioctl, fd, DESTROY, fault) == errno.EBUSY
    os.close(queue)
    assert ioctl(fd, DESTROY, fault)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (queue, hard))
    assert failure(fault_queue, fd) == errno.EMFILE
    assert failure(ioctl, fd, FAULT_ALLOC, 1, 0, 0) == errno.EOPNOTSUPP  # the flags are looked at first
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert fault_queue(fd)[1] == queue


def wakes() -> None:
    """Whoever waits for an event is woken by it, in poll, epoll and from another process's call."""
    fd = device()
    ioas = ioctl(fd, IOAS_ALLOC, 0, 0)[2]
    mock = test(fd, MOCK_DOMAIN, ioas)
    stdev, idev = mock[4], mock[6]
    parent = ioctl(fd, HWPT_ALLOC, 1, idev, ioas, *(0 for _ in range(7)))[4]
    viommu = ioctl(fd, VIOMMU_ALLOC, 0, 0xDEADBEEF, idev, parent, 0, 0, 0, 0, 0)[5]
    data = ctypes.create_string_buffer(struct.pack("<II", 0xBADBEEF, 0))
    at = ctypes.addressof(data)
    nested = ioctl(fd, HWPT_ALLOC, 0, idev, viommu, 0, 0, 0xDEAD, 4, at & 0xFFFFFFFF, at >> 32, 0, 0)[4]
    ioctl(fd, VDEVICE_ALLOC, viommu, idev, 0, 0x99, 0)
    queue = ioctl(fd, VEVENTQ_ALLOC, 0, viommu, 0xBEEFBEEF, 4, 0, 0, 0)[6]
    test(fd, MOCK_DOMAIN_REPLACE, stdev, 0, nested)
    epoll = select.epoll()
    epoll.register(queue, select.EPOLLIN)
    assert epoll.poll(0) == []
    if not os.fork():
        time.sleep(0.1)
        test(fd, TRIGGER_VEVENT, 0, 0, idev)
        os._exit(0)
    poll = select.poll()
    poll.register(queue, select.POLLIN)
    assert poll.poll(10_000) == [(queue, select.POLLIN)]
    assert epoll.poll(10) == [(queue, select.EPOLLIN)]
    assert len(os.read(queue, 400)) == 12
    assert os.read(queue, 400) == b""
    assert poll.poll(0) == []
    os.wait()


def alarms() -> None:
    """Signals that come while the caller is traced neither get lost nor end a call early."""
    seen = []
    signal.signal(signal.SIGALRM, lambda number, frame: seen.append(number))
    signal.signal(signal.SIGTRAP, lambda number, frame: sys.exit("SIGTRAP"))
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
    fd = device()
    for _ in range(200):
        fault, queue = fault_queue(fd)
        os.close(queue)
        ioctl(fd, DESTROY, fault)
    signal.setitimer(signal.ITIMER_REAL, 0)
    assert len(seen) > 5
    assert signal.SIGALRM not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def crowd() -> None:
    """Threads that need descriptors at the same time."""
    fd = device()
    wrong = []

    def work() -> None:
        try:
            for _ in range(50):
                fault, queue = fault_queue(fd)
                assert os.read(queue, 40) == b""
                os.close(queue)
                ioctl(fd, DESTROY, fault)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong


def killed() -> None:
    """SIGKILL at any point of an injection."""
    for turn in range(30):
        child = os.fork()
        if not child:
            fd = device()
            while True:
                os.close(fault_queue(fd)[1])
        time.sleep(0.005 + turn * 0.0004)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    fault_queue(device())


def traced() -> None:
    """Under a debugger there are no descriptors, and everything else."""
    assert ctypes.CDLL(None).ptrace(0, 0, 0, 0) == 0  # PTRACE_TRACEME
    fd = device()
    assert failure(fault_queue, fd) == errno.EOPNOTSUPP
    assert ioctl(fd, IOAS_ALLOC, 0, 0)[2] == 1


def setuid() -> None:
    """A process that has become another user and cannot be dumped."""
    fd = device()
    os.setresuid(65534, 65534, 65534)
    assert ioctl(fd, IOAS_ALLOC, 0, 0)[2] == 1
    assert fault_queue(fd)
    assert device()


def hold() -> None:
    fd = device()
    queue = fault_queue(fd)[1]
    print("ready", flush=True)
    if len(sys.argv) > 2:
        sys.stdin.readline()
        assert failure(ioctl, fd, IOAS_ALLOC, 0, 0) in (errno.ENOTCONN, errno.ECONNABORTED)
        assert failure(device) in (errno.ENOTCONN, errno.ECONNABORTED)
        assert failure(os.read, queue, 40) in (errno.ENOTCONN, errno.ECONNABORTED)
        os.close(fd)
        print("ok", flush=True)
    else:
        signal.pause()


if __name__ == "__main__":
    globals()[sys.argv[1]]()
