"""Walk in the library beside List over containerd's socket, and filters beside a full Walk."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import trio

from snapfs import Snapshotter, open_snapshotter
from snapfs.kernel import mounting
from tests.bench import containerd, populate
from tests.bench.clients import together
from tests.bench.place import Place
from tests.bench.rows import Row, at_most, p50

_AT_ONCE = 16


@contextmanager
def _filled(place: Place, count: int) -> Iterator[containerd.Client]:
    """A containerd in memory with so many snapshots.  List reads the records through the page cache, wherever they are; but
    making them on the disk would take minutes."""
    with place.directory("memory") as base:
        mounting.mount("none", str(base), "tmpfs", options="size=4g")
        with containerd.containerd(place, base) as running:
            place.say(f"making {count:,} snapshots in a containerd in memory")

            def begin(number: int) -> Callable[[int], object]:
                client = containerd.Client(running.address)
                return lambda operation: client.prepare(f"s{number:02}-{operation:06}")

            together(_AT_ONCE, count // _AT_ONCE, begin)
            yield running.client
        mounting.unmount(str(base))


def walk(place: Place) -> Iterator[Row]:
    """Walk and List of as many snapshots, and what filters cost."""
    count = place.size(100_000, 1_600) // _AT_ONCE * _AT_ONCE
    full = Row(
        f"Walk of {count:,} snapshots in the library",
        "List of as many over containerd's socket",
        "ms",
        at_most(0.5),
        "List until the last byte has come, not decoded; containerd's root is in memory (tmpfs), since filling it on the "
        "disk takes too long; not pinned",
    )
    few = max(1, count // 1000)
    selected = {
        f"Walk with name==… (1 of {count:,})": ("name==" + populate.name_of(count // 2), 1),
        f"Walk with kind==active ({few} of {count:,})": ("kind==active", few),
        f"Walk with parent==… ({few} of {count:,})": ("parent==" + populate.name_of(1), few),
    }
    rows = {
        what: Row(
            what, "a full Walk of ours", "ms", at_most(0.02), "in proportion would be nothing; 2 % of the full one is the bound"
        )
        for what in selected
    }
    growth = place.growth("walk-snapshots", "Walk: more snapshots", "snapshots", "ms")

    async def main(client: containerd.Client) -> None:
        async with open_snapshotter(populate.shared(place, count)) as snapshots:
            keys = [f"walk-{number}" for number in range(few)]
            for key in keys:
                await snapshots.prepare(key, populate.name_of(1))
            try:
                await measure(snapshots, client)
            finally:
                for key in keys:
                    await snapshots.remove(key)

    async def measure(snapshots: Snapshotter, client: containerd.Client) -> None:
        for _ in range(place.rounds):
            full.ours.append(await took(snapshots, None, count + few))
            began = time.perf_counter()
            answer = client.list()
            full.theirs.append((time.perf_counter() - began) * 1e3)
            assert len(answer) > 50 * count, "containerd listed less than it should have"
            for what, (text, expected) in selected.items():
                rows[what].ours.append(await took(snapshots, text, expected))
                rows[what].theirs.append(full.ours[-1])

    async def took(snapshots: Snapshotter, text: str | None, expected: int) -> float:
        began = time.perf_counter()
        found = await snapshots.walk(*([text] if text else []))
        seconds = time.perf_counter() - began
        assert len(found) == expected, f"{text}: {len(found)} instead of {expected}"
        return seconds * 1e3

    async def at(size: int) -> float:
        async with open_snapshotter(populate.shared(place, size)) as snapshots:
            return p50([await took(snapshots, None, size) for _ in range(place.rounds)])

    with _filled(place, count) as client:
        trio.run(main, client)
    for size in (place.size(100, 10), place.size(1_000, 100), place.size(10_000, 200)):
        growth.curve("snapfs, the library").points.append((size, trio.run(at, size)))
    growth.curve("snapfs, the library").points.append((count, p50(full.ours)))
    growth.curve("containerd, List").points.append((count, p50(full.theirs)))
    yield full
    yield from rows.values()
