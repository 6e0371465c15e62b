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
from tests.processes import worked

SMALL = 1000  # bytes of a small file
AT_ONCE = 1 << 20  # bytes that both are read by


def _drain(fd: int) -> None:
    """Read to the end."""
    while os.read(fd, AT_ONCE):
        pass


def _pack(layer: Path) -> None:
    """Read all of what GNU tar makes."""
    command = ["tar", "--sort=name", "--numeric-owner", "--format=pax", "-C", str(layer), "-cf", "-", "."]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as tar:
        assert tar.stdout is not None
        _drain(tar.stdout.fileno())
    assert tar.returncode == 0


def _read(path: Path) -> None:
    """Open, read and close a file."""
    fd = os.open(path, os.O_RDONLY)
    try:
        _drain(fd)
    finally:
        os.close(fd)


def _processor(pid: int | None) -> float:
    """Seconds that this process, those that it has started and waited for, and process ``pid`` have had a processor."""
    own = sum(os.times()[:4])
    if pid is None:
        return own
    return own + worked(pid)


def _costs(act: Callable[[], None], processor: list[float], pid: int | None = None) -> float:
    """Milliseconds that ``act`` takes; of those of processors, the daemon's with process ``pid`` too, one more in
    ``processor``."""
    before = _processor(pid)
    took = timed(act) * 1e3
    processor.append((_processor(pid) - before) * 1e3)
    return took


class _Fresh:
    """A layer, committed again before each reading, so that neither its headers nor its digest are known."""

    def __init__(self, place: Place, daemon: Daemon, fill: Callable[[Path], None]) -> None:
        self._place, self._mnt = place, daemon.mnt
        assert daemon.process is not None
        self._pid = daemon.process.pid
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

    def first(self, processor: list[float]) -> float:
        """The costs of reading it for the first time."""
        self.layer = self._committed(partial(move_files, self.layer))
        return self.again(processor)

    def again(self, processor: list[float]) -> float:
        """The costs of reading it once more."""
        return _costs(partial(_read, self.path), processor, self._pid)

    def packed(self, processor: list[float]) -> float:
        """The costs of GNU tar."""
        return _costs(partial(_pack, self.layer), processor)


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
            _pack(layer.layer)
            for when, act, target in (("first", layer.first, None), ("again", layer.again, at_most(1.5))):
                named = f"layer.tar of {what}, warm, {when}"
                note = "open, read and close; tar as a whole process, to a pipe, from which it is read; not pinned"
                row = Row(named, "GNU tar", "ms", target, note)
                busy = Row(f"{named}: time of processors", "GNU tar", "ms", None, "daemon or tar, and the one who reads")
                in_turns(place.rounds, row, partial(act, busy.ours), partial(layer.packed, busy.theirs))
                yield from (row, busy)
