"""Checkpoint, rollback and fork: the states of a workspace, an active snapshot that keeps its key.  containerd lacks these.

A checkpoint of ``web`` is the committed snapshot ``web@3``, with all labels of the workspace but ``pin``, and with OF, NUMBER
and MESSAGE.  The workspace goes on as a new active snapshot on it, with a new id.  Each is one operation: either all of it is
durable or nothing has happened.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import takewhile

from snapfs import names
from snapfs.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    LabelTooBig,
    NameTooLong,
    NotUtf8,
    Unavailable,
)
from snapfs.labels import MAX, MESSAGE, NUMBER, OF, PIN, no_checkpoint, pinned, refuse_too_many
from snapfs.model import Info, Kind, Ref
from snapfs.root.inuse import Free
from snapfs.rules import commit, prepare, remove
from snapfs.rules.change import write_imprint
from snapfs.rules.lookup import find, find_again, refuse_taken, refuse_too_deep, stands_on
from snapfs.rules.root import Root
from snapfs.store.indexes import DIGITS
from snapfs.store.reading import Reader
from snapfs.store.schema import Record
from snapfs.store.writing import Writer

OURS = (OF, NUMBER, MESSAGE)

MOST = MAX - len(MESSAGE)
"""Bytes that a message may take."""


def refuse_message(message: str) -> None:
    """Raise InvalidArgument unless ``message`` may be a checkpoint's: a line of UTF-8 that a label has room for."""
    if "\n" in message or "\0" in message:
        raise InvalidArgument("the message of a checkpoint is one line: leave newlines and NUL bytes out")
    try:
        size = len(message.encode())
    except UnicodeEncodeError:
        raise NotUtf8("the message of a checkpoint is not UTF-8") from None
    if size > MOST:
        raise LabelTooBig(f"the message of a checkpoint takes {size} bytes; at most {MOST} fit")


def checkpoints(reader: Reader, key: str) -> Iterator[tuple[int, int, Record]]:
    """Number, id and record of each checkpoint of the workspace ``key``, the oldest first.  Raises Damaged."""
    for nth, number in reader.checkpoints(key):
        record = reader.record(number)
        if record is not None:
            yield nth, number, record


def checkpoint(root: Root, writer: Writer, number: int, key: Ref, *, message: str, name: str | None, free: Free) -> Info:
    """Commit the active snapshot ``number``, called ``key``, as a checkpoint, and have it go on on top of that, by the same
    key: what Stat shows of the checkpoint.

    ``name``: the checkpoint's, instead of KEY@NUMBER.  ``free`` is as in ``use.refuse_used``.  Raises NotFound;
    FailedPrecondition: the snapshot is not active; Used; TooDeep; AlreadyExists: the name is in use; NameTooLong; LabelTooBig:
    no room for the message, beside the other labels; Unavailable where the disk refuses.
    """
    record = _workspace(writer, number, key)
    name, labels = _as_checkpoint(writer, record, message, name)
    # in the tree, the directory of the workspace stays what it is, and the checkpoint gets a new one
    node = writer.last_id() + 1
    commit.commit(
        root, writer, name, number, key, labels, None, "", keep_labels=False, refuse_mounted=True, free=free, node=node
    )
    _begin(root, writer, record, number, number)
    return writer.info(number, find_again(writer, number, name))


def keep_copy(
    root: Root, writer: Writer, number: int, key: Ref, *, message: str, name: str | None, new: int, made: str
) -> Info:
    """Make the directory ``made`` in the pool, a copy of the layer of the active snapshot ``number``, called ``key``, a
    checkpoint of it with the id ``new`` (``take_id``), beside which it goes on: what Stat shows of the checkpoint.

    Raises as ``checkpoint`` does, but for Used.
    """
    record = _workspace(writer, number, key)
    name, labels = _as_checkpoint(writer, record, message, name)
    refuse_taken(writer, name)
    refuse_too_many(name, labels, record.labels)
    now = time.time_ns()
    kept = Record(name, Kind.COMMITTED, record.parent, now, now, labels)
    if record.parent:
        refuse_too_deep(writer, new, kept)
    try:
        root.placing.place_made(writer, new, made)
    except OSError as error:
        raise Unavailable.from_os(f'make the directory of snapshot "{name}"', error) from error
    root.unflushed.mark(writer, new)
    write_imprint(root, new, kept, writer.unflushed_since(new))
    writer.put(new, kept)
    info = writer.info(new, kept)
    writer.changed(None, info)
    return info


