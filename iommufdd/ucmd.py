"""One ioctl in flight (struct iommufd_ucmd)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .errors import ENOENT
from .user import Caller, Gate

if TYPE_CHECKING:
    from iommufd_uapi.layout import Layout

    from .context import Context
    from .objects import IommufdObject, O


class Ucmd:
    """struct iommufd_ucmd: the caller, its buffer, and the object being born."""

    __slots__ = ("caller", "data", "ictx", "new_obj", "uptr", "user_size")

    def __init__(self, ictx: Context, caller: Caller, uptr: int, user_size: int, data: bytes) -> None:
        self.ictx = ictx
        self.caller = caller
        self.uptr = uptr
        self.user_size = user_size
        self.data = data  # the struct as copied in, zero-extended
        self.new_obj: IommufdObject | None = None

    def respond(self, cmd: Layout) -> None:
        """Copy the struct back, cut to what the caller gave (iommufd_ucmd_respond); EFAULT."""
        self.caller.copy_to_user(self.uptr, cmd.pack()[: self.user_size])

    def get(self, obj_id: int, kind: type[O]) -> O:
        """The object of this id and kind; ENOENT (iommufd_get_object)."""
        if self.caller.gate.watching:
            self.caller.gate(Gate.LOOKUP)
        obj = self.ictx.objects.get(obj_id)
        if isinstance(obj, kind):
            return obj
        if obj is None:
            raise ENOENT(f"there is no object {obj_id}")
        raise ENOENT(f"object {obj_id} is a {obj.type.name.lower()}, not a {kind.type.name.lower()}")

    def get_any(self, obj_id: int) -> IommufdObject:
        """The object of this id, whatever it is; ENOENT."""
        if self.caller.gate.watching:
            self.caller.gate(Gate.LOOKUP)
        obj = self.ictx.objects.get(obj_id)
        if obj is None:
            raise ENOENT(f"there is no object {obj_id}")
        return obj

    def alloc(self, obj: O) -> O:
        """Give obj an id; the dispatcher publishes it on success and undoes it on failure."""
        self.ictx.objects.alloc(obj, self.caller.gate)
        self.new_obj = obj
        return obj
