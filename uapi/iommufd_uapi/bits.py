"""Room uapi, foundation (mirrors no header): how a structure of bit fields is declared, once per field.

A structure is a class whose fields say where they lie, in the words of the specification's table::

    @bitfield(words=8)
    class Cd(Bitfield):
        t0sz: Annotated[int, bits(0, 5, 0)] = 0
        ttb0: Annotated[int, address(1, 51, 4)] = 0
        ...

A type checker sees `int` fields. The one declaration serves `words()`, `of()` and printing, and a construct BitStruct
that layout.py derives from it, for `describe()`. An address stands in its word where it stands in memory: its field
holds the whole address, bits below the field cleared. construct is imported when it is asked for, and not before.
"""

import functools
import struct
from collections.abc import Callable, Iterable
from enum import IntEnum
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Self, TypeVar, get_args, get_type_hints

import msgspec

if TYPE_CHECKING:
    from .layout import BitStruct, Parsed

BytesLike = bytes | bytearray | memoryview


class Bits(NamedTuple):
    """Where a field lies."""

    word: int
    high: int
    low: int
    in_place: bool = False  #: an address: the value is not shifted
    names: type[IntEnum] | None = None  #: of its values, for people

    @property
    def mask(self) -> int:
        """The field's bits in its word."""
        return (2 << self.high) - (1 << self.low)


def bits(word: int, high: int, low: int, names: type[IntEnum] | None = None) -> Bits:
    """A number in bits high:low of a word."""
    return Bits(word, high, low, names=names)


def flag(word: int, bit: int) -> Bits:
    """One bit."""
    return Bits(word, bit, bit)


def address(word: int, high: int, low: int) -> Bits:
    """An address whose bits high:low stand in the same bits of the word."""
    return Bits(word, high, low, in_place=True)


class Bitfield(msgspec.Struct, gc=False):
    """Base of every structure of bit fields. All fields are zero when not given."""

    WORDS: ClassVar[int] = 0
    CODEC: ClassVar[struct.Struct]
    FIELDS: ClassVar[dict[str, Bits]] = {}
    SIZEOF: ClassVar[int] = 0
    PLACES: ClassVar[tuple[tuple[int, int, int], ...]] = ()  #: word, shift and mask after it, of each field

    @classmethod
    def of(cls, words: Iterable[int]) -> Self:
        """Read a structure from its words. Bits that no field names are left out, missing words are zero."""
        given = (*words, *(0,) * cls.WORDS)
        return cls(*[given[word] >> shift & mask for word, shift, mask in cls.PLACES])

    @classmethod
    def unpack(cls, data: BytesLike, offset: int = 0) -> Self:
        """Read a structure from its SIZEOF bytes; struct.error if there are fewer."""
        return cls.of(cls.CODEC.unpack_from(data, offset))

    def words(self) -> tuple[int, ...]:
        """The structure's words. ValueError if a value does not fit its field."""
        words = [0] * self.WORDS
        for name, value, (word, shift, mask) in zip(
            self.__struct_fields__, msgspec.structs.astuple(self), self.PLACES, strict=True
        ):
            if value & ~mask:
                place = self.FIELDS[name]
                where = f"word {place.word} bits {place.high}:{place.low}"
                raise ValueError(f"{type(self).__name__}.{name} = {value:#x} does not fit in {where}")
            words[word] |= value << shift
        return tuple(words)

    def pack(self) -> bytes:
        """The structure's SIZEOF bytes. ValueError if a value does not fit its field."""
        return self.CODEC.pack(*self.words())

    @classmethod
    def mask(cls, *names: str) -> tuple[int, ...]:
        """The bits of these fields, or of all, in each word: what `words & ~mask()` leaves is reserved."""
        words = [0] * cls.WORDS
        for name in names or cls.FIELDS:
            words[cls.FIELDS[name].word] |= cls.FIELDS[name].mask
        return tuple(words)

    @classmethod
    def bit_struct(cls) -> "BitStruct":
        """The same layout as construct has it: slow, and prints well."""
        return _derived(cls)

    @classmethod
    def describe(cls, data: BytesLike) -> "Parsed":
        """Read a structure with construct, word by word."""
        container: Parsed = cls.bit_struct().parse(bytes(data))
        return container

    def __str__(self) -> str:
        """The fields that are not zero: ``Cd t0sz=16 v ttb0=0x40000000``."""
        return " ".join([type(self).__name__, *self.shown()])

    def shown(self, but: Iterable[str] = ()) -> list[str]:
        """``name=value`` of every field that is not zero; flags without the value."""
        values = zip(self.FIELDS.items(), msgspec.structs.astuple(self), strict=True)
        return [_shown(name, place, value) for (name, place), value in values if value and name not in but]


@functools.cache
def _derived(cls: type[Bitfield]) -> "BitStruct":
    from .layout import bit_struct  # the one file that knows construct

    return bit_struct(cls.FIELDS, cls.WORDS, 8 * cls.SIZEOF // cls.WORDS)


B = TypeVar("B", bound=Bitfield)


def bitfield(*, words: int, width: int = 64) -> Callable[[type[B]], type[B]]:
    """Class decorator: a structure of little-endian words of `width` bits."""

    def decorate(cls: type[B]) -> type[B]:
        hints = get_type_hints(cls, include_extras=True)
        cls.FIELDS = {name: _bits(hints[name]) for name in cls.__struct_fields__}
        cls.PLACES = tuple(
            (place.word, 0, place.mask) if place.in_place else (place.word, place.low, place.mask >> place.low)
            for place in cls.FIELDS.values()
        )
        cls.WORDS = words
        cls.CODEC = struct.Struct(f"<{words}{'Q' if width == 64 else 'I'}")
        cls.SIZEOF = cls.CODEC.size
        return cls

    return decorate


def _bits(annotation: object) -> Bits:
    return next(fact for fact in get_args(annotation)[1:] if isinstance(fact, Bits))


def _shown(name: str, place: Bits, value: int) -> str:
    name = name.rstrip("_")
    if place.names is not None and value in set(place.names):
        return f"{name}={place.names(value).name}"
    if place.high == place.low:
        return name
    return f"{name}={value:#x}" if place.in_place or place.high - place.low >= 15 else f"{name}={value}"
