"""Single calls with nothing flushed, beside the file system in C whose handlers do nothing: what the daemon itself costs."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tests.bench import populate
from tests.bench.minimal import minimal
from tests.bench.nothing import nothing
from tests.bench.place import ALL_CPUS, ONE_CPU, Place, on, run
from tests.bench.rows import Row, at_most, p50
from tests.processes import worked

REST, IDLE = 0.1, 0.01
"""Seconds for which a process must have worked no more than so much of the time: then it has nothing left to do."""

Act = Callable[[str], object]


def _read_file(path: str) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.read(fd, 1 << 16)
    os.close(fd)


def _each(paths: list[str], act: Act) -> float:
    """The median of the microseconds that ``act`` took for each."""
    took = []
    for path in paths:
        began = time.perf_counter()
        act(path)
        took.append(time.perf_counter() - began)
    return p50(took) * 1e6


@contextmanager
def _both(place: Place, cpus: set[int]) -> Iterator[dict[str, str]]:
    with place.snapfs("-o", "sync=none", cpus=cpus) as daemon, minimal(place, 0, cpus) as in_c, on(cpus):
        yield {"ours": str(daemon.mnt), "theirs": str(in_c)}


def _life(place: Place, steps: dict[str, tuple[str, Act]], calls: int, cpus: set[int], rows: dict[str, Row]) -> None:
    """Take fresh snapshots through ``steps`` in turns: what it is called, (where the snapshot is, what is done there)."""
    with _both(place, cpus) as mounts:
        for number in range(place.rounds + 1):  # the first does not count
            names = [place.name("call") for _ in range(calls)]
            for side in ("ours", "theirs") if number % 2 == 0 else ("theirs", "ours"):
                for what, (where, act) in steps.items():
                    figure = _each([f"{mounts[side]}/{where.format(name)}" for name in names], act)
                    if number:
                        getattr(rows[what], side).append(figure)


def _commit(path: str) -> str:
    return path.replace("/active/", "/committed/")


def calls(place: Place) -> Iterator[Row]:
    """The system calls, on one processor, and without pinning."""
    steps: dict[str, tuple[str, Act]] = {
        "mkdir(2), sync=none": ("active/{}", os.mkdir),
        "cat mounts.json, first": ("active/{}/mounts.json", _read_file),
        "cat mounts.json, repeated": ("active/{}/mounts.json", _read_file),
        "mv, rename(2), sync=none": ("active/{}", lambda path: os.rename(path, _commit(path))),
        "rmdir(2), sync=none": ("committed/{}", os.rmdir),
    }
    timed = "from Python, one client, p50; cat is open, read, close; first: of a fresh snapshot; "
    note = f"{timed}daemon and client on one CPU, both"
    rows = {what: Row(what, "the file system in C", "us", at_most(1.6), note) for what in steps}
    _life(place, steps, place.size(200, 20), ONE_CPU, rows)
    yield from rows.values()
    note = f"{timed}not pinned: wake-ups across processors are in it, on both sides"
    rows = {what: Row(f"{what}, not pinned", "the file system in C", "us", None, note) for what in steps}
    _life(place, steps, place.size(200, 20), ALL_CPUS, rows)
    yield from rows.values()


def processor(place: Place) -> Iterator[Row]:
    """What each call costs the daemon, whatever else the machine does meanwhile."""
    steps: dict[str, tuple[float, str, Act]] = {
        "mkdir": (5, "active/{}", os.mkdir),
        "cat info.json": (2.5, "active/{}/info.json", _read_file),
        "cat mounts.json": (2.5, "active/{}/mounts.json", _read_file),
        "mv": (5, "active/{}", lambda path: os.rename(path, _commit(path))),
        "rmdir": (4, "committed/{}", os.rmdir),
    }
    note = (
        "microseconds of its processor a call, of all its threads, with what goes on after the calls; "
        "daemon and client on one CPU, both; nothing is flushed"
    )
    against = "a file system on pyfuse3 that does nothing"
    rows = {
        what: Row(f"the daemon's work for {what}", against, "us", at_most(most), note) for what, (most, _, _) in steps.items()
    }
    calls = place.size(400, 20)
    with place.snapfs("-o", "sync=none", cpus=ONE_CPU) as daemon, nothing(place, ONE_CPU) as (where, pid), on(ONE_CPU):
        assert daemon.process is not None
        for number in range(place.rounds + 1):  # the first does not count
            names = [place.name("call") for _ in range(calls)]
            for side, mount, process in (("ours", daemon.mnt, daemon.process.pid), ("theirs", where, pid)):
                for what, (_, path, act) in steps.items():
                    before = worked(process)
                    for name in names:
                        act(f"{mount}/{path.format(name)}")
                    if number:
                        getattr(rows[what], side).append((_rested(process) - before) / calls * 1e6)
    yield from rows.values()


def _rested(process: int) -> float:
    """What ``process`` has worked once it has nothing left to do in the background."""
    so_far, before = worked(process), -1.0
    while so_far - before > IDLE * REST:
        time.sleep(REST)
        so_far, before = worked(process), so_far
    return so_far


def commands(place: Place) -> Iterator[Row]:
    """The whole commands, as they are typed."""
    steps: dict[str, tuple[str, Act]] = {
        "mkdir, the command, sync=none": ("active/{}", lambda path: run("mkdir", path)),
        "cat mounts.json, the command, first": ("active/{}/mounts.json", lambda path: run("cat", path)),
        "cat mounts.json, the command, repeated": ("active/{}/mounts.json", lambda path: run("cat", path)),
        "mv, the command, sync=none": ("active/{}", lambda path: run("mv", path, _commit(path))),
        "rmdir, the command, sync=none": ("committed/{}", lambda path: run("rmdir", path)),
    }
    note = "the whole process, from fork to its end, p50; daemon and client on one CPU, both"
    rows = {what: Row(what, "the file system in C", "us", at_most(1.6), note) for what in steps}
    _life(place, steps, place.size(40, 5), ONE_CPU, rows)
    yield from rows.values()


def chains(place: Place) -> Iterator[Row]:
    """How Prepare and mounts.json cost more in longer chains of layers."""
    longest = place.size(256, 8)
    growth = place.growth("layers", "A longer chain of layers", "layers", "us")
    row = Row(
        f"mounts.json on {longest} layers, first",
        "on one layer",
        "us",
        None,
        "open, read, close of a fresh snapshot's, sync=none; daemon and client on one CPU",
    )
    calls = place.size(50, 5)
    with place.directory("chain") as own:
        populate.populate(own / "root", longest, chain=longest)
        with place.snapfs("-o", "sync=none", root=own / "root", cpus=ONE_CPU) as daemon, on(ONE_CPU):
            lengths = sorted({2**power for power in range(9) if 2**power <= longest})
            prepared: dict[int, list[float]] = {length: [] for length in lengths}
            first: dict[int, list[float]] = {length: [] for length in lengths}
            mounted: dict[int, list[float]] = {length: [] for length in lengths}
            for _ in range(place.rounds):
                for length in lengths:
                    names = [place.name("chain") for _ in range(calls)]
                    parent = f"{daemon.mnt}/committed/{populate.name_of(length)}/active"
                    prepared[length].append(_each([f"{parent}/{name}" for name in names], os.mkdir))
                    first[length].append(_each([f"{daemon.mnt}/active/{name}/mounts.json" for name in names], _read_file))
                    mounted[length].append(_each([f"{daemon.mnt}/active/{name}/rootfs" for name in names[:5]], os.readlink))
            for length in lengths:
                growth.curve("Prepare (mkdir, sync=none)").points.append((length, p50(prepared[length])))
                growth.curve("mounts.json, first").points.append((length, p50(first[length])))
                growth.curve("rootfs, mounted").points.append((length, p50(mounted[length])))
            row.ours, row.theirs = first[lengths[-1]], first[lengths[0]]
    yield row
