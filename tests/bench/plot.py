"""Plots as self-contained SVG: both axes logarithmic, readable on white and on dark pages."""

from __future__ import annotations

from tests.bench.rows import Growth


def svg(growth: Growth) -> str:
    return ""
