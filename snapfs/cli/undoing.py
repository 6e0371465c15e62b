"""The committed snapshots that keep what an apply has replaced: made, found again, and removed where it came to nothing.

In the file system of each are ``plan``, all steps with what was there before and after (``applying/plan.py``), and ``before/``,
the files that were replaced or deleted, at the paths that they had.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets

from snapfs import names
from snapfs.applying.entries import Held
from snapfs.applying.filling import keep
from snapfs.applying.plan import Plan
from snapfs.cli.commanding import SYNC, persistently
from snapfs.cli.commit import commit
from snapfs.cli.listing import Row, rows
from snapfs.cli.place import MountedTree
from snapfs.cli.prepare import make
from snapfs.cli.refusal import NOT_FOUND, NOT_PERMITTED, Refusal
from snapfs.kernel.beneath import open_beneath
from snapfs.labels import APPLY, SOURCE, UNDO, UNDONE
from snapfs.scan.copying import open_regular

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import IO, Any

_PLAN, _FILES = "plan", b"before"


def source_path(place: MountedTree, key: str, everything: list[Row]) -> str:
    """The directory that the snapshot ``key``, or what it stands on, has in its label SOURCE; raises Refusal, also where others
    could have chosen that."""
    known = {row.name: row for row in everything}
    row = known.get(key)
    while row is not None:
        found = row.labels.get(SOURCE)
        if found is not None:
            path = names.path_of_text(found)
            if not path.startswith("/"):
                raise Refusal(f'the label {SOURCE} of "{row.name}" is no path: "{found}"; name a directory')
            if place.is_labelled_by_others(place.directory(row.kind, row.name)):
                whose = f'the label {SOURCE} of "{row.name}", which others than you may write'
                to_do = f"name a directory that you mean: {place.command('apply', place.word_of(key), 'DIRECTORY')}"
                raise Refusal(f"{path} is named by {whose}: {to_do}", NOT_PERMITTED)
            return path
        row = known.pop(row.parent, None) if row.parent is not None else None
    to_do = place.command("apply", place.word_of(key), "DIRECTORY")
    raise Refusal(f'"{key}" has no label {SOURCE} that says where it comes from: {to_do}')


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
    about["target"] = names.path_as_text(target.name)
    labels = [(APPLY, about["token"]), (UNDO, about["key"]), (SOURCE, about["target"])]  # by the first it is known
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
    if not about.get("undo") or not about.get("token") or about.get("root") != place.options()["root"]:
        return
    for row in rows(place):
        if row.name == about["undo"]:
            is_ours = row.labels.get(APPLY) == about["token"]
            if not row.labels and row.kind == "active" and row.parent is None:  # it was about to get them
                is_ours = not os.listdir(place.rootfs("active", row.name))
            if is_ours:
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
        raise place.missing(key)
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
    with _undo_of(place, row) as top:
        with _plan_in(top) as file:
            plan = Plan.read(file)
        try:
            files = open_beneath(_FILES, top, os.O_RDONLY | os.O_DIRECTORY)
            _refuse_others(files)
        except BaseException:
            plan.close()
            raise
        return plan, Held(files, row.name)


def undo_target(place: MountedTree, row: Row) -> str:
    """The directory to which the apply was that an undo snapshot is of, whatever its labels say.  Raises Refusal."""
    with _undo_of(place, row) as top, _plan_in(top) as file:
        what, about = json.loads(file.readline())
        if what != "about" or not isinstance(about, dict):
            raise ValueError("no plan")
        if "target" in about:
            return names.path_of_text(about["target"])
    return source_path(place, row.name, [row])  # of an apply before there was this


@contextlib.contextmanager
def _undo_of(place: MountedTree, row: Row) -> Iterator[int]:
    """For a block that reads an undo snapshot: its root, open.  Raises Refusal."""
    its = place.directory("committed", row.name)
    try:
        try:
            top = os.open(place.rootfs("committed", row.name), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except PermissionError as error:
            words = f'cannot look into "{row.name}": {error.strerror}: the tree\'s owner and root may'
            raise Refusal(words, NOT_PERMITTED) from None
        try:
            yield top
        finally:
            os.close(top)
    except _NotOurs:
        to_do = f"remove it: {place.command('rm', place.word_for(row.name, row.id))}"
        raise Refusal(f'"{row.name}" was made by another user, and not by an apply of yours: {to_do}', NOT_PERMITTED) from None
    except (OSError, ValueError, TypeError) as error:
        raise Refusal(f'"{row.name}" is damaged: {error}; its files are in {its}/rootfs') from None


class _NotOurs(Exception):
    """Somebody else has made it, or may write it."""


def _refuse_others(fd: int) -> None:
    found = os.fstat(fd)
    if found.st_uid not in (0, os.geteuid()) or found.st_mode & 0o022:
        raise _NotOurs


@contextlib.contextmanager
def _plan_in(top: int) -> Iterator[IO[str]]:
    with open(open_regular(_PLAN, top), encoding="utf-8") as file:
        _refuse_others(file.fileno())
        yield file
