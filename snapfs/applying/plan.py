"""What is to be done to a directory so that it has what changed between two trees; and what it has that nobody expected there.

A plan is made by looking alone.  It waits in a nameless file of SQLite's, for there may be a million paths, and is written out
as lines of JSON: the journal of an apply, and what an undo goes by.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import IO, Any, NamedTuple

from snapfs.applying.entries import Entry, Seen, alike, exact, merged
from snapfs.scan.changes import escaped

STAGING = ".snapfs-apply"
"""The directory, in the one that is changed, where an apply prepares what it is going to put in place."""

OLD, NEW, ASKED = "old", "new", "asked"
"""The sides of a plan: what is there before, and after; and what that was to be, where it got the owner of what was there."""

LEFT, LEFT_ASKED = "left", "left asked"
"""The last two, of earlier applies of the same."""


class Unfit(Exception):
    """It can't be done: the sentence says why, and what to do."""


class Step(NamedTuple):
    """One change: ``verb`` is A, C or D, or "" where just the times of a directory change; ``had`` and ``has``: how many files
    are there before and after, 0 for none.  ``is_place``: something is put in place of what is there, or that goes; else the
    directory itself becomes another."""

    number: int
    is_place: bool
    path: bytes
    verb: str
    had: int
    has: int
    is_loss: bool
    """Whether something goes that is not replaced by another version of itself: what is deleted, or a directory."""

    @property
    def shown(self) -> str:
        """The path, from the root of the snapshot on, written as in ``changes``."""
        return shown(self.path)


def shown(path: bytes) -> str:
    """``path`` as ``changes`` writes it."""
    return "/" + escaped(os.fsdecode(path))


def _step(row: Sequence[Any]) -> Step:
    number, is_place, path, verb, had, has, is_loss = row
    return Step(number, bool(is_place), path, verb, had, has, bool(is_loss))


