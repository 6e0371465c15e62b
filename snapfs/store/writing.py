"""Writing: what an operation may change of the records, within one write transaction."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol, TypeVar

import lmdb

from snapfs.errors import Damaged
from snapfs.model import Change, Info, Kind
from snapfs.store import indexes
from snapfs.store.reading import Reader
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
    """What a write operation may do besides reading.  Operations run in the writer's thread, one at a time.

    What a method writes is durable when the batch is; where the operation or the batch fails, nothing of it has happened.
    """

    def __init__(self, tables: Tables, txn: lmdb.Transaction[bytes], directories: set[int]) -> None:
        super().__init__(tables)
        self._txn = txn
        self._directories = directories
        self.undos: list[Undo] = []
        self.afters: list[Undo] = []
        self.changes: list[Change] = []
        self._chains: dict[int, list[int]] = {}  # from the parents on of which they were asked for

    def on_failure(self, undo: Undo) -> None:
        """Run ``undo`` if this operation, or the sync of its batch, fails after all."""
        self.undos.append(undo)

    def when_durable(self, act: Undo) -> None:
        """Run ``act`` in the writer's thread once the batch is on disk; what it raises is logged."""
        self.afters.append(act)

    def sync_directory(self, fd: int) -> None:
        """Flush the directory open as ``fd`` before the batch's records, once a batch: no record without its directory."""
        self._directories.add(fd)

    def changed(self, before: Info | None, after: Info | None, *, counted: bool = False, goes_on: bool = False) -> None:
        """Have the listeners told, once the batch is durable, that a snapshot was ``before`` and is ``after``: None before it
        was made and after it was removed.  ``counted``: what it takes on disk, or its state, has changed and not what Stat
        shows; ``goes_on``: as in ``Change``."""
        self.changes.append(Change(before, after, counted, goes_on))

    def next_id(self) -> int:
        """An id that was never given out; it is given out again if the operation fails.  Raises Damaged where no id can be
        left."""
        last = self._txn.get(b"last_id", key_of(0), db=self._tables.meta)
        number = int.from_bytes(last, "big") + 1
        if len(last) != 8 or number >= IDS:
            raise self._wrong_last_id(number - 1)
        self._txn.put(b"last_id", key_of(number), db=self._tables.meta)
        return number

    def _wrong_last_id(self, number: int) -> Damaged:
        return Damaged(f"no new snapshot can be made: the records say that the last id is {number}, which can't be")

    def add(self, number: int, record: Record) -> None:
        """Write ``record`` as snapshot ``number``, an id that ``next_id`` has just given out, with all indexes.  The name must
        be free.  Raises Damaged where there is a record with an id as high."""
        tables, txn, key, name = self._tables, self._txn, key_of(number), record.name.encode()
        # appending is quick, and refused where there is an id as high
        added = txn.put(key, encode(record), db=tables.snapshots, append=True)
        if not (added and txn.put(key, name, db=tables.kinds[record.kind], append=True)):
            raise self._wrong_last_id(number - 1)
        txn.put(name, key, db=tables.names)
        if record.node:
            txn.put(key_of(record.node), key, db=tables.nodes)
        if record.parent:
            txn.put(indexes.child_key(record.parent, record.kind, number), name, db=tables.children)

    def chain(self, record: Record) -> list[int]:
        if not record.parent:
            return []
        chain = self._chains.get(record.parent)
        if chain is None:  # an operation asks for several that have most in common, of hundreds of snapshots
            chain = self._chains[record.parent] = self._chain(record, self._chains)
        return chain.copy()

    def put(self, number: int, record: Record) -> None:
        """Write ``record`` as snapshot ``number``, in the place of the record that it had, if any, with all indexes.  Raises
        Damaged where another snapshot has the old or the new name."""
        before = self.record(number)
        for either in (before, record):
            if either is not None and self.id_of(either.name) not in (None, number):
                raise Damaged(f'two snapshots are called "{either.name}": {self.id_of(either.name)} and {number}')
        indexes.replace(self._txn, self._entries_of(number, before), self._entries_of(number, record))
        if before is None or before.parent != record.parent:
            self._chains.clear()
        self._txn.put(key_of(number), encode(record), db=self._tables.snapshots)

    def overwrite(self, number: int, record: Record) -> None:
        """Write ``record`` as snapshot ``number``, whatever record it had, without any index."""
        self._chains.clear()
        self._txn.put(key_of(number), encode(record), db=self._tables.snapshots)

    def mark_placed(self, number: int, name: str) -> None:
        """Note that the directory of snapshot ``number`` was called ``name`` in the pool, where a power cut may put it back."""
        self._txn.put(key_of(number), name.encode(), db=self._tables.placed)

    def clear_placed(self, last: int) -> None:
        """Note that the directories of all snapshots up to ``last`` are in their places on disk."""
        with self._txn.cursor(db=self._tables.placed) as cursor:
            while cursor.first() and cursor.key() <= key_of(last) and cursor.delete():
                pass

    def mark_unflushed(self, number: int, boot: str) -> None:
        """Note that the data of snapshot ``number`` may be in the machine's memory only, of this ``boot``."""
        self._txn.put(key_of(number), boot.encode(), db=self._tables.unflushed)

    def clear_unflushed(self, numbers: Iterable[int]) -> None:
        """Note that the data of these snapshots is on disk."""
        for number in numbers:
            self._txn.delete(key_of(number), db=self._tables.unflushed)

    def delete(self, number: int, record: Record) -> None:
        """Delete snapshot ``number``, whose record is ``record``, with all its entries in the indexes."""
        self.clear_unflushed([number])
        indexes.replace(self._txn, self._entries_of(number, record), set())
        self._txn.delete(key_of(number), db=self._tables.snapshots)
        self._chains.clear()

    def delete_unreadable(self, number: int, kind: Kind, name: str) -> None:
        """Delete snapshot ``number``, whose record can't be read, but of which the indexes say this kind and name
        (``indexed_as``)."""
        self.clear_unflushed([number])
        self._txn.delete(key_of(number), db=self._tables.snapshots)
        self._chains.clear()
        indexes.delete_number(self._txn, self._tables, number, kind, name)

    def _entries_of(self, number: int, record: Record | None) -> set[indexes.Entry]:
        return set(indexes.entries_of(self._tables, number, record)) if record is not None else set()

    def rebuild_indexes(self) -> None:
        """Make all indexes anew from the records that can be read, and drop the marks of snapshots that have no record."""
        last_id = max(self.ids(), default=0)
        indexes.rebuild(self._txn, self._tables, self._index_entries())
        self.raise_last_id(max([last_id, *(nth for nth, _, _ in self.images())]))
        known = self.ids()
        self.clear_unflushed([number for number, _ in self.unflushed() if number not in known])

    def put_root_word(self, word: str) -> None:
        """Note that these are the records of the root with this word."""
        self._txn.put(b"root", word.encode(), db=self._tables.meta)

    def raise_last_id(self, number: int) -> None:
        """Give out no id up to ``number`` any more."""
        if number > self.last_id():
            self._txn.put(b"last_id", key_of(number), db=self._tables.meta)
