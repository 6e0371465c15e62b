"""The schema: the tables of the records, and how a record and an id look in them.

Tables (keys are compared as bytes; ids are 8 bytes, big-endian, so byte order is numeric order):

    meta         "schema" -> version;  "last_id" -> the highest id ever given out;  "root" -> the root's own word
    snapshots    id -> Record
    names        key or name, UTF-8 -> id         in this order Walk lists
    active, view, committed      id -> name       for listing one kind in id order: the last id is a place to go on from
    children     parent id, kind's first letter, id -> name
    checkpoints  workspace's key behind its length (2 bytes), number, id -> nothing     committed, and a checkpoint
    nodes        number in the tree's inodes -> id               where that is not the id itself
    images       name in images/, UTF-8 -> its number, id of the snapshot
    image_names  number of a name in images/ -> id of the snapshot, name      for listing them: the last number is a place
    uncounted    id -> nothing                    committed, and its usage not yet known
    unflushed    id -> boot id                    committed, and its data not yet known to be on disk (``services/flushing.py``)
    placed       id -> name in ROOT/pool          its directory may still be there (``root/placing.py``)
"""

from __future__ import annotations

from typing import Annotated, Any

import lmdb
import msgspec

from snapfs import names
from snapfs.errors import Damaged, InvalidArgument
from snapfs.model import Kind, Usage

SCHEMA = 3
"""The version of all this, which the records carry.  1 had neither the tables ``checkpoints`` and ``nodes`` nor the field
``node``, and a snapfs of that time would take it away from each record that it writes; so would one of the time of 2 the fields
``images``, ``image``, ``diff_id`` and ``tar_size``."""

READ = frozenset((1, 2, SCHEMA))
"""The versions that this snapfs can make that of."""

IDS = 1 << 36
"""All ids are below this: an inode number of the tree has room for so many."""

_Time = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]


class ImageName(msgspec.Struct, frozen=True, array_like=True):
    """One name in images/ of a committed snapshot.

    ``number`` is given out as ids are, so that no snapshot and no other name ever has it; a name that is renamed keeps it.  The
    tree's inodes have it, and of two numbers the higher is that of the name that was given later."""

    number: Annotated[int, msgspec.Meta(gt=0, lt=IDS)]
    name: str


class ImageFile(msgspec.Struct, frozen=True, array_like=True):
    """The image.json that is kept beside a layer: by its ``digest`` (``root/imagefile.py``).  ``is_below``: what it says of
    layers is said of others, which were made this one (``rules/squash.py``)."""

    digest: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
    is_below: bool = False


class Record(msgspec.Struct, frozen=True, array_like=True):
    """What the table ``snapshots`` holds, as MessagePack: an array in this order; new fields go to the end, with defaults.

    ``parent`` is the parent's id, 0 for none; ``usage`` is None except for committed snapshots that have been counted;
    ``origin`` is as in ``model.Info``; ``node`` is what the tree's inodes have in the place of the id, 0 where that is the id;
    ``images`` are its names in images/, in the order in which they came; ``image`` is the image.json that it has of its own.
    ``diff_id`` is the SHA-256 of a committed layer as a tar, and ``tar_size`` how many bytes that has, where it is known.
    The limits are checked when a record is read: bytes that the disk has mangled must not become a snapshot.
    """

    name: str
    kind: Kind
    parent: Annotated[int, msgspec.Meta(ge=0, lt=IDS)]
    created: _Time
    updated: _Time
    labels: dict[str, str]
    usage: Usage | None = None
    origin: str = ""
    node: Annotated[int, msgspec.Meta(ge=0, lt=IDS)] = 0
    images: tuple[ImageName, ...] = ()
    image: ImageFile | None = None
    diff_id: Annotated[bytes, msgspec.Meta(max_length=32)] = b""
    tar_size: Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)] = 0

    def node_of(self, number: int) -> int:
        """The number that the tree's inodes have for this record, which is that of snapshot ``number``."""
        return self.node or number


encode = msgspec.msgpack.Encoder().encode
decode = msgspec.msgpack.Decoder(Record).decode


def key_of(number: int) -> bytes:
    """The id ``number`` as the tables have it: 8 bytes, big-endian."""
    return number.to_bytes(8, "big")


def number_of(key: bytes) -> int:
    """The id that ``key`` stands for; raises Damaged where these bytes can't be an id."""
    if not is_id(key):
        raise Damaged(f"the records name a snapshot by {key.hex() or 'nothing'}, which is no id")
    return int.from_bytes(key, "big")


def is_id(key: bytes) -> bool:
    """Whether ``key`` can be an id: 8 bytes, above 0 and below IDS."""
    return len(key) == 8 and b"\0\0\0\0\0\0\0\0" < key < _END


_END = key_of(IDS)


def decode_checked(number: int, found: bytes) -> Record:
    """The record of snapshot ``number``, which the table holds as the bytes ``found``; raises Damaged where they can't be
    one."""
    try:
        record = decode(found)
        name = record.name
        if not name or len(name) * (3 if name.isascii() else 6) > names.NAME_MAX:  # bytes that each takes at most
            names.encode(name)
        for image in record.images:
            names.encode(image.name)
    except (msgspec.MsgspecError, UnicodeDecodeError, InvalidArgument) as error:
        raise Damaged(f"the record of snapshot {number} can't be read: {error}") from error
    if record.parent == number:
        raise Damaged(f'the record of snapshot {number}, "{record.name}", says that it is its own parent')
    return record


def root_word(txn: lmdb.Transaction[bytes], meta: Any) -> str:
    """The word of the root in the table ``meta`` (``root/identity.py``); "" where none was written yet."""
    found: bytes = txn.get(b"root", b"", db=meta)
    return found.decode(errors="replace")


class Tables:
    """The tables of one environment, as py-lmdb's handles, which have no type to name.

    With ``txn``, a write transaction, missing tables are made.  No other transaction may be open in this thread.
    """

    def __init__(self, env: lmdb.Environment, txn: lmdb.Transaction[bytes] | None = None) -> None:
        def table(name: str) -> Any:
            return env.open_db(name.encode(), txn, create=txn is not None)

        self.meta = table("meta")
        self.snapshots = table("snapshots")
        self.names = table("names")
        self.kinds = {kind: table(kind.value) for kind in Kind}
        self.children = table("children")
        self.checkpoints = table("checkpoints")
        self.nodes = table("nodes")
        self.images = table("images")
        self.image_names = table("image_names")
        self.uncounted = table("uncounted")
        self.unflushed = table("unflushed")
        self.placed = table("placed")
        self.indexes = [self.names, *self.kinds.values(), self.children, self.checkpoints, self.nodes, self.uncounted]
        self.indexes += [self.images, self.image_names]
        if txn is not None and txn.get(b"schema", db=self.meta) != str(SCHEMA).encode():
            txn.put(b"schema", str(SCHEMA).encode(), db=self.meta)
