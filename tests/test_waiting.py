"""Who asks for what takes long, many times at once, keeps nobody else waiting: all other users are answered within two
seconds.  What takes long is held here until the test lets it go, so that it takes as long as the test does."""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from snapfs import Snapshotter, model
from snapfs.errors import Closed, Stale, TryAgain
from snapfs.fuse.cache import KernelCache
from snapfs.fuse.openfiles import OPENERS_OF_USER, OpenFiles
from snapfs.fuse.retelling import Retelling
from snapfs.fuse.waiting import (
    AGAIN,
    ALONE,
    CROWD,
    DIRECTORIES,
    HOLD,
    LINES,
    LISTED,
    LISTINGS_OF_USER,
    LISTINGS_OF_USERS,
    MANY,
    OF_OWNER,
    OF_READER,
    OF_READERS,
    OF_USER,
    OF_USERS,
    PATIENCE,
    READERS_AGAIN,
    RECENT,
    THREADS,
    USERS,
    Crowds,
    Listings,
    Waiting,
)
from snapfs.model import BACKGROUND, OWNER, Caller
from snapfs.rules.root import Root
from snapfs.scan.sharing import Checkpoint, Sharing, Turns
from snapfs.services.naming import Naming
from snapfs.tree import Tree, commands, listing
from snapfs.tree.inodes import WRITERS, WRITING, Writers
from snapfs.tree.state import State
from snapfs.tree.texts import OVERHEAD
from snapfs.tree.users import asker
from tests.daemon import Daemon, bounded
from tests.processes import die_with_parent, until, worked
from tests.refusals import failing
from tests.users import ALICE, BOB, STAFF, alice, bob

pytestmark = pytest.mark.alone

Make = Callable[..., Daemon]

TIME = 2.0  # seconds in which everybody is answered
ON_A_BUSY_MACHINE = 2 * TIME  # the same where others have its processors, too: whoever has to wait here waits without end

# Each count of a layer with a file ``big``, each flush, each emptying of the trash and each search for the processes in a mount
# says so in the file ``begun``, and waits for as long as the test has the lock of that file.
HELD = """
import fcntl, os, snapfs.cli, snapfs.services.counting, snapfs.services.rootfs, snapfs.kernel.mounting, snapfs.root.layers

count, flush, empty = (
    snapfs.services.counting.disk_usage, snapfs.kernel.mounting.sync_file_system, snapfs.root.layers.Layers.empty_trash
)

def hold(what):
    with open({begun!r}, "a") as file:
        file.write(what + "\\n")
        file.flush()
        fcntl.flock(file, fcntl.LOCK_SH)

def held_count(directory, *arguments):
    if os.path.exists(directory + "/big"):
        hold("count")
    return count(directory, *arguments)

def held_flush(fd):
    hold("flush")
    flush(fd)

def held_empty(*arguments):
    hold("empty")
    return empty(*arguments)

def held_search(target):
    hold("search")
    return " by process 1 (held)"

snapfs.services.counting.disk_usage = held_count
snapfs.kernel.mounting.sync_file_system = held_flush
snapfs.root.layers.Layers.empty_trash = held_empty
snapfs.services.rootfs.by_users = held_search
raise SystemExit(snapfs.cli.main())
"""

# Each batch of records takes 20 ms, as on a slow disk
SLOW = """
import time, snapfs.cli, snapfs.store.batches

finish = snapfs.store.batches.finish

def slow(ran):
    time.sleep(0.02)
    finish(ran)

snapfs.store.batches.finish = slow
raise SystemExit(snapfs.cli.main())
"""

# What the scripts below do in several places
CALLS = """
import os

def read(path):
    with open(path) as file:
        file.read()

def sync(path):
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
"""

# Threads that do the same again and again until standard input ends; as users of their own from a number on, if that isn't 0.
# What became of it is printed: how often it was done, by errno.
HAMMER = (
    CALLS
    + """
import collections, ctypes, itertools, json, os, sys, threading

what, first, threads, paths = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]
setresuid = {"x86_64": 117, "aarch64": 147}[os.uname().machine]  # the system call: for one thread alone
ended, done = threading.Event(), collections.Counter()
new = itertools.count()

def clean(path):
    with open(path, "w") as file:
        file.write("1")

def commit(path):
    os.rename(path, path.replace("/active/", "/committed/"))

def make(path):
    os.mkdir(f"{path}/new{next(new)}")

def work(number):
    if first:
        ctypes.CDLL(None).syscall(setresuid, first + number, first + number, first + number)
    acts = {"read": read, "ls": os.listdir, "stat": os.stat, "sync": sync, "clean": clean, "commit": commit, "rmdir": os.rmdir}
    act = {**acts, "make": make}[what]
    while not ended.is_set():
        try:
            act(paths[number % len(paths)])
            done[0] += 1
        except OSError as error:
            done[error.errno] += 1
        ended.wait(0.01)

all = [threading.Thread(target=work, args=[number]) for number in range(threads)]
for thread in all:
    thread.start()
print("begun", flush=True)
sys.stdin.read()
ended.set()
for thread in all:
    thread.join()
print(json.dumps(done), flush=True)
"""
)

# What anybody does, twice: printed is of each the longest time and the last errno.
ORDINARY = (
    CALLS
    + """
import json, os, sys, time

os.chdir(sys.argv[1])
more = sys.argv[2:]
found = {}

def timed(name, act, *arguments):
    began, number = time.monotonic(), 0
    try:
        act(*arguments)
    except OSError as error:
        number = error.errno
    found[name] = max(found.get(name, [0])[0], time.monotonic() - began), number

for n in range(2):
    me = f"{os.getuid()}-{n}"
    timed("stat", os.stat, "active")
    timed("new name", os.path.lexists, f"active/new-to-{me}")
    timed("ls", os.listdir, "committed")
    timed("ls active", os.listdir, "active")
    timed("mkdir", os.mkdir, f"active/{me}")
    timed("info.json", read, f"active/{me}/info.json")
    timed("usage.json", read, f"active/{me}/usage.json")
    timed("label", os.mkdir, f"committed/small/active/of-{me}")
    timed("stats.json", read, ".snapfs/stats.json")
    timed("snapshots", read, ".snapfs/snapshots")
    timed("mv", os.rename, f"active/{me}", f"active/moved-{me}")
    timed("commit", os.rename, f"active/moved-{me}", f"committed/done-{me}")
    for path in more:
        timed(f"sync {path}", sync, path)
    timed("rmdir", os.rmdir, f"active/of-{me}")
print(json.dumps(found))
"""
)


