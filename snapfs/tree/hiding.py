"""What was just unlinked in a snapshot's directory, and which processes were refused to delete: both for some seconds.

A snapshot's entries can't be deleted one by one, but ``rm -r`` deletes all of them before it comes to the directory itself.
So an unlinked entry is hidden, and is back after a while, unless the snapshot is removed before.
"""

from __future__ import annotations

import time

import trio

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
