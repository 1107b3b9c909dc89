"""The object table: ids, users, two-step birth, tombstones (main.c, upper half).

`self.parent = self.hold(parent)` is all the reference counting there is: an edge of the graph, dropped when the holder
goes. `users` is then a fact: the number of edges that end at an object.
"""

from __future__ import annotations

import enum
import heapq
from typing import TYPE_CHECKING, ClassVar, TypeVar

from .errors import EBUSY, ENOENT, ENOMEM
from .user import FaultGate, Gate

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .context import Context
    from .event_port import Events

MAX_ID = 2**31 - 1  # xa_limit_31b


class ObjectType(enum.IntEnum):
    """enum iommufd_object_type"""

    DEVICE = 1
    HWPT_PAGING = 2
    HWPT_NESTED = 3
    IOAS = 4
    ACCESS = 5
    FAULT = 6
    VIOMMU = 7
    VDEVICE = 8
    VEVENTQ = 9
    HW_QUEUE = 10
    SELFTEST = 11
    HWPT_KVM = 12  # the RFC's, with a number of our own


class Holder:
    """Anything that keeps objects alive: another object, an attachment, an open file, a mapping."""

    def __init__(self) -> None:
        self.held: list[IommufdObject] = []

    def hold(self, obj: O) -> O:
        """refcount_inc(&obj->users), with the name of who did it."""
        self.held.append(obj)
        obj.holders.append(self)
        return obj

    def let_go(self, obj: IommufdObject) -> None:
        """refcount_dec(&obj->users)."""
        self.held.remove(obj)
        obj.holders.remove(self)

    def let_go_all(self) -> None:
        for obj in self.held:
            obj.holders.remove(self)
        self.held.clear()

    def __str__(self) -> str:
        return type(self).__name__


class IommufdObject(Holder):
    """struct iommufd_object: born by ObjectTable.alloc(), visible after finalize(), gone after remove()."""

    type: ClassVar[ObjectType]
    id = 0

    def __init__(self) -> None:
        super().__init__()
        self.holders: list[Holder] = []

    @property
    def users(self) -> int:
        """Edges that end here; the kernel's count is one higher, for the table."""
        return len(self.holders)

    def destroy(self) -> None:
        """Undo everything; a subclass ends with super().destroy(). Also runs when a birth is aborted."""
        self.let_go_all()

    def pre_destroy(self) -> None:
        """Revoke what others keep of this object without holding it (main.c: pre_destroy)."""

    def __str__(self) -> str:
        return f"{self.type.name.lower()} {self.id}"


O = TypeVar("O", bound=IommufdObject)  # noqa: E741


class ObjectTable:
    """struct xarray objects of an iommufd_ctx: lowest free id from 1."""

    def __init__(self, ictx: Context, events: Events) -> None:
        self._entries: dict[int, IommufdObject | None] = {}  # None: reserved, or a tombstone
        self._free: list[int] = []  # a heap of the ids below _next that are free
        self._next = 1
        self._ictx = ictx
        self._events = events

    def __len__(self) -> int:
        """Ids taken, those of unborn objects and tombstones too (xa_empty)."""
        return len(self._entries)

    def __iter__(self) -> Iterator[IommufdObject]:
        """Visible objects by id."""
        for obj_id in sorted(self._entries):
            obj = self._entries.get(obj_id)
            if obj is not None:
                yield obj

    def alloc(self, obj: O, gate: FaultGate) -> O:
        """Reserve an id; the object stays invisible. ENOMEM.

        Source: _iommufd_object_alloc(). The caller must not have let obj hold anything yet.
        """
        gate(Gate.OBJECT)
        if self._free:
            obj.id = heapq.heappop(self._free)
        elif self._next <= MAX_ID:
            obj.id = self._next
            self._next += 1
        else:
            raise ENOMEM("no object id is left")
        self._entries[obj.id] = None
        return obj

    def finalize(self, obj: IommufdObject) -> None:
        """Publish: from now on other calls can see the object."""
        self._entries[obj.id] = obj
        if self._events.listening:
            self._events.object(self._ictx, "alloc", obj)

    def abort(self, obj: IommufdObject) -> None:
        """Undo a birth: destroy the object and release its id (iommufd_object_abort_and_destroy)."""
        obj.destroy()
        self._erase(obj.id)

    def get(self, obj_id: int) -> IommufdObject | None:
        """The visible object with this id."""
        return self._entries.get(obj_id)

    def remove(self, obj_id: int) -> None:
        """DESTROY by id: ENOENT, EBUSY (iommufd_object_remove)."""
        obj = self._entries.get(obj_id)
        if obj is None:
            raise ENOENT(f"there is no object {obj_id}")
        if obj.holders:
            raise EBUSY(f"{obj} is in use by {_names(obj.holders)}")
        self._erase(obj_id)
        obj.pre_destroy()
        self._destroyed(obj)

    def destroy_user(self, obj: IommufdObject) -> None:
        """Destroy an object whose only user was a kernel driver, which has let go (iommufd_object_destroy_user)."""
        obj.pre_destroy()
        self.remove(obj.id)

    def tombstone_user(self, obj: IommufdObject) -> None:
        """Destroy, but keep the id taken until the table goes (iommufd_object_tombstone_user)."""
        self._entries[obj.id] = None
        self._destroyed(obj)

    def destroy_all(self) -> None:
        """Close: passes over the ids, each destroying what nobody uses (iommufd_fops_release)."""
        while self._entries:
            leaves = 0
            for obj in list(self):
                if not obj.holders and self._entries.get(obj.id) is obj:
                    del self._entries[obj.id]
                    self._destroyed(obj)
                    leaves += 1
            if not leaves:
                break  # tombstones are left, or objects that something outside still holds
        self._entries = {obj.id: obj for obj in list(self)}

    def _destroyed(self, obj: IommufdObject) -> None:
        if self._events.listening:
            self._events.object(self._ictx, "destroy", obj)
        obj.destroy()

    def _erase(self, obj_id: int) -> None:
        del self._entries[obj_id]
        heapq.heappush(self._free, obj_id)


def _names(holders: list[Holder]) -> str:
    names = sorted({str(holder) for holder in holders})
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
