"""events: what happened to the snapshots, one JSON object a line.

    {"number": 3, "time": "2026-11-24T03:29:58.000000000Z", "operation": "commit", "key": "web", "name": "v1",
     "parent": "base", "kind": "committed", "id": 7, "labels": {}}

``operation`` is prepare, view, commit, copy (of a workspace that goes on beside it), squash, rename, update or remove, and for
names in images/ name or unname: a line for each that came or went.  ``key`` is what it was done to, ``name`` the new name that
a commit, copy or rename gave, or the one in images/, else null.  The others describe the snapshot as it is since then, or was
when it was removed.
Numbers count from 1 when the daemon starts.  A line ``{"missed": 12}`` stands for so many that a reader was too late for.
"""

from __future__ import annotations

import time
from itertools import count

import msgspec

from snapfs import names
from snapfs.labels import OF, SQUASHED
from snapfs.model import Change, Info, Kind, rfc3339
from snapfs.tree.log import Log

_MADE = {Kind.ACTIVE: "prepare", Kind.VIEW: "view", Kind.COMMITTED: "squash"}  # or a copy


class Events(Log):
    """The log of changes.  Each is noted once it is durable, in the order in which they became so."""

    def __init__(self) -> None:
        super().__init__(lambda missed: f'{{"missed": {missed}}}\n')
        self._numbers = count(1)

    def note(self, change: Change) -> None:
        """Add the lines for ``change``, unless it is no client's doing."""
        shown = change.after or change.before
        if change.counted or shown is None:
            return
        for operation, key, name in _calls(change):
            event = {
                "number": next(self._numbers),
                "time": rfc3339(time.time_ns()),
                "operation": operation,
                "key": key,
                "name": name,
                "parent": shown.parent,
                "kind": shown.kind,
                "id": shown.id,
                "labels": shown.labels,
            }
            self.add(names.plain_json(msgspec.json.format(msgspec.json.encode(event), indent=0).decode()) + "\n")


def _calls(change: Change) -> list[tuple[str, str, str | None]]:
    """Operation, key and new name of what was done: one call, or what became of names in images/."""
    before, after = change.before, change.after
    if before is None or after is None or before.images == after.images:
        return [_call(before, after)]
    gone = [("unname", image) for image in before.images if image not in after.images]
    come = [("name", image) for image in after.images if image not in before.images]
    return [(operation, after.name, image) for operation, image in gone + come]


def _call(before: Info | None, after: Info | None) -> tuple[str, str, str | None]:
    if before is None:
        assert after is not None
        if after.kind is Kind.COMMITTED and SQUASHED not in after.labels:
            return "copy", after.labels.get(OF, after.name), after.name
        return _MADE[after.kind], after.name, None
    if after is None:
        return "remove", before.name, None
    if after.kind is not before.kind:
        return "commit", before.name, after.name
    if after.name != before.name:
        return "rename", before.name, after.name
    return "update", before.name, None
