"""Commit: how long it takes, what it costs others meanwhile, and until the data is on disk."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from tests.bench import containerd
from tests.bench.files import make_files, move_files
from tests.bench.place import ALL_CPUS, ONE_CPU, Place, on, settle, timed
from tests.bench.prepare import each_takes
from tests.bench.rows import Row, at_most, in_turns, p99
from tests.daemon import Daemon


def layer_of(mnt: Path, path: str) -> Path:
    """The real directory of the files of the snapshot at ``path``."""
    return Path(os.readlink(mnt / path / "diff"))


def _counted(mnt: Path, name: str) -> None:
    """Return when the usage of a committed snapshot has been counted."""
    (mnt / "committed" / name / "usage.json").read_bytes()


class _Ours:
    """The files, committed again and again in snapfs."""

    def __init__(self, place: Place, daemon: Daemon, files: int) -> None:
        self._place, self._mnt, self._files = place, daemon.mnt, files
        self._layer: Path | None = None

    def __call__(self) -> float:
        """Milliseconds that the Commit took."""
        key = self._place.name("commit")
        os.mkdir(self._mnt / "active" / key)
        layer = layer_of(self._mnt, f"active/{key}")
        if self._layer is None:
            make_files(layer, self._files)
        else:
            move_files(self._layer, layer)
        settle(layer)
        took = timed(lambda: os.rename(self._mnt / "active" / key, self._mnt / "committed" / key))
        self._layer = layer
        _counted(self._mnt, key)
        return took * 1e3


class _Theirs:
    """The same in containerd."""

    def __init__(self, place: Place, opponent: containerd.Containerd, files: int) -> None:
        self._place, self._client, self._files = place, opponent.client, files
        self._layer: Path | None = None

    def __call__(self) -> float:
        key = self._place.name("commit")
        layer = containerd.upper(self._client.prepare(key))
        if self._layer is None:
            make_files(layer, self._files)
        else:
            move_files(self._layer, layer)
        settle(layer)
        took = timed(lambda: self._client.commit(f"{key}-committed", key))
        self._layer = layer
        return took * 1e3


def commit(place: Place) -> Iterator[Row]:
    """Commit of a layer of many files."""
    most = place.size(100_000, 2_000)
    opponent = containerd.shared(place)
    growth = place.growth("commit-files", "Commit: more files in the layer", "files", "ms")
    flat: list[Row] = []
    with place.snapfs() as daemon, on(ONE_CPU):
        opponent.run_on(ONE_CPU)
        try:
            for files in (most // 100, most // 10, most):
                row = Row(
                    f"Commit by mv of a layer of {files:,} files",
                    "containerd's Commit of the same",
                    "ms",
                    at_most(0.01) if files == most else None,
                    "rename(2), or one call; the files were flushed before, so that neither pays for that; one CPU",
                )
                flat.append(in_turns(place.rounds, row, _Ours(place, daemon, files), _Theirs(place, opponent, files)))
                for name, figures in (("snapfs", row.ours), ("containerd", row.theirs)):
                    growth.curve(name).points.append((files, sorted(figures)[len(figures) // 2]))
        finally:
            opponent.run_on(ALL_CPUS)
    yield flat[-1]
    yield from flat[:-1]
    yield Row(
        f"Commit by mv of a layer of {most:,} files",
        f"Commit by mv of a layer of {most // 100:,} files",
        "ms",
        at_most(1.2),
        "flat in the number of files: the figures of above",
        flat[-1].ours,
        flat[0].ours,
    )


def meanwhile(place: Place) -> Iterator[Row]:
    """Prepare while a Commit runs: from the rename until the files are flushed and counted."""
    files, calls = place.size(100_000, 2_000), place.size(100, 20)
    row = Row(
        f"Prepare while a Commit of {files:,} files runs, worst of {calls}",
        "its p99 when idle",
        "ms",
        at_most(2),
        f"{calls} times mkdir(2) by a second thread from just before the rename(2) of files just made, not yet flushed; "
        "three times as many before; not pinned",
    )
    during = Row(f"{row.what}: how many of them until flushed and counted", "", "calls", None, "")
    with place.snapfs() as daemon:
        mnt = daemon.mnt
        for _ in range(place.rounds):
            key = place.name("big")
            os.mkdir(mnt / "active" / key)
            layer = layer_of(mnt, f"active/{key}")
            settle(layer)
            idle = each_takes(3 * calls, lambda: os.mkdir(mnt / "active" / place.name("idle")))
            make_files(layer, files)
            took: list[tuple[float, float]] = []

            def prepare(took: list[tuple[float, float]] = took) -> None:
                for _ in range(calls):
                    began = time.perf_counter()
                    os.mkdir(mnt / "active" / place.name("busy"))
                    took.append((time.perf_counter(), time.perf_counter() - began))

            client = threading.Thread(target=prepare)
            client.start()
            os.rename(mnt / "active" / key, mnt / "committed" / key)
            fd = os.open(mnt / "committed" / key, os.O_RDONLY)
            os.fsync(fd)
            os.close(fd)
            _counted(mnt, key)
            done = time.perf_counter()
            client.join()
            row.ours.append(max(seconds for _, seconds in took) * 1e3)
            row.theirs.append(p99(idle) * 1e3)
            during.ours.append(sum(when < done for when, _ in took))
    yield row
    yield during


def flushed(place: Place) -> Iterator[Row]:
    """Commit and sync of files just written, beside a plain flush of the same."""
    files = place.size(1000, 100)
    row = Row(
        f"mv and sync committed/N of {files:,} files just written",
        "sync -f of the same files written plainly",
        "ms",
        at_most(1.2),
        "4 KiB each, written through rootfs; rename(2), then fsync(2) of the committed directory; syncfs(2) for the plain ones",
    )
    with place.snapfs() as daemon, place.directory("plain") as plain:
        mnt = daemon.mnt

        def ours() -> float:
            key = place.name("written")
            os.mkdir(mnt / "active" / key)
            make_files(Path(os.readlink(mnt / "active" / key / "rootfs")), files, 4096)

            def act() -> None:
                os.rename(mnt / "active" / key, mnt / "committed" / key)
                fd = os.open(mnt / "committed" / key, os.O_RDONLY)
                os.fsync(fd)
                os.close(fd)

            return timed(act) * 1e3

        def theirs() -> float:
            directory = plain / place.name("written")
            directory.mkdir()
            make_files(directory, files, 4096)
            return timed(lambda: settle(directory)) * 1e3

        for side in (ours, theirs):
            settle(plain)
            side()
        settled = Row(row.what, row.against, row.unit, row.target, row.note)

        def fresh(side: object) -> float:
            settle(plain)
            return ours() if side is ours else theirs()

        yield in_turns(place.rounds * 2, settled, lambda: fresh(ours), lambda: fresh(theirs))
