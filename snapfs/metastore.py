"""The records in LMDB: what a snapshot is, durable when a call returns.

Tables (keys are compared as bytes; ids are 8 bytes, big-endian, so byte order is numeric order):

    meta         "schema" -> version;  "last_id" -> the highest id ever given out
    snapshots    id -> Record
    names        key or name, UTF-8 -> id         in this order Walk lists
    active, view, committed      id -> name       for listing one kind in id order: the last id is a place to go on from
    children     parent id, kind's first letter, id -> name
    uncounted    id -> nothing                    committed, and its usage not yet known
    unflushed    id -> boot id                    committed, and its data not yet known to be on disk (``snapfs/flushing.py``)

**Reading** takes an LMDB read transaction of its own for each call: about a microsecond, no lock, no thread, one
consistent state.  It ends with its block and lets go of its place in LMDB's table of readers, whoever still holds the
``Reader`` (an error that somebody keeps does, by its traceback).

**Writing** goes through one writer (``serve``): it takes all that waits, runs each operation in a nested transaction of
its own, and makes the batch durable with one sync (group commit).  An operation that fails undoes itself and fails
alone; if the sync fails, all of the batch do.  Where the map is full it is made larger in between, while nobody reads, and
the batch is run anew (``snapfs/reserve.py``).

**Forking** is fine as long as the child leaves all of this alone: LMDB keeps its locks by process.  So each call is refused
there, and what the child inherited is neither closed nor ended, since both would undo the parent's.  It must leave by exec
or os._exit: unwinding trio in a child breaks the parent's loop, whatever it runs.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, suppress
from typing import Annotated, Any, Generic, NoReturn, TypeVar

import lmdb
import msgspec
import trio
from lmdb.verify import VerifyError, verify

from snapfs import names
from snapfs.errors import Closed, Damaged, Forked, InvalidArgument, SnapshotError, Unavailable
from snapfs.model import Change, Info, Kind, Usage
from snapfs.reserve import RESERVE, Space, make_file, refuse_without_address_space

log = logging.getLogger(__name__)

T = TypeVar("T")

SCHEMA = 1
MAP_SIZE = 1 << 20  # to begin with: it grows with the records
IDS = 1 << 36  # ids are below this: so many an inode number has room for
BATCH = 128  # operations that one sync serves at most, so that nobody waits for an endless batch

READERS = 1024  # that may read at once, in all processes: 64 bytes of the lock file each, and far more than there are threads
PATIENCE = 2.0  # seconds that one more than these waits for a place

FEW = 1 << 20  # bytes left on a disk on which a failed write is taken for want of space

Undo = Callable[[], None]

Entry = tuple[Any, bytes, bytes]
"""One entry of an index: the table (py-lmdb's handle, which has no type to name), key, value."""


_Time = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]


class Record(msgspec.Struct, frozen=True, array_like=True):
    """What the table ``snapshots`` holds, as MessagePack: an array in this order; new fields go to the end, with defaults.

    ``parent`` is the parent's id, 0 for none; ``usage`` is None except for committed snapshots that have been counted.  The
    limits are for what is read: bytes that the disk has mangled must not become a snapshot.
    """

    name: str
    kind: Kind
    parent: Annotated[int, msgspec.Meta(ge=0, lt=IDS)]
    created: _Time
    updated: _Time
    labels: dict[str, str]
    usage: Usage | None = None


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Record).decode


def _key(number: int) -> bytes:
    return number.to_bytes(8, "big")


def _number(key: bytes) -> int:
    if not _is_id(key):
        raise Damaged(f"the records name a snapshot by {key.hex() or 'nothing'}, which is no id")
    return int.from_bytes(key, "big")


def _is_id(key: bytes) -> bool:
    return len(key) == 8 and b"\0\0\0\0\0\0\0\0" < key < _END


_END = _key(IDS)


def _decoded(number: int, found: bytes) -> Record:
    """The record of snapshot ``number``; raises Damaged where these bytes can't be one."""
    try:
        record = _decode(found)
        name = record.name
        if not name or len(name) * (3 if name.isascii() else 6) > names.NAME_MAX:  # bytes that each takes at most
            names.encode(name)
    except (msgspec.MsgspecError, UnicodeDecodeError, InvalidArgument) as error:
        raise Damaged(f"the record of snapshot {number} can't be read: {error}") from error
    if record.parent == number:
        raise Damaged(f'the record of snapshot {number}, "{record.name}", says that it is its own parent')
    return record


