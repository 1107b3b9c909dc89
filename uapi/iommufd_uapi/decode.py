"""Room uapi: the argument of an ioctl as text, for traces and explanations.

`{flags=IOMMU_IOAS_MAP_READABLE, ioas_id=ioas:1, iova=0x1000}`: flags and enums by name, ids with what they stand
for, addresses and lengths in hexadecimal, small data behind pointers. Every function here gives an answer for
any bytes: what cannot be read or is not known is shown as the number it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

from . import iommufd as uapi
from . import kvm, vfio
from .args import whole
from .iommufd_test import TEST_OPS, TestCmd
from .layout import Ioctl, Layout, VfioIoctl
from .names import HEX, IDS, INVALIDATIONS, NAMES, NESTED, PADS, PLAIN, RECORDS, VFIO_EXTENSIONS

if TYPE_CHECKING:
    from .bits import Bitfield

IOVA_RANGE = uapi.IovaRange.SIZEOF
DECIMAL = 4096  #: numbers from here on are printed in hexadecimal
FEW = 4  #: entries shown of an array
LONGEST = 32  #: bytes shown of what is not known

_DEVICE: dict[int, type[VfioIoctl]] = {struct.CMD: struct for struct in vfio.DEVICE_IOCTLS}
_CONTAINER: dict[int, type[Ioctl | VfioIoctl | kvm.KvmIoctl]] = {
    **{struct.CMD: struct for struct in kvm.IOCTLS},
    **{struct.CMD: struct for struct in vfio.CONTAINER_IOCTLS},
    **{struct.CMD: struct for struct in uapi.IOCTLS},
}
#: whose numbers come first where two files have one; the rest is known all the same, for who asks the wrong file
_LAYOUTS, _DEVICE_LAYOUTS = _DEVICE | _CONTAINER, _CONTAINER | _DEVICE


class View(Protocol):
    """What the decoder may look at besides the struct."""

    def kind(self, object_id: int) -> str:
        """What an id stands for now, "ioas"; empty when there is no such object."""
        ...

    def read(self, addr: int, length: int) -> bytes:
        """The readable prefix of the caller's memory."""
        ...


class Blind:
    """A `View` of nothing."""

    def kind(self, object_id: int) -> str:
        return ""

    def read(self, addr: int, length: int) -> bytes:
        return b""


# ---- one ioctl ---------------------------------------------------------------------------------------------


def size_of(cmd: int, *, device: bool = False) -> int:
    """How many bytes at its argument are wanted; 0 when that is no pointer, or not known."""
    layout = TestCmd if cmd == TestCmd.CMD else _layout(cmd, device)
    return layout.SIZEOF if layout is not None else 0


def name_of(cmd: int, data: bytes, *, device: bool = False) -> str:
    """The macro of an ioctl, or of a test operation. `device`: numbers mean those of a VFIO device."""
    if cmd == TestCmd.CMD:
        op = TEST_OPS.get(int.from_bytes(data[4:8], "little"))
        return op.name if op is not None else "IOMMU_TEST_CMD"
    layout = _layout(cmd, device)
    return layout.MACRO if layout is not None else PLAIN.get(cmd, f"ioctl {cmd:#x}")


def arguments(cmd: int, arg: int, data: bytes, view: View, *, device: bool = False) -> dict[str, str]:
    """What the caller passed: `data` are the bytes at `arg`, as many as can be read of size_of()."""
    if cmd == TestCmd.CMD and len(data) >= 8:
        return _test_arguments(data, view)
    layout = _layout(cmd, device)
    if layout is None or len(data) < 4:
        return _number(cmd, arg)
    obj = _unpack(layout, data)
    return _size(obj, data) | dict(_passed(obj, view))


def written(cmd: int, before: bytes, after: bytes, view: View, *, ok: bool, device: bool = False) -> dict[str, str]:
    """What came back: the fields that the call answers with if it was `ok`, and whatever is not as it was."""
    if cmd == TestCmd.CMD and len(before) >= 8:
        return _test_written(before, after, view, ok=ok)
    layout = _layout(cmd, device)
    if layout is None or len(before) < 4 or len(after) < 4:
        return {}
    old, new = (_unpack(layout, data) for data in (before, after))
    found = {name: _text(new, name, view) for name in _changed(old, new, ok=ok)}
    return found | dict(_filled(new, view, ok=ok))


