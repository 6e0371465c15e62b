"""The blocking door's own: that it has every call, threads, Ctrl-C, closing, forks, and interpreters that end.

What the calls do is in ``test_snapshotter.py``, which runs over both doors.
"""

from __future__ import annotations

import asyncio
import gc
import inspect
import math
import os
import random
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import trio

import snapfs
from snapfs import (
    AlreadyExists,
    Change,
    Closed,
    Damaged,
    Forked,
    Kind,
    NotFound,
    Options,
    Sync,
    Unavailable,
    Usage,
    blocking,
)
from snapfs.kernel.mounttable import mount_table
from snapfs.root.pool import Pool
from snapfs.store.metastore import MetaStore
from snapfs.store.writing import Writer
from tests.processes import die_with_parent, in_fork, until

THROWN_AWAY = Options(sync=Sync.NONE)


@pytest.fixture
def snapshots(root: Path) -> Iterator[blocking.Snapshotter]:
    """The blocking library on a fresh root."""
    with blocking.open_snapshotter(root, THROWN_AWAY) as opened:
        yield opened


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    """Eight threads."""
    with ThreadPoolExecutor(8) as threads:
        yield threads


def loops() -> list[threading.Thread]:
    """The threads of the snapshotters that are not closed."""
    return [thread for thread in threading.enumerate() if thread.name == "snapfs"]


@contextmanager
def held_writer(snapshots: blocking.Snapshotter) -> Iterator[None]:
    """The writer is busy with something else inside the block."""
    records = snapshots._loop.snapshotter.records
    busy, go_on = threading.Event(), threading.Event()

    def operation(writer: Writer) -> None:
        busy.set()
        assert go_on.wait(20)

    with ThreadPoolExecutor(1) as thread:
        thread.submit(snapshots._loop.call, lambda: records.write(operation))
        assert busy.wait(20)
        try:
            yield
        finally:
            go_on.set()


def until_waiting(snapshots: blocking.Snapshotter, calls: int) -> None:
    """Wait until so many calls wait for the writer."""
    records = snapshots._loop.snapshotter.records
    until(lambda: records._queue is not None and records._queue.qsize() == calls, "calls wait for the writer")


@contextmanager
def ctrl_c(*when: Callable[[], object]) -> Iterator[None]:
    """The main thread is interrupted in the block, as by Ctrl-C, when it waits for a call and each of ``when`` has returned."""
    main = threading.main_thread().ident
    assert main is not None

    def press() -> None:
        for returned in when:
            returned()
            # not a moment before: CPython overlooks a signal that comes just before it waits for a lock, until the next one
            until(lambda: sys._current_frames()[main].f_code.co_name == "wait", "the main thread waits")
            os.kill(os.getpid(), signal.SIGINT)

    with ThreadPoolExecutor(1) as thread:
        pressed = thread.submit(press)
        with pytest.raises(KeyboardInterrupt):
            yield
        pressed.result()


# -- it has what the async one has

OF_THE_LOOP = {
    "run_background",
    "run_writer",
    "reading",
    "mounts_of",
    "places",
    "known_digests",
    "has_image",
    "is_being_flushed",
    "abandon",
    "arrived",
}
"""What the async one has for code on its own loop: what starts it, gives it up, and gives or takes a reader."""


def public(door: type) -> dict[str, object]:
    return {name: value for name, value in vars(door).items() if not name.startswith("_")}


def test_every_call_is_there_and_nothing_else() -> None:
    there, here = public(snapfs.Snapshotter), public(blocking.Snapshotter)
    assert set(there) >= OF_THE_LOOP, "these are gone from the async one"
    plain = {"features", "options"}  # attributes of the async one
    assert set(there) - OF_THE_LOOP == set(here) - plain


