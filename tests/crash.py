"""Crash tests: kill the daemon between any two of its system calls, start it again, and see what is left (``make crash``).

For each workload the process is killed before its first call that changes something, then, on a fresh root, before its second,
and so on until it ends by itself; then it is killed at rest.  What is left must be what ``tests/crash_invariants.py`` says, and
for each actor the state after its last acknowledged step or after the one that was under way.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from random import Random
from signal import SIGTERM

import trio

from snapfs.kernel import mounting
from snapfs.kernel.mounttable import mount_table
from tests import workloads
from tests.crash_invariants import Found, State, examine
from tests.mounts import own_mount_namespace
from tests.syscalls import KILL, Call, Process, Server, running
from tests.workloads import CLIENTS, GROUND, WORKLOADS, Deed, Step, Workload, after

GONE = {errno.ENOTCONN, errno.ECONNABORTED}
"""What a client's system call on the mount of a killed daemon ends with."""


@dataclass
class Tally:
    """What was done and what came of it."""

    kills: int = 0
    at_rest: int = 0
    points: set[int] = field(default_factory=set)
    before: Counter[str] = field(default_factory=Counter)
    stuck: int = 0
    acknowledged: int = 0
    snapshots: int = 0
    clients: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        calls = ", ".join(f"{name} {count}" for name, count in self.before.most_common())
        said = [
            f"{self.kills} kills between system calls at {len(self.points)} distinct points, {self.at_rest} at rest",
            f"right before: {calls}",
            f"checked after each: {self.acknowledged} acknowledged steps, {self.snapshots} snapshots in all",
        ]
        if self.clients:
            said.append(f"clients' calls on a killed daemon: {dict(self.clients)}")
        if self.stuck:
            said.append(f"killed daemons that ended only when the next one had freed their clients: {self.stuck}")
        said.append(f"lost or broken: {len(self.lost)}")
        return "\n".join(said + self.lost[:20])


