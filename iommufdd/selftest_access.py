"""Accesses of the selftest: a file that user space drives, and the operations on it (selftest.c)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import iommufd_uapi.iommufd_test as uapi

from .access import Access
from .errors import EBADFD, ENOENT, ENOMEM, EOPNOTSUPP, IommufdError
from .ioas import Ioas, syz_iova
from .objects import Holder
from .selftest_checks import check_pages
from .user import PAGE_SIZE, ULONG_MAX, Caller, File, Gate

if TYPE_CHECKING:
    from iommufd_uapi.layout import Layout

    from .context import Context
    from .ucmd import Ucmd

SZ_16M = 16 << 20
UNION = uapi.TestCmd.offsetof("u")


def answer(ucmd: Ucmd, layout: type[Layout], **fields: int) -> None:
    """Copy the whole command back with some fields of its union changed."""
    data = bytearray(ucmd.data)
    for name, value in fields.items():
        at = UNION + layout.offsetof(name)
        size = layout.sizeof(name)
        data[at : at + size] = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
    ucmd.caller.copy_to_user(ucmd.uptr, bytes(data[: ucmd.user_size]))


class SelftestAccess(File, Holder):
    """struct selftest_access: its file holds the access, and keeps the context alive."""

    def __init__(self, ictx: Context, caller: Caller, *, pins: bool) -> None:
        Holder.__init__(self)
        self.refs = 1
        self.ictx = ictx
        self.pins = pins
        self.items: dict[int, tuple[int, int]] = {}  # id: (iova, length)
        self.next_id = 0
        self.access = ictx.objects.alloc(Access(pins=pins, unmap=self.unmap), caller.gate)
        self.hold(self.access)
        ictx.objects.finalize(self.access)
        ictx.get()

    @staticmethod
    def from_fd(caller: Caller, fd: int) -> SelftestAccess:
        """iommufd_access_get(): EBADFD, for a closed fd too."""
        file = caller.files.fget(fd if fd < 1 << 31 else fd - (1 << 32))
        if not isinstance(file, SelftestAccess):
            raise EBADFD(f"fd {fd} is no access")
        return file

    def release(self) -> None:
        self.unmap(0, ULONG_MAX)
        self.let_go(self.access)
        self.ictx.objects.destroy_user(self.access)
        self.ictx.put()

    def unmap(self, iova: int, length: int) -> None:
        """iommufd_test_access_unmap(): drop every item that touches the range."""
        last = iova + length - 1
        for item, (start, size) in list(self.items.items()):
            if iova <= start + size - 1 and last >= start:
                self.unpin_item(item)

    def unpin_item(self, item: int) -> None:
        """ENOENT unless these pages are pinned."""
        if item not in self.items:
            raise ENOENT(f"the access has no pages {item}")
        iova, length = self.items.pop(item)
        self.access.unpin_pages(iova, length)

    def replace(self, caller: Caller, ioas: Ioas | None, ioas_id: int) -> None:
        """iommufd_access_replace(): ENOENT, EADDRINUSE."""
        if self.access.ioas is None or ioas is None:
            raise ENOENT(f"there is no IOAS {ioas_id}, or the access has none")
        self.access.change_ioas(caller, ioas)

    def __str__(self) -> str:
        return f"the open file of {self.access}"


def create_access(ucmd: Ucmd, cmd: uapi.TestCmd, op: uapi.CreateAccess) -> None:
    """A file whose holder reads and pins through the IOAS: EOPNOTSUPP, ENOMEM, ENOENT, EADDRINUSE."""
    if op.flags & ~uapi.MOCK_FLAGS_ACCESS_CREATE_NEEDS_PIN_PAGES:
        raise EOPNOTSUPP(f"flags {op.flags:#x} are not known")
    caller = ucmd.caller
    try:
        fd = caller.get_unused_fd()
    except IommufdError as error:
        raise ENOMEM(error.reason) from None  # quirk: whatever the descriptor table said
    pins = bool(op.flags & uapi.MOCK_FLAGS_ACCESS_CREATE_NEEDS_PIN_PAGES)
    staccess: SelftestAccess | None = None
    try:
        staccess = SelftestAccess(ucmd.ictx, caller, pins=pins)
        staccess.access.change_ioas(caller, ucmd.get(cmd.id, Ioas))
        answer(ucmd, uapi.CreateAccess, out_access_fd=fd)
    except IommufdError:
        caller.files.put_unused_fd(fd)
        if staccess is not None:
            staccess.put()
        raise
    caller.files.fd_install(fd, staccess)


def _access(ucmd: Ucmd, cmd: uapi.TestCmd) -> SelftestAccess:
    """iommufd_access_get(): EBADFD for anything else."""
    return SelftestAccess.from_fd(ucmd.caller, cmd.id)


def access_replace_ioas(ucmd: Ucmd, cmd: uapi.TestCmd, op: uapi.AccessReplaceIoas) -> None:
    """ACCESS_REPLACE_IOAS: ENOENT, and what replacing raises (iommufd_test_access_replace_ioas)."""
    staccess = _access(ucmd, cmd)
    ictx = staccess.ictx
    ucmd.caller.gate(Gate.LOOKUP)
    ioas = ictx.objects.get(op.ioas_id)
    staccess.replace(ucmd.caller, ioas if isinstance(ioas, Ioas) else None, op.ioas_id)


def access_pages(ucmd: Ucmd, cmd: uapi.TestCmd, op: uapi.AccessPages) -> None:
    """Pin pages and compare them with the caller's: ENOMEM, EOPNOTSUPP, EBADFD, EBADE, and what pinning raises."""
    if op.length > SZ_16M:
        raise ENOMEM("more than 16 MiB")
    if op.flags & ~(uapi.MOCK_FLAGS_ACCESS_WRITE | uapi.MOCK_FLAGS_ACCESS_SYZ):
        raise EOPNOTSUPP(f"flags {op.flags:#x} are not known")
    staccess = _access(ucmd, cmd)
    if not staccess.pins:
        raise EOPNOTSUPP("the access was not made to pin pages")
    iova = _syz(staccess, op.iova) if op.flags & uapi.MOCK_FLAGS_ACCESS_SYZ else op.iova
    ucmd.caller.gate(Gate.MEMORY)
    write = bool(op.flags & uapi.MOCK_FLAGS_ACCESS_WRITE)
    runs = staccess.access.pin_pages(ucmd.caller, iova, op.length, write=write)
    try:
        if op.uptr:
            check_pages(ucmd.caller, op.uptr - iova % PAGE_SIZE, runs)
        ucmd.caller.gate(Gate.MEMORY)
        item = staccess.next_id
        staccess.next_id += 1
        answer(ucmd, uapi.AccessPages, out_access_pages_id=item)
    except IommufdError:
        staccess.access.unpin_pages(iova, op.length)
        raise
    staccess.items[item] = (iova, op.length)


