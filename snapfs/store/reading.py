"""Reading: what one consistent state of the records says (``snapfs/store/schema.py``)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import islice

import lmdb
import msgspec

from snapfs import names
from snapfs.errors import Damaged, InvalidArgument
from snapfs.model import Info, Kind
from snapfs.store import indexes
from snapfs.store.schema import Record, Tables, decode, decode_checked, is_id, key_of, number_of, root_word

CHUNK = 128  # records that ``Reader.records`` reads ahead: some more than one answer to a listing has room for


class Reader:
    """One consistent state of the records; valid inside the block of ``MetaStore.reading`` or inside a write operation only.

    Wherever a method says "Damaged", the records contradict themselves, or their bytes can't be what they should be.
    """

    _txn: lmdb.Transaction[bytes]

    def __init__(self, tables: Tables) -> None:
        self._tables = tables

    def id_of(self, name: str) -> int | None:
        """The id of the snapshot called ``name``, None where there is none.  Raises Damaged."""
        try:
            found = self._txn.get(name.encode(), db=self._tables.names)
        except (lmdb.BadValsizeError, UnicodeEncodeError):  # empty or too long or no UTF-8: no key can be that
            return None
        return None if found is None else number_of(found)

    def record(self, number: int) -> Record | None:
        """The record of snapshot ``number``, None where there is none; raises Damaged where its bytes can't be a record."""
        found = self._txn.get(key_of(number), db=self._tables.snapshots)
        return decode_checked(number, found) if found is not None else None

    def by_node(self, node: int) -> tuple[int, Record] | None:
        """Id and record of the snapshot for which the tree's inodes have the number ``node``, None where there is none; raises
        Damaged where its bytes can't be a record."""
        found = self._txn.get(key_of(node), db=self._tables.nodes)
        number = int(node) if found is None else number_of(found)
        record = self.record(number)
        return (number, record) if record is not None and record.node_of(number) == node else None

    def node_of(self, number: int) -> int:
        """The number that the tree's inodes have for snapshot ``number``, of which the record can't be read."""
        with self._txn.cursor(db=self._tables.nodes) as cursor:
            return next((number_of(node) for node, key in cursor if key == key_of(number) and is_id(node)), number)

    def find(self, name: str) -> tuple[int, Record] | None:
        """Id and record of the snapshot called ``name``, None where there is none; raises Damaged where the name leads to the
        id of a snapshot that is called something else."""
        number = self.id_of(name)
        if number is None:
            return None
        record = self.record(number)
        if record is None or record.name != name:
            what = "has no record" if record is None else f'is called "{record.name}"'
            raise Damaged(f'the name "{name}" leads to snapshot {number}, which {what}')
        return number, record

    def indexed_as(self, number: int) -> tuple[Kind, str]:
        """Kind and name of snapshot ``number`` by the indexes alone, whatever its record says; raises Damaged where the indexes
        contradict each other."""
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
        """The record of the parent that ``record`` names, which it must; raises Damaged where the parent has no record."""
        parent = self.record(record.parent)
        if parent is None:
            raise Damaged(f'the parent of snapshot "{record.name}", number {record.parent}, has no record')
        return parent

    def info(self, number: int, record: Record) -> Info:
        """What Stat shows of snapshot ``number``, whose record is ``record``.  Raises Damaged where its parent has no
        record."""
        return Info(
            name=record.name,
            kind=record.kind,
            id=number,
            parent=self.parent_of(record).name if record.parent else None,
            labels=record.labels,
            created=record.created,
            updated=record.updated,
            origin=record.origin,
            node=record.node,
            images=tuple(image.name for image in record.images),
        )

    def chain(self, record: Record) -> list[int]:
        """The ids of the snapshots that ``record`` stands on, the nearest first.

        Raises Damaged where one of them has no record, or where a snapshot is among its own parents.
        """
        return self._chain(record, {})

    def _chain(self, record: Record, known: Mapping[int, list[int]]) -> list[int]:
        """The same, where it is ``known`` what comes from some snapshots on."""
        chain: dict[int, None] = {}
        while record.parent and record.parent not in known:
            if record.parent in chain:
                raise Damaged(f'snapshot "{record.name}" is among its own parents: the records go round in a circle')
            chain[record.parent] = None
            record = self.parent_of(record)
        return [*chain, *known[record.parent]] if record.parent else list(chain)

    def with_image(self, number: int, record: Record) -> list[tuple[int, Record]]:
        """Id and record of the snapshot whose image.json is that of snapshot ``number`` too, or from which that is inherited,
        and of all on the way there, the nearest first; nothing where there is none.  Raises Damaged."""
        way = [(number, record)]
        seen = {number}
        while record.image is None:
            if not record.parent or record.parent in seen:
                return []
            seen.add(record.parent)
            number, record = record.parent, self.parent_of(record)
            way.append((number, record))
        return way

    def lowers(self, number: int, record: Record) -> list[int]:
        """The ids of the lower layers (which are only read) of the overlay that shows snapshot ``number``, the nearest first.

        The snapshot's own layer is one of them where it is committed, and where it is a view on nothing; that of an active
        snapshot is the upper layer, and a view has an empty one.  Raises Damaged (``chain``).
        """
        chain = self.chain(record)
        return chain if record.kind is Kind.ACTIVE or (record.kind is Kind.VIEW and chain) else [number, *chain]

    def listing(self, kind: Kind, after: int = 0) -> Iterator[tuple[int, str]]:
        """Id and name of all snapshots of ``kind`` with an id above ``after``, in the order of ids.  Entries of the index that
        can't be ids are left out."""
        with self._txn.cursor(db=self._tables.kinds[kind]) as cursor:
            if cursor.set_range(key_of(after + 1)):
                for key, name in cursor:
                    if is_id(key):
                        yield number_of(key), name.decode(errors="replace")

    def records(self, kind: Kind, after: int = 0) -> Iterator[tuple[int, str, Record | None]]:
        """As ``listing``, each with its record: None where the record can't be read, or contradicts the index."""
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
        """Id and name of all children of ``kind`` that snapshot ``parent`` has, with an id above ``after``, in the order of
        ids."""
        prefix = indexes.child_prefix(parent, kind)
        with self._txn.cursor(db=self._tables.children) as cursor:
            if cursor.set_range(prefix + key_of(after + 1)):
                for key, name in cursor:
                    if not key.startswith(prefix):
                        return
                    if is_id(key[9:]):
                        yield number_of(key[9:]), name.decode(errors="replace")

    def checkpoints(self, workspace: str, first: int = 0) -> Iterator[tuple[int, int]]:
        """Number and id of each checkpoint of ``workspace``, a key, by number, from ``first`` on."""
        prefix = indexes.checkpoint_prefix(workspace)
        with self._txn.cursor(db=self._tables.checkpoints) as cursor:
            if cursor.set_range(prefix + key_of(first)):
                for key in cursor.iternext(values=False):
                    if not key.startswith(prefix):
                        return
                    nth, number = key[len(prefix) : -8], key[-8:]
                    if len(nth) == 8 and is_id(number):
                        yield int.from_bytes(nth, "big"), number_of(number)

    def latest_checkpoints(self, workspace: str, most: int) -> Iterator[int]:
        """The ids of the ``most`` checkpoints of ``workspace`` with the highest numbers, the highest first."""
        prefix = indexes.checkpoint_prefix(workspace)
        with self._txn.cursor(db=self._tables.checkpoints) as cursor:
            there = cursor.prev() if cursor.set_range(prefix + b"\xff" * 16) else cursor.last()
            if there:
                for key in islice(cursor.iterprev(values=False), most):
                    if not key.startswith(prefix):
                        return
                    if len(key) == len(prefix) + 16 and is_id(key[-8:]):
                        yield number_of(key[-8:])

    def last_checkpoint(self, workspace: str) -> int:
        """The highest number of a checkpoint of ``workspace``, 0 where there is none."""
        prefix = indexes.checkpoint_prefix(workspace)
        with self._txn.cursor(db=self._tables.checkpoints) as cursor:
            if cursor.set_range(prefix + b"\xff" * 16):
                cursor.prev()
            else:
                cursor.last()
            key = cursor.key()
        return int.from_bytes(key[len(prefix) : -8], "big") if key.startswith(prefix) and len(key) == len(prefix) + 16 else 0

    def any_child(self, parent: int) -> tuple[Kind, str] | None:
        """Kind and name of one of the children of snapshot ``parent``, None where it has none."""
        found = ((kind, name) for kind in Kind for number, name in self.children(parent, kind) if number != parent)
        return next(found, None)

    def image(self, name: str) -> tuple[int, int] | None:
        """The number of ``name`` in images/, and the id of the snapshot that has it; None where none has.  Raises Damaged."""
        try:
            found = self._txn.get(name.encode(), db=self._tables.images)
        except (lmdb.BadValsizeError, UnicodeEncodeError):  # empty or too long or no UTF-8: no name can be that
            return None
        return None if found is None else (number_of(found[:8]), number_of(found[8:]))

    def image_at(self, nth: int) -> tuple[int, str] | None:
        """The id of the snapshot that has the name with the number ``nth`` in images/, and that name; None where there is none.
        Raises Damaged."""
        found = self._txn.get(key_of(nth), db=self._tables.image_names)
        return None if found is None else (number_of(found[:8]), found[8:].decode(errors="replace"))

    def images(self, after: int = 0) -> Iterator[tuple[int, int, str]]:
        """Of each name in images/ with a number above ``after``, in the order of these: the number, the id of the snapshot, and
        the name.  Entries of the index that can't be ids are left out."""
        with self._txn.cursor(db=self._tables.image_names) as cursor:
            if cursor.set_range(key_of(after + 1)):
                for nth, found in cursor:
                    if is_id(nth) and is_id(found[:8]):
                        yield number_of(nth), number_of(found[:8]), found[8:].decode(errors="replace")

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
        """All snapshots in the order of their keys' bytes; with ``selection``, only those that have one of these names, kinds
        or parents (``Filters.selection``).

        The bytes of the records are collected at once and decoded later, by the iterator, also after the block has ended: while
        a reader is at work, the writer can't use any page again, and the file would grow all that time.  The iterator raises
        Damaged at a snapshot whose record can't be read or contradicts the index.
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
        """Id and record of all snapshots in the order of ids, decoded one after the other, for together they may be large;
        records that can't be read are left out."""
        with self._txn.cursor(db=self._tables.snapshots) as cursor:
            for key, value in cursor:
                if is_id(key):
                    with suppress(Damaged):
                        yield number_of(key), decode_checked(number_of(key), value)

    def uncounted(self) -> list[int]:
        """The ids of committed snapshots whose usage is not yet known."""
        with self._txn.cursor(db=self._tables.uncounted) as cursor:
            return [number_of(key) for key in cursor.iternext(values=False) if is_id(key)]

    def unflushed(self) -> list[tuple[int, str]]:
        """The ids of committed snapshots whose data may be in the machine's memory only, each with the boot of the machine in
        which that was so (``root/unflushed.py``)."""
        with self._txn.cursor(db=self._tables.unflushed) as cursor:
            return [(number_of(key), boot.decode(errors="replace")) for key, boot in cursor if is_id(key)]

    def placed(self) -> list[tuple[int, str]]:
        """The ids of snapshots whose directory a power cut may put back into the pool, each with the directory's name there
        (``root/placing.py``)."""
        with self._txn.cursor(db=self._tables.placed) as cursor:
            return [(number_of(key), name.decode(errors="replace")) for key, name in cursor if is_id(key)]

    def unflushed_since(self, number: int) -> str:
        """The boot in which snapshot ``number`` was committed, if its data may be in the machine's memory only; else ""."""
        return self._txn.get(key_of(number), b"", db=self._tables.unflushed).decode()

    def _index_entries(self) -> set[indexes.Entry]:
        """What the indexes should hold, for all records that can be read."""
        entries: set[indexes.Entry] = set()
        for number in self.ids():
            with suppress(Damaged):
                record = self.record(number)
                if record is not None:
                    entries.update(indexes.entries_of(self._tables, number, record))
        return entries

    def wrong_index_entries(self) -> int:
        """How many entries the indexes lack or have too many, by what the records say; ``Writer.rebuild_indexes`` mends
        that."""
        found, known = indexes.stored_entries(self._txn, self._tables), self.ids()
        strays = sum(number not in known for number, _ in self.unflushed())
        return len(found ^ self._index_entries()) + strays + (max(known, default=0) > self.last_id())

    def count(self, kind: Kind) -> int:
        """How many snapshots of ``kind`` there are."""
        entries: int = self._txn.stat(self._tables.kinds[kind])["entries"]
        return entries

    def last_id(self) -> int:
        """The highest id ever given out; where that can't be read, the highest that there is a record of."""
        found = self._txn.get(b"last_id", key_of(0), db=self._tables.meta)
        return number_of(found) if is_id(found) else max(self.numbers(), default=0)

    def root_word(self) -> str:
        """The word of the root whose records these are (``root/identity.py``); "" where none was written yet."""
        return root_word(self._txn, self._tables.meta)


class _Collected(Reader):
    """The bytes of records, collected within a transaction, to be decoded when that has ended."""

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
