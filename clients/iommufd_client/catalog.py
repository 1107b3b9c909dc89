"""Room client: `iommufdctl ioctls`, what iommufd_uapi knows of each ioctl, as a table for people."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from iommufd_uapi import iommufd as uapi
from iommufd_uapi.iommufd_test import TEST_OPS, TestCmd
from iommufd_uapi.layout import Direction

from .show import BOLD, CYAN, DIM

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from iommufd_uapi.layout import Fd, Pointer

    from .show import Paint


class Entry(NamedTuple):
    """One ioctl, or one operation of IOMMU_TEST_CMD."""

    name: str
    number: str  #: hexadecimal
    struct: str
    size: int
    min_size: int
    pointers: list[dict[str, str | int]]  #: field, offset, direction, bytes (a rule)
    fds: list[dict[str, str | int]]  #: field, offset, direction


def entries() -> Iterator[Entry]:
    """All ioctls in the order of their numbers, then the operations of the test command."""
    for struct in uapi.IOCTLS:
        yield Entry(
            struct.MACRO,
            f"{struct.CMD:#x}",
            struct.C_NAME,
            struct.SIZEOF,
            struct.MIN_SIZE,
            _pointers(struct.POINTERS),
            _fds(struct.FDS),
        )
    for number, op in TEST_OPS.items():
        yield Entry(
            op.name,
            f"{TestCmd.CMD:#x}/{number}",
            TestCmd.C_NAME,
            TestCmd.SIZEOF,
            TestCmd.MIN_SIZE,
            _pointers(op.pointers()),
            _fds(op.fds()) + ([{"field": "result", "direction": "out"}] if op.returns_fd else []),
        )


def _pointers(found: Sequence[Pointer]) -> list[dict[str, str | int]]:
    return [
        {
            "field": pointer.name,
            "offset": pointer.offset,
            "direction": pointer.direction.value,
            "bytes": str(pointer.rule),
        }
        for pointer in found
    ]


def _fds(found: Sequence[Fd]) -> list[dict[str, str | int]]:
    return [{"field": fd.name, "offset": fd.offset, "direction": fd.direction.value} for fd in found]


def text(found: Iterable[Entry], paint: Paint) -> str:
    """One ioctl a line, each pointer and descriptor on a line below it."""
    return "\n".join(line for entry in found for line in _lines(entry, paint))


def _lines(entry: Entry, paint: Paint) -> Iterator[str]:
    size = f"{entry.size}" if entry.size == entry.min_size else f"{entry.size}/{entry.min_size}"
    yield f"{entry.number:>9}  {paint(entry.name, BOLD)}  struct {entry.struct}  {size} bytes"
    for pointer in entry.pointers:
        way = pointer["direction"]
        meaning = "pinned or compared" if way == Direction.ADDRESS.value else f"{way}, {pointer['bytes']} bytes"
        yield f"{'':11}{paint('*' + str(pointer['field']), CYAN)}  {paint(meaning, DIM)}"
    for fd in entry.fds:
        yield f"{'':11}{paint(str(fd['field']), CYAN)}  {paint('descriptor ' + str(fd['direction']), DIM)}"