@pytest.mark.parametrize("name", sorted(set(public(snapfs.Snapshotter)) & set(public(blocking.Snapshotter))))
def test_signature_and_docstring_are_the_same(name: str) -> None:
    there, here = public(snapfs.Snapshotter)[name], public(blocking.Snapshotter)[name]
    assert inspect.getdoc(here) == inspect.getdoc(there)
    if callable(there) and callable(here):
        assert inspect.signature(here) == inspect.signature(there)
        assert not inspect.iscoroutinefunction(here)


def test_opening_takes_the_same() -> None:
    there, here = inspect.signature(snapfs.open_snapshotter), inspect.signature(blocking.open_snapshotter)
    assert here.parameters == there.parameters


@pytest.mark.mounts
def test_no_call_returns_what_must_be_awaited(snapshots: blocking.Snapshotter) -> None:
    snapshots.prepare("web")
    assert snapshots.options == THROWN_AWAY
    assert "rootfs" in snapshots.features
    assert snapshots.space().f_blocks > 0
    assert snapshots.shown(snapshots.stat("web")) == snapshots.stat("web")
    assert snapshots.create(Kind.ACTIVE, "two") == 2
    assert snapshots.layer_path(2) == f"{snapshots.snapshots_directory}/2/fs" == f"{snapshots.root}/snapshots/2/fs"
    assert snapshots.has_rootfs
    assert snapshots.rootfs_of(2, snapshots.record(2)) == snapshots.mount("two")
    assert not snapshots.is_lost(2)
    assert snapshots.statistics().snapshots[Kind.ACTIVE] == 2
    assert snapshots.changes("web", list) == []
    assert snapshots.walk("name==web")[0].created_at.tzinfo is not None
    snapshots.flush()
    snapshots.find_layers("web")


def test_the_errors_are_the_same_and_show_where_they_come_from(snapshots: blocking.Snapshotter) -> None:
    with pytest.raises(NotFound, match='snapshot "web" does not exist') as caught:
        snapshots.stat("web")
    names = [entry.name for entry in caught.traceback]
    assert names[0] == "test_the_errors_are_the_same_and_show_where_they_come_from"
    assert names[-1] == "find"


def test_an_error_keeps_nothing_alive(snapshots: blocking.Snapshotter) -> None:
    gc.collect()
    gc.disable()
    try:
        try:
            snapshots.stat("web")
        except NotFound as error:
            seen = weakref.ref(error)
        assert seen() is None
    finally:
        gc.enable()


