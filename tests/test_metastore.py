"""The records: indexes that always agree with them, one writer, batches that are whole, reads that wait for nobody."""

from __future__ import annotations

import errno
import os
import random
import threading
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import lmdb
import msgspec
import pytest
import trio
import trio.testing

from snapfs import AlreadyExists, Change, Damaged, Kind, MetaStore, NotFound, SnapshotError, Snapshotter, Unavailable, Usage
from snapfs.root.trash import DEPTH
from snapfs.store import metastore
from snapfs.store.metastore import BATCH
from snapfs.store.reading import Reader
from snapfs.store.schema import SCHEMA, Record
from snapfs.store.writing import Writer
from tests.placing import DryPool
from tests.records import Held, adding, check_indexes, entries, record, until_in_line

# -- indexes


async def test_the_indexes_agree_with_the_records_after_each_operation(snapshotter: Snapshotter) -> None:
    """A long random life (the same in each run), refusals among it."""
    dice = random.Random(2)
    names = [f"{letter}{tail}" for letter in "abé" for tail in ("", "/1", "\xff", "🐙")]
    done = refused = 0
    for _ in range(400):
        key, other, parent = dice.choice(names), dice.choice(names), dice.choice([None, *names])
        calls: list[Callable[[], Awaitable[object]]] = [
            partial(snapshotter.prepare, key, parent),
            partial(snapshotter.prepare, key, parent),
            partial(snapshotter.view, key, parent),
            partial(snapshotter.commit, other, key, parent=parent),
            partial(snapshotter.commit, other, key),
            partial(snapshotter.rename, key, other),
            partial(snapshotter.remove, key),
            partial(snapshotter.update, key, {"x": "y"}),
            partial(snapshotter.usage, key),
        ]
        try:
            await dice.choice(calls)()
            done += 1
        except SnapshotError:
            refused += 1
        check_indexes(snapshotter.records)
    assert done > 50
    assert refused > 50


async def test_put_in_place_moves_every_index(store: MetaStore) -> None:
    base = await store.write(adding("base", Kind.COMMITTED))
    other = await store.write(adding("other", Kind.COMMITTED))
    number = await store.write(adding("web", Kind.ACTIVE, base))
    for after in (
        record("web", Kind.ACTIVE, other),
        record("web2", Kind.VIEW, other),
        record("web2", Kind.COMMITTED),
        record("web3", Kind.COMMITTED, base),
        record("web3", Kind.COMMITTED, base, Usage(1, 2)),
        record("web3", Kind.ACTIVE, base),
    ):
        await store.write(lambda writer, after=after: writer.put(number, after))
        check_indexes(store)
        with store.reading() as reader:
            assert reader.record(number) == after
    await store.write(lambda writer: writer.delete(number, record("web3", Kind.ACTIVE, base)))
    check_indexes(store)


async def test_listings_go_on_after_an_id(store: MetaStore) -> None:
    base = await store.write(adding("base", Kind.COMMITTED))
    numbers = [await store.write(adding(f"k{index}", Kind.ACTIVE, base)) for index in range(300)]
    numbers += [await store.write(adding(f"v{index}", Kind.VIEW, base)) for index in range(3)]
    with store.reading() as reader:
        for after in (0, 1, 2, 256, 300, 301):
            expected = [(number, f"k{index}") for index, number in enumerate(numbers[:300]) if number > after]
            assert list(reader.listing(Kind.ACTIVE, after)) == expected
            assert list(reader.children(base, Kind.ACTIVE, after)) == expected
        assert list(reader.listing(Kind.ACTIVE, 304)) == list(reader.children(base, Kind.ACTIVE, 304)) == []
        assert list(reader.numbers(after=302)) == [303, 304]
        assert reader.any_child(base) is not None
        assert reader.any_child(numbers[0]) is None


async def test_a_chain_is_nearest_first(store: MetaStore) -> None:
    number = 0
    for index in range(128):
        number = await store.write(adding(f"c{index}", Kind.COMMITTED, number))
    with store.reading() as reader:
        top = reader.record(number)
        assert top is not None
        assert reader.chain(top) == list(range(127, 0, -1))


# -- ids


