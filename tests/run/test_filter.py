"""The seccomp filter: which system calls are notified, on either architecture, by an interpreter of classic BPF."""

from __future__ import annotations

import os
import struct

import pytest

from iommufd_client import filter as bpf
from iommufd_uapi import kvm
from iommufd_uapi.seccomp import ARCHITECTURES, MARK, SECCOMP_RET_ALLOW, SECCOMP_RET_USER_NOTIF, VFS_IOCTLS, Syscalls

BASE = 900
OURS, OTHER = BASE + 5, 3


@pytest.fixture(params=ARCHITECTURES)
def numbers(request: pytest.FixtureRequest) -> Syscalls:
    return ARCHITECTURES[request.param]


def notified(code: bytes, numbers: Syscalls, nr: int, *args: int, arch: int | None = None) -> bool:
    data = struct.pack("<iIQ6Q", nr, arch or numbers.audit, 0, *(args + (0,) * 6)[:6])
    program = list(bpf.INSTRUCTION.iter_unpack(code))
    at, value = 0, 0
    while True:
        op, yes, no, k = program[at]
        at += 1
        match op:
            case bpf.LD_ABS:
                value = int.from_bytes(data[k : k + 4], "little")
            case bpf.ALU_AND:
                value &= k
            case bpf.ALU_RSH:
                value >>= k
            case bpf.JMP_JA:
                at += k
            case bpf.JEQ | bpf.JGE | bpf.JSET:
                holds = {bpf.JEQ: value == k, bpf.JGE: value >= k, bpf.JSET: bool(value & k)}[op]
                at += yes if holds else no
            case bpf.RET:
                assert k in (SECCOMP_RET_ALLOW, SECCOMP_RET_USER_NOTIF)
                return bool(k == SECCOMP_RET_USER_NOTIF)
            case _:
                raise AssertionError(f"{op:#x}")


ON_DESCRIPTORS = (
    "read", "write", "lseek", "pread64", "pwrite64", "readv", "writev", "preadv2", "dup",
    "fstat", "newfstatat", "statx",
)  # fmt: skip


@pytest.mark.parametrize("name", ON_DESCRIPTORS)
def test_calls_on_a_descriptor_count_from_the_base_on(numbers: Syscalls, name: str) -> None:
    code, nr = bpf.program(numbers, BASE), getattr(numbers, name)
    assert notified(code, numbers, nr, OURS)
    assert notified(code, numbers, nr, BASE)
    assert not notified(code, numbers, nr, BASE - 1)
    assert not notified(code, numbers, nr, 2**32 - 1)  # -1
    assert not notified(code, numbers, nr, 2**64 - 1)


def test_ioctls_of_our_type_count_on_every_descriptor(numbers: Syscalls) -> None:
    code = bpf.program(numbers, BASE)
    assert notified(code, numbers, numbers.ioctl, OTHER, 0x3B81)
    assert notified(code, numbers, numbers.ioctl, OTHER, 0xFFFF_FFFF_0000_3B81)  # the kernel takes 32 bits
    assert notified(code, numbers, numbers.ioctl, OURS, 0x541B)
    assert not notified(code, numbers, numbers.ioctl, OTHER, 0x541B)


def test_ioctls_of_kvm_count_from_the_base_on(numbers: Syscalls) -> None:
    code = bpf.program(numbers, BASE)
    for cmd in (kvm.KVM_CREATE_VM, kvm.KVM_CREATE_TDP_FD):
        assert notified(code, numbers, numbers.ioctl, OURS, cmd)
        assert not notified(code, numbers, numbers.ioctl, OTHER, cmd)


def test_opens_count_for_reading_and_writing(numbers: Syscalls) -> None:
    code = bpf.program(numbers, BASE)
    for flags in (os.O_RDWR, os.O_RDWR | os.O_CLOEXEC):
        assert notified(code, numbers, numbers.openat, 0, 0, flags)
        assert numbers.open < 0 or notified(code, numbers, numbers.open, 0, flags)
    for flags in (os.O_RDONLY, os.O_WRONLY, os.O_RDONLY | os.O_DIRECTORY):
        assert not notified(code, numbers, numbers.openat, 0, 0, flags)
    assert notified(code, numbers, numbers.openat2, 0, 0, 0)