def _layout(cmd: int, device: bool) -> type[Ioctl | VfioIoctl | kvm.KvmIoctl] | None:
    return (_DEVICE_LAYOUTS if device else _LAYOUTS).get(cmd)


def _unpack(layout: type[Layout], data: bytes) -> Layout:
    """A struct of which some bytes may be missing: only KVM's do not say how many there are."""
    if issubclass(layout, kvm.KvmIoctl):
        return layout.unpack(data.ljust(layout.SIZEOF, b"\0"))
    return layout.unpack(whole(data, layout.SIZEOF))


def _number(cmd: int, arg: int) -> dict[str, str]:
    """An argument that is no struct, or one that cannot be read."""
    if cmd in (vfio.VFIO_CHECK_EXTENSION, vfio.VFIO_SET_IOMMU):
        return {"arg": VFIO_EXTENSIONS.get(arg, _plain(arg))}
    if kvm.argument_size(cmd) == 0:
        return {"arg": _plain(arg)}
    return {} if cmd in PLAIN else {"arg": hex(arg)}


def _size(obj: Layout, data: bytes) -> dict[str, str]:
    """The size that the caller gives, unless it is what everybody gives."""
    name, size = obj.__struct_fields__[0], int.from_bytes(data[:4], "little")
    if isinstance(obj, kvm.KvmIoctl):
        return {}
    return {} if size == obj.SIZEOF else {name: str(size)}


def _passed(obj: Layout, view: View) -> Iterator[tuple[str, str]]:
    if isinstance(obj, kvm.KvmIoctl) and not obj.CMD >> 30 & 1:
        return  # all of it is the answer
    inner = _pointed_in(obj, view)
    for name in _covered(obj):
        if name.startswith("out_"):
            continue
        if name in inner:
            yield name.removesuffix("_uptr"), inner[name]
        elif _matters(obj, name):
            yield name, _text(obj, name, view)


def _changed(old: Layout, new: Layout, *, ok: bool) -> Iterator[str]:
    answers = _answers(old) if ok else ()
    for name in _covered(old):
        if getattr(old, name) != getattr(new, name) or (ok and name.startswith("out_")) or name in answers:
            yield name


def _covered(obj: Layout) -> list[str]:
    """The fields after the size: of VFIO's structs those that argsz covers, for callers keep to older, shorter ones."""
    if isinstance(obj, kvm.KvmIoctl):
        return list(obj.__struct_fields__)
    end = max(obj.argsz, 4) if isinstance(obj, VfioIoctl) else obj.SIZEOF
    return [name for name in obj.__struct_fields__[1:] if obj.offsetof(name) < end]


def _answers(obj: Layout) -> tuple[str, ...]:
    """Fields that an ioctl reads and answers with: told even if the value stays."""
    match obj:
        case uapi.IoasMap() | uapi.IoasMapFile():
            return () if obj.flags & uapi.IOMMU_IOAS_MAP_FIXED_IOVA else ("iova",)
        case uapi.Option():
            return ("val64",) if obj.op == uapi.IOMMU_OPTION_OP_GET else ()
        case uapi.VfioIoas():
            return ("ioas_id",) if obj.op == uapi.IOMMU_VFIO_IOAS_GET else ()
        case uapi.HwInfo():
            return "data_type", "data_len"
        case uapi.HwptInvalidate():
            return ("entry_num",)
        case uapi.IoasUnmap():
            return ("length",)
        case uapi.IoasIovaRanges():
            return ("num_iovas",)
    return ()


# ---- IOMMU_TEST_CMD ----------------------------------------------------------------------------------------


def _test_arguments(data: bytes, view: View) -> dict[str, str]:
    cmd = TestCmd.unpack(whole(data, TestCmd.SIZEOF))
    op = TEST_OPS.get(cmd.op)
    found = _size(cmd, data)
    if op is None:
        return {**found, "op": _plain(cmd.op), "id": _id(cmd.id, view)}
    if cmd.id:
        found["id"] = f"fd {cmd.id}" if op.id_is_fd else _id(cmd.id, view)
    obj = op.union.unpack(cmd.u)
    names = [name for name in obj.__struct_fields__ if not name.startswith("out_")]
    return found | {"u.id" if name == "id" else name: _text(obj, name, view) for name in names}