async def test_a_chain_is_what_the_operation_has_made_of_it(store: MetaStore) -> None:
    """Though it is walked once, as long as it stays."""

    def operation(writer: Writer) -> list[list[int]]:
        for number in range(1, 6):
            adding(f"s{number}", Kind.COMMITTED, number - 1)(writer)
        on_five, found = record("top", parent=5), list[list[int]]()
        found.append(writer.chain(on_five))
        found[0].clear()  # which is the caller's
        found[0] = writer.chain(on_five)
        found.append(writer.chain(record("other", parent=adding("s6", Kind.COMMITTED, 5)(writer))))
        writer.put(4, record("s4", Kind.COMMITTED, 2))
        found.append(writer.chain(on_five))
        writer.overwrite(4, record("s4", Kind.COMMITTED, 1))
        found.append(writer.chain(on_five))
        writer.put(1, record("s1", Kind.COMMITTED, 5))
        with pytest.raises(Damaged, match="in a circle"):
            writer.chain(on_five)
        writer.delete(5, record("s5", Kind.COMMITTED, 4))
        with pytest.raises(Damaged):
            writer.chain(on_five)
        return found

    assert await store.write(operation) == [[5, 4, 3, 2, 1], [6, 5, 4, 3, 2, 1], [5, 4, 2, 1], [5, 4, 1]]


async def test_an_id_is_given_back_only_by_an_operation_that_failed(store: MetaStore) -> None:
    def failing(writer: Writer) -> None:
        writer.next_id()
        raise AlreadyExists("no")

    assert await store.write(adding("a")) == 1
    with pytest.raises(AlreadyExists):
        await store.write(failing)
    assert await store.write(adding("b")) == 2
    await store.write(lambda writer: writer.delete(2, record("b")))
    assert await store.write(adding("c")) == 3


# -- batches


@pytest.mark.durable
@pytest.mark.parametrize(
    ("error", "told"),
    [
        (AlreadyExists("taken"), AlreadyExists),
        (OSError(errno.ENOSPC, "No space left on device"), Unavailable),
        (lmdb.Error("refused"), Unavailable),
        (ZeroDivisionError("a bug"), ZeroDivisionError),
    ],
)
async def test_a_failing_operation_fails_alone(store: MetaStore, error: Exception, told: type[Exception]) -> None:
    undone: list[str] = []

    def failing(writer: Writer) -> None:
        writer.on_failure(lambda: undone.append("first"))
        writer.on_failure(lambda: undone.append("second"))
        writer.when_durable(lambda: undone.append("never"))
        writer.put(writer.next_id(), record("bad"))
        writer.changed(None, None)
        raise error

    changes: list[Change] = []
    store.listeners.append(changes.append)
    held = Held(store)
    held.add("before", adding("a"))
    held.add("bad", failing)
    held.add("after", adding("b"))
    await held.run()
    assert isinstance(held.outcomes.pop("bad"), told)
    assert held.outcomes == {"before": 1, "after": 2}
    assert undone == ["second", "first"]  # the last first
    assert changes == []
    check_indexes(store)
    with store.reading() as reader:
        assert [info.name for info in reader.walk()] == ["a", "b"]


