"""Registers that a client maps: a region of the core moved into a memfd, so that both sides see the same bytes."""

from __future__ import annotations

import fcntl
import mmap
import os
from typing import TYPE_CHECKING

from iommufdd.errors import EMFILE

if TYPE_CHECKING:
    from iommufdd.mmap import MmapRegion

    from .nofile import Nofile

SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class Registers:
    """The memfd behind one region."""

    def __init__(self, region: MmapRegion, nofile: Nofile, uid: int) -> None:
        """EMFILE."""
        nofile.charge(uid)
        self._nofile, self._uid = nofile, uid
        try:
            self.fd = os.memfd_create("iommufd-registers", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except OSError:
            nofile.uncharge(uid)
            raise EMFILE("the daemon has no descriptor left") from None
        os.ftruncate(self.fd, region.length)
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, SEALS)
        self._map = mmap.mmap(self.fd, region.length)
        self._view = memoryview(self._map)
        region.move(self._view, self)

    def close(self) -> None:
        self._view.release()
        self._map.close()
        os.close(self.fd)
        self._nofile.uncharge(self._uid)


def registers_of(region: MmapRegion, nofile: Nofile, uid: int) -> Registers:
    """The memfd of a region, made when it is first mapped; EMFILE."""
    backing = region.backing
    return backing if isinstance(backing, Registers) else Registers(region, nofile, uid)