def _test_written(before: bytes, after: bytes, view: View, *, ok: bool) -> dict[str, str]:
    old, new = (TestCmd.unpack(whole(data, TestCmd.SIZEOF)) for data in (before, after))
    op = TEST_OPS.get(old.op)
    if op is None:
        return {}
    was, is_ = op.union.unpack(old.u), op.union.unpack(new.u)
    names = (name for name in is_.__struct_fields__ if getattr(was, name) != getattr(is_, name))
    outs = (name for name in is_.__struct_fields__ if ok and name.startswith("out_"))
    return {name: _text(is_, name, view) for name in dict.fromkeys((*outs, *names))}


# ---- behind pointers ---------------------------------------------------------------------------------------


def _pointed_in(obj: Layout, view: View) -> dict[str, str]:
    """What lies behind the pointer of an ioctl that reads it, by the pointer's field."""
    match obj:
        case uapi.HwptAlloc(data_uptr=addr, data_len=length) if addr and length:
            text = _struct_at(NESTED.get((type(obj), obj.data_type)), addr, length, view)
        case uapi.ViommuAlloc(data_uptr=addr, data_len=length) if addr and length:
            text = _struct_at(NESTED.get((type(obj), obj.type)), addr, length, view)
        case uapi.HwptInvalidate(data_uptr=addr) if addr and obj.entry_num:
            text = _entries(obj, view)
        case uapi.IoasAllowIovas(allowed_iovas=addr) if addr and obj.num_iovas:
            text = _ranges(addr, obj.num_iovas, view)
        case _:
            return {}
    name = "allowed_iovas" if isinstance(obj, uapi.IoasAllowIovas) else "data_uptr"
    return {name: text} if text else {}


def _filled(obj: Layout, view: View, *, ok: bool) -> Iterator[tuple[str, str]]:
    """What the call wrote behind a pointer."""
    text = ""
    match obj:
        case uapi.HwInfo(data_uptr=addr, data_len=length) if ok and addr and length:
            text = _struct_at(NESTED.get((type(obj), obj.data_type)), addr, length, view)
        case uapi.ViommuAlloc(data_uptr=addr, data_len=length) if ok and addr and length:
            text = _struct_at(NESTED.get((type(obj), obj.type)), addr, length, view)
        case uapi.IoasIovaRanges(allowed_iovas=addr) if ok and addr and obj.num_iovas:
            text = _ranges(addr, obj.num_iovas, view)
    if text:
        yield "allowed_iovas" if isinstance(obj, uapi.IoasIovaRanges) else "data", text


def _struct_at(layout: type[Layout] | None, addr: int, length: int, view: View) -> str:
    """A struct in the caller's memory, or its first bytes when they are fewer or not known; "" if unreadable."""
    wanted = layout.SIZEOF if layout is not None else LONGEST
    data = view.read(addr, min(length, wanted))
    if layout is None or len(data) < layout.SIZEOF:
        return _raw(data, more=length > len(data)) if data else ""
    return describe(layout.unpack(data), view)


def _entries(cmd: uapi.HwptInvalidate, view: View) -> str:
    viommu = view.kind(cmd.hwpt_id) == "viommu"
    layout = INVALIDATIONS.get((viommu, cmd.data_type))
    found: list[str] = []
    for index in range(min(cmd.entry_num, FEW)):
        text = _struct_at(layout, cmd.data_uptr + index * cmd.entry_len, cmd.entry_len, view)
        if not text:
            break
        found.append(text)
    return _list(found, more=cmd.entry_num > len(found)) if found else ""


def _ranges(addr: int, count: int, view: View) -> str:
    data = view.read(addr, min(count, FEW) * IOVA_RANGE)
    found = [uapi.IovaRange.unpack(data, at) for at in range(0, len(data) - IOVA_RANGE + 1, IOVA_RANGE)]
    texts = [f"{each.start:#x}..{each.last:#x}" for each in found]
    return _list(texts, more=count > len(texts)) if texts else ""


# ---- event queues ------------------------------------------------------------------------------------------


