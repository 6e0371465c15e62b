"""The records: what a snapshot is on disk, and what can be read and written of it within one LMDB transaction.

Tables (keys are compared as bytes; ids are 8 bytes, big-endian, so byte order is numeric order):

    meta         "schema" -> version;  "last_id" -> the highest id ever given out
    snapshots    id -> Record
    names        key or name, UTF-8 -> id         in this order Walk lists
    active, view, committed      id -> name       for listing one kind in id order: the last id is a place to go on from
    children     parent id, kind's first letter, id -> name
    uncounted    id -> nothing                    committed, and its usage not yet known
    unflushed    id -> boot id                    committed, and its data not yet known to be on disk (``snapfs/flushing.py``)
    placed       id -> name in ROOT/pool          its directory may still be there (``snapfs/placing.py``)

Who opens and closes them is ``snapfs/environment.py``, who writes them ``snapfs/metastore.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import islice
from typing import Annotated, Any

import lmdb
import msgspec

from snapfs import names
from snapfs.errors import Damaged, InvalidArgument
from snapfs.model import Change, Info, Kind, Usage

SCHEMA = 1
CHUNK = 128  # records that are read ahead: some more than one answer to a listing has room for
IDS = 1 << 36  # ids are below this: so many an inode number has room for

Undo = Callable[[], None]

Entry = tuple[Any, bytes, bytes]
"""One entry of an index: the table (py-lmdb's handle, which has no type to name), key, value."""


_Time = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]


class Record(msgspec.Struct, frozen=True, array_like=True):
    """What the table ``snapshots`` holds, as MessagePack: an array in this order; new fields go to the end, with defaults.

    ``parent`` is the parent's id, 0 for none; ``usage`` is None except for committed snapshots that have been counted;
    ``origin`` is as in ``model.Info``.  The limits are for what is read: bytes that the disk has mangled must not become a
    snapshot.
    """

    name: str
    kind: Kind
    parent: Annotated[int, msgspec.Meta(ge=0, lt=IDS)]
    created: _Time
    updated: _Time
    labels: dict[str, str]
    usage: Usage | None = None
    origin: str = ""


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


class Tables:
    """The tables of one environment, made where missing: py-lmdb's handles, which have no type to name.

    ``txn`` is a write transaction for making them, and none may be open in this thread otherwise.
    """

    def __init__(self, env: lmdb.Environment, txn: lmdb.Transaction[bytes] | None = None) -> None:
        def table(name: str) -> Any:
            return env.open_db(name.encode(), txn, create=txn is not None)

        self.meta = table("meta")
        self.snapshots = table("snapshots")
        self.names = table("names")
        self.kinds = {kind: table(kind.value) for kind in Kind}
        self.children = table("children")
        self.uncounted = table("uncounted")
        self.unflushed = table("unflushed")
        self.placed = table("placed")
        self.indexes = [self.names, *self.kinds.values(), self.children, self.uncounted]
        if txn is not None and txn.get(b"schema", db=self.meta) is None:
            txn.put(b"schema", str(SCHEMA).encode(), db=self.meta)