def destroy_access_pages(ucmd: Ucmd, cmd: uapi.TestCmd, op: uapi.DestroyAccessPages) -> None:
    """DESTROY_ACCESS_PAGES: ENOENT (iommufd_test_access_item_destroy)."""
    _access(ucmd, cmd).unpin_item(op.access_pages_id)


def access_rw(ucmd: Ucmd, cmd: uapi.TestCmd, op: uapi.AccessRw) -> None:
    """Copy between IOVA and the caller: ENOMEM, EOPNOTSUPP, EBADFD, EFAULT, and what Access.rw() raises."""
    if op.length > SZ_16M:
        raise ENOMEM("more than 16 MiB")
    if op.flags & ~(uapi.MOCK_ACCESS_RW_WRITE | uapi.MOCK_ACCESS_RW_SLOW_PATH | uapi.MOCK_FLAGS_ACCESS_SYZ):
        raise EOPNOTSUPP(f"flags {op.flags:#x} are not known")
    staccess = _access(ucmd, cmd)
    caller = ucmd.caller
    caller.gate(Gate.MEMORY)
    write = bool(op.flags & uapi.MOCK_ACCESS_RW_WRITE)
    data = bytearray(caller.copy_from_user(op.uptr, op.length)) if write else bytearray(op.length)
    iova = _syz(staccess, op.iova) if op.flags & uapi.MOCK_FLAGS_ACCESS_SYZ else op.iova
    slow = bool(op.flags & uapi.MOCK_ACCESS_RW_SLOW_PATH)
    staccess.access.rw(caller, iova, data, write=write, slow=slow)
    if not write:
        caller.copy_to_user(op.uptr, bytes(data))


def _syz(staccess: SelftestAccess, coded: int) -> int:
    """iommufd_test_syz_conv_iova()"""
    ioas = staccess.access.ioas
    return 0 if ioas is None else syz_iova(ioas, coded)