def test_proc_adds_plain_opens_and_folders(numbers: Syscalls) -> None:
    code = bpf.program(numbers, BASE, proc=True)
    assert notified(code, numbers, numbers.openat, 0, 0, 0)
    assert notified(code, numbers, numbers.openat, 0, 0, os.O_DIRECTORY | os.O_CLOEXEC)
    assert not notified(code, numbers, numbers.openat, 0, 0, os.O_CLOEXEC)


def test_mappings_and_copies(numbers: Syscalls) -> None:
    code = bpf.program(numbers, BASE)
    assert notified(code, numbers, numbers.mmap, 0, 4096, 3, 1, OURS, 0)
    assert not notified(code, numbers, numbers.mmap, 0, 4096, 3, 1, OTHER, 0)
    assert not notified(code, numbers, numbers.mmap, 0, 4096, 3, 0x22, OURS, 0)  # anonymous
    assert notified(code, numbers, numbers.fcntl, OURS, 0)
    assert notified(code, numbers, numbers.fcntl, OURS, 1030)
    assert not notified(code, numbers, numbers.fcntl, OURS, 1)
    assert not notified(code, numbers, numbers.fcntl, OTHER, 0)


def test_capabilities_only_when_they_are_virtual(numbers: Syscalls) -> None:
    for nr in (numbers.capget, numbers.capset):
        assert not notified(bpf.program(numbers, BASE), numbers, nr)
        assert notified(bpf.program(numbers, BASE, caps=True), numbers, nr)


@pytest.fixture
def exact(numbers: Syscalls) -> bytes:
    return bpf.exact_program(numbers)


def test_exact_takes_every_mapping_of_a_file_but_the_loaders_and_our_own(exact: bytes, numbers: Syscalls) -> None:
    mark = MARK << 32
    for flags in (1, 2, 3, 0x11):
        assert notified(exact, numbers, numbers.mmap, 0, 4096, 3, flags, OTHER, 0)
    assert notified(exact, numbers, numbers.mmap, 0, 4096, 3, 1, 1 << 32 | OTHER, 0)
    assert not notified(exact, numbers, numbers.mmap, 0, 4096, 3, 1, mark | OTHER, 0)
    assert not notified(exact, numbers, numbers.mmap, 0, 4096, 3, 0x22, OTHER, 0)  # anonymous
    assert not notified(exact, numbers, numbers.mmap, 0, 4096, 3, 0x802, OTHER, 0)  # MAP_DENYWRITE
    assert not notified(exact, numbers, numbers.mmap, 0, 4096, 3, 1, 2**64 - 1, 0)


@pytest.mark.parametrize("name", ["read", "write", "pread64", "pwrite64", "readv", "writev", "preadv2", "pwritev2"])
def test_exact_takes_reads_and_writes_of_nothing(exact: bytes, numbers: Syscalls, name: str) -> None:
    nr = getattr(numbers, name)
    assert notified(exact, numbers, nr, OTHER, 4096, 0)
    assert not notified(exact, numbers, nr, OTHER, 4096, 1)


def test_exact_takes_the_ioctls_that_never_reach_a_file(exact: bytes, numbers: Syscalls) -> None:
    for cmd in VFS_IOCTLS:
        assert notified(exact, numbers, numbers.ioctl, OTHER, cmd)
    assert not notified(exact, numbers, numbers.ioctl, OTHER, 0x3B81)
    assert not notified(exact, numbers, numbers.openat, 0, 0, os.O_RDWR)
    assert not notified(exact, numbers, numbers.lseek, OTHER)
    assert not notified(exact, numbers, numbers.ioctl, OTHER, VFS_IOCTLS[0], arch=0x4000_0003)


def test_another_architecture_is_left_alone(numbers: Syscalls) -> None:
    code = bpf.program(numbers, BASE)
    assert not notified(code, numbers, numbers.ioctl, OTHER, 0x3B81, arch=0x4000_0003)
    assert not notified(code, numbers, numbers.ioctl | 0x4000_0000, OTHER, 0x3B81)
