"""Room uapi, foundation (mirrors no header): how a C struct is declared. Only this file knows construct.

A struct is a class whose annotations are its C types, in the header's order::

    @ioctl(0x89, last="reserved")
    class HwptAlloc(Ioctl):
        \"""struct iommu_hwpt_alloc\"""

        size: u32 = 0
        flags: u32 = 0
        ...

A type checker sees `int` fields. The decorator sees construct's `Int32ul`, builds a `construct.Struct` with
the padding of the C ABI (natural alignment, little-endian) written out, and derives a `struct.Struct` from
it: the same bytes, a hundred times faster. construct itself serves `describe()`, for people.
"""

import inspect
import struct
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self, TypeAlias, TypeVar, cast, get_args

import construct
import msgspec

from .rules import (
    Access,
    Address,
    BitmapBytes,
    Const,
    Direction,
    Fd,
    FdIn,
    FdOut,
    Field,
    In,
    InOut,
    IovaBitmapBytes,
    Masked,
    Minus,
    Out,
    Pointer,
    Rule,
    Select,
    Tail,
    Times,
    UpTo,
    When,
)

if TYPE_CHECKING:
    from .bits import Bits

__all__ = [
    "u8", "u16", "u32", "u64", "s32", "s64", "array", "raw",
    "Layout", "Ioctl", "VfioIoctl", "Member", "layout", "ioctl", "vfio_ioctl",
    "Access", "Address", "BitmapBytes", "Const", "Direction", "Fd", "FdIn", "FdOut", "Field", "In", "InOut",
    "IovaBitmapBytes", "Masked", "Minus", "Out", "Pointer", "Rule", "Select", "Tail", "Times", "UpTo", "When",
]  # fmt: skip

u8 = Annotated[int, construct.Int8ul]
u16 = Annotated[int, construct.Int16ul]
u32 = Annotated[int, construct.Int32ul]
u64 = Annotated[int, construct.Int64ul]
s32 = Annotated[int, construct.Int32sl]
s64 = Annotated[int, construct.Int64sl]

IOC_TYPE = ord(";") << 8  #: both headers use `_IO(';', nr)`: no size and no direction in the number

BytesLike = bytes | bytearray | memoryview
Codec: TypeAlias = "construct.Construct[Any, Any]"
BitStruct: TypeAlias = "construct.Struct"
Parsed: TypeAlias = "construct.Container[Any]"  #: what it reads


def array(ctype: object, count: int) -> Codec:
    """C array of `count` integers: ``Annotated[tuple[int, ...], array(u64, 2)]``."""
    return construct.Array(count, _codec(ctype))


def raw(size: int, align: int = 1) -> Codec:
    """Bytes as they are: ``Annotated[bytes, raw(3)]``. Packing pads a shorter value with zeros."""
    return construct.Aligned(align, construct.Bytes(size)) if align > 1 else construct.Bytes(size)


class Member(msgspec.Struct, frozen=True):
    """One field of a layout and where it lies."""

    name: str
    offset: int
    size: int
    align: int
    format: str  #: struct module characters
    codec: Codec
    facts: tuple[Any, ...]  #: In, Out, FdIn, ...
    nested: "type[Layout] | None"  #: a struct within the struct


