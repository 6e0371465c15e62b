"""``snapfs checkpoint``, ``rollback`` and ``fork``: the state of a workspace, an active snapshot that keeps its path.

Each writes one line into a file of the tree, which does all of it or nothing (``tree/commands.py``).
"""

from __future__ import annotations

import json
import os

from snapfs.cli import table
from snapfs.cli.commit import persistently, sync
from snapfs.cli.grammar import JSON, Given, Option, Verb
from snapfs.cli.listing import Row, rows
from snapfs.cli.mount import how_to_unmount
from snapfs.cli.place import MountedTree, file_name, find_tree, key_of
from snapfs.cli.prepare import make
from snapfs.cli.refusal import BUSY, NOT_FOUND, NOT_PERMITTED, TAKEN, Refusal, missing
from snapfs.labels import MESSAGE, NUMBER, OF, PIN, pinned


def checkpoints(everything: list[Row], key: str) -> dict[int, Row]:
    """The checkpoints of workspace ``key`` by number."""
    found = {}
    for row in everything:
        labels = row.labels
        if row.kind == "committed" and labels.get(OF) == key and labels.get(NUMBER, "").isdecimal():
            found[int(labels[NUMBER])] = row
    return dict(sorted(found.items()))


def _commanded(place: MountedTree, key: str, command: str, text: str, what: str) -> str:
    """Write ``text`` into the file ``command`` of the workspace ``key``: the key or name that comes of it, or "".  ``what`` is
    what is being done, in words that go on from "cannot ".  Raises Refusal."""
    result: list[str] = []
    try:
        place.do(
            what,
            persistently,
            lambda path: result.append(place.write_command(path, text)),
            f"{place.directory('active', key)}/{command}",
        )
    except Refusal as refused:
        kind = place.kind_of(key) if refused.status == NOT_FOUND else "active"
        if kind is None:
            raise missing(key, place.path) from None
        if kind != "active":
            raise Refusal(f'"{key}" is {kind}: a workspace is an active snapshot', NOT_FOUND) from None
        raise
    return key_of(result[0])


def _kept(place: MountedTree, key: str, message: str) -> str:
    return _commanded(place, key, "checkpoint", message, f'keep the state of "{key}"')


def _checkpoint(given: Given) -> int:
    place = find_tree(given.value("at"), changes=not given.has("list"))
    key = place.key(given.arguments[0])
    if given.has("list"):
        return _list(place, key, as_json=given.has("json"))
    name = _kept(place, key, given.value("message") or "")
    if given.has("sync"):
        place.do("wait for the disk", persistently, sync, place.directory("committed", name))
    table.show_line(name)
    return 0


def _list(place: MountedTree, key: str, *, as_json: bool) -> int:
    found = checkpoints(rows(place), key)
    if not found and place.kind_of(key) is None:
        raise missing(key, place.path)
    if as_json:
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


def _rollback(given: Given) -> int:
    place = find_tree(given.value("at"), changes=True)
    key, to = place.key(given.arguments[0]), given.arguments[1] if len(given.arguments) > 1 else ""
    if to and not to.isdecimal():
        to = f"committed/{file_name(place.key(to))}"
    if given.has("keep"):
        directory = place.directory("active", key)
        if os.path.lexists(f"{directory}/labels/{PIN}"):  # before there is a checkpoint
            raise Refusal(str(pinned(key)), NOT_PERMITTED)
        to = to or _parent(directory)
        kept = _kept(place, key, f"before it was rolled back to {to.removeprefix('committed/')}")
        table.show_line(f"kept as {kept}")
    try:
        parent = _commanded(place, key, "rollback", to, f'roll "{key}" back')
    except Refusal as refused:
        elsewhere = place.mounted_by_hand(place.directory("active", key)) if refused.status == BUSY else []
        if not elsewhere:
            raise
        number = json.loads(place.read(f"{place.directory('active', key)}/info.json"))["id"]
        to_do = how_to_unmount(place, place.word_for(key, number), elsewhere[0])
        raise Refusal(f'"{key}" is mounted on {elsewhere[0]}: {to_do}', BUSY) from None
    table.show_line(f"{key} is as {parent or 'an empty one'}")
    return 0


def _parent(directory: str) -> str:
    """What the workspace in ``directory`` stands on, as ``rollback`` takes it: the path of a snapshot, or 0."""
    try:
        return f"committed/{os.path.basename(os.readlink(f'{directory}/parent'))}"
    except OSError:
        return "0"


def _fork(given: Given) -> int:
    place = find_tree(given.value("at"), changes=True)
    source, key = place.key(given.arguments[0]), place.new_key(given.arguments[1], "active")
    if place.kind_of(source) == "committed":
        table.show_line(make(place, "active", key, source))
        return 0
    try:
        _commanded(place, source, "fork", file_name(key), f'make "{key}"')
    except Refusal as refused:
        if refused.status == TAKEN:
            raise Refusal(f'snapshot "{key}" already exists ({place.kind_of(key)})', TAKEN) from None
        raise
    table.show_line(place.directory("active", key))
    return 0


VERBS = {
    "checkpoint": Verb(
        "checkpoint",
        "KEY",
        (
            Option("message", "why, in words", "TEXT", short="-m"),
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
        "KEY [NUMBER|NAME]",
        (Option("keep", "make a checkpoint of the present state first"),),
        "Put workspace KEY back to what it stands on: its last checkpoint, or what it was prepared on.  Or to checkpoint\n"
        "NUMBER, or that with this NAME; 0 is what it was before the first.  What changed since is gone, unless you --keep it.",
        """
snapfs rollback web
snapfs rollback --keep web 2
""",
        _rollback,
    ),
    "fork": Verb(
        "fork",
        "SOURCE KEY",
        (),
        "Make the active snapshot KEY as a copy of SOURCE: on it, if it is committed; else by a checkpoint on which\n"
        "both go on.",
        """
snapfs fork v1 experiment
snapfs fork web web-2
""",
        _fork,
    ),
}
