"""What `run --explain` and `--summary` print: the calls that failed and why, and what was left at the end."""

from __future__ import annotations

import collections
import time
from typing import TYPE_CHECKING, Protocol

from iommufd_uapi import decode
from iommufd_uapi.events import braces, errno_name
from iommufdd.context import Context
from iommufdd.server.trace import View

if TYPE_CHECKING:
    from collections.abc import Callable

    from iommufdd.kvm.dev import KvmFile
    from iommufdd.user import Caller, File
    from iommufdd.vfio.device_cdev import VfioDeviceFile


class Calling(Protocol):
    """A thread in one of its calls."""

    tid: int
    caller: Caller


class Report:
    """Lines for the keeper, given to `say`."""

    def __init__(self, say: Callable[[str], None], *, explain: bool, summary: bool) -> None:
        self.say = say
        self.explain = explain
        self.summary = summary
        self.fired: collections.Counter[str] = collections.Counter()  # faults injected, by kind of gate
        self._calls: collections.Counter[str] = collections.Counter()
        self._failed: collections.Counter[str] = collections.Counter()
        self._left: collections.Counter[str] = collections.Counter()
        self._contexts = 0
        self._seconds = 0.0

    def ioctl(self, thread: Calling, file: Context | VfioDeviceFile | KvmFile, cmd: int, arg: int) -> int:
        """Carry an ioctl out, and count it."""
        device = not isinstance(file, Context)
        data = thread.caller.memory.read(arg, decode.size_of(cmd, device=device))
        view = View(file, thread.caller)
        fields = decode.arguments(cmd, arg, data, view, device=device) if self.explain else {}
        before = time.perf_counter()
        rc = file.ioctl(thread.caller, cmd, arg)
        self._seconds += time.perf_counter() - before
        name = decode.name_of(cmd, data, device=device)
        self._calls[name] += 1
        if rc < 0:
            self._failed[name] += 1
            if self.explain:
                error = thread.caller.error
                why = f"{error.name}: {error.reason}" if error is not None else errno_name(-rc)
                self.say(f"pid {thread.tid}: {name} = {why} {braces(fields)}")
        return rc

    def closed(self, file: File) -> None:
        """The last descriptor of a file is closed: what is in a context now was never destroyed."""
        if not isinstance(file, Context):
            return
        left = [obj.type.name for obj in file.objects]
        self._left.update(left)
        self._contexts += bool(left)

    def end(self) -> None:
        """The summary."""
        if not self.summary:
            return
        calls, failed = self._calls.total(), self._failed.total()
        self.say(f"{calls} ioctls in {self._seconds:.3f} s, {failed} failed")
        for name, count in self._calls.most_common():
            self.say(f"  {count:8} {name}" + (f", {self._failed[name]} failed" if self._failed[name] else ""))
        for name, count in sorted(self.fired.items()):
            self.say(f"  {count:8} faults injected at gate {name}")
        left = ", ".join(f"{count} {name}" for name, count in sorted(self._left.items()))
        self.say(
            f"not destroyed before close: {left} in {self._contexts} contexts" if left else "nothing was left open"
        )
