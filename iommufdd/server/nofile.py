"""The daemon's own descriptors and who may take how many (RLIMIT_NOFILE of the daemon, shared among uids)."""

from __future__ import annotations

import resource

from iommufdd.errors import EMFILE

SPARE = 64  # for listeners, logs, and what a packet brings along


class Nofile:
    """Counts the descriptors kept on behalf of each uid.

    A uid may take one more as long as it has no more than are still free: the first takes at most half, the
    next one half of the rest, and there is always something left for one who comes anew.
    """

    def __init__(self, limit: int | None = None, what: str = "the daemon's descriptors") -> None:
        """what: is shared in this way, if it is something else."""
        self.what = what
        self.limit = (raise_limit() if limit is None else limit) - SPARE
        self.total = 0
        self.taken: dict[int, int] = {}

    def charge(self, uid: int, count: int = 1) -> None:
        """EMFILE when this uid has its share."""
        taken = self.taken.get(uid, 0)
        if taken + count > self.limit - self.total:
            raise EMFILE(f"uid {uid} keeps {taken} of the {self.limit} {self.what}, {self.total} are taken")
        self.taken[uid] = taken + count
        self.total += count

    def uncharge(self, uid: int, count: int = 1) -> None:
        self.total -= count
        left = self.taken[uid] - count
        if left:
            self.taken[uid] = left
        else:
            del self.taken[uid]


def raise_limit() -> int:
    """Set the soft RLIMIT_NOFILE to the hard one; its value."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY or hard > 1 << 20:
        hard = max(soft, 1 << 20)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    return hard