class Layout(msgspec.Struct, gc=False, eq=True):
    """Base of every struct of the uAPI."""

    C_NAME: ClassVar[str] = ""  #: "iommu_ioas_map"
    SIZEOF: ClassVar[int] = 0
    ALIGNOF: ClassVar[int] = 1
    FORMAT: ClassVar[str] = ""  #: for the struct module
    MEMBERS: ClassVar[dict[str, Member]] = {}
    POINTERS: ClassVar[tuple[Pointer, ...]] = ()
    FDS: ClassVar[tuple[Fd, ...]] = ()
    TAIL: ClassVar[Tail | None] = None
    CONSTRUCT: ClassVar["construct.Struct"]

    # The decorator replaces these three with functions made for the class.

    @classmethod
    def unpack(cls, data: BytesLike, offset: int = 0) -> Self:
        """Read a struct; struct.error if fewer than SIZEOF bytes are there."""
        raise NotImplementedError(f"{cls.__name__} lacks its decorator")

    def pack(self) -> bytes:
        """The struct's SIZEOF bytes, padding zero; struct.error if a value does not fit its field."""
        raise NotImplementedError(f"{type(self).__name__} lacks its decorator")

    def update(self, data: BytesLike) -> None:
        """Set every field from bytes: what an ioctl left in the caller's struct."""
        raise NotImplementedError(f"{type(self).__name__} lacks its decorator")

    @classmethod
    def describe(cls, data: BytesLike) -> "construct.Container[Any]":
        """Read a struct with construct: slow, and prints well."""
        container: construct.Container[Any] = cls.CONSTRUCT.parse(bytes(data))
        return container

    @classmethod
    def offsetof(cls, field: str) -> int:
        """C's offsetof()."""
        return cls.MEMBERS[field].offset

    @classmethod
    def sizeof(cls, field: str) -> int:
        """C's sizeof() of one field."""
        return cls.MEMBERS[field].size


class Ioctl(Layout, gc=False):
    """Base of every struct that /dev/iommu takes: the caller says in `size` how much of it there is."""

    NR: ClassVar[int] = 0  #: 0x85
    CMD: ClassVar[int] = 0  #: 0x3b85
    MIN_SIZE: ClassVar[int] = 0  #: a shorter struct is refused
    MACRO: ClassVar[str] = ""  #: "IOMMU_IOAS_MAP"

    size: u32 = 0


class VfioIoctl(Layout, gc=False):
    """Base of every struct that a VFIO fd takes: `argsz` covers the struct and what follows it."""

    NR: ClassVar[int] = 0
    CMD: ClassVar[int] = 0
    MIN_SIZE: ClassVar[int] = 0
    MACRO: ClassVar[str] = ""
    RETURNS_FD: ClassVar[Masked | None] = None  #: when the ioctl's result is an fd

    argsz: u32 = 0


L = TypeVar("L", bound=Layout)
N = TypeVar("N", bound="Ioctl | VfioIoctl")  # a layout with a number


def layout(cls: type[L]) -> type[L]:
    """Class decorator: a struct that is not an ioctl's argument."""
    members = list(_place(_annotations(cls)))
    _lay_out(cls, members)
    return cls


def ioctl(nr: int, last: str, macro: str = "") -> Callable[[type[N]], type[N]]:
    """Class decorator: the argument of iommufd's ioctl `nr`; `last` is its last mandatory field."""

    def decorate(cls: type[N]) -> type[N]:
        return _lay_out_ioctl(cls, nr, last, macro, "size")

    return decorate


def vfio_ioctl(nr: int, last: str, macro: str) -> Callable[[type[N]], type[N]]:
    """Class decorator: the argument of VFIO's ioctl `nr`; `last` is its last mandatory field."""

    def decorate(cls: type[N]) -> type[N]:
        return _lay_out_ioctl(cls, nr, last, macro, "argsz")

    return decorate


# ---- from annotations to places ------------------------------------------------------------------


