"""A fresh copy of a big file: a workspace made, entered, written to and removed, beside cp; neither side flushes anything."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.bench.place import ONE_CPU, Place, on, run, settle, timed
from tests.bench.rows import Row, Target, at_most, in_turns, p50
from tests.mounts import loop_mounted

MAKE = {"xfs": ("mkfs.xfs", "-q"), "ext4": ("mkfs.ext4", "-q", "-F")}

PAUSE = 0.05  # seconds after a copy, in which the daemon deletes its files and makes directories ahead


def fresh(place: Place) -> Iterator[Row]:
    """On xfs and on ext4, each in a file on the disk to measure on, which is what the recipe of the README makes of xfs."""
    small, big = place.size(100 << 20, 4 << 20), place.size(1 << 30, 4 << 20)
    for kind, bounds in (("xfs", (at_most(3, absolute=True), at_most(5, absolute=True))), ("ext4", (None, None))):
        yield from _on(place, kind, small, bounds[0])
        if big != small:
            yield from _on(place, kind, big, bounds[1])


def _on(place: Place, kind: str, size: int, target: Target | None) -> Iterator[Row]:
    copies = place.size(3 if (kind, size) == ("ext4", 1 << 30) else 10, 2)
    with place.directory(kind) as directory:
        image = directory / "image"
        image.touch()
        os.truncate(image, 3 * size + (1 << 29))
        subprocess.run([*MAKE[kind], image], check=True, stdout=subprocess.DEVNULL)
        with (
            loop_mounted(image, directory / "mounted") as disk,
            place.snapfs("-o", "sync=none", root=disk / "root", cpus=ONE_CPU) as daemon,
        ):
            mnt = daemon.mnt
            os.mkdir(mnt / "active/base")
            _write_big(mnt / "active/base/rootfs/big", size)
            os.rename(mnt / "active/base", mnt / "committed/base")
            original = mnt / "committed/base/diff/big"
            settle(mnt / "committed/base")
            settle(disk)

            def ours() -> float:
                return _some(copies, lambda: _workspace(mnt, place.name("copy")))

            def theirs() -> float:
                return _some(copies, lambda: _by_cp(original.resolve(), disk / place.name("copy")))

            what = f"mkdir, rootfs, a write into a file of {size >> 20:,} MiB, rmdir; on {kind}, sync=none"
            note = "one byte is written; cp is a process, all else calls of one; both on one processor; median of some"
            row = Row(what, "cp --reflink=auto, a write, unlink", "ms", target, note)
            with on(ONE_CPU):
                yield in_turns(place.rounds, row, ours, theirs)


def _write_big(path: Path, size: int) -> None:
    with path.open("wb") as file:
        for _ in range(size >> 20):
            file.write(os.urandom(1 << 20))


def _some(times: int, act: Callable[[], float]) -> float:
    took = []
    for _ in range(times):
        took.append(act())
        time.sleep(PAUSE)
    return p50(took) * 1e3


def _touch(file: str | Path, directory: int | None = None) -> None:
    fd = os.open(file, os.O_WRONLY, dir_fd=directory)
    os.write(fd, b"S")
    os.close(fd)


def _workspace(mnt: Path, name: str) -> float:
    def act() -> None:
        os.mkdir(mnt / "committed/base/active" / name)
        there = os.open(mnt / "active" / name / "rootfs", os.O_PATH | os.O_DIRECTORY)
        _touch("big", there)
        os.close(there)
        os.rmdir(mnt / "active" / name)

    return timed(act)


def _by_cp(original: Path, copy: Path) -> float:
    took = run("cp", "--reflink=auto", original, copy)
    return took + timed(lambda: _touch(copy)) + timed(lambda: os.unlink(copy))
