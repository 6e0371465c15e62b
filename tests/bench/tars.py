"""layer.tar beside GNU tar, which packs the same layer into a pipe."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from tests.bench.commit import layer_of
from tests.bench.files import make_files, move_files
from tests.bench.place import Place, settle, timed
from tests.bench.rows import Row, at_most, in_turns
from tests.daemon import Daemon

SMALL = 1000  # bytes of a small file
AT_ONCE = 1 << 20  # bytes that both are read by


def _drain(fd: int) -> None:
    """Read to the end."""
    while os.read(fd, AT_ONCE):
        pass


def _packed(layer: Path) -> float:
    """Milliseconds until all of what GNU tar makes was read."""

    def pack() -> None:
        command = ["tar", "--sort=name", "--numeric-owner", "--format=pax", "-C", str(layer), "-cf", "-", "."]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as tar:
            assert tar.stdout is not None
            _drain(tar.stdout.fileno())
        assert tar.returncode == 0

    return timed(pack) * 1e3


def _read(path: Path) -> float:
    """Milliseconds to open, read and close a file."""

    def read() -> None:
        fd = os.open(path, os.O_RDONLY)
        try:
            _drain(fd)
        finally:
            os.close(fd)

    return timed(read) * 1e3


class _Fresh:
    """A layer, committed again before each reading, so that neither its headers nor its digest are known."""

    def __init__(self, place: Place, daemon: Daemon, fill: Callable[[Path], None]) -> None:
        self._place, self._mnt = place, daemon.mnt
        self.key = ""
        self.layer = self._committed(fill)

    @property
    def path(self) -> Path:
        return self._mnt / "committed" / self.key / "layer.tar"

    def _committed(self, fill: Callable[[Path], None]) -> Path:
        self.key = self._place.name("tar")
        os.mkdir(self._mnt / "active" / self.key)
        layer = layer_of(self._mnt, f"active/{self.key}")
        fill(layer)
        settle(layer)
        os.rename(self._mnt / "active" / self.key, self._mnt / "committed" / self.key)
        (self._mnt / "committed" / self.key / "usage.json").read_bytes()  # nothing goes on any more
        return layer

    def __call__(self) -> float:
        self.layer = self._committed(partial(move_files, self.layer))
        return _read(self.path)


def tars(place: Place) -> Iterator[Row]:
    """The first reading, which makes the index and the digest, and those after it."""
    files, large = place.size(100_000, 2_000), place.size(1 << 30, 16 << 20)

    def small(layer: Path) -> None:
        make_files(layer, files, SMALL)

    def one(layer: Path) -> None:
        with (layer / "large").open("wb") as file:
            for _ in range(large >> 20):
                file.write(os.urandom(1 << 20))

    with place.snapfs() as daemon:
        for what, fill in ((f"{files:,} files of {SMALL:,} bytes", small), (f"one file of {large >> 20:,} MiB", one)):
            layer = _Fresh(place, daemon, fill)
            rows = [
                Row(
                    f"layer.tar of {what}, warm, {when}",
                    "GNU tar",
                    "ms",
                    target,
                    "open, read and close; tar as a whole process, to a pipe, from which it is read; not pinned",
                )
                for when, target in (("first", None), ("again", at_most(1.5)))
            ]
            _packed(layer.layer)
            in_turns(place.rounds, rows[0], layer, lambda: _packed(layer.layer))  # noqa: B023
            in_turns(place.rounds, rows[1], lambda: _read(layer.path), lambda: _packed(layer.layer))  # noqa: B023
            yield from rows
