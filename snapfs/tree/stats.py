"""stats.json and options.json: what the daemon does, and how it was set up."""

from __future__ import annotations

import os
import platform

import msgspec

from snapfs.model import rfc3339
from snapfs.tree.attributes import json_text
from snapfs.tree.state import State


def stats_json(state: State) -> str:
    """Counts since the daemon started; latencies in milliseconds, of the last thousand requests of each operation."""
    counts = state.snapshotter.statistics()
    return json_text(
        {
            "started": rfc3339(state.started),
            "snapshots": counts.snapshots,
            "ids_handed_out": counts.last_id,
            "operations": {name: state.meters[name].shown() for name in sorted(state.meters)},
            "batches": {
                "count": sum(counts.batches.values()),
                "operations": sum(size * times for size, times in counts.batches.items()),
                "by_size": {str(size): counts.batches[size] for size in sorted(counts.batches)},
            },
            "mounts_held": counts.mounts_held,
            "trash_waiting": counts.trash_waiting,
            "copies": [{"id": number, "files": files, "bytes": size} for number, (files, size) in counts.copies.items()],
        }
    )


def options_json(state: State) -> str:
    """How the daemon was started, and what it found out about this machine."""
    snapshotter = state.snapshotter
    options = msgspec.structs.asdict(snapshotter.options)
    del options["why_no_rootfs"]  # which the feature says
    return json_text(
        {
            "version": state.version,
            "pid": os.getpid(),
            "kernel": platform.release(),
            "root": snapshotter.root,
            "root_word": snapshotter.root_word,
            **state.served,
            "window": state.window,
            "options": options,
            "overlay_options": snapshotter.overlay_options,
            "features": snapshotter.features,
        }
    )
