"""The committed snapshots that keep what an apply has replaced: made, found again, and removed where it came to nothing.

In the file system of each are ``plan``, all steps with what was there before and after (``applying/plan.py``), and ``before/``,
the files that were replaced or deleted, at the paths that they had.
"""

from __future__ import annotations

import os
import secrets

from snapfs import names
from snapfs.applying.entries import Held
from snapfs.applying.filling import keep
from snapfs.applying.plan import Plan
from snapfs.cli.commit import SYNC, commit, persistently
from snapfs.cli.listing import Row, rows
from snapfs.cli.place import MountedTree
from snapfs.cli.prepare import make
from snapfs.cli.refusal import NOT_FOUND, Refusal, missing
from snapfs.kernel.beneath import open_beneath
from snapfs.labels import APPLY, SOURCE, UNDO, UNDONE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_PLAN, _FILES = "plan", b"before"


def source_path(place: MountedTree, key: str, everything: list[Row]) -> str:
    """The directory that the snapshot ``key``, or what it stands on, has in its label SOURCE; raises Refusal."""
    known = {row.name: row for row in everything}
    row = known.get(key)
    while row is not None:
        found = row.labels.get(SOURCE)
        if found is not None:
            path = names.path_of_text(found)
            if not path.startswith("/"):
                raise Refusal(f'the label {SOURCE} of "{row.name}" is no path: "{found}"; name a directory')
            return path
        row = known.pop(row.parent, None) if row.parent is not None else None
    raise Refusal(f'"{key}" has no label {SOURCE} that says where it comes from: {place.command("apply", key, "DIRECTORY")}')


def planned(place: MountedTree, key: str) -> dict[str, Any]:
    """What an apply of ``key`` has to note before it makes anything: what it is going to call its undo snapshot."""
    nth = 1
    while place.kind_of(name := names.with_suffix(key, f"-undo-{nth}")) is not None:
        nth += 1
    return {"key": key, "undo": name, "token": secrets.token_hex(8), "root": place.options()["root"]}


def make_undo(place: MountedTree, plan: Plan, target: Held) -> None:
    """Commit what the plan replaces and deletes, with the plan, and wait for the disk.  Raises Refusal, Changed and OSError."""
    about = plan.about
    name = about["undo"]
    labels = [(UNDO, about["key"]), (APPLY, about["token"]), (SOURCE, names.path_as_text(target.name))]
    labels += [(UNDONE, "yes")] if about["undoes"] else []
    make(place, "active", name, None, labels)
    top = os.open(place.rootfs("active", name), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.mkdir(_FILES, 0o700, dir_fd=top)
        with Held(open_beneath(_FILES, top, os.O_RDONLY | os.O_DIRECTORY), name) as kept:
            keep(plan, target, kept)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        with open(os.open(_PLAN, flags, 0o600, dir_fd=top), "w", encoding="utf-8") as file:
            plan.write(file)
    finally:
        os.close(top)
    directory = commit(place, name, name)
    place.do("wait for the disk", SYNC, persistently, place.within.sync, directory)


def forget(place: MountedTree, about: dict[str, Any]) -> None:
    """Remove the undo snapshot of an apply that noted ``about`` and came to nothing, as far as it was made.  Raises Refusal."""
    if not about.get("undo") or about.get("root") != place.options()["root"]:
        return
    for row in rows(place):
        if row.name == about["undo"]:
            is_begun = row.kind == "active" and row.parent is None and not row.labels  # it was about to get them
            if is_begun or row.labels.get(APPLY) == about["token"] or (row.kind == "active" and UNDO in row.labels):
                place.remove(row.kind, row.name, row.id)


def mark_undone(place: MountedTree, about: dict[str, Any]) -> None:
    """Note of the undo snapshot that an apply with this ``about`` has brought back that it is done with.  Raises Refusal."""
    name = about.get("undoes")
    if name and about.get("root") == place.options()["root"] and place.kind_of(name) == "committed":
        place.write_label(place.directory("committed", name), UNDONE, "yes")


def find_undo(place: MountedTree, word: str | None) -> Row:
    """The undo snapshot that ``word`` names, or the last one of what it names (None: of all) that was not undone yet.  Raises
    Refusal."""
    everything = rows(place)
    key = None if word is None else place.key(word)
    found = [row for row in everything if row.kind == "committed" and UNDO in row.labels]
    for row in found:
        if row.name == key:
            return row
    waiting = [row for row in found if UNDONE not in row.labels and key in (None, row.labels[UNDO])]
    if waiting:
        return waiting[-1]
    if key is not None and place.kind_of(key) is None and not any(row.labels[UNDO] == key for row in found):
        raise missing(key, place.path)
    of = f' of "{key}"' if key is not None else ""
    raise Refusal(f"there is no apply{of} that could be undone; snapfs ls shows those that were: NAME-undo-1", NOT_FOUND)


def learn(place: MountedTree, plan: Plan, target: Held) -> bool:
    """Have ``plan`` know what the applies of the same snapshot to ``target`` have left there that were not undone; whether
    there are any.  Raises Refusal."""
    wanted = {UNDO: plan.about["key"], SOURCE: names.path_as_text(target.name)}
    found = False
    for row in rows(place):
        labels = row.labels
        if row.kind == "committed" and UNDONE not in labels and wanted.items() <= labels.items():
            earlier, files = open_undo(place, row)
            files.close()
            plan.learn(earlier)
            earlier.close()
            found = True
    return found


def open_undo(place: MountedTree, row: Row) -> tuple[Plan, Held]:
    """The plan and the files of an undo snapshot, both to be closed.  Raises Refusal."""
    top = os.open(place.rootfs("committed", row.name), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with open(os.open(_PLAN, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=top), encoding="utf-8") as file:
            plan = Plan.read(file)
        return plan, Held(open_beneath(_FILES, top, os.O_RDONLY | os.O_DIRECTORY), row.name)
    except (OSError, ValueError) as error:
        raise Refusal(f'"{row.name}" is damaged: {error}; its files are in {place.path}/committed/{row.name}/rootfs') from None
    finally:
        os.close(top)
