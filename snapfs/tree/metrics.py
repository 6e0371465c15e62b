"""metrics: the counts of stats.json as Prometheus reads them (its text exposition format, 0.0.4)."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable

from snapfs.tree.state import State

Sample = tuple[dict[str, str], float]


def metrics(state: State) -> str:
    """All metrics; counters begin with the daemon, sizes are bytes, times seconds."""
    counts, space = state.snapshotter.statistics(), state.snapshotter.space()
    meters = sorted(state.meters.items())
    errors = [
        ({"operation": name, "errno": errno}, float(n)) for name, meter in meters for errno, n in sorted(meter.errors.items())
    ]
    families: list[tuple[str, str, str, list[Sample]]] = [
        ("build_info", "gauge", "The version, as a label.", [({"version": state.version}, 1)]),
        ("start_time_seconds", "gauge", "When the daemon started, since the epoch.", [({}, state.started / 1e9)]),
        ("snapshots", "gauge", "Snapshots that there are.", [({"kind": kind}, n) for kind, n in counts.snapshots.items()]),
        ("ids_total", "counter", "Ids that were ever handed out.", [({}, counts.last_id)]),
        ("requests_total", "counter", "Requests answered.", [({"operation": name}, meter.count) for name, meter in meters]),
        ("request_errors_total", "counter", "Requests refused, by errno.", errors),
        ("request_seconds_total", "counter", "Time spent answering.", [({"operation": n}, m.seconds) for n, m in meters]),
        ("batches_total", "counter", "Batches of changes that were made durable.", [({}, sum(counts.batches.values()))]),
        ("changes_total", "counter", "Changes in those batches.", [({}, sum(size * n for size, n in counts.batches.items()))]),
        ("mounts", "gauge", "File systems held mounted as rootfs.", [({}, counts.mounts_held)]),
        ("trash", "gauge", "Removed layers that are not yet deleted.", [({}, counts.trash_waiting)]),
        ("unflushed", "gauge", "Committed snapshots whose data the disk may have lost.", [({}, counts.lost)]),
        ("filesystem_size_bytes", "gauge", "Size of the file system under ROOT.", [({}, space.f_blocks * space.f_frsize)]),
        ("filesystem_avail_bytes", "gauge", "What is left of it.", [({}, space.f_bavail * space.f_frsize)]),
        ("cpu_seconds_total", "counter", "CPU time of the daemon.", [({}, time.process_time())]),
        ("resident_memory_bytes", "gauge", "Memory of the daemon.", [({}, _resident())]),
    ]
    return "".join(line for name, kind, text, samples in families for line in _family(f"snapfs_{name}", kind, text, samples))


def _family(name: str, kind: str, text: str, samples: Iterable[Sample]) -> Iterable[str]:
    yield f"# HELP {name} {text}\n# TYPE {name} {kind}\n"
    for labels, value in samples:
        shown = ",".join(f'{key}="{text}"' for key, text in labels.items())
        number = int(value) if value == int(value) else value
        yield f"{name}{{{shown}}} {number}\n" if shown else f"{name} {number}\n"


def _resident() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