class Arena:
    """Where roots are made anew again and again, in ``base``, which should be fast: nothing here depends on a real disk."""

    def __init__(self, server: Server, base: Path) -> None:
        self.server = server
        self.base = base
        self.root = base / "root"
        self.mnt = base / "mnt"
        self.tally = Tally()
        self.mnt.mkdir()
        with server.started(workloads.lay_ground, str(base / "ground")) as process:
            process.hold()
            assert process.errors() == []

    # -- one run

    def run(
        self, workload: Workload, decide: Callable[[Call], int | None], *, order: Random | None = None, probe: bool = False
    ) -> Run:
        """Run ``workload`` on a fresh root with its calls decided by ``decide``, until it has ended."""
        self.clear()
        if not workload.fresh:
            shutil.copytree(self.base / "ground", self.root)
        run = Run(workload.name)
        with ExitStack() as held:
            rootfs = self._go_before(workload, run, held) if workload.before else ""
            process = held.enter_context(self.server.started(workloads.library, str(self.root), workload.name, probe))
            process.hold(run.noting(decide, self.base), order=order)
            run.take(process)
            process.close()
            opened = ["opened"] in process.said
            if opened:
                held.close()  # at its end it may have detached what is in use, or not yet
            run.acks = [sum(message == ["done", n] for message in process.said) for n in range(len(workload.actors))]
            in_use = [rootfs] if rootfs and not opened else []
            try:
                found = trio.run(lambda: examine(self.root, workload.options, given_out=run.given_out, in_use=in_use))
            except Exception as error:
                found = Found(problems=[f"it can't be opened again: {error!r}"])
        ground = after(workload.before, workload.ground())
        run.problems += found.problems
        run.problems += differences(found.state, ground, workload.actors, run.acks, run.failed)
        self.tally.acknowledged += sum(run.acks)
        self.tally.snapshots += len(found.state)
        return run

    def _go_before(self, workload: Workload, run: Run, held: ExitStack) -> str:
        """Have the root used by a process that is killed; the rootfs that is in use from then on, if any."""
        with self.server.started(workloads.go_before, str(self.root), workload.name) as process:
            process.hold(until=lambda: ["ready"] in process.said)
            run.take(process)
        rootfs = next((str(message[1]) for message in process.said if message[0] == "rootfs"), "")
        if rootfs:
            held.callback(os.close, os.open(rootfs, os.O_RDONLY | os.O_DIRECTORY))
        return rootfs

    def run_clients(self, name: str, decide: Callable[[Call], int | None], *, order: Random | None = None) -> Run:
        """Run the clients ``name`` on a mounted tree whose daemon's calls are decided by ``decide``; then kill it, start
        another one and end that properly."""
        self.clear()
        shutil.copytree(self.base / "ground", self.root)
        run = Run(name)
        actors = CLIENTS[name]
        with ExitStack() as held:
            daemon = held.enter_context(self._serving(watch=True))
            clients = [
                held.enter_context(self.server.started(workloads.client, str(self.mnt), name, number))
                for number in range(len(actors))
            ]
            killed = daemon.hold(
                run.noting(decide, self.base),
                until=lambda: all(client.gone for client in clients),
                others=clients,
                order=order,
            )
            if not killed:
                daemon.kill(within=1.0)
            run.stuck = not daemon.ended
            run.take(daemon)
            if not run.stuck:  # else a thread of it waits for a client that waits for it, and the next daemon frees both
                _wait_for(clients, 2)
            with self._serving(watch=False) as second:
                if not (_wait_for(clients, 10) and daemon.wait(10)):
                    run.problems.append("the first daemon, or a client of it, waits for ever")
                listed = {name for kind in ("active", "view", "committed") for name in os.listdir(self.mnt / kind)}
                second.signal(SIGTERM)
                if not second.hold():
                    run.problems.append("the second daemon did not end")
                run.problems += second.errors()
            for client in clients:
                run.acks.append(client.said.count(["done"]))
                run.problems += client.errors()
                for message in client.said:
                    if message[0] == "failed":
                        self.tally.clients[errno.errorcode[int(str(message[1]))]] += 1
                        if message[1] not in GONE or not run.killed:
                            run.problems.append(f"a client met {message[1:]}")
            found = trio.run(lambda: examine(self.root))
        run.problems += found.problems
        run.problems += differences(found.state, workloads.after(GROUND), actors, run.acks, set())
        if listed != set(found.state):
            run.problems.append(f"the tree lists {listed}, and the root holds {set(found.state)}")
        self.tally.acknowledged += sum(run.acks)
        self.tally.snapshots += len(found.state)
        return run

    @contextmanager
    def _serving(self, *, watch: bool) -> Iterator[Process]:
        with self.server.started(workloads.daemon, str(self.root), str(self.mnt), watch) as daemon:
            ended = daemon.hold(until=lambda: ["ready"] in daemon.said)
            assert not ended, daemon.errors()
            yield daemon

    def clear(self) -> None:
        """Unmount and delete what the last run left."""
        for mount in reversed(list(mount_table())):
            if mount.target.startswith(f"{self.base}/"):
                with suppress(FileNotFoundError):  # it went with the mount that it stood on
                    mounting.unmount(mount.target, mounting.MNT_DETACH | mounting.MNT_FORCE)
        shutil.rmtree(self.root, ignore_errors=True)

    # -- many

    def kill_at(self, go: Callable[[Callable[[Call], int | None]], Run], points: Iterable[int]) -> int:
        """Run ``go`` once for each of ``points``, killing before that call; ends when a run has no such call.  How many calls
        that one had."""
        run = None
        for nth in points:
            run = go(lambda call, nth=nth: KILL if call.nth == nth else None)  # type: ignore[misc]
            self._note(run)
            if not run.killed and nth > len(run.trace):
                break
        assert run is not None
        return len(run.trace)

    def _note(self, run: Run) -> None:
        if run.killed:
            self.tally.kills += 1
            self.tally.points.add(hash((run.name, *run.trace)))
            self.tally.before[run.trace[-1].partition("(")[0]] += 1
        else:
            self.tally.at_rest += 1
        self.tally.stuck += run.stuck
        if run.problems:
            where = f"killed before call {len(run.trace)}, {run.trace[-1]}" if run.killed else "killed at rest"
            self.tally.lost.append(f"{run.name}, {where}:\n    " + "\n    ".join(run.problems))


