"""Remove, and Prepare, in roots of few and of many snapshots."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial

from tests.bench import populate
from tests.bench.place import ONE_CPU, Place, on, timed
from tests.bench.rows import Row, at_most, p50


def remove(place: Place) -> Iterator[Row]:
    """Remove at many snapshots, beside the same at few."""
    sizes = [place.size(100, 10), place.size(1_000, 100), place.size(10_000, 200), place.size(100_000, 1_000)]
    calls = place.size(100, 10)
    growth = place.growth("calls-snapshots", "Prepare and Remove: more snapshots in the root", "snapshots", "ms")
    took: dict[int, list[float]] = {size: [] for size in sizes}
    prepared: dict[int, list[float]] = {size: [] for size in sizes}
    with ExitStack() as stack, on(ONE_CPU):
        mounted = {}
        for size in sizes:
            mounted[size] = stack.enter_context(place.snapfs(root=populate.shared(place, size), cpus=ONE_CPU)).mnt
        for _ in range(place.rounds):
            for size, mnt in mounted.items():
                names = [f"{mnt}/active/{place.name('remove')}" for _ in range(calls)]
                prepared[size].append(p50([timed(partial(os.mkdir, name)) for name in names]) * 1e3)
                took[size].append(p50([timed(partial(os.rmdir, name)) for name in names]) * 1e3)
    for size in sizes:
        growth.curve("Remove (rmdir)").points.append((size, p50(took[size])))
        growth.curve("Prepare (mkdir)").points.append((size, p50(prepared[size])))
    few, many = sizes[0], sizes[-1]
    note = "rmdir(2) of fresh empty active snapshots; both daemons and the client on one CPU"
    yield Row(f"Remove at {many:,} snapshots, p50", f"at {few} snapshots", "ms", at_most(1.5), note, took[many], took[few])
    note = "mkdir(2), as above"
    yield Row(f"Prepare at {many:,} snapshots, p50", f"at {few} snapshots", "ms", None, note, prepared[many], prepared[few])
