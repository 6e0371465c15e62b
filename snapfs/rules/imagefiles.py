"""image.json of committed snapshots: written by whoever imports an image, inherited by what stands on that.  containerd lacks
this.

Which file a snapshot has of its own is in its record; the file is written before (``root/imagefile.py``).  What it says of
layers must stay true, so what has one, or stands beneath one that has, is not dissolved.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

import msgspec

from snapfs.errors import Damaged, FailedPrecondition, NotFound
from snapfs.imagejson import FILE, Layer, inherited
from snapfs.labels import MESSAGE
from snapfs.model import Info, Kind, rfc3339
from snapfs.root import imagefile
from snapfs.rules.change import change
from snapfs.rules.digest import diff_id
from snapfs.rules.lookup import find_again
from snapfs.rules.root import Root
from snapfs.store.reading import Reader
from snapfs.store.schema import ImageFile, Record
from snapfs.store.writing import Writer


def refuse_other_kinds(record: Record) -> None:
    """Raise FailedPrecondition unless ``record`` is that of a snapshot that may have an image.json."""
    if record.kind is not Kind.COMMITTED:
        raise FailedPrecondition(f'snapshot "{record.name}" is {record.kind}: only committed ones have {FILE}')


def refuse_owners(records: Iterable[Record], name: str) -> None:
    """Raise FailedPrecondition where one of ``records``, which would change if snapshot ``name`` were dissolved, has an
    image.json of its own."""
    for record in records:
        if record.image is not None:
            raise FailedPrecondition(
                f'snapshot "{name}" can\'t be dissolved: {FILE} of "{record.name}" says which layers there are; take that away '
                "first, if it is not needed"
            )


class Outdated(Exception):
    """A file that was written is not there any more: it is to be written anew.  No caller sees this."""


def set_image(root: Root, writer: Writer, number: int, digest: str | None) -> Info:
    """Have the committed snapshot ``number`` have the file with this ``digest``, or (None) none of its own: what Stat shows of
    it.

    Raises NotFound, also where there is none to take away; FailedPrecondition; Damaged; Outdated where the file is not there.
    """
    record = find_again(writer, number, number)
    refuse_other_kinds(record)
    if digest is None and record.image is None:
        raise NotFound(f'snapshot "{record.name}" has no {FILE} of its own')
    root.layers.refuse_damaged(number)
    if digest is not None and not imagefile.is_there(root.layers.held_directory(number), digest):
        raise Outdated(f'{FILE} of snapshot "{record.name}" was removed before it was the one')
    image = None if digest is None else ImageFile(digest)
    return change(root, writer, number, record, msgspec.structs.replace(record, image=image, updated=time.time_ns()))


class Found(msgspec.Struct, frozen=True):
    """Of what the image.json of a snapshot is made: the snapshot ``number`` whose file it is, that file, and the layers that
    are to be added, the lowest first."""

    number: int
    image: ImageFile
    layers: tuple[Layer, ...]


def find(reader: Reader, number: int, record: Record) -> Found | None:
    """Of what that of snapshot ``number`` is made; None where it has none.  Raises Damaged."""
    way = reader.with_image(number, record) if record.kind is Kind.COMMITTED else []
    if not way:
        return None
    owner, owners = way[-1]
    assert owners.image is not None
    added = way if owners.image.is_below else way[:-1]
    return Found(owner, owners.image, tuple(_layer(each) for _, each in reversed(added)))


def _layer(record: Record) -> Layer:
    message = record.labels.get(MESSAGE) or "snapfs commit"
    return Layer(rfc3339(record.created), message, diff_id(record))


def text(root: Root, found: Found) -> str:
    """The text of that.  Blocks on the disk.  Raises Damaged, Unavailable."""
    directory = root.layers.held_directory(found.number)
    content = imagefile.read(directory, found.image.digest, root.layers.directory(found.number))
    if not found.layers and not found.image.is_below:
        try:
            return content.decode()
        except UnicodeDecodeError:
            raise Damaged(f"{FILE} is not UTF-8") from None
    return inherited(content, found.layers, alone=found.image.is_below)
