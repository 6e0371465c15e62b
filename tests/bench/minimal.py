"""The opponent in C (``minimal.c``): compiled once a run, mounted as snapfs is."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.bench.place import ALL_CPUS, Place

_SOURCE = Path(__file__).with_name("minimal.c")

_OPTIONS = "fsname=minimal,subtype=minimal,nosuid,nodev,noatime"  # as snapfs/fuse/serve.py


def _compiled(place: Place) -> Path:
    @contextmanager
    def make() -> Iterator[Path]:
        program = place.base / "minimal"
        found = subprocess.run(["pkg-config", "--cflags", "--libs", "fuse3"], check=True, capture_output=True, text=True)
        flags = shlex.split(found.stdout)
        subprocess.run(["gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-o", program, _SOURCE, *flags], check=True)
        yield program

    return place.shared("minimal", make)


@contextmanager
def minimal(place: Place, entries: int = 0, cpus: set[int] = ALL_CPUS) -> Iterator[Path]:
    """The file system in C, mounted for a block: where.  ``committed`` holds so many entries, called s00000001 and so on."""
    program = _compiled(place)
    with (
        place.directory("minimal") as mountpoint,
        place.ready([str(program), str(mountpoint), str(entries), "-o", _OPTIONS], cpus),
    ):
        yield mountpoint
