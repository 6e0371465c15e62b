"""Prepare and View: a new active snapshot, or a view, on a committed parent or on nothing."""

from __future__ import annotations

import time

from snapfs import idmap, names
from snapfs.errors import FailedPrecondition, Unavailable
from snapfs.labels import Labels
from snapfs.model import Kind, Ref
from snapfs.rules.change import write_imprint
from snapfs.rules.labels import stored_labels
from snapfs.rules.lookup import find_parent, refuse_taken, refuse_too_deep
from snapfs.rules.mapping import refuse_mapped_twice
from snapfs.rules.root import Root
from snapfs.store.schema import Record
from snapfs.store.writing import Writer


def check(root: Root, key: str, labels: Labels | None) -> dict[str, str]:
    """What can be said of a Prepare before anything is looked up: its labels as they are stored.

    Raises InvalidArgument: key or labels are no good; FailedPrecondition: the mapping labels can't be followed here."""
    names.encode(key)
    stored = stored_labels(root, labels)
    remaps = root.options.remap_ids and not root.maps_ids and not root.options.slow_chown
    if remaps and idmap.root_owner(stored) is not None:
        raise FailedPrecondition(
            f"cannot remap ids: layers in {root.layers.root} can't be mounted idmapped here "
            "(kernel, file system or privileges); set slow_chown to change owners instead"
        )
    return stored


def prepare(
    root: Root, writer: Writer, kind: Kind, key: str, parent: Ref | None, labels: dict[str, str], origin: str
) -> tuple[int, Record]:
    """Make the active snapshot, or the view, ``key`` on the committed snapshot ``parent`` (None or "": on nothing).

    ``labels`` come from ``check``; ``origin`` is the door at which the caller stands.  Id and record of the new snapshot.

    Raises NotFound: no such parent; InvalidArgument: the parent is not committed; AlreadyExists: the key is in use, by any
    kind; TooDeep: nothing that stands on so many layers could be mounted; FailedPrecondition: the parent's ids are the
    host's already; Unavailable where the disk refuses.
    """
    above = find_parent(root, writer, parent) if parent else 0
    refuse_taken(writer, key)
    number, now = writer.next_id(), time.time_ns()
    record = Record(key, kind, above, now, now, labels, None, origin)
    if above:
        root.layers.refuse_damaged(above)
        refuse_mapped_twice(root, writer, above, idmap.root_owner(labels))
        refuse_too_deep(writer, number, record)
    try:
        root.layers.promise(number)
        root.placing.place(writer, number, record)
    except OSError as error:
        raise Unavailable.from_os(f'make the directories of snapshot "{key}"', error) from error
    write_imprint(root, number, record)
    writer.add(number, record)
    writer.changed(None, writer.info(number, record))
    return number, record
