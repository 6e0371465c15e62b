"""Plots as self-contained SVG: both axes logarithmic, readable on white and on dark pages."""

from __future__ import annotations

import math
from collections.abc import Iterator
from html import escape

from tests.bench.rows import Curve, Growth

_WIDTH, _HEIGHT = 720, 440
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 24, 76, 52

_COLOURS = ("#2f81f7", "#e0702a", "#2ea043", "#a371f7", "#d6409f")
_MARKS = ("circle", "square", "diamond", "triangle", "circle")  # for who can't tell the colours apart

# No background: the page's shows through.  Where a viewer knows no colour schemes, this grey can be read on white and on black.
_STYLE = """
text { font: 13px system-ui, -apple-system, "Segoe UI", "DejaVu Sans", Helvetica, Arial, sans-serif; fill: #6e7781 }
.title { font-size: 16px; font-weight: 600 }
.grid { stroke: #808080; stroke-opacity: .25 } .axis { stroke: #808080 }
.curve { fill: none; stroke-width: 2 }
@media (prefers-color-scheme: light) { text { fill: #424a53 } .title { fill: #1f2328 } }
@media (prefers-color-scheme: dark) { text { fill: #adbac7 } .title { fill: #e6edf3 } }
"""


class _Axis:
    """A logarithmic axis over ``values``, drawn from pixel ``begin`` to ``end``; at least one decade."""

    def __init__(self, values: list[float], begin: float, end: float, *, snug: bool) -> None:
        low, high = min(values), max(values)
        if snug:
            self.low, self.high = math.log10(low) - 0.08, math.log10(high) + 0.08
        else:
            self.low, self.high = math.log10(_step(low, down=True)), math.log10(_step(high, down=False))
            middle = (self.low + self.high) / 2
            if self.high - self.low < 1:
                self.low = math.log10(_step(10 ** (middle - 0.5), down=True))
                self.high = math.log10(_step(10 ** (middle + 0.5), down=False))
        self._begin, self._end = begin, end

    def at(self, value: float) -> float:
        share = (math.log10(value) - self.low) / (self.high - self.low)
        return self._begin + share * (self._end - self._begin)

    def ticks(self) -> Iterator[float]:
        steps = (1, 2, 5) if self.high - self.low < 2.5 else (1,)
        for power in range(math.floor(self.low), math.ceil(self.high) + 1):
            for step in steps:
                if self.low - 1e-9 <= math.log10(step) + power <= self.high + 1e-9:
                    yield step * 10.0**power


def _step(value: float, *, down: bool) -> float:
    """The next of 1, 2, 5, 10, 20 … at or above ``value``, or below."""
    power = 10.0 ** math.floor(math.log10(value))
    steps = [step * power for step in (1, 2, 5, 10)]
    return max(step for step in steps if step <= value * 1.0001) if down else min(s for s in steps if s >= value / 1.0001)


def _number(value: float) -> str:
    if value >= 1e6:
        return f"{value / 1e6:g}M"
    return f"{value / 1e3:g}k" if value >= 1e3 else f"{value:,g}"


def _mark(kind: str, x: float, y: float, colour: str) -> str:
    if kind == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>'
    shapes = {"square": "-4,-4 4,-4 4,4 -4,4", "diamond": "0,-5 5,0 0,5 -5,0", "triangle": "0,-5 5,4 -5,4"}
    return f'<polygon points="{shapes[kind]}" transform="translate({x:.1f} {y:.1f})" fill="{colour}"/>'


def svg(growth: Growth) -> str:
    """``growth`` drawn; points that are not above zero have no place on a logarithmic axis and are left out."""
    curves = [Curve(c.name, sorted(point for point in c.points if min(point) > 0)) for c in growth.curves]
    curves = [curve for curve in curves if curve.points]
    horizontal = _Axis([x for curve in curves for x, _ in curve.points], _LEFT, _WIDTH - _RIGHT, snug=True)
    vertical = _Axis([y for curve in curves for _, y in curve.points], _HEIGHT - _BOTTOM, _TOP, snug=False)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}" '
            f'role="img" aria-label="{escape(growth.title)}">',
            f"<style>{_STYLE}</style>",
            f'<text class="title" x="{_LEFT}" y="26">{escape(growth.title)} ({escape(growth.unit)})</text>',
            *_legend(curves),
            *_grid(horizontal, vertical, sorted({x for curve in curves for x, _ in curve.points})),
            f'<text x="{(_LEFT + _WIDTH - _RIGHT) / 2:.0f}" y="{_HEIGHT - 10}" text-anchor="middle">{escape(growth.x)}</text>',
            *_lines(curves, horizontal, vertical),
            "</svg>\n",
        ]
    )


def _legend(curves: list[Curve]) -> Iterator[str]:
    x = float(_LEFT)
    for number, curve in enumerate(curves):
        yield _mark(_MARKS[number % 5], x + 4, 48, _COLOURS[number % 5])
        yield f'<text x="{x + 14:.0f}" y="52">{escape(curve.name)}</text>'
        x += 36 + 7.2 * len(curve.name)


def _grid(horizontal: _Axis, vertical: _Axis, measured: list[float]) -> Iterator[str]:
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    for value in vertical.ticks():
        y = vertical.at(value)
        yield f'<line class="grid" x1="{_LEFT}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}"/>'
        yield f'<text x="{_LEFT - 8}" y="{y + 4.5:.1f}" text-anchor="end">{_number(value)}</text>'
    for value in measured:
        x = horizontal.at(value)
        yield f'<line class="grid" x1="{x:.1f}" y1="{_TOP}" x2="{x:.1f}" y2="{bottom}"/>'
        yield f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{_number(value)}</text>'
    yield f'<line class="axis" x1="{_LEFT}" y1="{bottom}" x2="{right}" y2="{bottom}"/>'


def _lines(curves: list[Curve], horizontal: _Axis, vertical: _Axis) -> Iterator[str]:
    for number, curve in enumerate(curves):
        colour = _COLOURS[number % 5]
        places = [(horizontal.at(x), vertical.at(y)) for x, y in curve.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        yield f'<polyline class="curve" stroke="{colour}" points="{path}"/>'
        yield from (_mark(_MARKS[number % 5], x, y, colour) for x, y in places)