_NONSENSE = (lmdb.Error, UnicodeDecodeError, OverflowError)  # what reading gives where pages of the file are not what they were


class Reader:
    """One consistent state of the store; valid inside ``MetaStore.reading`` or a write operation only."""

    _txn: lmdb.Transaction[bytes]

    def __init__(self, store: MetaStore) -> None:
        self._store = store

    def id_of(self, name: str) -> int | None:
        """The id of the snapshot called ``name``."""
        try:
            found = self._txn.get(name.encode(), db=self._store.names)
        except (lmdb.BadValsizeError, UnicodeEncodeError):  # empty or too long or no UTF-8: no key can be that
            return None
        return None if found is None else _number(found)

    def record(self, number: int) -> Record | None:
        """The record of snapshot ``number``; raises Damaged where it can't be one."""
        found = self._txn.get(_key(number), db=self._store.snapshots)
        return _decoded(number, found) if found is not None else None

    def find(self, name: str) -> tuple[int, Record] | None:
        """Id and record of the snapshot called ``name``; raises Damaged where the name leads to something else."""
        number = self.id_of(name)
        if number is None:
            return None
        record = self.record(number)
        if record is None or record.name != name:
            what = "has no record" if record is None else f'is called "{record.name}"'
            raise Damaged(f'the name "{name}" leads to snapshot {number}, which {what}')
        return number, record

    def listed(self, number: int) -> tuple[Kind, str]:
        """Kind and name of snapshot ``number`` as far as the indexes agree about them, whatever its record says; raises Damaged
        where they don't."""
        key = _key(number)
        found: list[tuple[Kind, bytes]] = []
        for kind in Kind:
            stored = self._txn.get(key, db=self._store.kinds[kind])
            if stored is not None:
                found.append((kind, stored))
        if len(found) == 1:
            with suppress(UnicodeDecodeError, InvalidArgument):
                name = found[0][1].decode()
                names.encode(name)
                if self.id_of(name) == number:
                    return found[0][0], name
        raise Damaged(f"it cannot be told which snapshot {number} is: the indexes of the records contradict each other")

    def parent_of(self, record: Record) -> Record:
        """The record of the parent of ``record``, which must have one; raises Damaged where there is none."""
        parent = self.record(record.parent)
        if parent is None:
            raise Damaged(f'the parent of snapshot "{record.name}", number {record.parent}, has no record')
        return parent

    def info(self, number: int, record: Record) -> Info:
        """What Stat shows of ``record``."""
        return Info(
            name=record.name,
            kind=record.kind,
            id=number,
            parent=self.parent_of(record).name if record.parent else None,
            labels=record.labels,
            created=record.created,
            updated=record.updated,
        )

    def chain(self, record: Record) -> list[int]:
        """The ids of the parents of ``record``, the nearest first; raises Damaged where one has no record, or they go round."""
        chain: dict[int, None] = {}
        while record.parent:
            if record.parent in chain:
                raise Damaged(f'snapshot "{record.name}" is among its own parents: the records go round in a circle')
            chain[record.parent] = None
            record = self.parent_of(record)
        return list(chain)

    def lowers(self, number: int, record: Record) -> list[int]:
        """The ids of the layers that are only read where snapshot ``number`` is mounted, the nearest first: its own among them
        unless it is active, or a view, which shows its parents."""
        chain = self.chain(record)
        return chain if record.kind is Kind.ACTIVE or (record.kind is Kind.VIEW and chain) else [number, *chain]

    def listing(self, kind: Kind, after: int = 0) -> Iterator[tuple[int, str]]:
        """Id and name of all snapshots of ``kind`` with an id above ``after``, in id order.  What is none is left out."""
        with self._txn.cursor(db=self._store.kinds[kind]) as cursor:
            if cursor.set_range(_key(after + 1)):
                for key, name in cursor:
                    if _is_id(key):
                        yield _number(key), name.decode(errors="replace")

    def children(self, parent: int, kind: Kind, after: int = 0) -> Iterator[tuple[int, str]]:
        """The same for the children of snapshot ``parent``."""
        prefix = _key(parent) + kind[0].encode()
        with self._txn.cursor(db=self._store.child_table) as cursor:
            if cursor.set_range(prefix + _key(after + 1)):
                for key, name in cursor:
                    if not key.startswith(prefix):
                        return
                    if _is_id(key[9:]):
                        yield _number(key[9:]), name.decode(errors="replace")

    def a_child(self, parent: int) -> tuple[Kind, str] | None:
        """Kind and name of one of the children of snapshot ``parent``, None where it has none."""
        found = ((kind, name) for kind in Kind for number, name in self.children(parent, kind) if number != parent)
        return next(found, None)

    def numbers(self, after: int = 0) -> Iterator[int]:
        """The ids above ``after`` of all snapshots, in order."""
        with self._txn.cursor(db=self._store.snapshots) as cursor:
            if cursor.set_range(_key(after + 1)):
                for key in cursor.iternext(values=False):
                    if _is_id(key):
                        yield _number(key)

    def ids(self) -> set[int]:
        """The ids of all snapshots."""
        return set(self.numbers())

    def walk(self) -> Iterator[Info]:
        """All snapshots in the order of their keys' bytes.

        They are collected at once and made out later, also after the block: while a reader of a large store is at it, the
        writer can't use any page again, and the file would grow all that time.
        """
        with self._txn.cursor(db=self._store.names) as cursor:
            order = list(cursor)
        with self._txn.cursor(db=self._store.snapshots) as cursor:
            return _Collected(self._store, dict(cursor)).infos(order)

    def uncounted(self) -> list[int]:
        """The ids of committed snapshots whose usage is not yet known."""
        with self._txn.cursor(db=self._store.uncounted_table) as cursor:
            return [_number(key) for key in cursor.iternext(values=False) if _is_id(key)]

    def unflushed(self) -> list[tuple[int, str]]:
        """The ids of committed snapshots whose data may be in memory only, each with the boot of the machine whose memory."""
        with self._txn.cursor(db=self._store.unflushed_table) as cursor:
            return [(_number(key), boot.decode(errors="replace")) for key, boot in cursor if _is_id(key)]

    def unflushed_since(self, number: int) -> str:
        """The boot in which snapshot ``number`` was committed, if its data may be in memory only; else ""."""
        return self._txn.get(_key(number), b"", db=self._store.unflushed_table).decode()

    def _indexes(self, number: int, record: Record) -> Iterator[Entry]:
        """All that the indexes hold of a snapshot."""
        store, key, name = self._store, _key(number), record.name.encode()
        yield store.names, name, key
        yield store.kinds[record.kind], key, name
        if record.parent:
            yield store.child_table, _key(record.parent) + record.kind[0].encode() + key, name
        if record.kind is Kind.COMMITTED and record.usage is None:
            yield store.uncounted_table, key, b""

    def _all_indexes(self) -> set[Entry]:
        """What the indexes should hold, for all records that can be read."""
        entries: set[Entry] = set()
        for number in self.ids():
            with suppress(Damaged):
                record = self.record(number)
                if record is not None:
                    entries.update(self._indexes(number, record))
        return entries

    def misindexed(self) -> int:
        """How many entries of the indexes are missing or too many; ``Writer.index_anew`` mends them."""
        found: set[Entry] = set()
        for table in self._store.index_tables:
            with self._txn.cursor(db=table) as cursor:
                found.update((table, key, value) for key, value in cursor)
        known = self.ids()
        strays = sum(number not in known for number, _ in self.unflushed())
        return len(found ^ self._all_indexes()) + strays + (max(known, default=0) > self.last_id())

    def count(self, kind: Kind) -> int:
        """How many snapshots of ``kind`` there are."""
        entries: int = self._txn.stat(self._store.kinds[kind])["entries"]
        return entries

    def last_id(self) -> int:
        """The highest id ever given out; where that can't be read, the highest that there is a record of."""
        found = self._txn.get(b"last_id", _key(0), db=self._store.meta)
        return _number(found) if _is_id(found) else max(self.numbers(), default=0)


