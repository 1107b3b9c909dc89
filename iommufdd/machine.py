"""A machine instance: what is global to a kernel. IOMMUs, users, and the selftest's settings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .user import User

if TYPE_CHECKING:
    from .iommu.ops import IommuOps
    from .iommu.selftest_ops import SelftestIommu
    from .sanitizer import Sanitizer

TEMP_MEMORY_LIMIT = 65536  # selftest.c:iommufd_test_memory_limit


class Machine:
    """One emulated machine. Contexts of different machines share nothing."""

    def __init__(self, name: str, mock: SelftestIommu) -> None:
        self.name = name
        self.mock = mock
        self.iommus: dict[str, IommuOps] = {}  # those described, by name; not the selftest's mock
        self.sanitizer: Sanitizer | None = None
        self.temp_memory_limit = TEMP_MEMORY_LIMIT
        self._users: dict[int, User] = {}

    def user(self, uid: int) -> User:
        """get_uid(): what this uid has locked, in all its processes."""
        return self._users.setdefault(uid, User(uid))
