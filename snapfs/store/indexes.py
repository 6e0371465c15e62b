"""Indexes: the tables that follow from the records (``schema.py``), and how they are kept in step with them.

All functions work within a transaction of LMDB, ``txn``.  What they keep in step is ``Tables.indexes``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lmdb

from snapfs.model import Kind
from snapfs.store.schema import Record, Tables, key_of

Entry = tuple[Any, bytes, bytes]
"""One entry of an index: the table (py-lmdb's handle, which has no type to name), key, value."""


def child_key(parent: int, kind: Kind, number: int) -> bytes:
    """The key in the table ``children`` of snapshot ``number``, which stands on ``parent``."""
    return child_prefix(parent, kind) + key_of(number)


def child_prefix(parent: int, kind: Kind) -> bytes:
    """How the keys of all children of ``parent`` of this kind begin."""
    return key_of(parent) + kind[0].encode()


def entries_of(tables: Tables, number: int, record: Record) -> Iterator[Entry]:
    """All that the indexes hold of snapshot ``number``, whose record is ``record``."""
    key, name = key_of(number), record.name.encode()
    yield tables.names, name, key
    yield tables.kinds[record.kind], key, name
    if record.parent:
        yield tables.children, child_key(record.parent, record.kind, number), name
    if record.kind is Kind.COMMITTED and record.usage is None:
        yield tables.uncounted, key, b""


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
    with txn.cursor(db=tables.children) as cursor:
        for entry in [entry for entry in cursor.iternext(values=False) if entry[9:] == key]:
            txn.delete(entry, db=tables.children)