class Reader:
    """One consistent state of the store; valid inside ``MetaStore.reading`` or a write operation only."""

    _txn: lmdb.Transaction[bytes]

    def __init__(self, tables: Tables) -> None:
        self._tables = tables

    def id_of(self, name: str) -> int | None:
        """The id of the snapshot called ``name``."""
        try:
            found = self._txn.get(name.encode(), db=self._tables.names)
        except (lmdb.BadValsizeError, UnicodeEncodeError):  # empty or too long or no UTF-8: no key can be that
            return None
        return None if found is None else _number(found)

    def record(self, number: int) -> Record | None:
        """The record of snapshot ``number``; raises Damaged where it can't be one."""
        found = self._txn.get(_key(number), db=self._tables.snapshots)
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
            stored = self._txn.get(key, db=self._tables.kinds[kind])
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
            origin=record.origin,
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
        with self._txn.cursor(db=self._tables.kinds[kind]) as cursor:
            if cursor.set_range(_key(after + 1)):
                for key, name in cursor:
                    if _is_id(key):
                        yield _number(key), name.decode(errors="replace")

    def records(self, kind: Kind, after: int = 0) -> Iterator[tuple[int, str, Record | None]]:
        """The same as ``listing``, with the records: None where it can't be read, or contradicts the index."""
        with self._txn.cursor(db=self._tables.kinds[kind]) as index, self._txn.cursor(db=self._tables.snapshots) as cursor:
            more = index.set_range(_key(after + 1))
            while more:
                listed = dict(islice(index.iternext(), CHUNK))
                found = dict(cursor.getmulti(listed))
                more = len(listed) == CHUNK and index.next()
                for key, encoded in listed.items():
                    name = encoded.decode(errors="replace")
                    record: Record | None
                    try:
                        record = _decode(found[key])
                        if record.name != name or record.kind is not kind:
                            record = None
                    except (KeyError, msgspec.MsgspecError, UnicodeDecodeError):
                        record = None
                    if _is_id(key):
                        yield int.from_bytes(key, "big"), name, record

    def children(self, parent: int, kind: Kind, after: int = 0) -> Iterator[tuple[int, str]]:
        """The same for the children of snapshot ``parent``."""
        prefix = _key(parent) + kind[0].encode()
        with self._txn.cursor(db=self._tables.children) as cursor:
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
        with self._txn.cursor(db=self._tables.snapshots) as cursor:
            if cursor.set_range(_key(after + 1)):
                for key in cursor.iternext(values=False):
                    if _is_id(key):
                        yield _number(key)

    def ids(self) -> set[int]:
        """The ids of all snapshots."""
        return set(self.numbers())

    def walk(self, selection: Iterable[tuple[str, str]] | None = None) -> Iterator[Info]:
        """All snapshots in the order of their keys' bytes; or only those that have one of these names, kinds or parents
        (``snapfs/filters.py``).

        They are collected at once and made out later, also after the block: while a reader of a large store is at it, the
        writer can't use any page again, and the file would grow all that time.
        """
        if selection is None:
            with self._txn.cursor(db=self._tables.names) as cursor:
                order = list(cursor)
            with self._txn.cursor(db=self._tables.snapshots) as cursor:
                return _Collected(self._tables, dict(cursor)).infos(order)
        order = sorted({entry for field, value in selection for entry in self._selected(field, value)})
        with self._txn.cursor(db=self._tables.snapshots) as cursor:
            found = dict(cursor.getmulti([key for _, key in order]))
            parents = {record.parent for key, text in found.items() if (record := _decoded(_number(key), text)).parent}
            found.update(cursor.getmulti([_key(parent) for parent in parents]))
        return _Collected(self._tables, found).infos(order)

    def _selected(self, field: str, value: str) -> Iterator[tuple[bytes, bytes]]:
        """Name and key of all snapshots with this name, kind or parent."""
        match field:
            case "name":
                if (number := self.id_of(value)) is not None:
                    yield value.encode(), _key(number)
            case "kind" if value in [*Kind]:
                with self._txn.cursor(db=self._tables.kinds[Kind(value)]) as cursor:
                    yield from ((name, key) for key, name in cursor)
            case "parent":
                if (parent := self.id_of(value)) is not None:
                    for kind in Kind:
                        yield from ((name.encode(), _key(number)) for number, name in self.children(parent, kind))

    def dump(self) -> Iterator[tuple[int, Record]]:
        """Id and record of all snapshots in the order of ids, collected and made out like ``walk``; what can't be read is left
        out."""
        with self._txn.cursor(db=self._tables.snapshots) as cursor:
            found = [(_number(key), value) for key, value in cursor if _is_id(key)]
        return _readable(found)

    def uncounted(self) -> list[int]:
        """The ids of committed snapshots whose usage is not yet known."""
        with self._txn.cursor(db=self._tables.uncounted) as cursor:
            return [_number(key) for key in cursor.iternext(values=False) if _is_id(key)]

    def unflushed(self) -> list[tuple[int, str]]:
        """The ids of committed snapshots whose data may be in memory only, each with the boot of the machine whose memory."""
        with self._txn.cursor(db=self._tables.unflushed) as cursor:
            return [(_number(key), boot.decode(errors="replace")) for key, boot in cursor if _is_id(key)]

    def placed(self) -> list[tuple[int, str]]:
        """The ids of snapshots whose directory may still be in the pool after a power cut, each with its name there."""
        with self._txn.cursor(db=self._tables.placed) as cursor:
            return [(_number(key), name.decode(errors="replace")) for key, name in cursor if _is_id(key)]

    def unflushed_since(self, number: int) -> str:
        """The boot in which snapshot ``number`` was committed, if its data may be in memory only; else ""."""
        return self._txn.get(_key(number), b"", db=self._tables.unflushed).decode()

    def _indexes(self, number: int, record: Record) -> Iterator[Entry]:
        """All that the indexes hold of a snapshot."""
        tables, key, name = self._tables, _key(number), record.name.encode()
        yield tables.names, name, key
        yield tables.kinds[record.kind], key, name
        if record.parent:
            yield tables.children, _key(record.parent) + record.kind[0].encode() + key, name
        if record.kind is Kind.COMMITTED and record.usage is None:
            yield tables.uncounted, key, b""

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
        for table in self._tables.indexes:
            with self._txn.cursor(db=table) as cursor:
                found.update((table, key, value) for key, value in cursor)
        known = self.ids()
        strays = sum(number not in known for number, _ in self.unflushed())
        return len(found ^ self._all_indexes()) + strays + (max(known, default=0) > self.last_id())

    def count(self, kind: Kind) -> int:
        """How many snapshots of ``kind`` there are."""
        entries: int = self._txn.stat(self._tables.kinds[kind])["entries"]
        return entries

    def last_id(self) -> int:
        """The highest id ever given out; where that can't be read, the highest that there is a record of."""
        found = self._txn.get(b"last_id", _key(0), db=self._tables.meta)
        return _number(found) if _is_id(found) else max(self.numbers(), default=0)