class _Collected(Reader):
    """Records that were read, to be made out when the transaction has ended."""

    def __init__(self, store: MetaStore, found: dict[bytes, bytes]) -> None:
        super().__init__(store)
        self._found = found
        self._parents: dict[int, Record] = {}

    def record(self, number: int) -> Record | None:
        found = self._found.get(_key(number))
        return _decoded(number, found) if found is not None else None

    def parent_of(self, record: Record) -> Record:
        parent = self._parents.get(record.parent)
        if parent is None:
            parent = self._parents[record.parent] = super().parent_of(record)
        return parent

    def infos(self, order: list[tuple[bytes, bytes]]) -> Iterator[Info]:
        for name, key in order:
            number = _number(key)
            record = self.record(number)
            if record is None:
                raise Damaged(f"snapshot {number} has a name but no record")
            if record.name.encode() != name:
                raise Damaged(f'snapshot {number}, "{record.name}", stands under another name too')
            yield self.info(number, record)


class _Ended:
    """The transaction of a reader whose block has ended."""

    def __getattr__(self, name: str) -> NoReturn:
        raise RuntimeError("the records were read after the block that reads them had ended")


_ended: Any = _Ended()


class _Reading(Reader):
    """A reader with a transaction of its own, for one ``with`` block.

    Its place in LMDB's table of readers is free only when no object refers to the transaction any more, so that none may be
    left behind in the frames of an error's traceback.
    """

    def __init__(self, store: MetaStore, *, long: bool) -> None:
        super().__init__(store)
        self._long = long

    def __enter__(self) -> Reader:
        store = self._store
        if store.refusal is not None:
            raise store.refusal()
        with store._guard:
            while self._long and store.is_growing:  # or one after the other might keep the writer waiting for ever
                store._idle.wait()
            store._readers += 1
        try:
            try:
                self._txn = store._env.begin()
            except (lmdb.ReadersFullError, lmdb.MapResizedError):
                self._txn = store._begin_when_possible()
        except lmdb.Error as error:
            store._has_read()
            raise _refused("read the records", store.path, error) from error
        except BaseException:
            store._has_read()
            raise
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        txn, self._txn = self._txn, _ended
        if self._store.refusal is Forked:
            return  # it is the parent's, and py-lmdb leaves it alone as long as nobody ends it here
        try:
            txn.abort()
        finally:
            self._store._has_read()
        if isinstance(error, _NONSENSE):
            raise Damaged(f"the records in {self._store.path} can't be read: {error}; put them back from a backup") from error


