"""Labels: what is stored and shown of them, and Update."""

from __future__ import annotations

import time
from collections.abc import Sequence

import msgspec

from snapfs import idmap
from snapfs.errors import AlreadyExists, InvalidArgument, NotFound
from snapfs.labels import UPPERDIR, Labels, check_label, refuse_too_many
from snapfs.model import Info, Kind, Ref
from snapfs.root.owners import Shift, mapping_labels
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


class ShiftNeeded(Exception):
    """Before the labels can be written, the owners of all files in the layer have to be changed: ``shift`` does it."""

    def __init__(self, shift: Shift) -> None:
        super().__init__(f"the owners in the layer of snapshot {shift.number} have to be changed first")
        self.shift = shift


def update(root: Root, writer: Writer, key: Ref, given: dict[str, str], fields: Fields, shifted: Shift | None = None) -> Info:
    """Change the labels of a snapshot; what Stat shows of it now.  ``updated`` moves even where nothing changed.

    ``shifted``: the change of owners that was made for this call.  Raises NotFound, and ShiftNeeded where another one, or the
    first one, has to be made; LabelTooBig where the labels would be too many."""
    number, record = find(writer, key)
    return _relabel(root, writer, number, record, fields.updated(record.labels, given), shifted)


def move(root: Root, writer: Writer, key: Ref, old: str, new: str, *, replace: bool, shifted: Shift | None = None) -> Info:
    """Rename one label of a snapshot; a label ``new`` is replaced if ``replace`` allows it.  ``shifted`` is as in ``update``.

    Raises NotFound (snapshot or label), AlreadyExists, LabelTooBig, ShiftNeeded."""
    number, record = find(writer, key)
    if old not in record.labels:
        raise NotFound(f'snapshot "{record.name}" has no label "{old}"')
    if not replace and new in record.labels:
        raise AlreadyExists(f'snapshot "{record.name}" has a label "{new}" already')
    after = {label: value for label, value in record.labels.items() if label != old}
    after.update(stored_labels(root, {new: record.labels[old]}))
    return _relabel(root, writer, number, record, after, shifted)


def _relabel(root: Root, writer: Writer, number: int, record: Record, labels: dict[str, str], shifted: Shift | None) -> Info:
    refuse_too_many(record.name, labels, record.labels)
    if mapping_labels(record.labels) != mapping_labels(labels):
        owner = idmap.root_owner(labels)
        if record.kind is not Kind.COMMITTED and record.parent:
            refuse_mapped_twice(root, writer, record.parent, owner)
        if record.kind is Kind.ACTIVE and root.shifts_owners:
            needed = Shift(root.layers, number, record.labels, labels)
            if shifted is None or not needed.is_same(shifted):
                raise ShiftNeeded(needed)
            shifted.depend_on(writer)
    updated = max(time.time_ns(), record.updated + 1)
    info = change(root, writer, number, record, msgspec.structs.replace(record, labels=labels, updated=updated))
    return shown(root, info)
