"""Commit: an active snapshot becomes a committed one, under a name of its own."""

from __future__ import annotations

import time

from snapfs.errors import FailedPrecondition, InvalidArgument, WrongParent
from snapfs.labels import IMPORTING, refuse_too_many
from snapfs.model import Kind, Ref, Usage
from snapfs.root.inuse import Free
from snapfs.rules.change import change
from snapfs.rules.digest import forgotten
from snapfs.rules.lookup import find, find_again, find_parent, refuse_taken, refuse_too_deep
from snapfs.rules.root import Root
from snapfs.rules.use import refuse_used
from snapfs.store.schema import Record
from snapfs.store.writing import Writer


def commit(
    root: Root,
    writer: Writer,
    name: str,
    number: int,
    key: Ref,
    labels: dict[str, str],
    parent: Ref | None,
    origin: str,
    *,
    keep_labels: bool,
    refuse_mounted: bool,
    free: Free,
    flushed: bool = False,
    usage: Usage | None = None,
    node: int | None = None,
) -> None:
    """Make the active snapshot ``number``, called ``key``, the committed snapshot ``name``: the id stays, the key is gone.

    The labels are ``labels`` and no others, unless ``keep_labels``; created and updated are now.  ``parent`` is the parent
    that it has, or one to rebase it onto if it has none.  ``refuse_mounted`` and ``free`` are as in ``use.refuse_used``.
    ``flushed``: its files are on the disk, and take ``usage``, if that is known.  ``node``: what the tree's inodes have for it
    from now on, if not what they had.

    What was made at another door than ``origin`` belongs to the tree from now on, which has given it a name of its own.

    Raises NotFound: no such key, or no such parent to rebase onto; FailedPrecondition: the snapshot is not active, or that
    parent is not committed; Used; TooDeep: its layer would be one too many for the kernel to mount; AlreadyExists: the name
    is in use (the key itself is fine); InvalidArgument: another parent than its own, or itself; LabelTooBig: labels
    that are too many, and more than it has; Damaged.
    """
    record = find_again(writer, number, key)
    if record.kind is not Kind.ACTIVE:
        raise FailedPrecondition(f'snapshot "{record.name}" is {record.kind}: only active ones can be committed')
    root.layers.refuse_damaged(number)
    if parent == name:
        raise InvalidArgument(f'snapshot "{name}" cannot be its own parent')
    refuse_taken(writer, name, number)
    kept = {**(record.labels if keep_labels else {}), **labels}
    kept.pop(IMPORTING, None)  # it is imported by that
    refuse_too_many(name, kept, record.labels)
    above = _new_parent(root, writer, record, parent) if parent else record.parent
    if refuse_mounted:
        refuse_used(root, number, record, free=free)
    now = time.time_ns()
    whose = origin if record.origin == origin else ""
    after = Record(name, Kind.COMMITTED, above, now, now, kept, usage, whose, record.node if node is None else node)
    if above:
        refuse_too_deep(writer, number, after)
    change(root, writer, number, record, after, flushed=flushed)


def _new_parent(root: Root, writer: Writer, record: Record, parent: Ref) -> int:
    """The id of the parent that a Commit asks for."""
    if not record.parent:
        return find_parent(root, writer, parent, FailedPrecondition)
    own = writer.parent_of(record).name
    if parent not in (own, record.parent):
        asked = writer.record(parent) if isinstance(parent, int) else None
        raise WrongParent(f'the parent of snapshot "{record.name}" is "{own}", not "{asked.name if asked else parent}"')
    return record.parent


def accept(root: Root, writer: Writer, key: Ref) -> int:
    """Take the committed snapshot ``key`` as it is, whose data had not been flushed when the power went; its id.

    Raises NotFound, or FailedPrecondition: there is nothing to accept.
    """
    number, record = find(writer, key)
    if number not in root.unflushed.lost:
        raise FailedPrecondition(f'snapshot "{record.name}" is whole: there is nothing to accept')
    if record.diff_id:
        writer.put(number, forgotten(record))
    root.unflushed.settle(writer, [number])
    info = writer.info(number, record)
    writer.changed(info, info, counted=True)
    return number