def _as_checkpoint(writer: Writer, record: Record, message: str, name: str | None) -> tuple[str, dict[str, str]]:
    """Name and labels of the next checkpoint of the workspace with this ``record``."""
    nth = writer.last_checkpoint(record.name) + 1
    if name is None:
        while writer.id_of(f"{record.name}@{nth}") is not None:
            nth += 1
        name = f"{record.name}@{nth}"
        try:
            names.encode(name)
        except NameTooLong:
            most = names.NAME_MAX - len(f"@{nth}")
            raise NameTooLong(
                f"a checkpoint of this workspace would be called as it is, with @{nth} behind that, which takes more than "
                f"{names.NAME_MAX} bytes as a file name: rename the workspace to one of {most} bytes at most"
            ) from None
    elif name == record.name:
        raise AlreadyExists.snapshot(name, record.kind)
    if nth >= 10**DIGITS:
        raise FailedPrecondition(
            f'"{record.name}" has a checkpoint with the highest number that there is: take its labels away'
        )
    ours = {OF: record.name, NUMBER: str(nth), MESSAGE: message}
    kept = {label: value for label, value in record.labels.items() if label not in (*OURS, PIN)}
    return name, {**kept, **{label: value for label, value in ours.items() if value}}


def rollback(root: Root, writer: Writer, number: int, key: Ref, *, to: str | int | None, free: Free) -> Info:
    """Throw away what the active snapshot ``number``, called ``key``, has changed, and have it go on on the state ``to``: what
    Stat shows of it then.

    ``to`` is the number of a checkpoint, 0 (what the workspace was before the first one), the name of a checkpoint or of a
    snapshot that it stands on, or None: what it stands on.  ``free`` is as in ``use.refuse_used``.

    Raises NotFound: no such workspace, or no such checkpoint; FailedPrecondition: the snapshot is not active; Pinned; Used;
    Damaged; Unavailable where the disk refuses.
    """
    record = _workspace(writer, number, key)
    if PIN in record.labels:
        raise pinned(record.name, number)
    below = record.parent if to is None else _state(writer, number, record, to)
    remove.remove(root, writer, number, key, "", refuse_mounted=True, free=free, goes_on=True)
    return _begin(root, writer, record, number, below)


def fork(root: Root, writer: Writer, number: int, key: Ref, *, new: str, free: Free) -> Info:
    """Make the active snapshot ``new``, which begins as the snapshot ``number``, called ``key``, is: what Stat shows of it.

    It stands on that where it is committed, or else on a checkpoint of it.  Raises as ``checkpoint`` and ``prepare`` do.
    """
    if find_again(writer, number, key).kind is not Kind.COMMITTED:
        checkpoint(root, writer, number, key, message=f"forked as {new}", name=None, free=free)
    return _made(root, writer, prepare.PrepareRequest(Kind.ACTIVE, new, number, {}, ""))


def refuse_other_kinds(record: Record) -> None:
    """Raise FailedPrecondition unless ``record`` is that of a workspace."""
    if record.kind is not Kind.ACTIVE:
        raise FailedPrecondition(f'"{record.name}" is {record.kind}: a workspace is an active snapshot')


def _workspace(writer: Writer, number: int, key: Ref) -> Record:
    record = find_again(writer, number, key)
    refuse_other_kinds(record)
    return record


def _begin(root: Root, writer: Writer, record: Record, number: int, below: int) -> Info:
    """Make the workspace anew, which was ``number`` with this ``record``, on the snapshot ``below`` (0: on nothing)."""
    labels = {label: value for label, value in record.labels.items() if label not in OURS}
    node = record.node_of(number)
    return _made(root, writer, prepare.PrepareRequest(Kind.ACTIVE, record.name, below or None, labels, record.origin, node))


def _made(root: Root, writer: Writer, request: prepare.PrepareRequest) -> Info:
    number = prepare.make(root, writer, request)
    return writer.info(number, find_again(writer, number, request.key))


def _state(writer: Writer, number: int, record: Record, to: str | int) -> int:
    """The id of the state ``to`` of the workspace ``number``; 0 for an empty one."""
    if isinstance(to, int):
        return kept(writer, record, to, number)
    found = writer.find(to)
    if found is not None and (found[1].labels.get(OF) == record.name or found[0] in stands_on(writer, record)):
        return found[0]
    raise no_checkpoint(record.name, f'"{to}"', number)


def kept(reader: Reader, record: Record, nth: int, number: int = 0) -> int:
    """The id of checkpoint ``nth`` of the workspace with this ``record``, or of which this is a checkpoint; 0: of what it was
    before the first, which may be nothing (0).  Raises NotFound, which says how to list them; for that, ``number`` is the
    workspace's id, if it is known."""
    key = record.name if record.kind is not Kind.COMMITTED else record.labels.get(OF, record.name)
    found = _kept(reader, key, nth)
    if found is not None:
        return found
    if nth == 0:
        first = _kept(reader, key, next((nth for nth, _ in reader.checkpoints(key)), 0))
        return record.parent if first is None else find(reader, first)[1].parent
    raise no_checkpoint(key, str(nth), number)


def _kept(reader: Reader, key: str, nth: int) -> int | None:
    """The id of checkpoint ``nth`` of the workspace ``key``; the latest, where labels that were set by hand make several."""
    if not 0 <= nth < 10**DIGITS:
        return None
    found = takewhile(lambda entry: entry[0] == nth, reader.checkpoints(key, nth))
    return max((number for _, number in found), default=None)
