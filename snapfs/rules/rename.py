"""Rename: another key or name for a snapshot.  containerd lacks this."""

from __future__ import annotations

import msgspec

from snapfs.errors import NotPermitted
from snapfs.model import Kind, Ref
from snapfs.rules.change import change
from snapfs.rules.lookup import find, refuse_taken
from snapfs.rules.root import Root
from snapfs.store.schema import Record
from snapfs.store.writing import Writer


def rename(root: Root, writer: Writer, old: Ref, new: str) -> None:
    """Give the snapshot ``old`` the key or name ``new``; its kind, id, children and times stay.

    What was made at another door belongs to the tree from now on, which has given it a name of its own.

    Raises NotFound; AlreadyExists: ``new`` is in use; NotPermitted: it has children that were made at that door too, and would
    lose the parent that they know by this name.
    """
    number, before = find(writer, old)
    refuse_taken(writer, new, number)
    record = before
    if record.origin and new != record.name:
        _refuse_children_of_same_origin(writer, number, record)
        record = msgspec.structs.replace(record, origin="")
    change(root, writer, number, before, msgspec.structs.replace(record, name=new))


def _refuse_children_of_same_origin(writer: Writer, number: int, record: Record) -> None:
    for kind in Kind:
        for child, name in writer.children(number, kind):
            below = writer.record(child)
            if below is not None and below.origin == record.origin:
                raise NotPermitted(
                    f'snapshot "{record.name}" is {record.origin}\'s, and so is its child "{name}" ({kind}), '
                    "which knows it by this name: make a child of it in the tree instead"
                )
