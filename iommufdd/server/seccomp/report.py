"""What `run --explain` and `--summary` print: the calls that failed and why, and what was left at the end."""

from __future__ import annotations

import collections
import errno
import time
from typing import TYPE_CHECKING, Any, Protocol

from iommufd_uapi.iommufd import IOCTLS
from iommufd_uapi.iommufd_test import TEST_OPS, TestCmd
from iommufd_uapi.layout import VfioIoctl
from iommufd_uapi.vfio import CONTAINER_IOCTLS, DEVICE_IOCTLS, VFIO_DEVICE_RESET
from iommufdd.context import Context

if TYPE_CHECKING:
    from collections.abc import Callable

    from iommufd_uapi.layout import Layout
    from iommufdd.user import Caller, File
    from iommufdd.vfio.device_cdev import VfioDeviceFile

NAMES: dict[int, str] = {
    **{struct.CMD: struct.MACRO for struct in CONTAINER_IOCTLS},
    **{struct.CMD: struct.MACRO for struct in IOCTLS},
    TestCmd.CMD: "IOMMU_TEST_CMD",
}
LAYOUTS: dict[int, type[Layout]] = {
    **{struct.CMD: struct for struct in CONTAINER_IOCTLS},
    **{struct.CMD: struct for struct in IOCTLS},
}
# Some VFIO numbers mean another thing on a device.
DEVICE_NAMES = NAMES | {struct.CMD: struct.MACRO for struct in DEVICE_IOCTLS} | {VFIO_DEVICE_RESET: "VFIO_DEVICE_RESET"}
DEVICE_LAYOUTS = LAYOUTS | {struct.CMD: struct for struct in DEVICE_IOCTLS}
DECIMAL = 4096  # numbers from here on are printed in hexadecimal


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

    def ioctl(self, thread: Calling, file: Context | VfioDeviceFile, cmd: int, arg: int) -> int:
        """Carry an ioctl out, and count it."""
        device = not isinstance(file, Context)
        data = thread.caller.memory.read(arg, _size(cmd, device=device))
        before = time.perf_counter()
        rc = file.ioctl(thread.caller, cmd, arg)
        self._seconds += time.perf_counter() - before
        name = name_of(cmd, data, device=device)
        self._calls[name] += 1
        if rc < 0:
            self._failed[name] += 1
            if self.explain:
                error = thread.caller.error
                why = f"{error.name}: {error.reason}" if error is not None else _errno(-rc)
                self.say(f"pid {thread.tid}: {name} = {why} {fields_of(cmd, data, device=device)}")
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


def _size(cmd: int, *, device: bool) -> int:
    layout = (DEVICE_LAYOUTS if device else LAYOUTS).get(cmd)
    return TestCmd.SIZEOF if cmd == TestCmd.CMD else layout.SIZEOF if layout is not None else 0


def name_of(cmd: int, data: bytes, *, device: bool = False) -> str:
    """The macro of an ioctl, or of a test operation."""
    if cmd == TestCmd.CMD and len(data) >= 8:
        op = TEST_OPS.get(int.from_bytes(data[4:8], "little"))
        if op is not None:
            return op.name
    return (DEVICE_NAMES if device else NAMES).get(cmd, f"ioctl {cmd:#x}")


def fields_of(cmd: int, data: bytes, *, device: bool = False) -> str:
    """`{size=12, flags=0, ...}`, as far as the memory could be read."""
    if cmd == TestCmd.CMD:
        test = TestCmd.unpack(data.ljust(TestCmd.SIZEOF, b"\0"))
        op = TEST_OPS.get(test.op)
        inner = _pairs(op.union.unpack(test.u)) if op is not None else []
        return _braces([("id", test.id), *inner])
    layout = (DEVICE_LAYOUTS if device else LAYOUTS).get(cmd)
    if layout is None:
        return ""
    pairs = _pairs(layout.unpack(data.ljust(layout.SIZEOF, b"\0")))
    if issubclass(layout, VfioIoctl):  # callers keep to older, shorter structs
        pairs = [(name, value) for name, value in pairs if layout.offsetof(name) < max(pairs[0][1], 4)]
    return _braces(pairs)


def _pairs(obj: Layout) -> list[tuple[str, Any]]:
    return [(name, getattr(obj, name)) for name in obj.__struct_fields__ if "reserved" not in name]


def _braces(pairs: list[tuple[str, Any]]) -> str:
    return "{" + ", ".join(f"{name}={_value(value)}" for name, value in pairs) + "}"


def _value(value: object) -> str:
    if isinstance(value, int):
        return str(value) if abs(value) < DECIMAL else hex(value)
    return value.hex() if isinstance(value, bytes) else str(value)


def _errno(number: int) -> str:
    return errno.errorcode.get(number, str(number))