@pytest.mark.durable
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
async def test_if_the_sync_fails_all_of_its_batch_do_and_are_undone(
    snapshotter: Snapshotter, root: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    await snapshotter.prepare("b")
    await snapshotter.commit("base", "b")
    await snapshotter.usage("base")
    before = await snapshotter.walk()
    changes: list[Change] = []
    snapshotter.subscribe(changes.append)
    errors: list[Unavailable] = []

    def refuse(fd: int) -> None:
        raise OSError(code, os.strerror(code))

    async def prepare(key: str, parent: str | None) -> None:
        with pytest.raises(Unavailable) as caught:
            await snapshotter.prepare(key, parent)
        errors.append(caught.value)

    async def remove() -> None:
        with pytest.raises(Unavailable):
            await snapshotter.remove("base")

    busy, go_on = trio.Event(), threading.Event()

    def hold(writer: Writer) -> None:
        trio.from_thread.run_sync(busy.set)
        assert go_on.wait(20)

    with monkeypatch.context() as patch:
        patch.setattr(snapshotter.layers.pool, "_ready", DryPool())
        patch.setattr(os, "fsync", refuse)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(snapshotter.records.write, hold)
            await busy.wait()
            nursery.start_soon(remove)
            await until_in_line(snapshotter.records, 1)
            nursery.start_soon(prepare, "one", None)
            nursery.start_soon(prepare, "two", None)
            await until_in_line(snapshotter.records, 3)
            go_on.set()
    assert [error.errno for error in errors] == [code, code]
    assert os.strerror(code) in str(errors[0])
    assert await snapshotter.walk() == before
    assert os.listdir(root / "snapshots") == ["1"]
    assert changes == []
    check_indexes(snapshotter.records)
    await snapshotter.prepare("one", "base")
    assert (await snapshotter.stat("one")).id == 2
    await snapshotter.cleanup()
    assert os.listdir(root / "trash") == []


@pytest.mark.durable
async def test_an_undone_prepare_leaves_nothing(snapshotter: Snapshotter, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(snapshotter.layers.pool, "_ready", DryPool())
        patch.setattr(os, "fsync", refuse)
        with pytest.raises(Unavailable):
            await snapshotter.prepare("web")
    assert os.listdir(root / "snapshots") == os.listdir(root / "trash") == []


@pytest.mark.durable
async def test_a_directory_is_synced_once_a_batch_and_before_the_records(
    store: MetaStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    fd = os.open(tmp_path, os.O_RDONLY)

    def sync(synced: int) -> None:
        assert synced == fd
        with store.reading() as reader:
            seen.append(reader.id_of("k5") is None)

    monkeypatch.setattr(os, "fsync", sync)
    held = Held(store)

    def operation(writer: Writer, name: str) -> None:
        adding(name)(writer)
        writer.sync_directory(fd)

    for number in range(10):
        held.add(f"k{number}", partial(operation, name=f"k{number}"))
    try:
        await held.run()
    finally:
        os.close(fd)
    assert seen == [True]
    with store.reading() as reader:
        assert reader.id_of("k5") == 6


@pytest.mark.durable
async def test_more_than_a_batch_is_done_in_several(store: MetaStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    syncs: list[int] = []
    monkeypatch.setattr(os, "fsync", syncs.append)
    held = Held(store)

    def operation(writer: Writer, name: str) -> None:
        adding(name)(writer)
        writer.sync_directory(7)

    for number in range(BATCH + 1):
        held.add(f"k{number}", partial(operation, name=f"k{number}"))
    await held.run()
    assert syncs == [7, 7]
    assert entries(store, "names") == BATCH + 1


@pytest.mark.durable
async def test_what_comes_after_is_done_when_the_batch_is_durable(store: MetaStore) -> None:
    seen: list[int | None] = []

    def operation(writer: Writer) -> None:
        adding("a")(writer)

        def later() -> None:
            with store.reading() as reader:
                seen.append(reader.id_of("a"))
            raise OSError(errno.EIO, "logged only")

        writer.when_durable(later)

    await store.write(operation)
    assert seen == [1]
    assert await store.write(adding("b")) == 2


# -- short writes, where nothing is flushed


def refused_late(writer: Writer) -> None:
    adding("lost")(writer)
    raise NotFound("no such thing")


def noting(seen: list[object], name: str, act: Callable[[], object] = lambda: None) -> Callable[[Writer], int]:
    """An operation that adds ``name`` and notes in which thread it has run."""

    def operation(writer: Writer) -> int:
        act()
        seen.append(threading.current_thread())
        return adding(name)(writer)

    return operation


async def test_a_short_write_runs_where_it_was_asked_for(store: MetaStore) -> None:
    seen: list[object] = []
    assert await store.write(noting(seen, "a"), short=True) == 1
    assert await store.write(noting(seen, "b")) == 2
    with pytest.raises(NotFound):
        await store.write(refused_late, short=True)
    assert seen[0] is threading.current_thread() is not seen[1]
    with store.reading() as reader:
        assert reader.last_id() == 2
    check_indexes(store)


@pytest.mark.durable
async def test_a_short_write_that_is_flushed_keeps_nobody_from_the_loop(store: MetaStore) -> None:
    seen: list[object] = []
    await store.write(noting(seen, "a"), short=True)
    assert seen[0] is not threading.current_thread()


async def test_a_short_write_waits_for_those_before_it(store: MetaStore) -> None:
    seen: list[object] = []
    told: list[str] = []
    store.listeners.append(lambda change: told.append(change.after.name if change.after else ""))
    busy, go_on = trio.Event(), threading.Event()

    def named(name: str, act: Callable[[], object] = lambda: None) -> Callable[[Writer], None]:
        def operation(writer: Writer) -> None:
            number = noting(seen, name, act)(writer)
            writer.changed(None, writer.info(number, record(name)))

        return operation

    def hold() -> None:
        trio.from_thread.run_sync(busy.set)
        assert go_on.wait(20)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(store.write, named("a", hold))
        await busy.wait()
        nursery.start_soon(partial(store.write, named("b"), short=True))
        await until_in_line(store, 1)
        with trio.CancelScope() as given_up:
            given_up.cancel()
            await store.write(named("c"), short=True)
        assert given_up.cancelled_caught
        go_on.set()
    await store.write(named("d"), short=True)
    assert told == ["a", "b", "d"]
    assert seen[1] is not threading.current_thread() is seen[2]


async def test_a_disk_that_is_slow_keeps_the_loop_once(store: MetaStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metastore, "SHORT", 0.0)
    seen: list[object] = []
    for name in "ab":
        await store.write(noting(seen, name), short=True)
    monkeypatch.setattr(metastore, "BUSY", 0.0)
    await store.write(noting(seen, "c"), short=True)
    assert [thread is threading.current_thread() for thread in seen] == [True, False, True]


async def test_who_writes_again_and_again_lets_others_in_between(store: MetaStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metastore, "TURN", 0.0)
    order: list[str] = []

    async def add(prefix: str) -> None:
        for number in range(3):
            await store.write(adding(f"{prefix}{number}"), short=True)
            order.append(prefix)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(add, "a")
        nursery.start_soon(add, "b")
    assert order not in (["a"] * 3 + ["b"] * 3, ["b"] * 3 + ["a"] * 3)


async def test_a_short_write_of_a_call_that_was_cancelled_is_not_made(store: MetaStore) -> None:
    with trio.CancelScope() as given_up:
        given_up.cancel()
        await store.write(adding("a"), short=True)
    assert given_up.cancelled_caught
    with store.reading() as reader:
        assert not reader.last_id()


async def test_a_short_write_that_needs_room_does_not_keep_the_loop_while_others_read(tmp_path: Path) -> None:
    """The map can't grow while anybody reads, and somebody may list all there is: then the writer waits, and nobody else."""
    store = MetaStore(str(tmp_path / "small"), map_size=1 << 20, sync=False)
    reading, go_on = trio.Event(), trio.Event()

    def read() -> None:
        with store.reading(long=True) as reader:
            reader.last_id()
            trio.from_thread.run_sync(reading.set)
            trio.from_thread.run(go_on.wait)  # on a loop that waits for this reader it would never end

    async def fill() -> None:
        for number in range(4000):
            await store.write(adding(f"{number}" + "n" * 200), short=True)
            if go_on.is_set():
                break

    with trio.fail_after(60):
        async with trio.open_nursery() as serving:
            await serving.start(store.serve)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.to_thread.run_sync, read)
                await reading.wait()
                nursery.start_soon(fill)
                while not store.environment.is_changing:
                    await trio.sleep(0.001)
                go_on.set()
            check_indexes(store)
            store.stop()
    store.close()


# -- reads


async def test_reads_do_not_wait_for_writes_and_see_the_last_whole_batch(store: MetaStore) -> None:
    await store.write(adding("a"))
    busy, go_on = trio.Event(), threading.Event()

    def slow(writer: Writer) -> None:
        adding("b")(writer)
        assert writer.id_of("b") == 2  # it sees what it did
        trio.from_thread.run_sync(busy.set)
        assert go_on.wait(20)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(store.write, slow)
        await busy.wait()
        with store.reading() as reader:
            assert reader.id_of("a") == 1
            assert reader.id_of("b") is None
            assert [info.name for info in reader.walk()] == ["a"]
        go_on.set()
    with store.reading() as reader:
        assert reader.id_of("b") == 2


async def test_a_reader_keeps_its_state_while_others_write(store: MetaStore) -> None:
    await store.write(adding("a"))
    seen: list[str] = []
    reading, go_on = trio.Event(), threading.Event()

    def read() -> None:
        with store.reading() as reader:
            trio.from_thread.run_sync(reading.set)
            assert go_on.wait(20)
            seen.extend(info.name for info in reader.walk())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.to_thread.run_sync, read)
        await reading.wait()
        await store.write(adding("b"))
        go_on.set()
    assert seen == ["a"]


@pytest.mark.parametrize("name", ["", "x" * 1000, "\udcff", "none"])
async def test_a_name_that_nobody_can_have_is_not_found(store: MetaStore, name: str) -> None:
    with store.reading() as reader:
        assert reader.id_of(name) is None


# -- opening, closing, damage


async def test_reading_and_writing_after_the_end(tmp_path: Path) -> None:
    store = MetaStore(str(tmp_path / "m"), map_size=1 << 20)
    with pytest.raises(Unavailable, match="closed"):
        await store.write(adding("a"))  # nobody serves
    async with trio.open_nursery() as nursery:
        await nursery.start(store.serve)
        await store.write(adding("a"))
        store.stop()
        store.stop()
    with pytest.raises(Unavailable, match="closed"):
        await store.write(adding("b"))
    async with trio.open_nursery() as nursery:  # it may be served again
        await nursery.start(store.serve)
        assert await store.write(adding("b")) == 2
        store.stop()
    store.close()
    store.close()

    def read() -> None:
        with store.reading():
            raise AssertionError("it is closed")

    with pytest.raises(Unavailable, match="closed"):
        read()


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        (SCHEMA + 1, rf"newer snapfs \(schema {SCHEMA + 1}; this one reads {SCHEMA}\): use that one"),
        (99, r"newer snapfs \(schema 99;"),
        (0, 'schema "0", which no snapfs writes'),
        ("x", 'schema "x", which no snapfs writes'),
        ("", 'schema "", which no snapfs writes'),
    ],
)
def test_another_schema_is_refused(tmp_path: Path, schema: object, words: str) -> None:
    path = str(tmp_path / "m")
    store = MetaStore(path, map_size=1 << 20)
    with store.environment.env.begin(write=True) as txn:
        txn.put(b"schema", str(schema).encode(), db=store.tables.meta)
    store.close()
    with pytest.raises(Damaged, match=words):
        MetaStore(path, map_size=1 << 20)