class Writer(Reader):
    """What a write operation may do besides reading.  It runs in the writer's thread, one operation at a time."""

    def __init__(self, store: MetaStore, txn: lmdb.Transaction[bytes], batch: _Batch) -> None:
        super().__init__(store)
        self._txn = txn
        self._batch = batch
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
        self._batch.directories.add(fd)

    def changed(self, before: Info | None, after: Info | None, *, counted: bool = False) -> None:
        """Tell the listeners, once it is durable."""
        self.changes.append(Change(before, after, counted))

    def next_id(self) -> int:
        """An id that was never given out; given back if the operation fails, since then nobody has seen it."""
        last = self._txn.get(b"last_id", _key(0), db=self._store.meta)
        number = int.from_bytes(last, "big") + 1
        if len(last) != 8 or number >= IDS or next(self.numbers(number - 1), None) is not None:
            raise Damaged(f"no new snapshot can be made: the records say that the last id is {number - 1}, which can't be")
        self._txn.put(b"last_id", _key(number), db=self._store.meta)
        return number

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
        self._txn.put(_key(number), _encode(record), db=self._store.snapshots)

    def mark_unflushed(self, number: int, boot: str) -> None:
        """Note that the data of snapshot ``number`` may be in the memory of this boot only."""
        self._txn.put(_key(number), boot.encode(), db=self._store.unflushed_table)

    def clear_unflushed(self, numbers: Iterable[int]) -> None:
        """Note that the data of these snapshots is on disk."""
        for number in numbers:
            self._txn.delete(_key(number), db=self._store.unflushed_table)

    def delete(self, number: int, record: Record) -> None:
        """Take snapshot ``number`` out, with all indexes."""
        self.clear_unflushed([number])
        self._reindex(set(self._indexes(number, record)), set())
        self._txn.delete(_key(number), db=self._store.snapshots)

    def delete_unreadable(self, number: int, kind: Kind, name: str) -> None:
        """Take snapshot ``number`` out, whose record can't be read, but of which the indexes say this (``listed``)."""
        self.clear_unflushed([number])
        store, txn, key = self._store, self._txn, _key(number)
        for table in (store.snapshots, store.kinds[kind], store.uncounted_table):
            txn.delete(key, db=table)
        txn.delete(name.encode(), db=store.names)
        with txn.cursor(db=store.child_table) as cursor:
            for entry in [entry for entry in cursor.iternext(values=False) if entry[9:] == key]:
                txn.delete(entry, db=store.child_table)

    def _reindex(self, before: set[Entry], after: set[Entry]) -> None:
        for table, key, _ in before - after:
            self._txn.delete(key, db=table)
        for table, key, value in after - before:
            self._txn.put(key, value, db=table)

    def index_anew(self) -> None:
        """Make all indexes anew from the records that can be read."""
        entries, last_id = self._all_indexes(), max(self.ids(), default=0)
        for table in self._store.index_tables:
            self._txn.drop(table, delete=False)
        self._reindex(set(), entries)
        self.raise_last_id(last_id)
        known = self.ids()
        self.clear_unflushed([number for number, _ in self.unflushed() if number not in known])

    def raise_last_id(self, number: int) -> None:
        """Give out no id up to ``number`` any more."""
        if number > self.last_id():
            self._txn.put(b"last_id", _key(number), db=self._store.meta)


