"""Meters: how many requests of each operation were answered, how many failed, how long they took."""

from __future__ import annotations

import statistics
from collections import Counter, deque

RECENT = 1000  # requests of each operation that the percentiles are of


class Meter:
    """The requests for one operation: how many, how many of them failed with which errno, how long the last ones took."""

    def __init__(self) -> None:
        self.count = 0
        self.errors: Counter[str] = Counter()
        self.seconds = 0.0
        self._recent: deque[float] = deque(maxlen=RECENT)

    def note(self, seconds: float, error: str | None) -> None:
        """One request was answered, with errno ``error`` or (None) well."""
        self.count += 1
        self.seconds += seconds
        self._recent.append(seconds)
        if error is not None:
            self.errors[error] += 1

    def shown(self) -> dict[str, object]:
        """As stats.json shows it; there was a request."""
        cuts = statistics.quantiles([*self._recent, self._recent[-1]], n=100, method="inclusive")
        latency = {"p50": cuts[49], "p90": cuts[89], "p99": cuts[98], "max": max(self._recent)}
        return {
            "count": self.count,
            "errors": dict(self.errors.most_common()),
            "milliseconds": {name: round(seconds * 1000, 3) for name, seconds in latency.items()},
        }
