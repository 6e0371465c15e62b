"""The command snapfs as a whole process, beside ctr, and beside a Python that does nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from tests.bench import containerd
from tests.bench.place import ONE_CPU, Place, on, run, without
from tests.bench.rows import Row, at_most, in_turns, p50


def command(place: Place) -> Iterator[Row]:
    """What the command adds to Python's own start; snapfs prepare and ls, beside ctr snapshots prepare and ls; snapfs run
    --from, beside a run in what is there."""
    yield from _starts(place)
    if os.environ.get("X"):
        return
    program = Path(sys.executable).with_name("snapfs")
    calls, listed = place.size(10, 2), place.size(100, 10)
    note = "whole processes, from fork to end, their output thrown away; durable; not pinned; median of some"
    verbs = {
        "prepare": Row("the command snapfs prepare", "ctr snapshots prepare", "ms", at_most(2), note),
        "ls": Row(f"the command snapfs ls of {listed} snapshots", "ctr snapshots ls of as many", "ms", at_most(2), note),
    }
    for verb, row in list(verbs.items()):
        if subprocess.run([program, verb, "--help"], capture_output=True, check=False).returncode:
            row.missing = "not there yet"
            yield verbs.pop(verb)
    if not verbs:
        return
    opponent = containerd.shared(place)
    ctr = ("ctr", "--address", opponent.address, "--namespace", "command", "snapshots")
    with place.snapfs() as daemon:
        at = ("--at", daemon.mnt)
        for _ in range(listed):
            os.mkdir(daemon.mnt / "active" / place.name("listed"))
            run(*ctr, "prepare", place.name("listed"))

        def some(*words: str | Path, fresh: bool) -> float:
            took = []
            for _ in range(calls):
                took.append(run(*words, *([place.name("command")] if fresh else [])) * 1e3)
            return p50(took)

        if "ls" in verbs:
            yield in_turns(
                place.rounds,
                verbs["ls"],
                partial(some, program, "ls", *at, fresh=False),
                partial(some, *ctr, "ls", fresh=False),
            )
        if "prepare" in verbs:
            yield in_turns(
                place.rounds,
                verbs["prepare"],
                partial(some, program, "prepare", *at, fresh=True),
                partial(some, *ctr, "prepare", fresh=True),
            )
        yield _runs(place, program, daemon.mnt)


def _starts(place: Place) -> Iterator[Row]:
    """The verbs of which scripts make many, beside the start and the end of their interpreter, with all that is installed."""
    program, python = Path(sys.executable).with_name("snapfs"), sys.executable
    calls, listed = place.size(20, 2), place.size(100, 10)
    note = "whole processes, from fork to end; durable; all on one processor, the daemon too; median of some"
    with without("PYTHONDONTWRITEBYTECODE"), on(ONE_CPU), place.snapfs(cpus=ONE_CPU) as daemon:
        at = ("--at", daemon.mnt)
        for _ in range(listed):
            os.mkdir(daemon.mnt / "active" / place.name("listed"))
        os.mkdir(daemon.mnt / "active/web")

        def some(*words: str | Path, fresh: bool = False) -> float:
            return p50([run(*words, *([place.name("made")] if fresh else [])) for _ in range(calls)]) * 1e3

        for what, side in (
            (f"ls of {listed} snapshots", partial(some, program, "ls", *at)),
            ("prepare", partial(some, program, "prepare", *at, fresh=True)),
            ("checkpoint", partial(some, program, "checkpoint", *at, "web")),
        ):
            side()  # it is compiled by then
            row = Row(f"the command snapfs {what}", "python3 -c pass, with site", "ms", at_most(1.25), note)
            yield in_turns(place.rounds, row, side, partial(some, python, "-c", "pass"))


def _runs(place: Place, program: Path, mnt: Path) -> Row:
    """A command in a workspace of its own, which is made, looked through and removed for it."""
    base, workspace = place.name("base"), place.name("workspace")
    os.mkdir(mnt / "active" / base)
    os.rename(mnt / "active" / base, mnt / "committed" / base)
    run(program, "prepare", "--at", mnt, workspace, "--parent", base)
    row = Row(
        "snapfs run --from NAME --discard true", "snapfs run KEY true", "ms", None, "whole processes; durable; not pinned"
    )
    return in_turns(
        place.rounds,
        row,
        lambda: run(program, "run", "--at", mnt, "--from", base, "--discard", "true") * 1e3,
        lambda: run(program, "run", "--at", mnt, workspace, "true") * 1e3,
    )