class Held:
    """A daemon whose counts, flushes and deletions begin, and end when they are ``let_go``."""

    def __init__(self, daemon: Daemon, directory: Path) -> None:
        self.daemon = daemon
        self.mnt = daemon.mnt
        self._begun = directory / "begun"
        self._file = open(self._begun, "a")  # noqa: SIM115
        daemon.program = ("-c", HELD.format(begun=str(self._begun)))

    def hold(self) -> None:
        fcntl.flock(self._file, fcntl.LOCK_EX)

    def let_go(self) -> None:
        fcntl.flock(self._file, fcntl.LOCK_UN)

    def count(self, what: str) -> int:
        """How often ``what`` was begun."""
        return self._begun.read_text().split().count(what)

    def close(self) -> None:
        self._file.close()

    def big(self, name: str) -> Path:
        """An active snapshot that is not counted before it is let go."""
        os.mkdir(self.mnt / "active" / name)
        (self.mnt / "active" / name / "diff/big").touch()
        return self.mnt / "active" / name


@pytest.fixture
def make_held(make_daemon: Make, open_path: Path, users: None) -> Iterator[Callable[..., Held]]:
    made: list[Held] = []

    def make(options: str = "") -> Held:
        held = Held(make_daemon("-o", f"allow_other,umask=000{options}"), open_path)
        made.append(held)
        held.daemon.start()
        os.mkdir(held.mnt / "active/draft")
        os.rename(held.mnt / "active/draft", held.mnt / "committed/small")
        return held

    yield make
    for held in made:
        held.close()


