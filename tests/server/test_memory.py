"""Files of clients: identity, rights, and what no client can do to the daemon by shrinking one."""

from __future__ import annotations

import fcntl
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from iommufdd.errors import EMFILE
from iommufdd.server.memory import OtherFile, PageFiles, PrivateFile, SharedFile
from iommufdd.server.nofile import SPARE, Nofile
from iommufdd.user import PageFile
from tests.server.peer import close_all, memfd

PAGE = 4096
UID = 1000


@pytest.fixture
def files() -> Iterator[PageFiles]:
    made = PageFiles(Nofile(1024))
    yield made
    assert len(made) == 0
    assert made.nofile.total == 0
    made.close()


def shared(files: PageFiles, fd: int, uid: int) -> SharedFile:
    """A file that has pages."""
    file = files.open(fd, uid)
    assert isinstance(file, SharedFile)
    return file


def test_one_file_per_inode(files: PageFiles) -> None:
    fd = memfd(PAGE)
    again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
    one, two = shared(files, fd, UID), shared(files, again, UID)
    assert one is two
    assert one.pinnable
    close_all([fd, again])
    assert one.pread(0, 10) == bytes(10)  # the daemon has its own descriptor
    one.put()
    assert len(files) == 1
    two.put()


def test_read_only_descriptors_do_not_borrow_a_right(files: PageFiles) -> None:
    fd = memfd(PAGE)
    readonly = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    one, two = shared(files, fd, UID), shared(files, readonly, UID)
    assert one is not two
    assert one.pwrite(0, b"seen") == 4
    assert two.pread(0, 4) == b"seen"
    assert two.pwrite(0, b"no") == 0
    assert one.pread(0, 4) == b"seen"
    one.put()
    two.put()
    close_all([fd, readonly])


def test_other_files(files: PageFiles) -> None:
    left, right = socket.socketpair()
    fds = [os.open(os.devnull, os.O_RDWR), os.eventfd(0), *os.pipe(), os.open("/", os.O_RDONLY)]
    for fd in [*fds, left.fileno(), right.fileno()]:
        file = files.open(fd, UID)
        assert isinstance(file, OtherFile)
        file.put()
    path_only = os.open("/", os.O_PATH)
    assert files.open(path_only, UID) is None
    close_all([*fds, path_only])
    left.close()
    right.close()


@pytest.mark.parametrize("seals", [0, fcntl.F_SEAL_GROW, fcntl.F_SEAL_SHRINK], ids=["none", "grow", "shrink"])
def test_reading_and_writing(files: PageFiles, seals: int) -> None:
    fd = memfd(PAGE + 100, seals)
    file = shared(files, fd, UID)
    assert file.size() == PAGE + 100
    assert file.pwrite(PAGE, b"x" * 200) == 100  # never beyond the end
    assert file.size() == PAGE + 100
    assert file.pread(PAGE - 2, 5) == b"\0\0xxx"
    assert file.pread(PAGE + 98, 10) == b"xx"
    assert file.pread(PAGE + 100, 10) == b""
    assert file.pread(2**64, 10) == b""
    assert file.pwrite(2**64, b"x") == 0
    os.pwrite(fd, b"client", 0)
    assert file.pread(0, 6) == b"client"
    file.put()
    os.close(fd)


def test_growing(files: PageFiles) -> None:
    fd = memfd(PAGE, fcntl.F_SEAL_SHRINK)
    file = shared(files, fd, UID)
    assert file.pread(0, 8) == bytes(8)
    os.ftruncate(fd, 4 * PAGE)
    os.pwrite(fd, b"new", 3 * PAGE)
    assert file.pread(3 * PAGE, 3) == b"new"
    assert file.pwrite(2 * PAGE, b"too") == 3
    file.put()
    os.close(fd)


def test_shrinking_kills_nobody(files: PageFiles) -> None:
    fd = memfd(4 * PAGE, 0)
    file = shared(files, fd, UID)
    assert file.pwrite(3 * PAGE, b"x") == 1
    os.ftruncate(fd, 0)
    assert file.pread(3 * PAGE, 1) == b""
    assert file.pwrite(3 * PAGE, b"x") == 0
    file.put()
    os.close(fd)


def test_sealed_later(files: PageFiles) -> None:
    """Seals are looked at again when the file comes again."""
    fd = memfd(PAGE, 0)
    file = shared(files, fd, UID)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_WRITE)
    again = shared(files, fd, UID)
    assert again.pread(0, 4) == bytes(4)
    assert again.pwrite(0, b"x") == 0
    file.put()
    again.put()
    os.close(fd)


