"""A directory made a base with a workspace on it, beside cp -a."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.bench.copies import reflinks
from tests.bench.files import make_files
from tests.bench.place import Place, run, settle
from tests.bench.rows import Row, at_most, in_turns

NOTE = "each a process, as root; what adopt has made is on the disk, what cp has made is not; removed after each; not pinned"


def adopting(place: Place) -> Iterator[Row]:
    """snapfs adopt of many files, also with --move, and of a big one, on a disk with reflinks."""
    files, size = place.size(20_000, 500), place.size(1 << 30, 8 << 20)
    with reflinks(place, (1 << 29) + 2 * size) as disk:
        for what, big in ((f"{files:,} files of 1,000 bytes", False), (f"one file of {size >> 20:,} MiB", True)):
            site = disk / ("big" if big else "many")
            site.mkdir()
            if big:
                with (site / "big").open("wb") as file:
                    for _ in range(size >> 20):
                        file.write(os.urandom(1 << 20))
            else:
                make_files(site, files, 1000)
            yield from _beside(place, disk, site, what)


def _beside(place: Place, disk: Path, site: Path, what: str) -> Iterator[Row]:
    program = Path(sys.executable).with_name("snapfs")
    settle(disk)
    with place.snapfs(root=disk / f"root-{site.name}") as daemon:

        def ours(*options: str) -> float:
            took = run(program, "adopt", "--at", daemon.mnt, *options, site, "w") * 1e3
            if options:
                layer = os.readlink(daemon.mnt / "committed/w@0/diff")
                site.rmdir()
                shutil.copytree(layer, site, symlinks=True)
            os.rmdir(daemon.mnt / "active/w")
            os.rmdir(daemon.mnt / "committed/w@0")
            (daemon.mnt / ".snapfs/cleanup").write_text("1")
            settle(disk)
            return took

        def by_cp() -> float:
            took = run("cp", "-a", "--reflink=auto", site, disk / "copy") * 1e3
            shutil.rmtree(disk / "copy")
            settle(disk)
            return took

        for options, target in (((), at_most(3)), (("--move",), at_most(1))) if site.name == "many" else (((), None),):
            name = " ".join(["snapfs adopt", *options])
            row = Row(f"{name} of {what}, on a disk with reflinks", "cp -a --reflink=auto", "ms", target, NOTE)
            yield in_turns(place.rounds, row, lambda options=options: ours(*options), by_cp)  # type: ignore[misc]