class Plan:
    """Steps, all that each finds and leaves, and conflicts.  ``about``: what else is to be known of it, as JSON has it.
    ``close`` it."""

    def __init__(self) -> None:
        self.about: dict[str, Any] = {}
        self.watch: Callable[[int], None] | None = None
        """Called with how many steps ``places`` has given before the next, if it is to be."""
        self.there: dict[int, bytes] = {}
        """Of what has several names, by its inode: one that the target has already."""
        self._db = sqlite3.connect("", isolation_level=None)  # a nameless file, as far as memory has no room
        self._db.execute("PRAGMA journal_mode = OFF")
        self._db.execute("PRAGMA synchronous = OFF")
        self._db.execute("CREATE TABLE entry (side, path, data, PRIMARY KEY (side, path)) WITHOUT ROWID")
        self._db.execute("CREATE TABLE step (number INTEGER PRIMARY KEY, place, path, verb, had, has, loss)")
        self._db.execute("CREATE TABLE staged (number INTEGER PRIMARY KEY, ino)")
        self._db.execute("CREATE TABLE ordered (key PRIMARY KEY, path) WITHOUT ROWID")
        self._db.execute("CREATE TABLE placed (path PRIMARY KEY) WITHOUT ROWID")
        self._db.execute("CREATE TABLE conflict (path, why)")
        self._db.execute("CREATE TABLE first (inode PRIMARY KEY, path) WITHOUT ROWID")
        self._db.execute("BEGIN")

    def close(self) -> None:
        self._db.close()

    # -- steps

    def add(self, step: Step) -> None:
        row = (step.number, step.is_place, step.path, step.verb, step.had, step.has, step.is_loss)
        self._db.execute("INSERT INTO step VALUES (?, ?, ?, ?, ?, ?, ?)", row)

    def steps(self, *, backwards: bool = False) -> Iterator[Step]:
        """All of them, in the order in which they are done: what is put in place, and then directories."""
        order = "place, number DESC" if backwards else "place DESC, number"
        for row in self._db.execute(f"SELECT * FROM step ORDER BY {order}"):
            yield _step(row)

    def places(self, *, backwards: bool = False) -> Iterator[Step]:
        done = 0
        for step in self.steps(backwards=backwards):
            if step.is_place:
                if self.watch is not None:
                    self.watch(done)
                done += 1
                yield step

    def directories(self) -> Iterator[Step]:
        """The directories that become others: each after those in it."""
        return (step for step in self.steps() if not step.is_place)

    def order(self, path: bytes) -> None:
        """Have ``path`` among those of ``ordered``."""
        self._db.execute("INSERT OR REPLACE INTO ordered VALUES (?, ?)", (path.replace(b"/", b"\0"), path))

    def ordered(self) -> Iterator[bytes]:
        """All paths of ``order``, what is in a directory right after it."""
        for (path,) in self._db.execute("SELECT path FROM ordered ORDER BY key"):
            yield path

    def paths(self) -> Iterator[bytes]:
        """Those of all steps, what is in a directory right after it."""
        for step in self.steps():
            self.order(step.path)
        return self.ordered()

    def count(self) -> int:
        """How many steps change more than times."""
        found: int = self._db.execute("SELECT count(*) FROM step WHERE verb != ''").fetchone()[0]
        return found

    # -- conflicts

    def conflict(self, path: bytes, why: str) -> None:
        self._db.execute("INSERT INTO conflict VALUES (?, ?)", (path, why))

    def conflicts(self) -> Iterator[tuple[bytes, str]]:
        yield from self._db.execute("SELECT path, why FROM conflict")

    # -- what earlier applies have left

    def learn(self, earlier: Plan) -> None:
        """Note what ``earlier`` has left (``Since``)."""
        for step in earlier.steps():
            inside = (step.path + b"/", step.path + b"0")
            if step.is_place:
                self._db.execute("DELETE FROM entry WHERE side = ? AND path > ? AND path < ?", (LEFT, *inside))
                self._db.execute("DELETE FROM entry WHERE side = ? AND path = ?", (LEFT, step.path))
                self._db.execute("INSERT OR REPLACE INTO placed VALUES (?)", (step.path,))
                self._db.execute("DELETE FROM entry WHERE side = ? AND path > ? AND path < ?", (LEFT_ASKED, *inside))
                for path, entry in earlier.entries(NEW, step.path):
                    self.record(LEFT, path, entry)
                    self.order(path)
            elif (directory := earlier.entry(NEW, step.path)) is not None:
                self.record(LEFT, step.path, directory)
            asked = earlier.entry(ASKED, step.path)
            if asked is not None:
                self.record(LEFT_ASKED, step.path, asked)
            self.order(step.path)

    def is_placed(self, path: bytes) -> bool:
        """Whether an earlier apply has put something at ``path``, or taken it away."""
        return self._db.execute("SELECT 1 FROM placed WHERE path = ?", (path,)).fetchone() is not None

    # -- what is there before and after

    def record(self, side: str, path: bytes, entry: Entry) -> None:
        self._db.execute("INSERT OR REPLACE INTO entry VALUES (?, ?, ?)", (side, path, json.dumps(entry)))

    def entry(self, side: str, path: bytes) -> Entry | None:
        row = self._db.execute("SELECT data FROM entry WHERE side = ? AND path = ?", (side, path)).fetchone()
        return None if row is None else Entry(*json.loads(row[0]))

    def entries(self, side: str, path: bytes, *, backwards: bool = False) -> Iterator[tuple[bytes, Entry]]:
        """What is at ``path`` on this side, and all that is in it; each directory before, or ``backwards`` after it."""
        top = self.entry(side, path)
        if top is not None and not backwards:
            yield path, top
        if top is not None and top.kind != "d":
            if backwards:
                yield path, top
            return
        order = "DESC" if backwards else "ASC"
        query = f"SELECT path, data FROM entry WHERE side = ? AND path > ? AND path < ? ORDER BY path {order}"
        for below, data in self._db.execute(query, (side, path + b"/", path + b"0")):
            yield below, Entry(*json.loads(data))
        if top is not None and backwards:
            yield path, top

    def size(self, side: str) -> int:
        """Bytes of all regular files of this side."""
        rows = self._db.execute("SELECT data FROM entry WHERE side = ?", (side,))
        return sum(entry.size for entry in (Entry(*json.loads(data)) for (data,) in rows) if entry.kind == "f")

    def lacking_names(self, side: str) -> dict[int, Entry]:
        """What has names that this side of the plan doesn't tell, by inode."""
        found: dict[int, Entry] = {}
        left: dict[int, int] = {}
        for (data,) in self._db.execute("SELECT data FROM entry WHERE side = ?", (side,)):
            entry = Entry(*json.loads(data))
            if entry.is_linked:
                found[entry.ino] = entry
                left[entry.ino] = left.get(entry.ino, entry.nlink) - 1
        return {ino: entry for ino, entry in found.items() if left[ino] > 0}

    # -- what is staged

    def stage(self, number: int, ino: int) -> None:
        """Note that what step ``number`` puts in place is ready, with this inode (0: nothing is put there)."""
        self._db.execute("INSERT INTO staged VALUES (?, ?)", (number, str(ino)))  # which may be beyond 63 bits

    def staged(self, number: int) -> int:
        return int(self._db.execute("SELECT ino FROM staged WHERE number = ?", (number,)).fetchone()[0])

    def first_name(self, entry: Entry, path: bytes) -> bytes | None:
        """Where the inode of ``entry`` is already; None where it is seen the first time, and is at ``path`` from now on."""
        inode = f"{entry.dev}:{entry.ino}"
        row = self._db.execute("SELECT path FROM first WHERE inode = ?", (inode,)).fetchone()
        if row is None:
            self._db.execute("INSERT INTO first VALUES (?, ?)", (inode, path))
            return None
        found: bytes = row[0]
        return found

    # -- as text

    def write(self, file: IO[str]) -> None:
        """Write all of it but conflicts, a line each."""
        file.write(json.dumps(["about", self.about]) + "\n")
        for step in self._db.execute("SELECT * FROM step"):
            file.write(json.dumps(["step", *step[:2], os.fsdecode(step[2]), *step[3:]]) + "\n")
        for number, ino in self._db.execute("SELECT * FROM staged"):
            file.write(json.dumps(["staged", number, ino]) + "\n")
        for side, path, data in self._db.execute("SELECT * FROM entry WHERE side IN (?, ?, ?)", (OLD, NEW, ASKED)):
            file.write(f'["entry", "{side}", {json.dumps(os.fsdecode(path))}, {data}]\n')

    @classmethod
    def read(cls, file: Iterable[str]) -> Plan:
        """What ``write`` has written.  Raises ValueError where it is something else."""
        plan = cls()
        try:
            for line in file:
                what, *rest = json.loads(line)
                if what == "about":
                    plan.about = rest[0]
                elif what == "step":
                    plan.add(_step([*rest[:2], os.fsencode(rest[2]), *rest[3:]]))
                elif what == "staged":
                    plan.stage(rest[0], int(rest[1]))
                else:
                    plan.record(rest[0], os.fsencode(rest[1]), Entry(*rest[2]))
        except (ValueError, TypeError, IndexError, sqlite3.Error) as error:
            plan.close()
            raise ValueError(f"no plan: {error}") from None
        return plan


