"""Checkpoint, rollback and fork: the states of a workspace, an active snapshot that keeps its key.  containerd lacks these.

A checkpoint of ``web`` is the committed snapshot ``web@3``, with all labels of the workspace but ``pin``, and with OF, NUMBER
and MESSAGE.  The workspace goes on as a new active snapshot on it, with a new id.  Each is one operation: either all of it is
durable or nothing has happened.
"""

from __future__ import annotations

from itertools import takewhile

from snapfs import names
from snapfs.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound
from snapfs.labels import MESSAGE, NUMBER, OF, PIN, check_label, pinned
from snapfs.model import Info, Kind, Ref
from snapfs.rules import commit, prepare, remove
from snapfs.rules.lookup import find, find_again
from snapfs.rules.root import Root
from snapfs.store.indexes import DIGITS
from snapfs.store.reading import Reader
from snapfs.store.schema import Record
from snapfs.store.writing import Writer

OURS = (OF, NUMBER, MESSAGE)


def refuse_message(message: str) -> None:
    """Raise InvalidArgument unless ``message`` may be a checkpoint's: a line of text that a label has room for."""
    if "\n" in message or "\0" in message:
        raise InvalidArgument("the message of a checkpoint is one line: leave newlines and NUL bytes out")
    check_label(MESSAGE, message)


def checkpoints(reader: Reader, key: str) -> list[tuple[int, int, Record]]:
    """Number, id and record of each checkpoint of the workspace ``key``, the oldest first.  Raises Damaged."""
    found = ((nth, number, reader.record(number)) for nth, number in reader.checkpoints(key))
    return [(nth, number, record) for nth, number, record in found if record is not None]


def checkpoint(root: Root, writer: Writer, number: int, key: Ref, *, message: str, name: str | None, free: bool) -> Info:
    """Commit the active snapshot ``number``, called ``key``, as a checkpoint, and have it go on on top of that, by the same
    key: what Stat shows of the checkpoint.

    ``name``: the checkpoint's, instead of KEY@NUMBER.  ``free`` is as in ``use.refuse_used``.  Raises NotFound;
    FailedPrecondition: the snapshot is not active; Used; TooDeep; AlreadyExists: the name is in use; NameTooLong; LabelTooBig:
    no room for the message, beside the other labels; Unavailable where the disk refuses.
    """
    record = _workspace(writer, number, key)
    nth = writer.last_checkpoint(record.name) + 1
    if name is None:
        while writer.id_of(f"{record.name}@{nth}") is not None:
            nth += 1
        name = f"{record.name}@{nth}"
        names.encode(name)
    elif name == record.name:
        raise AlreadyExists.snapshot(name, record.kind)
    ours = {OF: record.name, NUMBER: str(nth), MESSAGE: message}
    kept = {label: value for label, value in record.labels.items() if label not in (*OURS, PIN)}
    labels = {**kept, **{label: value for label, value in ours.items() if value}}
    # in the tree, the directory of the workspace stays what it is, and the checkpoint gets a new one
    node = writer.last_id() + 1
    if nth >= 10**DIGITS:
        raise FailedPrecondition(
            f'"{record.name}" has a checkpoint with the highest number that there is: take its labels away'
        )
    commit.commit(
        root, writer, name, number, key, labels, None, "", keep_labels=False, refuse_mounted=True, free=free, node=node
    )
    _begin(root, writer, record, number, number)
    return writer.info(number, find_again(writer, number, name))


def rollback(root: Root, writer: Writer, number: int, key: Ref, *, to: str | int | None, free: bool) -> Info:
    """Throw away what the active snapshot ``number``, called ``key``, has changed, and have it go on on the state ``to``: what
    Stat shows of it then.

    ``to`` is the number of a checkpoint, 0 (what the workspace was before the first one), the name of a checkpoint or of a
    snapshot that it stands on, or None: what it stands on.  ``free`` is as in ``use.refuse_used``.

    Raises NotFound: no such workspace, or no such checkpoint; FailedPrecondition: the snapshot is not active; Pinned; Used;
    Damaged; Unavailable where the disk refuses.
    """
    record = _workspace(writer, number, key)
    if PIN in record.labels:
        raise pinned(record.name)
    below = record.parent if to is None else _state(writer, record, to)
    remove.remove(root, writer, number, key, "", refuse_mounted=True, free=free, goes_on=True)
    return _begin(root, writer, record, number, below)


def fork(root: Root, writer: Writer, number: int, key: Ref, *, new: str, free: bool) -> Info:
    """Make the active snapshot ``new``, which begins as the snapshot ``number``, called ``key``, is: what Stat shows of it.

    It stands on that where it is committed, or else on a checkpoint of it.  Raises as ``checkpoint`` and ``prepare`` do.
    """
    if find_again(writer, number, key).kind is not Kind.COMMITTED:
        checkpoint(root, writer, number, key, message=f"forked as {new}", name=None, free=free)
    return _made(root, writer, prepare.PrepareRequest(Kind.ACTIVE, new, number, {}, ""))


def _workspace(writer: Writer, number: int, key: Ref) -> Record:
    record = find_again(writer, number, key)
    if record.kind is not Kind.ACTIVE:
        raise FailedPrecondition(f'"{record.name}" is {record.kind}: a workspace is an active snapshot')
    return record


def _begin(root: Root, writer: Writer, record: Record, number: int, below: int) -> Info:
    """Make the workspace anew, which was ``number`` with this ``record``, on the snapshot ``below`` (0: on nothing)."""
    labels = {label: value for label, value in record.labels.items() if label not in OURS}
    node = record.node_of(number)
    return _made(root, writer, prepare.PrepareRequest(Kind.ACTIVE, record.name, below or None, labels, record.origin, node))


def _made(root: Root, writer: Writer, request: prepare.PrepareRequest) -> Info:
    number = prepare.make(root, writer, request)
    return writer.info(number, find_again(writer, number, request.key))


def _state(writer: Writer, record: Record, to: str | int) -> int:
    """The id of the state ``to`` of a workspace; 0 for an empty one."""
    if isinstance(to, int):
        kept = _kept(writer, record.name, to)
        if kept is not None:
            return kept
        if to == 0:
            first = _kept(writer, record.name, next((nth for nth, _ in writer.checkpoints(record.name)), 0))
            return record.parent if first is None else find(writer, first)[1].parent
        raise NotFound(f'"{record.name}" has no checkpoint {to}: read the file checkpoint for those that there are')
    found = writer.find(to)
    if found is not None and (found[1].labels.get(OF) == record.name or found[0] in writer.chain(record)):
        return found[0]
    raise NotFound(f'"{record.name}" has no checkpoint "{to}": read the file checkpoint for those that there are')


def _kept(writer: Writer, key: str, nth: int) -> int | None:
    """The id of checkpoint ``nth`` of the workspace ``key``; the latest, where labels that were set by hand make several."""
    if not 0 <= nth < 10**DIGITS:
        return None
    found = takewhile(lambda entry: entry[0] == nth, writer.checkpoints(key, nth))
    return max((number for _, number in found), default=None)
