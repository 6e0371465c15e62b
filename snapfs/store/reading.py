"""Reading: what one consistent state of the records says (``snapfs/store/schema.py``)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import islice
from typing import Any

import lmdb
import msgspec

from snapfs import names
from snapfs.errors import Damaged, InvalidArgument
from snapfs.model import Info, Kind
from snapfs.store.schema import Record, Tables, decode, decode_checked, is_id, key_of, number_of

CHUNK = 128  # records that are read ahead: some more than one answer to a listing has room for

Entry = tuple[Any, bytes, bytes]
"""One entry of an index: the table (py-lmdb's handle, which has no type to name), key, value."""


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
        return None if found is None else number_of(found)

    def record(self, number: int) -> Record | None:
        """The record of snapshot ``number``; raises Damaged where it can't be one."""
        found = self._txn.get(key_of(number), db=self._tables.snapshots)
        return decode_checked(number, found) if found is not None else None

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

    def indexed_as(self, number: int) -> tuple[Kind, str]:
        """Kind and name of snapshot ``number`` as far as the indexes agree about them, whatever its record says; raises Damaged
        where they don't."""
        key = key_of(number)
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
            if cursor.set_range(key_of(after + 1)):
                for key, name in cursor:
                    if is_id(key):
                        yield number_of(key), name.decode(errors="replace")

    def records(self, kind: Kind, after: int = 0) -> Iterator[tuple[int, str, Record | None]]:
        """The same as ``listing``, with the records: None where it can't be read, or contradicts the index."""
        with self._txn.cursor(db=self._tables.kinds[kind]) as index, self._txn.cursor(db=self._tables.snapshots) as cursor:
            more = index.set_range(key_of(after + 1))
            while more:
                listed = dict(islice(index.iternext(), CHUNK))
                found = dict(cursor.getmulti(listed))
                more = len(listed) == CHUNK and index.next()
                for key, encoded in listed.items():
                    name = encoded.decode(errors="replace")
                    record: Record | None
                    try:
                        record = decode(found[key])
                        if record.name != name or record.kind is not kind:
                            record = None
                    except (KeyError, msgspec.MsgspecError, UnicodeDecodeError):
                        record = None
                    if is_id(key):
                        yield int.from_bytes(key, "big"), name, record

    def children(self, parent: int, kind: Kind, after: int = 0) -> Iterator[tuple[int, str]]:
        """The same for the children of snapshot ``parent``."""
        prefix = key_of(parent) + kind[0].encode()
        with self._txn.cursor(db=self._tables.children) as cursor:
            if cursor.set_range(prefix + key_of(after + 1)):
                for key, name in cursor:
                    if not key.startswith(prefix):
                        return
                    if is_id(key[9:]):
                        yield number_of(key[9:]), name.decode(errors="replace")

    def any_child(self, parent: int) -> tuple[Kind, str] | None:
        """Kind and name of one of the children of snapshot ``parent``, None where it has none."""
        found = ((kind, name) for kind in Kind for number, name in self.children(parent, kind) if number != parent)
        return next(found, None)

    def numbers(self, after: int = 0) -> Iterator[int]:
        """The ids above ``after`` of all snapshots, in order."""
        with self._txn.cursor(db=self._tables.snapshots) as cursor:
            if cursor.set_range(key_of(after + 1)):
                for key in cursor.iternext(values=False):
                    if is_id(key):
                        yield number_of(key)

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
            parents = {record.parent for key, text in found.items() if (record := decode_checked(number_of(key), text)).parent}
            found.update(cursor.getmulti([key_of(parent) for parent in parents]))
        return _Collected(self._tables, found).infos(order)

    def _selected(self, field: str, value: str) -> Iterator[tuple[bytes, bytes]]:
        """Name and key of all snapshots with this name, kind or parent."""
        match field:
            case "name":
                if (number := self.id_of(value)) is not None:
                    yield value.encode(), key_of(number)
            case "kind" if value in [*Kind]:
                with self._txn.cursor(db=self._tables.kinds[Kind(value)]) as cursor:
                    yield from ((name, key) for key, name in cursor)
            case "parent":
                if (parent := self.id_of(value)) is not None:
                    for kind in Kind:
                        yield from ((name.encode(), key_of(number)) for number, name in self.children(parent, kind))

    def dump(self) -> Iterator[tuple[int, Record]]:
        """Id and record of all snapshots in the order of ids, collected and made out like ``walk``; what can't be read is left
        out."""
        with self._txn.cursor(db=self._tables.snapshots) as cursor:
            found = [(number_of(key), value) for key, value in cursor if is_id(key)]
        return _readable(found)

    def uncounted(self) -> list[int]:
        """The ids of committed snapshots whose usage is not yet known."""
        with self._txn.cursor(db=self._tables.uncounted) as cursor:
            return [number_of(key) for key in cursor.iternext(values=False) if is_id(key)]

    def unflushed(self) -> list[tuple[int, str]]:
        """The ids of committed snapshots whose data may be in memory only, each with the boot of the machine whose memory."""
        with self._txn.cursor(db=self._tables.unflushed) as cursor:
            return [(number_of(key), boot.decode(errors="replace")) for key, boot in cursor if is_id(key)]

    def placed(self) -> list[tuple[int, str]]:
        """The ids of snapshots whose directory may still be in the pool after a power cut, each with its name there."""
        with self._txn.cursor(db=self._tables.placed) as cursor:
            return [(number_of(key), name.decode(errors="replace")) for key, name in cursor if is_id(key)]

    def unflushed_since(self, number: int) -> str:
        """The boot in which snapshot ``number`` was committed, if its data may be in memory only; else ""."""
        return self._txn.get(key_of(number), b"", db=self._tables.unflushed).decode()

    def _indexes(self, number: int, record: Record) -> Iterator[Entry]:
        """All that the indexes hold of a snapshot."""
        tables, key, name = self._tables, key_of(number), record.name.encode()
        yield tables.names, name, key
        yield tables.kinds[record.kind], key, name
        if record.parent:
            yield tables.children, key_of(record.parent) + record.kind[0].encode() + key, name
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

    def wrong_index_entries(self) -> int:
        """How many entries of the indexes are missing or too many; ``Writer.rebuild_indexes`` mends them."""
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
        found = self._txn.get(b"last_id", key_of(0), db=self._tables.meta)
        return number_of(found) if is_id(found) else max(self.numbers(), default=0)


def _readable(found: list[tuple[int, bytes]]) -> Iterator[tuple[int, Record]]:
    for number, encoded in found:
        with suppress(Damaged):
            yield number, decode_checked(number, encoded)


class _Collected(Reader):
    """Records that were read, to be made out when the transaction has ended."""

    def __init__(self, tables: Tables, found: dict[bytes, bytes]) -> None:
        super().__init__(tables)
        self._found = found
        self._parents: dict[int, Record] = {}

    def record(self, number: int) -> Record | None:
        found = self._found.get(key_of(number))
        return decode_checked(number, found) if found is not None else None

    def parent_of(self, record: Record) -> Record:
        parent = self._parents.get(record.parent)
        if parent is None:
            parent = self._parents[record.parent] = super().parent_of(record)
        return parent

    def infos(self, order: list[tuple[bytes, bytes]]) -> Iterator[Info]:
        for name, key in order:
            number = number_of(key)
            record = self.record(number)
            if record is None:
                raise Damaged(f"snapshot {number} has a name but no record")
            if record.name.encode() != name:
                raise Damaged(f'snapshot {number}, "{record.name}", stands under another name too')
            yield self.info(number, record)
