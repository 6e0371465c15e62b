"""The table as text, ratios first, and all figures as JSON."""

from __future__ import annotations

import dataclasses
import json
import statistics
import textwrap
from collections.abc import Iterable, Mapping

from tests.bench.rows import Growth, Row

_WIDTH = 150


def number(value: float) -> str:
    """``value`` with three digits that count."""
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 0.001 else f"{value:.1e}"


def spread(values: list[float], unit: str = "") -> str:
    """The median, and what it lies between."""
    if not values:
        return "-"
    median = number(statistics.median(values)) + (f" {unit}" if unit else "")
    return median if len(values) == 1 else f"{median} [{number(min(values))} .. {number(max(values))}]"


def verdict(row: Row) -> str:
    """Whether the target was reached, or by how much not."""
    if row.missing:
        return row.missing
    if row.target is None or row.figure is None:
        return ""
    if row.met:
        return "met"
    if row.target.bound == 0:
        return "MISSED"
    beyond = row.figure / row.target.bound if row.target.sense == "at most" else row.target.bound / row.figure
    return f"MISSED by {beyond:.2f} x"


def target(row: Row) -> str:
    if row.target is None:
        return ""
    sense = "<=" if row.target.sense == "at most" else ">="
    return f"{sense} {number(row.target.bound)} {row.unit if row.target.absolute else 'x'}"


def lines(results: Mapping[str, Iterable[Row]]) -> Iterable[str]:
    """The table, a few lines a row."""
    indent = " " * 8
    yield f"{'ratio':<30} {'target':>11}  {'reached?':17} what, against what"
    for name, rows in results.items():
        yield f"-- {name} ".ljust(_WIDTH, "-")
        said = ""
        for row in rows:
            ratio = f"{spread(row.ratios)} x" if row.ratios else ""
            against = f" / {row.against}" if row.against else ""
            yield f"{ratio:<30} {target(row):>11}  {verdict(row):17} {row.what}{against}"
            if row.ours:
                theirs = f", the other {spread(row.theirs, row.unit)}" if row.theirs else ""
                yield f"{indent}snapfs {spread(row.ours, row.unit)}{theirs}"
            if row.note and row.note != said:
                yield from textwrap.wrap(row.note, _WIDTH, initial_indent=indent, subsequent_indent=indent)
            said = row.note


def markdown(results: Mapping[str, Iterable[Row]]) -> Iterable[str]:
    """The table for a README."""
    yield "| measured | against | ratio | target | | snapfs | the other |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for rows in results.values():
        for row in rows:
            cells = (
                row.what,
                row.against,
                f"{spread(row.ratios)} ×" if row.ratios else "",
                target(row).replace("<=", "≤").replace(">=", "≥").replace(" x", " ×"),
                verdict(row).replace(" x", " ×"),
                spread(row.ours, row.unit),
                spread(row.theirs, row.unit) if row.theirs else "",
            )
            yield f"| {' | '.join(cells)} |"


def as_json(results: Mapping[str, Iterable[Row]], growths: Iterable[Growth], about: Mapping[str, object]) -> str:
    """All figures, round by round, in each row's unit."""
    shown = {
        name: [
            {**dataclasses.asdict(row), "ratios": row.ratios, "figure": row.figure, "met": row.met, "verdict": verdict(row)}
            for row in rows
        ]
        for name, rows in results.items()
    }
    plotted = [dataclasses.asdict(growth) for growth in growths]
    return json.dumps({**about, "results": shown, "growth": plotted}, indent=1) + "\n"