def _annotations(cls: type[Layout]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for base in reversed(cls.__mro__[:-1]):
        if issubclass(base, Layout) and base is not Layout:
            found |= inspect.get_annotations(base)
    return {name: found[name] for name in cls.__struct_fields__}


def _codec(annotation: object) -> Codec:
    """The construct object of ``Annotated[int, <construct object>, ...]``, or of a nested layout."""
    if isinstance(annotation, type) and issubclass(annotation, Layout):
        return annotation.CONSTRUCT
    return next(fact for fact in get_args(annotation)[1:] if isinstance(fact, construct.Construct))


def _format(codec: Codec) -> tuple[str, int]:
    """struct module characters and alignment of a construct object."""
    if isinstance(codec, construct.FormatField):
        return codec.fmtstr[1:], codec.sizeof()
    if isinstance(codec, construct.Array):
        char, align = _format(codec.subcon)
        return f"{codec.count}{char}", align
    if isinstance(codec, construct.Aligned):
        return _format(codec.subcon)[0], cast("int", codec.modulus)
    if isinstance(codec, construct.Bytes):
        return f"{codec.length}s", 1
    raise TypeError(f"no C type: {codec!r}")


def _place(annotations: dict[str, Any]) -> Iterable[Member]:
    """The fields at their natural alignment."""
    end = 0
    for name, annotation in annotations.items():
        codec = _codec(annotation)
        nested: type[Layout] | None = annotation if isinstance(annotation, type) else None
        text, align = (nested.FORMAT, nested.ALIGNOF) if nested else _format(codec)
        offset = -(-end // align) * align
        size = codec.sizeof()
        yield Member(name, offset, size, align, text, codec, get_args(annotation)[1:], nested)
        end = offset + size


def _with_padding(members: list[Member]) -> tuple[str, list[Codec], int]:
    """Format and construct members with each gap filled, and the alignment of the whole."""
    subcons: list[Codec] = []
    text, end = "", 0
    align = max(member.align for member in members)
    for member in members:
        if gap := member.offset - end:
            text, subcons = f"{text}{gap}x", [*subcons, construct.Padding(gap)]
        text, subcons = text + member.format, [*subcons, member.name / member.codec]
        end = member.offset + member.size
    if gap := -end % align:
        text, subcons = f"{text}{gap}x", [*subcons, construct.Padding(gap)]
    return text, subcons, align


# ---- from places to a class ----------------------------------------------------------------------


def _lay_out(cls: type[Layout], members: list[Member]) -> None:
    text, subcons, align = _with_padding(members)
    codec = struct.Struct("<" + text)
    cls.C_NAME = (cls.__doc__ or cls.__name__).splitlines()[0].removeprefix("struct ")
    cls.MEMBERS = {member.name: member for member in members}
    cls.SIZEOF, cls.ALIGNOF, cls.FORMAT = codec.size, align, text
    cls.CONSTRUCT = construct.Struct(*subcons)
    cls.POINTERS = tuple(_pointers(members))
    cls.FDS = tuple(_fds(members))
    assert codec.size == cls.CONSTRUCT.sizeof(), cls
    for name, function in _functions(cls, codec, members).items():
        setattr(cls, name, function)


def _lay_out_ioctl(cls: type[N], nr: int, last: str, macro: str, first: str) -> type[N]:
    members = list(_place(_annotations(cls)))
    assert members[0].name == first, f"{cls.__name__} does not start with {first}"
    size = struct.calcsize("<" + _with_padding(members)[0])
    sized = _with_default(cls, first, size)
    _lay_out(sized, members)
    sized.NR, sized.CMD = nr, IOC_TYPE | nr
    sized.MACRO = macro or sized.C_NAME.upper()
    sized.MIN_SIZE = sized.offsetof(last) + sized.sizeof(last)
    return sized


def _with_default(cls: type[N], field: str, default: int) -> type[N]:
    """The same class once more with another default: msgspec fixes defaults when it makes a class."""
    defaults = dict(zip(cls.__struct_fields__, cls.__struct_defaults__, strict=True)) | {field: default}
    every_class_has = {name for name in vars(Ioctl) if name.startswith("__")}
    own = {name: value for name, value in vars(cls).items() if name not in {*defaults, *every_class_has}}
    made = msgspec.defstruct(
        cls.__name__,
        [(name, annotation, defaults[name]) for name, annotation in _annotations(cls).items()],
        bases=cls.__bases__,
        module=cls.__module__,
        namespace={"__doc__": cls.__doc__, **own},
        gc=False,
    )
    return cast("type[N]", made)


def _pointers(members: list[Member]) -> Iterable[Pointer]:
    for member in members:
        for fact in member.facts:
            if isinstance(fact, Access | When):
                yield Pointer(member.name, member.offset, fact.direction, fact.rule, fact)


def _fds(members: list[Member]) -> Iterable[Fd]:
    for member in members:
        for fact in member.facts:
            if isinstance(fact, FdIn | FdOut):
                yield Fd(member.name, member.offset, fact.direction)


# ---- structures of bit fields (bits.py) -----------------------------------------------------------


def bit_struct(places: "Mapping[str, Bits]", words: int, width: int) -> BitStruct:
    """A structure of little-endian words, each a BitStruct from its highest bit down; names as the class has them."""
    return construct.Struct(*(
        f"word{word}" / construct.ByteSwapped(construct.BitStruct(*_bit_fields(places, word, width)))
        for word in range(words)
    ))  # fmt: skip


def _bit_fields(places: "Mapping[str, Bits]", word: int, width: int) -> Iterable[Codec]:
    """The fields of one word with each gap filled."""
    end = width
    for name, place in sorted(places.items(), key=lambda item: -item[1].high):
        if place.word != word:
            continue
        if gap := end - place.high - 1:
            yield construct.Padding(gap)
        yield name / _bit_field(place)
        end = place.low
    if end:
        yield construct.Padding(end)


def _bit_field(place: "Bits") -> Codec:
    """A number, a named value, or an address, whose bits stand where they mean something."""
    number: Codec = construct.BitsInteger(place.high - place.low + 1)
    if place.names is not None:
        return construct.Enum(number, place.names)
    if place.in_place:
        return construct.ExprAdapter(number, lambda value, _: value << place.low, lambda value, _: value >> place.low)
    return number


# ---- the fast codec ------------------------------------------------------------------------------


def _functions(cls: type[L], codec: struct.Struct, members: list[Member]) -> dict[str, Any]:
    """unpack, pack and update of one class."""
    plain = all(member.nested is None and not isinstance(member.codec, construct.Array) for member in members)
    read = codec.unpack_from if plain else _grouping_reader(codec, members)
    names = cls.__struct_fields__
    pack_values = codec.pack
    astuple = msgspec.structs.astuple

    def unpack(data: BytesLike, offset: int = 0) -> L:
        return cls(*read(data, offset))

    def pack(self: L) -> bytes:
        return pack_values(*astuple(self))

    def pack_groups(self: L) -> bytes:
        return pack_values(*_flat(astuple(self)))

    def update(self: L, data: BytesLike) -> None:
        for name, value in zip(names, read(data, 0), strict=True):
            setattr(self, name, value)

    return {"unpack": staticmethod(unpack), "pack": pack if plain else pack_groups, "update": update}


def _grouping_reader(codec: struct.Struct, members: list[Member]) -> Callable[..., list[Any]]:
    """unpack_from() for a struct with arrays or structs in it: several of struct's values make one field."""
    groups: list[tuple[int, int, Callable[[Any], Any] | None]] = []
    start = 0
    for member in members:
        stop = start + len(struct.unpack("<" + member.format, bytes(member.size)))
        groups.append((start, stop, _maker(member)))
        start = stop

    def read(data: BytesLike, offset: int = 0) -> list[Any]:
        flat = codec.unpack_from(data, offset)
        return [flat[i] if make is None else make(flat[i:j]) for i, j, make in groups]

    return read


def _maker(member: Member) -> Callable[[Any], Any] | None:
    """What turns struct's values into the value of a field."""
    if member.nested is not None:
        nested = member.nested
        return lambda values: nested(*values)
    return tuple if isinstance(member.codec, construct.Array) else None


def _flat(values: Iterable[Any]) -> Iterable[Any]:
    for value in values:
        if isinstance(value, tuple):
            yield from value
        elif isinstance(value, Layout):
            yield from msgspec.structs.astuple(value)
        else:
            yield value
