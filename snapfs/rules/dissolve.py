"""Dissolve: a committed snapshot goes, though others stand on it: each of these takes over what it had.  containerd lacks this.

For each child a directory is filled beforehand (``services/squashing.py``) with what it and the snapshot below it have changed,
and the child goes on as a new snapshot with that directory: under its name, with its inodes in the tree, and with a new id.
So whatever ends the process, there is either the old child on the old snapshot, or the new one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from itertools import islice
from typing import NamedTuple

import msgspec

from snapfs.errors import Busy, FailedPrecondition
from snapfs.labels import PIN, pinned
from snapfs.model import ByNode, Kind, Ref
from snapfs.root.inuse import Free
from snapfs.rules import change, remove
from snapfs.rules.digest import forgotten
from snapfs.rules.imagefiles import refuse_owners
from snapfs.rules.images import refuse_named
from snapfs.rules.lookup import find
from snapfs.rules.root import Root
from snapfs.rules.squash import Made, Outdated, put_made
from snapfs.rules.use import Used, refuse_any_used
from snapfs.store.reading import Reader
from snapfs.store.writing import Writer

MOST = 4_000
"""Snapshots that may stand on one that is dissolved, at whatever distance: the writer looks at all of them."""


class Plan(NamedTuple):
    """What dissolving the snapshot ``number``, called ``name``, is about: its ``children``, its parent (0 for none), and all
    that stands on it, at whatever distance: ids.  ``node`` means it also when it has gone on as another."""

    number: int
    name: str
    node: ByNode
    parent: int
    children: tuple[int, ...]
    above: tuple[int, ...]


def plan(root: Root, reader: Reader, key: Ref) -> Plan:
    """What dissolving the snapshot ``key`` is about.

    Raises NotFound; Pinned; Named; FailedPrecondition: it is not committed, or what stands on it is, or it was made at another
    door, as something that stands on it was; Damaged where a layer is missing or has lost data."""
    number, record = find(reader, key)
    if record.kind is not Kind.COMMITTED:
        raise FailedPrecondition(f'snapshot "{record.name}" is {record.kind}: only committed ones can be dissolved')
    if PIN in record.labels:
        raise pinned(record.name, number)
    refuse_named(record)
    children = []
    for kind in Kind:
        for child, name in reader.children(number, kind):
            if kind is not Kind.COMMITTED:
                raise FailedPrecondition(
                    f'snapshot "{record.name}" can\'t be dissolved: "{name}" ({kind}) stands on it, and takes over nothing; '
                    "commit or remove that first"
                )
            children.append(child)
    above = tuple(islice(_above(reader, number), MOST + 1))
    if len(above) > MOST:
        raise FailedPrecondition(f'snapshot "{record.name}" can\'t be dissolved: more than {MOST:,} snapshots stand on it')
    for each in (number, *above):
        its = reader.record(each)
        refuse_owners([its] if its is not None else [], record.name)
        if its is not None and its.origin:
            raise FailedPrecondition(
                f'snapshot "{record.name}" can\'t be dissolved: "{its.name}" is {its.origin}\'s, which knows its layers'
            )
    root.refuse_damaged(number, *children)
    root.unflushed.refuse_lost([number, *children])
    return Plan(number, record.name, ByNode(record.node_of(number)), record.parent, tuple(children), above)


def _above(reader: Reader, number: int) -> Iterator[int]:
    waiting = [number]
    while waiting:
        below = waiting.pop()
        for kind in Kind:
            for child, _ in reader.children(below, kind):
                yield child
                waiting.append(child)


def dissolve(root: Root, writer: Writer, planned: Plan, made: Mapping[int, Made]) -> list[int]:
    """Remove the snapshot of ``planned``; each child goes on as a new snapshot, whose directory is what ``made`` has for it:
    the ids of these.  Those of the others go to the trash when that is durable.

    ``refuse_used`` was called before, and since then none of them was mounted as rootfs.  Raises Outdated where the records are
    no longer as planned; else as ``plan`` does; Unavailable where the disk refuses.
    """
    now = plan(root, writer, planned.number) if writer.record(planned.number) is not None else None
    if now is None or now._replace(above=planned.above) != planned or not set(now.above) <= set(planned.above):
        raise Outdated(f'snapshot "{planned.name}" has changed meanwhile')
    going_on = [_go_on(root, writer, planned, child, made[child]) for child in planned.children]
    remove.remove(root, writer, planned.number, planned.number, "", refuse_mounted=False, free=Free.NO)
    return going_on


def refuse_used(root: Root, reader: Reader, planned: Plan, free: Collection[int]) -> None:
    """Raise Busy where a layer that would go is in a mount, or what stands on it is.  Called while the rootfs of all of them is
    kept unmounted, before ``dissolve``: it takes longer than others should wait for the writer.  What has come since then
    ``dissolve`` finds out.  ``free``: those of which the kernel, or a look at all processes, has said that nobody has them."""
    records = {}
    for number in (planned.number, *planned.above):
        record = reader.record(number)
        if record is not None and (record.kind is not Kind.COMMITTED or number in (planned.number, *planned.children)):
            records[number] = record
    try:
        refuse_any_used(root, records, free)
    except Used as used:
        raise Busy(
            f'snapshot "{planned.name}" can\'t be dissolved while its files are in use by way of "{used.name}": leave '
            "that, or unmount it, first"
        ) from None


def _go_on(root: Root, writer: Writer, planned: Plan, child: int, made: Made) -> int:
    """Have ``child`` go on as a new snapshot with what was ``made`` on the parent of what is dissolved: its id."""
    before = writer.record(child)
    assert before is not None
    was = writer.info(child, before)
    after = msgspec.structs.replace(forgotten(before), parent=planned.parent, usage=None, node=before.node_of(child))
    on_it = [each for kind in Kind for each, _ in writer.children(child, kind)]
    writer.delete(child, before)
    info = put_made(root, writer, after, made)
    writer.changed(was, info, goes_on=True)
    for each in on_it:
        if (record := writer.record(each)) is not None:
            change.rewrite(root, writer, each, record, msgspec.structs.replace(record, parent=made.number))
            shown = writer.info(each, writer.record(each) or record)
            writer.changed(shown, shown, counted=True)
    remove.put_away(root, writer, child)
    return made.number
