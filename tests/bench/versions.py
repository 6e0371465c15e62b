"""One path back: snapfs versions and restore, beside what looks through, and copies from, the same states by hand."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from tests.bench.files import make_files
from tests.bench.place import Place, run, settle
from tests.bench.rows import Row, in_turns


def versions(place: Place) -> Iterator[Row]:
    """A workspace of many files with many checkpoints, each of one changed file."""
    program = Path(sys.executable).with_name("snapfs")
    files, kept = place.size(20_000, 500), place.size(100, 5)
    note = f"{files:,} files below; whole processes; sync=none"
    with place.snapfs("-o", "sync=none") as daemon:
        mnt, at = daemon.mnt, ("--at", daemon.mnt)
        os.mkdir(mnt / "active/base")
        layer = Path(os.readlink(mnt / "active/base/diff"))
        (layer / "project").mkdir()
        make_files(layer / "project", files, 1000)
        os.rename(mnt / "active/base", mnt / "committed/base")
        os.mkdir(mnt / "committed/base/active/web")
        settle(mnt / "committed/base")
        for number in range(1, kept + 1):
            rootfs = mnt / "active/web/rootfs"
            (rootfs / "other").write_text(f"{number}\n")
            if number % 10 == 1:
                (rootfs / "project/changed").write_text(f"{number}\n")
            (mnt / "active/web/checkpoint").write_text("a message\n")
        states = f"{kept} checkpoints, {(kept + 9) // 10} of which changed it"
        look = f'for n in $(seq {kept}); do stat -c "%s %Y" {mnt}/committed/web@$n/rootfs/project/changed; done | uniq -c'
        row = Row(f"snapfs versions of a file: {states}", "stat of it in the rootfs of each, mounted anew", "ms", None, note)
        yield in_turns(place.rounds, row, _ms(program, "versions", *at, "web", "project/changed"), _ms("sh", "-c", look))

        rootfs, before = mnt / "active/web/rootfs", mnt / f"committed/web@{kept}/rootfs"
        some = sorted(path.relative_to(layer) for path in (layer / "project").rglob("*") if path.is_file())[:10]

        def changed(act: Callable[[], float]) -> float:
            for path in some:
                (rootfs / path).write_text("changed\n")
            return act()

        path = some[0]
        row = Row("snapfs restore of a file of 1,000 bytes", "cp -a --remove-destination of it", "ms", None, note)
        by_hand = ("cp", "-a", "--remove-destination", before / path, rootfs / path)
        yield in_turns(
            place.rounds,
            row,
            partial(changed, _ms(program, "restore", *at, "web", str(path))),
            partial(changed, _ms(*by_hand)),
        )
        row = Row(
            f"snapfs restore of a directory of {files:,} files, of which 10 changed", "rsync -aHAX --delete", "ms", None, note
        )
        by_hand = ("rsync", "-aHAX", "--delete", before / "project", rootfs)
        yield in_turns(
            place.rounds,
            row,
            partial(changed, _ms(program, "restore", *at, "web", "project")),
            partial(changed, _ms(*by_hand)),
        )


def _ms(*command: str | Path) -> Callable[[], float]:
    return lambda: run(*command) * 1e3
