"""Look-up: which snapshot a key, a name or an id means, and what is refused whatever the call."""

from __future__ import annotations

from snapfs import mountspec
from snapfs.errors import (
    AlreadyExists,
    Damaged,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    TooDeep,
)
from snapfs.model import ByNode, Kind, Ref
from snapfs.rules.root import Root
from snapfs.store.reading import Reader
from snapfs.store.schema import Record


def find(reader: Reader, key: Ref) -> tuple[int, Record]:
    """Id and record of the snapshot ``key``; raises NotFound, or Damaged where its record can't be read."""
    if isinstance(key, str):
        found = reader.find(key)
        if found is None:
            raise NotFound.snapshot(key)
        return found
    if isinstance(key, ByNode):
        found = reader.by_node(key)
        if found is None:
            raise NotFound(f"snapshot {key} does not exist any more")
        return found
    record = reader.record(key)
    if record is None:
        raise NotFound.snapshot(str(key))
    return key, record


def find_again(reader: Reader, number: int, key: Ref) -> Record:
    """The record of snapshot ``number``, which was called ``key`` a moment ago; raises NotFound where it no longer is."""
    record = reader.record(number)
    if (
        record is None
        or (isinstance(key, str) and record.name != key)
        or (isinstance(key, ByNode) and record.node_of(number) != key)
    ):
        raise NotFound.snapshot(str(key))
    return record


def find_id(reader: Reader, key: Ref) -> int:
    """The id of the snapshot ``key``, also where its record is damaged but its name leads to it; raises NotFound, Damaged."""
    try:
        number, _ = find(reader, key)
    except Damaged:
        found = reader.id_of(key) if isinstance(key, str) else None if isinstance(key, ByNode) else key
        if found is None:
            raise
        return found
    return number


def find_parent(
    root: Root, reader: Reader, parent: Ref, wrong_kind: type[InvalidArgument | FailedPrecondition] = InvalidArgument
) -> int:
    """The id of the committed snapshot ``parent``, which is to get a child.

    Raises NotFound; ``wrong_kind`` where it is not committed; Damaged where a layer of it is missing or has lost data."""
    try:
        number, record = find(reader, parent)
    except NotFound:
        raise NotFound.parent(str(parent)) from None
    if record.kind is not Kind.COMMITTED:
        raise wrong_kind(f'parent snapshot "{record.name}" is not committed but {record.kind}')
    if root.damaged or root.unflushed.lost:
        chain = reader.chain(record)
        root.refuse_damaged(number, *chain)
        root.unflushed.refuse_lost([number, *chain])
    return number


def refuse_taken(reader: Reader, name: str, by: int | None = None) -> None:
    """Raise AlreadyExists if ``name`` is in use, unless by snapshot ``by``."""
    taken = reader.find(name)
    if taken is not None and taken[0] != by:
        raise AlreadyExists.snapshot(name, taken[1].kind)


def refuse_too_deep(reader: Reader, number: int, record: Record) -> None:
    """Raise TooDeep if snapshot ``number``, which is to become ``record``, could not be mounted."""
    try:
        layers = len(reader.lowers(number, record))
    except Damaged:  # whatever needs the chain will be refused for that
        return
    if layers > mountspec.MOST_LOWERS:
        raise TooDeep(
            f'snapshot "{record.name}" would stand on {layers} layers, more than the kernel can mount together '
            f"({mountspec.MOST_LOWERS}): copy what its rootfs shows (cp -a) into a new snapshot without a parent, and go "
            "on with that"
        )
