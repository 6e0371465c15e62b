"""What a row of the table is: two series of figures, taken in turns, and what their ratio should be."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal


def p50(values: Sequence[float]) -> float:
    return statistics.median(values)


def p99(values: Sequence[float]) -> float:
    """The value that one in a hundred exceeds; the greatest of fewer than a hundred."""
    return sorted(values)[math.ceil(len(values) * 0.99) - 1]


@dataclass(frozen=True)
class Target:
    """``sense`` says on which side of ``bound`` a figure has to be.  The figure is the ratio, or ours alone if ``absolute``."""

    sense: Literal["at most", "at least"]
    bound: float
    absolute: bool = False

    def met(self, figure: float) -> bool:
        return figure <= self.bound if self.sense == "at most" else figure >= self.bound


def at_most(bound: float, *, absolute: bool = False) -> Target:
    return Target("at most", bound, absolute)


def at_least(bound: float, *, absolute: bool = False) -> Target:
    return Target("at least", bound, absolute)


@dataclass
class Row:
    """``what`` was measured, ``against`` what ("": nothing), one figure a round each, in ``unit``; ``note`` says what exactly
    is timed and on which processors."""

    what: str
    against: str
    unit: str
    target: Target | None
    note: str
    ours: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)
    missing: str = ""
    """Why there are no figures."""

    @property
    def ratios(self) -> list[float]:
        """Ours by theirs, round by round, so that what slows the machine down for a while slows both."""
        return [our / their if their else float("inf") for our, their in zip(self.ours, self.theirs, strict=False)]

    @property
    def figure(self) -> float | None:
        """What the target is about; None where nothing was measured."""
        values = self.ours if self.target is not None and self.target.absolute else self.ratios
        return statistics.median(values) if values else None

    @property
    def met(self) -> bool | None:
        """Whether the target was reached; None without target or figures."""
        return None if self.target is None or self.figure is None else self.target.met(self.figure)


@dataclass
class Curve:
    """How a cost grows: one line of a plot."""

    name: str
    points: list[tuple[float, float]] = field(default_factory=list)


@dataclass
class Growth:
    """One plot: ``curves`` over ``x``, in ``unit``; ``file`` is the name of the SVG without its ending."""

    file: str
    title: str
    x: str
    unit: str
    curves: list[Curve] = field(default_factory=list)

    def curve(self, name: str) -> Curve:
        for curve in self.curves:
            if curve.name == name:
                return curve
        self.curves.append(Curve(name))
        return self.curves[-1]


Side = Callable[[], float]


def in_turns(rounds: int, row: Row, ours: Side, theirs: Side) -> Row:
    """Fill ``row``, one figure of each side a round; who begins changes."""
    for number in range(rounds):
        sides = [(row.ours, ours), (row.theirs, theirs)]
        for figures, side in sides if number % 2 == 0 else reversed(sides):
            figures.append(side())
    return row
