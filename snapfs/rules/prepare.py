"""Prepare and View: a new active snapshot, or a view, on a committed parent or on nothing."""

from __future__ import annotations

import time

import msgspec

from snapfs import idmap, names
from snapfs.errors import FailedPrecondition, Unavailable
from snapfs.labels import Labels, refuse_too_many
from snapfs.model import Kind, Mount, Ref
from snapfs.rules import mounts
from snapfs.rules.change import write_imprint
from snapfs.rules.labels import stored_labels
from snapfs.rules.lookup import find_parent, refuse_taken, refuse_too_deep
from snapfs.rules.mapping import refuse_mapped_twice
from snapfs.rules.root import Root
from snapfs.store.schema import Record
from snapfs.store.writing import Writer


class PrepareRequest(msgspec.Struct, frozen=True):
    """What a Prepare asks for.

    ``kind`` is active or view, ``parent`` a committed snapshot (None or "": none), ``labels`` are as they are stored,
    ``origin`` is the door at which the caller stands, ``node`` as in ``schema.Record``.
    """

    kind: Kind
    key: str
    parent: Ref | None
    labels: dict[str, str]
    origin: str
    node: int = 0


def request(root: Root, kind: Kind, key: str, parent: Ref | None, labels: Labels | None, origin: str) -> PrepareRequest:
    """A request that is sound, as far as that shows before anything is looked up.

    Raises InvalidArgument: key or labels are no good; FailedPrecondition: the mapping labels can't be followed here."""
    names.encode(key)
    stored = stored_labels(root, labels)
    refuse_too_many(key, stored, {})
    remaps = root.options.remap_ids and not root.maps_ids and not root.options.slow_chown
    if remaps and idmap.root_owner(stored) is not None:
        raise FailedPrecondition(
            f"cannot remap ids: layers in {root.layers.root} can't be mounted idmapped here "
            "(kernel, file system or privileges); set slow_chown to change owners instead"
        )
    return PrepareRequest(kind, key, parent, stored, origin)


def prepare(root: Root, writer: Writer, request: PrepareRequest) -> list[Mount]:
    """Make the active snapshot, or the view; its mounts, as they are handed over at the door of ``request``.

    Raises NotFound: no such parent; InvalidArgument: the parent is not committed; AlreadyExists: the key is in use, by any
    kind; TooDeep: nothing that stands on so many layers could be mounted; FailedPrecondition: the parent's ids are the
    host's already; Unavailable where the disk refuses.
    """
    number, record = _make(root, writer, request)
    return mounts.handed_over(root, writer, number, record)


def make(root: Root, writer: Writer, request: PrepareRequest) -> int:
    """The same; the id of the new snapshot."""
    return _make(root, writer, request)[0]


def _make(root: Root, writer: Writer, request: PrepareRequest) -> tuple[int, Record]:
    above = find_parent(root, writer, request.parent) if request.parent else 0
    refuse_taken(writer, request.key)
    number, now = writer.next_id(), time.time_ns()
    record = Record(request.key, request.kind, above, now, now, request.labels, None, request.origin, request.node)
    if above:
        root.layers.refuse_damaged(above)
        refuse_mapped_twice(root, writer, above, idmap.root_owner(request.labels))
        refuse_too_deep(writer, number, record)
    try:
        root.layers.reserve_ids(number)
        root.placing.place(writer, number, record)
    except OSError as error:
        raise Unavailable.from_os(f'make the directories of snapshot "{request.key}"', error) from error
    write_imprint(root, number, record)
    writer.add(number, record)
    writer.changed(None, writer.info(number, record))
    return number, record
