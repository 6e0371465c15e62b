"""Reading and writing under rootfs with fio, beside the same overlay mounted by hand."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from snapfs.kernel import mounting
from tests.bench.place import Place, settle
from tests.bench.prepare import make_base
from tests.bench.rows import Row, at_least, in_turns

_JOBS = {
    "4 KiB random reads": ("randread", "4k"),
    "4 KiB random writes": ("randwrite", "4k"),
    "1 MiB sequential reads": ("read", "1m"),
    "1 MiB sequential writes": ("write", "1m"),
}


def _fio(place: Place, directory: Path, pattern: str, block: str) -> float:
    """MiB a second."""
    mebibytes = place.size(64, 4)
    file = directory / "bench.0.0"  # as fio calls it
    file.unlink(missing_ok=True)  # where its pages lie in memory, and how large they are, is luck: it must not stay on one side
    file.write_bytes(os.urandom(1 << 20) * mebibytes)
    settle(directory)
    command = ["fio", "--name=bench", f"--directory={directory}", f"--rw={pattern}", f"--bs={block}", f"--size={mebibytes}m"]
    command += ["--ioengine=psync", "--invalidate=0", "--time_based", f"--runtime={place.size(1000, 100)}ms"]
    command += ["--randseed=1", "--output-format=json"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=place.base)
    job = json.loads(done.stdout)["jobs"][0]
    rate: float = job["write" if "write" in pattern else "read"]["bw_bytes"] / (1 << 20)
    return rate


def throughput(place: Place) -> Iterator[Row]:
    """fio, side by side."""
    with place.snapfs() as daemon, place.directory("by-hand") as by_hand:
        make_base(daemon.mnt)
        os.mkdir(daemon.mnt / "committed/base/active/fio")
        rootfs = Path(os.readlink(daemon.mnt / "active/fio/rootfs"))
        for part in ("lower", "upper", "work", "merged"):
            (by_hand / part).mkdir()
        options = f"lowerdir={by_hand}/lower,upperdir={by_hand}/upper,workdir={by_hand}/work,index=off"
        mounting.mount("overlay", str(by_hand / "merged"), "overlay", options=options)
        for what, (pattern, block) in _JOBS.items():
            row = Row(
                f"{what} under rootfs",
                "the same overlay mounted by hand",
                "MiB/s",
                at_least(0.95),
                "fio, psync, page cache, a file of 64 MiB made anew each time; 1.0 is the aim, 0.95 what noise leaves of it; "
                "not pinned",
            )
            yield in_turns(
                2 * place.rounds,
                row,
                partial(_fio, place, rootfs, pattern, block),
                partial(_fio, place, by_hand / "merged", pattern, block),
            )
        mounting.unmount(str(by_hand / "merged"))
