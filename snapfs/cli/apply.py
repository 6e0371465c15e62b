"""``snapfs apply``: what changed in a snapshot, brought into an ordinary directory, as the caller (``applying/``)."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import sys
from itertools import islice

from snapfs.applying.entries import Held, Seen
from snapfs.applying.filling import Changed, stage
from snapfs.applying.plan import NEW, OLD, STAGING, Nothing, Plan, Side, Since, Step, Unfit, make_plan, shown
from snapfs.applying.staging import BEGUN, FINISHED, Staging, lock, refuse_unwritable
from snapfs.cli import table, undoing
from snapfs.cli.adopt import over_of
from snapfs.cli.cutoff import tidied
from snapfs.cli.grammar import JSON, Given, Option, Verb
from snapfs.cli.listing import Row, rows
from snapfs.cli.place import MountedTree, file_name, find_tree
from snapfs.cli.progress import Progress
from snapfs.cli.refusal import BUSY, CONFLICT, FAILED, NOT_FOUND, NOT_PERMITTED, USAGE, Refusal, changed
from snapfs.kernel.beneath import open_without_links
from snapfs.labels import BASE, NUMBER, OF, SQUASHED, UNDO

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import Any

_COLOURS = {"A": "green", "C": "yellow", "D": "red"}
_SHOWN = 100  # changes that replace a file by its next version, or add something, that are shown one by one
_ESCAPED = re.compile(rb"\\(\\|n|0[0-7]{3})")


def _apply(given: Given) -> int:
    with tidied():
        return _undo(given) if given.has("undo") else _bring(given)


def _bring(given: Given) -> int:
    if not given.arguments:
        raise Refusal("KEY is missing: snapfs apply --help tells more", USAGE)
    if "" in given.arguments:  # a variable that is not set: TARGET would be another one, or PATH all there is
        raise Refusal("an argument is empty: leave it out, if you mean the directory that KEY comes from, or all paths", USAGE)
    place = find_tree(given.value("at"), changes=not given.has("dry-run"))
    place.refuse_foreign("applied")
    key = place.key(given.arguments[0])
    before = len(given.arguments) if given.before is None else given.before
    named = given.arguments[1] if before > 1 else None
    asked = given.arguments[2 if named is not None else 1 :]
    kind, directory = place.find(key)
    if kind == "view":
        raise Refusal(f'"{key}" is a view, which changes nothing: give an active or a committed snapshot', NOT_FOUND)
    everything = rows(place)
    row = next((row for row in everything if row.name == key), None)
    if row is None:
        raise changed(key, NOT_FOUND)
    if UNDO in row.labels:
        to_do = place.command("apply --undo", place.word_for(key, row.id))
        raise Refusal(f'"{key}" keeps what an apply has replaced: {to_do} brings it back', USAGE)
    base = _base(row, everything)
    paths = [os.path.normpath(f"/{path}").lstrip("/") for path in asked]
    target = _open_target(place, named or undoing.source_path(place, key, everything))
    with contextlib.ExitStack() as held:
        held.enter_context(target)
        _begin(place, target, given)
        wanted = held.enter_context(_open_files(place, row.kind, key))
        before_it: Seen = Nothing()
        if base is not None:
            before_it = held.enter_context(_open_files(place, base.kind, base.name))
        for word, name in zip(asked, paths, strict=True):
            if before_it.look(os.fsencode(name)) is None and wanted.look(os.fsencode(name)) is None:
                raise Refusal(
                    f'there is no {word} in "{key}", nor in what it began as: give a path from its root on', NOT_FOUND
                )
        if os.path.samestat(os.fstat(target.top), os.fstat(wanted.top)):
            to_do = "apply it from outside"
            if not place.options()["window"] and over_of(place, directory) is not None:  # everybody has it there
                to_do = f"{place.command('release', place.word_for(key, row.id))} gives the directory back first"
            raise Refusal(f'{target.name} shows files of the tree here, where "{key}" is mounted over it: {to_do}')
        if json.loads(place.read(f"{directory}/info.json"))["id"] != row.id:
            raise changed(key)
        if "" in paths:  # all of it
            paths = []
        plan = held.enter_context(contextlib.closing(Plan()))
        plan.about = {**undoing.planned(place, key), "undoes": None}
        differing = _differing(place, directory, base, wanted, paths)
        since: Seen = before_it
        if undoing.learn(place, plan, target):  # what was brought before may have to go, or to change again
            since = Since(before_it, plan)
            before_it = Since(before_it, plan, asked=True)
            with _refusing(target):
                for path in differing:
                    plan.order(path)
            differing = (path for path in plan.ordered() if _is_asked(path, paths))
        with _refusing(target), _counted(differing) as differing:
            make_plan(before_it, wanted, target, differing, plan, since=since, partial=bool(paths))
        return _carry_out(place, given, plan, wanted, target, f'"{key}"')


def _undo(given: Given) -> int:
    if len(given.arguments) > 1:
        raise Refusal("--undo takes no paths: it undoes all of one apply", USAGE)
    place = find_tree(given.value("at"), changes=not given.has("dry-run"))
    place.refuse_foreign("applied")
    word = given.arguments[0] if given.arguments else None
    row = undoing.find_undo(place, word)
    target = _open_target(place, undoing.undo_target(place, row))
    with contextlib.ExitStack() as held:
        held.enter_context(target)
        _begin(place, target, given)
        found = undoing.find_undo(place, word)  # that of what was ended just now, if anything was
        if found.id != row.id and undoing.undo_target(place, found) == target.name:
            row = found
        done, files = undoing.open_undo(place, row)
        held.enter_context(contextlib.closing(done))
        held.enter_context(files)
        wanted = Side(done, OLD, files)
        plan = held.enter_context(contextlib.closing(Plan()))
        plan.about = {**undoing.planned(place, row.labels[UNDO]), "undoes": row.name}
        with _refusing(target), _counted(done.paths()) as paths:
            make_plan(Side(done, NEW), wanted, target, paths, plan)
        if not plan.count() and not given.has("dry-run"):
            undoing.mark_undone(place, plan.about)
        return _carry_out(place, given, plan, wanted, target, f'what "{row.name}" keeps', done.about.get("links"))


def _begin(place: MountedTree, target: Held, given: Given) -> None:
    """Have ``target`` for this process, and end what an earlier apply has begun there.  Raises Refusal."""
    with _refusing(target):
        if not given.has("dry-run"):
            lock(target)
        staging = Staging.find(target)
        if staging is None:
            return
        if given.has("dry-run"):
            raise Unfit(f"an apply to {target.name} is at work, or was cut off: snapfs apply without --dry-run ends it first")
        with contextlib.closing(staging):
            _end(place, target, staging)


def _end(place: MountedTree, target: Held, staging: Staging) -> None:
    """End the apply that has left ``staging``.  Raises Refusal, Unfit and OSError."""
    state = staging.state
    if state not in (BEGUN, FINISHED):
        undoing.forget(place, staging.about)
        staging.remove()
        table.complain(
            f"an earlier apply to {target.name} was cut off before it had changed anything: what it had made is gone"
        )
        return
    try:
        plan = staging.journal()
    except ValueError as error:
        where = f"{target.name}/{STAGING}"
        raise Unfit(f"{where}/journal is damaged ({error}): what was replaced is in there, move the directory away") from None
    with contextlib.closing(plan):
        if state == FINISHED:
            staging.remove(plan.entry(NEW, b""))
            return
        try:
            staging.carry_out(plan)
        except (Changed, OSError) as error:
            _take_back(place, target, staging, plan)
            where = shown(error.path) if isinstance(error, Changed) else "what it was to do"
            table.complain(f"an earlier apply to {target.name} was cut off, and {where} has changed since: it is undone")
            return
        _finish(place, staging, plan)
    table.complain(f"an earlier apply to {target.name} was cut off: it is finished, and {_undoing(place, plan)} undoes it")


def _undoing(place: MountedTree, plan: Plan) -> str:
    """What the user types to undo it."""
    return place.command("apply --undo", place.word_of(plan.about["undo"]))


def _carry_out(
    place: MountedTree,
    given: Given,
    plan: Plan,
    wanted: Seen,
    target: Held,
    what: str,
    undone: dict[str, str] | None = None,
) -> int:
    """Show ``plan``, and do it, unless it is only to be shown, or there are conflicts.  Raises Refusal."""
    conflicts = sum(1 for _ in plan.conflicts())
    as_json, is_done = given.has("json"), False
    refused = conflicts > 0 and not given.has("force")
    nothing = plan.count() == 0
    show = _show_json if as_json else _show
    show(plan, target.name, what)
    sys.stdout.flush()
    try:
        if not as_json:
            for path, why in plan.conflicts():
                table.complain(f"conflict: {shown(path)} {why}" + ", and is replaced" * (not refused))
        if refused:
            raise Refusal(
                f"{conflicts} {'path of' if conflicts == 1 else 'paths of'} {target.name} changed there, too, so nothing was"
                " touched: see to them, or --force replaces them, too, and keeps what was there",
                CONFLICT,
            )
        if not given.has("dry-run") and not nothing:
            _do(place, plan, wanted, target, undone or {})
            is_done = True
    finally:
        if as_json:
            print(f'],\n"applied": {json.dumps(is_done)}, "undo": {json.dumps(plan.about["undo"] if is_done else None)}}}')
    if is_done and not as_json:
        table.show_line(f"done; {_undoing(place, plan)} undoes it")
    return 0


def _do(place: MountedTree, plan: Plan, wanted: Seen, target: Held, undone: dict[str, str]) -> None:
    """Do all that ``plan`` says, or nothing; ``undone`` is as in ``_other_names``.  Raises Refusal."""
    with _refusing(target):
        refuse_unwritable(plan, target)
        found = _other_names(plan, target, undone)
        staging = Staging.make(target, plan.about)
    with contextlib.closing(staging), _shown_steps(plan) as doing:
        try:
            with _refusing(target):
                staging.refuse_unable()
                doing("getting what comes ready")
                stage(plan, wanted, staging.held, found)
                doing("keeping what goes")
                undoing.make_undo(place, plan, target)
                staging.seal(plan)
        except BaseException:
            undoing.forget(place, plan.about)
            staging.remove()
            raise
        try:
            with _refusing(target):
                doing("putting it in place")
                staging.carry_out(plan)
        except BaseException:
            with _refusing(target, "the apply could not be undone, and the next one ends it"):
                _take_back(place, target, staging, plan)
            raise
        done = f"it is done, and {_undoing(place, plan)} undoes it"
        with _refusing(target, f"{done}, but what was replaced could not be removed"):
            _finish(place, staging, plan)


def _finish(place: MountedTree, staging: Staging, plan: Plan) -> None:
    undoing.mark_undone(place, plan.about)
    staging.finish()
    staging.remove(plan.entry(NEW, b""))


def _take_back(place: MountedTree, target: Held, staging: Staging, plan: Plan) -> None:
    left = staging.take_back(plan)
    if left:
        for path in left:
            table.complain(f"{target.name}{shown(path)} was changed meanwhile, and stays; what was there before is kept")
        table.complain(f"what was there before is in {place.directory('committed', plan.about['undo'])}/rootfs/before")
    else:
        undoing.forget(place, plan.about)
    staging.remove()


def _other_names(plan: Plan, target: Held, undone: dict[str, str]) -> dict[int, tuple[Held, bytes]]:
    """Of files that are to be put in place, and have other names that stay: one of those, by inode.  ``undone``: those that an
    apply that is undone has noted.  Notes the same for an undo of ``plan``."""
    lacking = plan.lacking_names(OLD)
    links: dict[str, str] = {}
    if lacking:
        for path, entry in target.below(b""):
            if entry.kind != "d" and entry.ino in lacking and plan.entry(OLD, path) is None:
                links.setdefault(str(entry.ino), os.fsdecode(path))
    plan.about["links"] = links
    found = {ino: (target, path) for ino, path in plan.there.items()}
    for ino, entry in plan.lacking_names(NEW).items() if undone else ():
        path = os.fsencode(undone.get(str(ino), ""))
        there = target.look(path) if path and plan.entry(OLD, path) is None else None
        if there is not None and (there.kind, there.own, there.size, there.mtime) == (
            entry.kind,
            entry.own,
            entry.size,
            entry.mtime,
        ):
            found[ino] = target, path
    return found


# -- what is compared


def _base(row: Row, everything: list[Row]) -> Row | None:
    """The snapshot that ``row`` began as: its label BASE says which, or else what it stands on, but for checkpoints and their
    squashes.  Raises Refusal."""
    known = {each.name: each for each in everything}
    given = known.get(row.labels.get(BASE, ""))
    if given is not None and given.kind == "committed":
        return given
    name = row.parent
    if OF in row.labels and SQUASHED in row.labels:
        name = row.labels[SQUASHED]
    seen: set[str] = set()
    while name is not None:
        below = known.get(name)
        if below is None or name in seen:
            raise Refusal(
                f'nobody knows any more what "{row.name}" began as, since the checkpoint "{name}" is gone: see snapfs ls'
            )
        seen.add(name)
        labels = below.labels
        if OF in labels and SQUASHED in labels and NUMBER not in labels:
            name = labels[SQUASHED]
        elif OF in labels and labels.get(NUMBER, "").isdecimal():
            name = below.parent
        else:
            return below
    return None


def _differing(place: MountedTree, directory: str, base: Row | None, wanted: Held, paths: list[str]) -> Iterator[bytes]:
    """The paths at which the snapshot in ``directory`` differs from ``base``, what is in a directory right after it."""
    if base is None:
        yield from sorted(map(os.fsencode, paths)) if paths else sorted(wanted.names(b""))
        return
    for line in place.compared(directory, f"changes committed/{file_name(base.name)}", paths):
        path = _ESCAPED.sub(_unescape, line[2:].encode(errors="surrogateescape"))
        yield path.strip(b"/")


def _is_asked(path: bytes, paths: list[str]) -> bool:
    """Whether ``path`` is one of ``paths``, or in one of them, or they are all."""
    asked = map(os.fsencode, paths)
    return not paths or any(path == each or path.startswith(each + b"/") for each in asked)


def _unescape(match: re.Match[bytes]) -> bytes:
    found = match[1]
    return b"\\" if found == b"\\" else b"\n" if found == b"n" else bytes([int(found, 8)])


def _open_files(place: MountedTree, kind: str, key: str) -> Held:
    path = place.rootfs(kind, key)
    try:
        return Held(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC), f'"{key}"')
    except OSError as error:
        raise Refusal(f'cannot look into "{key}": {error.strerror}: the tree\'s owner and root may', NOT_PERMITTED) from None


def _open_target(place: MountedTree, path: str) -> Held:
    """The directory that is to be changed; raises Refusal."""
    path = os.path.join(os.getcwd(), path)  # link/.. is what the kernel takes it for, and no other directory
    try:
        fd = open_without_links(path, os.O_RDONLY | os.O_DIRECTORY)
        path = os.readlink(f"/proc/self/fd/{fd}")
    except OSError as error:
        from snapfs.names import word

        to_do = {
            errno.ENOENT: f"there is no such directory: make it first (mkdir {word(path)}), or name another",
            errno.ENOTDIR: "it is no directory: name one",
            errno.ELOOP: f"a link leads there, which may lead elsewhere at any time: name {word(os.path.realpath(path))}",
        }.get(errno.ELOOP if os.path.islink(path) else error.errno or 0, error.strerror)
        status = NOT_PERMITTED if error.errno in (errno.EACCES, errno.EPERM) else FAILED
        raise Refusal(f"cannot apply anything to {path}: {to_do}", status) from None
    target = Held(fd, path)
    root = place.options()["root"]
    for inside, what in ((place.path, "in the tree"), (root, "in the data of the tree")):
        if f"{path}/".startswith(f"{inside}/") or _is_in(fd, inside):
            target.close()
            raise Refusal(f"cannot apply anything to {path}, which is {what}: name a directory elsewhere", USAGE)
    return target


def _is_in(fd: int, directory: str) -> bool:
    """Whether the directory open as ``fd`` is ``directory``, or in there, by whatever path."""
    try:
        sought = os.stat(directory)
    except OSError:
        return False
    here = os.dup(fd)
    try:
        while True:
            found = os.fstat(here)
            if (found.st_dev, found.st_ino) == (sought.st_dev, sought.st_ino):
                return True
            above = os.open("..", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=here)
            os.close(here)
            here = above
            next_one = os.fstat(here)
            if (next_one.st_dev, next_one.st_ino) == (found.st_dev, found.st_ino):
                return False
    except OSError:
        return False
    finally:
        os.close(here)


# -- what is said


@contextlib.contextmanager
def _counted(paths: Iterable[bytes]) -> Iterator[Iterator[bytes]]:
    """For a block: ``paths``, with a line on a terminal that tells how many were given so far."""
    progress = Progress()

    def given() -> Iterator[bytes]:
        for number, path in enumerate(paths):
            progress.show_count("comparing", number, 0)
            yield path

    try:
        yield given() if progress.is_shown else iter(paths)
    finally:
        progress.clear()


@contextlib.contextmanager
def _shown_steps(plan: Plan) -> Iterator[Callable[[str], None]]:
    """For a block: what to call with what is done now, in words; a line on a terminal tells how many steps that has taken."""
    progress, total = Progress(), plan.count()

    def doing(what: str) -> None:
        plan.watch = (lambda done: progress.show(what, done, total)) if progress.is_shown else None

    try:
        yield doing
    finally:
        plan.watch = None
        progress.clear()


def _order(steps: Iterable[Step], *, losses: bool) -> Iterator[Step]:
    return (step for step in steps if step.verb and step.is_loss == losses)


def _show(plan: Plan, target: str, what: str) -> None:
    """The plan: what goes first, all of it; then the rest, as far as that is to be read."""
    if not plan.count():
        table.show_line(f"{target} has all of {what} already: nothing to do")
        return
    table.show_line(f"{what} into {target}:")
    totals = {"D": 0, "A": 0, "C": 0}
    for step in _order(plan.steps(), losses=True):
        totals[step.verb] += 1
        words = "" if step.verb == "D" else ", a directory that is replaced"
        inside = f"  ({step.had - 1} in it{words})" if step.had > 1 else f"  ({words[2:]})" * bool(words)
        table.show_line(f"{step.verb} {step.shown}{inside}", "red")
    rest = _order(plan.steps(), losses=False)
    for step in islice(rest, _SHOWN):
        totals[step.verb] += 1
        inside = f"  ({step.has - 1} in it)" if step.has > 1 else ""
        table.show_line(f"{step.verb} {step.shown}{inside}", _COLOURS[step.verb])
    more = 0
    for step in rest:
        totals[step.verb] += 1
        more += 1
    if more:
        table.show_line(f"… and {more} more that are added or changed (--json tells all)")
    size = table.format_size(plan.size(NEW))
    table.show_line(f"{totals['D']} deleted, {totals['A']} added, {totals['C']} changed, {size} to copy")


def _show_json(plan: Plan, target: str, what: str) -> None:
    """The same as the beginning of a JSON object, which ends after it is done."""
    from snapfs.names import plain_json

    def dumped(value: Any) -> str:
        return plain_json(json.dumps(value, ensure_ascii=False))

    print(f'{{"target": {dumped(target)}, "key": {dumped(plan.about["key"])},\n"conflicts": [', end="")
    for nth, (path, why) in enumerate(plan.conflicts()):
        print("," * bool(nth) + "\n" + dumped({"path": shown(path), "why": why}), end="")
    print('],\n"steps": [', end="")
    nth = 0
    for losses in (True, False):
        for step in _order(plan.steps(), losses=losses):
            told = {"change": step.verb, "path": step.shown, "before": step.had, "after": step.has}
            print("," * bool(nth) + "\n" + dumped(told), end="")
            nth += 1


@contextlib.contextmanager
def _refusing(target: Held, otherwise: str = "nothing was changed") -> Iterator[None]:
    """For a block that may find that it can't be done: raises Refusal."""
    import sqlite3

    try:
        yield
    except Unfit as unfit:
        raise Refusal(str(unfit)) from None
    except Changed as found:
        raise Refusal(
            f"{shown(found.path)} was changed while it was being applied to {target.name}: all is as it was before; try again",
            BUSY,
        ) from None
    except sqlite3.Error as error:
        raise Refusal(f"cannot keep the plan in a temporary file: {error}; {otherwise}: make room in /var/tmp") from None
    except OSError as error:
        path = shown(error.filename) if isinstance(error.filename, bytes) else ""
        words = os.strerror(error.errno or 0)
        hint = {
            errno.EXDEV: "another file system is mounted there: unmount it, or name other paths",
            errno.EBUSY: "something is mounted there: unmount it, or name other paths",
            errno.EROFS: f"{words}: mount it so that it can be written",
            errno.ENOSPC: f"{words}: make room on the disk of {target.name} and on that of the tree's root",
            errno.EDQUOT: f"{words}: make room",
            errno.EACCES: f"{words}: do it as the user whose it is, or as root; what is yours may need chmod u+rwX first",
            errno.EPERM: f"{words}: do it as the user whose it is, or as root; lsattr shows whether it is immutable",
        }.get(error.errno or 0, words)
        status = NOT_PERMITTED if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) else FAILED
        raise Refusal(f"cannot apply {path or 'it'} to {target.name}: {hint}; {otherwise}", status) from None


VERBS = {
    "apply": Verb(
        "apply",
        "[KEY] [TARGET] [PATH…]",
        (
            Option("dry-run", "show what would be done, and do nothing", short="-n"),
            Option("force", "replace what was changed in TARGET, too; it is kept as all else that is replaced"),
            Option(
                "undo", "bring back what an apply has replaced: the last one, the last one of KEY, or that which NAME keeps"
            ),
            JSON,
        ),
        "Bring what changed in snapshot KEY since it began into the directory TARGET, or that which its label snapfs.source\n"
        "names, as the user who calls: all of it or nothing.  What it will do is printed first: what goes, then the rest.\n"
        "A path that was changed in TARGET, too, is a conflict, and nothing is touched (exit status 8).  What is replaced or\n"
        "deleted is kept as the committed snapshot KEY-undo-1, which --undo brings back.  PATH… limits it to these, from the\n"
        "root of the snapshot on; without TARGET they go after --.  One that is cut off is finished, or undone, by the next.",
        """
snapfs apply web --dry-run
snapfs apply web
snapfs apply web ~/copy src docs/index.md
snapfs apply web -- src
snapfs apply --undo web
""",
        _apply,
    )
}
