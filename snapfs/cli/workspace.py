"""``snapfs checkpoint``, ``rollback`` and ``fork``: the state of a workspace, an active snapshot that keeps its path.

A checkpoint of ``web`` is the committed snapshot ``web@3``, with the labels ``snapfs.workspace``, ``snapfs.checkpoint`` and
``snapfs.message``.  The labels are set before the commit, which so makes the checkpoint whole at once.  The workspace comes
back by one rename of a new active snapshot that has been prepared under another key (NEW) and already bears the labels.  Killed
in between, the state is in the newest checkpoint and ``web`` is missing: whichever of the verbs comes next puts it there first.

A workspace with the label ``pin`` is never rolled back; its checkpoints are not pinned by that, and can be by themselves.
"""

from __future__ import annotations

import os

from snapfs.cli import table
from snapfs.cli.commit import commit, persistently, sync
from snapfs.cli.grammar import JSON, Given, Option, Verb
from snapfs.cli.listing import Row, rows
from snapfs.cli.place import MountedTree, file_name, find_tree
from snapfs.cli.prepare import make
from snapfs.cli.refusal import BUSY, NOT_FOUND, NOT_PERMITTED, TAKEN, Refusal, missing
from snapfs.labels import PIN, pinned

OF, NUMBER, MESSAGE = OURS = ("snapfs.workspace", "snapfs.checkpoint", "snapfs.message")
NEW = "snapfs.new/"  # before the key of a workspace: the active snapshot that is about to take its place


def checkpoints(everything: list[Row], key: str) -> dict[int, Row]:
    """The checkpoints of workspace ``key`` by number."""
    found = {}
    for row in everything:
        labels = row.labels
        if row.kind == "committed" and labels.get(OF) == key and labels.get(NUMBER, "").isdecimal():
            found[int(labels[NUMBER])] = row
    return dict(sorted(found.items()))


class Workspace:
    """The workspace ``key`` and its checkpoints; one that is missing because something was cut short is put back."""

    def __init__(self, place: MountedTree, key: str) -> None:
        self.place = place
        self.key = key
        file_name(NEW + key)  # which must fit
        everything = rows(place)
        self.names = {row.name: row for row in everything}
        self.checkpoints = checkpoints(everything, key)
        found = self.names.get(key)
        if found is not None and found.kind != "active":
            raise Refusal(f'"{key}" is {found.kind}: a workspace is an active snapshot', NOT_FOUND)
        if found is None:
            self._put_back()
        self.row = self.names[key]

    def _put_back(self) -> None:
        new, newest = self.names.get(NEW + self.key), next(reversed(self.checkpoints.values()), None)
        if new is not None:
            parent = self.names.get(new.parent or "")
            whose = parent.labels if parent is not None and parent.labels.get(OF) == self.key else {}
            self._move(parent.name if parent else None, {**whose, **new.labels})  # killed, it may lack some of them
        elif newest is not None:
            self._move(newest.name, newest.labels)
        else:
            raise missing(self.key, self.place.path)
        self.names = {row.name: row for row in rows(self.place)}

    def _prepare(self, parent: str | None, labels: dict[str, str]) -> None:
        """Make a new active snapshot on ``parent`` under the key NEW, in the place of any that is there."""
        if self.place.kind_of(NEW + self.key):
            left = self.place.directory("active", NEW + self.key)
            self.place.write_label(left, PIN, "")
            self.place.do("remove what was left", os.rmdir, left)
        make(self.place, "active", NEW + self.key, parent, [item for item in labels.items() if item[0] not in OURS])

    def _take_place(self) -> None:
        source, target = (self.place.directory("active", key) for key in (NEW + self.key, self.key))
        self.place.do(f'put "{self.key}" back', os.rename, source, target)

    def _move(self, parent: str | None, labels: dict[str, str]) -> None:
        self._prepare(parent, labels)
        self._take_place()

    def checkpoint(self, message: str, *, fork: str | None = None, wait: bool = False) -> str:
        """Commit the state, and make the workspace anew on top of it; returns the name of the checkpoint.

        ``fork``: the key of a second active snapshot to make on it.  ``wait``: return when the checkpoint is on disk.
        """
        number = max(self.checkpoints, default=0) + 1
        while f"{self.key}@{number}" in self.names:
            number += 1
        name, directory = f"{self.key}@{number}", self.place.directory("active", self.key)
        before = self.row.labels
        ours = {OF: self.key, NUMBER: str(number), MESSAGE: message}
        try:
            for label, value in ours.items():
                if value or label in before:
                    self.place.write_label(directory, label, value)
            commit(self.place, self.key, name)
        except Refusal:
            for label in ours:
                if self.place.kind_of(self.key) == "active":
                    self.place.write_label(directory, label, before.get(label, ""))
            raise
        if wait:
            self.place.do("wait for the disk", persistently, sync, self.place.directory("committed", name))
        if fork is not None:
            make(self.place, "active", fork, name)
        self._move(name, before)
        if PIN in before:  # it is the workspace that is pinned; last, for from the checkpoint come the labels of one cut short
            self.place.write_label(self.place.directory("committed", name), PIN, "")
        return name

    def refuse_pinned(self) -> None:
        """Refuse to throw the state away if it bears the label for that."""
        if PIN in self.row.labels:
            raise Refusal(str(pinned(self.key)), NOT_PERMITTED)

    def rollback(self, parent: str | None) -> None:
        """Throw the state away and begin anew on ``parent``."""
        directory = self.place.directory("active", self.key)
        elsewhere = self.place.mounted_by_hand(directory)
        if elsewhere:
            from snapfs.names import last_word

            to_do = f"unmount it first (snapfs umount {last_word(self.key)})"
            raise Refusal(f'"{self.key}" is mounted on {elsewhere[0]}: {to_do}', BUSY)
        self._prepare(parent, self.row.labels)
        try:
            self.place.do(f'roll "{self.key}" back', os.rmdir, directory)
        except Refusal:
            os.rmdir(self.place.directory("active", NEW + self.key))
            raise
        self._take_place()


