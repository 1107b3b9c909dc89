"""The event port: what happens on a machine, told to all who listen; nothing is made up while nobody does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeAlias

    from iommufd_uapi.events import Event

    from .context import Context
    from .eventq import Eventq
    from .objects import IommufdObject
    from .user import Caller, File

    Entered: TypeAlias = list[tuple["EventListener", object]]


class EventListener(Protocol):
    """Who wants to know what happens on a machine: the trace, the sanitizer. Never waits, never raises."""

    def enter(self, file: File, caller: Caller, cmd: int, uptr: int) -> object:
        """A call begins: an ioctl of a context or VFIO device, or with cmd 0 a read or write of a queue of a context.

        What is returned comes back at its end.
        """
        ...

    def ioctl(self, file: File, caller: Caller, cmd: int, uptr: int, rc: int, entered: object) -> None:
        """One ioctl is answered; caller.error tells why it failed."""
        ...

    def transfer(
        self, eventq: Eventq, verb: str, caller: Caller, addr: int, count: int, rc: int, entered: object
    ) -> None:
        """A queue was read or written ("read", "write"): bytes, or minus an errno with caller.error."""
        ...

    def object(self, ictx: Context, verb: str, obj: IommufdObject) -> None:
        """An object was published ("alloc"), or is about to go ("destroy")."""
        ...

    def hardware(self, port: Events, event: Event) -> None:
        """A model of hardware did something, on the machine of this port; time and process are not filled in."""
        ...


class Events:
    """The event port of a machine: what happens on it goes to all who listen.

    Whoever has something to tell asks `listening` first: that one attribute is all it costs while nobody does. A model
    of hardware gets this object and tells, without knowing to whom::

        if self.events.listening:
            self.events.hardware(Dma("vfio0", pasid, iova, length, "read"))

    with one of the structs of iommufd_uapi.events; a new kind of event is a new struct there. Models that know monitors
    are told of by hardware_events.py.
    """

    __slots__ = ("_listeners", "listening", "machine", "on_change")

    def __init__(self, machine: str = "") -> None:
        self.machine = machine  # its name
        self.listening = False
        self.on_change: Callable[[], None] | None = None  # called when `listening` has changed
        self._listeners: tuple[EventListener, ...] = ()

    def add(self, listener: EventListener) -> None:
        self._set((*self._listeners, listener))

    def remove(self, listener: EventListener) -> None:
        """ValueError unless it listens."""
        found = list(self._listeners)
        found.remove(listener)
        self._set(tuple(found))

    def _set(self, listeners: tuple[EventListener, ...]) -> None:
        self._listeners = listeners
        if self.listening != bool(listeners):
            self.listening = bool(listeners)
            if self.on_change is not None:
                self.on_change()

    def enter(self, file: File, caller: Caller, cmd: int, uptr: int) -> Entered:
        return [(each, each.enter(file, caller, cmd, uptr)) for each in self._listeners]

    def ioctl(self, file: File, caller: Caller, cmd: int, uptr: int, rc: int, entered: Entered) -> None:
        for each, token in entered:
            each.ioctl(file, caller, cmd, uptr, rc, token)

    def transfer(
        self, eventq: Eventq, verb: str, caller: Caller, addr: int, count: int, rc: int, entered: Entered
    ) -> None:
        for each, token in entered:
            each.transfer(eventq, verb, caller, addr, count, rc, token)

    def object(self, ictx: Context, verb: str, obj: IommufdObject) -> None:
        for each in self._listeners:
            each.object(ictx, verb, obj)

    def hardware(self, event: Event) -> None:
        """DMA, faults, page requests and responses, invalidations, replaces: what a model has to tell."""
        event.machine = self.machine
        for each in self._listeners:
            each.hardware(self, event)
