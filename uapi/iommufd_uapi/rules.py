"""Room uapi, foundation (mirrors no header): which memory and which fds a struct's fields refer to, as data.

An ioctl struct holds pointers and fd numbers. Both mean something only in the caller's process, so whoever
carries the call over a socket must know how many bytes stand behind each pointer, and in which direction the
kernel moves them. The facts hang on the fields::

    data_uptr: Annotated[u64, In(Field("data_len"))] = 0
    out_fault_fd: Annotated[u32, FdOut()] = 0

A rule is total: for any field values it gives a number of bytes, never negative, and never raises. The number
is what the kernel can touch *at most*; where the kernel refuses a request before it touches the memory, the
rule gives 0.
"""

import enum
from typing import ClassVar

import msgspec

U64_MAX = (1 << 64) - 1


class Direction(enum.Enum):
    """What a call does with the memory behind a pointer."""

    IN = "in"  #: the kernel reads it within the call
    OUT = "out"  #: the kernel writes it within the call
    INOUT = "inout"  #: both
    ADDRESS = "address"  #: neither; the address itself is the argument (memory that is pinned or compared)


# ---- how many bytes ------------------------------------------------------------------------------


class Rule(msgspec.Struct, frozen=True):
    """Number of bytes, computed from the fields of a struct."""

    def bytes(self, obj: object) -> int:
        """Bytes for this struct: at least 0, for any field values."""
        raise NotImplementedError

    def upto(self, limit: int) -> "Rule":
        """The same rule where the kernel refuses more than `limit`: then it touches nothing."""
        return UpTo(self, limit)


class Field(Rule, frozen=True):
    """The value of a field."""

    name: str

    def bytes(self, obj: object) -> int:
        value: int = getattr(obj, self.name)
        return max(0, value)

    def __str__(self) -> str:
        return self.name


class Const(Rule, frozen=True):
    """A fixed number."""

    value: int

    def bytes(self, obj: object) -> int:
        return self.value

    def __str__(self) -> str:
        return str(self.value)


class Times(Rule, frozen=True):
    """Product of two rules, not wrapped at 64 bits."""

    left: Rule
    right: Rule

    def bytes(self, obj: object) -> int:
        return self.left.bytes(obj) * self.right.bytes(obj)

    def __str__(self) -> str:
        return f"{_operand(self.left)} * {_operand(self.right)}"


class Minus(Rule, frozen=True):
    """Difference of two rules, 0 where it would be negative."""

    left: Rule
    right: Rule

    def bytes(self, obj: object) -> int:
        return max(self.left.bytes(obj) - self.right.bytes(obj), 0)

    def __str__(self) -> str:
        return f"max({self.left} - {_operand(self.right)}, 0)"


class UpTo(Rule, frozen=True):
    """A rule whose values beyond a limit the kernel refuses, without touching the memory."""

    rule: Rule
    limit: int

    def bytes(self, obj: object) -> int:
        value = self.rule.bytes(obj)
        return value if value <= self.limit else 0

    def __str__(self) -> str:
        return f"{_operand(self.rule)} <= {self.limit} ? {self.rule} : 0"


class Select(Rule, frozen=True):
    """One of two rules, by a flag."""

    flags: str
    mask: int
    then: Rule
    otherwise: Rule

    def bytes(self, obj: object) -> int:
        return (self.then if getattr(obj, self.flags) & self.mask else self.otherwise).bytes(obj)

    def __str__(self) -> str:
        return f"{self.flags} & {self.mask:#x} ? {self.then} : {self.otherwise}"