class MetaStore:
    """One LMDB environment with one writer.

    Open it (``MetaStore(path)``: the file, with ``path-lock`` beside it), run ``serve`` in a nursery, ``close`` it.
    Without ``sync`` nothing is ever flushed: a power cut may take the whole store, a crash of the process takes nothing.
    Raises Unavailable where the file can't be opened, Damaged where it is none of ours or of a newer schema: it is not touched
    then.  A file that is missing or empty becomes a new store.
    """

    def __init__(self, path: str, map_size: int = MAP_SIZE, *, sync: bool = True) -> None:
        self.path = path
        self.sync = sync
        self.listeners: list[Callable[[Change], None]] = []
        self.batches: Counter[int] = Counter()
        """How often so many operations were made durable with one sync."""
        self.refusal: type[Closed] | None = None
        """What every call raises: Closed after ``close``, Forked in a child of the process that opened it, else None."""
        self._guard = threading.Lock()  # of what follows: a map can't change its size while anybody uses it
        self._idle = threading.Condition(self._guard)
        self._readers = 0
        self._writing = False
        self.is_growing = False
        try:
            self._open(map_size)
        except lmdb.Error as error:
            raise unreadable(path, error) from error
        except OSError as error:
            raise _refused("open the records", path, error) from error
        self._send: trio.MemorySendChannel[_Request[Any]] | None = None
        _open_stores.add(self)

    def _open(self, map_size: int) -> None:
        path = self.path
        with ExitStack() as undoing:
            if not os.path.lexists(path):
                undoing.callback(_remove_files, path)  # a database that was cut short could not be read the next time
            else:
                map_size = max(map_size, os.path.getsize(path) - RESERVE)
            make_file(path)
            make_file(f"{path}-lock", 128 + 64 * READERS)  # what LMDB makes it, but with blocks on the disk
            self._env = lmdb.open(
                path,
                subdir=False,
                sync=self.sync,
                map_size=map_size,
                mode=0o600,
                max_dbs=16,
                max_spare_txns=1,
                max_readers=READERS,
            )
            undoing.callback(self._env.close)
            _keep_from_children(path)
            self._env.reader_check()
            refuse_foreign(self._env, path)  # before anything is written
            self._space = Space(path, self.map_size)
            undoing.callback(self._space.close)
            while True:
                try:
                    with self._env.begin(write=True) as txn:
                        self._open_tables(txn)
                    break
                except lmdb.MapFullError:
                    self._grow()
            self._refill()  # not before the file is known to be ours
            undoing.pop_all()

    def _open_tables(self, txn: lmdb.Transaction[bytes]) -> None:
        self.meta = self._env.open_db(b"meta", txn)
        self.snapshots = self._env.open_db(b"snapshots", txn)
        self.names = self._env.open_db(b"names", txn)
        self.kinds = {kind: self._env.open_db(kind.value.encode(), txn) for kind in Kind}
        self.child_table = self._env.open_db(b"children", txn)
        self.uncounted_table = self._env.open_db(b"uncounted", txn)
        self.unflushed_table = self._env.open_db(b"unflushed", txn)
        self.index_tables = [self.names, *self.kinds.values(), self.child_table, self.uncounted_table]
        if txn.get(b"schema", db=self.meta) is None:
            txn.put(b"schema", str(SCHEMA).encode(), db=self.meta)

    @property
    def map_size(self) -> int:
        """Bytes that the records may take before the map has to grow."""
        size: int = self._env.info()["map_size"]
        return size

    def close(self) -> None:
        """Close the environment; twice is fine.  The writer must have ended (``serve``)."""
        if self.refusal is None:
            self.refusal = Closed
            self._env.close()
            self._space.close()

    def reading(self, *, long: bool = False) -> AbstractContextManager[Reader]:
        """One consistent state, for a block that must be short and must not await anything.

        In a worker thread, outside of any other such block, it may be ``long``.
        """
        return _Reading(self, long=long)

    def _begin_when_possible(self) -> lmdb.Transaction[bytes]:
        """A read transaction although all places were taken, by dead processes, or by others who read and are soon done; or
        although the map was too small."""
        deadline = time.monotonic() + PATIENCE
        while True:
            self._env.reader_check()
            try:
                return self._env.begin()
            except lmdb.MapResizedError:
                return self._begin_anew()
            except lmdb.ReadersFullError:
                if time.monotonic() > deadline:
                    busy = f"cannot read the records in {self.path}: more than {READERS} others are reading them"
                    raise Unavailable(busy, errno.EAGAIN) from None
            time.sleep(0.001)

    def _has_read(self) -> None:
        with self._guard:
            self._readers -= 1
            if self.is_growing and not self._readers:
                self._idle.notify_all()

    def _begin_anew(self) -> lmdb.Transaction[bytes]:
        """A transaction after another process, which should have left the records alone, has made them larger than the map."""
        with self._guard:
            if self._writing or self.is_growing or self._readers > 1:
                raise Unavailable(f"another process has written to {self.path}: try again", errno.EAGAIN)
            self._env.set_mapsize(self.map_size)  # or what is in use, if that is more
        return self._env.begin()

    async def write(self, operation: Callable[[Writer], T], *, frees: bool = False) -> T:
        """Run ``operation`` in the writer's thread; returns its result when that is durable, or raises what it raised,
        having changed nothing.

        ``frees``: it leaves less than there was, so that it may use what is kept in reserve for a full disk.  An operation may
        be run several times, of which the last counts.

        Cancellation takes back what the writer has not begun; what it has begun is finished, so it is done or not done.
        Raises Unavailable where the disk refuses (ENOSPC …) and after ``close``.
        """
        if self._send is None or self.refusal is not None:
            raise (self.refusal or Closed)()
        request = _Request(operation, frees)
        self._send.send_nowait(request)
        try:
            await request.done.wait()
        except trio.Cancelled:
            if not request.begun:
                request.withdrawn = True
                raise
            with trio.CancelScope(shield=True):
                await request.done.wait()
        return request.result()

    def write_now(self, operation: Callable[[Writer], T], *, frees: bool = False) -> T:
        """The same, blocking, for a process that serves nobody."""
        request = _Request(operation, frees)
        self._run(_Batch([request]))
        return request.result()

    def stop(self) -> None:
        """Let ``serve`` finish what waits and return; later writes are refused."""
        if self._send is not None:
            self._send.close()
            self._send = None

    async def serve(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """The writer: one batch after the other until ``stop``.  May be run again after that."""
        self._send, receive = trio.open_memory_channel[_Request[Any]](math.inf)
        task_status.started()
        async for first in receive:
            batch = _Batch([first])
            while len(batch.requests) < BATCH:
                try:
                    batch.requests.append(receive.receive_nowait())
                except (trio.WouldBlock, trio.EndOfChannel):
                    break
            batch.requests = [request for request in batch.requests if not request.withdrawn]
            for request in batch.requests:
                request.begun = True
            if not batch.requests:
                continue
            self.batches[len(batch.requests)] += 1
            with suppress(lmdb.Error):  # a backup that was killed: no page that it was reading would ever be used again
                self._env.reader_check()
            try:
                with trio.CancelScope(shield=True):  # a thread can't be stopped, and its outcome must be told
                    await trio.to_thread.run_sync(self._run, batch)
            except BaseException as error:  # a bug: the writer ends, but nobody may wait for ever
                for request in batch.requests:
                    request.error = request.error or error
                    request.done.set()
                raise
            for request in batch.requests:
                for change in request.changes:
                    for listener in self.listeners:
                        listener(change)
                request.done.set()

    def _run(self, batch: _Batch) -> None:
        """Run a batch in the writer's thread; leaves each request with a result or an error."""
        if self._space.is_short:
            self._refill()
        while not self._attempt(batch):
            try:
                self._grow()
            except (lmdb.Error, OSError) as error:
                if len(batch.requests) > 1:  # some may need no room
                    for request in batch.requests:
                        self._run(_Batch([request]))
                elif not (batch.requests[0].frees and self._attempt_with_reserve(batch)):
                    batch.requests[0].error = _refused("make room for the records", self.path, error)
                return

    def _attempt(self, batch: _Batch) -> bool:
        """Run a batch once; False where the map is too small for it: nothing has changed then."""
        writers: list[Writer] = []
        batch.directories.clear()
        with self._guard:
            self._writing = True
        try:
            with self._env.begin(write=True) as txn:
                for request in batch.requests:
                    request.error = None
                    writer = self._run_one(txn, batch, request)
                    if writer is not None:
                        writers.append(writer)
                for fd in batch.directories if self.sync else ():
                    os.fsync(fd)
        except (lmdb.Error, OSError) as error:
            for writer in reversed(writers):
                _undo(writer)
            if isinstance(error, (lmdb.MapFullError, lmdb.MapResizedError)):
                return False
            refusal = _refused("write the records", self.path, error)
            log.error("%s", refusal)
            for request in batch.requests:
                if request.error is None:
                    request.error = refusal
            return True
        finally:
            self._writing = False
        for request, writer in zip((r for r in batch.requests if r.error is None), writers, strict=True):
            request.changes = writer.changes
            for act in writer.afters:
                try:
                    act()
                except OSError as error:
                    log.warning("after a change was made: %s", error)
        return True

    def _run_one(self, txn: lmdb.Transaction[bytes], batch: _Batch, request: _Request[Any]) -> Writer | None:
        """Run one operation: what it wrote, None if it failed.  Raises MapFullError."""
        writer = None
        try:
            with self._env.begin(write=True, parent=txn) as nested:
                writer = Writer(self, nested, batch)
                request.value = request.operation(writer)
            return writer
        except SnapshotError as error:
            request.error = error
        except (lmdb.Error, OSError) as error:
            request.error = _refused("change the store", self.path, error)
            if isinstance(error, lmdb.MapFullError):
                if writer is not None:
                    _undo(writer)
                raise
        except Exception as error:  # a bug: it must reach the caller, not end the writer
            request.error = error
        if writer is not None:
            _undo(writer)
        return None

    # -- room for the records

    def _refill(self) -> None:
        try:
            self._space.refill()
        except OSError as error:  # what is there of it may do
            log.debug("no room for the whole reserve: %s", error)

    def _grow(self) -> None:
        """Make the map larger; raises OSError where the disk, or the address space, has no room for that."""
        self._resize(self._space.more())

    def _resize(self, size: int) -> None:
        """Give the map ``size`` bytes, or what is in use if that is more, while no transaction is open."""
        refuse_without_address_space(size - self.map_size)
        with self._idle:
            self.is_growing = True
            try:
                while self._readers:
                    self._idle.wait()
                self._env.set_mapsize(size)
                self._space.size = self.map_size
            finally:
                self.is_growing = False
                self._idle.notify_all()

    def _attempt_with_reserve(self, batch: _Batch) -> bool:
        """Run a batch that frees something, with all that is allocated; False where that is too small too."""
        before = self._space.size
        try:
            self._resize(self._space.held)
        except OSError:
            return False
        try:
            return self._attempt(batch)
        finally:
            self._resize(before)
            self._space.is_short = True


_open_stores: weakref.WeakSet[MetaStore] = weakref.WeakSet()


def _refuse_in_child() -> None:
    for store in _open_stores:
        if store.refusal is None:
            store.refusal = Forked


os.register_at_fork(after_in_child=_refuse_in_child)


def _keep_from_children(path: str) -> None:
    """Close on exec what LMDB has open of the file: it forgets that of one descriptor."""
    mine = os.stat(path)
    for fd in map(int, os.listdir("/proc/self/fd")):
        with suppress(OSError):
            if os.path.samestat(os.fstat(fd), mine):
                os.set_inheritable(fd, False)


def broken_pages(path: str) -> list[str]:
    """What is wrong with the pages of the LMDB file ``path``, found without LMDB, which aborts the process on some."""
    try:
        problems: list[str] = verify(path, subdir=False)  # type: ignore[no-untyped-call]
    except VerifyError as error:
        problems = [str(error)]
    return problems


def _refuse_cut(env: lmdb.Environment, path: str) -> None:
    """Raise Damaged where the end of the file is missing, on which LMDB would die of SIGBUS."""
    size, needed = os.stat(path).st_size, (env.info()["last_pgno"] + 1) * env.stat()["psize"]
    if size >= needed:
        return
    if broken_pages(path):  # the last ones may be free ones that were never written
        raise Damaged(f"{path} is cut short: {size} bytes of {needed}; put it back from a backup")


def refuse_foreign(env: lmdb.Environment, path: str) -> None:
    """Raise Damaged unless ``env`` is new, or of this schema, and all there."""
    _refuse_cut(env, path)
    with env.begin() as txn:
        if txn.stat()["entries"] == 0:
            return
        try:
            meta = env.open_db(b"meta", txn, create=False)
            found = txn.get(b"schema", db=meta)
        except (lmdb.NotFoundError, lmdb.IncompatibleError):
            found = None
    if found is None:
        raise Damaged(f"{path} is an LMDB file, but not of snapfs: move it away, and put back the records from a backup")
    if found == str(SCHEMA).encode():
        return
    version = found.decode(errors="replace")
    if found.isdigit() and int(found) > SCHEMA:
        raise Damaged(
            f"the records in {path} were written by a newer snapfs (schema {version}; this one reads {SCHEMA}): use that one"
        )
    raise Damaged(f'the records in {path} have the schema "{version}", which no snapfs writes; this one reads {SCHEMA}')


class _Request(Generic[T]):
    """One operation on its way through the writer."""

    def __init__(self, operation: Callable[[Writer], T], frees: bool) -> None:
        self.operation = operation
        self.frees = frees
        self.done = trio.Event()
        self.begun = False
        self.withdrawn = False
        self.value: T
        self.error: BaseException | None = None
        self.changes: list[Change] = []

    def result(self) -> T:
        if self.error is not None:
            raise self.error
        return self.value


class _Batch:
    """What one sync makes durable."""

    def __init__(self, requests: list[_Request[Any]]) -> None:
        self.requests = requests
        self.directories: set[int] = set()


def _remove_files(path: str) -> None:
    for made in (path, f"{path}-lock"):
        with suppress(OSError):
            os.unlink(made)


def _undo(writer: Writer) -> None:
    for undo in reversed(writer.undos):
        try:
            undo()
        except OSError as error:
            log.warning("while undoing a failed operation: %s", error)


def unreadable(path: str, error: lmdb.Error) -> Damaged | Unavailable:
    """Why the records can't be opened, as a sentence."""
    if isinstance(error, (lmdb.InvalidError, lmdb.CorruptedError, lmdb.VersionMismatchError)):
        return Damaged(f"the records in {path} can't be read: {error}; put them back from a backup")
    return _refused("open the records", path, error)


def _refused(doing: str, path: str, error: lmdb.Error | OSError) -> Unavailable:
    """The refusal of LMDB or of the operating system, while ``doing`` something with the records in ``path``, as a sentence."""
    if isinstance(error, OSError):
        return Unavailable.from_os(doing, error)
    if isinstance(error, lmdb.PanicError):
        return Unavailable(f"cannot {doing}: the disk failed while they were written; see to it and restart snapfs", errno.EIO)
    code = getattr(error, "code", 0)  # LMDB's own codes are negative, the system's positive; py-lmdb's own errors have none
    if code == errno.EIO:  # also LMDB's word for a short write, which is how a full disk begins
        space = os.statvfs(os.path.dirname(path))
        if space.f_bavail * space.f_frsize < FEW:
            return Unavailable.from_os(doing, OSError(errno.ENOSPC, "", path))
    return Unavailable(f"cannot {doing}: {error}", code if code > 0 else None)