def records(kind: str, event_type: int, data: bytes, view: View, *, write: bool) -> list[str]:
    """What was read from or written to a queue: `kind` is "fault" or "veventq", with the type of its events."""
    if kind != "fault":
        return _few(_vevents(event_type, data, view))
    layout = uapi.HwptPageResponse if write else uapi.HwptPgfault
    places = range(0, len(data) - layout.SIZEOF + 1, layout.SIZEOF)
    return _few(describe(layout.unpack(data, at), view) for at in places)


def _vevents(event_type: int, data: bytes, view: View) -> Iterator[str]:
    layout, at, size = RECORDS.get(event_type), 0, uapi.IommufdVeventHeader.SIZEOF
    while len(data) - at >= size:
        header = uapi.IommufdVeventHeader.unpack(data, at)
        at += size
        text = describe(header, view)
        if header.flags & uapi.IOMMU_VEVENTQ_FLAG_LOST_EVENTS:
            yield text
        elif layout is None or len(data) - at < layout.SIZEOF:
            yield f"{text} {_raw(data[at : at + LONGEST], more=len(data) - at > LONGEST)}"
            return
        else:
            yield f"{text} {describe(layout.unpack(data, at), view)}"
            at += layout.SIZEOF


def _few(texts: Iterable[str]) -> list[str]:
    found: list[str] = []
    for text in texts:
        if len(found) == FEW:
            return [*found, "..."]
        found.append(text)
    return found


# ---- values ------------------------------------------------------------------------------------------------


def describe(obj: Layout, view: View) -> str:
    """{addr=0x1000, npages=1}: reserved fields only if they are not zero."""
    names = [name for name in obj.__struct_fields__ if _matters(obj, name)]
    return "{" + ", ".join(f"{name}={_text(obj, name, view)}" for name in names) + "}"


def _text(obj: Layout, name: str, view: View) -> str:
    value: Any = getattr(obj, name)
    if isinstance(obj, uapi.HwptArmSmmuv3 | uapi.ViommuArmSmmuv3Invalidate | uapi.VeventArmSmmuv3):
        return _bits(obj) or _compound(value, view)
    if not isinstance(value, int):
        return _compound(value, view)
    if (found := NAMES.get((type(obj), name))) is not None:
        return found.text(value)
    if name in IDS or (type(obj), name) == (uapi.Destroy, "id"):
        return _id(value, view)
    return hex(value) if name in HEX else _plain(value)


def _bits(obj: uapi.HwptArmSmmuv3 | uapi.ViommuArmSmmuv3Invalidate | uapi.VeventArmSmmuv3) -> str:
    """{TLBI_NH_VA asid=0x5 leaf addr=0x1000}: an STE, a command or an event; "" if it has bits without a name."""
    from .smmuv3 import Cmd, Event, Ste

    entry: Bitfield
    if isinstance(obj, uapi.HwptArmSmmuv3):
        words, entry = obj.ste, Ste.of(obj.ste)
    elif isinstance(obj, uapi.ViommuArmSmmuv3Invalidate):
        words, entry = obj.cmd, Cmd.decode(obj.pack())
    else:
        words, entry = obj.evt, Event.decode(obj.pack())
    named = all(not word & ~mask for word, mask in zip(words, entry.mask(), strict=False))
    return f"{{{str(entry).removeprefix('Ste ')}}}" if named else ""


def _compound(value: bytes | tuple[int, ...] | Layout, view: View) -> str:
    if isinstance(value, bytes):
        return _raw(value, more=False)
    if isinstance(value, tuple):
        return _list([hex(each) for each in value], more=False)
    return describe(value, view)


def _id(value: int, view: View) -> str:
    kind = view.kind(value)
    return f"{kind}:{value}" if kind else str(value)


def _plain(value: int) -> str:
    return str(value) if abs(value) < DECIMAL else hex(value)


def _raw(data: bytes, *, more: bool) -> str:
    return data[:LONGEST].hex(" ", 4) + ("..." if more or len(data) > LONGEST else "")


def _list(texts: list[str], *, more: bool) -> str:
    return f"[{', '.join([*texts, '...'] if more else texts)}]"


def _matters(obj: Layout, name: str) -> bool:
    """Not a reserved field, or one that should be 0 and is not."""
    value = getattr(obj, name)
    return name not in PADS or (any(value) if isinstance(value, bytes) else bool(value))

