"""Prepare: one client and many, through the tree and through the library, beside containerd's."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import trio

from snapfs import Snapshotter, open_snapshotter
from snapfs.root.imprint import Imprint
from tests.bench import containerd
from tests.bench.clients import Together, together
from tests.bench.place import ALL_CPUS, ONE_CPU, Place, move, on
from tests.bench.rows import Growth, Row, at_least, at_most, in_turns, p50
from tests.daemon import Daemon

MANY = 64


def make_base(mnt: Path) -> None:
    """A committed snapshot called base, as containerd's has one."""
    os.mkdir(mnt / "active/making-base")
    os.rename(mnt / "active/making-base", mnt / "committed/base")


def each_takes(times: int, act: Callable[[], object]) -> list[float]:
    """Seconds of so many calls of ``act``."""
    took = []
    for _ in range(times):
        began = time.perf_counter()
        act()
        took.append(time.perf_counter() - began)
    return took


@contextmanager
def _both(place: Place, cpus: set[int]) -> Iterator[tuple[Daemon, containerd.Containerd]]:
    """A daemon with a base, and containerd, on these processors."""
    opponent = containerd.shared(place)
    opponent.run_on(cpus)
    try:
        with place.snapfs(cpus=cpus) as daemon:
            make_base(daemon.mnt)
            yield daemon, opponent
    finally:
        opponent.run_on(ALL_CPUS)


def one_client(place: Place) -> Iterator[Row]:
    """Durable Prepare, one client."""
    calls = place.size(400, 20)
    with _both(place, ONE_CPU) as (daemon, opponent), on(ONE_CPU):
        for what, directory, parent in (("on a parent", "committed/base/active", "base"), ("without parent", "active", "")):
            row = Row(
                f"durable Prepare by mkdir {what}, one client, p50",
                "containerd's Prepare",
                "ms",
                at_most(0.7),
                "mkdir(2) from Python, or one call over the socket, sent and received; client and daemon on one CPU, both",
            )
            path = f"{daemon.mnt}/{directory}"

            def ours(path: str = path) -> float:
                return p50(each_takes(calls, lambda: os.mkdir(f"{path}/{place.name('one')}"))) * 1e3

            def theirs(parent: str = parent) -> float:
                return p50(each_takes(calls, lambda: opponent.client.prepare(place.name("one"), parent))) * 1e3

            ours(), theirs()  # once before it counts
            yield in_turns(place.rounds, row, ours, theirs)


def imprints(place: Place) -> Iterator[Row]:
    """What it costs that each directory bears its record."""
    calls = place.size(400, 20)
    row = Row(
        "the record that a Prepare leaves on its directory, p50",
        "durable Prepare through the library, one task",
        "us",
        at_most(0.1),
        "the extended attribute alone, on directories of Prepares just done without it; one CPU",
    )

    async def measure(root: Path) -> None:
        async with open_snapshotter(root) as snapshots:
            serial, layers = place.name("borne"), snapshots.layers
            layers.supports_imprints = False
            took = []
            for number in range(calls):
                began = time.perf_counter()
                await snapshots.prepare(f"{serial}-{number}", labels={"containerd.io/gc.root": "2026-01-01T00:00:00Z"})
                took.append(time.perf_counter() - began)
            layers.supports_imprints = True
            with snapshots.records.reading() as reader:
                numbers = list(reader.numbers())[-calls:]
                found = [(number, Imprint(record)) for number in numbers if (record := reader.record(number)) is not None]
            row.theirs.append(p50(took) * 1e6)
            borne = iter(found)
            row.ours.append(p50(each_takes(len(found), lambda: layers.write_imprint(*next(borne)))) * 1e6)

    with place.directory("imprints") as own, on(ONE_CPU):
        for _ in range(place.rounds):
            trio.run(measure, own / "root")
    yield row


def _mkdirs(place: Place, directory: Path, clients: int, each: int) -> Together:
    serial = place.name("many")

    def begin(number: int) -> Callable[[int], object]:
        prefix = f"{directory}/{serial}-{number}-"
        return lambda operation: os.mkdir(f"{prefix}{operation}")

    with on(ALL_CPUS - ONE_CPU or ALL_CPUS):
        return together(clients, each, begin)


def _prepares(place: Place, address: str, clients: int, each: int) -> Together:
    serial = place.name("many")

    def begin(number: int) -> Callable[[int], object]:
        client = containerd.Client(address)
        client.mounts("base-view")
        prefix = f"{serial}-{number}-"
        return lambda operation: client.prepare(f"{prefix}{operation}", "base")

    return together(clients, each, begin)


