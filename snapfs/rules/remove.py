"""Remove: key and record of a snapshot go, and its files right after."""

from __future__ import annotations

from snapfs.errors import Damaged, FailedPrecondition, HasChildren, NotFound
from snapfs.imagenames import named
from snapfs.labels import PIN, pinned
from snapfs.model import Info, Kind, Ref
from snapfs.root.inuse import Free
from snapfs.rules.lookup import find_again
from snapfs.rules.root import Root
from snapfs.rules.use import refuse_below_active, refuse_used
from snapfs.store.schema import Record
from snapfs.store.writing import Writer


def remove(
    root: Root,
    writer: Writer,
    number: int,
    key: Ref,
    origin: str,
    *,
    refuse_mounted: bool,
    free: Free,
    goes_on: bool = False,
    seen: tuple[Kind, str] | None = None,
) -> None:
    """Remove snapshot ``number``, called ``key``, of any kind; when that is durable its directory goes to the trash.

    ``refuse_mounted`` and ``free`` are as in ``use.refuse_used``, ``goes_on`` as in ``Change``.  ``seen``: it must still have
    this kind and name, for it keeps its number when it is committed or renamed.  A snapshot whose record is
    damaged is removed too, with its names in images/, if the indexes agree about which one it is.

    Raises NotFound; HasChildren; Named; Used, also where an active snapshot that stands on others by now (``squash.squash``) is
    mounted here with this one beneath; Pinned; FailedPrecondition: it was made at another door than ``origin``, unless that is
    "", which may remove all.
    """
    before, record = _last_seen(writer, number, key)
    if seen is not None and seen != (before.kind, before.name):
        raise NotFound(f'snapshot "{seen[1]}" was committed or renamed a moment ago, to "{before.name}" ({before.kind})')
    if origin and before.origin != origin:
        raise FailedPrecondition(f'snapshot "{before.name}" was not made by {origin}: remove it in the tree')
    if PIN in before.labels:
        raise pinned(before.name, number)
    if child := writer.any_child(number):
        raise HasChildren.of(before.name, child[1], child[0])
    if before.images and record is not None:
        raise named(before.name, before.images)
    if refuse_mounted and record is not None:
        refuse_used(root, number, record, free=free)
    if before.kind is Kind.COMMITTED:
        refuse_below_active(root, writer, number, before.name)
    if record is None:
        writer.delete_unreadable(number, before.kind, before.name)
    else:
        writer.delete(number, record)
    writer.changed(before, None, goes_on=goes_on)
    put_away(root, writer, number)


def put_away(root: Root, writer: Writer, number: int) -> None:
    """When it is durable that snapshot ``number`` is gone, have its directory go to the trash, or wait for Cleanup."""
    writer.when_durable(
        lambda: (root.layers.leave_for_cleanup if root.options.async_remove else root.layers.move_to_trash)(number)
    )


def _last_seen(writer: Writer, number: int, key: Ref) -> tuple[Info, Record | None]:
    """A snapshot that is to be removed; without its record where that is damaged, but the indexes agree about it."""
    try:
        record = find_again(writer, number, number)
        if writer.indexed_as(number) != (record.kind, record.name):
            raise Damaged(f'the record of snapshot {number}, "{record.name}", contradicts the indexes')
        return writer.info(number, find_again(writer, number, key)), record
    except Damaged:
        kind, name = writer.indexed_as(number)
        if isinstance(key, str) and name != key:
            raise
        images = tuple(image for _, whose, image in writer.images() if whose == number)
        return Info(name=name, kind=kind, id=number, parent=None, labels={}, created=0, updated=0, images=images), None
