"""Change: how the record of a snapshot becomes another one, and its directory with it."""

from __future__ import annotations

from snapfs.errors import Unavailable
from snapfs.model import Info
from snapfs.root.imprint import Imprint
from snapfs.rules.root import Root
from snapfs.store.schema import Record
from snapfs.store.writing import Writer


def change(root: Root, writer: Writer, number: int, before: Record, after: Record, *, flushed: bool = False) -> Info:
    """Make ``after`` the record of snapshot ``number``, which is ``before``; what Stat shows of it then.

    Its directory bears the new record before the transaction is durable, and the old one again if that fails.  A snapshot
    that becomes committed is marked as unflushed, unless its files are ``flushed``.  Raises OSError.
    """
    was = writer.info(number, before)
    rewrite(root, writer, number, before, after, flushed=flushed)
    info = writer.info(number, after)
    writer.changed(was, info, goes_on=before.node_of(number) != after.node_of(number))
    return info


def rewrite(root: Root, writer: Writer, number: int, before: Record, after: Record, *, flushed: bool = False) -> None:
    """The same, of which no listener is told."""
    since = writer.unflushed_since(number)
    if before.kind is not after.kind and not flushed:
        root.unflushed.mark(writer, number)
    writer.on_failure(lambda: _take_back_imprint(root, number, before, since))
    write_imprint(root, number, after, writer.unflushed_since(number))
    writer.put(number, after)


def take_id(root: Root, writer: Writer) -> int:
    """Give out the id of a snapshot that is to be made of a directory with files.  Once that is durable, the next start knows
    what a crash has left of the directory for none of a recorded snapshot's, and deletes it.

    Raises Unavailable where the disk refuses."""
    number = writer.next_id()
    try:
        root.layers.reserve_ids(number)
    except OSError as error:
        raise Unavailable.from_os("give out an id", error) from error
    return number


def write_imprint(root: Root, number: int, record: Record, unflushed_since: str = "") -> None:
    """Let the directory of snapshot ``number`` bear ``record``, unless the directory is missing; raises OSError."""
    if number not in root.damaged:
        root.layers.write_imprint(number, Imprint(record, unflushed_since))


def _take_back_imprint(root: Root, number: int, record: Record, unflushed_since: str) -> None:
    """The same, where the directory bears more by now than has happened; if that fails, too, the next start mends it."""
    try:
        write_imprint(root, number, record, unflushed_since)
    except OSError:
        root.agrees = False
        raise