def _library(place: Place, root: Path, clients: int, each: int) -> float:
    """Operations a second of so many tasks, in this process."""
    serial = place.name("tasks")

    async def client(snapshots: Snapshotter, number: int) -> None:
        for operation in range(each):
            await snapshots.prepare(f"{serial}-{number}-{operation}", "base")

    async def main() -> float:
        async with open_snapshotter(root) as snapshots:
            if not [info for info in await snapshots.walk("name==base")]:
                await snapshots.prepare("making-base")
                await snapshots.commit("base", "making-base")
            await snapshots.prepare(f"{serial}-first", "base")
            began = time.perf_counter()
            async with trio.open_nursery() as nursery:
                for number in range(clients):
                    nursery.start_soon(client, snapshots, number)
            return clients * each / (time.perf_counter() - began)

    return trio.run(main)


def _fdatasyncs(path: Path, times: int, *, append: bool) -> float:
    """So many 4 KiB, each followed by fdatasync(2), a second."""
    block = os.urandom(4096)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | (os.O_TRUNC if append else 0), 0o600)
    try:
        if not append and os.fstat(fd).st_size < len(block) * times:
            os.pwrite(fd, block * times, 0)
            os.fsync(fd)
        began = time.perf_counter()
        for number in range(times):
            os.pwrite(fd, block, number * len(block))
            os.fdatasync(fd)
        return times / (time.perf_counter() - began)
    finally:
        os.close(fd)


def many_clients(place: Place) -> Iterator[Row]:
    """Durable Prepare, many clients: through the tree and through the library."""
    clients = place.size(MANY, 4)
    ours_each, theirs_each = place.size(40, 5), place.size(20, 5)
    growth = place.growth("prepare-clients", "Prepare: more clients at once", "clients", "operations/s")
    with place.directory("library") as own, _both(place, ALL_CPUS) as (daemon, opponent):
        move(daemon.pid, ONE_CPU)  # the clients wait for the directory's lock by spinning: not where the daemon should run
        with suppress(Exception):
            opponent.client.prepare("base-view", "base")
        directory = daemon.mnt / "committed/base/active"
        shares: list[float] = []

        def theirs() -> float:
            done = _prepares(place, opponent.address, clients, theirs_each)
            shares.append(done.own_share)
            return done.rate

        tree = Row(
            f"durable Prepare by mkdir into one directory, {clients} clients",
            f"containerd's Prepare, {clients} clients",
            "1/s",
            at_least(3),
            f"{clients} processes doing mkdir(2), or calls over a connection of their own; "
            "snapfs: the clients on one CPU, the daemon on the other; containerd: not pinned; each as it is fastest",
        )
        library = Row(
            f"durable Prepare through the library, {clients} tasks",
            f"containerd's Prepare, {clients} clients",
            "1/s",
            at_least(6),
            "trio tasks of one process; no pinning",
        )
        written = Row(
            f"durable Prepare through the library, {clients} tasks",
            "fdatasync of 4 KiB overwritten, one after the other",
            "1/s",
            at_least(1),
            "on the same disk, from Python",
        )
        appended = Row(written.what, "fdatasync of 4 KiB appended, one after the other", "1/s", at_least(1), written.note)
        file, times = own / "synced", place.size(500, 50)
        _library(place, own / "root", clients, 2)
        for _ in range(place.rounds):
            tree.ours.append(_mkdirs(place, directory, clients, ours_each).rate)
            through_library = _library(place, own / "root", clients, ours_each)
            tree.theirs.append(theirs())
            written.theirs.append(_fdatasyncs(file, times, append=False))
            appended.theirs.append(_fdatasyncs(file, times, append=True))
            library.theirs.append(tree.theirs[-1])
            for row in (library, written, appended):
                row.ours.append(through_library)
        tree.note += f"; containerd's clients themselves took {p50(shares):.0%} of one CPU of {len(ALL_CPUS)}"
        yield from (tree, library, written, appended)
        for number in (1, 2, 4, 8, 16, 32, 64)[: 3 if place.quick else None]:
            _grow(growth, place, number, daemon, opponent, own / "root")


def _grow(growth: Growth, place: Place, clients: int, daemon: Daemon, opponent: containerd.Containerd, root: Path) -> None:
    each = max(3, place.size(1000, 30) // clients)
    growth.curve("snapfs, mkdir into one directory").points.append(
        (clients, _mkdirs(place, daemon.mnt / "committed/base/active", clients, each).rate)
    )
    growth.curve("snapfs, the library").points.append((clients, _library(place, root, clients, each)))
    growth.curve("containerd").points.append((clients, _prepares(place, opponent.address, clients, max(3, each // 2)).rate))
