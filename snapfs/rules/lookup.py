"""Look-up: which snapshot a key, a name or an id means, and what is refused whatever the call."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

from snapfs import mountspec, names
from snapfs.errors import (
    AlreadyExists,
    Damaged,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    TooDeep,
)
from snapfs.labels import SQUASHED
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
            f"({mountspec.MOST_LOWERS}): make one of them, and go on on that: snapfs squash "
            f"{names.last_word(reader.parent_of(record).name, record.parent)}"
        )


def squashed_names(name: str) -> Iterator[str]:
    """What the squash of snapshot ``name`` may be called, the best first."""
    return (names.with_suffix(name, f"-squashed{f'-{nth}' * (nth > 1)}") for nth in count(1))


def stand_in(reader: Reader, name: str) -> str:
    """The squash that stands in for the committed snapshot ``name``, as far as its own name leads to it; "" for none."""
    try:
        for made in squashed_names(name):
            found = reader.find(made)
            if found is None:
                break
            if found[1].labels.get(SQUASHED) == name:
                return made
    except Damaged:
        pass
    return ""


def stands_on(reader: Reader, record: Record) -> set[int]:
    """The ids of the snapshots that ``record`` stands on, and with each squash those for which it stands in, as far as their
    names lead to them.  Raises Damaged."""
    found: set[int] = set()
    waiting = reader.chain(record)
    while waiting:
        number = waiting.pop()
        if number in found:
            continue
        found.add(number)
        below = reader.record(number)
        of = reader.find(below.labels.get(SQUASHED, "")) if below is not None else None
        if of is not None and of[1].kind is Kind.COMMITTED:
            waiting += [of[0], *reader.chain(of[1])]
    return found
