"""Labels: what is stored and shown of them, and Update."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

import msgspec

from snapfs import idmap
from snapfs.errors import AlreadyExists, InvalidArgument, NotFound
from snapfs.labels import UPPERDIR, Labels, check_label
from snapfs.model import Info, Kind, Ref
from snapfs.rules.change import change
from snapfs.rules.lookup import find
from snapfs.rules.mapping import refuse_mapped_twice
from snapfs.rules.root import Root
from snapfs.store.schema import Record
from snapfs.store.writing import Writer


def stored_labels(root: Root, labels: Labels | None) -> dict[str, str]:
    """``labels`` as they are stored: without empty ones, and without the one that is never stored.  Raises InvalidArgument."""
    kept = {}
    for label, value in (labels or {}).items():
        check_label(label, value)
        if value and not (root.options.upperdir_label and label == UPPERDIR):
            kept[label] = value
    return kept


def shown(root: Root, info: Info) -> Info:
    """``info`` as Stat shows it: with the label that is never stored, where that is wanted."""
    if not root.options.upperdir_label:
        return info
    return msgspec.structs.replace(info, labels={**info.labels, UPPERDIR: root.layers.fs(info.id)})


class Fields:
    """Which labels an Update is about, by its field paths: ``labels`` (all of them) and ``labels.<key>`` (that one; all that
    follows the first dot is the key); none at all means ``labels``.  Raises InvalidArgument for any other path."""

    def __init__(self, fieldpaths: Sequence[str]) -> None:
        self._all = not fieldpaths or "labels" in fieldpaths
        self._single = []
        for path in fieldpaths:
            field, dot, label = path.partition(".")
            if field != "labels" or (dot and not label):
                raise InvalidArgument(f'cannot update "{path}": only "labels" and "labels.<key>" can be')
            if dot:
                self._single.append(label)

    def updated(self, before: dict[str, str], given: dict[str, str]) -> dict[str, str]:
        """The labels that a snapshot with the labels ``before`` has when it is given these."""
        if self._all:
            return dict(given)
        after = dict(before)
        for label in self._single:
            after.pop(label, None)
            if label in given:
                after[label] = given[label]
        return after


def update(root: Root, writer: Writer, key: Ref, given: dict[str, str], fields: Fields) -> Info:
    """Change the labels of a snapshot; what Stat shows of it now.  ``updated`` moves even where nothing changed.

    Raises NotFound."""
    number, record = find(writer, key)
    return _relabel(root, writer, number, record, fields.updated(record.labels, given))


def move(root: Root, writer: Writer, key: Ref, old: str, new: str, *, replace: bool) -> Info:
    """Rename one label of a snapshot; a label ``new`` is replaced if ``replace`` allows it.

    Raises NotFound (snapshot or label), AlreadyExists, LabelTooBig."""
    number, record = find(writer, key)
    if old not in record.labels:
        raise NotFound(f'snapshot "{record.name}" has no label "{old}"')
    if not replace and new in record.labels:
        raise AlreadyExists(f'snapshot "{record.name}" has a label "{new}" already')
    after = {label: value for label, value in record.labels.items() if label != old}
    after.update(stored_labels(root, {new: record.labels[old]}))
    return _relabel(root, writer, number, record, after)


def _relabel(root: Root, writer: Writer, number: int, record: Record, labels: dict[str, str]) -> Info:
    mapped = (idmap.UID_MAPPING, idmap.GID_MAPPING)
    if any(record.labels.get(label) != labels.get(label) for label in mapped):
        owner = idmap.root_owner(labels)
        if record.kind is not Kind.COMMITTED and record.parent:
            refuse_mapped_twice(root, writer, record.parent, owner)
        if record.kind is Kind.ACTIVE and root.options.remap_ids and root.options.slow_chown and not root.maps_ids:
            root.layers.refuse_damaged(number)
            _shift_owners(root, writer, number, record.labels, labels)
    updated = max(time.time_ns(), record.updated + 1)
    info = change(root, writer, number, record, msgspec.structs.replace(record, labels=labels, updated=updated))
    return shown(root, info)


def _shift_owners(root: Root, writer: Writer, number: int, before: Labels, after: Labels) -> None:
    """Change the owners in the layer of snapshot ``number`` from one mapping to another; undone if the Update fails."""
    old, new = idmap.mappings(before), idmap.mappings(after)
    was: dict[int, tuple[int, int]] = {}  # by inode: what has several names is met several times

    def shifted(entry: os.stat_result) -> tuple[int, int]:
        if entry.st_ino in was:
            return entry.st_uid, entry.st_gid
        was[entry.st_ino] = entry.st_uid, entry.st_gid
        return idmap.remapped(entry.st_uid, old[0], new[0]), idmap.remapped(entry.st_gid, old[1], new[1])

    writer.on_failure(lambda: root.layers.chown(number, lambda entry: was.get(entry.st_ino, (entry.st_uid, entry.st_gid))))
    root.layers.chown(number, shifted)
