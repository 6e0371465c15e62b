"""The records by themselves: a store, what is put into it, and whether its indexes agree."""

from __future__ import annotations

import threading
from collections.abc import Callable

import lmdb
import trio

from snapfs import Kind, MetaStore, Usage
from snapfs.store.schema import Record
from snapfs.store.writing import Writer


def check_indexes(store: MetaStore) -> None:
    """Recompute all indexes from the records and compare."""
    with store.reading() as reader:
        records = {number: record for number in reader.ids() if (record := reader.record(number)) is not None}
        assert reader.ids() == set(records)
        assert max(records, default=0) <= reader.last_id()
        assert {record.name: reader.id_of(record.name) for record in records.values()} == {
            record.name: number for number, record in records.items()
        }
        assert [info.name for info in reader.walk()] == sorted((r.name for r in records.values()), key=str.encode)
        assert reader.uncounted() == [
            number for number, record in sorted(records.items()) if record.kind is Kind.COMMITTED and record.usage is None
        ]
        for kind in Kind:
            assert list(reader.listing(kind)) == [(n, r.name) for n, r in sorted(records.items()) if r.kind is kind]
        for parent in {0, *records, *(record.parent for record in records.values())} - {0}:
            assert parent in records
            for kind in Kind:
                assert list(reader.children(parent, kind)) == [
                    (n, r.name) for n, r in sorted(records.items()) if r.parent == parent and r.kind is kind
                ]
        total = sum(1 for record in records.values() if record.parent)
    assert entries(store, "children") == total  # none left over under a parent that is gone
    assert entries(store, "names") == len(records)


def entries(store: MetaStore, table: str) -> int:
    database = {"children": store.tables.children, "names": store.tables.names}[table]
    with store.environment.env.begin() as txn:
        return int(txn.stat(database)["entries"])


def record(name: str, kind: Kind = Kind.ACTIVE, parent: int = 0, usage: Usage | None = None) -> Record:
    return Record(name, kind, parent, 1, 1, {"a": "b"}, usage)


def adding(name: str, kind: Kind = Kind.ACTIVE, parent: int = 0) -> Callable[[Writer], int]:
    def operation(writer: Writer) -> int:
        number = writer.next_id()
        writer.put(number, record(name, kind, parent))
        return number

    return operation


async def until_in_line(store: MetaStore, count: int) -> None:
    """Return when at least ``count`` operations wait for the writer, which is held: what gets that far by way of a thread may
    take its time, and trio counts as blocked who waits for one."""
    with trio.fail_after(20):
        while store._queue is None or store._queue.qsize() < count:
            await trio.sleep(0.001)


class Held:
    """Operations that wait in one batch behind one that holds the writer."""

    def __init__(self, store: MetaStore) -> None:
        self.store = store
        self.outcomes: dict[str, object] = {}
        self._waiting: list[tuple[str, Callable[[Writer], object]]] = []

    def add(self, name: str, operation: Callable[[Writer], object]) -> None:
        self._waiting.append((name, operation))

    async def run(self) -> None:
        busy, go_on = trio.Event(), threading.Event()

        def hold(writer: Writer) -> None:
            trio.from_thread.run_sync(busy.set)
            assert go_on.wait(20)

        async def write(name: str, operation: Callable[[Writer], object]) -> None:
            try:
                self.outcomes[name] = await self.store.write(operation)
            except Exception as error:
                self.outcomes[name] = error

        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.store.write, hold)
            await busy.wait()
            for number, (name, operation) in enumerate(self._waiting, 1):
                nursery.start_soon(write, name, operation)
                await until_in_line(self.store, number)  # in this order
            go_on.set()


def readers(env: lmdb.Environment) -> list[str]:
    """The state of each taken place in LMDB's table: the transaction that is read, "-" for a place kept for the next one."""
    lines = env.readers().splitlines()[1:]
    return [line.split()[2] for line in lines]
