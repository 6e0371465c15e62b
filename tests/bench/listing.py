"""Listing many snapshots with ls, beside the file system in C; and what is asked of the daemon when it is done again."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from tests.bench import populate
from tests.bench.minimal import minimal
from tests.bench.place import ONE_CPU, Place, on, run
from tests.bench.rows import Row, at_most, p50


def listing(place: Place) -> Iterator[Row]:
    """ls -f and ls -l of many snapshots: on a fresh mount, and again."""
    sizes = [place.size(100, 10), place.size(1_000, 100), place.size(10_000, 200), place.size(100_000, 1_000)]
    growth = place.growth("ls-snapshots", "Listing for the first time: more snapshots", "snapshots", "ms")
    for size in sizes:
        root = populate.shared(place, size)

        @contextmanager
        def snapfs(root: Path = root) -> Iterator[Path]:
            with place.snapfs(root=root, cpus=ONE_CPU) as daemon:
                yield daemon.mnt

        @contextmanager
        def in_c(size: int = size) -> Iterator[Path]:
            with minimal(place, size, ONE_CPU) as mnt:
                yield mnt

        for flag in ("-f", "-l"):
            first = Row(
                f"ls {flag} of {size:,} snapshots, first",
                "the file system in C",
                "ms",
                at_most(1.5),
                "the whole process, its output thrown away, on a fresh mount each time; daemon and ls on one CPU, both",
            )
            again = Row(
                f"ls {flag} of {size:,} snapshots, repeated",
                "the file system in C",
                "ms",
                at_most(1.5),
                "again on the same mount, median of three",
            )
            for number in range(place.rounds):
                sides: list[tuple[Callable[[], AbstractContextManager[Path]], list[float], list[float]]] = [
                    (snapfs, first.ours, again.ours),
                    (in_c, first.theirs, again.theirs),
                ]
                for mounted, firsts, agains in sides if number % 2 == 0 else reversed(sides):
                    with mounted() as mnt, on(ONE_CPU):
                        (mnt / "active").stat()
                        command = ("ls", flag, mnt / "committed")
                        firsts.append(run(*command) * 1e3)
                        agains.append(p50([run(*command) * 1e3 for _ in range(3)]))
            growth.curve(f"snapfs, ls {flag}").points.append((size, p50(first.ours)))
            growth.curve(f"in C, ls {flag}").points.append((size, p50(first.theirs)))
            if size == sizes[-1]:
                yield first
                yield again


def _requests(mnt: Path) -> dict[str, int]:
    """How many requests of each kind the daemon has had."""
    operations = json.loads((mnt / ".snapfs/stats.json").read_text())["operations"]
    return {name: its["count"] for name, its in operations.items()}


def repeated(place: Place) -> Iterator[Row]:
    """How many requests reach the daemon when stat and ls are done again."""
    count = place.size(100, 10)
    with place.snapfs() as daemon:
        for number in range(count):
            os.mkdir(daemon.mnt / "active" / populate.name_of(number))
        os.mkdir(daemon.mnt / "active/extra")
        os.rename(daemon.mnt / "active/extra", daemon.mnt / "committed/extra")
        (daemon.mnt / "committed/extra/usage.json").read_bytes()  # it has been counted
        acts: dict[str, Callable[[], object]] = {
            f"stat of {count} snapshots": lambda: [os.stat(daemon.mnt / "active" / populate.name_of(n)) for n in range(count)],
            "stat of each entry of a snapshot": lambda: [
                os.lstat(daemon.mnt / "active" / populate.name_of(0) / entry)
                for entry in ("info.json", "labels", "mount.sh", "mounts.json", "rootfs", "diff")
            ],
            f"ls of {count} snapshots": lambda: run("ls", daemon.mnt / "active"),
            f"ls -l of {count} snapshots": lambda: run("ls", "-l", daemon.mnt / "active"),
            "ls of a snapshot": lambda: run("ls", daemon.mnt / "active" / populate.name_of(0)),
            "ls -l of a snapshot": lambda: run("ls", "-l", daemon.mnt / "active" / populate.name_of(0)),
        }
        for what, act in acts.items():
            row = Row(
                f"requests that reach the daemon when {what} is done again",
                "",
                "requests",
                at_most(0, absolute=True),
                "counted by .snapfs/stats.json, less those for stats.json itself",
            )
            kinds: set[str] = set()
            for _ in range(place.rounds):
                act()
                act()
                _requests(daemon.mnt)
                before = _requests(daemon.mnt)
                between = _requests(daemon.mnt)
                act()
                after = _requests(daemon.mnt)
                own = {name: between[name] - before.get(name, 0) for name in between}
                its = {name: after[name] - between.get(name, 0) - own.get(name, 0) for name in after}
                row.ours.append(sum(its.values()))
                kinds |= {f"{name} {times}" for name, times in its.items() if times}
            if kinds:
                row.note = f"{row.note}: {', '.join(sorted(kinds))}"
            yield row
