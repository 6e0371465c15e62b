"""snapfs apply: what changed in a workspace, brought into the directory that it was made of, beside rsync."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.bench.files import A_DIRECTORY, make_files
from tests.bench.place import Place, run, settle
from tests.bench.rows import Row, in_turns

NOTE = "whole processes; a third each added, changed, deleted; apply also keeps what it replaces, and waits for the disk"


def applies(place: Place) -> Iterator[Row]:
    """Few and many of a project's files, into a directory on the same disk."""
    files, few = place.size(5_000, 600), place.size(150, 30)
    yield _row(place, files, few)
    yield _row(place, files, files // 3)


def _row(place: Place, files: int, changed: int) -> Row:
    """So many of ``files`` changed."""
    program = Path(sys.executable).with_name("snapfs")
    row = Row(f"snapfs apply of {changed:,} changes to {files:,} files", "rsync -a --delete", "ms", None, NOTE)
    with place.snapfs() as daemon, place.directory("home") as elsewhere:
        base, key = place.name("base"), place.name("workspace")
        project = elsewhere / "project"
        project.mkdir()
        make_files(project, files, 1000)
        os.mkdir(daemon.mnt / "active" / base)
        run("cp", "-a", f"{project}/.", daemon.mnt / "active" / base / "rootfs/")
        os.rename(daemon.mnt / "active" / base, daemon.mnt / "committed" / base)
        os.mkdir(daemon.mnt / "committed" / base / "active" / key)
        work = daemon.mnt / "active" / key / "rootfs"
        for number in range(changed):
            path = work / f"d{number * 3 // A_DIRECTORY % (files // A_DIRECTORY or 1):04}"
            old = path / f"f{number:06}"
            if number % 3 == 0:
                (path / f"new{number}").write_bytes(b"y" * 1000)
            elif not old.exists():
                continue
            elif number % 3 == 1:
                old.write_bytes(b"y" * 1001)
            else:
                old.unlink()

        def fresh(act: Callable[[Path], float]) -> float:
            """What ``act`` takes on a fresh copy of the project."""
            copy = elsewhere / place.name("copy")
            run("cp", "-a", project, copy)
            settle(elsewhere)
            took = act(copy) * 1e3
            shutil.rmtree(copy)
            return took

        return in_turns(
            place.rounds,
            row,
            lambda: fresh(lambda copy: run(program, "apply", "--at", daemon.mnt, key, copy)),
            lambda: fresh(lambda copy: run("rsync", "-a", "--delete", f"{work}/", f"{copy}/")),
        )