def test_empty_and_sealed(files: PageFiles) -> None:
    fd = memfd(0, fcntl.F_SEAL_SHRINK)
    file = shared(files, fd, UID)
    assert file.pread(0, 4) == b""
    assert file.pwrite(0, b"x") == 0
    file.put()
    os.close(fd)


def test_mapping_counts_as_a_descriptor(files: PageFiles) -> None:
    fd = memfd(PAGE)
    file = shared(files, fd, UID)
    assert files.nofile.taken == {UID: 1}
    file.pread(0, 1)
    assert files.nofile.taken == {UID: 2}
    file.put()
    os.close(fd)


def test_too_many() -> None:
    files = PageFiles(Nofile(SPARE + 4))
    fds = [memfd(PAGE) for _ in range(3)]
    opened = [shared(files, fd, UID) for fd in fds[:2]]
    with pytest.raises(EMFILE):
        shared(files, fds[2], UID)
    assert opened[0].pread(0, 2) == bytes(2)  # not mapped: no descriptor left for that
    for file in opened:
        file.put()
    close_all(fds)


def test_private_pages_have_their_own_identity(files: PageFiles) -> None:
    fd = memfd(PAGE)
    file = shared(files, fd, UID)
    private: PageFile = PrivateFile(file)
    file.put()
    assert private.pwrite(0, b"ab") == 2
    assert private.pread(0, 2) == b"ab"
    assert private.size() == PAGE
    assert private is not file
    private.put()
    os.close(fd)


def test_hugetlb(files: PageFiles) -> None:
    """hugetlbfs has no write(), and a page that cannot be had is EFAULT there, not a SIGBUS."""
    size = 2 << 20
    fd = os.memfd_create("huge", os.MFD_CLOEXEC | os.MFD_HUGETLB | os.MFD_HUGE_2MB)
    try:
        os.ftruncate(fd, 2 * size)
    except OSError:
        os.close(fd)
        pytest.skip("no hugetlbfs")
    file = shared(files, fd, UID)
    assert file.pinnable
    assert file.compound
    free = int(re.findall(r"HugePages_Free:\s+(\d+)", Path("/proc/meminfo").read_text())[0])
    written = file.pwrite(size + 5000, b"device")
    assert file.pread(size + 5000, 6) == (b"device" if written else bytes(6))
    assert written == (6 if free >= 2 else 0)
    os.ftruncate(fd, 0)
    assert file.pwrite(5000, b"x") == 0
    assert file.pread(5000, 1) == b""
    file.put()
    os.close(fd)


def test_a_mapping_counts_until_its_last_view_is_gone(files: PageFiles) -> None:
    """A file that grows is mapped anew, and an IOMMU's cache may have views of how it was before."""
    fd = memfd(PAGE, seals=fcntl.F_SEAL_SHRINK)
    file = shared(files, fd, UID)
    views = []
    for pages in range(1, 6):
        os.ftruncate(fd, pages * PAGE)
        views.append(file.view(pages * PAGE))
    assert files.nofile.taken == {UID: 6}
    file.put()
    assert files.nofile.taken == {UID: 5}
    views.clear()
    os.close(fd)


def test_what_is_not_mapped_for_want_of_descriptors_is_read_all_the_same(files: PageFiles) -> None:
    fd = memfd(PAGE, seals=fcntl.F_SEAL_SHRINK)
    file = shared(files, fd, UID)
    view = file.view(PAGE)
    os.ftruncate(fd, 2 * PAGE)
    os.pwrite(fd, b"behind", PAGE)
    files.nofile.charge(UID, files.nofile.limit // 2 - 2)
    assert file.view(2 * PAGE) is None
    assert file.pread(PAGE - 2, 8) == b"\0\0behind"
    assert file.pwrite(2 * PAGE - 1, b"xy") == 1
    files.nofile.uncharge(UID, files.nofile.limit // 2 - 2)
    del view
    file.put()
    os.close(fd)


def test_one_uid_does_not_fill_the_address_space(files: PageFiles) -> None:
    """Files that are nothing but holes, and larger than all that can be mapped."""
    fds = [memfd(1 << 44), memfd(1 << 44), memfd(PAGE)]
    opened = [shared(files, fd, uid) for fd, uid in zip(fds, (UID, UID, UID + 1), strict=True)]
    views = [file.view(PAGE) for file in opened]
    assert [view is not None for view in views] == [True, False, True]
    assert opened[1].pread((1 << 44) - 4, 4) == bytes(4)
    views.clear()
    for file in opened:
        file.put()
    close_all(fds)
