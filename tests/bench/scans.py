"""Usage and changes of large layers, beside the tools that walk the same files."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from tests.bench.commit import layer_of
from tests.bench.files import make_files
from tests.bench.place import Place, run, settle, timed
from tests.bench.rows import Row, at_most, in_turns


def _read(path: str) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        while os.read(fd, 1 << 20):
            pass
    finally:
        os.close(fd)


def _reading(path: str) -> float:
    """Milliseconds to read all of a file."""
    return timed(lambda: _read(path)) * 1e3


def _command(*command: str | Path) -> float:
    """Milliseconds of a process."""
    return run(*command) * 1e3


def patches(place: Place) -> Iterator[Row]:
    """changes.patch beside what compares the same two trees."""
    files = place.size(100_000, 2_000)
    with place.snapfs() as daemon:
        base, few, all_of_them = (place.name(name) for name in ("base", "few", "all"))
        os.mkdir(daemon.mnt / "active" / base)
        below = layer_of(daemon.mnt, f"active/{base}")
        make_files(below, files)
        names = [path.relative_to(below) for path in below.rglob("*") if path.is_file()]
        for name in names:
            (below / name).write_text(f"{name}\n" * 5)
        os.rename(daemon.mnt / "active" / base, daemon.mnt / "committed" / base)
        below = layer_of(daemon.mnt, f"committed/{base}")
        for key, copied in ((few, names[:10]), (all_of_them, names)):
            os.mkdir(daemon.mnt / "committed" / base / "active" / key)
            layer = layer_of(daemon.mnt, f"active/{key}")
            for name in copied:
                (layer / name).parent.mkdir(parents=True, exist_ok=True)
                (layer / name).write_text(f"{name}\n" * 5)
            for name in names[:10]:
                (layer / name).write_text(f"{name}\n" * 4 + "changed\n")
            settle(layer)
        layer = layer_of(daemon.mnt, f"active/{all_of_them}")
        directory = f"{daemon.mnt}/active"
        row = Row(
            f"changes.patch, ten lines changed on {files:,} files, warm",
            "changes of the same",
            "ms",
            at_most(2) if files == 100_000 else None,
            "open, read and close of both, of an active snapshot whose layer has ten files; not pinned",
        )
        in_turns(
            place.rounds,
            row,
            partial(_reading, f"{directory}/{few}/changes.patch"),
            partial(_reading, f"{directory}/{few}/changes"),
        )
        yield row
        for other, command in (("diff -ruN", ("diff", "-ruN")), ("git diff --no-index", ("git", "diff", "--no-index"))):
            row = Row(
                f"changes.patch, {files:,} files opened for writing, ten lines changed, warm",
                other,
                "ms",
                None,
                "the other as a whole process, on the two layers as directories; not pinned",
            )
            in_turns(
                place.rounds,
                row,
                partial(_reading, f"{directory}/{all_of_them}/changes.patch"),
                partial(_differing, *command, below, layer),
            )
            yield row


def _differing(*command: str | Path) -> float:
    """Milliseconds of a process that ends with 1, for it has found differences."""

    def call() -> None:
        assert subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode == 1

    return timed(call) * 1e3


def scans(place: Place) -> Iterator[Row]:
    """Usage beside du, changes beside find."""
    most = place.size(100_000, 2_000)
    growths = {
        "usage": place.growth("usage-files", "Usage of an active snapshot: more files in the layer", "files", "ms"),
        "changes": place.growth("changes-files", "changes of an active snapshot: more files in the layer", "files", "ms"),
    }
    with place.snapfs() as daemon:
        for files in (most // 100, most // 10, most):
            key = place.name("scan")
            os.mkdir(daemon.mnt / "active" / key)
            layer = layer_of(daemon.mnt, f"active/{key}")
            make_files(layer, files)
            settle(layer)
            run("du", "-s", layer)  # warm
            directory = f"{daemon.mnt}/active/{key}"
            usage = Row(
                f"Usage of {files:,} files, warm",
                "du -s",
                "ms",
                at_most(1.6) if files == most else None,
                "open, read and close of an active snapshot's usage.json; du as a whole process; not pinned",
            )
            changes = Row(
                f"changes of {files:,} files, warm",
                "find on the same layer",
                "ms",
                at_most(2) if files == most else None,
                "open, read and close of an active snapshot's changes, without parent; find as a whole process; not pinned",
            )
            in_turns(
                place.rounds,
                usage,
                partial(_reading, f"{directory}/usage.json"),
                partial(_command, "du", "-s", layer),
            )
            in_turns(
                place.rounds,
                changes,
                partial(_reading, f"{directory}/changes"),
                partial(_command, "find", layer),
            )
            for name, row, other in (("usage", usage, "du -s"), ("changes", changes, "find")):
                growths[name].curve(f"snapfs {name}").points.append((files, sorted(row.ours)[len(row.ours) // 2]))
                growths[name].curve(other).points.append((files, sorted(row.theirs)[len(row.theirs) // 2]))
            if files == most:
                yield usage
                yield changes
