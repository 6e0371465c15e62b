"""``snapfs prune``: remove what is old, expired or labelled so, and thin checkpoints.  Nothing is ever pruned unasked."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Collection, Mapping

from snapfs.cli import keeping, table
from snapfs.cli.commanding import commanded
from snapfs.cli.grammar import JSON, Given, Option, Verb
from snapfs.cli.keeping import Keep, Step, called, checkpoints
from snapfs.cli.listing import Row, children_first, images, rows
from snapfs.cli.place import MountedTree, checked_kinds, find_tree
from snapfs.cli.progress import Progress
from snapfs.cli.refusal import NOT_FOUND, USAGE, Refusal
from snapfs.cli.rm import remove
from snapfs.labels import PIN

_ASKING = ("label", "older-than", "expired", "kind")
_KEEPING = ("keep-last", "keep-hourly", "keep-daily")

_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def seconds(text: str) -> float | None:
    """``90``, ``30m``, ``2h``, ``7d`` or ``1w`` in seconds; None where it is none of these."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([smhdw]?)", text.strip())
    return float(found[1]) * _UNITS[found[2]] if found else None


def choose(
    everything: list[Row], named: Mapping[str, str], given: Given, now: float
) -> tuple[list[Row], list[tuple[Row, str]]]:
    """The snapshots to remove, children first; and those that were asked for and stay, each with the reason.  ``named`` are
    names in images/, by the snapshots that have them."""
    age = given.value("older-than")
    limit = seconds(age) if age is not None else 0.0
    if limit is None:
        raise Refusal(f'"{age}" is no age: write 90s, 30m, 2h, 7d or 1w', USAGE)
    kinds = checked_kinds(given.all("kind")) or (["active", "view", "committed"] if given.has("expired") else ["committed"])
    labels = [label.partition("=") for label in given.all("label")]
    going, staying = {}, []
    for row in everything:
        own = row.labels
        if row.kind not in kinds or now - row.created < limit:
            continue
        if any(key not in own or (equals and own[key] != value) for key, equals, value in labels):
            continue
        if given.has("expired"):
            lives = seconds(own["ttl"]) if "ttl" in own else None
            if "ttl" in own and lives is None:
                staying.append((row, f'its ttl "{own["ttl"]}" is no time'))
            if lives is None or now - row.updated < lives:
                continue
        if PIN in own:
            staying.append((row, "it is pinned"))
            continue
        if row.name in named:
            staying.append((row, called(named[row.name])))
            continue
        going[row.name] = row
    kept = [row for row in everything if row.name not in going]
    while kept:  # what stands on something keeps it
        row = kept.pop()
        parent = going.pop(row.parent, None) if row.parent is not None else None
        if parent is not None:
            staying.append((parent, f'"{row.name}" stands on it'))
            kept.append(parent)
    return children_first(going.values()), staying


def _thin(given: Given) -> int:
    """``--keep-…``: of the checkpoints of each workspace only some stay."""
    if any(given.has(name) for name in _ASKING):
        raise Refusal("--keep-last, --keep-hourly and --keep-daily are about checkpoints: give them without the others", USAGE)
    counts = []
    for name in _KEEPING:
        text = given.value(name) or "0"
        if not (text.isascii() and text.isdecimal() and len(text) < 10):
            raise Refusal(f'--{name} "{text}" is no number', USAGE)
        counts.append(int(text))
    place = find_tree(given.value("at"), changes=True)
    everything, keys = rows(place), [place.key(word) for word in given.arguments]
    for key in keys:
        if not checkpoints(everything, [key]) and place.kind_of(key) is None:
            raise place.missing(key)
    steps, staying = keeping.choose(everything, Keep(*counts), keys, _named(place))
    removed, refused = (steps, []) if given.has("dry-run") else _do(place, steps)
    _tell(given, [step.row for step in removed], staying, {step.row.name for step in removed if step.dissolves})
    for refusal in refused:
        table.complain(refusal)
    return refused[-1].status if refused else 0


def _named(place: MountedTree) -> dict[str, str]:
    """A name in images/ of each snapshot that has one, by the snapshot's name."""
    return {snapshot: name for name, snapshot in images(place) if snapshot is not None}


