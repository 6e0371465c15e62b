"""stats.json and options.json: what the daemon does, and how it was set up."""

from __future__ import annotations

import os
import platform
import statistics
from collections import Counter, deque
from typing import TYPE_CHECKING

import msgspec

from snapfs.model import rfc3339
from snapfs.tree.attributes import json_text

if TYPE_CHECKING:
    from snapfs.tree.tree import Tree

RECENT = 1000  # requests of each operation that the percentiles are of


class Meter:
    """The requests for one operation: how many, how many of them failed with which errno, how long the last ones took."""

    def __init__(self) -> None:
        self.count = 0
        self.errors: Counter[str] = Counter()
        self.seconds = 0.0
        self._recent: deque[float] = deque(maxlen=RECENT)

    def note(self, seconds: float, error: str | None) -> None:
        """One request was answered, with errno ``error`` or well."""
        self.count += 1
        self.seconds += seconds
        self._recent.append(seconds)
        if error is not None:
            self.errors[error] += 1

    def shown(self) -> dict[str, object]:
        cuts = statistics.quantiles([*self._recent, self._recent[-1]], n=100, method="inclusive")
        latency = {"p50": cuts[49], "p90": cuts[89], "p99": cuts[98], "max": max(self._recent)}
        return {
            "count": self.count,
            "errors": dict(self.errors.most_common()),
            "milliseconds": {name: round(seconds * 1000, 3) for name, seconds in latency.items()},
        }


def stats_json(tree: Tree) -> str:
    """Counts since the daemon started; latencies in milliseconds, of the last thousand requests of each operation."""
    counts = tree.snapshotter.statistics()
    return json_text(
        {
            "started": rfc3339(tree.started),
            "snapshots": counts.snapshots,
            "ids_handed_out": counts.last_id,
            "operations": {name: tree.meters[name].shown() for name in sorted(tree.meters)},
            "batches": {
                "count": sum(counts.batches.values()),
                "operations": sum(size * times for size, times in counts.batches.items()),
                "by_size": {str(size): counts.batches[size] for size in sorted(counts.batches)},
            },
            "mounts_held": counts.mounts_held,
            "trash_waiting": counts.trash_waiting,
        }
    )


def options_json(tree: Tree) -> str:
    """How the daemon was started, and what it found out about this machine."""
    snapshotter = tree.snapshotter
    return json_text(
        {
            "version": tree.version,
            "pid": os.getpid(),
            "kernel": platform.release(),
            "root": snapshotter.root,
            **tree.served,
            "options": msgspec.structs.asdict(snapshotter.options),
            "overlay_options": snapshotter.overlay_options,
            "features": snapshotter.features,
        }
    )
