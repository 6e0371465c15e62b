"""Indexes: the tables that follow from the records (``schema.py``), and how they are kept in step with them.

All functions work within a transaction of LMDB, ``txn``.  What they keep in step is ``Tables.indexes``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import lmdb

from snapfs.errors import Damaged
from snapfs.labels import NUMBER, OF
from snapfs.model import Kind
from snapfs.names import NAME_MAX
from snapfs.store.schema import Record, Tables, decode_checked, is_id, key_of, number_of

DIGITS = 9  # of the number of a checkpoint, at most

Entry = tuple[Any, bytes, bytes]
"""One entry of an index: the table (py-lmdb's handle, which has no type to name), key, value."""


def child_key(parent: int, kind: Kind, number: int) -> bytes:
    """The key in the table ``children`` of snapshot ``number``, which stands on ``parent``."""
    return child_prefix(parent, kind) + key_of(number)


def child_prefix(parent: int, kind: Kind) -> bytes:
    """How the keys of all children of ``parent`` of this kind begin."""
    return key_of(parent) + kind[0].encode()


def checkpoint_prefix(workspace: str) -> bytes:
    """How the keys in the table ``checkpoints`` of all that are checkpoints of ``workspace`` begin."""
    key = workspace.encode()
    return len(key).to_bytes(2, "big") + key


def _checkpoint(record: Record) -> bytes | None:
    """``record``'s key in the table ``checkpoints``, but for the id; None where its labels make it no checkpoint."""
    nth, workspace = record.labels.get(NUMBER, ""), record.labels.get(OF, "")
    if record.kind is not Kind.COMMITTED or not (nth.isascii() and nth.isdecimal() and len(nth) <= DIGITS):
        return None
    if not workspace or len(workspace.encode()) > NAME_MAX:
        return None
    return checkpoint_prefix(workspace) + key_of(int(nth))


def entries_of(tables: Tables, number: int, record: Record) -> Iterator[Entry]:
    """All that the indexes hold of snapshot ``number``, whose record is ``record``."""
    key, name = key_of(number), record.name.encode()
    yield tables.names, name, key
    yield tables.kinds[record.kind], key, name
    if record.parent:
        yield tables.children, child_key(record.parent, record.kind, number), name
    if (checkpoint := _checkpoint(record)) is not None:
        yield tables.checkpoints, checkpoint + key, b""
    if record.node:
        yield tables.nodes, key_of(record.node), key
    if record.kind is Kind.COMMITTED and record.usage is None:
        yield tables.uncounted, key, b""
    for image in record.images:
        nth, word = key_of(image.number), image.name.encode()
        yield tables.images, word, nth + key
        yield tables.image_names, nth, key + word


def has_checkpoints(txn: lmdb.Transaction[bytes]) -> bool:
    """Whether there is the table ``checkpoints``: records that an earlier snapfs made have none."""
    with txn.cursor() as cursor:
        return bool(cursor.set_key(b"checkpoints"))


def add_checkpoints(txn: lmdb.Transaction[bytes], tables: Tables) -> None:
    """Fill the table ``checkpoints``, which is new, from the records."""
    with txn.cursor(db=tables.snapshots) as cursor:
        for key, value in cursor:
            if is_id(key):
                with suppress(Damaged):
                    record = decode_checked(number_of(key), value)
                    replace(
                        txn,
                        set(),
                        {entry for entry in entries_of(tables, number_of(key), record) if entry[0] is tables.checkpoints},
                    )


def stored_entries(txn: lmdb.Transaction[bytes], tables: Tables) -> set[Entry]:
    """All that the indexes hold now, right or wrong."""
    found: set[Entry] = set()
    for table in tables.indexes:
        with txn.cursor(db=table) as cursor:
            found.update((table, key, value) for key, value in cursor)
    return found


def replace(txn: lmdb.Transaction[bytes], before: set[Entry], after: set[Entry]) -> None:
    """Put the entries ``after`` in the place of the entries ``before``."""
    for table, key, _ in before - after:
        txn.delete(key, db=table)
    for table, key, value in after - before:
        txn.put(key, value, db=table)


def rebuild(txn: lmdb.Transaction[bytes], tables: Tables, entries: set[Entry]) -> None:
    """Have the indexes hold these entries and nothing else."""
    for table in tables.indexes:
        txn.drop(table, delete=False)
    replace(txn, set(), entries)


def delete_number(txn: lmdb.Transaction[bytes], tables: Tables, number: int, kind: Kind, name: str) -> None:
    """Take out what the indexes hold of snapshot ``number``, whose record can't be read: it has this kind and name."""
    key = key_of(number)
    for table in (tables.kinds[kind], tables.uncounted):
        txn.delete(key, db=table)
    txn.delete(name.encode(), db=tables.names)
    with txn.cursor(db=tables.nodes) as cursor:
        for node in [node for node, value in cursor if value == key]:
            txn.delete(node, db=tables.nodes)
    with txn.cursor(db=tables.image_names) as cursor:
        for nth, word in [(nth, value[8:]) for nth, value in cursor if value.startswith(key)]:
            txn.delete(nth, db=tables.image_names)
            txn.delete(word, db=tables.images)
    for table, begin in ((tables.children, 9), (tables.checkpoints, -8)):
        with txn.cursor(db=table) as cursor:
            for entry in [entry for entry in cursor.iternext(values=False) if entry[begin:] == key]:
                txn.delete(entry, db=table)
