"""What runs short: disk, records' map, address space, descriptors; and what goes missing behind our back."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from snapfs import open_snapshotter
from snapfs.backup import backup
from snapfs.errors import AlreadyExists, Unavailable
from snapfs.metastore import MetaStore, Writer
from snapfs.model import Kind
from tests.test_metastore import Held, adding, check_indexes

# -- the records' map

TINY = 1 << 16  # bytes: what the tables take when they are made


async def test_the_map_grows_while_there_is_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody meets a full map.  Each operation is there once, and what it did besides is done once."""
    store = MetaStore(str(tmp_path / "m"), map_size=TINY)
    monkeypatch.setattr("snapfs.reserve.STEP", 1 << 16)
    sizes = {store.map_size}
    undone: list[str] = []
    done: list[str] = []

    def operation(name: str) -> Callable[[Writer], int]:
        def run(writer: Writer) -> int:
            writer.on_failure(lambda: undone.append(name))
            writer.when_durable(lambda: done.append(name))
            return adding(name)(writer)

        return run

    async def add(name: str) -> None:
        await store.write(operation(name))
        sizes.add(store.map_size)

    names = [f"{n:0200d}" for n in range(2000)]
    async with trio.open_nursery() as nursery:
        await nursery.start(store.serve)
        async with trio.open_nursery() as adding_all:
            for name in names:
                adding_all.start_soon(add, name)
        store.stop()
    check_indexes(store)
    with store.reading() as reader:
        assert [info.name for info in reader.walk()] == names
        assert reader.last_id() == len(names)
    assert len(sizes) > 3
    assert sorted(done) == names
    assert len(undone) > len(set(undone)) > 0, "a batch was run again, and what it had done undone first"
    store.close()


async def test_an_error_of_the_first_run_is_not_that_of_the_second(tmp_path: Path) -> None:
    """An operation that another one of its batch made fail is run again with it."""
    store = MetaStore(str(tmp_path / "m"), map_size=TINY)
    told: list[object] = []

    def refused(writer: Writer) -> None:
        if not told:
            told.append("first")
            raise AlreadyExists("only in the first run")

    def big(writer: Writer) -> None:
        for n in range(400):
            adding(f"{n:0200d}")(writer)

    held = Held(store)
    held.add("refused", refused)
    held.add("big", big)
    async with trio.open_nursery() as nursery:
        await nursery.start(store.serve)
        await held.run()
        store.stop()
    store.close()
    assert held.outcomes == {"refused": None, "big": None}
    assert told == ["first"]


async def test_growing_waits_for_who_reads_and_nobody_else_waits(tmp_path: Path) -> None:
    """LMDB can't resize a map that is in use: who reads in a thread sees its state to the end.  Meanwhile the loop reads on,
    though who begins to read at length waits its turn, so that the writer's comes."""
    store = MetaStore(str(tmp_path / "m"), map_size=TINY)
    go_on = threading.Event()
    late_begun = trio.Event()
    order: list[str] = []

    def read(name: str, begun: Callable[[], None]) -> list[str]:
        with store.reading(long=True) as reader:
            found = reader.walk()
            first = [next(found).name]
            trio.from_thread.run_sync(begun)
            assert go_on.wait(20)
            order.append(name)
            return first + [info.name for info in found]

    async def grow() -> None:
        for n in range(1, 400):
            await store.write(adding(f"{n:0200d}"))
        order.append("grown")

    async def read_late() -> None:
        await trio.to_thread.run_sync(read, "late", late_begun.set)

    async with trio.open_nursery() as nursery:
        await nursery.start(store.serve)
        await store.write(adding("0"))
        async with trio.open_nursery() as both:
            begun = trio.Event()

            async def read_early() -> None:
                assert await trio.to_thread.run_sync(read, "early", begun.set) == ["0"]

            both.start_soon(read_early)
            await begun.wait()
            both.start_soon(grow)
            while not store.is_growing:
                await trio.sleep(0.001)
            both.start_soon(read_late)
            for _ in range(100):
                await trio.sleep(0.001)
                with store.reading() as outer, store.reading() as inner:
                    assert outer.last_id() == inner.last_id() < 399
            assert store.is_growing
            assert not late_begun.is_set()
            go_on.set()
        store.stop()
    assert order[0] == "early"
    assert sorted(order) == ["early", "grown", "late"]
    check_indexes(store)
    store.close()


async def test_a_map_that_another_process_made_larger(tmp_path: Path) -> None:
    """Reading and writing go on, whichever of them meets it first."""
    store = MetaStore(str(tmp_path / "m"), map_size=TINY)

    def enlarge(table: str) -> None:
        subprocess.run([sys.executable, "-c", ENLARGE, store.path, table], check=True)

    async with trio.open_nursery() as nursery:
        await nursery.start(store.serve)
        with store.reading():
            enlarge("once")
            with pytest.raises(Unavailable, match="try again"), store.reading():
                pass  # a transaction of the old map keeps the new one from being had
        with store.reading() as reader:
            assert reader.count(Kind.ACTIVE) == 0
        enlarge("twice")
        await store.write(adding("ours"))
        with store.reading() as reader:
            assert reader.count(Kind.ACTIVE) == 1
        store.stop()
    store.close()


ENLARGE = """
import sys, lmdb
with lmdb.open(sys.argv[1], subdir=False, max_dbs=32, map_size=1 << 26) as env:
    with env.begin(write=True) as txn:
        other = env.open_db(sys.argv[2].encode(), txn)
        for n in range(1000):
            txn.put(str(n).encode(), b"x" * 2000, db=other)
"""


def test_the_map_grows_for_who_serves_nobody_and_a_backup_holds_it_all(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    store = MetaStore(str(tmp_path / "root/metadata.mdb"), map_size=TINY)

    def add_many(writer: Writer) -> None:
        for n in range(20_000):
            adding(f"{n:0200d}")(writer)

    store.write_now(add_many)
    assert store.map_size > 1 << 22
    with store.reading() as reader:
        assert reader.misindexed() == 0
    store.close()
    made = backup(str(tmp_path / "root"), str(tmp_path / "copy"))
    assert made.snapshots == 20_000
    copy = MetaStore(str(tmp_path / "copy"))
    copy.write_now(adding("one more"))
    with copy.reading() as reader:
        assert reader.misindexed() == 0
    copy.close()


async def test_no_room_for_what_a_directory_says_of_its_snapshot(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused like any other want of room, and nothing is left."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "")

    async with open_snapshotter(root) as snapshotter:
        await snapshotter.prepare("before")
        with monkeypatch.context() as patch:
            patch.setattr("snapfs.imprint.write", full)
            with pytest.raises(Unavailable) as caught:
                await snapshotter.prepare("web")
        assert caught.value.errno == errno.ENOSPC
        assert os.listdir(root / "snapshots") == ["1"]
        await snapshotter.prepare("web")
