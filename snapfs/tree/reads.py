"""Which process has read what of a snapshot's directory lately: one that copies the directory copies links, not the files.

Moving a directory onto another file system is no rename (EXDEV): mv, file managers and others copy what the directory shows
and then delete that as ``rm -r`` does.  ``rm -r`` itself reads none of the entries.  So a process (a thread, in fact: no more
is known) that has just read all of them and now deletes is taken for one that moves.
"""

from __future__ import annotations

from collections.abc import Iterable

import trio

from snapfs.tree.inodes import Slot

LATELY = 10.0  # seconds from the last entry that was read to a deletion that belongs to it

COPYING = 600.0  # seconds that copying all may take, or answering the question what to do after a refusal

MOST = 1000  # pairs of a process and a snapshot that are remembered at once

_REFUSED = -1  # no slot


class Reads:
    """When each process has read which slots of which snapshot, and listed it (the slot of its directory)."""

    def __init__(self) -> None:
        self._read: dict[tuple[int, int], dict[int, float]] = {}  # the pair that has read last is the last

    def note(self, pid: int, number: int, slot: int) -> None:
        """Process ``pid`` has read the entry in ``slot`` of snapshot ``number``; so it no longer deletes what it has copied."""
        self._note(pid, number, slot).pop(_REFUSED, None)

    def note_refusal(self, pid: int, number: int) -> None:
        """``pid`` was refused to delete what it has copied of ``number``; it may go on with the rest at any time."""
        self._note(pid, number, _REFUSED)

    def _note(self, pid: int, number: int, slot: int) -> dict[int, float]:
        read = self._read[pid, number] = self._read.pop((pid, number), {})
        read[slot] = trio.current_time()
        if len(self._read) > MOST:
            del self._read[next(iter(self._read))]
        return read

    def was_refused(self, pid: int, number: int) -> bool:
        """Whether ``pid``, for all that is known, goes on deleting what it has copied of ``number``."""
        return self._has(self._read.get((pid, number), {}), _REFUSED, COPYING)

    def has_copied(self, pid: int, number: int, slots: Iterable[int]) -> bool:
        """Whether ``pid`` has just read all ``slots`` of ``number``."""
        read = self._read.get((pid, number), {})
        return any(self._has(read, slot, LATELY) for slot in slots) and all(self._has(read, slot, COPYING) for slot in slots)

    def has_copied_one(self, pid: int, number: int, slot: int) -> bool:
        """Whether ``pid`` has just read ``slot`` of ``number`` and never listed the others, as ``rm -r`` does first."""
        read = self._read.get((pid, number), {})
        return self._has(read, slot, LATELY) and not self._has(read, Slot.SNAPSHOT, COPYING)

    @staticmethod
    def _has(read: dict[int, float], slot: int, within: float) -> bool:
        return slot in read and trio.current_time() - read[slot] < within
