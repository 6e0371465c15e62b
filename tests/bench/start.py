"""Starting the daemon on roots with many snapshots, and the memory that it takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.bench import populate
from tests.bench.place import Place, timed
from tests.bench.rows import Row, at_most, p50
from tests.daemon import Daemon


def _resident(pid: int) -> dict[str, float]:
    """MiB that a process has in memory: VmRSS, RssAnon, RssFile."""
    found = {}
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in ("VmRSS", "RssAnon", "RssFile"):
            found[name] = int(value.split()[0]) / 1024
    return found


def start(place: Place) -> Iterator[Row]:
    """Seconds until ready, and resident memory then."""
    sizes = [place.size(100, 10), place.size(1_000, 100), place.size(10_000, 200), place.size(100_000, 1_000)]
    sizes += [1_000_000] if place.million else []
    growth = place.growth("start-snapshots", "Starting the daemon: more snapshots", "snapshots", "s")
    memory = place.growth("memory-snapshots", "Resident memory when ready: more snapshots", "snapshots", "MiB")
    for size in sizes:
        root = populate.shared(place, size)
        seconds, mebibytes = (5, 200) if size == 1_000_000 else (1, 120)
        ready = Row(
            f"start with {size:,} snapshots",
            "",
            "s",
            at_most(seconds, absolute=True),
            "from starting the process until it says that it serves; the root is in the page cache; not pinned",
        )
        resident = Row(f"resident memory with {size:,} snapshots", "", "MiB", at_most(mebibytes, absolute=True), "")
        split: dict[str, list[float]] = {"RssAnon": [], "RssFile": []}
        for _ in range(place.rounds):
            with _stopped(place, root) as daemon:
                ready.ours.append(timed(daemon.start))
                found = _resident(daemon.pid)
                resident.ours.append(found["VmRSS"])
                for part, figures in split.items():
                    figures.append(found[part])
        parts = ", ".join(f"{part} {p50(figures):.0f} MiB" for part, figures in split.items())
        resident.note = f"VmRSS when it is ready, of which {parts}: the latter are pages of files, which can go"
        growth.curve("until it serves").points.append((size, p50(ready.ours)))
        memory.curve("VmRSS").points.append((size, p50(resident.ours)))
        memory.curve("RssAnon").points.append((size, p50(split["RssAnon"])))
        if size >= sizes[3]:
            yield ready
            yield resident


@contextmanager
def _stopped(place: Place, root: Path) -> Iterator[Daemon]:
    """A daemon that is not yet started, for a block."""
    with place.directory("start") as own:
        daemon = Daemon(root, own / "mnt")
        try:
            yield daemon
            daemon.stop()
        finally:
            daemon.cleanup()
