"""Which process has read what of a snapshot's directory: one that copies the directory copies links, not the files.

Moving a directory onto another file system is no rename (EXDEV): mv, file managers and others copy what the directory shows
and then delete that as ``rm -r`` does.  ``rm -r`` itself reads none of the entries.  So a process (a thread, in fact: no more
is known) that has read all of them and then deletes is taken for one that moves.  It may have copied thousands of others in
between, to a slow disk.

What is remembered of one user's processes makes room for that user's alone.
"""

from __future__ import annotations

import os
import time
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterable
from contextlib import suppress

import trio

from snapfs.tree.inodes import Slot

LATELY = 600.0  # seconds from what a process has read last to what it deletes, or until it answers a question that it asks

MOST, MOST_OF_USER = 100_000, 1000
"""Pairs of a process and a snapshot that are remembered of the owner and root, and of each other user."""

IDLE = 0.1  # seconds in which no other process comes to have the number of one that has ended: all others are given out before

_TICKS = os.sysconf("SC_CLK_TCK")

_REFUSED = 1  # the bit of no slot: none is 0


class _Process:
    """What one process of ``user`` has read, or listed (the slot of the directory), of each snapshot: bits."""

    def __init__(self, user: int | None) -> None:
        self.user = user
        self.seen: dict[int, int] = {}
        self.last = 0.0
        self.has_read_much = False
        """It has read of more snapshots than can be remembered, and may have copied any."""
        self.known_since = time.clock_gettime(time.CLOCK_BOOTTIME)


class Reads:
    """What each process has read of which snapshot."""

    def __init__(self) -> None:
        self._processes: dict[int, _Process] = {}
        self._of_user: defaultdict[int | None, OrderedDict[int, None]] = defaultdict(OrderedDict)  # who was active last is last
        self._pairs: Counter[int | None] = Counter()

    def note(self, user: int | None, pid: int, number: int, slot: int) -> None:
        """Process ``pid`` of ``user`` (as in ``Caller``) has read the entry in ``slot`` of snapshot ``number``; so it no longer
        deletes what it has copied."""
        process = self._processes.get(pid)
        if process is not None and process.last < trio.current_time() - IDLE and started(pid) > process.known_since:
            self._forget(pid)  # another process has the number by now
            process = None
        if process is None:
            process = self._processes[pid] = _Process(user)
        self._is_active(pid, process)
        if process.has_read_much:
            return
        before = process.seen.get(number)
        process.seen[number] = ((before or 0) | 1 << slot) & ~_REFUSED
        if before is None:
            self._pairs[process.user] += 1
            self._bound(process)

    def note_refusal(self, pid: int, number: int) -> None:
        """``pid`` was refused to delete what it has copied of ``number``; it may go on with the rest at any time."""
        process = self._processes[pid]
        self._is_active(pid, process)
        if number in process.seen:
            process.seen[number] |= _REFUSED

    def _is_active(self, pid: int, process: _Process) -> None:
        """``pid`` does something now; those of its user that have done nothing for long are forgotten."""
        pids, now = self._of_user[process.user], trio.current_time()
        pids[pid] = None
        pids.move_to_end(pid)
        process.last = now
        while self._processes[oldest := next(iter(pids))].last < now - LATELY:
            self._forget(oldest)

    def _forget(self, pid: int) -> None:
        process = self._processes.pop(pid)
        del self._of_user[process.user][pid]
        self._pairs[process.user] -= len(process.seen)
        if not self._of_user[process.user]:
            del self._of_user[process.user], self._pairs[process.user]

    def _bound(self, process: _Process) -> None:
        user = process.user
        most = MOST if user is None else MOST_OF_USER
        if self._pairs[user] > most and len(process.seen) > most // 2:
            self._pairs[user] -= len(process.seen)
            process.seen.clear()
            process.has_read_much = True
        while self._pairs[user] > most:
            self._forget(next(iter(self._of_user[user])))

    def was_refused(self, pid: int, number: int) -> bool:
        """Whether ``pid``, for all that is known, goes on deleting what it has copied of ``number``."""
        process = self._processes.get(pid)
        if process is None or not (process.has_read_much or process.seen.get(number, 0) & _REFUSED):
            return False  # whichever process has the number now: most removals come here, and to ask /proc takes longer
        return bool(self._seen(pid, number) & _REFUSED)

    def has_copied(self, pid: int, number: int, slots: Iterable[int]) -> bool:
        """Whether ``pid`` has read all ``slots`` of ``number``."""
        seen = self._seen(pid, number)
        return seen != 0 and all(seen >> slot & 1 for slot in slots)

    def has_copied_one(self, pid: int, number: int, slot: int) -> bool:
        """Whether ``pid`` has read ``slot`` of ``number`` and never listed the others, as ``rm -r`` does first."""
        seen = self._seen(pid, number)
        return bool(seen >> slot & 1) and not seen >> Slot.SNAPSHOT & 1

    def _seen(self, pid: int, number: int) -> int:
        """What process ``pid`` has read of ``number``, as bits; all that it may have read."""
        process = self._processes.get(pid)
        if process is None or process.last < trio.current_time() - LATELY:
            return 0
        if started(pid) > process.known_since:  # another process has the number by now
            self._forget(pid)
            return 0
        return -1 if process.has_read_much else process.seen.get(number, 0)


def started(pid: int) -> float:
    """When process ``pid`` was started, in seconds since the machine was, and not too late; 0 where that can't be known."""
    with suppress(OSError, ValueError, IndexError):
        fd = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)  # a third of the calls that a file object makes
        try:
            ticks = os.read(fd, 4096).rpartition(b")")[2].split()[19]
        finally:
            os.close(fd)
        return int(ticks) / _TICKS - 0.1
    return 0.0