class Side:
    """What one side of a plan has, as a tree; ``files``: where its regular files are, if they are anywhere."""

    def __init__(self, plan: Plan, side: str, files: Seen | None = None) -> None:
        self._plan = plan
        self._side = side
        self._files = files

    def look(self, path: bytes) -> Entry | None:
        return self._plan.entry(self._side, path)

    def below(self, path: bytes) -> Iterator[tuple[bytes, Entry]]:
        return self._plan.entries(self._side, path)

    def names(self, path: bytes) -> list[bytes]:
        prefix = path + b"/" if path else b""
        below = (each[len(prefix) :] for each, _ in self._plan.entries(self._side, path) if each != path)
        return [name for name in below if b"/" not in name]

    def content(self, path: bytes) -> int | None:
        return None if self._files is None else self._files.content(path)


class Since:
    """The tree ``base``, with what the earlier applies that ``plan`` knows have left of it; ``asked``: what that was to be."""

    def __init__(self, base: Seen, plan: Plan, *, asked: bool = False) -> None:
        self._base = base
        self._plan = plan
        self._asked = asked

    def look(self, path: bytes) -> Entry | None:
        left = self._plan.entry(LEFT_ASKED, path) if self._asked else None
        left = left or self._plan.entry(LEFT, path)
        return left if left is not None or self._is_hidden(path) else self._base.look(path)

    def names(self, path: bytes) -> list[bytes]:
        raise NotImplementedError

    def below(self, path: bytes) -> Iterator[tuple[bytes, Entry]]:
        raise NotImplementedError

    def content(self, path: bytes) -> int | None:
        is_base = self._plan.entry(LEFT, path) is None and not self._is_hidden(path)
        return self._base.content(path) if is_base else None

    def _is_hidden(self, path: bytes) -> bool:
        """Whether ``path``, or a directory above, is no longer the base's."""
        while path:
            if self._plan.is_placed(path):
                return True
            path = path.rpartition(b"/")[0]
        return False


