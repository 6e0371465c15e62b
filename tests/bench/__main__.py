"""``python -m tests.bench``: measure, print the table, write JSON and plots.  ``--help`` says how to measure less."""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.bench import (
    adopting,
    applies,
    calls,
    command,
    commit,
    copies,
    fresh,
    images,
    listing,
    plot,
    prepare,
    remove,
    scans,
    socket,
    start,
    states,
    table,
    tars,
    throughput,
    versions,
    walk,
)
from tests.bench.place import Place, run
from tests.bench.rows import Growth, Row, p50
from tests.mounts import loop_mounted, own_mount_namespace

ROOM = 32 << 30  # bytes that the disk to measure on may take; what nobody writes costs nothing

BENCHMARKS: dict[str, Callable[[Place], Iterator[Row]]] = {
    "prepare": prepare.one_client,
    "imprints": prepare.imprints,
    "clients": prepare.many_clients,
    "commit": commit.commit,
    "meanwhile": commit.meanwhile,
    "flush": commit.flushed,
    "remove": remove.remove,
    "scans": scans.scans,
    "patches": scans.patches,
    "tars": tars.tars,
    "ls": listing.listing,
    "calls": calls.calls,
    "processor": calls.processor,
    "commands": calls.commands,
    "requests": listing.repeated,
    "layers": calls.chains,
    "walk": walk.walk,
    "start": start.start,
    "fio": throughput.throughput,
    "command": command.command,
    "states": states.states,
    "copies": copies.copies,
    "fresh": fresh.fresh,
    "adopt": adopting.adopting,
    "images": images.images,
    "versions": versions.versions,
    "applies": applies.applies,
    "reads": socket.reads,
    "changes": socket.changes,
    "through": socket.through_containerd,
    "unpacking": images.through_containerd,
}

HOME = Path(__file__).parents[2]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    names = ", ".join(BENCHMARKS)
    parser.add_argument("--only", action="append", metavar="NAME", help=f"measure this only; may be repeated: {names}")
    parser.add_argument("--rounds", type=int, default=5, help="of each measurement (5); medians are of so many")
    parser.add_argument("--quick", action="store_true", help="small sizes: to see that it works, not how fast it is")
    parser.add_argument("--million", action="store_true", help="also start with 1,000,000 snapshots: takes minutes to make")
    parser.add_argument("--where", type=Path, help="a directory on the disk to measure on (ext4, in a file in run)")
    parser.add_argument("--out", type=Path, default=HOME / "run/bench", help="where table, JSON and plots go (run/bench)")
    arguments = parser.parse_args()
    if unknown := set(arguments.only or ()) - set(BENCHMARKS):
        parser.error(f"no benchmark is called {', '.join(sorted(unknown))}; there are {', '.join(BENCHMARKS)}")
    return arguments


@contextmanager
def _disk(where: Path | None) -> Iterator[Path]:
    """``where``, or else an ext4 with a journal in a file: without one it looks for each new inode past all that were freed in
    the last minutes, and that is all that one sees."""
    if where is not None:
        yield where.resolve()
        return
    directory = HOME / "run" / f"disk-{os.getpid()}"
    directory.mkdir(parents=True)
    try:
        with (image := directory / "image").open("xb") as made:
            made.truncate(ROOM)
        subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)
        with loop_mounted(image, directory / "mounted") as disk:
            yield disk
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def main() -> int:
    arguments = _arguments()
    own_mount_namespace()
    signal.signal(signal.SIGTERM, _interrupted)
    results: dict[str, list[Row]] = {}
    failed = False
    began = time.monotonic()
    with (
        _disk(arguments.where) as disk,
        Place(disk / f"bench-{os.getpid()}", arguments.rounds, quick=arguments.quick, million=arguments.million) as place,
    ):
        for name in arguments.only or BENCHMARKS:
            place.say(name)
            rows = results[name] = []
            try:
                for row in BENCHMARKS[name](place):
                    rows.append(row)
                    place.say(f"  {table.spread(row.ratios or row.ours)} {table.verdict(row)}: {row.what}")
            except Exception as error:  # the others can be measured all the same
                failed = True
                traceback.print_exc()
                rows.append(Row(name, "", "", None, "", missing=f"FAILED: {error}"))
        _report(arguments, results, [growth for growth in place.growths.values() if growth.curves], time.monotonic() - began)
        place.say("removing what it made")
    return int(failed)


def _report(arguments: argparse.Namespace, results: dict[str, list[Row]], growths: list[Growth], seconds: float) -> None:
    """Print the table, write all files."""
    start = p50([run(sys.executable, "-c", "pass") for _ in range(9)])
    about = {
        "machine": f"{os.cpu_count()} processors, Linux {platform.release()}, Python {platform.python_version()}",
        "python3 -c pass": f"{start * 1e3:.1f} ms, where targets in ms mean 15",
        "rounds": arguments.rounds,
        "quick": arguments.quick,
        "seconds": round(seconds),
    }
    text = "\n".join(table.lines(results)) + "\n"
    print(text, end="")
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "table.txt").write_text(text)
    (arguments.out / "table.md").write_text("\n".join(table.markdown(results)) + "\n")
    (arguments.out / "figures.json").write_text(table.as_json(results, growths, about))
    for growth in growths:
        (arguments.out / f"{growth.file}.svg").write_text(plot.svg(growth))
    told = ", ".join(f"{key}: {value}" for key, value in about.items())
    print(f"{told}; table, JSON and plots are in {arguments.out}", flush=True)


if __name__ == "__main__":
    for needed in ("containerd", "fio", "gcc", "pkg-config"):
        if shutil.which(needed) is None:
            sys.exit(f"{needed} is missing: make bench installs what it takes")
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("interrupted")
