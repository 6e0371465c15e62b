"""Where a run keeps its files, which processors it uses, and what it has started: all of it gone when it ends, however."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path
from typing import TypeVar

from snapfs.kernel import mounting
from tests.bench.rows import Growth
from tests.daemon import Daemon
from tests.processes import die_with_parent

T = TypeVar("T")

ALL_CPUS = os.sched_getaffinity(0)
ONE_CPU = {max(ALL_CPUS)}
"""For a client and the daemon that it waits for.  On different ones each call would cost two wake-ups across processors, which
on a small virtual machine take longer than the call."""


@contextmanager
def on(cpus: set[int]) -> Iterator[None]:
    """Run the block, and what it starts, on these processors."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def without(variable: str) -> Iterator[None]:
    """Run the block, and what it starts, without this variable in the environment."""
    value = os.environ.pop(variable, None)
    try:
        yield
    finally:
        if value is not None:
            os.environ[variable] = value


def move(pid: int, cpus: set[int]) -> None:
    """Have all threads of process ``pid`` run on these processors, and those that they start."""
    for _ in range(2):  # one may have been started meanwhile
        for thread in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(int(thread), cpus)


def timed(act: Callable[[], object]) -> float:
    """Seconds that ``act`` took."""
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def run(*command: str | Path, cwd: Path | None = None) -> float:
    """Seconds that a whole process took, its output thrown away; raises CalledProcessError."""
    devnull = os.open(os.devnull, os.O_RDWR)
    try:
        arguments = [os.fspath(argument) for argument in command]
        began = time.perf_counter()
        actions = [(os.POSIX_SPAWN_DUP2, devnull, 1)]
        with contextlib.chdir(cwd or "."):
            pid = os.posix_spawnp(arguments[0], arguments, os.environ, file_actions=actions)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        took = time.perf_counter() - began
    finally:
        os.close(devnull)
    if status:
        raise subprocess.CalledProcessError(status, arguments)
    return took


def settle(directory: Path) -> None:
    """Flush what was written so far, that nothing measured later has to."""
    fd = os.open(directory, os.O_RDONLY)
    try:
        mounting.sync_file_system(fd)
    finally:
        os.close(fd)


class Place:
    """One run: ``rounds`` of each measurement, in the directory ``base``, where everything is removed at the end.  ``quick``
    shrinks all sizes; ``million`` asks for the largest."""

    def __init__(self, base: Path, rounds: int, *, quick: bool = False, million: bool = False) -> None:
        self.base = base
        self.rounds = rounds
        self.quick = quick
        self.million = million
        self.growths: dict[str, Growth] = {}
        self._shared: dict[str, object] = {}
        self._ending = ExitStack()
        self._serials = count(1)
        self._began = time.monotonic()

    def __enter__(self) -> Place:
        self.base.mkdir(parents=True)
        self._ending.callback(self._remove, self.base)
        return self

    def __exit__(self, *exception: object) -> None:
        self._ending.close()

    def size(self, full: int, quick: int | None = None) -> int:
        """How many, ``full`` unless the run is to be quick."""
        return full if not self.quick else quick if quick is not None else max(1, full // 100)

    def say(self, what: str) -> None:
        """A word about what is going on, on standard error."""
        print(f"[{time.monotonic() - self._began:6.1f} s] {what}", file=sys.stderr, flush=True)

    def growth(self, file: str, title: str, x: str, unit: str) -> Growth:
        """The plot ``file``, to which several benchmarks may add."""
        return self.growths.setdefault(file, Growth(file, title, x, unit))

    def name(self, kind: str) -> str:
        """A name that nobody has had."""
        return f"{kind}-{next(self._serials)}"

    @contextmanager
    def directory(self, kind: str) -> Iterator[Path]:
        """A fresh directory for a block."""
        path = self.base / self.name(kind)
        path.mkdir()
        try:
            yield path
        finally:
            self._remove(path)

    def shared(self, name: str, make: Callable[[], contextlib.AbstractContextManager[T]]) -> T:
        """What ``make`` made when it was first asked for; kept until the end of the run."""
        if name not in self._shared:
            self._shared[name] = self._ending.enter_context(make())
        found: T = self._shared[name]  # type: ignore[assignment]
        return found

    @contextmanager
    def snapfs(self, *arguments: str, root: Path | None = None, cpus: set[int] = ALL_CPUS) -> Iterator[Daemon]:
        """``snapfs serve`` on a fresh root, or ``root``, for a block."""
        with self.directory("snapfs") as own, on(cpus):
            daemon = Daemon(root or own / "root", own / "mnt", *arguments)
            try:
                yield daemon.start()
                if daemon.process is not None and daemon.process.poll() is None:
                    daemon.stop()
            finally:
                daemon.cleanup()

    @contextmanager
    def ready(self, command: Sequence[str], cpus: set[int] = ALL_CPUS) -> Iterator[int]:
        """A process for a block, from when it says that it is ready: its number.  It dies with us."""
        with on(cpus):
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=die_with_parent)
        with process:
            try:
                assert process.stdout is not None
                assert process.stdout.readline() == "ready\n", f"{command[0]} ended with {process.wait()}"
                yield process.pid
            finally:
                process.terminate()

    @contextmanager
    def process(self, command: Sequence[str], log: Path, cpus: set[int] = ALL_CPUS) -> Iterator[subprocess.Popen[bytes]]:
        """A process for a block, what it says going to ``log``; it dies with us."""
        with on(cpus), log.open("ab") as said:
            started = subprocess.Popen(command, stdout=said, stderr=said, preexec_fn=die_with_parent)
        try:
            yield started
        finally:
            with started:
                started.terminate()
                try:
                    started.wait(timeout=10)
                except subprocess.TimeoutExpired:
                    started.kill()

    def _remove(self, path: Path) -> None:
        for _ in range(3):
            for mounted in sorted(_mounts_below(path), reverse=True):
                subprocess.run(["umount", "-l", mounted], check=False)
            shutil.rmtree(path, ignore_errors=True)
            if not path.exists():
                return
        self.say(f"could not remove {path}")


def _mounts_below(path: Path) -> list[str]:
    prefix = f"{path}/"
    return [
        line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines() if line.split()[4].startswith(prefix)
    ]


def wait_until(holds: Callable[[], bool], what: str, seconds: float = 60) -> None:
    """Return when ``holds``; raises TimeoutError."""
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds} s for {what}")
        time.sleep(0.005)