class Nothing:
    """An empty tree."""

    def names(self, path: bytes) -> list[bytes]:
        return []

    def look(self, path: bytes) -> Entry | None:
        return None

    def below(self, path: bytes) -> Iterator[tuple[bytes, Entry]]:
        return iter(())

    def content(self, path: bytes) -> int | None:
        return None


def make_plan(
    base: Seen,
    wanted: Seen,
    target: Seen,
    paths: Iterable[bytes],
    plan: Plan,
    *,
    since: Seen | None = None,
    partial: bool = False,
) -> None:
    """Put into ``plan`` how ``target`` gets what ``wanted`` has and ``base`` has not, at these ``paths``: all that differ, what
    is in a directory right after it.  ``since``: what is expected there instead of ``base``.  ``partial``: they may lack
    directories above them that differ, too.

    A path at which ``target`` has something else than ``base`` is a conflict, unless it has what ``wanted`` has; the steps
    are those that would do it all the same.  Raises Unfit, and OSError with the path as ``filename``."""
    planner = _Planner(base, since or base, wanted, target, plan, partial)
    for path in paths:
        planner.take(path)
    planner.end()


class _Planner:
    def __init__(self, origin: Seen, base: Seen, wanted: Seen, target: Seen, plan: Plan, partial: bool) -> None:
        self._origin = origin
        self._base = base
        self._wanted = wanted
        self._target = target
        self._plan = plan
        self._partial = partial
        self._number = 0
        self._whole: bytes | None = None  # what is in there has been dealt with
        self._linked: dict[tuple[int, int], int] = {}  # what has several names, and the inode that it has in the target
        self._pending: dict[bytes, bool] = {}  # directories above that change; whether more than their times
        self._present: bytes | None = None  # a directory that the target has
        self._filled: set[bytes] = set()  # those of them in which something is put, or goes: their times change by that

    def take(self, path: bytes) -> None:
        """Deal with ``path``, and all in it where that takes no line of its own."""
        if self._whole is not None and path.startswith(self._whole):
            return
        ahead = self._taken(path)
        if ahead:
            while ahead:
                ahead += self._taken(ahead.pop())
            self._whole = path + b"/"

    def _taken(self, path: bytes) -> list[bytes]:
        """Deal with ``path``; what is to be dealt with before all else then, the first one last."""
        self._leave(path)
        before, after = self._base.look(path), self._wanted.look(path)
        if path.partition(b"/")[0] == STAGING.encode():
            raise Unfit(f'there is a "{STAGING}" in the snapshot, which is what apply calls its own directory: remove it there')
        if before is None and after is None:  # it has vanished
            return []
        there = self._target.look(path)
        missing = None if there is not None else self._missing(path)
        if missing is not None:
            if after is None:
                return []
            path, before, after = missing, self._base.look(missing), self._wanted.look(missing)
            if before is None and self._partial:
                raise Unfit(f"{shown(missing)} is not there yet: give that, and not just what is in it")
            self._leave(path)
            there = self._target.look(path)
        if before is not None and after is not None and self._is_untouched(path, before, after, missing is not None):
            return []
        if after is not None and there is not None and after.kind == there.kind == "d":
            return self._change_directory(path, before, after, there)
        if any(each is not None and each.kind == "d" for each in (before, after, there)):
            self._whole = path + b"/"
        if there is not None or after is not None:
            self._place(path, before, after, there)
        return []

    def end(self) -> None:
        while self._pending:
            self._finish(*self._pending.popitem())

    def _missing(self, path: bytes) -> bytes | None:
        """The highest directory above ``path`` that the target hasn't got."""
        directory = path.rpartition(b"/")[0]
        known = self._present
        if directory == known:
            return None
        names = directory.split(b"/") if directory else []
        for nth in range(1, len(names) + 1):
            above = b"/".join(names[:nth])
            if known is not None and (known + b"/").startswith(above + b"/"):
                continue
            found = self._target.look(above)
            if found is None or found.kind != "d":
                return above
        self._present = directory
        return None

    def _is_untouched(self, path: bytes, before: Entry, after: Entry, missing: bool) -> bool:
        """Whether both sides have the same."""
        if before.kind == "d" or missing:
            return before.kind == after.kind and before.own == after.own and not missing
        if after.is_linked or after.nlink != before.nlink:  # names were made or taken away: which, the count doesn't tell
            return False
        return exact(path, before, self._base, after, self._wanted)

    def _change_directory(self, path: bytes, before: Entry | None, after: Entry, there: Entry) -> list[bytes]:
        """A directory that stays one; where it was made in the target, too, what is in it is to be taken one by one."""
        if there.mode not in (after.mode if before is None else before.mode, after.mode):
            self._plan.conflict(path, "has other permissions")
        self._pending[path] = True
        if before is None or before.kind != "d":
            return [path + b"/" + name for name in sorted(self._wanted.names(path), reverse=True)]
        return []

    def _place(self, path: bytes, before: Entry | None, after: Entry | None, there: Entry | None) -> None:
        origin = before
        if after is not None and there is not None and after.kind == there.kind:
            origin = before if self._origin is self._base else self._origin.look(path)
            if self._is_there(path, merged(origin, after, there), there):
                return
        if there is None and before is not None:
            self._plan.conflict(path, "is gone")
        had, has = 0, 0
        for below, entry in _all(path, there, self._target):
            self._plan.record(OLD, below, entry)
            had += 1
            known = before if below == path else self._base.look(below)
            if known is None or not alike(below, entry, self._target, known, self._base):
                wanted = after if below == path else self._wanted.look(below)
                if wanted is None or not alike(below, entry, self._target, wanted, self._wanted):
                    was = "is new" if known is None else "was changed" if entry.kind == known.kind else "is of another kind"
                    self._plan.conflict(below, was)
        for below, entry in _all(path, after, self._wanted):
            if entry.is_linked:
                self._linked.setdefault((entry.dev, entry.ino), 0)
            if below == path and there is not None and entry.kind == there.kind:
                self._plan.record(ASKED, path, entry)
                entry = merged(origin, entry, there)
            self._plan.record(NEW, below, entry)
            has += 1
        is_loss = there is not None and (after is None or there.kind == "d")
        verb = "A" if there is None else "D" if after is None else "C"
        self._number += 1
        self._plan.add(Step(self._number, True, path, verb, had, has, is_loss))
        above = path.rpartition(b"/")[0]
        self._pending.setdefault(above, False)
        self._filled.add(above)

    def _is_there(self, path: bytes, after: Entry, there: Entry) -> bool:
        """Whether the target has all of that already."""
        if not exact(path, there, self._target, after, self._wanted):
            return False
        if after.kind != "d":
            return self._is_linked_there(path, after, there) if after.is_linked else not there.is_linked
        found = 0
        for below, entry in self._target.below(path):
            wanted = self._wanted.look(below)
            if wanted is None or not exact(below, entry, self._target, wanted, self._wanted):
                return False
            found += 1
        return found == sum(1 for _ in self._wanted.below(path))

    def _is_linked_there(self, path: bytes, after: Entry, there: Entry) -> bool:
        """Whether ``path`` has as many names in the target, and is another name of what its other names are."""
        inode = (after.dev, after.ino)
        found = there.ino if there.nlink == after.nlink else 0
        if self._linked.setdefault(inode, found) != found or not found:
            self._linked[inode] = 0  # once one name is put in place, all are that come after it
            return False
        self._plan.there[after.ino] = path
        return True

    def _leave(self, path: bytes) -> None:
        """Finish the directories that ``path`` is not in."""
        for directory in [*self._pending][::-1]:
            if directory and path != directory and not path.startswith(directory + b"/"):
                self._finish(directory, self._pending.pop(directory))

    def _finish(self, path: bytes, changed: bool) -> None:
        after, there = self._wanted.look(path), self._target.look(path)
        if after is None or there is None or after.kind != "d" or there.kind != "d":
            return
        found = there._replace(mtime=after.mtime, atime=after.atime)
        if changed:
            better = merged(self._origin.look(path), after, there)
            found = found._replace(mode=better.mode, uid=better.uid, gid=better.gid, attributes=better.attributes)
        if found.own == there.own and path not in self._filled:
            return
        self._filled.discard(path)
        self._plan.record(OLD, path, there)
        self._plan.record(NEW, path, found)
        self._plan.record(ASKED, path, after)
        self._number += 1
        is_other = found.own != there.own
        self._plan.add(Step(self._number, False, path, "C" if is_other else "", 1, 1, False))


def _all(path: bytes, top: Entry | None, tree: Seen) -> Iterable[tuple[bytes, Entry]]:
    """What is at ``path`` in ``tree``, where ``top`` was seen just now, and all that is in it."""
    if top is None:
        return ()
    return tree.below(path) if top.kind == "d" else [(path, top)]