class BitmapBytes(Rule, frozen=True):
    """One bit per page: DIV_ROUND_UP(length / page_size, 8), and 0 for page size 0 (refused)."""

    length: str
    page_size: str

    def bytes(self, obj: object) -> int:
        length, page_size = getattr(obj, self.length), getattr(obj, self.page_size)
        if page_size <= 0 or length <= 0:
            return 0
        return int((-(-length // page_size) + 7) // 8)

    def __str__(self) -> str:
        return f"{self.page_size} ? DIV_ROUND_UP({self.length} / {self.page_size}, 8) : 0"


class IovaBitmapBytes(Rule, frozen=True):
    """struct iova_bitmap (iova_bitmap.c): what IOMMU_HWPT_GET_DIRTY_BITMAP can touch of the bitmap.

    Only the lowest set bit of the page size counts (`__ffs()`), and `length - 1` is computed in 64 bits: a
    length of 0 at IOVA 0 is the whole address space. A range beyond 64 bits is refused.
    """

    iova: str
    length: str
    page_size: str

    def bytes(self, obj: object) -> int:
        iova, page_size = getattr(obj, self.iova), getattr(obj, self.page_size)
        last = (getattr(obj, self.length) - 1) & U64_MAX
        if page_size <= 0 or not 0 <= iova <= U64_MAX - last:
            return 0
        return int(last // (page_size & -page_size) // 8 + 1)

    def __str__(self) -> str:
        return f"{self.page_size} ? (({self.length} - 1) >> __ffs({self.page_size})) / 8 + 1 : 0"


class Masked(Rule, frozen=True):
    """A rule that counts only if `field & mask == value`, and is 0 otherwise."""

    field: str
    mask: int
    value: int
    rule: Rule = Const(1)

    def bytes(self, obj: object) -> int:
        return self.rule.bytes(obj) if getattr(obj, self.field) & self.mask == self.value else 0

    def __str__(self) -> str:
        return f"({self.field} & {self.mask:#x}) == {self.value:#x} ? {self.rule} : 0"


def _operand(rule: Rule) -> str:
    return str(rule) if isinstance(rule, Field | Const) else f"({rule})"


# ---- what a pointer field points to --------------------------------------------------------------


class Access(msgspec.Struct, frozen=True):
    """The memory behind a pointer field: how much, and which way it goes."""

    rule: Rule
    direction: ClassVar[Direction]

    def direction_of(self, obj: object) -> Direction:
        """Direction for these field values."""
        return self.direction


class In(Access, frozen=True):
    """The kernel reads this memory within the call."""

    direction = Direction.IN


class Out(Access, frozen=True):
    """The kernel writes this memory within the call."""

    direction = Direction.OUT


class InOut(Access, frozen=True):
    """The kernel reads and writes this memory within the call."""

    direction = Direction.INOUT


class Address(Access, frozen=True):
    """The call keeps or compares the address; its bytes are not copied."""

    direction = Direction.ADDRESS


class When(msgspec.Struct, frozen=True):
    """A flag decides: `flags & mask` gives the first access, otherwise the second."""

    flags: str
    mask: int
    then: Access
    otherwise: Access

    direction: ClassVar[Direction] = Direction.INOUT

    @property
    def rule(self) -> Rule:
        return Select(self.flags, self.mask, self.then.rule, self.otherwise.rule)

    def direction_of(self, obj: object) -> Direction:
        chosen = self.then if getattr(obj, self.flags) & self.mask else self.otherwise
        return chosen.direction


class FdIn(msgspec.Struct, frozen=True):
    """The caller passes an fd of its own."""

    direction: ClassVar[Direction] = Direction.IN


class FdOut(msgspec.Struct, frozen=True):
    """The kernel puts a new fd into the caller's table."""

    direction: ClassVar[Direction] = Direction.OUT


# ---- the same facts, found on a layout -----------------------------------------------------------


class Pointer(msgspec.Struct, frozen=True):
    """A pointer field of a layout. `direction` is INOUT where a flag decides; ask `direction_of(obj)`."""

    name: str
    offset: int
    direction: Direction
    rule: Rule
    access: Access | When

    def bytes(self, obj: object) -> int:
        """Bytes behind the pointer, at most."""
        return self.rule.bytes(obj)

    def direction_of(self, obj: object) -> Direction:
        """Direction for these field values."""
        return self.access.direction_of(obj)


class Fd(msgspec.Struct, frozen=True):
    """An fd field of a layout."""

    name: str
    offset: int
    direction: Direction


class Tail(msgspec.Struct, frozen=True):
    """What follows the fixed part: a C flexible array, or the capabilities behind an argsz struct."""

    name: str
    rule: Rule
    fds: Rule = Const(0)  #: so many bytes at its start are s32 fd numbers of the caller
