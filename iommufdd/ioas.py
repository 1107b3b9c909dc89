"""IOAS: an IO address space, and the ioctls on it (ioas.c)."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import iommufd_uapi.iommufd as uapi

from .dmabuf import Dmabuf, DmabufPages
from .errors import (
    EBUSY,
    EINVAL,
    EMSGSIZE,
    ENOENT,
    ENOMEM,
    EOPNOTSUPP,
    EOVERFLOW,
    EPERM,
)
from .io_pagetable import IoPagetable
from .iova import Piece
from .objects import IommufdObject, ObjectType
from .pages import Account, FilePages, Pages, UserPages
from .spans import AreaTree, Span, SpanSet
from .user import PAGE_SIZE, ULONG_MAX, Gate

if TYPE_CHECKING:
    from .context import Context
    from .hw_pagetable import HwptPaging
    from .ucmd import Ucmd

MAP_FLAGS = uapi.IOMMU_IOAS_MAP_FIXED_IOVA | uapi.IOMMU_IOAS_MAP_WRITEABLE | uapi.IOMMU_IOAS_MAP_READABLE
MOCK_FLAGS_ACCESS_SYZ = 1 << 16  # in COPY too, in a kernel built for its selftest


MAX_ALLOWED = 2**16  # the kernel's bound is its memory
_VAL64 = uapi.Option.offsetof("val64")
_, _USER, _MM = Account  # a member of an Enum class takes ten times as long to find


class _Allowed(NamedTuple):
    iova: int
    last: int


class Ioas(IommufdObject):
    """struct iommufd_ioas"""

    type = ObjectType.IOAS

    def __init__(self, ictx: Context) -> None:
        super().__init__()
        self.ictx = ictx
        self.iopt = IoPagetable()
        self.hwpt_list: list[HwptPaging] = []

    def destroy(self) -> None:
        self.iopt.unmap(0, ULONG_MAX)
        if self.ictx.vfio_ioas is self:
            self.ictx.vfio_ioas = None
        super().destroy()


def ioas_alloc(ucmd: Ucmd, cmd: uapi.IoasAlloc) -> None:
    """IOMMU_IOAS_ALLOC: EOPNOTSUPP, ENOMEM."""
    if cmd.flags:
        raise EOPNOTSUPP(f"flags {cmd.flags:#x} are not known")
    cmd.out_ioas_id = ucmd.alloc(Ioas(ucmd.ictx)).id
    ucmd.respond(cmd)


def ioas_iova_ranges(ucmd: Ucmd, cmd: uapi.IoasIovaRanges) -> None:
    """IOMMU_IOAS_IOVA_RANGES: EOPNOTSUPP, ENOENT, EFAULT; EMSGSIZE with the struct written."""
    if cmd.reserved:
        raise EOPNOTSUPP("reserved is not 0")
    iopt = ucmd.get(cmd.ioas_id, Ioas).iopt
    room = cmd.num_iovas
    holes = list(iopt.reserved.holes(0, ULONG_MAX))
    for at, (start, last) in enumerate(holes[:room]):
        ucmd.caller.copy_to_user(cmd.allowed_iovas + 16 * at, uapi.IovaRange(start, last).pack())
    cmd.num_iovas = len(holes)
    cmd.out_iova_alignment = iopt.iova_alignment
    ucmd.respond(cmd)
    if len(holes) > room:
        raise EMSGSIZE(f"there are {len(holes)} ranges")


def ioas_allow_iovas(ucmd: Ucmd, cmd: uapi.IoasAllowIovas) -> None:
    """IOMMU_IOAS_ALLOW_IOVAS: EOPNOTSUPP, ENOENT, EFAULT, EINVAL, ENOMEM, EADDRINUSE; all or nothing."""
    if cmd.reserved:
        raise EOPNOTSUPP("reserved is not 0")
    ioas = ucmd.get(cmd.ioas_id, Ioas)
    allowed: AreaTree[_Allowed] = AreaTree()
    for at in range(cmd.num_iovas):
        entry = uapi.IovaRange.unpack(ucmd.caller.copy_from_user(cmd.allowed_iovas + 16 * at, 16))
        if entry.start >= entry.last:
            raise EINVAL(f"range {at} is empty or of one byte: {entry.start:#x}..{entry.last:#x}")
        if allowed.first(entry.start, entry.last) is not None:
            raise EINVAL(f"range {at} overlaps an earlier one")
        ucmd.caller.gate(Gate.MEMORY)
        if at >= MAX_ALLOWED:
            raise ENOMEM(f"more than {MAX_ALLOWED} ranges")
        allowed.insert(_Allowed(entry.start, entry.last))
    ioas.iopt.set_allowed(SpanSet(Span(entry.iova, entry.last) for entry in allowed))


# ---- mapping ----


def _check_map(flags: int, *sizes: int) -> None:
    """What MAP, MAP_FILE and COPY check alike, in this order."""
    if flags & ~MAP_FLAGS:
        raise EOPNOTSUPP(f"flags {flags & ~MAP_FLAGS:#x} are not known")
    if max(sizes) >= ULONG_MAX:
        raise EOVERFLOW("an address or length is 2^64-1")
    if not flags & (uapi.IOMMU_IOAS_MAP_WRITEABLE | uapi.IOMMU_IOAS_MAP_READABLE):
        raise EINVAL("neither WRITEABLE nor READABLE")


def _map(ucmd: Ucmd, ioas: Ioas, pages: Pages, offset: int, length: int, iova: int, flags: int) -> int:
    """iopt_map_common(): takes over the reference of pages."""
    if ucmd.ictx.account_mode is _MM and pages.account is _USER:
        pages.account = _MM
    return ioas.iopt.map_pages(
        ucmd.caller, [Piece(pages, offset, length)], length,
        iova if flags & uapi.IOMMU_IOAS_MAP_FIXED_IOVA else None,
        readable=bool(flags & uapi.IOMMU_IOAS_MAP_READABLE), writable=bool(flags & uapi.IOMMU_IOAS_MAP_WRITEABLE),
    )  # fmt: skip


def ioas_map(ucmd: Ucmd, cmd: uapi.IoasMap) -> None:
    """IOMMU_IOAS_MAP: EOPNOTSUPP, EOVERFLOW, EINVAL, ENOENT, EEXIST, ENOSPC, EFAULT, ENOMEM.

    The mapping stays when the answer cannot be written.
    """
    if cmd.flags & ~MAP_FLAGS or cmd.reserved:
        raise EOPNOTSUPP(f"flags {cmd.flags:#x} are not known or reserved is not 0")
    _check_map(cmd.flags, cmd.iova, cmd.length)
    ioas = ucmd.get(cmd.ioas_id, Ioas)
    cmd.iova = map_user(ucmd, ioas, cmd.user_va, cmd.length, cmd.iova, cmd.flags)
    ucmd.respond(cmd)


def map_user(ucmd: Ucmd, ioas: Ioas, uptr: int, length: int, iova: int, flags: int) -> int:
    """iopt_map_user_pages(): the IOVA."""
    if uptr + length > ULONG_MAX:
        raise EOVERFLOW("user_va + length wraps")
    pages = UserPages(ucmd.caller, uptr, length, writable=bool(flags & uapi.IOMMU_IOAS_MAP_WRITEABLE))
    return _map(ucmd, ioas, pages, uptr % PAGE_SIZE, length, iova, flags)


def ioas_map_file(ucmd: Ucmd, cmd: uapi.IoasMapFile) -> None:
    """IOMMU_IOAS_MAP_FILE: as MAP, and EBADF; for a dma-buf ENODEV."""
    _check_map(cmd.flags, cmd.iova, cmd.length)
    ioas = ucmd.get(cmd.ioas_id, Ioas)
    if not cmd.length:
        raise EINVAL("length is 0")
    if cmd.start + cmd.length - 1 > ULONG_MAX:
        raise EOVERFLOW("start + length wraps")
    file = ucmd.caller.fget(cmd.fd)
    kind = DmabufPages if isinstance(file, Dmabuf) else FilePages
    pages = kind(ucmd.caller, file, cmd.start, cmd.length, writable=bool(cmd.flags & uapi.IOMMU_IOAS_MAP_WRITEABLE))  # type: ignore[arg-type]
    cmd.iova = _map(ucmd, ioas, pages, cmd.start % PAGE_SIZE, cmd.length, cmd.iova, cmd.flags)
    ucmd.respond(cmd)


def ioas_copy(ucmd: Ucmd, cmd: uapi.IoasCopy) -> None:
    """IOMMU_IOAS_COPY: as MAP; ENOENT when the source has a gap, EPERM to write what was mapped read-only."""
    _syz_conv_iova(ucmd, cmd)
    _check_map(cmd.flags, cmd.length, cmd.src_iova, cmd.dst_iova)
    pieces = ucmd.get(cmd.src_ioas_id, Ioas).iopt.get_pages(ucmd.caller, cmd.src_iova, cmd.length)
    try:
        dst = ucmd.get(cmd.dst_ioas_id, Ioas)
    except ENOENT:
        for piece in pieces:
            piece.pages.put()
        raise
    cmd.dst_iova = dst.iopt.map_pages(
        ucmd.caller, pieces, cmd.length, cmd.dst_iova if cmd.flags & uapi.IOMMU_IOAS_MAP_FIXED_IOVA else None,
        readable=bool(cmd.flags & uapi.IOMMU_IOAS_MAP_READABLE),
        writable=bool(cmd.flags & uapi.IOMMU_IOAS_MAP_WRITEABLE),
    )  # fmt: skip
    ucmd.respond(cmd)


def _syz_conv_iova(ucmd: Ucmd, cmd: uapi.IoasCopy) -> None:
    """selftest.c:iommufd_test_syz_conv_iova_id(): src_iova is {nth area, offset}."""
    if not cmd.flags & MOCK_FLAGS_ACCESS_SYZ:
        return
    cmd.flags &= ~MOCK_FLAGS_ACCESS_SYZ
    ioas = ucmd.ictx.objects.get(cmd.src_ioas_id)
    if isinstance(ioas, Ioas):
        cmd.src_iova = syz_iova(ioas, cmd.src_iova)


def syz_iova(ioas: Ioas, coded: int) -> int:
    """{u32 nth area, u32 offset} as an IOVA, 0 when there are fewer areas."""
    nth, offset = coded & 0xFFFFFFFF, coded >> 32
    for area in ioas.iopt.areas:
        if not nth:
            return area.iova + offset & ULONG_MAX
        nth -= 1
    return 0


def ioas_unmap(ucmd: Ucmd, cmd: uapi.IoasUnmap) -> None:
    """IOMMU_IOAS_UNMAP: EOVERFLOW, EINVAL, ENOENT, EBUSY, EDEADLOCK. What went before an error is gone."""
    ioas = ucmd.get(cmd.ioas_id, Ioas)
    if cmd.iova == 0 and cmd.length == ULONG_MAX:
        unmapped, error = ioas.iopt.unmap(0, ULONG_MAX)
    else:
        if cmd.iova >= ULONG_MAX or cmd.length >= ULONG_MAX:
            raise EOVERFLOW("iova or length is 2^64-1")
        if not cmd.length:
            raise EINVAL("length is 0")
        if cmd.iova + cmd.length - 1 > ULONG_MAX:
            raise EOVERFLOW("iova + length wraps")
        unmapped, error = ioas.iopt.unmap(cmd.iova, cmd.iova + cmd.length - 1)
        if error is None and not unmapped:
            raise ENOENT(f"nothing is mapped in {cmd.iova:#x}..{cmd.iova + cmd.length - 1:#x}")
    if error is not None:
        raise error
    cmd.length = unmapped
    ucmd.respond(cmd)


# ---- options ----


def option(ucmd: Ucmd, cmd: uapi.Option) -> None:
    """IOMMU_OPTION (main.c:iommufd_option): only val64 is written back."""
    if cmd.reserved:
        raise EOPNOTSUPP("reserved is not 0")
    if cmd.option_id == uapi.IOMMU_OPTION_RLIMIT_MODE:
        _option_rlimit_mode(ucmd, cmd)
    elif cmd.option_id == uapi.IOMMU_OPTION_HUGE_PAGES:
        _option_huge_pages(cmd, ucmd.get(cmd.object_id, Ioas).iopt)
    else:
        raise EOPNOTSUPP(f"option {cmd.option_id} is not known")
    ucmd.caller.copy_to_user(ucmd.uptr + _VAL64, cmd.val64.to_bytes(8, "little"))


def _option_rlimit_mode(ucmd: Ucmd, cmd: uapi.Option) -> None:
    if cmd.object_id:
        raise EOPNOTSUPP("RLIMIT_MODE has no object")
    if cmd.op == uapi.IOMMU_OPTION_OP_GET:
        cmd.val64 = int(ucmd.ictx.account_mode is _MM)
    elif cmd.op == uapi.IOMMU_OPTION_OP_SET:
        if not ucmd.caller.task.cap_sys_resource:
            raise EPERM("setting RLIMIT_MODE needs CAP_SYS_RESOURCE")
        if len(ucmd.ictx.objects):
            raise EBUSY("RLIMIT_MODE is set before the first object is made")
        if cmd.val64 > 1:
            raise EINVAL(f"RLIMIT_MODE is 0 or 1, not {cmd.val64}")
        ucmd.ictx.account_mode = Account.MM if cmd.val64 else Account.USER
    else:
        raise EOPNOTSUPP(f"op {cmd.op} is not known")


def _option_huge_pages(cmd: uapi.Option, iopt: IoPagetable) -> None:
    if cmd.op == uapi.IOMMU_OPTION_OP_GET:
        cmd.val64 = int(not iopt.disable_large_pages)
    elif cmd.op == uapi.IOMMU_OPTION_OP_SET:
        if cmd.val64 == 0:
            iopt.do_disable_large_pages()
        elif cmd.val64 == 1:
            iopt.enable_large_pages()
        else:
            raise EINVAL(f"HUGE_PAGES is 0 or 1, not {cmd.val64}")
    else:
        raise EOPNOTSUPP(f"op {cmd.op} is not known")