def test_a_file_that_is_no_store_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "m").write_bytes(b"not LMDB at all" * 1000)
    with pytest.raises(Damaged):
        MetaStore(str(tmp_path / "m"), map_size=1 << 20)


def test_a_store_that_can_not_be_opened_is_unavailable(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="No such file") as caught:
        MetaStore(str(tmp_path / "none/m"))
    assert caught.value.errno == errno.ENOENT


async def test_a_record_that_can_not_be_read_is_damaged(store: MetaStore) -> None:
    await store.write(adding("a"))
    with store.environment.env.begin(write=True) as txn:
        txn.put((1).to_bytes(8, "big"), b"\xc1nonsense", db=store.tables.snapshots)
    with store.reading() as reader, pytest.raises(Damaged, match="snapshot 1"):
        reader.record(1)
    with store.reading() as reader, pytest.raises(Damaged):
        list(reader.walk())


async def test_a_parent_without_a_record_is_damaged(store: MetaStore) -> None:
    await store.write(lambda writer: writer.put(writer.next_id(), record("a", Kind.ACTIVE, 77)))

    def chain(reader: Reader) -> object:
        found = reader.record(1)
        assert found is not None
        return reader.chain(found)

    with store.reading() as reader, pytest.raises(Damaged, match="77"):
        chain(reader)


