"""IOMMU_IOAS_CHANGE_PROCESS: pinned memory of files changes its payer (ioas.c, lower half)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .errors import EINVAL, EOPNOTSUPP, IommufdError
from .ioas import Ioas
from .pages import Account, FilePages, Pages, charge
from .user import Gate

if TYPE_CHECKING:
    import iommufd_uapi.iommufd as uapi

    from .ucmd import Ucmd
    from .user import Caller


def ioas_change_process(ucmd: Ucmd, cmd: uapi.IoasChangeProcess) -> None:
    """IOMMU_IOAS_CHANGE_PROCESS: EOPNOTSUPP, EINVAL (not all mappings are files), ENOMEM.

    quirk: EINVAL too when the process that paid is gone, though the new one has been charged by then.
    """
    if cmd.reserved:
        raise EOPNOTSUPP("reserved is not 0")
    caller = ucmd.caller
    caller.gate(Gate.MEMORY)
    everything: dict[int, Pages] = {}
    for ioas in (obj for obj in ucmd.ictx.objects if isinstance(obj, Ioas)):
        for area in ioas.iopt.areas:
            if not isinstance(area.pages, FilePages):
                raise EINVAL(f"iova {area.iova:#x} of {ioas} was not mapped from a file")
            everything[id(area.pages)] = area.pages
    moving = {key: pages for key, pages in everything.items() if _need_charge_update(pages, caller)}
    try:
        _charge_current(caller, list(moving.values()))
    except IommufdError:
        for pages in moving.values():
            pages.last_npinned = pages.npinned
        raise
    error: IommufdError | None = None
    for key, pages in everything.items():
        if key in moving:
            pages.last_npinned = 0  # where that fails, the new payer is never given it back
            try:
                pages.update_pinned(-pages.npinned)
            except EINVAL as failed:
                error = failed
        pages.mm, pages.task, pages.user = caller.mm, caller.task, caller.task.user
    if error is not None:
        raise error


def _need_charge_update(pages: Pages, caller: Caller) -> bool:
    """need_charge_update()"""
    if pages.account is Account.NONE:
        return False
    return pages.mm is not caller.mm or (pages.account is Account.USER and pages.user is not caller.task.user)


def _charge_current(caller: Caller, moving: list[Pages]) -> None:
    """charge_current(): the caller pays for all of them, or for none; ENOMEM."""
    paid: list[tuple[Account, int]] = []
    try:
        for account in Account:
            npages = sum(pages.last_npinned for pages in moving if pages.account is account)
            if npages:
                charge(account, npages, caller.task, caller.task.user, caller.mm)
                paid.append((account, npages))
    except IommufdError:
        for account, npages in reversed(paid):
            charge(account, -npages, caller.task, caller.task.user, caller.mm)
        raise
