"""Figures as a table for people, and as JSON for programs."""

from __future__ import annotations

import os
import platform
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from .measure import Aim, Bench, Figure, Plan, Unit

CELL = 26


def table(bench: Bench, figures: Sequence[Figure]) -> str:
    """Rows and columns as the cases came: median, least, and the ratio to the base."""
    columns = list(dict.fromkeys(figure.column for figure in figures))
    cells = {(figure.group, figure.row, figure.column): figure for figure in figures}
    rows = list(dict.fromkeys((figure.group, figure.row) for figure in figures))
    width = max(len(row) for _, row in rows) + 2
    best = "most" if bench.unit.rate else "least"
    lines = [f"{bench.name}: {bench.title}", f"  {bench.unit.name}: median ({best}) and, with x, {bench.ratio}", ""]
    if any(columns):
        lines.append("  " + " " * width + "".join(f"{column:>{CELL}}" for column in columns))
    group = ""
    for row_group, row in rows:
        if row_group != group:
            group = row_group
            lines.append(f"  {group}")
        shown = (_cell(cells.get((row_group, row, column)), bench.unit) for column in columns)
        lines.append((f"  {row:<{width}}" + "".join(shown)).rstrip())
    return "\n".join([*lines, *_aims(figures)])


def _cell(figure: Figure | None, unit: Unit) -> str:
    if figure is None:
        return " " * CELL
    ratio = _ratio(figure, unit)
    times = f" x{_number(ratio):<6}" if ratio is not None else " " * 8
    return f"{_number(unit.of(figure.median))} ({_number(unit.of(figure.best))}){times}".rjust(CELL)


def _ratio(figure: Figure, unit: Unit) -> float | None:
    """Of times as it is; of rates, how many times as many."""
    ratio = figure.ratio
    return 1 / ratio if ratio is not None and unit.rate else ratio


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _aims(figures: Iterable[Figure]) -> list[str]:
    """A line for each aim: whether it is met, and by which margin where that is least."""
    by_aim: dict[Aim, list[Figure]] = {}
    for figure in figures:
        if figure.aim is not None:
            by_aim.setdefault(figure.aim, []).append(figure)
    lines = [f"  {_verdict(aim, aimed)}" for aim, aimed in by_aim.items()]
    return ["", *lines] if lines else []


def _verdict(aim: Aim, figures: list[Figure]) -> str:
    """`aim x1.9 or less: met, x1.7 (C client, daemon, one CPU)`"""
    met = sum(_reached(aim, figure) <= 1 for figure in figures)
    worst = max(figures, key=lambda figure: _reached(aim, figure))
    where = ", ".join(filter(None, (worst.group, worst.row, worst.column)))
    verdict = "met," if met == len(figures) else "MISSED,"
    if len(figures) > 1:
        verdict += f" {met} of {len(figures)}, the worst"
    if aim.rate is not None:
        return f"aim {aim.rate:,.0f}/s or more: {verdict} {1 / worst.median:,.0f}/s ({where})"
    return f"aim x{aim.ratio:g} or less: {verdict} x{worst.ratio:.3g} ({where})"


def _reached(aim: Aim, figure: Figure) -> float:
    """How much more time than the aim: met up to 1."""
    if aim.rate is not None:
        return figure.median * aim.rate
    assert aim.ratio is not None
    assert figure.ratio is not None
    return figure.ratio / aim.ratio


def as_json(results: Iterable[tuple[Bench, Sequence[Figure]]], plan: Plan) -> dict[str, object]:
    """All of it; times in seconds for one operation."""
    return {
        "python": platform.python_version(),
        "kernel": platform.release(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "rounds": plan.rounds,
        "quick": plan.quick,
        "figures": [_as_json(bench, figure) for bench, figures in results for figure in figures],
    }


def _as_json(bench: Bench, figure: Figure) -> dict[str, object]:
    return {
        "bench": bench.name,
        "group": figure.group,
        "row": figure.row,
        "column": figure.column,
        "median": figure.median,
        "min": figure.best,
        "ratio": figure.ratio,
        "aim": figure.aim._asdict() if figure.aim is not None else None,
        "samples": figure.samples,
    }


def progress(text: str) -> None:
    """How far it is: on a terminal only, and gone when the text is empty."""
    if sys.stderr.isatty():
        width = os.get_terminal_size(sys.stderr.fileno()).columns - 1
        print(f"\r{text[:width]:{width}}\r", end="", file=sys.stderr, flush=True)
