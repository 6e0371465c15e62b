"""Writing: what an operation may change of the records, within one write transaction."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol, TypeVar

import lmdb

from snapfs.errors import Damaged
from snapfs.model import Change, Info, Kind
from snapfs.store.reading import Entry, Reader
from snapfs.store.schema import IDS, Record, Tables, encode, key_of

Undo = Callable[[], None]

T_co = TypeVar("T_co", covariant=True)


class Operation(Protocol[T_co]):
    """One change of the records, with the work on directories that belongs to it; ``MetaStore.write`` runs it.

    **It may run several times**, of which the last counts: where the map turns out too small the whole batch is run anew, and
    so is one that was refused on a full disk and may use the reserve.  So it leaves nothing behind but what it does through its
    ``writer``: the records, and directories whose undoing it has given to ``on_failure``.  It runs in the writer's thread and
    awaits nothing; the errors it raises reach its caller, and then nothing has changed.
    """

    def __call__(self, writer: Writer, /) -> T_co: ...


class Writer(Reader):
    """What a write operation may do besides reading.  It runs in the writer's thread, one operation at a time."""

    def __init__(self, tables: Tables, txn: lmdb.Transaction[bytes], directories: set[int]) -> None:
        super().__init__(tables)
        self._txn = txn
        self._directories = directories
        self.undos: list[Undo] = []
        self.afters: list[Undo] = []
        self.changes: list[Change] = []

    def on_failure(self, undo: Undo) -> None:
        """Run ``undo`` if this operation, or the sync of its batch, fails after all."""
        self.undos.append(undo)

    def when_durable(self, act: Undo) -> None:
        """Run ``act`` in the writer's thread once the batch is on disk; what it raises is logged."""
        self.afters.append(act)

    def sync_directory(self, fd: int) -> None:
        """Flush the directory open as ``fd`` before the batch's records, once a batch: no record without its directory."""
        self._directories.add(fd)

    def changed(self, before: Info | None, after: Info | None, *, counted: bool = False) -> None:
        """Tell the listeners, once it is durable."""
        self.changes.append(Change(before, after, counted))

    def next_id(self) -> int:
        """An id that was never given out; given back if the operation fails, since then nobody has seen it."""
        last = self._txn.get(b"last_id", key_of(0), db=self._tables.meta)
        number = int.from_bytes(last, "big") + 1
        if len(last) != 8 or number >= IDS:
            raise self._wrong_last_id(number - 1)
        self._txn.put(b"last_id", key_of(number), db=self._tables.meta)
        return number

    def _wrong_last_id(self, number: int) -> Damaged:
        return Damaged(f"no new snapshot can be made: the records say that the last id is {number}, which can't be")

    def add(self, number: int, record: Record) -> None:
        """Write ``record`` as snapshot ``number``, which was just given out, with all indexes; its name must be free."""
        tables, txn, key, name = self._tables, self._txn, key_of(number), record.name.encode()
        # appending is quick, and refused where there is an id as high
        added = txn.put(key, encode(record), db=tables.snapshots, append=True)
        if not (added and txn.put(key, name, db=tables.kinds[record.kind], append=True)):
            raise self._wrong_last_id(number - 1)
        txn.put(name, key, db=tables.names)
        if record.parent:
            txn.put(key_of(record.parent) + record.kind[0].encode() + key, name, db=tables.children)

    def put(self, number: int, record: Record) -> None:
        """Write ``record`` as snapshot ``number``, in place of what that was, with all indexes."""
        before = self.record(number)
        for said in (before, record):
            if said is not None and self.id_of(said.name) not in (None, number):
                raise Damaged(f'two snapshots are called "{said.name}": {self.id_of(said.name)} and {number}')
        self._reindex(set(self._indexes(number, before)) if before is not None else set(), set(self._indexes(number, record)))
        self.overwrite(number, record)

    def overwrite(self, number: int, record: Record) -> None:
        """Write ``record`` as snapshot ``number``, whatever that was, without any index."""
        self._txn.put(key_of(number), encode(record), db=self._tables.snapshots)

    def mark_placed(self, number: int, name: str) -> None:
        """Note that the directory of snapshot ``number`` was ``name`` in the pool, and is in its place in memory only."""
        self._txn.put(key_of(number), name.encode(), db=self._tables.placed)

    def clear_placed(self, last: int) -> None:
        """Note that the directories of all snapshots up to ``last`` are in their places on disk."""
        with self._txn.cursor(db=self._tables.placed) as cursor:
            while cursor.first() and cursor.key() <= key_of(last) and cursor.delete():
                pass

    def mark_unflushed(self, number: int, boot: str) -> None:
        """Note that the data of snapshot ``number`` may be in the memory of this boot only."""
        self._txn.put(key_of(number), boot.encode(), db=self._tables.unflushed)

    def clear_unflushed(self, numbers: Iterable[int]) -> None:
        """Note that the data of these snapshots is on disk."""
        for number in numbers:
            self._txn.delete(key_of(number), db=self._tables.unflushed)

    def delete(self, number: int, record: Record) -> None:
        """Take snapshot ``number`` out, with all indexes."""
        self.clear_unflushed([number])
        self._reindex(set(self._indexes(number, record)), set())
        self._txn.delete(key_of(number), db=self._tables.snapshots)

    def delete_unreadable(self, number: int, kind: Kind, name: str) -> None:
        """Take snapshot ``number`` out, whose record can't be read, but of which the indexes say this (``indexed_as``)."""
        self.clear_unflushed([number])
        tables, txn, key = self._tables, self._txn, key_of(number)
        for table in (tables.snapshots, tables.kinds[kind], tables.uncounted):
            txn.delete(key, db=table)
        txn.delete(name.encode(), db=tables.names)
        with txn.cursor(db=tables.children) as cursor:
            for entry in [entry for entry in cursor.iternext(values=False) if entry[9:] == key]:
                txn.delete(entry, db=tables.children)

    def _reindex(self, before: set[Entry], after: set[Entry]) -> None:
        for table, key, _ in before - after:
            self._txn.delete(key, db=table)
        for table, key, value in after - before:
            self._txn.put(key, value, db=table)

    def rebuild_indexes(self) -> None:
        """Make all indexes anew from the records that can be read."""
        entries, last_id = self._all_indexes(), max(self.ids(), default=0)
        for table in self._tables.indexes:
            self._txn.drop(table, delete=False)
        self._reindex(set(), entries)
        self.raise_last_id(last_id)
        known = self.ids()
        self.clear_unflushed([number for number, _ in self.unflushed() if number not in known])

    def raise_last_id(self, number: int) -> None:
        """Give out no id up to ``number`` any more."""
        if number > self.last_id():
            self._txn.put(b"last_id", key_of(number), db=self._tables.meta)
