"""Names in images/: what else committed snapshots are called, and what keeps them.  containerd lacks this.

A name belongs to the snapshot's record, so it goes with that through a rename, and into the directory's imprint.  While a
snapshot has one it is not removed, nor dissolved; what stands on a dissolved one, and goes on as another snapshot, keeps its
names.  A squash has none of those of its source.
"""

from __future__ import annotations

import msgspec

from snapfs.errors import AlreadyExists, Damaged, FailedPrecondition, TooManyNames
from snapfs.imagenames import MOST, missing, named, taken
from snapfs.model import Info, Kind, Ref
from snapfs.rules.change import change, take_id
from snapfs.rules.lookup import find
from snapfs.rules.root import Root
from snapfs.store.reading import Reader
from snapfs.store.schema import ImageName, Record
from snapfs.store.writing import Writer


def refuse_named(record: Record) -> None:
    """Raise Named if the snapshot with this ``record`` has a name in images/."""
    if record.images:
        raise named(record.name, [image.name for image in record.images])


def find_image(reader: Reader, image: str) -> tuple[int, Record, ImageName]:
    """Id and record of the snapshot that is called ``image`` in images/, and that name; raises NotFound, or Damaged where the
    record does not know the name, or can't be read."""
    found = reader.image(image)
    if found is None:
        raise missing(image)
    nth, number = found
    record = reader.record(number)
    for each in record.images if record is not None else ():
        if record is not None and each == ImageName(nth, image):
            return number, record, each
    raise Damaged(f'the name "{image}" in images/ leads to snapshot {number}, which has no such name')


def _taken(reader: Reader, image: str) -> AlreadyExists:
    return taken(image, find_image(reader, image)[1].name)


def name(root: Root, writer: Writer, key: Ref, image: str, *, replace: bool) -> Info:
    """Have the committed snapshot ``key`` be called ``image`` in images/: what Stat shows of it.

    ``replace``: another snapshot that has that name loses it.  Raises NotFound; FailedPrecondition: the snapshot is not
    committed; AlreadyExists: the name is in use; TooManyNames; Damaged; Unavailable where the disk refuses.
    """
    number, record = find(writer, key)
    if record.kind is not Kind.COMMITTED:
        raise FailedPrecondition(f'snapshot "{record.name}" is {record.kind}: only committed ones have names in images/')
    if writer.image(image) is not None:
        if not replace:
            raise _taken(writer, image)
        had, before, found = find_image(writer, image)
        if had == number:
            return writer.info(number, record)
        change(root, writer, had, before, _without(before, found))
    if len(record.images) >= MOST:
        raise TooManyNames(f'snapshot "{record.name}" has {len(record.images)} names in images/; at most {MOST} fit')
    images = (*record.images, ImageName(take_id(root, writer), image))
    return change(root, writer, number, record, msgspec.structs.replace(record, images=images))


def unname(root: Root, writer: Writer, image: str) -> None:
    """Take the name ``image`` out of images/.  Raises NotFound, Damaged."""
    number, record, found = find_image(writer, image)
    change(root, writer, number, record, _without(record, found))


def rename(root: Root, writer: Writer, old: str, new: str, *, replace: bool) -> None:
    """Call ``new`` in images/ what is called ``old`` there, in one step.

    ``replace``: what is called ``new`` loses that name.  Raises NotFound; AlreadyExists: ``new`` is in use; Damaged.
    """
    number, record, image = find_image(writer, old)
    if new == old:
        return
    after = record
    if writer.image(new) is not None:
        if not replace:
            raise _taken(writer, new)
        had, before, found = find_image(writer, new)
        after = _without(before, found)
        if had != number:
            change(root, writer, had, before, after)
            after = record
    renamed = tuple(ImageName(each.number, new) if each == image else each for each in after.images)
    change(root, writer, number, record, msgspec.structs.replace(after, images=renamed))


def _without(record: Record, image: ImageName) -> Record:
    return msgspec.structs.replace(record, images=tuple(each for each in record.images if each != image))