@dataclass
class Run:
    """One run of a workload: the calls made, the last of them the one that was not, if it was ``killed``."""

    name: str
    trace: list[str] = field(default_factory=list)
    killed: bool = False
    stuck: bool = False
    acks: list[int] = field(default_factory=list)
    failed: set[int] = field(default_factory=set)
    given_out: list[int] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def noting(self, decide: Callable[[Call], int | None], base: Path) -> Callable[[Call], int | None]:
        def note(call: Call) -> int | None:
            self.trace.append(_NUMBERS.sub("#", str(call).replace(f"{base}/", "")))
            decision = decide(call)
            self.killed = self.killed or decision == KILL
            return decision

        return note

    def take(self, process: Process) -> None:
        """What ``process`` has said."""
        self.problems += process.errors()
        for message in process.said:
            if message[0] == "ids":
                self.given_out.append(int(str(message[1])))
            elif message[0] == "failed":
                self.failed.add(int(str(message[1])))
                self.words.append(str(message[-1]))
            elif message[0] in ("refused", "mute"):
                self.words.append(f"{message[0]}: {message[1]}")


_NUMBERS = re.compile(r"\d+")


def _wait_for(clients: Sequence[Process], seconds: float) -> bool:
    """Whether all of them end within so many seconds."""
    deadline = time.monotonic() + seconds
    return all(client.wait(max(0.0, deadline - time.monotonic())) for client in clients)


def differences(
    state: State, ground: State, actors: Sequence[Sequence[Step] | Sequence[Deed]], acks: Sequence[int], failed: set[int]
) -> list[str]:
    """What in ``state`` is neither ``ground`` nor what the actors have made of it: each its acknowledged steps, and perhaps the
    next one, unless that has failed."""
    said = []
    touched: set[str] = set()
    for number, (steps, acked) in enumerate(zip(actors, acks, strict=True)):
        states = [after(steps[:count], ground) for count in range(len(steps) + 1)]
        own = {name for one in states for name in {*one, *ground} if one.get(name) != ground.get(name)}
        touched |= own
        allowed = states[acked : acked + (1 if number in failed else 2)]
        if not any(all(state.get(name) == one.get(name) for name in own) for one in allowed):
            now = {name: state.get(name) for name in sorted(own)}
            said.append(f"after {[step.text for step in steps[:acked]]} was acknowledged there is {now}")
    for name in {*state, *ground} - touched:
        if state.get(name) != ground.get(name):
            said.append(f"{name} was {ground.get(name)} and is {state.get(name)}")
    return said


@contextmanager
def arena() -> Iterator[Arena]:
    """An arena on a tmpfs of its own, in a mount namespace of its own."""
    with ExitStack() as stack:
        base = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="snapfs-crash-")))
        mounting.mount("tmpfs", str(base), "tmpfs")
        stack.callback(mounting.unmount, str(base), mounting.MNT_DETACH)
        made = Arena(stack.enter_context(running(["tests.workloads"])), base)
        stack.callback(made.clear)
        yield made


def main() -> int:
    """Kill everywhere; then, where several things go on at once, with the threads in random order, until it was 2,000 times."""
    own_mount_namespace()
    begun = time.monotonic()
    with arena() as made:
        tally = made.tally

        def round_of(order: Random | None, concurrent: bool) -> None:
            for workload in WORKLOADS:
                if not concurrent or len(workload.actors) > 1:
                    made.kill_at(lambda decide, w=workload: made.run(w, decide, order=order), count(1))  # type: ignore[misc]
                    print(f"{tally.kills:5} kills, {len(tally.lost)} losses: {workload.name}", flush=True)
            for name, clients in CLIENTS.items():
                if not concurrent or len(clients) > 1:
                    made.kill_at(lambda decide, n=name: made.run_clients(n, decide, order=order), count(1))  # type: ignore[misc]
                    print(f"{tally.kills:5} kills, {len(tally.lost)} losses: {name}", flush=True)

        round_of(None, False)
        seed = 0
        while (tally.kills < LONG or not seed) and not tally.lost:
            seed += 1
            round_of(Random(seed), True)
        print(tally)
        print(f"{time.monotonic() - begun:.0f} s")
    return 1 if tally.lost else 0


LONG = 2000

if __name__ == "__main__":
    logging.disable()
    sys.exit(main())
