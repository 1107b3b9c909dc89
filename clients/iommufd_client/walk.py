"""Room client: `iommufdctl walk`, a translation level by level, for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .show import BOLD, CYAN, DIM, GREEN, RED, YELLOW

if TYPE_CHECKING:
    from collections.abc import Iterator

    from iommufd_uapi.admin import Area, Row, Walked

    from .show import Paint


def render(walked: Walked, asked: str, paint: Paint) -> str:
    """The walk, its result, and what is cached, aligned; without a newline at the end."""
    rows = [*walked.rows, *walked.cached]
    widths = max(len(_what(row)) for row in rows), max(len(_address(row)) for row in rows)
    lines = [f"{paint(walked.device, BOLD)}  {asked}  ({walked.model})"]
    lines += [line for row in walked.rows for line in _lines(row, widths, paint)]
    if walked.fault is not None:
        lines.append(paint(walked.fault.text, RED))
    else:
        lines.append(paint(f"translates {walked.first:#x}..{walked.last:#x} {walked.rights}", GREEN))
    lines.append(paint("cached", BOLD) if walked.cached else f"{paint('cached', BOLD)}  nothing")
    lines += [line for row in walked.cached for line in _lines(row, widths, paint)]
    return "\n".join(lines)


def _what(row: Row) -> str:
    return "  " * (row.depth + 1) + row.what


def _address(row: Row) -> str:
    return "" if row.address is None else f"{row.address:#x}"


def _lines(row: Row, widths: tuple[int, int], paint: Paint) -> Iterator[str]:
    entry = " ".join(f"{word:#018x}" for word in row.words)
    bits, leads = (row.bits, row.leads) if row.area is None else _area(row.area)
    parts = [paint(f"{_what(row):<{widths[0]}}", CYAN), f"{_address(row):>{widths[1]}}"]
    if len(row.words) == 1:
        parts.append(paint(entry, DIM))
    parts.append(f"{bits}  -> {leads}" if leads else bits)
    yield "  ".join(parts).rstrip()
    margin = " " * (sum(widths) + 4)
    if len(row.words) > 1:
        yield margin + paint(entry, DIM)
    if row.differs:
        yield margin + paint(f"differs from {row.differs}", YELLOW)


def _area(area: Area) -> tuple[str, str]:
    rights = ("r" if area.readable else "-") + ("w" if area.writable else "-")
    return f"ioas {area.ioas} {area.first:#x}..{area.last:#x} {rights}", f"{area.file} + {area.offset:#x}"