def test_records_of_an_older_snapfs_may_lack_the_last_fields() -> None:
    old = msgspec.msgpack.encode(["web", "active", 0, 1, 2, {"a": "b"}])
    assert msgspec.msgpack.decode(old, type=Record) == Record("web", Kind.ACTIVE, 0, 1, 2, {"a": "b"})
    counted = msgspec.msgpack.encode(["web", "committed", 0, 1, 2, {}, {"inodes": 3, "size": 4096}])
    assert msgspec.msgpack.decode(counted, type=Record) == Record("web", Kind.COMMITTED, 0, 1, 2, {}, Usage(3, 4096), "")


# -- the trash


async def test_deletion_of_what_is_deep_broad_and_odd(snapshotter: Snapshotter, root: Path) -> None:
    outside = root.parent / "outside"
    outside.mkdir()
    (outside / "precious").write_text("x")
    await snapshotter.prepare("web")
    layer = root / "snapshots/1/fs"
    for depth in (DEPTH - 2, DEPTH - 1, DEPTH, DEPTH + 1, 3 * DEPTH + 1):
        path = layer / "/".join(f"{depth}-{level}" for level in range(depth))
        path.mkdir(parents=True)
        (path / "file").write_text("x")
    for number in range(500):
        (layer / f"n{number}").write_text("")
    os.symlink(outside, layer / "link")
    os.symlink("/nowhere", layer / "dangling")
    os.mkfifo(layer / "fifo")
    os.mknod(layer / "gone", 0o020000, os.makedev(0, 0))
    (layer / "locked").mkdir(mode=0o000)
    await snapshotter.remove("web")
    assert os.listdir(root / "snapshots") == []
    assert os.listdir(root / "trash") == []
    assert (outside / "precious").read_text() == "x"