def _readable(found: list[tuple[int, bytes]]) -> Iterator[tuple[int, Record]]:
    for number, encoded in found:
        with suppress(Damaged):
            yield number, _decoded(number, encoded)


class _Collected(Reader):
    """Records that were read, to be made out when the transaction has ended."""

    def __init__(self, tables: Tables, found: dict[bytes, bytes]) -> None:
        super().__init__(tables)
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
        last = self._txn.get(b"last_id", _key(0), db=self._tables.meta)
        number = int.from_bytes(last, "big") + 1
        if len(last) != 8 or number >= IDS:
            raise self._wrong_last_id(number - 1)
        self._txn.put(b"last_id", _key(number), db=self._tables.meta)
        return number

    def _wrong_last_id(self, number: int) -> Damaged:
        return Damaged(f"no new snapshot can be made: the records say that the last id is {number}, which can't be")

    def add(self, number: int, record: Record) -> None:
        """Write ``record`` as snapshot ``number``, which was just given out, with all indexes; its name must be free."""
        tables, txn, key, name = self._tables, self._txn, _key(number), record.name.encode()
        # appending is quick, and refused where there is an id as high
        added = txn.put(key, _encode(record), db=tables.snapshots, append=True)
        if not (added and txn.put(key, name, db=tables.kinds[record.kind], append=True)):
            raise self._wrong_last_id(number - 1)
        txn.put(name, key, db=tables.names)
        if record.parent:
            txn.put(_key(record.parent) + record.kind[0].encode() + key, name, db=tables.children)

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
        self._txn.put(_key(number), _encode(record), db=self._tables.snapshots)

    def mark_placed(self, number: int, name: str) -> None:
        """Note that the directory of snapshot ``number`` was ``name`` in the pool, and is in its place in memory only."""
        self._txn.put(_key(number), name.encode(), db=self._tables.placed)

    def clear_placed(self, last: int) -> None:
        """Note that the directories of all snapshots up to ``last`` are in their places on disk."""
        with self._txn.cursor(db=self._tables.placed) as cursor:
            while cursor.first() and cursor.key() <= _key(last) and cursor.delete():
                pass

    def mark_unflushed(self, number: int, boot: str) -> None:
        """Note that the data of snapshot ``number`` may be in the memory of this boot only."""
        self._txn.put(_key(number), boot.encode(), db=self._tables.unflushed)

    def clear_unflushed(self, numbers: Iterable[int]) -> None:
        """Note that the data of these snapshots is on disk."""
        for number in numbers:
            self._txn.delete(_key(number), db=self._tables.unflushed)

    def delete(self, number: int, record: Record) -> None:
        """Take snapshot ``number`` out, with all indexes."""
        self.clear_unflushed([number])
        self._reindex(set(self._indexes(number, record)), set())
        self._txn.delete(_key(number), db=self._tables.snapshots)

    def delete_unreadable(self, number: int, kind: Kind, name: str) -> None:
        """Take snapshot ``number`` out, whose record can't be read, but of which the indexes say this (``listed``)."""
        self.clear_unflushed([number])
        tables, txn, key = self._tables, self._txn, _key(number)
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

    def index_anew(self) -> None:
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
            self._txn.put(b"last_id", _key(number), db=self._tables.meta)