@pytest.mark.durable
def test_a_change_is_on_the_disk_when_its_call_returns(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pool, "fill", lambda pool, checkpoint: None)  # else the directory may have been flushed ahead
    synced: list[str] = []
    fsync = os.fsync

    def noting(fd: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{fd}"))
        fsync(fd)

    with blocking.open_snapshotter(root) as snapshots:
        monkeypatch.setattr(os, "fsync", noting)
        snapshots.prepare("web")
        assert f"{root}/snapshots" in synced


# -- threads


def test_many_threads_at_once(snapshots: blocking.Snapshotter, pool: ThreadPoolExecutor, root: Path) -> None:
    def life(thread: int) -> None:
        for number in range(50):
            key = f"{thread}-{number}"
            snapshots.prepare(key, labels={"thread": str(thread)})
            if number % 2:
                snapshots.commit(f"c{key}", key, wait=False)
            elif number % 3 == 0:
                snapshots.remove(key)

    list(pool.map(life, range(8)))
    infos = snapshots.walk()
    left = [number for number in range(50) if number % 2 or number % 3]
    assert sorted(info.name for info in infos) == sorted(
        f"{'c' * (number % 2)}{thread}-{number}" for thread in range(8) for number in left
    )
    assert len({info.id for info in infos}) == len(infos)
    assert sorted(os.listdir(root / "snapshots")) == sorted(str(info.id) for info in infos)


def test_of_threads_that_prepare_one_key_exactly_one_wins(snapshots: blocking.Snapshotter, pool: ThreadPoolExecutor) -> None:
    def client(number: int) -> bool:
        try:
            snapshots.prepare("k", labels={"by": str(number)})
        except AlreadyExists:
            return False
        return True

    with held_writer(snapshots):
        outcomes = [pool.submit(client, number) for number in range(8)]
        until_waiting(snapshots, 8)
    (winner,) = [number for number, outcome in enumerate(outcomes) if outcome.result()]
    assert [info.labels for info in snapshots.walk()] == [{"by": str(winner)}]


def test_threads_share_a_batch(snapshots: blocking.Snapshotter, pool: ThreadPoolExecutor) -> None:
    with held_writer(snapshots):
        for number in range(8):
            pool.submit(snapshots.prepare, f"k{number}")
        until_waiting(snapshots, 8)
        assert snapshots.walk() == []
    pool.shutdown()
    assert snapshots._loop.snapshotter.records.batches[8] == 1
    assert len(snapshots.walk()) == 8


def test_opened_in_one_thread_and_used_in_others(root: Path) -> None:
    """As in a notebook, where the thread that opened it may be gone."""
    opened: Future[blocking.Snapshotter] = Future()
    thread = threading.Thread(target=lambda: opened.set_result(blocking.open_snapshotter(root, THROWN_AWAY)))
    thread.start()
    thread.join()
    snapshots = opened.result()
    snapshots.prepare("web")
    assert snapshots.stat("web").id == 1
    thread = threading.Thread(target=snapshots.close)
    thread.start()
    thread.join()
    with pytest.raises(Closed):
        snapshots.stat("web")


def test_where_an_asyncio_loop_runs(root: Path) -> None:
    async def cell() -> int:
        with blocking.open_snapshotter(root, THROWN_AWAY) as snapshots:
            snapshots.prepare("web")
            return snapshots.stat("web").id

    assert asyncio.run(cell()) == 1


async def test_where_a_trio_loop_runs_it_is_refused(root: Path) -> None:
    with pytest.raises(RuntimeError, match=r"stop the trio loop that runs in this thread: use snapfs.open_snapshotter there"):
        blocking.open_snapshotter(root)
    assert not root.exists()
    snapshots = await trio.to_thread.run_sync(blocking.open_snapshotter, root, THROWN_AWAY)
    try:
        for call in (partial(snapshots.prepare, "web"), snapshots.walk, snapshots.space, snapshots.close):
            with pytest.raises(RuntimeError, match=r"trio.to_thread.run_sync"):
                call()
        assert await trio.to_thread.run_sync(snapshots.walk) == []
    finally:
        await trio.to_thread.run_sync(snapshots.close)


def test_the_changes_may_be_consumed_with_further_calls(snapshots: blocking.Snapshotter, root: Path) -> None:
    snapshots.prepare("web")
    (root / "snapshots/1/fs/file").write_text("x")

    def consume(lines: Iterable[str]) -> list[str]:
        return [f"{snapshots.stat('web').id} {line}" for line in lines]

    assert snapshots.changes("web", consume) == ["1 A /file\n"]


def test_a_listener_hears_of_each_change_before_its_call_returns(
    snapshots: blocking.Snapshotter, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[Change] = []

    def listen(change: Change) -> None:
        told.append(change)
        snapshots.walk()  # which it must not: it would wait for itself

    snapshots.subscribe(listen)
    snapshots.prepare("web")
    assert [change.after and change.after.name for change in told] == ["web"]
    assert "a listener of changes has failed" in caplog.text
    assert "would stop the trio loop" in caplog.text
    caplog.clear()
    assert snapshots.stat("web").id == 1


# -- Ctrl-C


def test_an_interrupted_call_that_waits_has_not_happened(snapshots: blocking.Snapshotter, root: Path) -> None:
    with held_writer(snapshots), ctrl_c(lambda: until_waiting(snapshots, 1)):
        snapshots.prepare("web")
    snapshots.prepare("after")
    assert [info.name for info in snapshots.walk()] == ["after"]
    assert os.listdir(root / "snapshots") == ["1"]
    assert not snapshots._loop._calls


def test_an_interrupted_call_under_way_has_happened(snapshots: blocking.Snapshotter, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = snapshots._loop.snapshotter.layers
    place, begun, interrupted = layers.place, threading.Event(), threading.Event()

    def slowly(*arguments: object) -> None:
        begun.set()
        assert interrupted.wait(20)
        place(*arguments)  # type: ignore[arg-type]

    def press() -> None:
        assert begun.wait(20)
        threading.Timer(0.05, interrupted.set).start()  # Ctrl-C has come, for what it is worth

    monkeypatch.setattr(layers, "place", slowly)
    with ctrl_c(press):
        snapshots.prepare("web")
    assert [info.name for info in snapshots.walk()] == ["web"]
    assert not snapshots._loop._calls


def test_a_second_ctrl_c_does_not_wait_for_the_call(snapshots: blocking.Snapshotter, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = snapshots._loop.snapshotter.layers
    monkeypatch.setattr(snapshots._loop.snapshotter.records, "_long_at", math.inf)  # as on a disk that is slow
    place, begun, go_on = layers.place, threading.Event(), threading.Event()

    def slowly(*arguments: object) -> None:
        begun.set()
        assert go_on.wait(20)
        place(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(layers, "place", slowly)
    cancelled = threading.Event()
    cancel = blocking._Call.cancel

    def noted(call: blocking._Call[object]) -> None:
        cancel(call)
        cancelled.set()

    monkeypatch.setattr(blocking._Call, "cancel", noted)
    with ctrl_c(lambda: begun.wait(20), lambda: cancelled.wait(20)):
        snapshots.prepare("web")
    assert not go_on.is_set()
    go_on.set()
    snapshots.flush()
    snapshots.update("web", {})  # after it in the writer
    assert [info.name for info in snapshots.walk()] == ["web"]


def test_an_interrupted_scan_ends(snapshots: blocking.Snapshotter, monkeypatch: pytest.MonkeyPatch) -> None:
    scanning, ended = threading.Event(), threading.Event()

    def endless(directory: str, checkpoint: Callable[[], None]) -> Usage:
        scanning.set()
        try:
            while True:
                checkpoint()
        finally:
            ended.set()

    monkeypatch.setattr("snapfs.services.counting.disk_usage", endless)
    snapshots.prepare("web")
    with ctrl_c(lambda: scanning.wait(20)):
        snapshots.usage("web")
    assert ended.wait(20)


def test_interrupted_before_it_was_sent_the_call_never_begins(
    snapshots: blocking.Snapshotter, monkeypatch: pytest.MonkeyPatch
) -> None:
    soon = snapshots._loop._soon
    calls: list[object] = []

    def interrupted(act: Callable[[], object]) -> None:
        calls.append(act)
        if len(calls) == 1:
            raise KeyboardInterrupt
        soon(act)

    monkeypatch.setattr(snapshots._loop, "_soon", interrupted)
    with pytest.raises(KeyboardInterrupt):
        snapshots.prepare("web")
    monkeypatch.undo()
    assert len(calls) == 2
    assert snapshots.walk() == []


def test_ctrl_c_at_any_moment(snapshots: blocking.Snapshotter) -> None:
    """What an interrupted call has done is done when the interruption comes out of it, and what has returned has happened."""
    presses = 0
    is_calling = False
    enough = threading.Event()
    returned: set[str] = set()
    interrupted = 0

    def interrupt(number: int, frame: object) -> None:
        nonlocal presses
        if is_calling:
            presses += 1
            raise KeyboardInterrupt

    def press() -> None:
        seeded = random.Random(1)
        while not enough.wait(seeded.random() * 0.004):
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        with ThreadPoolExecutor(1) as thread:
            thread.submit(press)
            while interrupted < 200:
                presses, key = 0, f"k{len(returned) + interrupted}"
                try:
                    is_calling = True
                    snapshots.prepare(key)
                    is_calling = False
                    returned.add(key)
                except KeyboardInterrupt:
                    is_calling = False
                    interrupted += 1
                    then, now = snapshots.walk(f"name=={key}"), snapshots.walk(f"name=={key}")
                    assert then == now or presses > 1
            enough.set()
    finally:
        enough.set()
        signal.signal(signal.SIGINT, before)
    assert returned <= {info.name for info in snapshots.walk()}
    assert not snapshots._loop._calls


def test_opening_that_is_interrupted_leaves_nothing_open(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, interrupted = threading.Event(), threading.Event()
    opened = snapfs.opening._open

    def slowly(*arguments: object) -> snapfs.Snapshotter:
        begun.set()
        assert interrupted.wait(20)
        return opened(*arguments)  # type: ignore[arg-type]

    def press() -> None:
        assert begun.wait(20)
        threading.Timer(0.05, interrupted.set).start()

    with monkeypatch.context() as patch:
        patch.setattr("snapfs.opening._open", slowly)
        with ctrl_c(press):
            blocking.open_snapshotter(root, THROWN_AWAY)
    assert loops() == []
    with blocking.open_snapshotter(root, THROWN_AWAY) as snapshots:
        assert snapshots.walk() == []


# -- opening and closing


def test_a_root_that_is_in_use_is_refused_and_no_thread_is_left(snapshots: blocking.Snapshotter, root: Path) -> None:
    with pytest.raises(Unavailable, match=f"is in use by the process with pid {os.getpid()}"):
        blocking.open_snapshotter(root)
    assert len(loops()) == 1


def test_records_that_were_lost_are_refused(root: Path) -> None:
    with blocking.open_snapshotter(root, THROWN_AWAY) as snapshots:
        snapshots.prepare("web")
    (root / "metadata.mdb").unlink()
    with pytest.raises(Damaged, match="holds layers but"):
        blocking.open_snapshotter(root)
    assert loops() == []


def test_without_a_block_it_is_closed_by_hand(root: Path) -> None:
    snapshots = blocking.open_snapshotter(root, THROWN_AWAY)
    snapshots.prepare("web")
    snapshots.close()
    snapshots.close()
    assert loops() == []
    for call in (partial(snapshots.stat, "web"), partial(snapshots.prepare, "k"), snapshots.walk, snapshots.space):
        with pytest.raises(Closed, match="the snapshotter is closed"):
            call()
    with blocking.open_snapshotter(root, THROWN_AWAY) as again:
        assert again.stat("web").id == 1


def test_an_error_in_the_block_comes_out_as_it_is(root: Path) -> None:
    with pytest.raises(KeyError, match="mine"), blocking.open_snapshotter(root, THROWN_AWAY) as snapshots:
        snapshots.prepare("web")
        raise KeyError("mine")
    assert loops() == []


def test_records_that_are_the_callers(root: Path, tmp_path: Path) -> None:
    store = MetaStore(str(tmp_path / "mine.mdb"), sync=False)
    for _ in range(2):
        with blocking.open_snapshotter(root, THROWN_AWAY, metastore=store) as snapshots:
            if not snapshots.walk():
                snapshots.prepare("web")
    with store.reading() as reader:
        assert reader.id_of("web") == 1
    store.close()


def test_several_roots_at_once(tmp_path: Path) -> None:
    with (
        blocking.open_snapshotter(tmp_path / "a", THROWN_AWAY) as one,
        blocking.open_snapshotter(tmp_path / "b", THROWN_AWAY) as two,
    ):
        one.prepare("web")
        assert two.walk() == []
        one.close()
        two.prepare("web")


def test_closing_finishes_the_writes_that_wait(root: Path, pool: ThreadPoolExecutor) -> None:
    with blocking.open_snapshotter(root, THROWN_AWAY) as snapshots:
        with held_writer(snapshots):
            waiting = [pool.submit(snapshots.prepare, f"k{number}") for number in range(5)]
            until_waiting(snapshots, 5)
            closing = [pool.submit(snapshots.close) for _ in range(2)]
            until(lambda: snapshots._loop.snapshotter._closed, "it is being closed")
            with pytest.raises(Closed):
                snapshots.prepare("late")
        assert [len(call.result()) for call in waiting] == [1] * 5
        assert [call.result() for call in closing] == [None] * 2
    with blocking.open_snapshotter(root, THROWN_AWAY) as again:
        assert len(again.walk()) == 5


def test_closing_while_a_scan_is_under_way(root: Path, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    scanning = threading.Event()

    def endless(directory: str, checkpoint: Callable[[], None]) -> Usage:
        scanning.set()
        while True:
            checkpoint()

    monkeypatch.setattr("snapfs.services.counting.disk_usage", endless)
    with blocking.open_snapshotter(root, THROWN_AWAY) as snapshots:
        snapshots.prepare("web")
        asked = pool.submit(snapshots.usage, "web")
        assert scanning.wait(20)
    with pytest.raises(Closed):
        asked.result()


def test_closing_under_threads_that_go_on(root: Path, pool: ThreadPoolExecutor) -> None:
    """Each call is answered, or refused as closed."""
    with blocking.open_snapshotter(root, THROWN_AWAY) as snapshots:
        for number in range(20):
            snapshots.prepare(f"k{number}")
        going = threading.Barrier(9)

        def client(number: int) -> int:
            done = 0
            going.wait()
            try:
                while True:
                    if number % 2:
                        assert len(snapshots.walk()) >= 20
                    else:
                        snapshots.prepare(f"{number}-{done}")
                    done += 1
            except Closed:
                return done

        clients = [pool.submit(client, number) for number in range(8)]
        going.wait()
        while sum(info.name[0] != "k" for info in snapshots.walk()) < 20:
            pass
    prepared = sum(call.result() for call in clients[::2])
    [call.result() for call in clients[1::2]]
    with blocking.open_snapshotter(root, THROWN_AWAY) as again:
        assert len(again.walk()) == 20 + prepared


def test_one_that_nobody_refers_to_is_closed(root: Path) -> None:
    snapshots = blocking.open_snapshotter(root, THROWN_AWAY)
    snapshots.prepare("web")
    del snapshots
    until(lambda: not loops(), "it was closed")
    with blocking.open_snapshotter(root, THROWN_AWAY) as again:
        assert again.stat("web").id == 1


def test_a_bug_that_ends_the_loop_is_told_to_all_who_wait(root: Path, pool: ThreadPoolExecutor) -> None:
    def bug() -> None:
        raise ZeroDivisionError

    snapshots = blocking.open_snapshotter(root, THROWN_AWAY)
    scanning = threading.Event()
    snapshots.prepare("web")
    asked = pool.submit(snapshots._loop.call, lambda: waiting(scanning))
    assert scanning.wait(20)
    snapshots._loop._soon(bug)
    for call in (asked.result, partial(snapshots.stat, "web")):
        with pytest.raises(Closed) as caught:
            call()
        assert isinstance(caught.value.__cause__, trio.TrioInternalError)
    with pytest.raises(trio.TrioInternalError):
        snapshots.close()
    with blocking.open_snapshotter(root, THROWN_AWAY) as again:
        assert again.stat("web").id == 1


async def waiting(has_begun: threading.Event) -> None:
    has_begun.set()
    await trio.sleep_forever()


# -- processes


def test_a_forked_process_is_refused_and_harms_nothing(snapshots: blocking.Snapshotter) -> None:
    snapshots.prepare("web")
    refused = f"Forked: {Forked()}"
    assert in_fork(partial(snapshots.stat, "web")) == refused
    assert in_fork(partial(snapshots.prepare, "k")) == refused
    assert in_fork(snapshots.space) == refused
    assert in_fork(snapshots.close) == "None"
    assert in_fork(snapshots.__del__) == "None"
    assert in_fork(snapshots._loop._close_at_exit) == "None"
    snapshots.prepare("more")
    assert len(snapshots.walk()) == 2


def test_a_forked_process_may_open_a_root_of_its_own(snapshots: blocking.Snapshotter, tmp_path: Path) -> None:
    def child() -> int:
        with blocking.open_snapshotter(tmp_path / "another", THROWN_AWAY) as own:
            own.prepare("web")
            return own.stat("web").id

    assert in_fork(child) == "1"


BEGIN = """
import os, signal, sys, threading
import snapfs
snapshots = snapfs.blocking.open_snapshotter(sys.argv[1], snapfs.Options(sync=snapfs.Sync.NONE))
snapshots.prepare("web")
begun = threading.Event()
def waiting():
    try:
        snapshots.changes("web", lambda lines: begun.set() or [snapshots.stat("web") for _ in iter(int, 1)])
    except snapfs.Closed:
        pass
"""


def script(root: Path, text: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # Python 3.12 and later warn of every fork with threads: the one here is what is tried
        [sys.executable, "-X", "dev", "-W", "ignore:This process:DeprecationWarning", "-c", BEGIN + text, str(root)],
        capture_output=True,
        text=True,
        timeout=30,
        preexec_fn=die_with_parent,
        check=False,
    )


def is_closed(root: Path) -> bool:
    """Whether it was closed, and not just left: the pool is empty then, and nothing mounted."""
    return os.listdir(root / "pool") == [] and not [mount for mount in mount_table() if str(root) in mount.target]


@pytest.mark.parametrize(
    "text",
    [
        "",
        pytest.param("print(snapshots.mount('web'))", marks=pytest.mark.mounts),
        "threading.Thread(target=waiting, daemon=True).start()\nbegun.wait()",
        "sys.exit(0)",
        "if os.fork() == 0: sys.exit(0)\nassert os.wait()[1] == 0",
        "keep = [snapshots.subscribe(lambda change: snapshots), snapshots]",
        "snapshots = None",
        "snapshots.close()",
    ],
)
def test_an_interpreter_that_ends_closes_it(root: Path, text: str) -> None:
    done = script(root, text)
    assert (done.returncode, done.stderr) == (0, "")
    assert is_closed(root)


def test_a_thread_may_go_on_using_it_when_the_main_thread_has_ended(root: Path) -> None:
    done = script(
        root,
        "def work():\n"
        "    threading.main_thread().join()\n"
        "    snapshots.prepare('late')\n"
        "    print(len(snapshots.walk()))\n"
        "threading.Thread(target=work).start()\n",
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "2\n", "")
    assert is_closed(root)


def test_an_interpreter_that_can_start_no_threads_at_its_end_ends_nevertheless(root: Path) -> None:
    """As those since Python 3.12."""
    done = script(
        root,
        "import atexit\n"
        'def refuse(thread): raise RuntimeError("can\'t create new thread at interpreter shutdown")\n'
        "import trio._core._thread_cache as cache\n"
        "def no_more(): threading.Thread.start = refuse; cache.THREAD_CACHE._idle_workers.clear()\n"
        "atexit.register(no_more)\n",
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert is_closed(root)
    with blocking.open_snapshotter(root, THROWN_AWAY) as again:
        assert again.stat("web").id == 1


def test_a_script_that_is_interrupted_in_a_call_closes_it(root: Path) -> None:
    done = script(
        root,
        "def endless(directory, checkpoint):\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    while True: checkpoint()\n"
        "import snapfs.services.counting\n"
        "snapfs.services.counting.disk_usage = endless\n"
        "with snapshots: snapshots.usage('web')\n",
    )
    assert done.returncode == -signal.SIGINT
    assert done.stderr.rstrip().endswith("KeyboardInterrupt")
    assert is_closed(root)