def _do(place: MountedTree, steps: list[Step]) -> tuple[list[Step], list[Refusal]]:
    """Do ``steps``, in this order: those that were done, and the refusals.  Where one is refused the next ones still can be."""
    done: list[Step] = []
    refused: list[Refusal] = []
    progress = Progress()
    try:
        for nth, step in enumerate(steps):
            name = step.row.name
            progress.show(f"removing {table.printable(name)}", nth, len(steps))
            try:
                if step.dissolves:
                    held = place.hold("committed", name, step.row.id)
                    try:
                        commanded(place, "committed", name, "dissolve", "", f'dissolve "{name}"', held=held)
                    finally:
                        os.close(held)
                else:
                    place.remove("committed", name, step.row.id)
                done.append(step)
            except Refusal as refusal:
                if refusal.status != NOT_FOUND:  # else it was removed meanwhile
                    refused.append(Refusal(f"{name}: {refusal}", refusal.status))
    finally:
        progress.clear()
    return done, refused


def _prune(given: Given) -> int:
    if any(given.has(name) for name in _KEEPING):
        return _thin(given)
    if given.arguments:
        raise Refusal("a workspace is named with --keep-last, --keep-hourly or --keep-daily only", USAGE)
    if not any(given.has(name) for name in _ASKING):
        raise Refusal(
            "say what to prune: --label, --older-than, --expired, --kind, or what to --keep-last, -hourly, -daily", USAGE
        )
    place = find_tree(given.value("at"), changes=True)
    going, staying = choose(rows(place), _named(place), given, time.time())
    removed, refused = (going, []) if given.has("dry-run") else remove(place, going)
    _tell(given, removed, staying)
    for refusal in refused:
        table.complain(refusal)
    return refused[-1].status if refused else 0


def _tell(given: Given, removed: list[Row], staying: list[tuple[Row, str]], dissolved: Collection[str] = ()) -> None:
    """Tell what was ``removed``; of what was ``dissolved`` the files are not."""
    if given.has("json"):
        shown = {"removed": [row.shown() for row in removed], "kept": [{"name": row.name, "why": why} for row, why in staying]}
        table.show_json(shown)
    else:
        verb = "would remove" if given.has("dry-run") else "removed"
        for row in removed:
            print(f"{verb} {table.printable(row.name)}")
        for row, why in staying:
            print(f"kept {table.printable(row.name)}: {table.printable(why)}")
        size = table.format_size(sum(row.size for row in removed if row.name not in dissolved))
        stays = f"; what {len(dissolved)} of them had stays, in what stands on them" if dissolved else ""
        print(f"{verb} {len(removed)}, {size}{stays}")


VERBS = {
    "prune": Verb(
        "prune",
        "[KEY…]",
        (
            Option("label", "with this label", "KEY[=VALUE]", short="-l", many=True),
            Option("older-than", "made longer ago than this: 90s, 30m, 2h, 7d, 1w", "AGE"),
            Option("expired", "whose label ttl (an age, from its last update on) is over"),
            Option("kind", "of this kind; without it, committed ones, and with --expired all", "KIND", many=True),
            Option("keep-last", "keep the N latest checkpoints of each workspace", "N"),
            Option("keep-hourly", "and the last of each of the N latest hours that have any", "N"),
            Option("keep-daily", "and the last of each of the N latest days that have any", "N"),
            Option("dry-run", "only say what would be removed", short="-n"),
            JSON,
        ),
        "Remove the snapshots for which all that is given holds.  What bears the label pin, has a name in images/ or is in\n"
        "use stays, and so does what they stand on.\n"
        "\n"
        "With --keep-…: thin the checkpoints of all workspaces, or of the workspaces KEY.  The newest stays, and what a\n"
        "workspace or a view stands on.  What stands on one that goes takes over what that had, and shows what it showed.",
        """
snapfs prune --expired --dry-run
snapfs prune --label ci --older-than 7d
snapfs prune --kind view --older-than 1h
snapfs prune web --keep-last 20 --keep-hourly 24 --keep-daily 7 --dry-run
""",
        _prune,
    )
}