async def test_deletion_can_be_stopped_and_goes_on_later(snapshotter: Snapshotter, root: Path) -> None:
    class StopError(Exception):
        pass

    await snapshotter.prepare("web")
    for number in range(50):
        (root / f"snapshots/1/fs/{number}").write_text("")
    snapshotter.layers.move_to_trash(1)
    calls = 0

    def checkpoint() -> None:
        nonlocal calls
        calls += 1
        if calls == 20:
            raise StopError

    with pytest.raises(StopError):
        snapshotter.layers.empty_trash(checkpoint)
    assert len(os.listdir(root / "trash")) == 1
    snapshotter.layers.empty_trash()
    assert os.listdir(root / "trash") == []


async def test_removals_while_the_trash_is_emptied(
    snapshotter: Snapshotter, root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A thread for each; whose system call is the next is decided by dice (the same in each run)."""
    layers, dice = snapshotter.layers, random.Random(3)
    changed = threading.Condition()
    threads: list[threading.Thread] = []
    turn: threading.Thread | None = None

    def in_turn(function: Callable[..., Any]) -> Callable[..., Any]:
        def act(*args: Any, **named: Any) -> Any:
            nonlocal turn
            with changed:
                changed.wait_for(lambda: turn is threading.current_thread() or len(threads) < 2)
                try:
                    return function(*args, **named)
                finally:
                    turn = dice.choice(threads) if threads else None
                    changed.notify_all()

        return act

    def run(act: Callable[[], object]) -> None:
        act()
        with changed:
            threads.remove(threading.current_thread())
            changed.notify_all()

    for number in range(1, 200):
        await snapshotter.prepare(f"{number}")
        if number % 3 == 0:
            (root / f"snapshots/{number}/fs/file").write_text("")
        if number % 3 == 1:
            (root / f"snapshots/{number}/work/work").mkdir()
    for number in range(1, 200, 2):
        layers.move_to_trash(number)
        with monkeypatch.context() as patch:
            for function in ("unlink", "rmdir", "rename", "open"):
                patch.setattr(f"os.{function}", in_turn(getattr(os, function)))
            threads += [threading.Thread(target=run, args=[partial(layers.move_to_trash, number + 1)])] if number < 199 else []
            threads.append(threading.Thread(target=run, args=[layers.empty_trash]))
            turn = threads[0]
            running = list(threads)
            for thread in running:
                thread.start()
            for thread in running:
                thread.join()
        assert layers.trash.count == len(os.listdir(root / "trash"))
    assert layers.empty_trash() == []
    assert os.listdir(root / "snapshots") == os.listdir(root / "trash") == []
    assert caplog.messages == []


async def test_a_listener_that_fails_keeps_nobody_waiting(store: MetaStore, caplog: pytest.LogCaptureFixture) -> None:
    heard: list[Change] = []

    def fail(change: Change) -> None:
        raise RuntimeError("a bug")

    def add(writer: Writer) -> None:
        adding("a")(writer)
        writer.changed(None, None)

    store.listeners += [fail, heard.append]
    with trio.fail_after(20):
        await store.write(add)
    assert len(heard) == 1
    assert "a listener of changes has failed" in caplog.text
