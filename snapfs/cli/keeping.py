"""Which checkpoints ``snapfs prune --keep-…`` keeps, and how the others go.  Pure."""

from __future__ import annotations

import time

from snapfs.cli.listing import children_first
from snapfs.labels import NUMBER, OF, PIN, SQUASHED

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from snapfs.cli.listing import Row


class Keep:
    """How many checkpoints of each workspace are to be kept: the ``last`` ones, and of each of so many hours and days in which
    there were any the last of these; in local time, as restic and borg do it."""

    def __init__(self, last: int = 0, hourly: int = 0, daily: int = 0) -> None:
        self._rules = (
            (last, "last", lambda row: row.id),
            (hourly, "hourly", lambda row: time.strftime("%Y-%m-%d %H %Z", time.localtime(row.created))),
            (daily, "daily", lambda row: time.strftime("%Y-%m-%d", time.localtime(row.created))),
        )

    def reasons(self, newest_first: Iterable[Row]) -> dict[str, str]:
        """The names of those of ``newest_first``, the checkpoints of one workspace, that are kept, each with the reason."""
        found: dict[str, list[str]] = {}
        checkpoints = list(newest_first)
        for most, word, time_of in self._rules:
            seen: set[object] = set()
            for row in checkpoints:
                if len(seen) == most:
                    break
                if time_of(row) not in seen:
                    seen.add(time_of(row))
                    found.setdefault(row.name, []).append(f"{word} {len(seen)}")
        return {name: ", ".join(words) for name, words in found.items()}


class Step:
    """One snapshot that goes: ``dissolves`` where something that stays stands on it, and takes over what it had."""

    __slots__ = ("dissolves", "row")

    def __init__(self, row: Row, *, dissolves: bool) -> None:
        self.row = row
        self.dissolves = dissolves


def checkpoints(everything: Iterable[Row], keys: Iterable[str] = ()) -> dict[str, list[Row]]:
    """The checkpoints of each workspace (of ``keys`` alone, if there are any), the newest first."""
    wanted = set(keys)
    found: dict[str, list[Row]] = {}
    for row in everything:
        labels = row.labels
        key = labels.get(OF, "")
        if row.kind == "committed" and labels.get(NUMBER, "").isdecimal() and key and (not wanted or key in wanted):
            found.setdefault(key, []).append(row)
    for rows in found.values():
        rows.sort(key=lambda row: int(row.labels[NUMBER]), reverse=True)
    return found


def choose(
    everything: list[Row], keep: Keep, keys: Iterable[str] = (), named: Mapping[str, str] | None = None
) -> tuple[list[Step], list[tuple[Row, str]]]:
    """How the checkpoints go that are not kept, in the order in which that can be done; and those that stay, each with the
    reason, the newest of each workspace first.

    The newest stays, and what is pinned, or ``named`` (in images/, by the snapshots that are), and what an active snapshot or a
    view stands on.  The squashes that snapfs has made by
    itself of checkpoints go when nothing stands on them any more."""
    named = named or {}
    found = checkpoints(everything, keys)
    on_it: dict[str, list[Row]] = {}
    for row in everything:
        if row.parent is not None:
            on_it.setdefault(row.parent, []).append(row)
    going: list[Row] = []
    staying: list[tuple[Row, str]] = []
    for rows in found.values():
        reasons = keep.reasons(rows)
        for row in rows:
            why = (
                reasons.get(row.name)
                or ("it is the newest" if row is rows[0] else "")
                or _why(row, named, on_it.get(row.name, ()))
            )
            if why:
                staying.append((row, why))
            else:
                going.append(row)
    standing = {name: {row.name for row in rows} for name, rows in on_it.items()}
    steps = [_go(row, standing) for row in children_first(going)]
    bases = [row for row in everything if _is_base(row, found) and not standing.get(row.name) and not _why(row, named, ())]
    return steps + [_go(row, standing) for row in bases], staying


def called(image: str) -> str:
    """Why a snapshot stays that has this name in images/."""
    return f'it is called "{image}" in images/'


def _why(row: Row, named: Mapping[str, str], on_it: Iterable[Row]) -> str:
    """Why a snapshot stays that no rule keeps; "" where it goes."""
    if PIN in row.labels:
        return "it is pinned"
    if row.name in named:
        return called(named[row.name])
    return next((f'"{each.name}" ({each.kind}) stands on it' for each in on_it if each.kind != "committed"), "")


def _is_base(row: Row, found: dict[str, list[Row]]) -> bool:
    labels = row.labels
    return row.kind == "committed" and SQUASHED in labels and NUMBER not in labels and labels.get(OF) in found


def _go(row: Row, standing: dict[str, set[str]]) -> Step:
    """How ``row`` goes, where ``standing`` says what stands on each, by names; then it says what does after that."""
    children = standing.pop(row.name, set())
    if row.parent in standing:
        standing[row.parent].discard(row.name)
    if row.parent is not None and children:
        standing.setdefault(row.parent, set()).update(children)
    return Step(row, dissolves=bool(children))