def _checkpoint(given: Given) -> int:
    place = find_tree(given.value("at"), changes=not given.has("list"))
    key = place.key(given.arguments[0])
    if given.has("list"):
        found = checkpoints(rows(place), key)
        if not found and place.kind_of(key) is None:
            raise missing(key, place.path)
        if given.has("json"):
            table.show_json([{"checkpoint": n, **row.shown()} for n, row in found.items()])
            return 0
        lines = [
            (
                str(n),
                table.printable(row.name),
                table.format_size(row.size),
                table.format_age(row.created),
                table.printable(row.labels.get(MESSAGE, "")),
            )
            for n, row in found.items()
        ]
        table.show_table(("NUMBER", "NAME", "SIZE", "AGE", "MESSAGE"), lines, right_aligned=(0, 2, 3))
        return 0
    table.show_line(Workspace(place, key).checkpoint(given.value("message") or "", wait=given.has("sync")))
    return 0


def _rollback(given: Given) -> int:
    place = find_tree(given.value("at"), changes=True)
    workspace = Workspace(place, place.key(given.arguments[0]))
    workspace.refuse_pinned()
    parent = workspace.row.parent
    if len(given.arguments) > 1:
        word, found = given.arguments[1], workspace.checkpoints
        if word == "0" and found:
            parent = next(iter(found.values())).parent
        elif word != "0":
            if not word.isdecimal() or int(word) not in found:
                raise Refusal(f'"{workspace.key}" has no checkpoint {word}: see snapfs checkpoint --list', NOT_FOUND)
            parent = found[int(word)].name
    if given.has("keep"):
        kept = workspace.checkpoint(f"before it was rolled back to {parent or 'nothing'}")
        workspace = Workspace(workspace.place, workspace.key)
        table.show_line(f"kept as {kept}")
    workspace.rollback(parent)
    table.show_line(f"{workspace.key} is as {parent or 'an empty one'}")
    return 0


def _fork(given: Given) -> int:
    place = find_tree(given.value("at"), changes=True)
    source, key = place.key(given.arguments[0]), place.new_key(given.arguments[1], "active")
    if place.kind_of(source) == "committed":
        table.show_line(make(place, "active", key, source))
        return 0
    was_missing = place.kind_of(source) is None
    workspace = Workspace(place, source)
    taken = workspace.names.get(key)
    if taken is not None:
        if was_missing and taken.kind == "active" and taken.parent == workspace.row.parent:  # it was cut short after this
            table.show_line(place.directory("active", key))
            return 0
        raise Refusal(f'snapshot "{key}" already exists ({taken.kind})', TAKEN)
    file_name(key)
    workspace.checkpoint(given.value("message") or f"forked as {key}", fork=key)
    table.show_line(place.directory("active", key))
    return 0


_MESSAGE = Option("message", "why, in words", "TEXT", short="-m")

VERBS = {
    "checkpoint": Verb(
        "checkpoint",
        "KEY",
        (
            _MESSAGE,
            Option("list", "list the checkpoints there are", short="-l"),
            Option("sync", "return when it is on disk"),
            JSON,
        ),
        "Keep the state of workspace KEY as the committed snapshot KEY@NUMBER, and go on where you were: same key, same path.\n"
        "Nobody may be in its rootfs meanwhile.",
        """
snapfs checkpoint web -m "before the upgrade"
snapfs checkpoint --list web
""",
        _checkpoint,
    ),
    "rollback": Verb(
        "rollback",
        "KEY [NUMBER]",
        (Option("keep", "make a checkpoint of the present state first"),),
        "Put workspace KEY back to what it stands on: its last checkpoint, or what it was prepared on.  Or to checkpoint\n"
        "NUMBER; 0 is what it was before the first.  What changed since is gone, unless you --keep it.",
        """
snapfs rollback web
snapfs rollback --keep web 2
""",
        _rollback,
    ),
    "fork": Verb(
        "fork",
        "SOURCE KEY",
        (_MESSAGE,),
        "Make the active snapshot KEY as a copy of SOURCE: on it, if it is committed; else by a checkpoint on which\n"
        "both go on.",
        """
snapfs fork v1 experiment
snapfs fork web web-2
""",
        _fork,
    ),
}
