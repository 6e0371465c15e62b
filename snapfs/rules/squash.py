"""Squash: a committed snapshot without a parent that shows what another one shows, however many that stands on.  containerd
lacks it.

The directory is filled before, while others go on (``services/squashing.py``); here it becomes a snapshot's, in one operation.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import NamedTuple

import msgspec

from snapfs.errors import FailedPrecondition, Unavailable
from snapfs.labels import OF, PIN, SQUASHED, refuse_too_many
from snapfs.model import ByNode, Info, Kind, Ref
from snapfs.root import imagefile
from snapfs.rules import imagefiles
from snapfs.rules.change import change, write_imprint
from snapfs.rules.lookup import find, refuse_taken, squashed_names
from snapfs.rules.root import Root
from snapfs.rules.workspace import OURS
from snapfs.store.reading import Reader
from snapfs.store.schema import ImageFile, Record
from snapfs.store.writing import Writer


class Outdated(Exception):
    """What was found out about a snapshot is no longer so: it is to be found out anew.  No caller sees this."""


class Made(NamedTuple):
    """What was built of several layers, and is on disk: the directory of the pool with this name, and the id that was taken for
    the snapshot that is to be made of it (``change.take_id``)."""

    number: int
    name: str


class Source(NamedTuple):
    """The committed snapshot ``number``, called ``name``, and the ids of those that it stands on, the nearest first; ``node``
    means it also when it has gone on as another (``dissolve.py``)."""

    number: int
    name: str
    node: ByNode
    chain: list[int]

    @property
    def layers(self) -> list[int]:
        """The ids of all layers that it shows, the topmost first."""
        return [self.number, *self.chain]

    def refuse_outdated(self, reader: Reader) -> Record:
        """The snapshot's record; raises Outdated unless it is still there and stands on what it stood on.

        Then nothing of these layers was deleted meanwhile: an id is never used twice, and a record goes before its files."""
        record = reader.record(self.number)
        if record is None or reader.chain(record) != self.chain:
            raise Outdated(f'snapshot "{self.name}" has changed meanwhile')
        return record


def source(root: Root, reader: Reader, key: Ref) -> Source:
    """The snapshot ``key``, which is to be squashed.

    Raises NotFound; FailedPrecondition: it is not committed; Damaged where a layer of it is missing or has lost data."""
    number, record = find(reader, key)
    if record.kind is not Kind.COMMITTED:
        raise FailedPrecondition(f'snapshot "{record.name}" is {record.kind}: only committed ones can be squashed')
    found = Source(number, record.name, ByNode(record.node_of(number)), reader.chain(record))
    root.refuse_damaged(*found.layers)
    root.unflushed.refuse_lost(found.layers)
    return found


def squash(root: Root, writer: Writer, source: Source, made: Made, new: str | None, *, for_children: bool) -> Info:
    """Make what was built of all layers of ``source`` the committed snapshot ``new`` (None: NAME-squashed, or where that is
    taken NAME-squashed-2, and so on): what Stat shows of it.  Its image.json is that of the source, with this one layer.

    It bears the labels of the source, but for ``pin`` and those of a checkpoint, and SQUASHED.  ``for_children``: what stands
    on the source stands on the new one from now on, and that bears OF, if the source is a checkpoint.  Views stay where they
    are, and so does what was made at another door, which knows its parent.

    Raises Outdated, also where nothing would stand on it that should; AlreadyExists; Damaged; LabelTooBig; Unavailable where
    the disk refuses.
    """
    before = source.refuse_outdated(writer)
    root.unflushed.refuse_lost(source.layers)
    moving = list(_movable(writer, source.number)) if for_children else []
    if for_children and not moving:
        raise Outdated(f'nothing stands on snapshot "{source.name}" any more')
    name = new if new is not None else next(name for name in squashed_names(before.name) if writer.id_of(name) is None)
    refuse_taken(writer, name)
    labels = {label: value for label, value in before.labels.items() if label not in (*OURS, PIN)}
    labels[SQUASHED] = before.name
    if for_children and OF in before.labels:
        labels[OF] = before.labels[OF]
    refuse_too_many(name, labels, before.labels)
    now = time.time_ns()
    record = Record(name, Kind.COMMITTED, 0, now, now, labels, image=_image(root, writer, source, before, made))
    info = put_made(root, writer, record, made)
    writer.changed(None, info)
    for child, record in moving:
        change(root, writer, child, record, msgspec.structs.replace(record, parent=made.number))
    return info


def _image(root: Root, writer: Writer, source: Source, before: Record, made: Made) -> ImageFile | None:
    """The image.json of what was ``made``: that of the source, or from which the source inherits, says what is below.  Raises
    Outdated where it has another by now."""
    found = imagefiles.find(writer, source.number, before)
    if found is None:
        return None
    if not imagefile.is_there(os.path.dirname(root.layers.made_path(made.name)), found.image.digest):
        raise Outdated(f'the image.json of snapshot "{source.name}" has changed meanwhile')
    return ImageFile(found.image.digest, is_below=True)


def put_made(root: Root, writer: Writer, record: Record, made: Made) -> Info:
    """Make ``made`` a committed snapshot with this ``record``: what Stat shows of it.  Raises Unavailable where the disk
    refuses."""
    number = made.number
    try:
        root.placing.place_made(writer, number, made.name)
    except OSError as error:
        raise Unavailable.from_os(f'make the directories of snapshot "{record.name}"', error) from error
    write_imprint(root, number, record)
    writer.put(number, record)
    return writer.info(number, record)


def is_wanted(reader: Reader, number: int) -> bool:
    """Whether something stands on snapshot ``number`` that would stand on its squash instead."""
    return next(_movable(reader, number), None) is not None


def _movable(reader: Reader, number: int) -> Iterator[tuple[int, Record]]:
    """Those of the children of snapshot ``number`` that may get another parent: id and record."""
    for kind in (Kind.COMMITTED, Kind.ACTIVE):
        for child, _ in reader.children(number, kind):
            record = reader.record(child)
            if record is not None and not record.origin:
                yield child, record