@contextmanager
def hammering(who: tuple[str, ...], what: str, threads: int, *paths: Path, users_from: int = 0) -> Iterator[dict[str, int]]:
    """Meanwhile ``threads`` of ``who`` do ``what`` to ``paths``; how often, by errno, is there in the end."""
    arguments = [what, str(users_from), str(threads), *map(str, paths)]
    found: dict[str, int] = {}
    with subprocess.Popen(
        [*who, sys.executable, "-c", HAMMER, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=die_with_parent,
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == "begun\n"
        yield found
        process.stdin.close()
        found.update(json.loads(process.stdout.readline()))


def ordinary(who: tuple[str, ...], mnt: Path, *more: str) -> dict[str, int]:
    """What becomes of all that anybody does, each in time: the errno is given of what failed.  ``more`` are directories
    that are to be flushed."""
    command = [*who, sys.executable, "-c", ORDINARY, str(mnt), *more]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=60, check=True)
    found: dict[str, tuple[float, int]] = json.loads(done.stdout)
    assert max(seconds for seconds, _ in found.values()) < ON_A_BUSY_MACHINE, found
    return {name: number for name, (_, number) in found.items() if number}


def refusals(daemon: Daemon, operation: str) -> list[str]:
    return [line for line in daemon.error_log() if f" EAGAIN {operation} " in line]


def sync(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


REFUSED = str(errno.EAGAIN)


# -- by whom the threads are had


class Work:
    """Work in threads that ends when it is told to; ``running`` is what has begun."""

    def __init__(self, sharing: Sharing[str]) -> None:
        self.sharing = sharing
        self.running: list[str] = []
        self.found: dict[str, str] = {}
        self._ends: dict[str, threading.Event] = {}

    def end(self, names: str | None = None) -> None:
        for name in names if names is not None else self._ends:
            self._ends[name].set()

    async def begin(self, nursery: trio.Nursery, names: str, caller: Caller, settled: bool = False) -> None:
        """Ask for each, one after the other."""
        for name in names:
            nursery.start_soon(self.ask, name, caller, settled)
            await until_blocked()

    async def ask(self, name: str, caller: Caller, settled: bool = False) -> None:
        ends = self._ends.setdefault(name, threading.Event())

        def work(checkpoint: Checkpoint) -> str:
            self.running.append(name)
            assert ends.wait(20)
            self.running.remove(name)
            return f"done {name}"

        who = f"{name} of {caller.user}"
        try:
            self.found[who] = await self.sharing.run(name, work, caller, settled=settled)
        except TryAgain as error:
            self.found[who] = str(error)


@pytest.fixture
async def work() -> AsyncIterator[Work]:
    async with trio.open_nursery() as nursery:
        work = Work(Sharing(Turns(4)))
        await nursery.start(work.sharing.serve)
        try:
            yield work
        finally:
            work.end()
        nursery.cancel_scope.cancel()


async def until_blocked() -> None:
    await trio.testing.wait_all_tasks_blocked(0.02)


async def test_one_user_has_half_of_the_threads_and_waits_for_itself(work: Work) -> None:
    async with trio.open_nursery() as nursery:
        await work.begin(nursery, "abc", Caller(ALICE, 0.1))
        assert sorted(work.running) == ["a", "b"]
        await work.begin(nursery, "de", Caller(BOB, 0.1))
        assert sorted(work.running) == ["a", "b", "d", "e"]
        await work.ask("f", Caller(BOB + 1, 0.1))
        assert "for others" in work.found[f"f of {BOB + 1}"]
        await work.begin(nursery, "ghijk", OWNER)
        await work.begin(nursery, "lmn", BACKGROUND)
        assert sorted(work.running) == ["a", "b", "d", "e", "g", "h", "i", "j", "l", "m"]
        await trio.sleep(0.3)
        assert f"c of {ALICE}" not in work.found, "it waits for what the same user has asked for"
        work.end("abcdeghijklmn")
    assert all(text.startswith("done ") for who, text in work.found.items() if not who.startswith("f"))
    assert len(work.found) == 14


async def test_who_had_no_turn_for_longest_is_next_however_much_others_have_waiting(work: Work) -> None:
    async with trio.open_nursery() as nursery:
        await work.begin(nursery, "abcd", Caller(ALICE, 10))
        await work.begin(nursery, "efgh", Caller(BOB, 10))
        await work.begin(nursery, "ij", Caller(BOB + 1, 10))
        assert sorted(work.running) == ["a", "b", "e", "f"]
        for ended, running in (("a", "befi"), ("e", "bcfi"), ("b", "cfgi"), ("f", "cgij")):
            work.end(ended)
            await until_blocked()
            assert "".join(sorted(work.running)) == running
        work.end()
    assert len(work.found) == 10


async def test_what_waits_in_the_background_begins_for_who_asks_for_it(work: Work) -> None:
    async with trio.open_nursery() as nursery:
        await work.begin(nursery, "abc", BACKGROUND, settled=True)
        assert sorted(work.running) == ["a", "b"]
        await work.begin(nursery, "c", Caller(BOB, 0.1), settled=True)
        assert sorted(work.running) == ["a", "b", "c"]
        await work.begin(nursery, "c", Caller(ALICE, 0.1), settled=True)
        work.end("abc")
    assert set(work.found.values()) == {"done a", "done b", "done c"}


async def test_nobody_waits_long_for_the_end_of_what_was_begun_for_another(work: Work) -> None:
    async with trio.open_nursery() as nursery:
        await work.begin(nursery, "a", Caller(ALICE, 0.1))
        await work.ask("a", Caller(BOB, 0.1))
        assert "for somebody else" in work.found[f"a of {BOB}"]
        await work.begin(nursery, "a", OWNER)  # who has all the time
        work.end("a")
    assert work.found["a of None"] == "done a"


async def test_work_that_never_ends_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A disk that does not answer holds its thread, and keeps its turn from others, but not the end."""
    monkeypatch.setattr("snapfs.scan.sharing.ENDING", 0.05)
    work = Work(Sharing(Turns(1)))
    refused: list[str] = []

    async def ask() -> None:
        with pytest.raises(Closed):
            await work.ask("a", OWNER)
        refused.append("a")

    async with trio.open_nursery() as asking:
        async with trio.open_nursery() as nursery:
            await nursery.start(work.sharing.serve)
            asking.start_soon(ask)
            await until_blocked()
            with trio.move_on_after(0.05):
                await work.sharing.run("b", lambda checkpoint: pytest.fail("a has the only turn"), OWNER)
            nursery.cancel_scope.deadline = trio.current_time()
        await until_blocked()
        assert refused == ["a"]
    assert work.running == ["a"]
    assert "the a does not end: the disk does not answer; it is not waited for" in caplog.text
    work.end()


async def test_work_that_nobody_waits_for_is_stopped(work: Work) -> None:
    stopped = threading.Event()

    def endless(checkpoint: Checkpoint) -> str:
        try:
            while True:
                checkpoint()
        finally:
            stopped.set()

    with trio.move_on_after(0.05):
        await work.sharing.run("endless", endless)
    await trio.to_thread.run_sync(stopped.wait, 10)
    assert stopped.is_set()


# -- how many requests there may be


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_how_many_requests_of_a_kind_may_wait() -> None:
    counted = Waiting(Clock()).counted
    with ExitStack() as stack:
        for _ in range(OF_USER):
            stack.enter_context(counted("usage.json", ALICE))
        with pytest.raises(TryAgain, match="of this user"), counted("usage.json", ALICE):
            pass
        stack.enter_context(counted("changes", ALICE))
        for _ in range(OF_USER):
            stack.enter_context(counted("usage.json", STAFF))
        for _ in range(OF_USERS - 2 * (OF_USER - 1) + 1):
            stack.enter_context(counted("usage.json", BOB))
        with pytest.raises(TryAgain, match="of other users"), counted("usage.json", BOB):
            pass
        for user in range(5000, 5000 + USERS - 3):  # who has none has a place
            stack.enter_context(counted("usage.json", user))
        with pytest.raises(TryAgain, match="of other users"), counted("usage.json", BOB + 1):
            pass
        for _ in range(OF_OWNER):
            stack.enter_context(counted("usage.json", None))
        with pytest.raises(TryAgain, match="of this user"), counted("usage.json", None):
            pass
    with counted("usage.json", ALICE), counted("usage.json", BOB):
        pass
    with ExitStack() as stack:
        for _ in range(OF_USER):
            stack.enter_context(counted("usage.json", ALICE))
        for user in range(5000, 5000 + USERS - 1):
            stack.enter_context(counted("usage.json", user))


def test_for_how_long_a_lock_of_the_kernel_may_be_held() -> None:
    clock = Clock()
    holding = Waiting(clock).holding
    with holding(None) as patience:
        assert patience == PATIENCE
    with holding(ALICE) as first, holding(ALICE) as second, holding(BOB) as third, holding(STAFF) as fourth:
        assert (first, second, third, fourth) == (HOLD / 2, 0, HOLD / 2, 0)
    with holding(ALICE) as patience:
        assert patience == pytest.approx(HOLD / 2), "they did not take it"
        clock.now += patience
    with holding(ALICE) as patience:
        assert patience == pytest.approx(HOLD / 2 * AGAIN)
    with holding(BOB) as patience:
        assert patience == pytest.approx(HOLD / 2)
    waited = 0.0
    for user in range(100_000, 101_000):  # one that has many of them
        with holding(user) as patience:
            clock.now += patience
            waited += patience
    assert waited < TIME
    clock.now += 60
    with holding(ALICE) as patience:
        assert patience == HOLD / 2


async def test_for_how_long_who_uses_a_snapshot_is_looked_for() -> None:
    clock = Clock()
    naming, searched = Naming(clock), Counter[str]()

    async def ask(what: str) -> str | None:
        def look() -> str:
            searched[what] += 1
            clock.now += 0.3
            return f"{what} by {searched[what]}"

        return await naming.words(what, look)

    began = clock.now
    assert [await ask("a") for _ in range(3)] == ["a by 1", "a by 2", "a by 2"], "alone it is looked for each time"
    for n in range(100):
        assert await ask("a") == f"a by {searched['a']}", "what was found last"
        found = await ask(f"another {n}")
        assert n or found == "another 0 by 1", "one snapshot takes half of the time"
    assert clock.now - began < TIME
    clock.now += 60
    before = searched["a"]
    assert await ask("a") == f"a by {before + 1}"


async def test_who_asks_meanwhile_shares_the_search_for_who_uses_a_snapshot() -> None:
    naming, gate, searched = Naming(), threading.Event(), 0
    found: list[str | None] = []

    def look() -> str:
        nonlocal searched
        searched += 1
        assert gate.wait(20)
        return "by somebody"

    async def ask() -> None:
        found.append(await naming.words(1, look))

    async with trio.open_nursery() as nursery:
        for _ in range(16):
            nursery.start_soon(ask)
        await until_blocked()
        gate.set()
    assert searched == 1
    assert found == ["by somebody"] * 16


DIRECTORY, ANOTHER = 2, 3  # inodes


class Queue:
    """Threads that change DIRECTORY one after the other, each for 10 ms."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.crowds = Crowds()

    def change(
        self, thread: int, user: int = ALICE, *, took: float = 0.01, directories: tuple[int, ...] = (DIRECTORY,)
    ) -> bool:
        """Whether ``thread`` was let in."""
        began, let_in = self.clock.now, True
        self.crowds.note_use(user, began)
        try:
            self.crowds.enter(directories, user, thread, began)
            self.clock.now += took
        except TryAgain as error:
            assert "would wait for them" in str(error)
            let_in = False
        self.crowds.leave(directories, user, thread, self.clock.now, self.clock.now - began)
        return let_in


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> Queue:
    """One in which no thread is young."""
    monkeypatch.setattr("snapfs.fuse.waiting.started", lambda thread: 0.0)
    return Queue()


def test_how_many_threads_may_wait_to_change_a_directory(queue: Queue) -> None:
    queue.crowds.note_use(BOB, queue.clock.now)
    began = queue.clock.now
    let_in = [queue.change(thread) for thread in range(1, 1000)].count(True)
    assert 0.9 * CROWD / 0.01 <= let_in <= CROWD / 0.01 + 1
    assert queue.clock.now - began < TIME
    assert queue.change(2000, BOB), "who has one or two threads is never refused"
    assert queue.change(2001, directories=(ANOTHER,))
    assert not queue.change(2002, directories=(ANOTHER, DIRECTORY))
    queue.clock.now += RECENT
    assert queue.change(2003)


def test_a_tree_that_one_user_alone_uses_has_no_crowds(queue: Queue) -> None:
    queue.crowds.note_use(None, queue.clock.now)
    queue.clock.now += ALONE
    assert all(queue.change(thread) for thread in range(1, 1000))
    assert not queue.crowds.watched
    queue.crowds.note_use(None, queue.clock.now)
    assert not queue.change(2000), "the owner has come"


def test_users_who_share_a_directory_have_equal_shares_of_its_queue(queue: Queue) -> None:
    refused: Counter[int] = Counter()
    began = queue.clock.now
    for thread in range(1, 1000):
        for user in (ALICE, BOB, STAFF):
            refused[user] += not queue.change(1000 * user + thread, user)
    assert queue.clock.now - began < TIME
    assert max(refused.values()) - min(refused.values()) <= 2
    assert queue.change(1, 5000), "somebody else"


def test_one_thread_after_the_other_is_no_crowd(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    queue.crowds.note_use(BOB, queue.clock.now)
    assert all(queue.change(thread) for thread in range(1, 5) for _ in range(200)), "four threads"
    young = {*range(1000, 2000)}
    monkeypatch.setattr(
        "snapfs.fuse.waiting.started", lambda thread: time.clock_gettime(time.CLOCK_BOOTTIME) if thread in young else 0.0
    )
    assert all(queue.change(thread) for thread in range(1000, 1500)), "a shell that starts one mkdir after the other"
    assert not queue.change(1)
    assert not queue.change(1500), "one that has waited was seen: the others are started to overtake those that wait"
    assert not queue.change(0), "in another pid namespace"


def test_who_was_refused_waits_before_it_comes_to_the_lock(queue: Queue) -> None:
    crowds, clock = queue.crowds, queue.clock
    crowds.note_use(BOB, clock.now)
    for thread in range(1, MANY):
        queue.change(thread)
    assert not crowds.watched
    let_in = [queue.change(thread) for thread in range(MANY, 300)]
    assert crowds.watched == {DIRECTORY}
    last = MANY + let_in.index(False)
    assert not crowds.comes_again(DIRECTORY, ALICE, 1, clock.now), "it was not refused"
    assert crowds.comes_again(DIRECTORY, ALICE, last, clock.now)
    assert not crowds.comes_again(DIRECTORY, ALICE, last, clock.now), "now it may have the lock"
    assert not crowds.comes_again(DIRECTORY, None, last + 1, clock.now)
    clock.now += RECENT + 1
    assert not crowds.comes_again(DIRECTORY, ALICE, last + 2, clock.now)
    assert not crowds.watched


def test_few_threads_that_take_long_wait_before_the_lock_too(queue: Queue) -> None:
    queue.crowds.note_use(BOB, queue.clock.now)
    let_in = [queue.change(thread, took=CROWD / 10) for thread in range(1, 20)]
    assert let_in == [True] * 10 + [False] * 9
    assert queue.crowds.watched == {DIRECTORY}
    assert queue.crowds.comes_again(DIRECTORY, ALICE, 19, queue.clock.now)
    queue.clock.now += RECENT / 2
    assert queue.change(18), "by then some do not count any more"
    assert not queue.crowds.comes_again(DIRECTORY, ALICE, 18, queue.clock.now)


def test_what_is_remembered_of_crowds_is_bounded(queue: Queue) -> None:
    queue.crowds.note_use(BOB, queue.clock.now)
    for thread in range(1, 2 * THREADS):
        queue.change(thread, took=0)
        queue.change(0, took=0)
    assert len(queue.crowds._crowds[DIRECTORY].threads) <= THREADS
    for inode in range(10, 2 * DIRECTORIES):
        queue.change(1, took=0, directories=(inode,))
    assert len(queue.crowds._crowds) <= DIRECTORIES
    assert not queue.crowds.watched


def test_how_many_directories_may_be_listed_at_once() -> None:
    clock, number = Clock(), itertools.count()
    listings = Listings(clock)
    first = [next(number) for _ in range(LISTINGS_OF_USER)]
    for fh in first:
        listings.note(fh, ALICE)
    with pytest.raises(TryAgain, match="one user"):
        listings.note(next(number), ALICE)
    for fh in first:
        listings.note(fh, ALICE)  # the next page
    listings.end(first[0])
    listings.note(next(number), ALICE)
    clock.now += LISTED / 2
    listings.note(first[1], ALICE)
    clock.now += LISTED * 0.6
    for _ in range(LISTINGS_OF_USER - 1):  # the others are open, and nobody reads them
        listings.note(next(number), ALICE)
    with pytest.raises(TryAgain, match="one user"):
        listings.note(first[2], ALICE)
    besides = LISTINGS_OF_USERS - (LISTINGS_OF_USER - 1)
    for user in range(5000, 5000 + USERS - 1):
        listings.note(next(number), user)
        if user - 5000 < besides:
            listings.note(next(number), user)
    for user in (5000, BOB):
        with pytest.raises(TryAgain, match="as users may list"):
            listings.note(next(number), user)


async def test_who_opens_a_directory_too_many_waits_for_the_end_of_another(autojump_clock: trio.testing.MockClock) -> None:
    listings = Listings(trio.current_time)
    for fh in range(LISTINGS_OF_USER):
        listings.note(fh, ALICE)
    begun: list[int] = []

    async def begin(fh: int) -> None:
        await listings.begin(fh, ALICE)
        begun.append(fh)

    async with trio.open_nursery() as nursery:
        for fh in (100, 101, 102):
            nursery.start_soon(begin, fh)
            await trio.sleep(0.01)
        await listings.begin(200, BOB)
        assert begun == []
        listings.end(0)
        await trio.sleep(0.01)
        assert begun == [100]
        listings.end(1)
        listings.end(2)
        await trio.sleep(0.01)
        assert sorted(begun) == [100, 101, 102]
    await listings.begin(104, ALICE)  # those that nobody reads count for a second only


def test_lines_in_the_log() -> None:
    clock = Clock()
    waiting = Waiting(clock)
    assert [waiting.is_news("open") for _ in range(100)].count(True) == LINES
    assert waiting.is_news("rename")
    clock.now += 1
    assert [waiting.is_news("open") for _ in range(100)].count(True) == LINES


def test_lines_in_the_log_about_readers() -> None:
    clock = Clock()
    waiting = Waiting(clock)
    assert [waiting.is_readers_news(ALICE) for _ in range(100)].count(True) == OF_READER
    assert waiting.is_readers_news(BOB)
    clock.now += 1 / READERS_AGAIN
    assert [waiting.is_readers_news(ALICE) for _ in range(100)].count(True) == 1
    clock.now += 1000
    assert [waiting.is_readers_news(user) for user in range(10_000)].count(True) == OF_READERS, "one has many ids"


async def test_the_list_of_all_snapshots_is_collected_once_for_all_who_wait(
    snapshotter: Snapshotter, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = Tree(snapshotter)
    gate, collected = threading.Event(), 0
    lines = listing._lines

    def held(state: State) -> Generator[str, None, None]:
        nonlocal collected
        collected += 1
        assert gate.wait(20)
        return lines(state)

    monkeypatch.setattr(listing, "_lines", held)
    texts: list[str] = []

    async def read() -> None:
        node = await tree.walk(".snapfs/snapshots").refresh()
        handle = await node.open()
        texts.append(handle.read(0, handle.size).decode())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        await until_blocked()
        await snapshotter.prepare("web")  # which the first may have missed
        for _ in range(20):
            nursery.start_soon(read)
        await until_blocked()
        gate.set()
    assert collected == 2
    assert len(texts) == 21
    assert all("web\tactive" in text for text in texts[1:])


async def test_the_list_of_checkpoints_is_collected_once_for_all_who_wait(
    snapshotter: Snapshotter, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = Tree(snapshotter)
    await snapshotter.prepare("web")
    await snapshotter.checkpoint("web", "the first")
    gate, collected = threading.Event(), 0
    line = commands._line

    def held(each: model.Checkpoint) -> str:
        nonlocal collected
        collected += each.number == 1
        assert gate.wait(20)
        return line(each)

    monkeypatch.setattr(commands, "_line", held)
    texts: list[str] = []

    async def read() -> None:
        node = await tree.walk("active/web/checkpoint").refresh()
        handle = await node.open()
        texts.append(handle.read(0, handle.size).decode())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        await until_blocked()
        await snapshotter.checkpoint("web", "the second")  # which the first may have missed
        for _ in range(20):
            nursery.start_soon(read)
        await until_blocked()
        gate.set()
    assert collected == 2
    assert len(texts) == 21
    assert all("the second" in text for text in texts[1:])


async def test_what_takes_all_threads_keeps_no_reader_waiting(
    snapshotter: Snapshotter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that trio has for everybody: reading long texts takes them."""
    tree = Tree(snapshotter)
    await snapshotter.prepare("web")
    await snapshotter.checkpoint("web", "kept")
    monkeypatch.setattr(Root, "has_at_hand", lambda *arguments: False)  # the disk is asked for the layers
    limiter = trio.to_thread.current_default_thread_limiter()
    taken = [object() for _ in range(int(limiter.total_tokens))]
    for each in taken:
        await limiter.acquire_on_behalf_of(each)
    try:
        with trio.fail_after(10):
            for name in ("checkpoint", "mounts.json"):
                node = await tree.walk(f"active/web/{name}").refresh()
                assert (await node.open()).size > 0
            assert len(await snapshotter.walk()) == 2
    finally:
        for each in taken:
            limiter.release_on_behalf_of(each)


async def test_what_is_known_is_not_waited_for(snapshotter: Snapshotter) -> None:
    tree = Tree(snapshotter)
    await snapshotter.prepare("a")
    assert tree.walk("active/a/usage.json").waits_for == "usage.json"
    await snapshotter.commit("base", "a")
    await snapshotter.usage("base")
    assert tree.walk("committed/base/usage.json").waits_for is None
    await snapshotter.view("peek", "base")
    assert tree.walk("view/peek/usage.json").waits_for is None
    changes = tree.walk("committed/base/changes")
    assert changes.waits_for == "changes"
    await changes.refresh()
    assert tree.walk("committed/base/changes").waits_for is None


async def test_nobody_waits_long_for_the_list_that_another_collects(
    snapshotter: Snapshotter, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = Tree(snapshotter)
    gate = threading.Event()
    lines = listing._lines

    def held(state: State) -> Generator[str, None, None]:
        assert gate.wait(20)
        return lines(state)

    monkeypatch.setattr(listing, "_lines", held)

    async def read(caller: Caller) -> None:
        await tree.walk(".snapfs/snapshots").refresh(caller)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read, Caller(ALICE, 0.01))  # who waits for her own work as long as that takes
        await until_blocked()
        with trio.fail_after(10), pytest.raises(TryAgain, match="listed for others"):
            await read(Caller(BOB, 0.01))
        gate.set()
    await read(Caller(BOB, 0.01))


async def test_who_changes_snapshots_without_end_keeps_no_reader_of_the_list_waiting(
    snapshotter: Snapshotter, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree, collected = Tree(snapshotter), itertools.count()
    lines = listing._lines

    def changed(state: State) -> Generator[str, None, None]:
        trio.from_thread.run(snapshotter.prepare, f"k{next(collected)}")
        return lines(state)

    monkeypatch.setattr(listing, "_lines", changed)
    with trio.fail_after(20):
        node = await tree.walk(".snapfs/snapshots").refresh()
        handle = await node.open()
    assert handle.read(0, handle.size).decode().startswith("k0\t")
    assert next(collected) == 1


# -- as other users meet it


def test_listings_of_many_snapshots(make_held: Callable[..., Held]) -> None:
    """The kernel lets one page of a directory be read after the other, and a look-up there waits for all of them."""
    held = make_held()
    for n in range(1000):
        os.mkdir(held.mnt / f"active/snapshot{n}")
    with bounded(120, held.daemon), hammering(alice, "ls", 800, held.mnt / "active") as done:
        until(lambda: refusals(held.daemon, "opendir"))
        assert ordinary(bob, held.mnt) == {}
        assert ordinary((), held.mnt) == {}
    assert done["0"] > 0
    assert set(done) <= {"0", REFUSED}
    assert "one user may list" in refusals(held.daemon, "opendir")[-1]
    assert held.daemon.stop() == 0


@pytest.fixture
def slow(make_daemon: Make, open_path: Path, users: None) -> Daemon:
    """A daemon with a slow disk, whose tree nobody has used."""
    daemon = make_daemon("-o", "allow_other,umask=000")
    daemon.program = ("-c", SLOW)
    return daemon.start()


def test_threads_that_wait_to_change_a_directory(slow: Daemon) -> None:
    """400 of them take 8 s, and a move between directories would wait for 10 others, each of which waits for those."""
    for name in ("active/draft", "active/web"):
        os.mkdir(slow.mnt / name)
    os.rename(slow.mnt / "active/draft", slow.mnt / "committed/small")
    with bounded(120, slow), hammering(alice, "commit", 10, slow.mnt / "active/none") as moved:
        with hammering(alice, "make", 400, slow.mnt / "active") as made:
            assert ordinary(bob, slow.mnt) == {}
            assert ordinary((), slow.mnt) == {}
            assert "would wait for them for a second or more" in refusals(slow, "mkdir")[-1]
        assert made["0"] > CROWD / 0.03
        assert made[REFUSED] > 0
        assert set(made) == {"0", REFUSED}
    assert str(errno.ENOENT) in moved
    assert len(refusals(slow, "mkdir")) < 100
    assert slow.stop() == 0


AT_ONCE = """
import collections, json, os, sys, threading

done, together = collections.Counter(), threading.Barrier(int(sys.argv[2]))

def make(number):
    together.wait()
    try:
        os.mkdir(f"{sys.argv[1]}/{number}")
        done[0] += 1
    except OSError as error:
        done[error.errno] += 1

threads = [threading.Thread(target=make, args=[number]) for number in range(together.parties)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(json.dumps(done))
"""


def at_once(who: tuple[str, ...], daemon: Daemon, threads: int) -> dict[str, int]:
    """How many threads of ``who``, each of which makes a snapshot at the same time, fail with which errno."""
    command = [*who, sys.executable, "-c", AT_ONCE, str(daemon.mnt / "active"), str(threads)]
    with bounded(120, daemon):
        found: dict[str, int] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    return found


def test_a_user_who_is_alone_may_have_any_number_of_threads_wait(slow: Daemon) -> None:
    """However slow the disk: nobody else would wait for them."""
    assert at_once(alice, slow, 200) == {"0": 200}
    assert len(os.listdir(slow.mnt / "active")) == 200
    assert slow.error_log() == []
    assert slow.stop() == 0


def test_the_owner_may_have_any_number_of_threads_wait(slow: Daemon) -> None:
    subprocess.run([*bob, "mkdir", slow.mnt / "active/bobs"], check=True)
    assert at_once((), slow, 100) == {"0": 100}
    assert slow.error_log() == []
    assert slow.stop() == 0


def test_one_process_after_the_other_is_refused_nothing(slow: Daemon) -> None:
    """However busy they keep the directory, none of them waits."""
    os.mkdir(slow.mnt / "active/roots")
    with bounded(120, slow):
        script = 'for n in $(seq 120); do mkdir "$1/$n" || exit; done'
        subprocess.run([*alice, "sh", "-c", script, "sh", slow.mnt / "active"], check=True)
    assert slow.error_log() == []
    assert slow.stop() == 0


def test_usage_of_large_layers(make_held: Callable[..., Held]) -> None:
    held = make_held()
    layers = [held.big(f"big{n}") for n in range(6)]
    held.hold()
    with bounded(60, held.daemon):
        with hammering(alice, "read", 150, *(layer / "usage.json" for layer in layers)) as done:
            until(lambda: held.count("count") >= 1)
            until(lambda: refusals(held.daemon, "open"))
            assert ordinary(bob, held.mnt) == {}
            assert ordinary((), held.mnt) == {}
            assert held.count("count") == 1, "one user has no more than half of the threads"
            held.let_go()
        assert done[REFUSED] > 0
        assert done["0"] >= OF_USER, "who waited for a count got it"
        assert "this user" in refusals(held.daemon, "open")[-1]
        assert len(refusals(held.daemon, "open")) < 100
    assert held.daemon.stop() == 0


def test_users_who_are_one(make_held: Callable[..., Held]) -> None:
    """Who has ranges in /etc/subuid has 65,536 user ids."""
    held = make_held()
    layers = [held.big(f"big{n}") for n in range(6)]
    held.hold()
    with bounded(60, held.daemon):
        with hammering((), "read", 150, *(layer / "usage.json" for layer in layers), users_from=100_000) as done:
            until(lambda: held.count("count") >= 3)
            until(lambda: refusals(held.daemon, "open"))
            assert ordinary(bob, held.mnt) in ({}, {"usage.json": errno.EAGAIN})
            assert ordinary((), held.mnt) == {}
            held.let_go()
        assert done[REFUSED] > 0
        assert any("other users" in line for line in refusals(held.daemon, "open"))
        assert len(refusals(held.daemon, "open")) < 200
    assert held.daemon.stop() == 0


def test_stat_of_what_was_just_committed(make_held: Callable[..., Held]) -> None:
    """Who is not told the size in time is told what is known."""
    held = make_held()
    held.big("big")
    held.hold()
    os.rename(held.mnt / "active/big", held.mnt / "committed/big")
    with bounded(60, held.daemon):
        with hammering(alice, "stat", 400, held.mnt / "committed/big") as done:
            until(lambda: held.count("count") >= 1)
            assert ordinary(bob, held.mnt) == {}
            held.let_go()
        assert set(done) == {"0"}
    assert held.daemon.error_log() == []
    assert held.daemon.stop() == 0


@pytest.mark.durable
def test_flushing_directories(make_held: Callable[..., Held]) -> None:
    """The kernel keeps a directory locked while it is flushed."""
    held = make_held()
    os.mkdir(held.mnt / "active/new")
    sync(held.mnt)
    flushes = held.count("flush")
    held.hold()
    os.rename(held.mnt / "active/new", held.mnt / "committed/new")
    directories = [held.mnt / name for name in ("active", "committed", ".", "committed/new", "committed/small")]
    with bounded(60, held.daemon):
        with hammering(alice, "sync", 150, *directories) as done:
            until(lambda: held.count("flush") > flushes)
            until(lambda: refusals(held.daemon, "fsyncdir"))
            failed = ordinary(bob, held.mnt, "committed/new", "committed/small", "active")
            assert failed == {"sync committed/new": errno.EAGAIN, "sync active": errno.EAGAIN}
            assert ordinary((), held.mnt) == {}
            held.let_go()
            sync(held.mnt / "committed/new")  # the owner waits as long as it takes
        assert done[REFUSED] > 0
        assert done["0"] > 0
        assert "still being written" in refusals(held.daemon, "fsyncdir")[-1]
        assert len(refusals(held.daemon, "fsyncdir")) < 200
    assert held.daemon.stop() == 0


def test_cleaning_up(make_held: Callable[..., Held]) -> None:
    held = make_held()
    held.hold()
    with bounded(60, held.daemon):
        with hammering(alice, "clean", 150, held.mnt / ".snapfs/cleanup") as done:
            until(lambda: held.count("empty") >= 1)
            until(lambda: refusals(held.daemon, "open"))
            assert ordinary(bob, held.mnt) == {}
            with failing(errno.EAGAIN):
                (held.mnt / ".snapfs/cleanup").write_text("1")
            held.let_go()
        assert done["0"] > 0
        assert done[REFUSED] > 0
    assert held.daemon.stop() == 0


ROLLING = """
import os, sys

os.chdir(sys.argv[1])
with open("rollback", "wb", buffering=0) as file:
    before = int(os.path.basename(os.path.dirname(os.readlink("diff"))))  # the id: each rollback takes one
    file.write(b"1")
    print(int(os.path.basename(os.path.dirname(os.readlink("diff")))) - before)
"""


@pytest.mark.durable  # else a rollback takes no time
def test_writing_what_is_to_be_done_to_a_workspace(make_held: Callable[..., Held]) -> None:
    """One is done after the other, in the order in which they come; who comes waits for the few that are before."""
    held = make_held()
    os.mkdir(held.mnt / "active/web")
    (held.mnt / "active/web/checkpoint").write_text("the first")
    with bounded(120, held.daemon):
        with hammering(alice, "clean", 300, held.mnt / "active/web/rollback") as done:  # it writes 1: the first
            until(lambda: refusals(held.daemon, "open"))
            for _ in range(2):
                rolling = [*bob, sys.executable, "-c", ROLLING, str(held.mnt / "active/web")]
                before = int(subprocess.run(rolling, stdout=subprocess.PIPE, check=True).stdout)
                assert 0 < before < 4 * OPENERS_OF_USER, "so many were before him"
            assert ordinary(bob, held.mnt) == {}
        assert done["0"] > 0
        assert done[REFUSED] > 0
        assert "opened this file to write to it" in refusals(held.daemon, "open")[-1]
    assert held.daemon.stop() == 0


COPYING = """
import os, sys, threading

fd = os.open(sys.argv[1], os.O_WRONLY)
writers = [threading.Thread(target=os.pwrite, args=(fd, b"copy: " + b"x" * n, 0)) for n in range(30)]
for writer in writers:
    writer.start()
for writer in writers:
    writer.join()
"""


@pytest.mark.durable
def test_a_copy_that_takes_long_keeps_nobody_else_from_writing(make_held: Callable[..., Held]) -> None:
    """For each who opens a file that does something it is one of its own to the kernel, which lets one write at a time."""
    held = make_held()
    os.mkdir(held.mnt / "active/web")
    file = held.mnt / "active/web/checkpoint"
    held.hold()
    with subprocess.Popen([*alice, sys.executable, "-c", COPYING, file], preexec_fn=die_with_parent) as copying:
        try:
            until(lambda: held.count("flush"))
            for who in (bob, alice, ()):
                subprocess.run([*who, "sh", "-c", f"echo mine > {file}"], timeout=20, check=True)
            with open(file, "r+b", buffering=0) as mine:
                assert os.fstat(mine.fileno()).st_ino == os.stat(file).st_ino
                mine.write(b"more")
                assert mine.read() == b"web@4\n"
            os.truncate(file, 0)
            assert [line.split("\t")[3] for line in file.read_text().splitlines()] == ["mine"] * 3 + ["more"]
            assert copying.poll() is None
        finally:
            held.let_go()
        assert copying.wait() == 0
    assert len(file.read_text().splitlines()) == 34
    assert held.daemon.stop() == 0


REOPENING = """
import os, sys

path = sys.argv[1]
fd = os.open(path, os.O_PATH)
for there in (f"/proc/self/fd/{fd}", "/proc/self/fd/9"):
    for reopen in (lambda: os.close(os.open(there, os.O_WRONLY)), lambda: os.truncate(there, 0)):
        try:
            reopen()
        except OSError as error:
            print(error.errno)
mine = os.open(path, os.O_WRONLY)
os.close(os.open(f"/proc/self/fd/{mine}", os.O_WRONLY))
os.write(mine, b"mine")
"""


def test_nobody_writes_to_what_others_may_have_to_write_to(make_held: Callable[..., Held]) -> None:
    """What is opened by no name can't be one of the process's own to the kernel, unless the user had it before."""
    held = make_held()
    os.mkdir(held.mnt / "active/web")
    file = held.mnt / "active/web/checkpoint"
    with open(file, "w") as of_root:
        script = 'exec 9>&"$1" && exec "$2" -c "$3" "$4"'
        words = ["bash", "-c", script, "bash", str(of_root.fileno()), sys.executable, REOPENING, str(file)]
        said = subprocess.run(
            [*alice, *words], stdout=subprocess.PIPE, text=True, check=True, timeout=20, pass_fds=[of_root.fileno()]
        )
    assert said.stdout.split() == [REFUSED] * 4
    assert "opened by its name it does not: try again" in refusals(held.daemon, "open")[-1]
    assert [line.split("\t")[3] for line in file.read_text().splitlines()] == ["mine"]
    assert held.daemon.stop() == 0


def test_new_writers_of_one_user_push_out_no_others() -> None:
    writers = Writers()
    other, owners = writers.new(1, 20, 5), writers.new(1, 20, None)
    own = [writers.new(1, 20, 6) for _ in range(WRITERS + 1)]
    assert len({other, owners, *own}) == WRITERS + 3
    assert [writers.is_of(other, 5), writers.is_of(owners, None), other in writers] == [True, True, True]
    assert [writers.is_of(inode, 6) for inode in (own[0], own[1], own[-1], other, owners)] == [False, True, True, False, False]
    for user in range(100, 100 + WRITING):
        writers.new(1, 20, user)
    assert not any(inode in writers for inode in (other, owners, *own)), "only so many users have some"
    assert not writers.is_of(owners, None)


async def test_the_inode_that_a_process_was_told_of_is_there_whoever_else_was_told(snapshotter: Snapshotter) -> None:
    """A flood of another user's must not have it open one that others have."""
    await snapshotter.prepare("web")
    tree = Tree(snapshotter)
    told = Retelling(tree, KernelCache(), OpenFiles(), Waiting(trio.current_time), writers_apart=True)
    directory, file = tree.walk("active/web"), tree.walk("active/web/checkpoint")
    for pid, user in ((1, BOB), *((pid, ALICE) for pid in range(2, WRITERS + 3))):
        with pytest.raises(Stale):
            told.to_write(file.inode, pid, user)
    inode = told.look_up(directory, "checkpoint", 1, BOB).inode
    assert inode != file.inode
    assert told.to_write(inode, 1, BOB).inode == inode
    assert told.look_up(directory, "checkpoint", 2, ALICE).inode == file.inode, "her own have pushed it out"


async def test_the_inode_of_who_writes_a_label_is_there_whoever_else_writes(snapshotter: Snapshotter) -> None:
    """A flood of another user's comes between any two steps of the kernel's, of which there are three."""
    await snapshotter.prepare("web", labels={"mine": "1", "hers": "2"})
    tree = Tree(snapshotter)
    told = Retelling(tree, KernelCache(), OpenFiles(), Waiting(trio.current_time))

    def flood() -> None:
        asker.set(ALICE)
        inode = tree.walk("active/web/labels/hers").inode
        for pid in range(2, 10 * WRITERS):
            with pytest.raises(Stale):
                told.to_write(inode, pid, ALICE)
        asker.set(BOB)

    asker.set(BOB)
    with pytest.raises(Stale):
        told.to_write(tree.walk("active/web/labels/mine").inode, 1, BOB)
    flood()
    inode = told.look_up(tree.walk("active/web/labels"), "mine", 1, BOB).inode
    flood()
    assert told.to_write(inode, 1, BOB).path == "active/web/labels/mine"


async def test_who_was_told_to_look_again_is_told_once_whoever_else_was(
    snapshotter: Snapshotter, monkeypatch: pytest.MonkeyPatch
) -> None:
    for bound in ("MOST", "OF_USER"):
        monkeypatch.setattr(f"snapfs.fuse.retelling.{bound}", 8 * OVERHEAD)
    await snapshotter.prepare("web")
    tree = Tree(snapshotter)
    told = Retelling(tree, KernelCache(), OpenFiles(), Waiting(trio.current_time))
    for pid, user in ((1, BOB), *((pid, ALICE) for pid in range(2, 12))):
        await snapshotter.checkpoint("web")
        with pytest.raises(Stale):
            await told.to_read(tree.walk("active/web/checkpoint").inode, pid, Caller(user, 1))
    await snapshotter.checkpoint("web")
    node = await told.to_read(tree.walk("active/web/checkpoint").inode, 1, Caller(BOB, 1))
    assert node.path == "active/web/checkpoint"


def test_removing_what_is_in_use(make_held: Callable[..., Held]) -> None:
    """The kernel keeps the directory locked while it is looked for who uses the snapshot, which here never ends by itself."""
    held = make_held()
    os.mkdir(held.mnt / "active/web")
    with bounded(120, held.daemon), open(held.mnt / "active/web/rootfs/file", "w"):
        held.hold()
        with hammering(alice, "rmdir", 16, held.mnt / "active/web") as done:
            until(lambda: held.count("search"))
            assert ordinary(bob, held.mnt) == {}
            held.let_go()
            until(lambda: "by process 1 (held)" in held.daemon.error_log()[-1])
            assert ordinary((), held.mnt) == {}
        assert set(done) == {str(errno.EBUSY)}
        assert done[str(errno.EBUSY)] > 1.25 * held.count("search"), "one answer serves many"
    assert held.daemon.stop() == 0


@pytest.mark.durable
def test_commits_that_wait_for_the_disk(make_held: Callable[..., Held]) -> None:
    held = make_held(",dirsync")
    for n in range(40):
        os.mkdir(held.mnt / f"active/k{n}")
    held.hold()
    with bounded(60, held.daemon):
        with hammering(alice, "commit", 40, *(held.mnt / f"active/k{n}" for n in range(40))) as done:
            until(lambda: refusals(held.daemon, "rename"))
            assert ordinary(bob, held.mnt) == {"commit": errno.EAGAIN}
            assert ordinary((), held.mnt) == {"commit": errno.EAGAIN}
            held.let_go()
            until(lambda: len(os.listdir(held.mnt / "committed")) > 5)
        assert done["0"] >= 5
        assert done[REFUSED] > 0
        assert "its files are still being written to the disk: try again" in refusals(held.daemon, "rename")[-1]
        assert len(refusals(held.daemon, "rename")) < 200
    assert held.daemon.stop() == 0


@pytest.mark.durable
def test_a_commit_that_was_refused_has_changed_nothing_and_the_command_tries_again(make_held: Callable[..., Held]) -> None:
    held = make_held(",dirsync")
    active = held.big("web")
    held.hold()
    with bounded(60, held.daemon):
        with failing(errno.EAGAIN):
            os.rename(active, held.mnt / "committed/v1")
        assert os.listdir(held.mnt / "committed") == ["small"]
        command = [sys.executable, "-m", "snapfs.cli", "commit", "web", "v1", "--at", str(held.mnt)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=die_with_parent) as process:
            until(lambda: len(refusals(held.daemon, "rename")) >= 2)
            held.let_go()
            assert process.communicate()[0] == f"{held.mnt}/committed/v1\n"
            assert process.returncode == 0
        assert "state" not in json.loads((held.mnt / "committed/v1/info.json").read_text())
    assert held.daemon.stop() == 0


@pytest.mark.alone
@pytest.mark.usefixtures("open_path", "users")
def test_texts_that_change_all_the_time(make_daemon: Callable[..., Daemon]) -> None:
    """Two hundred threads read stats.json: whoever else does gets it soon; and who reads it alone gets what is so."""
    daemon = make_daemon("-o", "allow_other").start()
    path = daemon.mnt / ".snapfs/stats.json"
    for number in range(300):
        os.mkdir(daemon.mnt / f"active/{number}")
        os.listdir(daemon.mnt / "active")

    def asked() -> int:
        count: int = json.loads(path.read_text())["operations"]["statfs"]["count"]
        return count

    os.statvfs(daemon.mnt)
    before = asked()
    for number in range(1, 4):
        os.statvfs(daemon.mnt)
        assert asked() == before + number
    with bounded(120, daemon), hammering(alice, "read", 200, path) as done:
        for _ in range(5):
            began = worked(daemon.pid)
            subprocess.run([*bob, "cat", path], check=True, stdout=subprocess.DEVNULL)
            assert worked(daemon.pid) - began < TIME
    assert done["0"] > 200

    os.statvfs(daemon.mnt)
    until(lambda: asked() == before + 4, "what is so is told again soon")
