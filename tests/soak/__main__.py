"""``python -m tests.soak``: run it, say what was done and how long it took, and end with 1 if anything was wrong."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pickle
import random
import signal
import sys
import tempfile
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from tests.daemon import Daemon
from tests.mounts import own_mount_namespace
from tests.processes import die_with_parent
from tests.soak import verdict
from tests.soak.client import Board, Client, Event, Excused, Report, Violation
from tests.soak.model import BASE, BASE_FILES
from tests.soak.private import Private
from tests.soak.shared import Shared
from tests.soak.watch import MOST, WARM, Followed, Moment, Sample, Trend, follow, measure, sample, trends

CRAWLS = 1 / 1500  # of the operations; each is thousands of calls

PAUSE = 0.4
"""Seconds that a client rests at most between two operations, each of which is a dozen calls.  Without rest all clients soon
queue up for the one lock that the kernel has for renames from a directory to another, and what is measured is that queue."""

STUCK = 60.0  # seconds in one call after which nobody waits any longer

IDLE = 3.0  # seconds after which an unused rootfs is unmounted, so that this happens all the time


def work(number: int, root: str, seed: int, board: Board, base: int, until: float, pause: float) -> Report:
    """Be client ``number``, who rests up to ``pause`` seconds between two operations."""
    client = Client(number, root, seed, board)
    private, shared = Private(client, base), Shared(client)
    does: dict[Callable[[], None], int] = private.operations() | shared.operations()
    try:
        while time.monotonic() < until and not board.stopped:
            if client.pick.random() < CRAWLS:
                operation: Callable[[], None] = shared.crawl
            else:
                [operation] = client.pick.choices(list(does), weights=list(does.values()))
            with contextlib.suppress(Excused):
                operation()
            time.sleep(client.pick.random() * pause)
        if not board.stopped:
            private.look.check_all()
    except Violation as violation:
        client.report.violation = violation.name, f"client {number}, {operation.__name__}: {violation.sentence}"
        board.stop()
    for its in private.model.snapshots.values():
        client.report.holds[its.number] = its.key, str(its.kind), its.parent, its.labels
    return client.ended()


class Helper:
    """A process of ours that hands back what ``work`` gives."""

    def __init__(self, place: Path, work: Callable[[], object]) -> None:
        self._place = place
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                die_with_parent()
                place.write_bytes(pickle.dumps(work()))
                status = 0
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                os._exit(status)

    def has_ended(self) -> bool:
        pid, _ = os.waitpid(self.pid, os.WNOHANG)
        return pid != 0

    def wait(self) -> object:
        os.waitpid(self.pid, 0)
        return self.result()

    def result(self) -> object:
        return pickle.loads(self._place.read_bytes())


@contextlib.contextmanager
def served(place: Path, clients: int) -> Iterator[Daemon]:
    """A daemon for so many clients, each of whom may be in one rootfs at a time."""
    daemon = Daemon(place / "root", place / "mnt", f"--rootfs-idle={IDLE}", f"--rootfs-max={16 + clients * 3 // 2}")
    daemon.program = ("-m", "tests.soak.served", str(place / "used"))
    try:
        yield daemon.start()
    finally:
        os.chdir("/")
        daemon.cleanup()


def make_base() -> int:
    """The snapshot that is always there; its id."""
    os.mkdir(f"active/{BASE}")
    for name, content in BASE_FILES.items():
        Path(f"active/{BASE}/diff/{name}").write_bytes(content)
    os.rename(f"active/{BASE}", f"committed/{BASE}")
    number: int = json.loads(Path(f"committed/{BASE}/info.json").read_text())["id"]
    return number


class Soak:
    """One run."""

    def __init__(self, place: Path, clients: int, seconds: float, seed: int, pause: float) -> None:
        self.place = place
        self.count = clients
        self.seconds = seconds
        self.seed = seed
        self.pause = pause
        self.board = Board(clients)
        self.watching = Board(0)  # stops when all clients have
        self.samples: list[Sample] = []
        self.reports: list[Report] = []
        self.followed = Followed([], [])
        self.moments: list[Moment] = []
        self.wrong: list[str] = []
        self.answered: dict[str, dict[str, dict[str, float]]] = {}
        self.began = self.ended = 0.0

    def run(self) -> bool:
        """Whether all was well; says so."""
        with served(self.place, self.count) as daemon:
            os.chdir(daemon.mnt)
            base = make_base()
            watchers = [
                Helper(self.place / "followed", lambda: follow(self.watching)),
                Helper(self.place / "moments", lambda: measure(self.watching, self.place)),
            ]
            self.began = time.monotonic()
            until = self.began + self.seconds
            clients = {
                n: Helper(
                    self.place / f"client-{n}",
                    partial(work, n, str(daemon.root), self.seed, self.board, base, until, self.pause),
                )
                for n in range(self.count)
            }
            self.watch(daemon, clients)
            self.ended = time.monotonic()
            if self.wrong:
                return self.say()
            self.wait_for_quiet(daemon)
            self.watching.stop()
            followed, moments = (watcher.wait() for watcher in watchers)
            assert isinstance(followed, Followed)
            assert isinstance(moments, list)
            self.followed, self.moments = followed, moments
            os.chdir("/")
            status = daemon.stop()
            if status or len(daemon.said) != 1:
                self.wrong.append(f"the daemon ended with {status} and said {daemon.said}")
        self.judge()
        return self.say()

    def watch(self, daemon: Daemon, clients: dict[int, Helper]) -> None:
        """Sample the daemon until all clients have ended."""
        next_sample = time.monotonic() + 1
        running = dict(clients)
        while running:
            time.sleep(0.05)
            now = time.monotonic()
            if now >= next_sample:
                self.samples.append(sample(daemon.pid, daemon.root))
                os.kill(daemon.pid, signal.SIGUSR1)
                next_sample += 1
            for n, helper in list(running.items()):
                if helper.has_ended():
                    del running[n]
                    report = helper.result()
                    assert isinstance(report, Report)
                    self.reports.append(report)
                    continue
                since, what = self.board.waiting(n)
                if since and now - since > STUCK:
                    self.wrong.append(f"client {n} waits since {now - since:.0f} s in {what}")
            if self.wrong:
                os.kill(daemon.pid, signal.SIGUSR2)
                time.sleep(1)
                daemon.stop(signal.SIGKILL)
                self.wrong += daemon.said
                return

    def wait_for_quiet(self, daemon: Daemon) -> None:
        """Removed files are deleted and unused file systems unmounted soon after the last call."""
        self.samples.append(sample(daemon.pid, daemon.root))
        end = time.monotonic() + IDLE + 30
        while True:
            stats = json.loads(Path(".snapfs/stats.json").read_text())
            waiting = stats["trash_waiting"], stats["mounts_held"]
            self.answered = stats["operations"]
            if waiting == (0, 0) and not os.listdir(daemon.root / "trash"):
                return
            if time.monotonic() > end:
                self.wrong.append(f"the trash has {waiting[0]} directories, and {waiting[1]} file systems are mounted")
                return
            time.sleep(0.2)

    def judge(self) -> None:
        history = verdict.History(self.followed.events)
        history.counted -= Counter([Event("prepare", BASE), Event("commit", BASE, BASE)])
        violations = [report.violation for report in self.reports if report.violation is not None]
        self.wrong += [sentence for _, sentence in violations]
        for name, _ in violations:
            self.wrong += self.tell_of(name)
        self.wrong += history.wrong
        if not violations:
            self.wrong += verdict.same_events(history, self.reports)
            self.wrong += verdict.same_refusals(self.followed.errors, self.reports)
            self.wrong += verdict.same_records(self.place / "root", history, self.reports)
            self.wrong += verdict.same_contents(self.place / "root", history, self.reports)
        self.wrong += verdict.too_slow(self.reports, self.moments)
        self.samples += [Sample(*json.loads(line)) for line in (self.place / "used").read_text().splitlines()]
        self.wrong += [f"not flat: {trend}" for trend in self.trends() if not trend.is_flat]

    def tell_of(self, path: str) -> list[str]:
        """All that is known of the snapshot that ``path`` names, in order."""
        parts = [part for part in path.split("/") if part not in ("active", "view", "committed", "", "..", "labels")]
        name = parts[0] if parts else path
        calls = [(call, report.number) for report in self.reports for call in report.history]
        found = [(call, n) for call, n in calls if name in call.path.replace(" ", "/").split("/")]
        found.sort(key=lambda its: its[0].began)
        lines = [
            f"  {call.began - self.began:9.4f} client {n:2} {call.operation} {call.path}: {call.outcome} in {call.took:.4f}"
            for call, n in found
        ]
        quoted = json.dumps(name.replace("%2F", "/").replace("%25", "%"), ensure_ascii=False)
        told = [f"  event: {line}" for line in self.followed.events if quoted in line]
        errors = [f"  error_log: {line}" for line in self.followed.errors if name in line]
        return [f"what is known of {name}:", *lines[-60:], *told[-20:], *errors[-20:]]

    def trends(self) -> list[Trend]:
        calls = sum(report.outcomes.total() for report in self.reports)
        return trends(self.samples, self.began, self.ended, calls)

    def say(self) -> bool:
        latencies: dict[str, array[float]] = {}
        outcomes: Counter[str] = Counter()
        for report in self.reports:
            outcomes += report.outcomes
            for operation, taken in report.latencies.items():
                latencies.setdefault(operation, array("f")).extend(taken)
        total, lasted = sum(map(len, latencies.values())), self.ended - self.began
        print(f"{self.count} clients, {lasted:.0f} s, seed {self.seed}: {total} calls, {total / lasted:.0f} a second")
        print(f"{len(self.followed.events)} events, {len(self.followed.errors)} lines in error_log")
        late = sum(report.late for report in self.reports)
        print(f"{late} times a client stood still on its way into a rootfs until that was unmounted")
        print(f"\n{'milliseconds':16} {'calls':>9} {'p50':>9} {'p99':>9} {'max':>9}  outcomes")
        for operation in sorted(latencies):
            ordered = sorted(latencies[operation])
            p50, p99, most = (1000 * ordered[int(share * (len(ordered) - 1))] for share in (0.5, 0.99, 1.0))
            seen = {key.rpartition(" ")[2]: n for key, n in outcomes.items() if key.rpartition(" ")[0] == operation}
            shown = " ".join(f"{name}:{n}" for name, n in sorted(seen.items(), key=lambda its: -its[1]))
            print(f"{operation:16} {len(ordered):9} {p50:9.2f} {p99:9.2f} {most:9.2f}  {shown}")
        if self.moments:
            overslept = 1000 * max(its.overslept for its in self.moments)
            fsync = 1000 * max(its.fsync for its in self.moments)
            print(f"\nthe machine: a sleeper overslept at most {overslept:.0f} ms, an fsync took at most {fsync:.0f} ms")
        print(f"\n{'the daemon':16} {'half-time':>9} {'end':>9} {'bound':>9} {'most':>9} {'bound':>9}")
        for name, middle, end, bound, most in self.trends():
            print(f"{name:16} {middle:9.0f} {end:9.0f} {bound:9.0f} {most:9.0f} {MOST[name]:9.0f}")
        if total // 2 < WARM:
            print(f"in fewer than {2 * WARM:,} calls nobody can tell what leaks from what warms up: only the most is judged")
        print(f"\n{'in the daemon':16} {'p50':>9} {'p99':>9} {'max':>9}  of the last thousand, in milliseconds")
        for operation, meter in self.answered.items():
            took = meter["milliseconds"]
            print(f"{operation:16} {took['p50']:9.2f} {took['p99']:9.2f} {took['max']:9.2f}")
        for call in sorted(verdict.slow_calls(self.reports), key=lambda call: -call.took)[:10]:
            when = call.began - self.began
            print(f"slow: {call.operation} {call.path}: {call.outcome} in {call.took:.2f} s, at {when:.1f} s")
        print("\n" + ("\n".join(self.wrong) if self.wrong else "all was well"), flush=True)
        return not self.wrong


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description="Many clients do everything at once.")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    parser.add_argument("--pause", type=float, default=PAUSE, help=f"seconds that a client may rest (default {PAUSE})")
    parser.add_argument("--place", help="where to put ROOT and the mountpoint (default: a temporary directory)")
    given = parser.parse_args()
    own_mount_namespace()
    with tempfile.TemporaryDirectory(prefix="soak-", dir=given.place) as place:
        return 0 if Soak(Path(place), given.clients, given.seconds, given.seed, given.pause).run() else 1


if __name__ == "__main__":
    sys.exit(main())
