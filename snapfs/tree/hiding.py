"""What was just unlinked in a snapshot's directory, and which processes were refused to delete: both for some seconds.  And how
often a directory in there was removed that came back.

A snapshot's entries can't be deleted one by one, but ``rm -r`` deletes all of them before it comes to the directory itself.
So an unlinked entry is hidden, and is back after a while, unless the snapshot is removed before.
"""

from __future__ import annotations

import time
from collections import Counter

import trio

from snapfs.tree.inodes import unpack

HIDDEN = 5.0  # seconds after the last unlink in a snapshot until what was unlinked there is back

TEARDOWN = 3.0  # seconds after each refusal for which its process is held to be deleting the whole snapshot


class Hidden:
    """The entries that were unlinked just now, by snapshot."""

    def __init__(self) -> None:
        self._hidden: dict[int, tuple[frozenset[str], float]] = {}  # by snapshot id, the one that goes on longest is the last

    def hide(self, number: int, name: str) -> None:
        """Take the fixed entry ``name`` out of snapshot ``number``'s listing for as long as a process that deletes the whole
        snapshot may need until its rmdir."""
        now = trio.current_time()
        for other in [other for other, (_, until) in self._hidden.items() if until <= now]:
            del self._hidden[other]
        names_before, _ = self._hidden.pop(number, (frozenset[str](), 0.0))
        self._hidden[number] = names_before | {name}, now + HIDDEN

    def has(self, number: int, name: str) -> bool:
        """Whether the fixed entry ``name`` of snapshot ``number`` was unlinked, just now."""
        hidden, until = self._hidden.get(number, ((), 0.0))
        return name in hidden and until > trio.current_time()

    def forget(self, number: int) -> None:
        """Snapshot ``number`` is gone."""
        self._hidden.pop(number, None)


class Teardowns:
    """Which processes were just refused to delete something of a snapshot, and may go on with its other entries."""

    def __init__(self) -> None:
        self._refused: dict[tuple[int, int], float] = {}  # when, by process and snapshot id

    def note(self, pid: int, number: int) -> None:
        """Process ``pid`` has just been refused to delete snapshot ``number``, or an entry of it."""
        now = time.monotonic()
        for key in [key for key, when in self._refused.items() if when < now - TEARDOWN]:
            del self._refused[key]
        self._refused[pid, number] = now

    def has(self, pid: int, number: int) -> bool:
        """Whether process ``pid`` is held to be deleting the whole of snapshot ``number``."""
        return self._refused.get((pid, number), 0.0) > time.monotonic() - TEARDOWN


class Removals:
    """How often directories inside snapshots were removed, and came back.  The kernel, which takes what was removed for dead as
    long as anybody holds it, needs another generation each time."""

    def __init__(self) -> None:
        self._counts: dict[int, Counter[int]] = {}  # of inodes, by the number that they have of their snapshot

    def note(self, inode: int) -> None:
        """The directory that has ``inode`` is removed."""
        self._counts.setdefault(unpack(inode)[0], Counter())[inode] += 1

    def of(self, inode: int) -> int:
        """How often what has ``inode`` was removed."""
        counts = self._counts.get(unpack(inode)[0]) if self._counts else None
        return counts[inode] if counts else 0

    def forget(self, node: int) -> None:
        """The snapshot is gone for which inodes have the number ``node``."""
        self._counts.pop(node, None)
